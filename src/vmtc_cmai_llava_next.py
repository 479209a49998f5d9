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
VMTC and CMAI for LLaVA-NeXT (LLaVA-1.6): configuration, model and processor, as `vmtc_cmai_patch.py` has them for LLaVA.
Stock checkpoints of `LlavaNextForConditionalGeneration` load without conversion.
"""

from huggingface_hub.dataclasses import strict
from transformers import (
    GenerationMixin,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextProcessor,
)
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextCausalLMOutputWithPast,
    LlavaNextPreTrainedModel,
)

from .image_views import check_one_budget
from .safe_loading import check_image_size, check_sizes
from .vision_language_model import VisionLanguageModelMixin
from .vmtc_cmai_mixins import VmtcCmaiHeadMixin, auto_map_of, register_checkpoints
from .vmtc_cmai_views import VmtcCmaiViewsConfig, VmtcCmaiViewsModelMixin, VmtcCmaiViewsProcessorMixin


@strict
class VmtcCmaiLlavaNextConfig(VmtcCmaiViewsConfig, LlavaNextConfig):
    r"""
    Configuration of a [`VmtcCmaiLlavaNextForConditionalGeneration`]. It has the fields of [`~transformers.LlavaNextConfig`]
    and [`VmtcCmaiViewsConfig`]. The `config.json` of a stock LLaVA-NeXT loads too; then VMTC and CMAI are off.
    """

    model_type = "vmtc_cmai_llava_next"
    stock_config = LlavaNextConfig
    example = "llava-hf/llava-v1.6-vicuna-7b-hf"


class VmtcCmaiLlavaNextPreTrainedModel(VisionLanguageModelMixin, LlavaNextPreTrainedModel):
    config: VmtcCmaiLlavaNextConfig
    config_class = VmtcCmaiLlavaNextConfig
    model_tags = ["vmtc", "cmai", "llava-next"]
    auto_map = auto_map_of("vmtc_cmai_llava_next", "VmtcCmaiLlavaNext")


# trf-ignore: TRF013 (the stock model's own bases)
class VmtcCmaiLlavaNextModel(VmtcCmaiViewsModelMixin, VmtcCmaiLlavaNextPreTrainedModel, LlavaNextModel):
    """LLaVA-NeXT without its language modelling head, with VMTC in the vision tower and CMAI in the language model."""


class VmtcCmaiLlavaNextForConditionalGeneration(
    VmtcCmaiHeadMixin, VmtcCmaiLlavaNextPreTrainedModel, LlavaNextForConditionalGeneration, GenerationMixin
):
    r"""
    LLaVA-NeXT with VMTC, CMAI and a language modelling head, for generation and training. Both are off by default; then its
    outputs are those of [`~transformers.LlavaNextForConditionalGeneration`] bit for bit. It works as
    [`VmtcCmaiLlavaForConditionalGeneration`] does; `num_visual_tokens` is for each view.

    Example:

    ```python
    >>> from ta_llava import VmtcCmaiLlavaNextForConditionalGeneration, VmtcCmaiLlavaNextProcessor
    >>> from ta_llava.vmtc import TRAINING_FREE_VMTC

    >>> flags = {"use_vmtc": True, "vmtc_total_visual_tokens": 320}
    >>> processor = VmtcCmaiLlavaNextProcessor.from_pretrained("llava-hf/llava-v1.6-vicuna-7b-hf", **flags)
    >>> model = VmtcCmaiLlavaNextForConditionalGeneration.from_pretrained(
    ...     "llava-hf/llava-v1.6-vicuna-7b-hf", use_cmai=True, **flags, **TRAINING_FREE_VMTC
    ... )
    ```
    """

    model_class = VmtcCmaiLlavaNextModel
    output_class = LlavaNextCausalLMOutputWithPast


class VmtcCmaiLlavaNextProcessor(VmtcCmaiViewsProcessorMixin, LlavaNextProcessor):
    r"""
    The processor of a LLaVA-NeXT with VMTC. It writes as many placeholders as the model makes visual tokens. The processor
    of a stock LLaVA-NeXT loads without conversion. Fields that change the number of tokens must be the same here and in the
    model's config.

    Args:
        image_processor, tokenizer, patch_size, vision_feature_select_strategy, chat_template, image_token,
        num_additional_image_tokens:
            As in [`LlavaNextProcessor`].
        use_vmtc, vmtc_num_visual_tokens, vmtc_keep_ratio, vmtc_total_visual_tokens:
            As in [`VmtcCmaiLlavaNextConfig`].
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
        vmtc_total_visual_tokens: int | None = None,
        **kwargs,
    ):
        check_image_size(image_processor)
        check_sizes("processor", {"num_additional_image_tokens": num_additional_image_tokens})
        self.use_vmtc = use_vmtc
        self.vmtc_num_visual_tokens = vmtc_num_visual_tokens
        self.vmtc_keep_ratio = vmtc_keep_ratio
        self.vmtc_total_visual_tokens = vmtc_total_visual_tokens
        check_one_budget(self)
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

    def _side(self, view_size: int) -> int:
        """Patches on each side of a view of `view_size` pixels."""
        return view_size // self.patch_size


register_checkpoints(VmtcCmaiLlavaNextModel, VmtcCmaiLlavaNextForConditionalGeneration)

__all__ = [
    "VmtcCmaiLlavaNextConfig",
    "VmtcCmaiLlavaNextForConditionalGeneration",
    "VmtcCmaiLlavaNextModel",
    "VmtcCmaiLlavaNextPreTrainedModel",
    "VmtcCmaiLlavaNextProcessor",
]
