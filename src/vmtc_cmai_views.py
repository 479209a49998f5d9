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
What LLaVA-NeXT and LLaVA-OneVision have in common, whose pictures are cut into views (`image_views.py`), beside what they
share with LLaVA (`vmtc_cmai_mixins.py`).

With VMTC off, the library's own code runs the tower and packs its features. With VMTC on, each view keeps its budget of
visual tokens. They have no grid, so that the library's packing, which removes padding from a grid and ends each of its rows
with a newline, does not fit them: `pack_views` takes its place.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict, validated_field
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .image_views import (
    ViewCompression,
    ViewLayout,
    check_compilable,
    check_one_budget,
    count_packed_tokens,
    layout_of,
    pack_views,
    total_of_call,
)
from .vision_language_model import is_compiled
from .vision_towers import TowerCompression, count_blocks, has_class_token
from .vmtc import at_least_1, count_visual_tokens
from .vmtc_cmai_mixins import (
    VmtcCmaiConfig,
    VmtcCmaiModelMixin,
    VmtcCmaiProcessorKwargs,
    VmtcCmaiProcessorMixin,
)


@strict
class VmtcCmaiViewsConfig(VmtcCmaiConfig):
    r"""
    The fields of [`VmtcCmaiConfig`], for pictures in several views. `vmtc_num_visual_tokens` and `vmtc_keep_ratio` are for
    each view: the whole picture and every tile.

    Args:
        vmtc_total_visual_tokens (`int`, *optional*):
            Visual tokens of a whole picture, newlines not counted, in place of a budget for each view: the more important
            tiles get more of it, and every view at least one. `vmtc_num_visual_tokens` must be `None` then.
    """

    vmtc_total_visual_tokens: int | None = validated_field(at_least_1, default=None)

    def validate_budget(self):
        """Checks that a picture has one budget. `@strict` calls it."""
        check_one_budget(self)


