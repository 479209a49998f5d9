"""VMTC: which patches each stage keeps, merges and drops, as data and as panels of a picture."""

from collections import Counter
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from PIL import Image

from ..vision_towers import compression_of_call
from ..vmtc import VmtcStage
from .drawing import DROPPED, KEPT, Panels, draw_panel, enlarge


@dataclass(frozen=True)
class StageView:
    """
    The patches of an image after a stage.

    Args:
        clusters (`list[int]`): For each patch the number, from 1, of the cluster that it was merged into; `KEPT` if it is
            a token of its own; `DROPPED` if it is in no token.
        num_before (`int`): Number of tokens before the stage.
        num_kept (`int`): Number of tokens after it that are single patches.
        num_merged (`int`): Number of tokens after it that are clusters.
        num_dropped (`int`): Number of tokens that the stage dropped.
    """

    clusters: list[int]
    num_before: int
    num_kept: int
    num_merged: int
    num_dropped: int

    @property
    def title(self) -> str:
        counts = [f"{self.num_kept} kept"]
        counts += [f"{self.num_merged} merged"] if self.num_merged else []
        counts += [f"{self.num_dropped} dropped"] if self.num_dropped else []
        return f"{self.num_before} -> {self.num_kept + self.num_merged} ({', '.join(counts)})"


def compose_trace(trace: list[torch.Tensor], stages: list[VmtcStage]) -> list[StageView]:
    """
    Follows the patches of an image through the stages, from what each stage does to its tokens.

    A token that was merged once is a cluster from then on, even if a later stage keeps it. A cluster keeps its number while
    it exists. If clusters are merged, the one with the most patches gives its number to the new one.

    Args:
        trace (`list[torch.LongTensor]` of shapes `(n,)`, n falling): Per stage, which output token each token of one image
            becomes, -1 if it is dropped (`TowerCompression.trace`).
        stages (`list[VmtcStage]`): The stages; their first `num_kept` output tokens are single input tokens.
    """
    views: list[StageView] = []
    tokens = list(range(len(trace[0]))) if trace else []  # by patch: its token, or DROPPED
    numbers = [KEPT] * len(tokens)  # by token: its cluster, or KEPT
    for stage_trace, stage in zip(trace, stages, strict=True):
        becomes: list[int] = stage_trace.tolist()
        sizes = Counter(token for token in tokens if token != DROPPED)  # by token before the stage: its patches
        numbers = _number_clusters(becomes, stage.num_kept, numbers, sizes)
        tokens = [becomes[token] if token != DROPPED else DROPPED for token in tokens]
        num_kept = numbers.count(KEPT)
        views.append(
            StageView(
                clusters=[numbers[token] if token != DROPPED else DROPPED for token in tokens],
                num_before=len(becomes),
                num_kept=num_kept,
                num_merged=len(numbers) - num_kept,
                num_dropped=becomes.count(DROPPED),
            )
        )
    return views


def _number_clusters(becomes: list[int], num_kept: int, numbers: list[int], sizes: Counter[int]) -> list[int]:
    """
    The cluster, or `KEPT`, of each token after a stage.

    Args:
        becomes (`list[int]`): The output token of each input token, -1 if it is dropped.
        num_kept (`int`): Number of output tokens, the first ones, that are single input tokens.
        numbers (`list[int]`): The cluster of each input token, or `KEPT`.
        sizes (`Counter[int]`): Number of patches of each input token.
    """
    after: dict[int, int] = {}
    largest: dict[int, tuple[int, int]] = {}  # by merged token: size and number of its largest cluster
    for source, target in enumerate(becomes):
        if 0 <= target < num_kept:
            after[target] = numbers[source]
        elif target >= 0:
            candidate = (sizes[source] if numbers[source] != KEPT else 0, numbers[source])
            largest[target] = max(largest.get(target, (0, KEPT)), candidate)
    after |= {target: number for target, (_, number) in largest.items() if number != KEPT}
    used = set(after.values())
    unused = (number for number in count(1) if number not in used)
    for target in sorted(largest):
        if target not in after:
            after[target] = next(unused)
    return [after[target] for target in range(len(after))]


@torch.no_grad()
def trace_stages(
    config: Any, tower: Any, pixel_values: torch.Tensor, num_visual_tokens: int | None = None
) -> list[StageView]:
    """
    Runs a vision tower on one image and returns what VMTC does to its patches.

    Args:
        config ([`VmtcConfig`]): Config of the model, with VMTC on.
        tower (`PreTrainedModel`): Its vision tower, `model.model.vision_tower`.
        pixel_values (`torch.FloatTensor` of shape `(1, 3, H, W)`): The image from the image processor.
        num_visual_tokens (`int`, *optional*): Budget of this call. Defaults to the config's.

    Returns:
        `list[StageView]`: One per stage; none if the budget is the number of patches.
    """
    compression = compression_of_call(config, tower, pixel_values, config.vision_feature_layer, num_visual_tokens)
    if compression is None:
        return []
    tower(pixel_values, compression=compression)
    return stage_views(compression)


def stage_views(compression: Any) -> list[StageView]:
    """What VMTC did to the first image, or to the first view of it, after the call of the tower."""
    trace, stages = compression.of_first_view()
    return compose_trace([becomes.cpu() for becomes in trace], stages)


def stage_panels(image: Image.Image, views: list[StageView], patch_size: int) -> Panels:
    """
    Draws the image, and one panel per stage: kept patches as they are, each cluster in its colour with an outline, dropped
    patches dark.

    Args:
        image (`PIL.Image.Image`): RGB, as the vision tower sees it (`seen_image`).
        views (`list[StageView]`): From `compose_trace`; patches are in rows, the top row first.
        patch_size (`int`): Pixels of a patch.
    """
    large, side = enlarge(image, patch_size)
    num_patches = (image.width // patch_size) * (image.height // patch_size)
    panels = [(f"original ({num_patches} patches)", large)]
    panels += [(view.title, draw_panel(large, view.clusters, side)) for view in views]
    legend = "as in the image: a token of its own; one colour: patches merged into one token"
    if any(view.num_dropped for view in views):
        legend += "; dark: dropped"
    return Panels([("", panels)], (legend,) if views else ())
