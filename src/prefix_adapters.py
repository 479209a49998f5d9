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
The two adapters of TA-LLaVA, through which the prefix reads the instruction and the image, and the layers that call them.

Conventions of this file. B: batch, S: columns of the sequence, L: prefix tokens Y, I: images of a row, M: visual tokens of
one image, d: width of the language model. A source is what the prefix reads: the instruction or the image. A `Rotary` is
the pair (cos, sin) of `signed_rotary`.
"""

from functools import cache
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .library_layers import pass_as_parent


Rotary: TypeAlias = tuple[torch.Tensor, torch.Tensor]
KeyValue: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def adapter_after_layer(layer_idx: int, num_layers: int, adapter_interval: int) -> str | None:
    """
    Which adapter follows a layer of the language model (lines 4 and 7 of Algorithm 1): `"text"` where
    `layer_idx % adapter_interval` is 0, `"vision"` where it is 1, and none after the last layer.
    """
    if layer_idx == num_layers - 1:
        return None
    return {0: "text", 1: "vision"}.get(layer_idx % adapter_interval)


def signed_rotary(cos: torch.Tensor, sin: torch.Tensor) -> Rotary:
    """Moves the minus sign of the library's `rotate_half` into `sin`, so that `apply_rotary` needs no negation."""
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat((-first, second), dim=-1)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotary embedding of `states` `(B, heads, length, head_dim)` by the `cos`, `sin` `(B or 1, length, head_dim)` that
    `signed_rotary` gives. The result is contiguous.
    """
    first, second = states.chunk(2, dim=-1)
    return torch.addcmul(torch.cat((second, first), dim=-1) * sin.unsqueeze(1), states, cos.unsqueeze(1))


def replace_prefix(hidden_states: torch.Tensor, columns: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """Copy of `hidden_states` `(B, S, d)` with `prefix` `(B, L, d)` on the given `columns` `(B, L)` of each row."""
    index = columns.unsqueeze(-1).expand_as(prefix)
    return hidden_states.scatter(1, index, prefix.to(hidden_states.dtype))


def reading_masks(has_prefix: torch.Tensor, source_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Masks of one source.

    Args:
        has_prefix (`torch.BoolTensor` of shape `(B,)`): Rows that have a prefix.
        source_mask (`torch.BoolTensor` of shape `(B, length)`): Tokens of the source that may be read.

    Returns:
        Rows that read at all, `(B, 1, 1)`, and the additive mask for the attention, `(B, 1, 1, length)`, float32. A row
        without anything to read keeps its prefix. It is shown all keys, since attention over no key would give nan.
    """
    reads = has_prefix & source_mask.any(dim=-1)
    is_hidden = reads[:, None] & ~source_mask
    mask = torch.zeros_like(is_hidden, dtype=torch.float32).masked_fill(is_hidden, -torch.inf)
    return reads[:, None, None], mask[:, None, None, :]


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with soft-capping and an additive mask. Its two results are those of the library's attention functions."""
    # One product gives the scaled scores of all rows and heads.
    scale = scaling if softcap is None else scaling / softcap
    left, right = query.flatten(0, 1), key.flatten(0, 1).mT
    scores = torch.baddbmm(query.new_empty(()), left, right, beta=0, alpha=scale).unflatten(0, query.shape[:2])
    if softcap is not None:
        scores = torch.tanh(scores)
    scores = torch.add(attention_mask, scores, alpha=1 if softcap is None else softcap)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


