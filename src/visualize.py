"""Draws what VMTC does to an image: which patches are kept, and which are merged with which, stage by stage."""

import colorsys
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .configuration_ta_llava import TaLlavaConfig
from .image_loading import load_rgb_image
from .inference import DEFAULT_MODEL
from .vmtc import VmtcStage, compression_of_call, count_visual_tokens, make_compressible, patch_grid
from .vmtc_cmai_patch import VmtcCmaiLlavaConfig


KEPT, DROPPED = 0, -1
MARGIN, TITLE_HEIGHT, FONT_SIZE = 8, 22, 14
MAX_COLUMNS = 4
# Small images are enlarged to this width, by a whole factor, so that their patches can be seen and titles fit.
MIN_PANEL_WIDTH = 300
_TINT, _DARKENING = 150, 200  # of 255

# The colours of Okabe and Ito, which the colour-blind can tell apart; more clusters than these get more hues.
_COLORS = [
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
]


@dataclass(frozen=True)
class StageView:
    """
    What has become of the patches of an image after a stage.

    Args:
        clusters (`list[int]`): For each patch the number, from 1, of the cluster that it was merged into; `KEPT` if it is
            a token of its own; `DROPPED` if it is none.
        num_before, num_kept, num_merged, num_dropped (`int`): Tokens before the stage; after it those that are single
            patches, and those that are clusters; and those that the stage dropped.
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
    From what each stage does to its tokens, what has become of each patch after each stage.

    What was merged once is a cluster from then on, also where a later stage keeps it. A cluster has its number for as long
    as it lives; of clusters that are merged, the one with the most patches gives its number to the new one.

    Args:
        trace (`list[torch.LongTensor]` of shapes `(n,)`, n falling): Per stage, which output token each token of one image
            becomes, -1 where it is dropped (`TowerCompression.trace`).
        stages (`list[VmtcStage]`): The stages; their first `num_kept` output tokens are single input tokens.
    """
    views: list[StageView] = []
    tokens = list(range(len(trace[0]))) if trace else []  # of each patch, its token, or -1
    numbers = [KEPT] * len(tokens)  # of each token, its cluster, or KEPT
    for stage_trace, stage in zip(trace, stages, strict=True):
        becomes: list[int] = stage_trace.tolist()
        sizes = [0] * len(numbers)  # of each token before the stage, its patches
        for token in tokens:
            if token >= 0:
                sizes[token] += 1
        after: dict[int, int] = {}
        founders: dict[int, tuple[int, int]] = {}  # of each merged token, size and number of its largest cluster
        for source, target in enumerate(becomes):
            if 0 <= target < stage.num_kept:
                after[target] = numbers[source]
            elif target >= 0:
                candidate = (sizes[source] if numbers[source] != KEPT else 0, numbers[source])
                founders[target] = max(founders.get(target, (0, KEPT)), candidate)
        after |= {target: number for target, (_, number) in founders.items() if number != KEPT}
        used = set(after.values())
        unused = (number for number in range(1, len(tokens) + 1) if number not in used)
        for target in sorted(founders):
            if target not in after:
                after[target] = next(unused)
        tokens = [becomes[token] if token >= 0 else DROPPED for token in tokens]
        numbers = [after[target] for target in range(len(after))]
        num_kept = numbers.count(KEPT)
        views.append(
            StageView(
                clusters=[numbers[token] if token >= 0 else DROPPED for token in tokens],
                num_before=len(becomes),
                num_kept=num_kept,
                num_merged=len(numbers) - num_kept,
                num_dropped=becomes.count(DROPPED),
            )
        )
    return views


def cluster_color(number: int) -> tuple[int, int, int]:
    """RGB colour of cluster `number`, from 1; neighbours in number differ in hue and lightness."""
    if number <= len(_COLORS):
        return _COLORS[number - 1]
    lightness = (0.35, 0.6, 0.78)[number % 3]
    red, green, blue = colorsys.hls_to_rgb(number * 0.618034 % 1, lightness, 0.8)
    return round(red * 255), round(green * 255), round(blue * 255)


