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
"""What an attention mask says, whatever its form: `(B, S)` from a user, or what `generate()` prepares for the layers."""

from typing import Any

import torch


def as_boolean_mask(mask: torch.Tensor) -> torch.Tensor:
    """Boolean form of a mask of keys, True where one may be read. An additive mask holds 0 and very low numbers."""
    return mask if mask.dtype == torch.bool else mask > -1e4


def non_padding_columns(
    attention_mask: torch.Tensor | dict | None,
    batch_size: int,
    num_columns: int,
    device: torch.device,
    past_length: Any = 0,
) -> torch.Tensor | None:
    """
    Which columns of a call are not padding.

    Args:
        attention_mask (`torch.Tensor` or `dict`, *optional*):
            `(B, past columns + columns)` with 1 for tokens and 0 for padding; or `(B or 1, 1, columns, keys)`, boolean or
            additive; or a dict of those, one for each kind of layer.
        batch_size, num_columns (`int`):
            Size of the call, without the columns in its cache.
        past_length (`int` or `torch.LongTensor`, *optional*, defaults to 0):
            Number of columns in the cache. A static cache counts in a tensor.

    Returns:
        `torch.BoolTensor` of shape `(B or 1, columns)`; `None` without a mask: nothing is padding.

    Raises:
        `ValueError`: The mask has another shape.
    """
    if isinstance(attention_mask, dict):
        attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() not in (2, 4):
        raise ValueError(
            f"`attention_mask` must have shape ({batch_size}, {num_columns}) with 1 for tokens and 0 for padding, got "
            f"{tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask)}."
        )
    attention_mask = attention_mask.to(device)
    if attention_mask.dim() == 2:
        if isinstance(past_length, int) and past_length == 0 and attention_mask.shape != (batch_size, num_columns):
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}, the text {(batch_size, num_columns)}."
            )
        return attention_mask[:, -num_columns:].bool()
    # Every token reads itself, whether the mask is causal or a sliding window. No token reads padding.
    attention_mask = attention_mask[:, 0]
    num_missing_keys = past_length + num_columns - attention_mask.shape[-1]  # a sliding window has lost the first keys
    if isinstance(past_length, int):
        first_key = past_length - max(num_missing_keys, 0)
        reads_itself = attention_mask.diagonal(first_key, dim1=-2, dim2=-1)[:, :num_columns]
    else:
        keys = torch.arange(num_columns, device=device) + past_length - num_missing_keys.clamp(min=0)
        reads_itself = attention_mask.take_along_dim(keys[None, :, None], dim=2).squeeze(2)
    return as_boolean_mask(reads_itself)
