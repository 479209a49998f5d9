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
TA-LLaVA model ("Instruction-aware Visual Feature Extraction for Multimodal Large Language Model").

Algorithm 1 of the paper, and where each step of it is. V are the visual tokens, Y is the prefix, X the embedded text.

1. V = projector(vision tower(image)): `TaLlavaModel.get_vision_features`, then `TaLlavaModel._encode_vision_features`, which
   also makes the keys and values of V, once for all insertions (`TaLlavaAdapter.project`).
2. [Y, X]: the learned prefix takes the placeholder columns before the text: `TaLlavaModel._locate_prefix`, then
   `replace_prefix`.
3. [X_instruct, X_response] = X, line 3: `TaLlavaModel._instruction_mask`, with `find_instruction_end`.
4. In each layer i of the language model, with k = `adapter_interval`:
   a. [Y, X] = layer(Y, X), lines 1 and 2: the layer of the library, unchanged, within `prefix_reading_layer_class`.
   b. i % k == 0, lines 4 to 6: Y reads X_instruct as it is after this layer: `PrefixReader`, `TaLlavaAdapter.read`.
   c. i % k == 1, lines 7 to 9: Y reads V through the other adapter: the same two.
   `adapter_after_layer` says which, and none after the last layer.
5. The language modelling head predicts the text: `TaLlavaForConditionalGeneration.forward`.

`TaLlavaModel._prepare_prefix` does steps 1 to 3; `prefix_adapters.py` has 4b and 4c. All of this happens in the prefill. The
keys and values of Y stay in the ordinary KV cache, so that a decode step is the unchanged language model on one token.

Conventions of this file. B: batch, S: sequence columns (prefix, text and padding), L: prefix tokens, I: images of a row,
M: visual tokens of one image, d: width of the language model. The sequence of a row is `[Y, BOS, text]`: the prefix Y stands
on the L columns of the placeholder token, before all text. A row without placeholders is text only.
"""

import inspect
from dataclasses import dataclass
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
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_tracing, logging

from .attention_masks import non_padding_columns
from .configuration_ta_llava import TaLlavaConfig
from .image_inputs import (
    IMAGE_ARGUMENTS,
    ImageInputs,
    TaLlavaEncodedImages,
    check_image_mask,
    check_images,
    check_rows,
)
from .library_versions import CACHE, cache_of_call, one_hidden_state, soft_caps_attention
from .prefix_adapters import (
    PrefixReader,
    Rotary,
    TaLlavaAdapter,
    adapter_after_layer,
    prefix_reading_layer_class,
    replace_prefix,
    signed_rotary,
)
from .vision_language_model import VisionLanguageModelMixin, is_compiled, kept_columns
from .vision_towers import blank_image, blocks_of, compression_of_call, has_class_token, make_compressible


logger = logging.get_logger(__name__)


@dataclass
class TaLlavaModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Outputs of [`TaLlavaModel`]. `hidden_states` and `attentions` are those of the language model; `hidden_states[i + 1]`
    is the state after layer i and after the adapter that follows it.

    image_hidden_states (`torch.FloatTensor` of shape `(batch_size, images, visual_tokens, hidden_size)`, *optional*):
        The visual tokens V that the prefix read. They mean nothing where a row has fewer images than others.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class TaLlavaCausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    Outputs of [`TaLlavaForConditionalGeneration`].

    loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
        Next-token cross entropy over the labels that are not -100.
    logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
        Prediction scores before softmax, prefix columns included.
    past_key_values, since 5.24 of the library `cache` (`Cache`, *optional*):
        The ordinary cache of the language model; the first `num_prefix_tokens` columns of a row hold its prefix.
    image_hidden_states (`torch.FloatTensor` of shape `(batch_size, images, visual_tokens, hidden_size)`, *optional*):
        The visual tokens V that the prefix read. They mean nothing where a row has fewer images than others.
    """

    image_hidden_states: torch.Tensor | None = None


def find_instruction_end(marker_matches: torch.Tensor, instruction_scope: str) -> torch.Tensor:
    """
    Column before which the instruction of each row ends: that of the last token of its first (or last) response marker. The
    other tokens of the marker belong to the instruction.

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


def _count_from_0(mask: torch.Tensor) -> torch.Tensor:
    """Positions `(B, length)` of tokens inside an adapter: those that `mask` keeps count 0, 1, ..."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def record_num_images(cache: Cache, num_images: list[int]) -> None:
    """
    Stores on a cache how many images the prefix of each row has read, so that a later turn with other images is refused. It
    is a plain attribute, because a `Cache` has no field for facts about its rows. It survives `copy.deepcopy`.
    """
    cache.num_images = num_images  # type: ignore[attr-defined]


