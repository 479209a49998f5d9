"""
TA-LLaVA as a model of vLLM. Where the steps of `modeling_ta_llava.py` are:

1. vLLM's encoder (`embed_multimodal`) runs `TaLlavaModel.encode_image`, once for each image. Its cache holds the result: the
   prefix Y, with the keys and values of the image packed behind it (`pack`).
2. `embed_input_ids` puts Y on the columns of the placeholders and keeps the packed rows for the forward pass that follows.
3. `forward` finds the prompts of the step, and makes a `PrefixReader` for prompts of about the same length.
4. The language model is vLLM's own. Its layers call the operator `ta_llava_read_prefix`, which lets the readers of the step
   read. vLLM splits compiled graphs at this operator. A step without a prompt is the plain language model.

The tower, the projector, the prefix and the adapters are those of the package. With tensor parallel each process has all of
them: the states between two layers are complete in every process, so all compute the same prefix.

Conventions of this file: those of `modeling_ta_llava.py`. T: tokens of a step, which are those of its requests in a row.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature
from transformers.conversion_mapping import WeightRenaming, get_model_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    _merge_multimodal_embeddings,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, PlaceholderRange
from vllm.multimodal.parse import ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptIndexTargets,
    PromptInsertion,
)
from vllm.utils.torch_utils import direct_register_custom_op

from ..image_inputs import TaLlavaEncodedImages
from ..modeling_ta_llava import TaLlavaModel, find_instruction_end
from ..prefix_adapters import PrefixReader, adapter_after_layer
from ..processing_ta_llava import TaLlavaProcessor
from .config_hooks import check_whole_prompts, split_graphs
from .media import RgbImageParser
from .suppressed_tokens import suppress, suppressed_tokens


# --- prompts and images --------------------------------------------------------------------------------------------


class ImagesOfPrompt(ProcessorBatchItems):
    """
    All images of a prompt as one item, because they share its prefix. Its length is the number of images, which vLLM
    compares to its limit and to the number of UUIDs.
    """

    def __init__(self, images: Sequence[Any]):
        super().__init__([list(images)], "image")

    def __len__(self) -> int:
        return len(self.data[0])

    def get(self, index: int) -> list[Any]:
        return [self._unwrap(image) for image in self.data[index]]


class TaLlavaDataParser(RgbImageParser):
    def _parse_image_data(self, data: Any) -> Any:
        if isinstance(data, (list, tuple)) and len(data) == 1 and isinstance(data[0], list):
            return ImagesOfPrompt(data[0])  # an item that comes back
        items = super()._parse_image_data(data)
        if not isinstance(items, ProcessorBatchItems):
            raise ValueError("TA-LLaVA takes images, not embeddings of images. Its prefix reads them by an adapter.")
        return ImagesOfPrompt(items.data)


class TaLlavaProcessingInfo(BaseProcessingInfo):
    def get_hf_processor(self, **kwargs: object) -> Any:
        return self.ctx.get_hf_processor(TaLlavaProcessor, **kwargs)

    def get_data_parser(self) -> TaLlavaDataParser:
        return TaLlavaDataParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_hf_config().num_prefix_tokens}


class TaLlavaDummyInputsBuilder(BaseDummyInputsBuilder[TaLlavaProcessingInfo]):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        size = self.info.get_hf_config().vision_config.image_size
        count = mm_counts.get("image", 0)
        return {
            "image": self._get_dummy_images(
                width=size, height=size, num_images=count, overrides=mm_options.get("image")
            )
        }

    def get_dummy_processor_inputs(self, *args: Any, **kwargs: Any) -> Any:  # vLLM 0.30 asks here
        return with_marker(super().get_dummy_processor_inputs(*args, **kwargs), self.info)


def with_marker(inputs: Any, info: TaLlavaProcessingInfo) -> Any:
    """The images from which vLLM measures its memory, with an empty instruction."""
    return replace(inputs, prompt=list(info.get_hf_config().response_marker_ids))


class TaLlavaMultiModalProcessor(BaseMultiModalProcessor[TaLlavaProcessingInfo]):
    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        return with_marker(super().get_dummy_inputs(*args, **kwargs), self.info)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        """
        The tokens of a prompt with images. Placeholders in it, as the processor writes them, are taken out, because vLLM
        inserts them.

        Raises:
            `ValueError`: It has no response marker, so nobody can tell where the instruction ends.
        """
        config = self.info.get_hf_config()
        ids = [token for token in prompt if token != config.image_token_id]
        if end_of_instruction(torch.tensor(ids), config) == len(ids):
            raise ValueError(
                "A prompt with images has no response marker "
                f"(`config.response_marker_ids` {list(config.response_marker_ids)}), as chats have it. On vLLM the prefix "
                "needs it to know its instruction. Use the chat template (`/v1/chat/completions`, `LLM.chat`), and raise "
                "`truncate_prompt_tokens` if it cuts the marker off."
            )
        return ids

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        config = self.info.get_hf_config()
        placeholders = [config.image_token_id] * config.num_prefix_tokens
        return [PromptInsertion(modality="image", target=PromptIndexTargets.start(), insertion=placeholders)]

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """
        The inputs of vLLM, where the item of the images reaches to the end of the instruction. vLLM never splits or
        truncates an item.
        """
        uuids = (inputs.mm_uuid_items or {}).get("image")
        if uuids:  # one for each image
            uuid = None if None in uuids else json.dumps(uuids)  # `"a+b"` is not `"a", "b"`
            inputs = replace(inputs, mm_uuid_items={**inputs.mm_uuid_items, "image": [uuid]})
        mm_inputs = super().apply(inputs, timing_ctx)
        length = end_of_instruction(torch.tensor(mm_inputs["prompt_token_ids"]), self.info.get_hf_config()) + 1
        is_prefix = torch.arange(length) < self.info.get_hf_config().num_prefix_tokens
        ranges = [PlaceholderRange(offset=0, length=length, is_embed=is_prefix)]
        return {**mm_inputs, "mm_placeholders": {"image": ranges}}


# --- what the prefix reads -----------------------------------------------------------------------------------------


def end_of_instruction(ids: torch.Tensor, config: Any) -> int:
    """The column before which the instruction of a prompt `(S,)` ends; S if it has no response marker."""
    markers = torch.stack([ids == token for token in config.response_marker_ids])
    return int(find_instruction_end(markers[:, None], config.instruction_scope)[0])


def pack(images: TaLlavaEncodedImages, prefix: torch.Tensor) -> list[torch.Tensor]:
    """
    The rows `(L, d + width)` that vLLM keeps for each item of E: the prefix `(L, d)`, and behind it the keys and values of
    the images, spread over the L rows. Each visual token has 1 before its keys and values; rows are filled up with zeros.
    """
    # (E, I * M, heads * 2 * head_dim)
    key_value = torch.cat([images.key, images.value], dim=-1).transpose(1, 2).flatten(2)
    tokens = nn.functional.pad(key_value, (1, 0), value=1.0)
    per_row = math.ceil(tokens.shape[1] / len(prefix))
    tokens = nn.functional.pad(tokens, (0, 0, 0, per_row * len(prefix) - tokens.shape[1]))
    rows = tokens.unflatten(1, (len(prefix), per_row)).flatten(2)
    return list(torch.cat([prefix.expand(len(rows), -1, -1), rows], dim=-1))


def unpack(rows: torch.Tensor, head_dim: int, num_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values `(E, heads, tokens, head_dim)` and which tokens there are `(E, tokens)`, of rows `(E, L, width)`."""
    tokens = rows.flatten(1).unflatten(1, (-1, 1 + num_heads * 2 * head_dim))
    key, value = tokens[:, :, 1:].unflatten(2, (num_heads, 2 * head_dim)).transpose(1, 2).chunk(2, dim=-1)
    return key, value, tokens[:, :, 0] > 0.5


