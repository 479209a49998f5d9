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
"""What differs between the versions of transformers that are supported."""

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast


# What the library calls a cache in arguments and outputs; since 5.24 it is `cache`.
CACHE = "cache" if any(each.name == "cache" for each in fields(BaseModelOutputWithPast)) else "past_key_values"


def cache_of_call(past_key_values: Any, cache: Any) -> Any:
    """The cache that was given to `forward`, by either name. Raises `ValueError` for two."""
    if past_key_values is not None and cache is not None:
        raise ValueError(
            "Give `past_key_values` or `cache`, not both: they are two names for the same, of which `generate()` knows the "
            "first alone before transformers 5.24."
        )
    return past_key_values if cache is None else cache