class VmtcCmaiViewsModelMixin(VmtcCmaiModelMixin):
    """What the models without a head share. It stands first among the bases."""

    def _layouts(self: Any, image_sizes: Any, **image_arguments) -> list[ViewLayout]:
        """The layouts of pictures, from their heights and widths `(N, 2)`."""
        config, size = self.config, self.config.vision_config.image_size
        sizes = image_sizes.tolist() if isinstance(image_sizes, torch.Tensor) else image_sizes
        side = size // config.vision_config.patch_size
        return [layout_of(image_size, config.image_grid_pinpoints, size, side) for image_size in sizes]

    def get_image_features(
        self: Any,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        num_visual_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        The visual tokens of pictures: compressed if the config says so, projected to the width of the language model, and
        packed.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(N, views, 3, H, W)` or `(all views, 3, H, W)`):
                Normalised views of the pictures: the whole picture, then its tiles, then fillers up to the largest number.
            image_sizes (`torch.LongTensor` of shape `(N, 2)`):
                Height and width of the pictures.
            vision_feature_layer, vision_feature_select_strategy (*optional*):
                Replace those of the config.
            num_visual_tokens (`int`, *optional*):
                A budget for each view in this call. It replaces those of the config.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: The outputs of the tower. `pooler_output` is a
            list of visual tokens `(tokens, d)`, one element per picture.

        Raises:
            `ValueError`: The sizes are missing, the pictures do not allow the budget, or the tower is not built like CLIP,
                SigLIP or DINOv2.
        """
        config = self.config
        if image_sizes is None:
            raise ValueError(
                "`pixel_values` are given without `image_sizes`, which say how many views each picture has. The processor "
                "makes both."
            )
        if vision_feature_layer is None:
            vision_feature_layer = config.vision_feature_layer
        if vision_feature_select_strategy is None:
            vision_feature_select_strategy = config.vision_feature_select_strategy
        if torch.compiler.is_compiling() or is_compiled(self.vision_tower):
            self._install_hooks()
        # CODEPATH: stock checkpoints do not use VMTC.
        if config.use_vmtc:
            others: Any = kwargs
            layouts = self._layouts(image_sizes, **{name: others.pop(name, None) for name in self.image_arguments})
            return self._get_compressed_features(
                pixel_values,
                layouts,
                vision_feature_layer,
                vision_feature_select_strategy,
                num_visual_tokens,
                **kwargs,
            )
        if num_visual_tokens is not None:
            count_visual_tokens(config, 0, num_visual_tokens)  # a budget without VMTC is an error
        return super().get_image_features(  # type: ignore[misc]
            pixel_values,
            image_sizes,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            **kwargs,
        )

    @can_return_tuple
    def _get_compressed_features(
        self: Any,
        pixel_values: torch.Tensor,
        layouts: list[ViewLayout],
        feature_layer: Any,
        select_strategy: str,
        num_visual_tokens: int | None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """`get_image_features` with VMTC."""
        if pixel_values.dim() == 5 and len(pixel_values) != len(layouts):
            raise ValueError(
                f"`pixel_values` holds {len(pixel_values)} pictures, but `image_sizes` {len(layouts)}. The processor makes "
                "both."
            )
        if pixel_values.dim() == 5:
            views = zip(pixel_values, layouts, strict=True)
            pixel_values = torch.cat([picture[: layout.num_views] for picture, layout in views])
        num_views = sum(layout.num_views for layout in layouts)
        if pixel_values.dim() != 4 or len(pixel_values) != num_views:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}, but `image_sizes` says that {len(layouts)} pictures "
                f"have {num_views} views. The processor makes both."
            )
        self._check_select_strategy(select_strategy)
        compression, lengths = self._compression_of_views(pixel_values, layouts, feature_layer, num_visual_tokens)
        if compression is not None:
            kwargs["compression"] = compression
        outputs, features = self._run_vision_tower(pixel_values, feature_layer, select_strategy, **kwargs)
        if isinstance(compression, ViewCompression):
            lengths = compression.lengths()
        features = self.multi_modal_projector(features)
        outputs.pooler_output = pack_views(features, lengths, layouts, self.image_newline)  # type: ignore[assignment]
        return outputs

    def _check_select_strategy(self: Any, select_strategy: str) -> None:
        """Raises unless a strategy selects the patches and nothing else."""
        if (select_strategy == "default") != has_class_token(self.vision_tower):
            raise ValueError(
                f'`vision_feature_select_strategy` is "{select_strategy}", but VMTC on views takes the patches alone: '
                'set "default" for a tower with a class token, and "full" for one without.'
            )

    def _compression_of_views(
        self: Any,
        pixel_values: torch.Tensor,
        layouts: list[ViewLayout],
        feature_layer: Any,
        num_visual_tokens: int | None,
    ) -> tuple[TowerCompression | None, list[int]]:
        """How the tower compresses the views, and how many tokens of each are left if they are all alike."""
        config, num_patches = self.config, layouts[0].side ** 2
        for layout in layouts:
            count_packed_tokens(layout, config, num_visual_tokens)  # raises if the budget is not possible
        if torch.compiler.is_compiling() or is_compiled(self.vision_tower):
            check_compilable(config, num_visual_tokens)
        total, budget = total_of_call(config, num_visual_tokens), None
        if total is None:
            budget = count_visual_tokens(config, num_patches, num_visual_tokens)
            if all(count == num_patches for layout in layouts for count in layout.count_patches()):
                arguments = self._compression_arguments(pixel_values, feature_layer, budget)
                return arguments.get("compression"), [budget] * len(pixel_values)
        compression = ViewCompression(
            {},
            config.vmtc_merge_weights,
            has_class_token(self.vision_tower),
            kept_tokens=config.vmtc_kept_tokens,
            layouts=layouts,
            config=config,
            tower_config=self.vision_tower.config,
            num_blocks=count_blocks(self.vision_tower, feature_layer),
            budget=budget,
            total=total,
        )
        return compression, []

    def get_vision_features(self: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """Not for pictures in views, whose features differ in number. Raises `ValueError`."""
        raise ValueError(f"{type(self).__name__} has no `vision_features`. Give it `pixel_values` and `image_sizes`.")

    def _project(self: Any, vision_features: torch.Tensor) -> BaseModelOutputWithPooling:
        return self.get_vision_features(vision_features)

    def _blank_image(self: Any) -> dict[str, Any]:
        pixel_values = super()._blank_image()["pixel_values"]
        size = torch.tensor([pixel_values.shape[-2:]])
        [layout] = self._layouts(size)
        return {"pixel_values": pixel_values.expand(1, layout.num_views, -1, -1, -1), "image_sizes": size}


class VmtcCmaiViewsProcessorMixin(VmtcCmaiProcessorMixin):
    """What the processors share. It stands before the library's processor among the bases."""

    def _layout(self: Any, image_size: Any, view_size: int, is_single: bool = False) -> ViewLayout:
        """The layout of a picture of some height and width, with views of `view_size` pixels."""
        pinpoints = None if is_single else self.image_processor.image_grid_pinpoints
        return layout_of(image_size, pinpoints, view_size, self._side(view_size))

    def replace_image_token(
        self: Any, image_inputs: dict, image_idx: int, num_visual_tokens: int | None = None, **kwargs
    ) -> str:
        # CODEPATH: stock checkpoints do not use VMTC.
        if not self.use_vmtc:
            if num_visual_tokens is not None:
                count_visual_tokens(self, 0, num_visual_tokens)  # a budget without VMTC is an error
            return super().replace_image_token(image_inputs, image_idx, **kwargs)  # type: ignore[misc]
        size = image_inputs["image_sizes"][image_idx]
        view_size = int(image_inputs["pixel_values"][0][0].shape[-1])
        layout = self._layout(size, view_size, self._is_single_view(image_inputs, image_idx))
        return self.image_token * count_packed_tokens(layout, self, num_visual_tokens)

    def _is_single_view(self: Any, image_inputs: dict, image_idx: int) -> bool:
        """Whether a picture is not cut into tiles."""
        return False

    def _get_num_multimodal_tokens(self: Any, image_sizes: Any = None, video_sizes: Any = None, **kwargs):
        videos = {} if video_sizes is None else {"video_sizes": video_sizes}
        data = super()._get_num_multimodal_tokens(image_sizes, **videos, **kwargs)  # type: ignore[misc]
        if image_sizes is not None and self.use_vmtc:
            images_kwargs = self._merge_kwargs(VmtcCmaiProcessorKwargs, **kwargs)["images_kwargs"]
            budget = images_kwargs.get("num_visual_tokens")
            layouts = [self._layout(image_size, self.view_size) for image_size in image_sizes]
            data.num_image_tokens = [count_packed_tokens(layout, self, budget) for layout in layouts]
        return data

    @property
    def view_size(self: Any) -> int:
        """Pixels on each side of a view."""
        size = self.image_processor.size
        return int(size.get("shortest_edge") or size["height"])


__all__ = ["VmtcCmaiViewsConfig", "VmtcCmaiViewsModelMixin", "VmtcCmaiViewsProcessorMixin"]