class PrefixParts(TaLlavaModel):
    """The parts of a TA-LLaVA that vLLM does not have: everything but the layers and the table of its language model."""

    def __init__(self, config: Any):
        TaLlavaModel._check_config(config)
        config = deepcopy(config)
        text_config = config.text_config
        text_config.num_hidden_layers, text_config.vocab_size, text_config.pad_token_id = 1, 1, None
        if getattr(text_config, "layer_types", None):
            text_config.layer_types = text_config.layer_types[:1]
        super().__init__(config)
        self.language_model.layers = nn.ModuleList()
        self.language_model.norm = nn.Identity()
        self.scale = getattr(self.get_input_embeddings(), "embed_scale", None)
        self.language_model.embed_tokens = nn.Identity()

    @staticmethod
    def _check_config(config: Any) -> None:
        """Done with the whole vocabulary before."""

    def prefix(self) -> torch.Tensor:
        """Y before the first layer, `(L, d)`."""
        prefix = self.prefix_embedding.weight
        return prefix if self.scale is None else prefix * torch.as_tensor(self.scale).to(prefix)

    def load_weights(self, weights: Any) -> set[str]:
        """Some towers have other names in checkpoints than in the library."""
        renaming = [each for each in get_model_conversion_mapping(self) if isinstance(each, WeightRenaming)]
        return AutoWeightsLoader(self).load_weights(weights, mapper=WeightsMapper(orig_to_new_renaming=renaming))

    def reader(self, instruction_mask: torch.Tensor, image_rows: torch.Tensor) -> PrefixReader:
        """
        The reader of B prompts that begin with their prefix.

        Args:
            instruction_mask (`torch.BoolTensor` of shape `(B, S)`): Their instructions.
            image_rows (`torch.FloatTensor` of shape `(B, L, width)`): What was packed behind their prefixes.
        """
        attention = self.vision_adapter.cross_attn
        num_heads = attention.k_proj.out_features // attention.head_dim
        key, value, visual_mask = unpack(image_rows, attention.head_dim, num_heads)
        columns = torch.arange(self.config.num_prefix_tokens, device=instruction_mask.device)[None]
        positions = (instruction_mask.cumsum(dim=-1) - 1).clamp(min=0)
        return PrefixReader(
            self.text_adapter,
            self.vision_adapter,
            columns=columns.expand(len(instruction_mask), -1),
            first_column=0,
            has_prefix=torch.ones(len(instruction_mask), dtype=torch.bool, device=instruction_mask.device),
            instruction_mask=instruction_mask,
            instruction_rotary=self._rotary_embedding(image_rows, positions),
            prefix_rotary=self._rotary_embedding(image_rows, columns),
            visual_key_value=(key, value),
            visual_mask=visual_mask,
        )


