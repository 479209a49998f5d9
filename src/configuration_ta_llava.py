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
"""TA-LLaVA model configuration."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from .safe_loading import check_sizes
from .vmtc import VmtcConfig


# The parts of the published model: CLIP ViT-L/14@336 and Gemma-2-2B.
_DEFAULT_VISION_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
    "projection_dim": 768,
}
_DEFAULT_TEXT_CONFIG = {"model_type": "gemma2"}

# Upper bounds that catch damaged configs: no image has as many visual tokens, and no row as many images.
_MAX_PREFIX_TOKENS = 10_000
_MAX_IMAGE_INDEX_EMBEDDINGS = 10_000


@strict
class TaLlavaConfig(VmtcConfig):
    r"""
    Configuration of a [`TaLlavaForConditionalGeneration`]. The defaults are those of the paper: CLIP ViT-L/14@336,
    Gemma-2-2B, 32 prefix tokens, and both adapters once in four layers. The fields of [`VmtcConfig`] compress the visual
    tokens in the vision tower; all are off by default.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the vision tower. Defaults to CLIP ViT-L/14@336.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the language model. Defaults to Gemma-2-2B. The adapters take their form (norms, heads,
            activation, rotary embedding, soft-capping) from it.
        num_prefix_tokens (`int`, *optional*, defaults to 32):
            Number L of learned prefix tokens, which is also the number of placeholder tokens in `input_ids`.
        adapter_interval (`int`, *optional*, defaults to 4):
            Interval k, at least 2. After layer i of the language model the prefix reads the instruction if `i % k == 0`
            and the image if `i % k == 1`. It never reads after the last layer.
        vision_feature_layer (`int`, *optional*, defaults to -2):
            Index of the hidden state of the vision tower that gives the visual tokens.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`):
            `"default"` drops the class token of the vision tower, `"full"` keeps it. SigLIP has none.
        projector_type (`str`, *optional*, defaults to `"linear"`):
            `"linear"` (one linear layer, the paper) or `"mlp"` (two linear layers with a GELU between).
        image_token_id (`int`, *optional*, defaults to 7):
            Id of the placeholder token. The default is `<unused0>` of Gemma's vocabulary.
        response_marker_ids (`list[int]`, *optional*, defaults to `[106, 2516]`):
            Ids of the tokens, in sequence, that open a response. The instruction is all text before the last of them.
            The default is Gemma's `<start_of_turn>model`, which a question with the word "model" does not match.
        instruction_scope (`str`, *optional*, defaults to `"first"`):
            `"first"`: the prefix reads the text before the first response marker, as in the paper. It can then be cached
            across turns. `"last"`: it reads the text before the last marker.
        num_image_index_embeddings (`int`, *optional*, defaults to 0):
            Number of learned embeddings that are added to the visual tokens of an image, one for each index in its row.
            They limit the number of images of a row; 0 means no embeddings and no limit. New embeddings are zero, so you
            can add them to a trained model.
        tie_word_embeddings (`bool`, *optional*):
            Always that of `text_config`: the head is tied if the language model's is. A value that you pass is ignored.

    Example:

    ```python
    >>> from ta_llava import TaLlavaConfig, TaLlavaForConditionalGeneration

    >>> config = TaLlavaConfig(text_config={"model_type": "llama"}, response_marker_ids=[4007, 22933])
    >>> model = TaLlavaForConditionalGeneration(config)
    ```
    """

    model_type = "ta_llava"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: Any = None
    text_config: Any = None
    num_prefix_tokens: int = 32
    adapter_interval: int = 4
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    projector_type: Literal["linear", "mlp"] = "linear"
    image_token_id: int = 7
    response_marker_ids: list[int] | tuple[int, ...] = (106, 2516)
    instruction_scope: Literal["first", "last"] = "first"
    num_image_index_embeddings: int = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        self.vision_config = _build_sub_config("vision_config", self.vision_config, _DEFAULT_VISION_CONFIG)
        self.text_config = _build_sub_config("text_config", self.text_config, _DEFAULT_TEXT_CONFIG)
        self.response_marker_ids = list(self.response_marker_ids)
        # The language model decides whether its head is its embedding table.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)

    def validate_prefix(self):
        """Checks the fields that describe the prefix and its adapters. `@strict` calls it."""
        if not 1 <= self.num_prefix_tokens <= _MAX_PREFIX_TOKENS:
            raise ValueError(
                f"`num_prefix_tokens` must be at least 1 and at most {_MAX_PREFIX_TOKENS}, got {self.num_prefix_tokens}."
            )
        if not 0 <= self.num_image_index_embeddings <= _MAX_IMAGE_INDEX_EMBEDDINGS:
            raise ValueError(
                f"`num_image_index_embeddings` must be at least 0 and at most {_MAX_IMAGE_INDEX_EMBEDDINGS}, got "
                f"{self.num_image_index_embeddings}."
            )
        if self.adapter_interval < 2:
            raise ValueError(
                f"`adapter_interval` must be at least 2, got {self.adapter_interval}: the text adapter follows layers "
                "with `i % adapter_interval == 0`, the vision adapter those with `i % adapter_interval == 1`."
            )
        if len(self.response_marker_ids) == 0:
            raise ValueError(
                "`response_marker_ids` is empty. Give the ids of the tokens that open a response in the chat template, "
                "e.g. [106, 2516] for Gemma's `<start_of_turn>model`."
            )


def _build_sub_config(name: str, config: Any, default: dict) -> PreTrainedConfig:
    """Makes a config of the class that `model_type` names from a `dict`, or from `default` if there is none."""
    if isinstance(config, PreTrainedConfig):
        return config
    if config is not None and not isinstance(config, dict):
        raise TypeError(f"`{name}` must be a config or a dict, got {type(config)}.")
    config = dict(default if config is None else config)
    check_sizes(name, config)
    return AutoConfig.for_model(config.pop("model_type", default["model_type"]), **config)


# `transformers serve` finds by name, in this table, which models it can serve and that they take images.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[TaLlavaConfig.model_type] = "TaLlavaForConditionalGeneration"

__all__ = ["TaLlavaConfig"]
