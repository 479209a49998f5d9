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
What differs between the versions of transformers that are supported. Each difference names the version that ends it: once
that is the lowest that setup.cfg allows, its workaround can go.
"""

from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import output_capturing


# What the library calls a cache in arguments and outputs. Ends with 5.24, where it is `cache`.
CACHE = "cache" if any(field.name == "cache" for field in fields(BaseModelOutputWithPast)) else "past_key_values"

# Both names of the cache in any version, and those of the features of images: outputs that the Trainer cannot join, since a
# cache is no tensor and a batch without images has no features. Ends with 5.24, where they are `cache` and `image_outputs`.
OUTPUTS_TO_IGNORE = ["cache", "past_key_values", "image_hidden_states", "image_outputs"]

# `_defaults` of a subclass of `ProcessingKwargs`. Ends with 5.23, which does not look for it in each of them.
PROCESSING_DEFAULTS: dict[str, Any] = {}


def cache_of_call(past_key_values: Any, cache: Any) -> Any:
    """
    The cache that was given to `forward`, by either of its names. Ends with 5.24.

    Raises:
        `ValueError`: Both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError(
            "Give `past_key_values` or `cache`, not both. They are two names for the same; before transformers 5.24 "
            "`generate()` knows only the first."
        )
    return past_key_values if cache is None else cache


def one_hidden_state(index: int) -> bool | list[int]:
    """
    The `output_hidden_states` of a call that needs only one hidden state, given by its index among all. Ends with 5.23,
    which keeps only the states that are named; an earlier version keeps all.
    """
    return [index] if hasattr(output_capturing, "selected_hidden_states") else True


def soft_caps_attention(text_config: Any) -> bool:
    """
    Whether a language model (Gemma-2) caps its attention scores. SDPA cannot, so its attention must be eager. The library
    sees to that since 5.21; earlier it chose SDPA and dropped the capping.
    """
    return getattr(text_config, "attn_logit_softcapping", None) is not None


def checkpointing_argument(name: str) -> str:
    """
    The name of an argument of `TrainingArguments` that recipes call `gradient_checkpointing` or
    `gradient_checkpointing_kwargs`. Ends with 5.23, which says `activation_` for `gradient_`.
    """
    is_renamed = hasattr(PreTrainedModel, "activation_checkpointing_enable")
    return name.replace("gradient_checkpointing", "activation_checkpointing") if is_renamed else name
