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
VMTC and CMAI for LLaVA-OneVision: configuration, model and processor, as `vmtc_cmai_patch.py` has them for LLaVA. Stock
checkpoints of `LlavaOnevisionForConditionalGeneration` load without conversion.

Its pictures are those of LLaVA-NeXT, but several pictures of a prompt are a single view each, padded to a square. The
library makes the grid of a large picture smaller (`vision_aspect_ratio`); VMTC, which leaves no grid, does not. Videos go
through the library's pooling: VMTC leaves them as they are, and to CMAI their tokens are image tokens.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import (
    GenerationMixin,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionCausalLMOutputWithPast,
    LlavaOnevisionPreTrainedModel,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .image_views import ViewLayout, check_one_budget, layout_of
from .safe_loading import check_image_size, check_sizes
from .vision_language_model import VisionLanguageModelMixin
from .vmtc_cmai_mixins import VmtcCmaiHeadMixin, auto_map_of, register_checkpoints
from .vmtc_cmai_views import VmtcCmaiViewsConfig, VmtcCmaiViewsModelMixin, VmtcCmaiViewsProcessorMixin


@strict
class VmtcCmaiLlavaOnevisionConfig(VmtcCmaiViewsConfig, LlavaOnevisionConfig):
    r"""
    Configuration of a [`VmtcCmaiLlavaOnevisionForConditionalGeneration`]. It has the fields of
    [`~transformers.LlavaOnevisionConfig`] and [`VmtcCmaiViewsConfig`]. The `config.json` of a stock LLaVA-OneVision loads
    too; then VMTC and CMAI are off.
    """

    model_type = "vmtc_cmai_llava_onevision"
    stock_config = LlavaOnevisionConfig
    example = "llava-hf/llava-onevision-qwen2-7b-ov-hf"


class VmtcCmaiLlavaOnevisionPreTrainedModel(VisionLanguageModelMixin, LlavaOnevisionPreTrainedModel):
    config: VmtcCmaiLlavaOnevisionConfig
    config_class = VmtcCmaiLlavaOnevisionConfig
    model_tags = ["vmtc", "cmai", "llava-onevision"]
    auto_map = auto_map_of("vmtc_cmai_llava_onevision", "VmtcCmaiLlavaOnevision")


