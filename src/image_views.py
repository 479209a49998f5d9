# Copyright 2026 The TA-LLaVA Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Pictures in several views, as LLaVA-NeXT and LLaVA-OneVision cut them: the whole picture, made square, and the tiles of a
larger one, which is laid on a canvas of whole tiles. VMTC compresses each view by itself.

1. `layout_of` finds the tiles of a picture, and which of their patches hold it: the others are padding of its aspect ratio.
2. `count_packed_tokens` says how many visual tokens are left. Processor and model both call it, so they agree.
3. `ViewCompression` runs the stages of VMTC. Padding is dropped in the first one, and is never kept or merged. Every view
   keeps its budget, or all its patches if it has fewer. With a total budget, `share_total` gives the more important tiles
   more: a tile is as important as the patches of the whole picture that show the same (`tile_coverage`).
4. `pack_views` joins what is left: the whole picture, then the tiles row by row, with a newline after each row of tiles.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import select_best_resolution
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils.generic import maybe_autocast

from .vision_towers import TowerCompression
from .vmtc import VmtcStage, compress_tokens, count_visual_tokens, importance_scores, plan_stages, stage_layers


# --- where the patches are -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViewLayout:
    """
    The views of a picture.

    Args:
        side (`int`): Patches on each side of a view.
        grid (`tuple[int, int]`): Rows and columns of tiles; (0, 0) if the picture is a single view, padded to a square.
        content (`tuple[int, int, int, int]`): Top, bottom, left and right, in patches, of the picture on the canvas that the
            tiles, or that single view, make up. The rest is padding.
    """

    side: int
    grid: tuple[int, int]
    content: tuple[int, int, int, int]

    @property
    def num_views(self) -> int:
        return 1 + self.grid[0] * self.grid[1]

    @property
    def num_newlines(self) -> int:
        return max(self.grid[0], 1)

    def regions(self) -> list[tuple[int, int, int, int]]:
        """Top, bottom, left and right of what is not padding in each view, in patches of that view."""
        if self.grid == (0, 0):
            return [self.content]
        side, (top, bottom, left, right) = self.side, self.content
        regions = [(0, side, 0, side)]
        for row in range(self.grid[0]):
            for column in range(self.grid[1]):
                y, x = row * side, column * side
                edges = (top - y, bottom - y, left - x, right - x)
                regions.append(tuple(min(max(edge, 0), side) for edge in edges))  # type: ignore[arg-type]
        return regions

    def count_patches(self) -> list[int]:
        """Patches of each view that are not padding."""
        return [(bottom - top) * (right - left) for top, bottom, left, right in self.regions()]