def panel_boxes(num_panels: int, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of panels of `size`, in rows of at most `MAX_COLUMNS`, with room for titles."""
    width, height = size
    boxes = []
    for panel in range(num_panels):
        row, column = divmod(panel, MAX_COLUMNS)
        left = MARGIN + column * (width + MARGIN)
        top = TITLE_HEIGHT + row * (height + TITLE_HEIGHT + MARGIN)
        boxes.append((left, top, left + width, top + height))
    return boxes


def draw_stages(image: Image.Image, views: list[StageView], patch_size: int) -> Image.Image:
    """
    A picture with the image, and beside it one panel per stage: kept patches as they are, each cluster in its colour
    with an outline, dropped patches dark.

    Args:
        image (`PIL.Image.Image`): RGB, as the vision tower sees it.
        views (`list[StageView]`): From `compose_trace`; their patches are rows of the image, top first.
        patch_size (`int`): Pixels of a patch.
    """
    factor = max(1, math.ceil(MIN_PANEL_WIDTH / image.width))
    large = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    panels = [large, *(_draw_panel(large, view.clusters, patch_size * factor) for view in views)]
    num_patches = (image.width // patch_size) * (image.height // patch_size)
    titles = [f"original ({num_patches} patches)", *(view.title for view in views)]

    boxes = panel_boxes(len(panels), large.size)
    size = (max(right for _, _, right, _ in boxes) + MARGIN, max(bottom for *_, bottom in boxes) + MARGIN)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(FONT_SIZE)
    for panel, title, (left, top, _, _) in zip(panels, titles, boxes):
        picture.paste(panel, (left, top))
        draw.text((left, top - TITLE_HEIGHT + 3), title, fill="black", font=font)
    return picture


def _draw_panel(image: Image.Image, clusters: list[int], patch_size: int) -> Image.Image:
    columns = image.width // patch_size
    colors, mask = Image.new("RGB", image.size), Image.new("L", image.size)
    draw, draw_mask = ImageDraw.Draw(colors), ImageDraw.Draw(mask)
    line = max(1, patch_size // 10)
    for patch, number in enumerate(clusters):
        if number == KEPT:
            continue
        row, column = divmod(patch, columns)
        left, top = column * patch_size, row * patch_size
        right, bottom = left + patch_size - 1, top + patch_size - 1
        draw_mask.rectangle((left, top, right, bottom), fill=_DARKENING if number == DROPPED else _TINT)
        if number == DROPPED:  # the colours are black there
            continue
        draw.rectangle((left, top, right, bottom), fill=cluster_color(number))
        # The outline runs inside the patches of the cluster, so that what is kept stays as it is.
        edges = {
            (left, top, left + line - 1, bottom): patch - 1 if column > 0 else None,
            (right - line + 1, top, right, bottom): patch + 1 if column < columns - 1 else None,
            (left, top, right, top + line - 1): patch - columns,
            (left, bottom - line + 1, right, bottom): patch + columns,
        }
        for edge, neighbour in edges.items():
            if neighbour is None or not 0 <= neighbour < len(clusters) or clusters[neighbour] != number:
                draw_mask.rectangle(edge, fill=255)
    return Image.composite(colors, image, mask)


@torch.no_grad()
def visualize(
    image: Any, model: str | Path = DEFAULT_MODEL, num_visual_tokens: int | None = None
) -> tuple[Image.Image, list[StageView]]:
    """
    Runs the vision tower of a model on an image with VMTC and draws what it does. Of a whole LLaVA only the tower is
    loaded.

    Args:
        image: Path, URL, PIL image or array.
        model (`str` or `Path`): Folder or Hub repo of a LLaVA, with VMTC or without, a TA-LLaVA, or a vision tower.
        num_visual_tokens (`int`, *optional*): The budget. Defaults to that of the model if it has VMTC on, or to half of
            the patches.

    Returns:
        The picture, and what it shows.

    Raises:
        `ValueError`: The image cannot be read, the budget is not one for it, or the model has no tower that VMTC knows.
    """
    image = load_rgb_image(image)
    settings, image_processor = _load_settings(model)
    pixel_values = image_processor(image, return_tensors="pt")["pixel_values"]
    num_patches = math.prod(patch_grid(settings, pixel_values))
    count_visual_tokens(settings, num_patches, num_visual_tokens)  # before the weights are loaded
    seen = image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    seen = Image.fromarray(seen.float().round().clamp(0, 255).byte().permute(1, 2, 0).numpy(), "RGB")

    tower = _load_tower(model, settings)
    vmtc = compression_of_call(settings, tower, pixel_values, settings.vision_feature_layer, num_visual_tokens)
    if vmtc is None:  # the budget is the number of patches
        return draw_stages(seen, [], settings.vision_config.patch_size), []
    tower(pixel_values, vmtc=vmtc)
    stages = [stage for _, stage in sorted(vmtc.stages.items())]
    views = compose_trace([becomes[0] for becomes in vmtc.trace], stages)
    return draw_stages(seen, views, settings.vision_config.patch_size), views


def _load_settings(model: str | Path) -> tuple[Any, Any]:
    """The config of a model with VMTC on, and the image processor; a model that has no such config gets one."""
    try:
        settings = AutoConfig.from_pretrained(model, trust_remote_code=False)
        image_processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # files may be missing or damaged in any way
        raise _cannot_load(model, error) from error
    if settings.model_type not in (TaLlavaConfig.model_type, VmtcCmaiLlavaConfig.model_type):
        vision_config = getattr(settings, "vision_config", settings)  # of a LLaVA, or a CLIP with its text side
        if not isinstance(getattr(vision_config, "patch_size", None), int):
            raise ValueError(
                f"{str(model)!r} is a {settings.model_type!r} model, which has no vision tower of patches."
            )
        feature_layer = getattr(settings, "vision_feature_layer", VmtcCmaiLlavaConfig.vision_feature_layer)
        settings = VmtcCmaiLlavaConfig(vision_config=vision_config, vision_feature_layer=feature_layer)
    if not settings.use_vmtc:
        settings.use_vmtc, settings.vmtc_merge_weights = True, "normalized"  # the tower was trained without
    return settings, image_processor


def _load_tower(model: str | Path, settings: Any) -> Any:
    try:
        tower, info = AutoModel.from_pretrained(
            model,
            config=settings.vision_config,
            key_mapping={r"^(model\.)?vision_tower\.": ""},
            output_loading_info=True,
            dtype=torch.float32,
        )
    except Exception as error:
        raise _cannot_load(model, error) from error
    missing = sorted(key for key in info["missing_keys"] if key.startswith(("embeddings.", "encoder.")))
    if missing:
        raise ValueError(f"The vision tower in {str(model)!r} lacks {len(missing)} weights, such as {missing[0]!r}.")
    make_compressible(tower)
    return tower.eval()


def _cannot_load(model: str | Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:500] or type(error).__name__
    return ValueError(f"No vision tower could be loaded from {str(model)!r}: {reason}")