# --- the language model --------------------------------------------------------------------------------------------


OPERATOR = "ta_llava_read_prefix"


def read_prefix(hidden_states: torch.Tensor, residual: torch.Tensor, source: str, model_name: str) -> None:
    """
    Lets the prefixes of a step read from `source`, in place. The state of a token is `hidden_states` `(T, d)` plus
    `residual` `(T, d)`, since the layers of vLLM leave the last addition to the next norm.
    """
    model = get_forward_context().no_compile_layers[model_name]
    for rows, reader in model.readers:
        prefix_rows = rows[:, : model.config.num_prefix_tokens]
        needed = rows if source == "text" else prefix_rows
        prefix = reader(hidden_states[needed] + residual[needed], source)[:, : prefix_rows.shape[1]]
        residual[prefix_rows] = prefix
        hidden_states[prefix_rows] = 0


def read_prefix_fake(hidden_states: torch.Tensor, residual: torch.Tensor, source: str, model_name: str) -> None:
    return


direct_register_custom_op(
    OPERATOR, read_prefix, mutates_args=["hidden_states", "residual"], fake_impl=read_prefix_fake
)


@cache
def prefix_reading_layer_class(layer_class: Any) -> type[nn.Module]:
    """Subclass of a decoder layer of vLLM after which the prefixes of the step read."""

    class PrefixReadingLayer(layer_class):
        prefix_source: str
        model_name: str

        def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            hidden_states, residual = super().forward(*args, **kwargs)
            torch.ops.vllm.ta_llava_read_prefix(hidden_states, residual, self.prefix_source, self.model_name)
            return hidden_states, residual

    return PrefixReadingLayer