# Norms of the library that PyTorch computes in one operation. Gemma's add 1 to their weights.
_GEMMA_NORMS = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")
_FUSED_NORMS = (*_GEMMA_NORMS, "LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


@cache
def fused_norm_class(norm_class: Any) -> type[nn.Module]:
    """Subclass of an RMS norm class of the library: it computes the same in float32, but with `nn.functional.rms_norm`."""
    is_gemma = norm_class.__name__ in _GEMMA_NORMS

    class FusedNorm(norm_class):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            weight, dtype = self.weight.float(), hidden_states.dtype
            if is_gemma:
                eps, weight = self.eps, weight + 1
            else:
                eps, dtype = self.variance_epsilon, torch.promote_types(dtype, self.weight.dtype)
            return nn.functional.rms_norm(hidden_states.float(), weight.shape, weight, eps).to(dtype)

    return pass_as_parent(FusedNorm, fused_norm_class)


def fuse_norms(module: nn.Module) -> None:
    """Makes each RMS norm in a module launch one kernel instead of seven. Norms of other classes stay."""
    for norm in module.modules():
        if type(norm).__name__ in _FUSED_NORMS:
            norm_class: Any = type(norm)
            norm.__class__ = fused_norm_class(norm_class)


class TaLlavaCrossAttention(nn.Module):
    """
    XAttn of Algorithm 1: the self-attention of a layer of the language model, turned cross-attentive. It has the same
    projections, head layout, scaling, soft-capping and query/key norms, but no causal mask and no sliding window.
    """

    def __init__(self, self_attn: Any):
        super().__init__()
        self.config = self_attn.config
        self.head_dim = self_attn.head_dim
        self.scaling = self_attn.scaling
        self.softcap = getattr(self_attn, "attn_logit_softcapping", None)
        self.attention_dropout = self_attn.attention_dropout
        self.is_causal = False
        self.q_proj, self.k_proj = self_attn.q_proj, self_attn.k_proj
        self.v_proj, self.o_proj = self_attn.v_proj, self_attn.o_proj
        self.q_norm = getattr(self_attn, "q_norm", None)
        self.k_norm = getattr(self_attn, "k_norm", None)

    def project_keys_values(self, source: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> KeyValue:
        """Keys and values `(B, kv_heads, length, head_dim)` of a `source` `(B, length, d)`."""
        shape = (*source.shape[:-1], -1, self.head_dim)
        key = self.k_proj(source).view(shape)
        if self.k_norm is not None:
            key = self.k_norm(key)
        return apply_rotary(key.transpose(1, 2), cos, sin), self.v_proj(source).view(shape).transpose(1, 2)

    def forward(
        self,
        prefix: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        query = self.q_proj(prefix).view(*prefix.shape[:-1], -1, self.head_dim)
        if self.q_norm is not None:
            query = self.q_norm(query)
        query = apply_rotary(query.transpose(1, 2), cos, sin)
        # Grouped-query attention: fold the query heads that share a key head into the query length. Without a causal mask
        # this is exact, and no key is repeated.
        num_tokens = query.shape[2]
        query = query.reshape(*key.shape[:2], -1, self.head_dim)

        # The prefix is short, so SDPA serves every backbone, also one that uses flash attention. It cannot soft-cap.
        implementation = self.config._attn_implementation
        implementation = "eager" if self.softcap is not None or implementation == "eager" else "sdpa"
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, _ = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask.to(query.dtype),
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            softcap=self.softcap,
            is_causal=False,
        )
        output = output.unflatten(1, (-1, num_tokens)).permute(0, 2, 3, 1, 4)
        return self.o_proj(output.flatten(2))  # from (B, L, kv_heads, heads per kv head, head_dim)


class TaLlavaAdapter(nn.Module):
    """
    Cross-attention block through which the prefix reads one modality. It is made of the parts of a new layer of the
    language model, in that layer's own order: norm on both sides, cross-attention, residual, norm, MLP, residual, and
    Gemma's norms after attention and MLP where the layer has them.

    It has two steps: `project` makes keys and values of a source, and `read` lets the prefix read them. The keys and values
    of an image are made once and read at every insertion, so the steps are apart.
    """

    def __init__(self, decoder_layer: Any):
        super().__init__()
        self.cross_attn = TaLlavaCrossAttention(decoder_layer.self_attn)
        self.mlp = decoder_layer.mlp
        self.input_layernorm = decoder_layer.input_layernorm
        if hasattr(decoder_layer, "pre_feedforward_layernorm"):  # Gemma-2 and later: a norm before and after each part
            self.post_attention_layernorm = decoder_layer.post_attention_layernorm
            self.pre_feedforward_layernorm = decoder_layer.pre_feedforward_layernorm
            self.post_feedforward_layernorm = decoder_layer.post_feedforward_layernorm
        else:  # Llama and its kin: what they call `post_attention_layernorm` is the norm before the MLP
            self.post_attention_layernorm = nn.Identity()
            self.pre_feedforward_layernorm = decoder_layer.post_attention_layernorm
            self.post_feedforward_layernorm = nn.Identity()
        fuse_norms(self)

    def forward(self, step: Literal["project", "read"], *args: torch.Tensor) -> Any:
        """
        Runs one step with its arguments and returns its result. Sharding and offloading provide the weights of a module
        in its `forward` alone, so call the steps through it: `adapter("read", prefix, ...)`.
        """
        return getattr(self, step)(*args)

    def project(self, source: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> KeyValue:
        """
        Keys and values of a source.

        Args:
            source (`torch.FloatTensor` of shape `(B, length, d)`): Instruction or visual tokens.
            cos, sin (`torch.FloatTensor` of shape `(B, length, head_dim)`): Rotary embedding of the source.

        Returns:
            Pair of `torch.FloatTensor` of shape `(B, kv_heads, length, head_dim)`.
        """
        return self.cross_attn.project_keys_values(self.input_layernorm(source), cos, sin)

    def read(
        self,
        prefix: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """
        The prefix after it has read a source: lines 5 and 6 of Algorithm 1, or 8 and 9. Line 8 shows no residual for
        vision, but the text of the paper and the authors' code have it in both.

        Args:
            prefix (`torch.FloatTensor` of shape `(B, L, d)`): Y.
            key, value (`torch.FloatTensor` of shape `(B, kv_heads, length, head_dim)`): What `project` gives.
            attention_mask (`torch.FloatTensor` of shape `(B, 1, 1, length)`): 0 where a key is read, else -inf.
            cos, sin (`torch.FloatTensor` of shape `(1, L, head_dim)`): Rotary embedding of the prefix.
        """
        attended = self.cross_attn(self.input_layernorm(prefix), key, value, attention_mask, cos, sin)
        prefix = prefix + self.post_attention_layernorm(attended)
        return prefix + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(prefix)))


class PrefixReader:
    """
    Where the prefix of one forward pass stands and what it reads. The model makes it, and the layers of the language model
    call it with their output.

    Args:
        columns (`torch.LongTensor` of shape `(B, L)`): Columns of the prefix in the sequence.
        first_column (`int`, *optional*): The first of them, if the host knows that it is the same in all rows.
        has_prefix (`torch.BoolTensor` of shape `(B,)`): Rows that have one. Others stay as they are.
        instruction_mask (`torch.BoolTensor` of shape `(B, S)`): The instruction tokens.
        instruction_rotary, prefix_rotary: Pairs (cos, sin) of shapes `(B, S, head_dim)` and `(1, L, head_dim)`.
        visual_key_value (*optional*): Keys and values `(B, kv_heads, I * M, head_dim)` of the visual tokens.
        visual_mask (`torch.BoolTensor` of shape `(B, I * M)`, *optional*): Which of them belong to real images.
    """

    def __init__(
        self,
        text_adapter: TaLlavaAdapter,
        vision_adapter: TaLlavaAdapter,
        columns: torch.Tensor,
        first_column: int | None,
        has_prefix: torch.Tensor,
        instruction_mask: torch.Tensor,
        instruction_rotary: Rotary,
        prefix_rotary: Rotary,
        visual_key_value: KeyValue | None = None,
        visual_mask: torch.Tensor | None = None,
    ):
        self.text_adapter, self.vision_adapter = text_adapter, vision_adapter
        self.columns, self.instruction_rotary, self.prefix_rotary = columns, instruction_rotary, prefix_rotary
        self.first_column = first_column
        # The masks are made once, not at every insertion.
        self.text_masks = reading_masks(has_prefix, instruction_mask)
        self.visual_key_value = visual_key_value
        self.visual_masks = None if visual_mask is None else reading_masks(has_prefix, visual_mask)

    def __call__(self, hidden_states: torch.Tensor, source: str) -> torch.Tensor:
        """Returns `hidden_states` `(B, S, d)` after the prefix in it has read from `source`, `"text"` or `"vision"`."""
        self._move_to(hidden_states.device)
        if source == "text":
            key_value = self.text_adapter("project", hidden_states, *self.instruction_rotary)
            return self._read(hidden_states, self.text_adapter, key_value, *self.text_masks)
        if self.visual_key_value is None or self.visual_masks is None:
            return hidden_states
        return self._read(hidden_states, self.vision_adapter, self.visual_key_value, *self.visual_masks)

    def _read(
        self,
        hidden_states: torch.Tensor,
        adapter: TaLlavaAdapter,
        key_value: KeyValue,
        reads: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        start, end = self.first_column, self.columns.shape[1]
        if start is None:
            prefix = hidden_states.gather(1, self.columns[:, :, None].expand(-1, -1, hidden_states.shape[-1]))
        else:  # a slice needs no kernel of its own
            end += start
            prefix = hidden_states[:, start:end]
        updated = adapter("read", prefix, *key_value, attention_mask, *self.prefix_rotary)
        updated = torch.where(reads, updated.to(prefix.device), prefix)
        if start is None:
            return replace_prefix(hidden_states, self.columns, updated)
        return hidden_states.slice_scatter(updated.to(hidden_states.dtype), dim=1, start=start, end=end)

    def _move_to(self, device: torch.device) -> None:
        """Follows the hidden states where the layers are on several devices."""
        if self.columns.device != device:
            for name, value in vars(self).items():
                if isinstance(value, (torch.Tensor, tuple)):
                    setattr(self, name, _to_device(value, device))


def _to_device(value: Any, device: torch.device) -> Any:
    """A tensor, or a tuple of tensors, on another device."""
    if isinstance(value, tuple):
        return tuple(_to_device(item, device) for item in value)
    return value.to(device)


@cache
def prefix_reading_layer_class(layer_class: Any) -> type[nn.Module]:
    """
    Subclass of a decoder layer class after whose forward the prefix reads. It keeps the name of its parent, by which
    device placement and sharding find layers, and without a `prefix_reader` it is its parent.
    """

    class PrefixReadingLayer(layer_class):
        prefix_source: str | None = None

        def forward(self, hidden_states, *args, prefix_reader: PrefixReader | None = None, **kwargs):
            hidden_states = super().forward(hidden_states, *args, **kwargs)
            if prefix_reader is None or self.prefix_source is None:
                return hidden_states
            return prefix_reader(hidden_states, self.prefix_source)

    return pass_as_parent(PrefixReadingLayer, prefix_reading_layer_class)