def layout_of(image_size: Any, pinpoints: list[list[int]] | None, view_size: int, side: int) -> ViewLayout:
    """
    Args:
        image_size (`tuple[int, int]`): Height and width of the picture in pixels.
        pinpoints (`list[list[int]]`, *optional*): The sizes that a canvas may have (height, width), in pixels; `None` for a
            picture that is a single view, padded to a square.
        view_size (`int`): Pixels on each side of a view.
        side (`int`): Patches on each side of a view.
    """
    height, width = (int(pixels) for pixels in image_size)
    grid = (0, 0)
    if pinpoints is not None:
        canvas = select_best_resolution((height, width), pinpoints)
        grid = canvas[0] // view_size, canvas[1] // view_size
    rows, columns = max(grid[0], 1) * side, max(grid[1], 1) * side
    # Rounded as the library's `unpad_image` does
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        padding = min(padding, (rows - 1) // 2) if pinpoints is None else padding  # a single view keeps a row
        return ViewLayout(side, grid, (padding, rows - padding, 0, columns))
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    padding = min(padding, (columns - 1) // 2) if pinpoints is None else padding
    return ViewLayout(side, grid, (0, rows, padding, columns - padding))


def count_packed_tokens(layout: ViewLayout, settings: Any, num_visual_tokens: int | None = None) -> int:
    """
    Visual tokens that a picture has in the end, newlines among them.

    Args:
        settings: The model's config or the processor; it has fields of [`VmtcConfig`] and `vmtc_total_visual_tokens`.
        num_visual_tokens (`int`, *optional*): Visual tokens per view in this call; it replaces the settings.

    Raises:
        `ValueError`: The budget is not possible.
    """
    patches, total = layout.count_patches(), total_of_call(settings, num_visual_tokens)
    if total is not None:
        _check_total(total, patches)
        return min(total, sum(patches)) + layout.num_newlines
    budget = count_visual_tokens(settings, layout.side**2, num_visual_tokens)
    return sum(min(budget, count) for count in patches) + layout.num_newlines


def total_of_call(settings: Any, num_visual_tokens: int | None = None) -> int | None:
    """The budget of a whole picture, if there is one and a call names no other for each view."""
    if not settings.use_vmtc or num_visual_tokens is not None:
        return None
    check_one_budget(settings)
    return settings.vmtc_total_visual_tokens


def check_one_budget(settings: Any) -> None:
    """Raises `ValueError` if a config or processor has a budget for each view and one for a whole picture."""
    each, total = settings.vmtc_num_visual_tokens, settings.vmtc_total_visual_tokens
    if each is not None and total is not None:
        raise ValueError(
            f"`vmtc_num_visual_tokens` is {each} for each view, but `vmtc_total_visual_tokens` is {total} for the whole "
            "picture. A picture has one budget: set the other to `None`."
        )


def check_compilable(settings: Any, num_visual_tokens: int | None = None) -> None:
    """Raises `ValueError` if the number of tokens of a view depends on what is in the picture."""
    total = total_of_call(settings, num_visual_tokens)
    if total is not None:
        raise ValueError(
            f"`vmtc_total_visual_tokens` is {total}, but a compiled vision tower cannot wait for what is in a picture. Use "
            "`vmtc_num_visual_tokens` (`--visual-tokens`), or do not compile."
        )


def _check_total(total: int, patches: list[int]) -> None:
    needed = sum(count > 0 for count in patches)
    if total < needed:
        raise ValueError(
            f"`vmtc_total_visual_tokens` is {total}, but a picture has {needed} views with content, and each keeps at least "
            f"one token. Set it to {needed} or more, or use `vmtc_num_visual_tokens`."
        )


# --- a total budget ------------------------------------------------------------------------------------------------


def tile_coverage(layout: ViewLayout) -> np.ndarray:
    """
    How much of each patch of the whole picture each tile shows, `(tiles, patches)` in [0, 1]. The whole picture was squeezed
    to a square; on the canvas of the tiles it has its own shape.
    """
    side, (rows, columns), (top, bottom, left, right) = layout.side, layout.grid, layout.content

    def overlap(num_tiles: int, start: int, stop: int) -> np.ndarray:
        """Of the patches along one side, `(tiles, patches)`, if the content is on the canvas from `start` to `stop`."""
        edges = (np.arange(num_tiles + 1) * side - start) / max(stop - start, 1) * side
        low, high = edges[:-1, None], edges[1:, None]
        patch = np.arange(side)
        return (np.minimum(high, patch + 1) - np.maximum(low, patch)).clip(0, 1)

    coverage = np.einsum("ri,cj->rcij", overlap(rows, top, bottom), overlap(columns, left, right))
    return coverage.reshape(rows * columns, side * side)


def share_total(total: int, patches: list[int], weights: list[float]) -> list[int]:
    """
    Splits a total budget among views in proportion to their `weights`, by the highest averages of Sainte-Lague. Every view
    with content gets at least one token, and none more than it has `patches`.
    """
    total = min(total, sum(patches))
    seats = np.arange(max(patches))
    claims = np.asarray(weights)[:, None] / np.where(seats > 0, seats + 0.5, 1)
    claims[:, 0] = np.inf
    claims[seats >= np.asarray(patches)[:, None]] = -1
    highest = np.argsort(-claims.flatten(), kind="stable")[:total]
    return np.bincount(highest // len(seats), minlength=len(patches)).tolist()


# --- the tower -----------------------------------------------------------------------------------------------------


@dataclass
class ViewStage:
    """
    A block that compresses views: the how manieth such block it is, and which patch tokens `(views, tokens)` that it gets
    are not padding.
    """

    position: int
    is_real: torch.Tensor


@dataclass
class ViewCompression(TowerCompression):
    """
    [`TowerCompression`] of views that end with different numbers of tokens. Shorter ones are padded after each stage, and
    the padding is masked in the blocks that follow.

    layouts (`list[ViewLayout]`): Of the pictures, whose views the tower gets one after the other.
    config ([`VmtcConfig`]), tower_config: Of the model, and of its vision tower.
    num_blocks (`int`): Blocks up to the one whose output is used.
    budget, total (`int`, *optional*): Tokens of each view, or of each picture.
    plans (`list[dict[int, VmtcStage]]`): For each view, as `plan_stages` makes it. With a total, the first stage makes it.
    masks (`dict`): The attention mask after each number of stages on each device, once it is made.
    """

    layouts: list[ViewLayout] = field(default_factory=list)
    config: Any = None
    tower_config: Any = None
    num_blocks: int = 0
    budget: int | None = None
    total: int | None = None
    plans: list[dict[int, VmtcStage]] = field(default_factory=list)
    masks: dict[tuple[int, torch.device], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = stage_layers(self.config, self.num_blocks)
        if not self.layers:
            raise ValueError(
                "`vmtc_layers` is empty, so no block can compress. Name at least one block, or set it to None."
            )
        self.patches = [count for layout in self.layouts for count in layout.count_patches()]
        if self.budget is not None:
            self.plans = self._plan([min(self.budget, count) for count in self.patches])

    def _plan(self, budgets: list[int]) -> list[dict[int, VmtcStage]]:
        return [
            plan_stages(self.config, count, self.num_blocks, budget) if count else {}
            for count, budget in zip(self.patches, budgets, strict=True)
        ]

    def lengths(self, num_stages: int | None = None) -> list[int]:
        """How many patch tokens each view has after the first stages, or after all."""
        lengths = list(self.patches)
        for layer in self.layers[:num_stages]:
            for view, plan in enumerate(self.plans):
                if layer in plan:
                    lengths[view] = plan[layer].num_kept + plan[layer].num_clusters
        return lengths

    def of_first_view(self) -> tuple[list[torch.Tensor], list[VmtcStage]]:
        trace, stages = [], []
        for position, layer in enumerate(self.layers):
            length = self.lengths(position)[0]
            trace.append(self.trace[position][0, :length])  # it is a whole picture, so that it has no padding before
            stages.append(self.plans[0].get(layer, VmtcStage(length, 0)))
        return trace, stages

    def stage_of(self, block_index: int, hidden_states: torch.Tensor) -> ViewStage | None:
        if block_index not in self.layers:
            return None
        position = self.layers.index(block_index)
        return ViewStage(position, self._is_real(position, hidden_states))

    def _is_real(self, num_stages: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Which patch tokens `(views, tokens)` in `hidden_states`, after the first stages, are not padding."""
        num_patches = hidden_states.shape[1] - int(self.has_class_token)
        if num_stages > 0:
            lengths = torch.tensor(self.lengths(num_stages))
            is_real = torch.arange(num_patches) < lengths[:, None]
        else:
            is_real = torch.zeros(len(self.patches), num_patches, dtype=torch.bool)
            regions = (region for layout in self.layouts for region in layout.regions())
            for view, (top, bottom, left, right) in zip(is_real, regions, strict=True):
                side = self.layouts[0].side
                view.view(side, side)[top:bottom, left:right] = True
        return is_real.to(hidden_states.device)

    def mask_of(self, block_index: int, hidden_states: torch.Tensor) -> Any:
        num_stages = sum(layer < block_index for layer in self.layers)
        if num_stages == 0 or len(set(self.lengths(num_stages))) == 1:
            return None  # before the first stage the tower sees the padding, as in the stock model
        key = num_stages, hidden_states.device
        if key not in self.masks:
            self.masks[key] = self._mask(num_stages, hidden_states)
        return self.masks[key]

    def _mask(self, num_stages: int, hidden_states: torch.Tensor) -> Any:
        """The attention mask of the blocks after the first stages."""
        is_real = self._is_real(num_stages, hidden_states)
        # A view without any patch is read by nothing, but must not give NaN.
        is_real = is_real | ~is_real.any(dim=1, keepdim=True)
        if self.has_class_token:
            is_real = torch.nn.functional.pad(is_real, (1, 0), value=True)
        return create_bidirectional_mask(self.tower_config, hidden_states, attention_mask=is_real)

    def __call__(self, hidden_states: torch.Tensor, row: torch.Tensor, stage: Any) -> torch.Tensor:
        num_first = int(self.has_class_token)
        patches = hidden_states[:, num_first:]
        importance = importance_scores(row, patches.shape[1])
        if stage.position == 0 and self.total is not None:
            self.plans = self._plan(self._share(importance))
        layer = self.layers[stage.position]
        before, after = self.lengths(stage.position), self.lengths(stage.position + 1)
        order = (~stage.is_real).int().sort(dim=1, stable=True).indices  # the real ones first
        output = patches.new_zeros(len(patches), max(after), patches.shape[2])
        becomes = torch.full_like(order, -1)
        for (count, planned), views in self._alike(layer, before).items():
            kept = order[views, :count]
            tokens = patches[views].gather(1, kept[..., None].expand(-1, -1, patches.shape[2]))
            slots = torch.arange(count, device=kept.device).expand_as(kept)
            if planned is not None:
                with maybe_autocast(patches.device.type, enabled=False):
                    tokens, slots = compress_tokens(
                        tokens,
                        importance[views].gather(1, kept),
                        planned.num_kept,
                        planned.num_clusters,
                        self.merge_weights,
                        self.kept_tokens,
                    )
            output[views, : tokens.shape[1]] = tokens
            becomes[views] = becomes[views].scatter(1, kept, slots)
        self.trace.append(becomes)
        return torch.cat([hidden_states[:, :num_first], output], dim=1)

    def _alike(self, layer: int, lengths: list[int]) -> dict[tuple[int, VmtcStage | None], list[int]]:
        """The views that a stage treats alike, by their number of tokens and what is planned for them."""
        views = defaultdict(list)
        for view, (count, plan) in enumerate(zip(lengths, self.plans, strict=True)):
            views[count, plan.get(layer)].append(view)
        return views

    def _share(self, importance: torch.Tensor) -> list[int]:
        """The budget of each view, from the importance `(views, patches)` of all patches."""
        budgets: list[int] = []
        scores = importance.detach().double().cpu().numpy()
        for layout in self.layouts:
            patches = layout.count_patches()
            tiles = tile_coverage(layout) @ scores[len(budgets)]  # what of the whole picture each tile shows
            rest = 1 - 1 / layout.num_views  # the whole picture gets what a tile gets on average
            weights = [1 - rest, *(rest * tiles / max(tiles.sum(), 1e-12))]
            budgets += share_total(int(self.total or 0), patches, weights)
        return budgets


def pack_views(
    features: torch.Tensor, lengths: list[int], layouts: list[ViewLayout], newline: torch.Tensor
) -> list[torch.Tensor]:
    """
    Args:
        features (`torch.FloatTensor` of shape `(views, tokens, d)`): Of the views of all pictures.
        lengths (`list[int]`): How many of the tokens of each view count.
        newline (`torch.FloatTensor` of shape `(d,)`): What stands after each row of tiles.

    Returns:
        `list[torch.FloatTensor]`: The visual tokens `(M, d)` of each picture.
    """
    views = [view[:length] for view, length in zip(features, lengths, strict=True)]
    newline = newline[None].to(features.device, features.dtype)
    packed = []
    for layout in layouts:
        whole, *tiles = views[: layout.num_views]
        del views[: layout.num_views]
        parts, columns = [whole], layout.grid[1]
        for row in range(layout.num_newlines):
            parts += [*tiles[row * columns : (row + 1) * columns], newline]
        packed.append(torch.cat(parts))
    return packed