# trf-ignore: TRF013 (the stock model's own bases)
class VmtcCmaiLlavaOnevisionModel(VmtcCmaiViewsModelMixin, VmtcCmaiLlavaOnevisionPreTrainedModel, LlavaOnevisionModel):
    """LLaVA-OneVision without its head, with VMTC in the vision tower and CMAI in the language model."""

    image_arguments = ("batch_num_images", "vision_aspect_ratio")

    def _layouts(self, image_sizes: Any, batch_num_images: Any = None, **image_arguments) -> list[ViewLayout]:
        layouts = super()._layouts(image_sizes)
        if batch_num_images is None:
            return layouts
        if int(sum(batch_num_images)) != len(layouts):
            raise ValueError(
                f"`batch_num_images` counts {int(sum(batch_num_images))} pictures, but `image_sizes` {len(layouts)}. The "
                "processor makes both."
            )
        vision_config: Any = self.config.vision_config
        is_alone = [count == 1 for count in batch_num_images for _ in range(count)]
        return [
            layout if alone else layout_of(image_size, None, vision_config.image_size, layout.side)
            for layout, alone, image_size in zip(layouts, is_alone, image_sizes, strict=True)
        ]

    def get_image_features(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        vision_aspect_ratio: str | None = None,
        batch_num_images: torch.Tensor | None = None,
        num_visual_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        As [`VmtcCmaiViewsModelMixin.get_image_features`], with these arguments too:

        Args:
            vision_aspect_ratio (`str`, *optional*):
                Replaces that of the config. It has no effect with VMTC.
            batch_num_images (`torch.LongTensor` of shape `(prompts with pictures,)`, *optional*):
                Pictures of each prompt. By default, every prompt has one.
        """
        return super().get_image_features(
            pixel_values,
            image_sizes,
            vision_feature_layer,
            vision_feature_select_strategy,
            num_visual_tokens,
            vision_aspect_ratio=vision_aspect_ratio or self.config.vision_aspect_ratio,  # type: ignore[call-arg]
            batch_num_images=batch_num_images,
            **kwargs,
        )

    def get_placeholder_mask(self, *args, **kwargs):
        """Which columns `(B, S, 1)` hold placeholders of pictures, and which of videos."""
        return LlavaOnevisionModel.get_placeholder_mask(self, *args, **kwargs)

    def _image_columns(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        is_video = self._columns_of_token(self.config.video_token_id, input_ids, inputs_embeds)
        return super()._image_columns(input_ids, inputs_embeds) | is_video

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_sizes_videos: torch.Tensor | None = None,
        **kwargs,
    ) -> Any:
        r"""
        As [`VmtcCmaiModelMixin.forward`], with `pixel_values_videos`, `image_sizes_videos`, `batch_num_images` and
        `vision_aspect_ratio` of the library's model.
        """
        if pixel_values_videos is not None:
            names = ("vision_feature_layer", "vision_feature_select_strategy")
            videos = self.get_video_features(
                pixel_values_videos, return_dict=True, **{name: kwargs.get(name) for name in names}
            )
            mm_encoder_outputs = {**(mm_encoder_outputs or {}), "video": videos}
        return super().forward(
            input_ids=input_ids, pixel_values=pixel_values, mm_encoder_outputs=mm_encoder_outputs, **kwargs
        )


class VmtcCmaiLlavaOnevisionForConditionalGeneration(
    VmtcCmaiHeadMixin, VmtcCmaiLlavaOnevisionPreTrainedModel, LlavaOnevisionForConditionalGeneration, GenerationMixin
):
    r"""
    LLaVA-OneVision with VMTC, CMAI and a language modelling head, for generation and training. Both are off by default; then
    its outputs are those of [`~transformers.LlavaOnevisionForConditionalGeneration`] bit for bit. It works as
    [`VmtcCmaiLlavaForConditionalGeneration`] does; `num_visual_tokens` is for each view.

    Example:

    ```python
    >>> from ta_llava import VmtcCmaiLlavaOnevisionForConditionalGeneration, VmtcCmaiLlavaOnevisionProcessor
    >>> from ta_llava.vmtc import TRAINING_FREE_VMTC

    >>> checkpoint = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
    >>> flags = {"use_vmtc": True, "vmtc_num_visual_tokens": 81}
    >>> processor = VmtcCmaiLlavaOnevisionProcessor.from_pretrained(checkpoint, **flags)
    >>> model = VmtcCmaiLlavaOnevisionForConditionalGeneration.from_pretrained(
    ...     checkpoint, use_cmai=True, **flags, **TRAINING_FREE_VMTC
    ... )
    ```
    """

    model_class = VmtcCmaiLlavaOnevisionModel
    output_class = LlavaOnevisionCausalLMOutputWithPast

    def forward(  # type: ignore[misc, override]
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_sizes_videos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        vision_aspect_ratio: str | None = None,
        batch_num_images: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        num_visual_tokens: int | None = None,
        vision_features: torch.Tensor | None = None,
        cache: Cache | None = None,
        cmai_max_ratio: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """
        As [`VmtcCmaiHeadMixin.forward`], with `pixel_values_videos`, `image_sizes_videos`, `batch_num_images` and
        `vision_aspect_ratio` of the library's model.
        """
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            num_visual_tokens=num_visual_tokens,
            vision_features=vision_features,
            cache=cache,
            cmai_max_ratio=cmai_max_ratio,
            pixel_values_videos=pixel_values_videos,  # type: ignore[call-arg]
            image_sizes_videos=image_sizes_videos,
            batch_num_images=batch_num_images,
            vision_aspect_ratio=vision_aspect_ratio,
            **kwargs,
        )


class VmtcCmaiLlavaOnevisionProcessor(VmtcCmaiViewsProcessorMixin, LlavaOnevisionProcessor):
    r"""
    The processor of a LLaVA-OneVision with VMTC. It writes as many placeholders as the model makes visual tokens. The
    processor of a stock LLaVA-OneVision loads without conversion, but it reads no videos: [`LlavaOnevisionProcessor`]
    prepares them, which needs torchvision. Fields that change the number of tokens must be the same here and in the model's
    config.

    Args:
        image_processor, tokenizer, num_image_tokens, vision_feature_select_strategy, chat_template, image_token,
        video_token, vision_aspect_ratio:
            As in [`LlavaOnevisionProcessor`].
        use_vmtc, vmtc_num_visual_tokens, vmtc_keep_ratio, vmtc_total_visual_tokens:
            As in [`VmtcCmaiLlavaOnevisionConfig`].
    """

    has_rows_of_images = True
    video_remedy = (
        "Prepare videos with the library's `LlavaOnevisionProcessor` (`pip install torchvision`), or pass the frames as "
        "`images`."
    )

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        video_token="<video>",
        vision_aspect_ratio="anyres_max_9",
        use_vmtc: bool = False,
        vmtc_num_visual_tokens: int | None = None,
        vmtc_keep_ratio: float = 0.5,
        vmtc_total_visual_tokens: int | None = None,
        **kwargs,
    ):
        check_image_size(image_processor)
        check_sizes("processor", {"num_image_tokens": num_image_tokens})
        self.use_vmtc = use_vmtc
        self.vmtc_num_visual_tokens = vmtc_num_visual_tokens
        self.vmtc_keep_ratio = vmtc_keep_ratio
        self.vmtc_total_visual_tokens = vmtc_total_visual_tokens
        check_one_budget(self)
        super().__init__(
            image_processor,
            tokenizer,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            video_token=video_token,
            vision_aspect_ratio=vision_aspect_ratio,
            **kwargs,
        )

    def _side(self, view_size: int) -> int:
        """Patches on each side of a view."""
        return int(self.num_image_tokens**0.5)

    def _is_single_view(self, image_inputs: dict, image_idx: int) -> bool:
        counts = [int(count) for count in image_inputs["batch_num_images"]]
        return [count > 1 for count in counts for _ in range(count)][image_idx]

    def _placeholder_words(self) -> list[str]:
        return [self.image_token, self.video_token]


register_checkpoints(VmtcCmaiLlavaOnevisionModel, VmtcCmaiLlavaOnevisionForConditionalGeneration)

__all__ = [
    "VmtcCmaiLlavaOnevisionConfig",
    "VmtcCmaiLlavaOnevisionForConditionalGeneration",
    "VmtcCmaiLlavaOnevisionModel",
    "VmtcCmaiLlavaOnevisionPreTrainedModel",
    "VmtcCmaiLlavaOnevisionProcessor",
]