@MULTIMODAL_REGISTRY.register_processor(
    TaLlavaMultiModalProcessor, info=TaLlavaProcessingInfo, dummy_inputs=TaLlavaDummyInputsBuilder
)
class VllmTaLlava(nn.Module, SupportsMultiModal):
    requires_raw_input_tokens = True  # they tell where prefixes and response markers are
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return "<image>"

    def __init__(self: Any, *, vllm_config: Any, prefix: str = ""):
        super().__init__()
        check_whole_prompts(vllm_config)
        split_graphs(vllm_config, f"vllm::{OPERATOR}")
        self.config = config = vllm_config.model_config.hf_config
        self.register_buffer("suppressed", suppressed_tokens(vllm_config.model_config), persistent=False)
        self.configure_mm_token_handling(config.text_config.vocab_size, [config.image_token_id])
        with self._mark_tower_model(vllm_config, "image"):
            self.model = PrefixParts(config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.text_config.model_type]],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

        name = maybe_prefix(prefix, "ta_llava")
        vllm_config.compilation_config.static_forward_context[name] = self
        layers = self.language_model.model.layers
        for index, layer in enumerate(layers):
            source = adapter_after_layer(index, len(layers), config.adapter_interval)
            if source is not None:
                layer_class: Any = type(layer)
                layer.__class__ = prefix_reading_layer_class(layer_class)
                layer.prefix_source, layer.model_name = source, name

        speculative = vllm_config.speculative_config
        self.longest_decode = 1 + (speculative.num_speculative_tokens if speculative else 0)
        # Of the next forward: which tokens are of a prefix, and what was packed behind each prefix.
        self.is_prefix: torch.Tensor | None = None
        self.image_rows: list[torch.Tensor] = []
        # Of the current forward: the rows of prompts among the tokens, and what their prefixes read.
        self.readers: list[tuple[torch.Tensor, PrefixReader]] = []

    def embed_multimodal(self, **kwargs: Any) -> Sequence[torch.Tensor]:
        """Rows `(L, d + width)` for the images `(I, 3, H, W)` of each prompt, see `pack`."""
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:
            return []
        prefix = self.model.prefix()
        # A list has prompts with different numbers of images.
        batches = [pixel_values] if isinstance(pixel_values, torch.Tensor) else [one[None] for one in pixel_values]
        return [rows for batch in batches for rows in pack(self.model.encode_image(batch), prefix)]

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        embeddings = self.language_model.embed_input_ids(input_ids)
        rows = list(multimodal_embeddings or ())
        width = embeddings.shape[-1]
        self.is_prefix, self.image_rows = is_multimodal, [each[:, width:] for each in rows]
        if not rows:
            return embeddings
        prefixes = [each[:, :width] for each in rows]
        return _merge_multimodal_embeddings(embeddings, prefixes, is_multimodal)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        self.readers = self._make_readers(input_ids, positions)
        try:
            if inputs_embeds is None:
                inputs_embeds = self.language_model.embed_input_ids(input_ids)
            return self.language_model.model(None, positions, None, inputs_embeds=inputs_embeds)
        finally:
            self.is_prefix, self.image_rows, self.readers = None, [], []

    def _make_readers(
        self, input_ids: torch.Tensor, positions: torch.Tensor
    ) -> list[tuple[torch.Tensor, PrefixReader]]:
        """The readers of a step, with the rows `(B, S)` of their prompts among its tokens."""
        groups: dict[Any, list[Any]] = defaultdict(list)
        for (start, length), image_rows in zip(self._find_instructions(input_ids, positions), self.image_rows):
            # Of about the same length, so that at most half of a group is padding.
            groups[length.bit_length(), image_rows.shape].append((start, length, image_rows))
        readers = []
        for group in groups.values():
            starts, lengths, rows_of_images = zip(*group)
            columns = torch.arange(max(lengths), device=input_ids.device)
            rows = torch.tensor(starts, device=input_ids.device)[:, None] + columns
            is_read = columns < torch.tensor(lengths, device=input_ids.device)[:, None]
            is_read &= columns >= self.config.num_prefix_tokens
            reader = self.model.reader(is_read, torch.stack(list(rows_of_images)))
            readers.append((rows.clamp(max=len(input_ids) - 1), reader))
        return readers

    def _find_instructions(self, input_ids: torch.Tensor, positions: torch.Tensor) -> list[tuple[int, int]]:
        """
        First token and length of the prefix and the instruction of each prompt with images that begins in this step.

        Raises:
            `RuntimeError`: A part of a prompt has arrived without the rest.
        """
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures its memory, or captures graphs
            return []
        metadata = next(iter(metadata.values()))
        if not hasattr(metadata, "query_start_loc"):
            raise RuntimeError(
                f"The attention backend does not say where prompts begin ({type(metadata).__name__} has no "
                "`query_start_loc`). Choose another: `--attention-backend FLASH_ATTN` or `TRITON_ATTN`."
            )
        if not self.image_rows and metadata.max_query_len <= self.longest_decode:
            return []  # a decode step must not wait for values
        bounds, first_positions, ids = metadata.query_start_loc.tolist(), positions.tolist(), input_ids.cpu()
        is_prefix = torch.zeros(len(ids), dtype=torch.bool) if self.is_prefix is None else self.is_prefix.cpu()
        instructions = []
        for start, end in pairwise(bounds):
            if start == end:  # padding
                continue
            num_columns, position = int(is_prefix[start:end].sum()), first_positions[start]
            if num_columns == 0 and (position == 0 or end - start <= self.longest_decode):  # text only, or decoding
                continue
            length = end_of_instruction(ids[start:end], self.config)
            if position > 0 or num_columns != self.config.num_prefix_tokens or length == end - start:
                raise RuntimeError(
                    f"A part of a prompt has arrived: {end - start} tokens from position {position}, {num_columns} of them "
                    "of the prefix. The prefix must see its whole prompt in one step. Leave `enable_chunked_prefill` and "
                    "`enable_prefix_caching` off."
                )
            instructions.append((start, length))
        return instructions

    def compute_logits(self: Any, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return suppress(self.language_model.compute_logits(hidden_states), self.suppressed)

    def load_weights(self, weights: Any) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