def recorded_num_images(cache: Cache) -> list[int] | None:
    """What `record_num_images` has stored; `None` for a cache that was filled otherwise."""
    return getattr(cache, "num_images", None)


class TaLlavaPreTrainedModel(VisionLanguageModelMixin, PreTrainedModel):
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
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["TaLlavaAdapter"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # Modules that quantisation leaves as they are. The pattern matches from the start of a name, in the head and without it.
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
            init.zeros_(module.weight)  # so that adding it does not change a trained model
            return
        # The adapters are made of the language model's parts and start as its layers do (Gemma's norms at zero).
        self.base_model.language_model._init_weights(module)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        # The list is for quantisation alone. The library would also load these modules of a float16 model in float32.
        plan = super()._get_dtype_plan(dtype)
        return {name: kept for name, kept in plan.items() if name not in type(self)._keep_in_fp32_modules}


class TaLlavaModel(TaLlavaPreTrainedModel):
    """Vision tower, projector, prefix, the two adapters and the language model, without a language modelling head."""

    def __init__(self, config: TaLlavaConfig):
        super().__init__(config)
        self._check_config(config)
        text_config = config.text_config
        self.vision_tower = AutoModel.from_config(config.vision_config)
        make_compressible(self.vision_tower)
        # trf-ignore: TRF051 (SDPA cannot soft-cap)
        if soft_caps_attention(text_config) and text_config._attn_implementation in (None, "sdpa"):
            text_config._attn_implementation = "eager"
        self.language_model = AutoModel.from_config(text_config)

        vision_width, width = config.vision_config.hidden_size, text_config.hidden_size
        self.multi_modal_projector: nn.Module = nn.Linear(vision_width, width)
        # CODEPATH: the paper's models have a linear projector; models that start from LLaVA-1.5's have its "mlp".
        if config.projector_type == "mlp":
            # trf-ignore: TRF036 (as in LLaVA's own code, whose weights have these names)
            self.multi_modal_projector = nn.Sequential(self.multi_modal_projector, nn.GELU(), nn.Linear(width, width))
        self.prefix_embedding = nn.Embedding(config.num_prefix_tokens, width)
        # CODEPATH: the paper's models have none; models that are trained on several images or on videos may.
        if config.num_image_index_embeddings > 0:
            self.image_index_embedding = nn.Embedding(config.num_image_index_embeddings, width)

        layers = self.language_model.layers
        layer_class: Any = type(layers[0])
        self.text_adapter = TaLlavaAdapter(layer_class(text_config, layer_idx=0))
        self.vision_adapter = TaLlavaAdapter(layer_class(text_config, layer_idx=0))

        # In some backbones each kind of layer has its own rotary base (Gemma-3). The adapters follow layer 0.
        by_layer_type = "layer_type" in inspect.signature(self.language_model.rotary_emb.forward).parameters
        self.rotary_kwargs = {"layer_type": text_config.layer_types[0]} if by_layer_type else {}

        prefix_reading_class = prefix_reading_layer_class(layer_class)
        for layer_idx, layer in enumerate(layers):
            layer.__class__ = prefix_reading_class
            layer.prefix_source = adapter_after_layer(layer_idx, len(layers), config.adapter_interval)

        self.post_init()

    @staticmethod
    def _check_config(config: TaLlavaConfig) -> None:
        """Raises `ValueError` for fields that do not fit to the parts of the model."""
        num_states = config.vision_config.num_hidden_layers + 1
        if not -num_states <= config.vision_feature_layer < num_states:
            raise ValueError(
                f"`vision_feature_layer` is {config.vision_feature_layer}, but the vision tower has {num_states} hidden "
                "states."
            )
        for token_id in (config.image_token_id, *config.response_marker_ids):
            if token_id >= config.text_config.vocab_size:
                raise ValueError(
                    f"`image_token_id` and `response_marker_ids` must be tokens of the language model, but {token_id} is "
                    f"not in its vocabulary of {config.text_config.vocab_size}."
                )

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
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
        outputs.pooler_output = list(self.multi_modal_projector(features))  # type: ignore[assignment]  # as in the library
        return outputs

    def get_vision_features(self, pixel_values: torch.Tensor, image_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        The features of images before the projector, which a frozen vision tower need compute only once. Stack them to
        `(B, I, M, vision width)` and pass them to `forward` as `vision_features`.

        The arguments are those of `get_image_features`.

        Returns:
            `torch.FloatTensor` of shape `(number of real images, M, vision width)`.
        """
        features = self._run_vision_tower(pixel_values, image_mask, features_only=True)[1]
        # The next replay of a CUDA graph would write over what the caller keeps.
        return features.clone() if is_compiled(self.vision_tower) else features

    @torch.no_grad()
    def encode_image(self, pixel_values: torch.Tensor, image_mask: torch.Tensor | None = None) -> TaLlavaEncodedImages:
        """
        Computes all that depends on the images alone: vision tower, projector, and the keys and values that the prefix
        reads. Pass the result to `forward` and `generate()` as `encoded_images`, as often as you have questions. This is
        for inference; for training with a frozen tower, see `get_vision_features`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(E, I, 3, H, W)`, or `(E, 3, H, W)` for one image a row):
                Normalised images as the processor writes them.
            image_mask (`torch.Tensor` of shape `(E, I)`, *optional*):
                1 for real images, 0 for filler. Defaults to all real.

        Returns:
            [`TaLlavaEncodedImages`], without gradients.

        Raises:
            `ValueError`: There is no image, images have a wrong shape, dtype or device, or a row has more images than
                there are index embeddings.
            `TypeError`: `pixel_values` is not a tensor.
        """
        if not isinstance(pixel_values, torch.Tensor):
            raise TypeError(
                f"`pixel_values` must be a tensor as the processor makes it, got a {type(pixel_values).__name__}."
            )
        pixel_values = pixel_values.unsqueeze(1) if pixel_values.dim() == 4 else pixel_values
        if pixel_values.dim() != 5:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}: expected (rows, images, 3, height, width)."
            )
        check_image_mask("pixel_values", pixel_values, image_mask)
        if image_mask is not None and not image_mask.any():
            raise ValueError(
                "`image_mask` is all 0: there is no image to encode. For text alone leave `encoded_images` out."
            )
        return self._encode_vision_features(self._vision_features_of_rows(pixel_values, image_mask), image_mask)[0]

    def _encode_vision_features(
        self, vision_features: torch.Tensor, image_mask: torch.Tensor | None
    ) -> tuple[TaLlavaEncodedImages, torch.Tensor]:
        """From features `(E, I, M, vision width)`: what the prefix reads, and the visual tokens V `(E, I, M, d)`."""
        dtype = self.prefix_embedding.weight.dtype
        visual_tokens = self.multi_modal_projector(vision_features.to(dtype)).to(dtype)  # autocast has its own
        if image_mask is None:
            image_mask = torch.ones(visual_tokens.shape[:2], dtype=torch.bool, device=visual_tokens.device)
        image_mask = image_mask.to(visual_tokens.device).bool()
        # CODEPATH: the paper's models have no index embeddings.
        if self.config.num_image_index_embeddings > 0:
            image_index = self._embed_image_index(image_mask).to(visual_tokens.device)
            visual_tokens = visual_tokens + image_index[:, :, None, :]
        source = visual_tokens.flatten(1, 2)
        positions = _count_from_0(image_mask.repeat_interleave(visual_tokens.shape[2], dim=1))
        rotary = self._rotary_embedding(source, positions)
        # Laid out once as they are multiplied, since they are read at several insertions.
        key, value = (states.contiguous() for states in self.vision_adapter("project", source, *rotary))
        return TaLlavaEncodedImages(key=key, value=value, image_mask=image_mask), visual_tokens

    def _embed_image_index(self, image_mask: torch.Tensor) -> torch.Tensor:
        """Learned embedding `(E, I, d)` of the index of each image in its row. Filler does not count."""
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

    def _run_vision_tower(
        self, pixel_values: torch.Tensor, image_mask: torch.Tensor | None, features_only: bool = False, **kwargs
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """
        Outputs of the vision tower for the real images, and the features that the config selects from them. With
        `features_only` the tower computes no more than these features.
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
        if torch.compiler.is_compiling() or is_compiled(self.vision_tower):
            self._install_hooks()
        layer = self.config.vision_feature_layer % (self.config.vision_config.num_hidden_layers + 1)
        kwargs["output_hidden_states"] = one_hidden_state(layer) if features_only else True
        if features_only and blocks_of(self.vision_tower):
            kwargs["num_blocks"] = layer
        compression = compression_of_call(self.config, self.vision_tower, pixel_values, layer)
        if compression is not None:
            kwargs["compression"] = compression
        outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        features = outputs.hidden_states[layer]
        # CODEPATH: a tower with a class token, such as CLIP, drops it here; SigLIP has none.
        if self.config.vision_feature_select_strategy == "default" and has_class_token(self.vision_tower):
            features = features[:, 1:]
        return outputs, features

    @can_return_tuple
    def forward(  # type: ignore[misc]  # the library lists `position_ids` among the keyword arguments too
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
        The forward pass without the head. For the arguments see [`TaLlavaForConditionalGeneration.forward`].

        Raises:
            `ValueError`: The number of placeholders or images is wrong, images have a wrong shape, dtype or device or come
                in several forms, or the sequence is longer than the context of the language model.
        """
        cache = cache_of_call(past_key_values, cache)
        images = ImageInputs(pixel_values, image_mask, vision_features, encoded_images)
        self._check_call(input_ids, inputs_embeds, images)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        visual_tokens = num_images = None
        if self._is_prefill(cache, not images.is_empty):
            # This waits for values, so it stands where a GPU has nothing to finish first.
            if not torch.compiler.is_compiling() and not self.training:
                num_images = images.count(inputs_embeds.shape[0])
            inputs_embeds, visual_tokens, prefix_reader = self._prepare_prefix(
                input_ids, inputs_embeds, images, attention_mask
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
            record_num_images(cache, num_images)
        return TaLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: cache},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=visual_tokens,
        )

    def _check_call(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, images: ImageInputs
    ) -> None:
        """Raises `ValueError` for arguments of `forward` that are mutually exclusive, and for reentrant checkpointing."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of `input_ids` or `inputs_embeds`.")
        if input_ids is not None and input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"`input_ids` must hold token ids of dtype torch.int64, got {input_ids.dtype}.")
        images.check_forms()
        layer = self.language_model.layers[0]
        checkpointing = getattr(layer, "_gradient_checkpointing_func", None) if layer.gradient_checkpointing else None
        if self.training and getattr(checkpointing, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "Gradient checkpointing cannot be reentrant here: several layers share the keys and values of the image. "
                'Pass `gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )

    @staticmethod
    def _is_prefill(cache: Cache | None, has_images: bool) -> bool:
        """Whether this call is the prefill, which has the prefix. In later calls the prefix is in the cache."""
        if cache is None:
            return True
        if torch.compiler.is_compiling():  # the length of a static cache is a tensor; generate() prefills with images
            return has_images
        return bool(cache.get_seq_length() == 0)

    def _prepare_prefix(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        images: ImageInputs,
        attention_mask: torch.Tensor | dict | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, PrefixReader | None]:
        """
        Steps 1 to 3 of Algorithm 1. Returns the embeddings with the prefix on the columns of the placeholders, the visual
        tokens, and the reader that the layers call. There is no reader for a batch of text only, unless it is trained on.
        """
        self._check_length(inputs_embeds.shape[1])
        # In training a batch without an image takes the same way as one with images, without effect: see `blank_image`.
        is_trained = self.training and torch.is_grad_enabled()
        has_room = inputs_embeds.shape[1] >= self.config.num_prefix_tokens
        if images.is_empty and not has_room and not is_trained:
            return inputs_embeds, None, None
        is_prefix, text_mask = self._find_prefix(input_ids, inputs_embeds, attention_mask)
        has_prefix = is_prefix.any(dim=-1)
        first_column = None
        if not is_tracing(is_prefix):  # a graph must not wait for values
            if (images.is_empty or images.are_all_filler()) and not has_prefix.any():
                if not is_trained:
                    return inputs_embeds, None, None
                images = ImageInputs()
            first_column = self._check_prefix(is_prefix, has_prefix, images)

        encoded_images, visual_tokens = self._encode_images(images, has_prefix, is_trained)
        columns, prefix = self._locate_prefix(inputs_embeds, is_prefix, has_prefix)
        instruction_mask = self._instruction_mask(text_mask, has_prefix, input_ids, inputs_embeds)
        visual_key_value = visual_mask = None
        if encoded_images is not None:
            encoded_images = encoded_images.to(inputs_embeds.device, inputs_embeds.dtype)
            visual_key_value, image_mask = (encoded_images.key, encoded_images.value), encoded_images.image_mask
            num_visual_tokens = encoded_images.key.shape[2] // image_mask.shape[1]
            visual_mask = image_mask.repeat_interleave(num_visual_tokens, dim=1)
        reader = PrefixReader(
            self.text_adapter,
            self.vision_adapter,
            columns=columns,
            first_column=first_column,
            has_prefix=has_prefix,
            instruction_mask=instruction_mask,
            instruction_rotary=self._rotary_embedding(inputs_embeds, _count_from_0(instruction_mask)),
            prefix_rotary=self._rotary_embedding(prefix, torch.arange(columns.shape[1], device=columns.device)[None]),
            visual_key_value=visual_key_value,
            visual_mask=visual_mask,
        )
        return replace_prefix(inputs_embeds, columns, prefix), visual_tokens, reader

    def _find_prefix(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which columns `(B, S)` hold the prefix, and which text. Padding is neither."""
        batch_size, sequence_length = inputs_embeds.shape[:2]
        tokens = non_padding_columns(attention_mask, batch_size, sequence_length, inputs_embeds.device)
        if tokens is None:
            tokens = torch.ones(batch_size, sequence_length, dtype=torch.bool, device=inputs_embeds.device)
        is_placeholder = self._columns_of_token(self.config.image_token_id, input_ids, inputs_embeds)
        # Later placeholders are ordinary tokens, in case the model generates one.
        is_prefix = is_placeholder & ((tokens & ~is_placeholder).cumsum(dim=-1) == 0)
        return is_prefix, tokens & ~is_prefix

    def _encode_images(
        self, images: ImageInputs, has_prefix: torch.Tensor, is_trained: bool
    ) -> tuple[TaLlavaEncodedImages | None, torch.Tensor | None]:
        """
        Step 1 of Algorithm 1, from the form in which the images are given: what the prefix reads of them, a row for each
        row of the text, and the visual tokens V `(B, I, M, d)`, if they are not encoded already.
        """
        batch_size = has_prefix.shape[0]
        if images.encoded_images is not None:
            return self._encoded_images_of_rows(images.encoded_images, has_prefix), None
        if images.pixel_values is not None:
            pixel_values = images.pixel_values
            pixel_values = pixel_values.unsqueeze(1) if pixel_values.dim() == 4 else pixel_values
            check_images("pixel_values", pixel_values, 5, images.image_mask, has_prefix)
            features = self._vision_features_of_rows(pixel_values, images.image_mask)
            return self._encode_vision_features(features, images.image_mask)
        if images.vision_features is not None:
            features, width = images.vision_features, self.config.vision_config.hidden_size
            check_images("vision_features", features, 4, images.image_mask, has_prefix)
            if features.shape[-1] != width:
                raise ValueError(
                    f"`vision_features` has width {features.shape[-1]}, the vision tower {width}. Make them with "
                    "`get_vision_features`."
                )
            return self._encode_vision_features(features, images.image_mask)
        if is_trained:
            features = self.get_vision_features(blank_image(self.config, self.vision_tower))[None]
            blank = self._encode_vision_features(features, features.new_zeros(1, 1))[0]  # its mask hides it
            return blank.expand(batch_size), None
        return None, None

    def _locate_prefix(
        self, inputs_embeds: torch.Tensor, is_prefix: torch.Tensor, has_prefix: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Step 2 of Algorithm 1: the columns `(B, L)` of the prefix, and Y `(B, L, d)`. For a row without a prefix these are
        its first columns and the embeddings already there, so that writing them changes nothing. L is smaller if the
        sequence is shorter.
        """
        start = is_prefix.int().argmax(dim=-1, keepdim=True)
        length = min(self.config.num_prefix_tokens, inputs_embeds.shape[1])
        columns = start + torch.arange(length, device=inputs_embeds.device)
        prefix = self._embed_prefix(inputs_embeds.device)[:, :length].to(inputs_embeds.device, inputs_embeds.dtype)
        current = inputs_embeds.gather(1, columns[:, :, None].expand(-1, -1, prefix.shape[-1]))
        return columns, torch.where(has_prefix[:, None, None], prefix, current)

    def _instruction_mask(
        self,
        text_mask: torch.Tensor,
        has_prefix: torch.Tensor,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
    ) -> torch.Tensor:
        """Step 3 of Algorithm 1: the instruction `(B, S)`, which is the text before the response."""
        sequence_length = text_mask.shape[1]
        markers = self._response_markers(input_ids, inputs_embeds)
        instruction_end = find_instruction_end(markers & text_mask, self.config.instruction_scope)
        no_marker = instruction_end == sequence_length
        if not is_tracing(no_marker) and (no_marker & has_prefix).any():
            self._warn_of_missing_marker()
        return text_mask & (torch.arange(sequence_length, device=text_mask.device) < instruction_end[:, None])

    def _response_markers(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Which columns hold each token of the response marker, `(marker length, B, S)`."""
        marker_ids = self.config.response_marker_ids
        return torch.stack([self._columns_of_token(token_id, input_ids, inputs_embeds) for token_id in marker_ids])

    def _warn_of_missing_marker(self) -> None:
        marker_ids = self.config.response_marker_ids
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

    def _warn_of_labelled_instruction(
        self,
        labels: torch.Tensor,
        kept: slice | torch.Tensor,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> None:
        """Warns if `labels`, of the `kept` columns, ask for what the prefix reads: the model need only copy it then."""
        is_placeholder = self._columns_of_token(self.config.image_token_id, input_ids, inputs_embeds)
        columns = torch.arange(is_placeholder.shape[1], device=is_placeholder.device)
        markers = self._response_markers(input_ids, inputs_embeds)
        instruction_end = find_instruction_end(markers, self.config.instruction_scope)[:, None]
        has_instruction = is_placeholder.any(dim=-1, keepdim=True) & (instruction_end < len(columns))
        in_instruction = has_instruction & ~is_placeholder & (columns + len(markers) <= instruction_end)
        if (in_instruction[:, kept].to(labels.device) & (labels != -100)).any():
            logger.warning_once(
                "The labels of a row with an image include its instruction, which the prefix has already read, so the model "
                "can simply copy it. Set them to -100 up to the response marker (`config.response_marker_ids` "
                f"{self.config.response_marker_ids}), as `ta-llava train` does. In TRL, give prompt and completion, and "
                "`completion_only_loss=True`."
            )

    def _embed_prefix(self, device: torch.device) -> torch.Tensor:
        """The learned prefix `(1, L, d)`, scaled as the language model scales its embeddings (Gemma: by sqrt(d))."""
        prefix = self.prefix_embedding(torch.arange(self.config.num_prefix_tokens, device=device))[None]
        scale = getattr(self.get_input_embeddings(), "embed_scale", None)
        return prefix if scale is None else prefix * torch.as_tensor(scale, device=prefix.device).to(prefix.dtype)

    def _rotary_embedding(self, states: torch.Tensor, position_ids: torch.Tensor) -> Rotary:
        """Rotary embedding inside an adapter, for tokens at `position_ids` `(B, length)`."""
        return signed_rotary(*self.language_model.rotary_emb(states, position_ids, **self.rotary_kwargs))

    def _vision_features_of_rows(self, pixel_values: torch.Tensor, image_mask: torch.Tensor | None) -> torch.Tensor:
        """Features of `pixel_values` `(B, I, 3, H, W)`: `(B, I, M, vision width)`, zeros for filler."""
        if image_mask is None or torch.compiler.is_compiling():  # a graph cannot know how many images are real
            return self.get_vision_features(pixel_values).unflatten(0, pixel_values.shape[:2])
        image_mask = image_mask.to(pixel_values.device).bool()
        real = self.get_vision_features(pixel_values, image_mask)
        features = real.new_zeros(*image_mask.shape, *real.shape[1:])
        return features.masked_scatter(image_mask[:, :, None, None].to(real.device), real)

    def _check_length(self, sequence_length: int) -> None:
        """Raises `ValueError` for a sequence that the language model has no positions for."""
        max_length = getattr(self.config.text_config, "max_position_embeddings", sequence_length)
        if sequence_length > max_length:
            raise ValueError(
                f"The sequence has {sequence_length} tokens, but the context of the language model holds {max_length} "
                "(`text_config.max_position_embeddings`). Shorten the prompt."
            )

    def _check_prefix(self, is_prefix: torch.Tensor, has_prefix: torch.Tensor, images: ImageInputs) -> int | None:
        """
        Raises `ValueError` unless every row begins with no placeholder or with exactly L consecutive ones. Returns the
        column where they begin if it is the same in all rows.
        """
        num_prefix_tokens, starts = self.config.num_prefix_tokens, set()
        for row, columns in enumerate(is_prefix.tolist()):
            count = sum(columns)
            starts.add(columns.index(True) if count > 0 else None)
            if count == 0 or (count == num_prefix_tokens and all(columns[columns.index(True) :][:count])):
                continue
            raise ValueError(
                f"Row {row} begins with {count} placeholder tokens (id {self.config.image_token_id}), but a row with images "
                f"needs {num_prefix_tokens} consecutive ones (`num_prefix_tokens`), however many images it has, and a row "
                "without images needs 0. Let the processor write them. If the row was truncated (`max_length`), allow more "
                "tokens."
            )
        if images.is_empty and has_prefix.any():  # not an error, since assistants are called like this
            logger.warning_once(
                "The text has placeholders for images, but no images (`pixel_values`, `vision_features` or "
                "`encoded_images`) were given, so the prefix reads only text."
            )
        return starts.pop() if len(starts) == 1 else None

    def _encoded_images_of_rows(
        self, encoded_images: TaLlavaEncodedImages, has_prefix: torch.Tensor
    ) -> TaLlavaEncodedImages:
        """`encoded_images` with a row for each row of the text, checked."""
        key = getattr(encoded_images, "key", None)
        if key is None:
            raise ValueError(
                f"`encoded_images` must be the result of `encode_image`, got {type(encoded_images).__name__}."
            )
        attention = self.vision_adapter.cross_attn
        num_heads, head_dim = attention.k_proj.out_features // attention.head_dim, attention.head_dim
        if (key.shape[1], key.shape[3]) != (num_heads, head_dim):
            raise ValueError(
                f"`encoded_images` has {key.shape[1]} key heads of width {key.shape[3]}, but this model has {num_heads} of "
                f"width {head_dim}. Make it with `encode_image` of the same model."
            )
        batch_size = has_prefix.shape[0]
        if key.shape[0] not in (1, batch_size):
            raise ValueError(
                f"`encoded_images` has {key.shape[0]} rows, but the text has {batch_size}. Give one row for all, or one for "
                "each. `repeat_interleave` repeats rows."
            )
        if key.shape[0] != batch_size:
            encoded_images = encoded_images.expand(batch_size)
        check_rows(encoded_images.image_mask.sum(dim=-1), has_prefix)
        return encoded_images


class TaLlavaForConditionalGeneration(TaLlavaPreTrainedModel, GenerationMixin):
    r"""
    TA-LLaVA with a language modelling head, for generation and training. One image or several stand before the text as
    `config.num_prefix_tokens` columns. In each prompt these columns read the question and then the images.

    Args:
        config ([`TaLlavaConfig`]):
            The parts and their settings. The model starts with new weights. `from_pretrained` loads trained ones and takes
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
        Answers prompts. It takes what the processor makes of a prompt (`**inputs`), the arguments of
        [`~transformers.GenerationMixin.generate`], such as `max_new_tokens`, `do_sample`, `num_beams` or `streamer`, and:

        Args:
            encoded_images ([`TaLlavaEncodedImages`], *optional*):
                Instead of `pixel_values` and `image_mask`: the result of `encode_image`, with B rows or one for all.
            vision_features (`torch.FloatTensor` of shape `(B, I, M, vision width)`, *optional*):
                Instead of `pixel_values`: the result of `get_vision_features`.

        Returns:
            `torch.LongTensor` of shape `(B, S + new tokens)`: the prompts and their answers. With
            `return_dict_in_generate=True`, an output that holds them and all else that you asked for.
        """
        return super().generate(inputs, generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        # The library passes images to the first forward only, but it knows just one of their arguments, `pixel_values`.
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in IMAGE_ARGUMENTS:
                kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args: Any, **kwargs: Any):
        # One row for all questions serves all beams too.
        key = getattr(kwargs.get("encoded_images"), "key", None)
        if key is not None and len(key) > 1:
            kwargs["encoded_images"] = kwargs["encoded_images"].repeat_interleave(expand_size)
        return super()._expand_inputs_for_generation(expand_size, *args, **kwargs)  # type: ignore[misc]  # by its `self`

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        self._check_whole_prefill(input_ids, generation_config, "the prefix must see the whole instruction")
        cache = model_kwargs.get(CACHE)
        if cache is not None and is_first_iteration:
            num_images = ImageInputs.of(model_kwargs).count(input_ids.shape[0])
            past_length = int(cache.get_seq_length())
            if past_length == 0:
                record_num_images(cache, num_images)  # here too, since a compiled forward cannot
            else:
                new_ids = input_ids[:, past_length:] if input_ids.shape[1] > past_length else input_ids
                self._check_next_turn(new_ids, num_images, recorded_num_images(cache))
                # Even a compiled forward, which does not see that the prefix is in the cache, now needs no image.
                model_kwargs = {name: value for name, value in model_kwargs.items() if name not in IMAGE_ARGUMENTS}
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _check_next_turn(
        self, new_ids: torch.Tensor, num_images: list[int], num_past_images: list[int] | None
    ) -> None:
        """
        Checks what follows a cache.

        Args:
            new_ids (`torch.LongTensor` of shape `(B, S)`): The new columns.
            num_images (`list[int]`): Images of each row that are given now.
            num_past_images (`list[int]`, *optional*): Images of each row that the prefix in the cache has read, if known.

        Raises:
            `ValueError`: There are new images, or a second prefix.
        """
        if any(num_images) and num_past_images is not None:
            # Its rows may have been repeated or selected, as for beams.
            same_rows = len(num_images) == len(num_past_images)
            known = num_images == num_past_images if same_rows else set(num_images) <= set(num_past_images)
            if not known:
                raise ValueError(
                    f"The prompts have {num_images} images now, those in `past_key_values` {num_past_images}. The prefix "
                    "reads images before all text. Begin with an empty cache for new images, or leave out those from "
                    "before."
                )
        num_placeholders = int(self._columns_of_token(self.config.image_token_id, new_ids, None).sum(dim=1).max())
        if num_placeholders >= self.config.num_prefix_tokens:
            raise ValueError(
                f"What follows `past_key_values` has {num_placeholders} placeholder tokens (id "
                f"{self.config.image_token_id}) in a row, as a prompt with images begins with. The prefix reads images "
                "before all text. Begin with an empty cache for new images. Otherwise leave images and placeholders out, or "
                "give the whole conversation."
            )
        if num_past_images is None or any(num_past_images):
            self._warn_of_unread_question(new_ids)

    def _warn_of_unread_question(self, new_ids: torch.Tensor) -> None:
        """Warns if the prefix in the cache has not read the last question of `new_ids`, but should have."""
        # CODEPATH: with "first", as in the paper, the prefix has read all that it reads in the first turn.
        if self.config.instruction_scope == "first":
            return
        markers = self.model._response_markers(new_ids, None)
        if (find_instruction_end(markers, "last") < new_ids.shape[1]).any():
            logger.warning_once(
                'With `instruction_scope="last"` the prefix reads every new question, but the one in `past_key_values` has '
                "read only the earlier questions. The answer differs from that to the same prompt with an empty cache. "
                'Begin with an empty cache in each turn, or set `model.config.instruction_scope = "first"`.'
            )

    def _assisted_decoding(self, input_ids, *args, **kwargs):
        cache = kwargs.get(CACHE)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "Assisted and prompt-lookup decoding cannot continue from a filled `past_key_values`, because the library "
                "would read the whole prompt into it once more. Leave out `past_key_values` or the assistant."
            )
        return super()._assisted_decoding(input_ids, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: continuous batching packs requests into one row, but every prefix must read its own request only."""
        raise ValueError(
            f"{type(self).__name__} does not support continuous batching, which packs several requests into one row. Use "
            "`generate()` with a padded batch."
        )

    def get_image_features(
        self, pixel_values: torch.Tensor, image_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`TaLlavaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_mask, **kwargs)

    def get_vision_features(self, pixel_values: torch.Tensor, image_mask: torch.Tensor | None = None) -> torch.Tensor:
        """See [`TaLlavaModel.get_vision_features`]."""
        return self.model.get_vision_features(pixel_values, image_mask)

    def encode_image(self, pixel_values: torch.Tensor, image_mask: torch.Tensor | None = None) -> TaLlavaEncodedImages:
        """
        Computes all that depends on the images alone, so that you can ask many questions about them.

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
    def forward(  # type: ignore[misc]  # the library lists `position_ids` among the keyword arguments too
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
                Token ids. Rows with images begin, after any padding, with `num_prefix_tokens` placeholders.
            pixel_values (`torch.FloatTensor` of shape `(B, I, 3, H, W)`, or `(B, 3, H, W)` for one image a row):
                Normalised images. They are ignored when the cache already holds the prefix.
            image_mask (`torch.Tensor` of shape `(B, I)`, *optional*):
                1 for real images, 0 for filler. Defaults to all real.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*):
                1 for tokens, 0 for padding. The masks that `generate()` prepares work too.
            position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*):
                Position of each token in its row.
            past_key_values, cache (`Cache`, *optional*):
                Two names for the columns before `input_ids`. The library uses the second since 5.24.
            inputs_embeds (`torch.FloatTensor` of shape `(B, S, d)`, *optional*):
                Instead of `input_ids`. Placeholders and response marker are then found by the embeddings of their tokens.
            vision_features (`torch.FloatTensor` of shape `(B, I, M, vision width)`, *optional*):
                Instead of `pixel_values`: the result of `get_vision_features`. With them, you can train the projector.
            encoded_images ([`TaLlavaEncodedImages`], *optional*):
                Instead of `pixel_values` and `image_mask`: the result of `encode_image`, with B rows or one for all.
            labels (`torch.LongTensor` of shape `(B, S)`, *optional*):
                Token ids to predict, aligned with `input_ids`. -100 takes no loss (instruction, padding), nor do the
                placeholders in a copy of `input_ids`.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Number of last columns to compute logits for, 0 for all; or the indices of columns.
            mm_token_type_ids (`torch.LongTensor` of shape `(B, S)`, *optional*):
                Ignored, since `input_ids` tell where the prefix is. Processors make it on request.

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
        logits = self._predict(outputs.last_hidden_state, logits_to_keep)

        loss = None
        if labels is not None:
            if self.training and not is_tracing(labels):
                self.model._warn_of_labelled_instruction(
                    labels, kept_columns(logits_to_keep), input_ids, inputs_embeds
                )
            is_placeholder = labels == self.config.image_token_id
            # The Trainer has counted the labels before (`num_items_in_batch`), also those that are left out here.
            if self.training and not is_tracing(labels) and is_placeholder.any():
                logger.warning_once(
                    "`labels` include placeholders of images. The loss leaves them out, but the Trainer counts them, which "
                    "makes it too small. Set them to -100: `labels[labels == model.config.image_token_id] = -100`."
                )
            labels = labels.masked_fill(is_placeholder, -100)
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
