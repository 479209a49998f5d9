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
"""TA-LLaVA model ("Instruction-aware Visual Feature Extraction for Multimodal Large Language Model").

Conventions of this file. B: batch, S: sequence columns (prefix, text and padding), L: prefix tokens, I: images of a
row, M: visual tokens of one image, d: width of the language model. The sequence of a row is `[Y, BOS, text]`: the
prefix Y stands on the L columns of the placeholder token, before all text. A row without placeholders is text only.

Y is computed in the prefill: between the layers of the language model it reads the instruction through one adapter
and the image through the other. What the layers write of it lives in the ordinary KV cache, so that a decode step is
the unchanged language model on one token.
"""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_tracing, logging, output_capturing

from .attention_masks import non_padding_columns
from .configuration_ta_llava import TaLlavaConfig
from .library_layers import pass_as_parent
from .library_versions import CACHE, cache_of_call
from .vision_language_model import VisionLanguageModelMixin
from .vision_towers import blank_image, blocks_of, compression_of_call, has_class_token, make_compressible


logger = logging.get_logger(__name__)


# What is ignored in this file and the two beside it, TRF057, asks for docstrings that are put together from those of
# the library. Outside of it this prints what it did not find, on every import.
@dataclass
class TaLlavaModelOutputWithPast(BaseModelOutputWithPast):  # trf-ignore: TRF057
    r"""
    Outputs of [`TaLlavaModel`]. `hidden_states` and `attentions` are those of the language model; `hidden_states[i + 1]`
    is the state after layer i and after the adapter that follows it.

    image_hidden_states (`torch.FloatTensor` of shape `(batch_size, images, visual_tokens, hidden_size)`, *optional*):
        The visual tokens V that the prefix read; without meaning where a row has fewer images than others.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class TaLlavaCausalLMOutputWithPast(CausalLMOutputWithPast):  # trf-ignore: TRF057
    r"""
    Outputs of [`TaLlavaForConditionalGeneration`].

    loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
        Next-token cross entropy over the labels that are not -100.
    logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
        Prediction scores before softmax, prefix columns included.
    past_key_values, since 5.24 of the library `cache` (`Cache`, *optional*):
        The ordinary cache of the language model; the first `num_prefix_tokens` columns of a row hold its prefix.
    image_hidden_states (`torch.FloatTensor` of shape `(batch_size, images, visual_tokens, hidden_size)`, *optional*):
        The visual tokens V that the prefix read; without meaning where a row has fewer images than others.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class TaLlavaEncodedImages(ModelOutput):  # trf-ignore: TRF057
    r"""
    The images of E rows as [`TaLlavaModel.encode_image`] makes them: all that depends on the images alone. One row
    (E = 1) goes with any number of questions, else there is one row per question.

    key, value (`torch.FloatTensor` of shape `(E, kv_heads, I * M, head_dim)`):
        What the prefix reads in the vision adapter.
    image_mask (`torch.BoolTensor` of shape `(E, I)`):
        True for real images, False for filler.
    """

    key: torch.Tensor = None  # type: ignore[assignment]  # the library wants defaults; all three are there
    value: torch.Tensor = None  # type: ignore[assignment]
    image_mask: torch.Tensor = None  # type: ignore[assignment]

    def to(self, *args, **kwargs) -> "TaLlavaEncodedImages":
        """On another device or of another dtype, as `torch.Tensor.to` takes them; the mask stays boolean."""
        key, value = self.key.to(*args, **kwargs), self.value.to(*args, **kwargs)
        return type(self)(key=key, value=value, image_mask=self.image_mask.to(key.device))

    def repeat_interleave(self, repeats: int) -> "TaLlavaEncodedImages":
        """Each row so many times, side by side, as `generate()` repeats the questions for its beams."""
        return type(self)(**{name: states.repeat_interleave(repeats, dim=0) for name, states in self.items()})


def adapter_after_layer(layer_idx: int, num_layers: int, adapter_interval: int) -> str | None:
    """
    Which adapter follows a layer of the language model (Algorithm 1 of the paper): `"text"` after layers with
    `layer_idx % adapter_interval == 0`, `"vision"` where it is 1, never after the last layer.
    """
    if layer_idx == num_layers - 1:
        return None
    return {0: "text", 1: "vision"}.get(layer_idx % adapter_interval)


def find_response_start(marker_matches: torch.Tensor, instruction_scope: str) -> torch.Tensor:
    """
    Column at which the instruction of each row ends: that of the last token of its first (or last) response marker.

    Args:
        marker_matches (`torch.BoolTensor` of shape `(marker_length, batch_size, sequence_length)`):
            `marker_matches[t]` says which columns hold the t-th token of the marker.
        instruction_scope (`str`):
            `"first"` or `"last"` marker of the row.

    Returns:
        `torch.LongTensor` of shape `(batch_size,)`: the column, `sequence_length` for a row without a marker.
    """
    marker_length, batch_size, sequence_length = marker_matches.shape
    columns = torch.arange(sequence_length, device=marker_matches.device)
    if sequence_length < marker_length:
        return columns.new_full((batch_size,), sequence_length)
    num_starts = sequence_length - marker_length + 1
    complete = marker_matches[0, :, :num_starts]
    for offset in range(1, marker_length):
        complete = complete & marker_matches[offset, :, offset : offset + num_starts]
    last_token = columns[marker_length - 1 :]
    if instruction_scope == "first":
        return torch.where(complete, last_token, sequence_length).amin(dim=-1)
    end = torch.where(complete, last_token, -1).amax(dim=-1)
    return torch.where(end < 0, sequence_length, end)


_IMAGE_ARGUMENTS = ("pixel_values", "image_mask", "vision_features", "encoded_images")


def count_images(
    batch_size: int,
    pixel_values: torch.Tensor | None = None,
    image_mask: torch.Tensor | None = None,
    vision_features: torch.Tensor | None = None,
    encoded_images: TaLlavaEncodedImages | None = None,
    **kwargs,
) -> list[int]:
    """The number of images of each row, from the arguments of `forward`."""
    images = pixel_values if vision_features is None else vision_features
    if encoded_images is not None:
        image_mask = getattr(encoded_images, "image_mask", None)
    if image_mask is not None and image_mask.dim() == 2:  # another is refused later
        counts = image_mask.long().sum(dim=-1).tolist()
        return counts * batch_size if len(counts) == 1 else counts
    if images is None:
        return [0] * batch_size
    return [images.shape[1] if images.dim() == 5 or vision_features is not None else 1] * batch_size


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `states` `(B, heads, length, head_dim)` by `cos`, `sin` `(B or 1, length, head_dim)`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def keep_state(index: int) -> bool | list[int]:
    """
    What `output_hidden_states` is for the library to keep one hidden state, by its index among all. Before it had the
    function that is looked for here, it counted those that are named without the first: then all are kept.
    """
    return [index] if hasattr(output_capturing, "selected_hidden_states") else True


