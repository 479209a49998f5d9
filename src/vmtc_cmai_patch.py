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
VMTC and CMAI for LLaVA ("Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image
Redundancy"): configuration, model and processor. These are subclasses of LLaVA's own; nothing of the library is patched.

A stock LLaVA checkpoint loads without conversion. With both flags off the outputs are those of
`LlavaForConditionalGeneration` bit for bit. `use_vmtc` makes the vision tower compress its tokens: equations 5 to 8, in
`vmtc.py` and `vision_towers.py`. `use_cmai` makes each text token of the language model stop attending to the least relevant
image tokens: equations 9 to 11, in `cmai.py` and `cmai_cache.py`. What connects them to LLaVA and to the families after it
is in `vmtc_cmai_mixins.py`; this file has what LLaVA alone has, among it the paper's baseline SPD.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict, validated_field
from transformers import (
    GenerationMixin,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
)
from transformers.image_utils import get_image_size, to_numpy_array
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaPreTrainedModel
from transformers.processing_utils import MultiModalData, Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .safe_loading import check_image_size, check_sizes
from .vision_language_model import VisionLanguageModelMixin
from .vision_towers import patch_grid
from .vmtc import at_least_1, count_visual_tokens, spatial_downsample
from .vmtc_cmai_mixins import (
    VmtcCmaiConfig,
    VmtcCmaiHeadMixin,
    VmtcCmaiModelMixin,
    VmtcCmaiProcessorKwargs,
    VmtcCmaiProcessorMixin,
    auto_map_of,
    register_checkpoints,
)


@strict
class VmtcCmaiLlavaConfig(VmtcCmaiConfig, LlavaConfig):
    r"""
    Configuration of a [`VmtcCmaiLlavaForConditionalGeneration`]. It has the fields of [`~transformers.LlavaConfig`],
    [`VmtcConfig`] and [`VmtcCmaiConfig`], and the one below. The `config.json` of a stock LLaVA loads too; then VMTC and
    CMAI are off.

    Args:
        spd_factor (`int`, *optional*, defaults to 1):
            The paper's baseline SPD: average the grid of visual tokens over squares of this side. It cannot be combined with
            VMTC.

    Example:

    ```python
    >>> from ta_llava import VmtcCmaiLlavaConfig
    >>> from ta_llava.vmtc import TRAINING_FREE_VMTC

    >>> config = VmtcCmaiLlavaConfig(use_vmtc=True, vmtc_num_visual_tokens=64, use_cmai=True, **TRAINING_FREE_VMTC)
    ```
    """

    model_type = "vmtc_cmai_llava"
    stock_config = LlavaConfig
    example = "llava-hf/llava-1.5-7b-hf"

    spd_factor: int = validated_field(at_least_1, default=1)

    def is_stock(self) -> bool:
        return super().is_stock() and self.spd_factor == 1

    def validate_spd(self):
        """Checks that SPD and VMTC are not combined. `@strict` calls it."""
        if self.spd_factor > 1 and self.use_vmtc:
            raise ValueError(
                f"`spd_factor` is {self.spd_factor} and `use_vmtc` is on, but the tokens that VMTC leaves have no grid to "
                "down-sample. Use one of the two."
            )


class VmtcCmaiLlavaPreTrainedModel(VisionLanguageModelMixin, LlavaPreTrainedModel):
    config: VmtcCmaiLlavaConfig
    config_class = VmtcCmaiLlavaConfig
    model_tags = ["vmtc", "cmai", "llava"]  # `push_to_hub` gives them to a repo
    auto_map = auto_map_of("vmtc_cmai_patch", "VmtcCmaiLlava")


# trf-ignore: TRF013 (stock LLaVA's own bases)
class VmtcCmaiLlavaModel(VmtcCmaiModelMixin, VmtcCmaiLlavaPreTrainedModel, LlavaModel):
    """LLaVA without its language modelling head, with VMTC in the vision tower and CMAI in the language model."""

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        num_visual_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        The visual tokens of images: compressed if the config says so, and projected to the width of the language model.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(N, 3, H, W)`):
                Normalised images.
            vision_feature_layer, vision_feature_select_strategy (*optional*):
                Replace those of the config.
            image_sizes (`torch.LongTensor` of shape `(N, 2)`, *optional*):
                Sizes of images that differ in size, for towers that take them (Pixtral). Not supported together with VMTC or
                `spd_factor`.
            num_visual_tokens (`int`, *optional*):
                A budget for this call. It replaces that of the config.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: The outputs of the tower. `pooler_output` is a
            list of visual tokens `(tokens, d)`, one element per image. The hidden states, if you ask for them, get shorter
            with every stage of VMTC.

        Raises:
            `ValueError`: The images do not allow the budget, or the tower is not built like CLIP, SigLIP or DINOv2.
        """
        config = self.config
        if vision_feature_layer is None:
            vision_feature_layer = config.vision_feature_layer
        if vision_feature_select_strategy is None:
            vision_feature_select_strategy = config.vision_feature_select_strategy
        if pixel_values.dim() == 5:  # (B, I, 3, H, W)
            pixel_values = pixel_values.flatten(0, 1)
        kwargs.update(self._compression_arguments(pixel_values, vision_feature_layer, num_visual_tokens))  # type: ignore[typeddict-item]
        # CODEPATH: the paper's models do not down-sample; that is its baseline SPD.
        if config.spd_factor == 1:
            return super().get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                **kwargs,
            )
        if image_sizes is not None:
            raise ValueError(
                f"`spd_factor` is {config.spd_factor}, but images of several sizes (`image_sizes`) have no common grid to "
                "down-sample. Set `spd_factor=1`."
            )
        return self._get_downsampled_features(
            pixel_values, vision_feature_layer, vision_feature_select_strategy, **kwargs
        )

    @can_return_tuple
    def _get_downsampled_features(
        self, pixel_values: torch.Tensor, feature_layer: Any, select_strategy: str, **kwargs
    ) -> BaseModelOutputWithPooling:
        """`get_image_features` with SPD before the projector."""
        outputs, features = self._run_vision_tower(pixel_values, feature_layer, select_strategy, **kwargs)
        outputs.pooler_output = list(self.multi_modal_projector(features))  # type: ignore[assignment]  # as in the library
        return outputs

    def _run_vision_tower(
        self, pixel_values: torch.Tensor, feature_layer: Any, select_strategy: str, **kwargs
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        factor = self.config.spd_factor
        if factor > 1 and isinstance(feature_layer, list) and len(feature_layer) > 1:
            raise ValueError(f"`spd_factor` works with one `vision_feature_layer`, got {feature_layer}.")
        outputs, features = super()._run_vision_tower(pixel_values, feature_layer, select_strategy, **kwargs)
        # CODEPATH: only the paper's baseline SPD down-samples.
        if factor == 1:
            return outputs, features
        height, width = patch_grid(self.config, pixel_values)
        if features.shape[1] != height * width:
            raise ValueError(
                f"`spd_factor` needs a grid of {height} x {width} visual tokens, but there are {features.shape[1]}, because "
                'the class token is among them. Set `vision_feature_select_strategy="default"`.'
            )
        return outputs, spatial_downsample(features, (height, width), factor)


class VmtcCmaiLlavaForConditionalGeneration(
    VmtcCmaiHeadMixin, VmtcCmaiLlavaPreTrainedModel, LlavaForConditionalGeneration, GenerationMixin
):
    r"""
    LLaVA with VMTC, CMAI and a language modelling head, for generation and training. Both are off by default; then its
    outputs are those of [`~transformers.LlavaForConditionalGeneration`] bit for bit. In training, a batch without images
    gives the vision tower and the projector gradients of zero, where the stock model gives none.

    Args:
        config ([`VmtcCmaiLlavaConfig`]):
            The parts and their settings. The model starts with new weights. `from_pretrained` loads trained ones, also those
            of a stock LLaVA, and takes fields of the config as arguments.

    Example:

    ```python
    >>> from ta_llava import VmtcCmaiLlavaForConditionalGeneration, VmtcCmaiLlavaProcessor
    >>> from ta_llava.vmtc import TRAINING_FREE_VMTC

    >>> flags = {"use_vmtc": True, "vmtc_num_visual_tokens": 64}
    >>> processor = VmtcCmaiLlavaProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf", **flags)
    >>> model = VmtcCmaiLlavaForConditionalGeneration.from_pretrained(
    ...     "llava-hf/llava-1.5-7b-hf", use_cmai=True, **flags, **TRAINING_FREE_VMTC
    ... )
    >>> inputs = processor(images="photo.jpg", text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")
    >>> output = model.generate(**inputs, max_new_tokens=30)
    >>> processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ```
    """

    model_class = VmtcCmaiLlavaModel
    output_class = LlavaCausalLMOutputWithPast


class VmtcCmaiLlavaProcessor(VmtcCmaiProcessorMixin, LlavaProcessor):
    r"""
    The processor of a LLaVA with VMTC. It writes as many placeholders as the model makes visual tokens. The processor of a
    stock LLaVA loads without conversion. Fields that change the number of tokens must be the same here and in the model's
    config. If a user types `<image>` in a message of a chat, it stays text.

    Args:
        image_processor, tokenizer, patch_size, vision_feature_select_strategy, chat_template, image_token,
        num_additional_image_tokens:
            As in [`LlavaProcessor`].
        use_vmtc, vmtc_num_visual_tokens, vmtc_keep_ratio, spd_factor:
            As in [`VmtcCmaiLlavaConfig`].
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        use_vmtc: bool = False,
        vmtc_num_visual_tokens: int | None = None,
        vmtc_keep_ratio: float = 0.5,
        spd_factor: int = 1,
        **kwargs,
    ):
        check_image_size(image_processor)
        check_sizes("processor", {"num_additional_image_tokens": num_additional_image_tokens})
        self.use_vmtc = use_vmtc
        self.vmtc_num_visual_tokens = vmtc_num_visual_tokens
        self.vmtc_keep_ratio = vmtc_keep_ratio
        self.spd_factor = spd_factor
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    def replace_image_token(
        self, image_inputs: dict, image_idx: int, num_visual_tokens: int | None = None, **kwargs
    ) -> str:
        height, width = get_image_size(to_numpy_array(image_inputs["pixel_values"][image_idx]))
        return self.image_token * self._count_image_tokens(height, width, num_visual_tokens)

    def _count_image_tokens(self, height: int, width: int, num_visual_tokens: int | None = None) -> int:
        """How many placeholders an image of `height` x `width` pixels has. The class token counts if the model uses it."""
        num_patches = (height // self.patch_size) * (width // self.patch_size)
        count = count_visual_tokens(self, num_patches, num_visual_tokens) + self.num_additional_image_tokens
        return count - 1 if self.vision_feature_select_strategy == "default" else count

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs):
        """
        How many placeholders images have, all of one size when the tower gets them. vLLM asks this. An image processor that
        does not crop has no `crop_size`.
        """
        if image_sizes is None:
            return MultiModalData()
        images_kwargs = self._merge_kwargs(VmtcCmaiProcessorKwargs, **kwargs)["images_kwargs"]  # type: ignore[arg-type]
        crops = images_kwargs.get("do_center_crop", self.image_processor.do_center_crop)
        name = "crop_size" if crops else "size"
        size = dict(images_kwargs.get(name) or getattr(self.image_processor, name))
        height, width = (size.get(side) or size["shortest_edge"] for side in ("height", "width"))
        count = self._count_image_tokens(height, width, images_kwargs.get("num_visual_tokens"))
        return MultiModalData(num_image_tokens=[count] * len(image_sizes), num_image_patches=[1] * len(image_sizes))


register_checkpoints(VmtcCmaiLlavaModel, VmtcCmaiLlavaForConditionalGeneration)

__all__ = [
    "VmtcCmaiLlavaConfig",
    "VmtcCmaiLlavaForConditionalGeneration",
    "VmtcCmaiLlavaModel",
    "VmtcCmaiLlavaPreTrainedModel",
    "VmtcCmaiLlavaProcessor",
]