def replace_prefix(hidden_states: torch.Tensor, columns: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """Copy of `hidden_states` `(B, S, d)` with `prefix` `(B, L, d)` on the given `columns` `(B, L)` of each row."""
    index = columns.unsqueeze(-1).expand_as(prefix)
    return hidden_states.scatter(1, index, prefix.to(hidden_states.dtype))


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with soft-capping; `attention_mask` is boolean, True where a key may be read."""
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class TaLlavaCrossAttention(nn.Module):
    """
    The self-attention of a layer of the language model, turned cross-attentive: the same projections, head layout,
    scaling, soft-capping and query/key norms, but no causal mask and no sliding window.
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

    def project_keys_values(
        self, source: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(B, kv_heads, length, head_dim)` of a `source` `(B, length, d)`."""
        shape = (*source.shape[:-1], -1, self.head_dim)
        key = self.k_proj(source).view(shape)
        if self.k_norm is not None:
            key = self.k_norm(key)
        value = self.v_proj(source).view(shape)
        # Laid out once as they are multiplied: those of the image are read at several insertions.
        return apply_rotary(key.transpose(1, 2), cos, sin).contiguous(), value.transpose(1, 2).contiguous()

    def forward(
        self,
        prefix: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        query = self.q_proj(prefix).view(*prefix.shape[:-1], -1, self.head_dim)
        if self.q_norm is not None:
            query = self.q_norm(query)
        query = apply_rotary(query.transpose(1, 2), cos, sin)
        # Heads that share keys and values are more queries of one head: without a causal mask it is the same, and no key is
        # copied for each of them.
        by_head = query.shape
        query = query.reshape(*key.shape[:2], -1, self.head_dim)

        # The L queries are few, and so are their scores, whatever the language model uses for its own: SDPA serves every
        # backbone but those that soft-cap, which it cannot express.
        implementation = self.config._attn_implementation
        implementation = "eager" if self.softcap is not None or implementation == "eager" else "sdpa"
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, _ = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            softcap=self.softcap,
            is_causal=False,
        )
        output = output.transpose(1, 2).reshape(by_head).transpose(1, 2)
        return self.o_proj(output.reshape(*prefix.shape[:-1], -1))


class TaLlavaAdapter(nn.Module):
    """
    Cross-attention block through which the prefix reads one modality. It is made of the parts of a new layer of the
    language model, in that layer's own order: norm on both sides, cross-attention, residual, norm, MLP, residual, and
    Gemma's norms after attention and MLP where the layer has them.
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

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        key_value: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Called twice: with what is to be read, which gives its keys and values, and with these and the prefix, which
        gives the prefix after reading. Both go through `forward`, so that sharding and offloading see them.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(B, length, d)`):
                The source, or with `key_value` the prefix Y `(B, L, d)`.
            cos, sin (`torch.FloatTensor` of shape `(B or 1, length, head_dim)`):
                Rotary embedding of `hidden_states`.
            key_value (pair of `torch.FloatTensor` of shape `(B, kv_heads, length, head_dim)`, *optional*):
                Keys and values of the source.
            attention_mask (`torch.BoolTensor` of shape `(B, 1, 1, length)`, *optional*):
                True where a key is read.
        """
        normed = self.input_layernorm(hidden_states)
        if key_value is None:
            return self.cross_attn.project_keys_values(normed, cos, sin)
        prefix = hidden_states + self.post_attention_layernorm(
            self.cross_attn(normed, *key_value, attention_mask, cos, sin)
        )
        return prefix + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(prefix)))


class PrefixReader:
    """
    What the prefix reads in one forward pass, and where it stands: made by the model, handed to the layers of the
    language model, which call it with their output.

    Args:
        columns (`torch.LongTensor` of shape `(B, L)`): Columns of the prefix in the sequence.
        has_prefix (`torch.BoolTensor` of shape `(B,)`): Rows that have one. Others stay as they are.
        instruction_mask (`torch.BoolTensor` of shape `(B, S)`): The instruction tokens.
        instruction_rotary, prefix_rotary: Pairs (cos, sin) of shapes `(B, S, head_dim)` and `(1, L, head_dim)`.
        visual (*optional*): Keys and values `(B, kv_heads, I * M, head_dim)` of the visual tokens, which are the same at
            every insertion, and the mask `(B, I * M)` of real ones.
    """

    def __init__(
        self,
        text_adapter: TaLlavaAdapter,
        vision_adapter: TaLlavaAdapter,
        columns: torch.Tensor,
        has_prefix: torch.Tensor,
        instruction_mask: torch.Tensor,
        instruction_rotary: tuple[torch.Tensor, torch.Tensor],
        prefix_rotary: tuple[torch.Tensor, torch.Tensor],
        visual: tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ):
        self.text_adapter, self.vision_adapter = text_adapter, vision_adapter
        self.columns, self.instruction_rotary, self.prefix_rotary = columns, instruction_rotary, prefix_rotary
        # Made once, not at every insertion.
        self.text_masks = reading_masks(has_prefix, instruction_mask)
        self.visual = None if visual is None else (visual[0], *reading_masks(has_prefix, visual[1]))

    def __call__(self, hidden_states: torch.Tensor, source: str) -> torch.Tensor:
        """Returns `hidden_states` `(B, S, d)` after the prefix in it has read from `source`, `"text"` or `"vision"`."""
        device = hidden_states.device
        if self.columns.device != device:  # layers on several devices
            for name in ("columns", "instruction_rotary", "prefix_rotary", "text_masks", "visual"):
                setattr(self, name, _to_device(getattr(self, name), device))
        if source == "text":
            adapter, (reads, attention_mask) = self.text_adapter, self.text_masks
            key_value = adapter(hidden_states, *self.instruction_rotary)
        elif self.visual is not None:
            adapter, (key_value, reads, attention_mask) = self.vision_adapter, self.visual
        else:
            return hidden_states
        prefix = hidden_states.gather(1, self.columns[:, :, None].expand(-1, -1, hidden_states.shape[-1]))
        updated = adapter(prefix, *self.prefix_rotary, key_value=key_value, attention_mask=attention_mask)
        updated = torch.where(reads, updated.to(device), prefix)
        return replace_prefix(hidden_states, self.columns, updated)


def reading_masks(has_prefix: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Of a `mask` `(B, length)` of what may be read: which rows read at all, `(B, 1, 1)`, and the mask for attention,
    `(B, 1, 1, length)`. A row that has nothing to read keeps its prefix; attention over no key would give nan, so it is
    shown all keys.
    """
    reads = has_prefix & mask.any(dim=-1)
    return reads[:, None, None], (mask | ~reads[:, None])[:, None, None, :]


def _to_device(value: Any, device: torch.device) -> Any:
    """A tensor, or nested tuples of tensors, on another device."""
    if isinstance(value, tuple):
        return tuple(_to_device(item, device) for item in value)
    return value if value is None else value.to(device)


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


class TaLlavaPreTrainedModel(VisionLanguageModelMixin, PreTrainedModel):  # trf-ignore: TRF057
    config: TaLlavaConfig
    config_class = TaLlavaConfig
    model_tags = ["ta-llava", "llava"]  # of a repo that `push_to_hub` makes
    auto_map = {
        "AutoConfig": "configuration_ta_llava.TaLlavaConfig",
        "AutoModel": "modeling_ta_llava.TaLlavaModel",
        "AutoModelForImageTextToText": "modeling_ta_llava.TaLlavaForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_ta_llava.TaLlavaForConditionalGeneration",
        "AutoProcessor": "processing_ta_llava.TaLlavaProcessor",
    }
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["TaLlavaAdapter"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # What quantisation leaves as it is; matched from the start of a module's name, in the head and without it.
    _keep_in_fp32_modules = [r"(model\.)?((text|vision)_adapter|(prefix|image_index)_embedding|multi_modal_projector)"]

    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # trf-ignore: TRF018 (the language model's rules instead of the library's)
    @torch.no_grad()
    def _init_weights(self, module):
        if module is getattr(self.base_model, "image_index_embedding", None):
            init.zeros_(module.weight)  # a trained model that is given it stays what it is
            return
        # The adapters are made of the language model's parts and start as its layers do (Gemma's norms at zero).
        self.base_model.language_model._init_weights(module)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        # The list is for quantisation alone. By it the library would also load a part of a float16 model in float32.
        plan = super()._get_dtype_plan(dtype)
        return {name: kept for name, kept in plan.items() if name not in type(self)._keep_in_fp32_modules}

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        """
        As in the library, for the whole model or by part (`{"text_config": ..., "vision_config": ...}`); but SDPA cannot
        soft-cap, so that where it is asked for, a language model that does (Gemma-2) is eager.
        """
        # CODEPATH: Gemma-2 caps its attention scores, others do not.
        if _soft_caps(self.config.text_config):
            if attn_implementation == "sdpa":
                attn_implementation = dict.fromkeys(("", *self.config.sub_configs), "sdpa")
            if isinstance(attn_implementation, dict) and attn_implementation.get("text_config") in (
                "sdpa",
                {"": "sdpa"},
            ):
                attn_implementation = {**attn_implementation, "text_config": "eager"}
        super().set_attn_implementation(attn_implementation, **kwargs)


def _soft_caps(text_config: Any) -> bool:
    """
    Whether a language model caps its attention scores. SDPA cannot: before 5.23 the library lets Gemma-2 use it all the
    same and drops the capping, since then it refuses.
    """
    return getattr(text_config, "attn_logit_softcapping", None) is not None


class TaLlavaModel(TaLlavaPreTrainedModel):  # trf-ignore: TRF057
    """Vision tower, projector, prefix, the two adapters and the language model, without a language modelling head."""

    def __init__(self, config: TaLlavaConfig):
        super().__init__(config)
        text_config = config.text_config
        num_states = config.vision_config.num_hidden_layers + 1
        if not -num_states <= config.vision_feature_layer < num_states:
            raise ValueError(
                f"`vision_feature_layer` is {config.vision_feature_layer}, but the vision tower has {num_states} hidden "
                "states."
            )
        for token_id in (config.image_token_id, *config.response_marker_ids):
            if token_id >= text_config.vocab_size:
                raise ValueError(
                    f"`image_token_id` and `response_marker_ids` must be tokens of the language model, but {token_id} is "
                    f"not in its vocabulary of {text_config.vocab_size}."
                )
        self.vision_tower = AutoModel.from_config(config.vision_config)
        make_compressible(self.vision_tower)
        # trf-ignore: TRF051
        if _soft_caps(text_config) and text_config._attn_implementation in (None, "sdpa"):
            text_config._attn_implementation = "eager"  # trf-ignore: TRF051
        self.language_model = AutoModel.from_config(text_config)

        vision_width, width = config.vision_config.hidden_size, text_config.hidden_size
        self.multi_modal_projector: nn.Module = nn.Linear(vision_width, width)
        # CODEPATH: the paper's models have a linear projector; "mlp" is for those that start from LLaVA-1.5's.
        if config.projector_type == "mlp":
            # trf-ignore: TRF036 (as in LLaVA's own code, whose weights have these names)
            self.multi_modal_projector = nn.Sequential(self.multi_modal_projector, nn.GELU(), nn.Linear(width, width))
        self.prefix_embedding = nn.Embedding(config.num_prefix_tokens, width)
        # CODEPATH: the paper's models have none; these are for models trained on several images or on videos.
        if config.num_image_index_embeddings > 0:
            self.image_index_embedding = nn.Embedding(config.num_image_index_embeddings, width)

        layers = self.language_model.layers
        layer_class: Any = type(layers[0])
        self.text_adapter = TaLlavaAdapter(layer_class(text_config, layer_idx=0))
        self.vision_adapter = TaLlavaAdapter(layer_class(text_config, layer_idx=0))

        # Backbones whose kinds of layer have each their own rotary base (Gemma-3): the adapters follow layer 0.
        by_layer_type = "layer_type" in inspect.signature(self.language_model.rotary_emb.forward).parameters
        self.rotary_kwargs = {"layer_type": text_config.layer_types[0]} if by_layer_type else {}

        prefix_reading_class = prefix_reading_layer_class(layer_class)
        for layer_idx, layer in enumerate(layers):
            layer.__class__ = prefix_reading_class
            layer.prefix_source = adapter_after_layer(layer_idx, len(layers), config.adapter_interval)

        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(  # trf-ignore: TRF057
        self, pixel_values: torch.Tensor, image_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Visual tokens of images: their vision features, projected to the width of the language model.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, I, 3, H, W)` or `(N, 3, H, W)`):
                Normalised images as the processor writes them.
            image_mask (`torch.Tensor` of shape `(B, I)`, *optional*):
                1 for real images, 0 for filler, which is left out. Defaults to all real.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: the outputs of the tower; `pooler_output` is
            a list of visual tokens `(M, d)`, one tensor per real image, row by row.
        """
        outputs, features = self._run_vision_tower(pixel_values, image_mask, **kwargs)
        outputs.pooler_output = list(self.multi_modal_projector(features))
        return outputs

    def get_vision_features(self, pixel_values: torch.Tensor, image_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        What a frozen vision tower need compute only once: the features of images before the projector. Stacked to
        `(B, I, M, vision width)` they go to `forward` as `vision_features`.

        Args and shapes are those of `get_image_features`.

        Returns:
            `torch.FloatTensor` of shape `(number of real images, M, vision width)`.
        """
        return self._run_vision_tower(pixel_values, image_mask, features_only=True)[1]

    @torch.no_grad()
    def encode_image(self, pixel_values: torch.Tensor, image_mask: torch.Tensor | None = None) -> TaLlavaEncodedImages:
        """
        All that can be computed of images before there is a question: vision tower, projector, and the keys and values
        that the prefix reads. For inference, given to `forward` and `generate()` as `encoded_images`, as often as there
        are questions; for training with a frozen tower, see `get_vision_features`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(E, I, 3, H, W)`, or `(E, 3, H, W)` for one image a row):
                Normalised images as the processor writes them.
            image_mask (`torch.Tensor` of shape `(E, I)`, *optional*):
                1 for real images, 0 for filler. Defaults to all real.

        Returns:
            [`TaLlavaEncodedImages`], without gradients.

        Raises:
            `ValueError`: No image, images of a wrong shape, dtype or device, or more in a row than there are index
            embeddings.
            `TypeError`: What is given is no tensor.
        """
        if not isinstance(pixel_values, torch.Tensor):
            raise TypeError(
                f"`pixel_values` must be a tensor as the processor makes it of images, got a {type(pixel_values).__name__}."
            )
        pixel_values = pixel_values.unsqueeze(1) if pixel_values.dim() == 4 else pixel_values
        if pixel_values.dim() != 5:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}: expected (rows, images, 3, height, width)."
            )
        self._check_image_mask("pixel_values", pixel_values, image_mask)
        if image_mask is not None and not image_mask.any():
            raise ValueError(
                "`image_mask` is all 0: there is no image to encode. For text alone leave `encoded_images` out."
            )
        return self._encode_vision_features(self._vision_features_of_rows(pixel_values, image_mask), image_mask)[0]

    def _encode_vision_features(
        self, vision_features: torch.Tensor, image_mask: torch.Tensor | None
    ) -> tuple[TaLlavaEncodedImages, torch.Tensor]:
        """What the prefix reads of `vision_features` `(E, I, M, vision width)`, and the visual tokens V `(E, I, M, d)`."""
        dtype = self.prefix_embedding.weight.dtype
        visual_tokens = self.multi_modal_projector(vision_features.to(dtype)).to(dtype)  # autocast has its own
        if image_mask is None:
            image_mask = torch.ones(visual_tokens.shape[:2])
        image_mask = image_mask.to(visual_tokens.device).bool()
        # CODEPATH: as in `__init__`.
        if self.config.num_image_index_embeddings > 0:
            image_index = self._embed_image_index(image_mask).to(visual_tokens.device)
            visual_tokens = visual_tokens + image_index[:, :, None, :]
        source = visual_tokens.flatten(1, 2)
        rotary = self._rotary_embedding(source, image_mask.repeat_interleave(visual_tokens.shape[2], dim=1))
        key, value = self.vision_adapter(source, *rotary)
        return TaLlavaEncodedImages(key=key, value=value, image_mask=image_mask), visual_tokens

    def _embed_image_index(self, image_mask: torch.Tensor) -> torch.Tensor:
        """Learned embedding `(E, I, d)` of which image of its row each is; filler does not count."""
        limit = self.config.num_image_index_embeddings
        if not is_tracing(image_mask):
            most = int(image_mask.sum(dim=-1).max())
            if most > limit:
                raise ValueError(
                    f"A row has {most} images, but there are index embeddings for {limit} "
                    "(`num_image_index_embeddings`). Give fewer images (of a video, fewer frames: `num_frames`), or train "
                    "a model with more of them."
                )
        return self.image_index_embedding((image_mask.long().cumsum(dim=-1) - 1).clamp(min=0))

    @torch.compiler.assume_constant_result
    def _install_hooks(self) -> bool:
        """
        What the library does at the first call of a tower whose hidden states are asked for, behind a lock that cannot be
        compiled: this way it is done while a graph is being made, not in it.
        """
        # In some towers it is a part that has them.
        if not any(getattr(part, "_output_capturing_hooks_installed", False) for part in self.vision_tower.modules()):
            output_capturing.maybe_install_capturing_hooks(self.vision_tower)
        return True

    def _run_vision_tower(
        self, pixel_values: torch.Tensor, image_mask: torch.Tensor | None, features_only: bool = False, **kwargs
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """
        Outputs of the vision tower for the real images, and the features that the config selects from them; with
        `features_only` the outputs are good for nothing else.
        """
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` must be floating point (normalised images), got {pixel_values.dtype}. Let the processor "
                "prepare them: `processor(images=..., text=...)`."
            )
        # A model that is spread over devices or offloaded moves its inputs by itself.
        if pixel_values.device != self.vision_tower.device and not any(
            hasattr(module, "_hf_hook") for module in self.vision_tower.modules()
        ):
            raise ValueError(
                f"`pixel_values` is on {pixel_values.device}, the model on {self.vision_tower.device}. Move the inputs: "
                "`inputs.to(model.device)`."
            )
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        if pixel_values.dim() == 5:
            pixel_values = pixel_values.flatten(0, 1)
        if image_mask is not None:
            pixel_values = pixel_values[image_mask.flatten().bool()]
        if torch.compiler.is_compiling():
            self._install_hooks()
        layer = self.config.vision_feature_layer % (self.config.vision_config.num_hidden_layers + 1)
        kwargs["output_hidden_states"] = keep_state(layer) if features_only else True
        if features_only and blocks_of(self.vision_tower):
            kwargs["num_blocks"] = layer
        vmtc = compression_of_call(self.config, self.vision_tower, pixel_values, layer)
        if vmtc is not None:
            kwargs["vmtc"] = vmtc
        outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        features = outputs.hidden_states[layer]
        # CODEPATH: a tower with a class token, such as CLIP, drops it here; SigLIP has none.
        if self.config.vision_feature_select_strategy == "default" and has_class_token(self.vision_tower):
            features = features[:, 1:]
        return outputs, features

    @can_return_tuple
    def forward(  # trf-ignore: TRF057
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        encoded_images: TaLlavaEncodedImages | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TaLlavaModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`):
                Token ids; rows with images begin, after any padding, with `num_prefix_tokens` placeholders.
            pixel_values (`torch.FloatTensor` of shape `(B, I, 3, H, W)`, or `(B, 3, H, W)` for one image a row):
                Normalised images. Not looked at when the cache already holds the prefix.
            image_mask (`torch.Tensor` of shape `(B, I)`, *optional*):
                1 for real images, 0 for filler. Defaults to all real.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*):
                1 for tokens, 0 for padding. The masks that `generate()` prepares are understood too.
            inputs_embeds (`torch.FloatTensor` of shape `(B, S, d)`, *optional*):
                Instead of `input_ids`. Placeholders and response marker are then the columns that equal the embeddings
                of their tokens.
            vision_features (`torch.FloatTensor` of shape `(B, I, M, vision width)`, *optional*):
                Instead of `pixel_values`: what `get_vision_features` has computed of the images before. With them, the
                projector can be trained.
            encoded_images ([`TaLlavaEncodedImages`], *optional*):
                Instead of `pixel_values` and `image_mask`: what `encode_image` has computed of the images before, of B
                rows, or of one for all.
            cache (`Cache`, *optional*):
                Another name of `past_key_values`, that of the library since 5.24.

        Raises:
            `ValueError`: Wrong number of placeholders or images, images of a wrong shape, dtype or device, or in several
            forms, or a sequence longer than the context of the language model.
        """
        cache = cache_of_call(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of `input_ids` or `inputs_embeds`.")
        if input_ids is not None and input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"`input_ids` must hold token ids of dtype torch.int64, got {input_ids.dtype}.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        if pixel_values is not None and vision_features is not None:
            raise ValueError("Give `pixel_values` or `vision_features`, not both.")
        images = pixel_values if vision_features is None else vision_features
        if encoded_images is not None:
            if images is not None or image_mask is not None:
                raise ValueError(
                    "Give `encoded_images` or images in another form, not both; their `image_mask` is in them."
                )
            images = encoded_images

        layer = self.language_model.layers[0]
        checkpointing = getattr(layer, "_gradient_checkpointing_func", None) if layer.gradient_checkpointing else None
        if self.training and getattr(checkpointing, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "Gradient checkpointing cannot be reentrant here: several layers share the keys and values of the image. "
                'Pass `gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )

        visual_tokens = num_images = None
        is_prefill = self._is_prefill(cache, images is not None)
        if is_prefill:
            # For a cache; here, where there is nothing yet that a GPU would have to finish first.
            if not torch.compiler.is_compiling() and not self.training:
                num_images = count_images(
                    inputs_embeds.shape[0], pixel_values, image_mask, vision_features, encoded_images
                )
            inputs_embeds, visual_tokens, prefix_reader = self._prepare_prefix(
                input_ids, inputs_embeds, pixel_values, vision_features, encoded_images, image_mask, attention_mask
            )
            if prefix_reader is not None:
                kwargs["prefix_reader"] = prefix_reader

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{CACHE: cache},
            **kwargs,
        )
        cache = getattr(outputs, CACHE)
        if num_images is not None and cache is not None:
            cache.num_images = num_images
        return TaLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: cache},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=visual_tokens,
        )

    @staticmethod
    def _is_prefill(cache: Cache | None, has_images: bool) -> bool:
        """Whether the sequence starts at its beginning, where the prefix is; else it is in the cache already."""
        if cache is None:
            return True
        if torch.compiler.is_compiling():  # the length of a static cache is a tensor; generate() prefills with images
            return has_images
        return bool(cache.get_seq_length() == 0)

    def _prepare_prefix(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: Any,
        pixel_values: torch.Tensor | None,
        vision_features: torch.Tensor | None,
        encoded_images: TaLlavaEncodedImages | None,
        image_mask: torch.Tensor | None,
        attention_mask: torch.Tensor | dict | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, PrefixReader | None]:
        """
        Returns the embeddings with the prefix on the columns of the placeholders, the visual tokens, and the reader
        that the layers call; no reader for a batch of text only, unless it is trained on.
        """
        batch_size, sequence_length = inputs_embeds.shape[:2]
        device, num_prefix_tokens = inputs_embeds.device, self.config.num_prefix_tokens
        max_length = getattr(self.config.text_config, "max_position_embeddings", sequence_length)
        if sequence_length > max_length:
            raise ValueError(
                f"The sequence has {sequence_length} tokens, the context of the language model {max_length} "
                "(`text_config.max_position_embeddings`). Shorten the prompt."
            )
        no_images = pixel_values is None and vision_features is None and encoded_images is None
        # In training a batch without an image takes the way of one with images, and comes out as it was: see `blank_image`.
        is_trained = self.training and torch.is_grad_enabled()
        if no_images and sequence_length < num_prefix_tokens and not is_trained:
            return inputs_embeds, None, None

        # A placeholder after the first word is a word like others, should a model ever write one.
        tokens = non_padding_columns(attention_mask, batch_size, sequence_length, device)
        if tokens is None:
            tokens = torch.ones(batch_size, sequence_length, dtype=torch.bool, device=device)
        is_placeholder = self._columns_of_token(self.config.image_token_id, input_ids, inputs_embeds)
        is_prefix = is_placeholder & ((tokens & ~is_placeholder).cumsum(dim=-1) == 0)
        has_prefix = is_prefix.any(dim=-1)
        text_mask = tokens & ~is_prefix
        if not is_tracing(is_prefix):  # these look at values, which a graph must not wait for
            if (no_images or (image_mask is not None and not image_mask.any())) and not has_prefix.any():
                if not is_trained:
                    return inputs_embeds, None, None
                no_images, pixel_values, vision_features, image_mask = True, None, None, None
            self._check_placeholders(is_prefix)
            if no_images and has_prefix.any():  # not an error: assistants are called like this
                logger.warning_once(
                    "The text has placeholders for images, but no images (`pixel_values`, `vision_features` or "
                    "`encoded_images`) were given: the prefix reads text alone."
                )
        if pixel_values is not None:
            pixel_values = pixel_values.unsqueeze(1) if pixel_values.dim() == 4 else pixel_values
            self._check_images("pixel_values", pixel_values, 5, image_mask, has_prefix)
            vision_features = self._vision_features_of_rows(pixel_values, image_mask)
        elif vision_features is not None:
            self._check_images("vision_features", vision_features, 4, image_mask, has_prefix)
            if vision_features.shape[-1] != self.config.vision_config.hidden_size:
                raise ValueError(
                    f"`vision_features` has width {vision_features.shape[-1]}, the vision tower "
                    f"{self.config.vision_config.hidden_size}. Make them with `get_vision_features`."
                )
        elif encoded_images is not None:
            encoded_images = self._encoded_images_of_rows(encoded_images, has_prefix)

        # Rows without a prefix get any L columns, whose states stay as they are; fewer, if text alone is shorter.
        start = is_prefix.int().argmax(dim=-1, keepdim=True)
        columns = start + torch.arange(min(num_prefix_tokens, sequence_length), device=device)
        prefix = self._embed_prefix(device)[:, : columns.shape[1]].to(device, inputs_embeds.dtype)
        prefix = torch.where(
            has_prefix[:, None, None],
            prefix,
            inputs_embeds.gather(1, columns[:, :, None].expand(-1, -1, prefix.shape[-1])),
        )

        instruction_mask = self._instruction_mask(text_mask, has_prefix, input_ids, inputs_embeds)

        visual_tokens = visual = None
        if vision_features is not None:
            encoded_images, visual_tokens = self._encode_vision_features(vision_features, image_mask)
        elif no_images and is_trained:
            features = self.get_vision_features(blank_image(self.config, self.vision_tower))[None]
            blank = self._encode_vision_features(features, features.new_zeros(1, 1))[0]  # by the mask not to be read
            states = {name: value.expand(batch_size, *value.shape[1:]) for name, value in blank.items()}
            encoded_images = type(blank)(**states)
        if encoded_images is not None:
            encoded_images = encoded_images.to(device, inputs_embeds.dtype)
            key_value, image_mask = (encoded_images.key, encoded_images.value), encoded_images.image_mask
            visual = key_value, image_mask.repeat_interleave(key_value[0].shape[2] // image_mask.shape[1], dim=1)
        reader = PrefixReader(
            self.text_adapter,
            self.vision_adapter,
            columns=columns,
            has_prefix=has_prefix,
            instruction_mask=instruction_mask,
            instruction_rotary=self._rotary_embedding(inputs_embeds, instruction_mask),
            prefix_rotary=self._rotary_embedding(prefix, torch.ones_like(columns[:1])),
            visual=visual,
        )
        return replace_prefix(inputs_embeds, columns, prefix), visual_tokens, reader

    def _instruction_mask(
        self,
        text_mask: torch.Tensor,
        has_prefix: torch.Tensor,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
    ) -> torch.Tensor:
        """The instruction `(B, S)`: the text before the response, as the markers and `instruction_scope` tell."""
        marker_ids, sequence_length = self.config.response_marker_ids, text_mask.shape[1]
        markers = torch.stack([self._columns_of_token(token_id, input_ids, inputs_embeds) for token_id in marker_ids])
        response_start = find_response_start(markers & text_mask, self.config.instruction_scope)
        no_marker = response_start == sequence_length
        if not is_tracing(no_marker) and (no_marker & has_prefix).any():
            if self.training:
                logger.warning_once(
                    f"A training example with an image has no response marker (`config.response_marker_ids` {marker_ids}), "
                    "so its prefix reads all of its text, the labels included. If the row was truncated before its answer, "
                    "leave such rows out or allow more tokens (`max_length` of TRL and of collators). Else look whether the "
                    "chat template of the processor writes the marker."
                )
            else:
                logger.warning_once(
                    f"A prompt with an image has no response marker (`config.response_marker_ids` {marker_ids}), as chats "
                    "have it: a model that was trained on chats will not answer it. `processor.apply_chat_template` with "
                    "`add_generation_prompt=True` writes it."
                )
        return text_mask & (torch.arange(sequence_length, device=text_mask.device) < response_start[:, None])

    def _warn_of_labelled_instruction(
        self, labels: torch.Tensor, kept: slice | torch.Tensor, input_ids: torch.Tensor | None, inputs_embeds: Any
    ) -> None:
        """Warns if `labels`, of the `kept` columns, ask for what the prefix reads, which it need only copy then."""
        is_placeholder = self._columns_of_token(self.config.image_token_id, input_ids, inputs_embeds)
        columns = torch.arange(is_placeholder.shape[1], device=is_placeholder.device)
        markers = [
            self._columns_of_token(token, input_ids, inputs_embeds) for token in self.config.response_marker_ids
        ]
        response_start = find_response_start(torch.stack(markers), self.config.instruction_scope)
        in_instruction = is_placeholder.any(dim=-1, keepdim=True) & ~is_placeholder
        in_instruction &= (columns + len(markers) <= response_start[:, None]) & (response_start < len(columns))[
            :, None
        ]
        if (in_instruction[:, kept].to(labels.device) & (labels != -100)).any():
            logger.warning_once(
                "The labels of a row with an image hold its instruction too, which the prefix has read: it need only be "
                "copied. Set them to -100 up to the response marker (`config.response_marker_ids` "
                f"{self.config.response_marker_ids}), as `ta-llava train` does. In TRL, give prompt and completion, and "
                "`completion_only_loss=True`."
            )

    def _embed_prefix(self, device: torch.device) -> torch.Tensor:
        """The learned prefix `(1, L, d)`, scaled as the language model scales its embeddings (Gemma: by sqrt(d))."""
        prefix = self.prefix_embedding(torch.arange(self.config.num_prefix_tokens, device=device))[None]
        scale = getattr(self.get_input_embeddings(), "embed_scale", None)
        return prefix if scale is None else prefix * torch.as_tensor(scale, device=prefix.device).to(prefix.dtype)

    def _rotary_embedding(self, states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary embedding inside an adapter: the tokens that `mask` `(B, length)` keeps count 0, 1, ..."""
        position_ids = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        return self.language_model.rotary_emb(states, position_ids, **self.rotary_kwargs)

    def _vision_features_of_rows(self, pixel_values: torch.Tensor, image_mask: torch.Tensor | None) -> torch.Tensor:
        """Features of `pixel_values` `(B, I, 3, H, W)`: `(B, I, M, vision width)`, zeros for filler."""
        if image_mask is None or torch.compiler.is_compiling():  # a graph cannot know how many images are real
            return self.get_vision_features(pixel_values).unflatten(0, pixel_values.shape[:2])
        image_mask = image_mask.to(pixel_values.device).bool()
        real = self.get_vision_features(pixel_values, image_mask)
        features = real.new_zeros(*image_mask.shape, *real.shape[1:])
        return features.masked_scatter(image_mask[:, :, None, None].to(real.device), real)

    def _check_placeholders(self, is_prefix: torch.Tensor):
        """Raises unless every row begins with no placeholder or with exactly L of them, side by side."""
        num_prefix_tokens = self.config.num_prefix_tokens
        for row, columns in enumerate(is_prefix.tolist()):
            count = sum(columns)
            if count == 0 or (count == num_prefix_tokens and all(columns[columns.index(True) :][:count])):
                continue
            raise ValueError(
                f"Row {row} begins with {count} placeholder tokens (id {self.config.image_token_id}), but a row with images "
                f"needs {num_prefix_tokens} (`num_prefix_tokens`) side by side, whatever the number of its images, and a "
                "row without images none. Let the processor write them."
            )

    def _encoded_images_of_rows(
        self, encoded_images: TaLlavaEncodedImages, has_prefix: torch.Tensor
    ) -> TaLlavaEncodedImages:
        """`encoded_images` with a row for each row of the text, checked."""
        key = getattr(encoded_images, "key", None)
        if key is None:
            raise ValueError(
                f"`encoded_images` must be what `encode_image` gives, got {type(encoded_images).__name__}."
            )
        attention = self.vision_adapter.cross_attn
        num_heads, head_dim = attention.k_proj.out_features // attention.head_dim, attention.head_dim
        if (key.shape[1], key.shape[3]) != (num_heads, head_dim):
            raise ValueError(
                f"`encoded_images` have {key.shape[1]} key heads of width {key.shape[3]}, this model {num_heads} of width "
                f"{head_dim}. Make them with `encode_image` of the same model."
            )
        batch_size = has_prefix.shape[0]
        if key.shape[0] not in (1, batch_size):
            raise ValueError(
                f"`encoded_images` has {key.shape[0]} rows, but the text {batch_size}. Give one row for all, or one for "
                "each; `repeat_interleave` repeats rows."
            )
        if key.shape[0] != batch_size:
            states = {name: value.expand(batch_size, *value.shape[1:]) for name, value in encoded_images.items()}
            encoded_images = type(encoded_images)(**states)
        self._check_rows(encoded_images.image_mask.sum(dim=-1), has_prefix)
        return encoded_images

    def _check_images(
        self, name: str, images: torch.Tensor, ndim: int, image_mask: torch.Tensor | None, has_prefix: torch.Tensor
    ):
        """Raises unless exactly the rows with placeholders have images."""
        batch_size = has_prefix.shape[0]
        if images.dim() != ndim or images.shape[0] != batch_size:
            rest = "3, height, width" if name == "pixel_values" else "visual tokens, vision width"
            raise ValueError(
                f"`{name}` has shape {tuple(images.shape)}, but the text has {batch_size} rows: expected "
                f"({batch_size}, images, {rest})."
            )
        self._check_image_mask(name, images, image_mask)
        num_images = torch.full_like(has_prefix, images.shape[1], dtype=torch.long)
        if image_mask is not None:
            num_images = image_mask.long().sum(dim=-1)
        self._check_rows(num_images, has_prefix)

    @staticmethod
    def _check_image_mask(name: str, images: torch.Tensor, image_mask: torch.Tensor | None):
        """Raises unless `image_mask` is `(B, I)` as the images are."""
        if image_mask is not None and image_mask.shape != images.shape[:2]:
            raise ValueError(
                f"`image_mask` has shape {tuple(image_mask.shape)}, `{name}` holds rows x images of "
                f"{tuple(images.shape[:2])}. They must agree; the processor makes both."
            )

    @staticmethod
    def _check_rows(num_images: torch.Tensor, has_prefix: torch.Tensor):
        """Raises unless exactly the rows with placeholders have images."""
        if is_tracing(has_prefix):
            return
        wrong = (num_images.to(has_prefix.device) > 0) != has_prefix
        if wrong.any():
            row = int(wrong.int().argmax())
            begins = "begins with" if has_prefix[row] else "does not begin with"
            raise ValueError(
                f"Row {row} has {int(num_images[row])} images but its text {begins} placeholder tokens. Make text and "
                "images in one call of the processor, and pass its `attention_mask` along: padding that is not marked "
                "counts as text."
            )


class TaLlavaForConditionalGeneration(TaLlavaPreTrainedModel, GenerationMixin):  # trf-ignore: TRF057
    r"""
    TA-LLaVA with a language modelling head, for generation and training. An image, or several, stand before the text as
    `config.num_prefix_tokens` columns, which read the question and then the image in each prompt.

    Args:
        config ([`TaLlavaConfig`]):
            The parts and their settings; the model starts with new weights. `from_pretrained` loads trained ones, and takes
            fields of the config as arguments.

    Example:

    ```python
    >>> from ta_llava import TaLlavaForConditionalGeneration, TaLlavaProcessor

    >>> model = TaLlavaForConditionalGeneration.from_pretrained("checkpoints/ta-llava-tiny")
    >>> processor = TaLlavaProcessor.from_pretrained("checkpoints/ta-llava-tiny")
    >>> content = [
    ...     {"type": "image", "path": "examples/teal_triangle.png"},
    ...     {"type": "text", "text": "what color is the shape?"},
    ... ]
    >>> inputs = processor.apply_chat_template(
    ...     [{"role": "user", "content": content}],
    ...     add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ... )
    >>> output = model.generate(**inputs, max_new_tokens=5)
    >>> processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    'teal'
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: TaLlavaConfig):
        super().__init__(config)
        self.model = TaLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        r"""
        The answers to prompts. The arguments of [`~transformers.GenerationMixin.generate`], such as `max_new_tokens`,
        `do_sample`, `num_beams` or `streamer`; what the processor makes of a prompt (`**inputs`); and:

        Args:
            encoded_images ([`TaLlavaEncodedImages`], *optional*):
                Instead of `pixel_values` and `image_mask`: what `encode_image` has computed of the images before, of each
                row, or of one for all.
            vision_features (`torch.FloatTensor` of shape `(B, I, M, vision width)`, *optional*):
                Instead of `pixel_values`: what `get_vision_features` has computed of the images before.

        Returns:
            `torch.LongTensor` of shape `(B, S + new tokens)`: the prompts and their answers; or, with
            `return_dict_in_generate=True`, an output that also has what else was asked for.
        """
        return super().generate(inputs, generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        # The library gives images to the first forward only, but of their arguments it knows just `pixel_values`.
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in _IMAGE_ARGUMENTS:
                kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs):
        # A row for all questions stands for those of all beams too.
        key = getattr(kwargs.get("encoded_images"), "key", None)
        if key is not None and len(key) > 1:
            kwargs["encoded_images"] = kwargs["encoded_images"].repeat_interleave(expand_size)
        return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        if generation_config.prefill_chunk_size is not None and (input_ids == self.config.image_token_id).any():
            raise ValueError(
                f"A prompt with images cannot be prefilled in chunks of {generation_config.prefill_chunk_size} tokens: the "
                "prefix must see the whole instruction. Pass `prefill_chunk_size=None`."
            )
        cache = model_kwargs.get(CACHE)
        if cache is not None and is_first_iteration:
            num_images = count_images(input_ids.shape[0], **model_kwargs)
            past_length = int(cache.get_seq_length())
            if past_length == 0:
                cache.num_images = num_images  # here too, since a compiled forward cannot
            else:
                num_past_images = getattr(cache, "num_images", None)
                if any(num_images) and num_past_images is not None:
                    # Its rows may have been repeated or selected, as for beams.
                    same_rows = len(num_images) == len(num_past_images)
                    known = num_images == num_past_images if same_rows else set(num_images) <= set(num_past_images)
                    if not known:
                        raise ValueError(
                            f"The prompts have {num_images} images now, those in `past_key_values` {num_past_images}. The "
                            "prefix reads images before all text: for new ones, begin with an empty cache; the same as "
                            "before may be left out."
                        )
                new_ids = input_ids[:, past_length:] if input_ids.shape[1] > past_length else input_ids
                num_placeholders = int((new_ids == self.config.image_token_id).sum(dim=1).max())
                if num_placeholders >= self.config.num_prefix_tokens:
                    raise ValueError(
                        f"What follows `past_key_values` has {num_placeholders} placeholder tokens (id "
                        f"{self.config.image_token_id}) in a row, as a prompt with images begins with. The prefix reads "
                        "images before all text: for new ones, begin with an empty cache; else leave images and "
                        "placeholders out, or give the whole conversation."
                    )
                if num_past_images is None or any(num_past_images):
                    self._check_next_turn(new_ids)
                # Even a compiled forward, which does not see that the prefix is in the cache, now needs no image.
                model_kwargs = {name: value for name, value in model_kwargs.items() if name not in _IMAGE_ARGUMENTS}
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _assisted_decoding(self, input_ids, *args, **kwargs):
        cache = kwargs.get(CACHE)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "Assisted and prompt-lookup decoding cannot go on from a filled `past_key_values`: the library would read "
                "the whole prompt into it once more. Leave out `past_key_values`, or the assistant."
            )
        return super()._assisted_decoding(input_ids, *args, **kwargs)

    def _check_next_turn(self, new_ids: torch.Tensor):
        """Warns if the prefix, as it is in the cache, has not read the last question of `new_ids`, but should have."""
        # CODEPATH: a prefix of "first", the paper's, has read all that it is to read in the first turn.
        if self.config.instruction_scope == "first":
            return
        markers = torch.stack([new_ids == token_id for token_id in self.config.response_marker_ids])
        if (find_response_start(markers, "last") < new_ids.shape[1]).any():
            logger.warning_once(
                'With `instruction_scope="last"` the prefix reads every new question, but that in `past_key_values` has '
                "read the earlier ones only: the answer is not that to the same prompt with an empty cache. Begin with an "
                'empty cache in each turn, or set `model.config.instruction_scope = "first"`.'
            )

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: continuous batching packs requests into one row, but every prefix must read its own request only."""
        raise ValueError(
            f"{type(self).__name__} does not support continuous batching, which packs several requests into one row. Use "
            "`generate()` with a padded batch."
        )

    def get_image_features(  # trf-ignore: TRF057
        self, pixel_values: torch.Tensor, image_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`TaLlavaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_mask, **kwargs)

    def get_vision_features(self, pixel_values: torch.Tensor, image_mask: torch.Tensor | None = None) -> torch.Tensor:
        """See [`TaLlavaModel.get_vision_features`]."""
        return self.model.get_vision_features(pixel_values, image_mask)

    def encode_image(self, pixel_values: torch.Tensor, image_mask: torch.Tensor | None = None) -> TaLlavaEncodedImages:
        """
        All that can be computed of images before there is a question, to ask many questions about them.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(E, I, 3, H, W)`, or `(E, 3, H, W)` for one image a row):
                Normalised images as the processor writes them.
            image_mask (`torch.Tensor` of shape `(E, I)`, *optional*):
                1 for real images, 0 for filler. Defaults to all real.

        Returns:
            [`TaLlavaEncodedImages`], without gradients, for `generate()` and `forward` as `encoded_images`.

        Raises:
            `ValueError`, `TypeError`: See [`TaLlavaModel.encode_image`].

        Example:

        ```python
        >>> encoded = model.encode_image(**processor(images="examples/teal_triangle.png", return_tensors="pt"))
        >>> content = [{"type": "image"}, {"type": "text", "text": "what color is the shape?"}]
        >>> inputs = processor.apply_chat_template(
        ...     [{"role": "user", "content": content}],
        ...     add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        ...     processor_kwargs={"images_encoded": True},
        ... )
        >>> output = model.generate(**inputs, encoded_images=encoded, max_new_tokens=5)
        ```
        """
        return self.model.encode_image(pixel_values, image_mask)

    @can_return_tuple
    def forward(  # trf-ignore: TRF057
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        encoded_images: TaLlavaEncodedImages | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_token_type_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TaLlavaCausalLMOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`):
                Token ids; rows with images begin, after any padding, with `num_prefix_tokens` placeholders.
            pixel_values (`torch.FloatTensor` of shape `(B, I, 3, H, W)`, or `(B, 3, H, W)` for one image a row):
                Normalised images. Not looked at when the cache already holds the prefix.
            image_mask (`torch.Tensor` of shape `(B, I)`, *optional*):
                1 for real images, 0 for filler. Defaults to all real.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*):
                1 for tokens, 0 for padding. The masks that `generate()` prepares are understood too.
            position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*):
                Place of each token in its row.
            past_key_values, cache (`Cache`, *optional*):
                Two names for the columns before `input_ids`; the second is that of the library since 5.24.
            inputs_embeds (`torch.FloatTensor` of shape `(B, S, d)`, *optional*):
                Instead of `input_ids`.
            vision_features (`torch.FloatTensor` of shape `(B, I, M, vision width)`, *optional*):
                Instead of `pixel_values`: what `get_vision_features` has computed of the images before.
            encoded_images ([`TaLlavaEncodedImages`], *optional*):
                Instead of `pixel_values` and `image_mask`: what `encode_image` has computed of the images before, of B
                rows, or of one for all.
            labels (`torch.LongTensor` of shape `(B, S)`, *optional*):
                Token ids to predict, aligned with `input_ids`; -100 where no loss is taken (instruction, padding).
                Placeholders, as in a copy of `input_ids`, are never predicted.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits for the last so many columns only (0: all), or for the given column indices.
            mm_token_type_ids (`torch.LongTensor` of shape `(B, S)`, *optional*):
                Accepted because processors make it on request, but not needed: `input_ids` tell where the prefix is.

        Raises:
            `ValueError`: See [`TaLlavaModel.forward`].

        Example:

        ```python
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor

        >>> model = AutoModelForImageTextToText.from_pretrained("checkpoints/ta-llava-tiny")
        >>> processor = AutoProcessor.from_pretrained("checkpoints/ta-llava-tiny")
        >>> content = [{"type": "image", "path": "shape.png"}, {"type": "text", "text": "what color is the shape?"}]
        >>> inputs = processor.apply_chat_template(
        ...     [{"role": "user", "content": content}],
        ...     add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        ... )
        >>> output = model.generate(**inputs, max_new_tokens=5)
        >>> processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ```
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_mask=image_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_features=vision_features,
            encoded_images=encoded_images,
            cache=cache,
            **kwargs,
        )
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, columns, :])
        softcap = getattr(self.config.text_config, "final_logit_softcapping", None)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap

        loss = None
        if labels is not None:
            if self.training and not is_tracing(labels):
                self.model._warn_of_labelled_instruction(labels, columns, input_ids, inputs_embeds)
            labels = labels.masked_fill(labels == self.config.image_token_id, -100)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return TaLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


__all__ = ["TaLlavaEncodedImages", "TaLlavaForConditionalGeneration", "TaLlavaModel", "TaLlavaPreTrainedModel"]
