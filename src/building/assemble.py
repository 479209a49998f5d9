"""Builds new models from a pretrained vision tower and a pretrained language model."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, LlavaConfig

from ..common.errors import why_refused
from ..common.files import atomic_folder
from ..configuration_ta_llava import TaLlavaConfig
from ..modeling_ta_llava import TaLlavaForConditionalGeneration
from ..processing_ta_llava import TaLlavaProcessor
from ..vmtc import count_visual_tokens
from ..vmtc_cmai_patch import VmtcCmaiLlavaConfig, VmtcCmaiLlavaForConditionalGeneration, VmtcCmaiLlavaProcessor
from .parts import IMAGE_TOKEN, VIDEO_TOKEN, Parts, read_parts


# Fields of a generation config that say how to sample. One that does not sample cannot be saved with them.
_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

# Conversations in which a response marker must be found, with words in them that look like one.
_QUESTIONS = ("What is in the image?", "Is the model an assistant, the ASSISTANT a model", "Compare the two.", "a")


def assemble_ta_llava(
    out: str | Path,
    vision_tower: str | Path,
    language_model: str | Path,
    *,
    gguf_file: str | None = None,
    chat_template: str | None = None,
    num_prefix_tokens: int = 32,
    adapter_interval: int = 4,
    projector_type: str = "linear",
    seed: int = 0,
) -> list[str]:
    """
    Writes a new TA-LLaVA, ready for training. The weights of the vision tower and the language model are kept to the bit;
    the projector, the prefix and two adapters have learned nothing yet. The folder loads anywhere with
    `trust_remote_code=True`, and appears when it is complete. If both parts are folders, the Hub is not asked.

    Placeholder: `<image>`, if the tokenizer has it, or if the embedding table has a row to spare. Otherwise an unused token
    (`UNUSED_TOKENS`). As the last choice, table and head grow by a row, as they do for a padding token without one. A new
    row is the mean of the old ones. Its logit is then the mean of theirs, so that it is at most as likely as a token drawn
    at random. `generate()` never writes the placeholder (`suppress_tokens` of the generation config).

    Dtype: each part is saved in its own dtype. New weights and the config have that of the language model. So
    `from_pretrained` loads a tower of another dtype in that of the language model, unless you pass a `dtype`.

    Args:
        out (`str` or `Path`):
            New folder.
        vision_tower (`str` or `Path`):
            Folder or Hub repo of a CLIP or SigLIP, whole or its vision side alone, or of a DINOv2, with image processor.
        language_model (`str` or `Path`):
            Folder or Hub repo of a causal language model (`LANGUAGE_MODELS`), with tokenizer.
        gguf_file (`str`, *optional*):
            Name of a GGUF file in `language_model`, to read instead of safetensors. Its weights are de-quantised.
        chat_template (`str`, *optional*):
            Jinja template for conversations of text, from one of `chat_templates.FAMILIES`. Defaults to the tokenizer's. A
            Llama with 32000 tokens and no template gets Vicuna's. The saved template takes images, and renders
            conversations of text as this one does.
        num_prefix_tokens, adapter_interval, projector_type:
            Fields of [`TaLlavaConfig`].
        seed (`int`):
            The same seed gives the same new weights.

    Returns:
        `list[str]`: What was decided about placeholder, padding, turns and dtypes, one sentence each.

    Raises:
        `ValueError`: `out` is not new; a part cannot be loaded, or has another kind; the template belongs to no known
            family; or the settings are not possible.
    """
    if isinstance(num_prefix_tokens, int) and num_prefix_tokens < 1:
        raise ValueError(f"`num_prefix_tokens` must be at least 1, got {num_prefix_tokens}.")
    if projector_type not in ("linear", "mlp"):
        raise ValueError(f"`projector_type` must be 'linear' or 'mlp', got {projector_type!r}.")
    parts = read_parts(out, vision_tower, language_model, gguf_file, chat_template)
    _check_depth(language_model, parts.text_config.num_hidden_layers, adapter_interval)
    processor = TaLlavaProcessor(
        parts.image_processor,
        parts.tokenizer,
        num_prefix_tokens=num_prefix_tokens,
        image_token_id=parts.image_token_id,
        chat_template=parts.chat_template_for(IMAGE_TOKEN, VIDEO_TOKEN),
    )
    marker = parts.turns.opening.strip()
    marker_ids = find_response_marker(processor, marker)
    parts.notes.append(f"The response marker {marker!r} has the ids {marker_ids}.")
    config = _build_config(
        TaLlavaConfig,
        vision_config=parts.vision_config,
        text_config=parts.text_config,
        num_prefix_tokens=num_prefix_tokens,
        adapter_interval=adapter_interval,
        vision_feature_select_strategy=parts.select_strategy,
        projector_type=projector_type,
        image_token_id=parts.image_token_id,
        response_marker_ids=marker_ids,
    )
    return _write_model(out, parts, TaLlavaForConditionalGeneration, config, processor, seed)


def _check_depth(language_model: str | Path, num_layers: int, adapter_interval: int) -> None:
    """Raises `ValueError` if a language model has too few layers for the prefix and its adapters."""
    if num_layers < 3:
        raise ValueError(
            f"{language_model} has {num_layers} layers, but the prefix reads the image after the second one and needs "
            "a third to pass on what it read."
        )
    if not 2 <= adapter_interval <= num_layers:
        raise ValueError(
            f"`adapter_interval` is {adapter_interval}, but {language_model} has {num_layers} layers. Choose from 2 to "
            f"{num_layers}."
        )


def assemble_llava(
    out: str | Path,
    vision_tower: str | Path,
    language_model: str | Path,
    *,
    gguf_file: str | None = None,
    chat_template: str | None = None,
    seed: int = 0,
    **vmtc_cmai_fields: Any,
) -> list[str]:
    """
    Writes a new LLaVA, ready for training. The weights of the vision tower and the language model are kept; the projector
    has two layers that have learned nothing yet. VMTC and CMAI are set by `vmtc_cmai_fields`.

    Args:
        out, vision_tower, language_model, gguf_file, chat_template, seed:
            As for `assemble_ta_llava`, which also describes placeholder and dtype. If an unused token is the placeholder,
            its name stands for an image in prompts too (`processor.image_token`).
        vmtc_cmai_fields:
            Fields of [`VmtcCmaiLlavaConfig`] that a LLaVA does not have, such as `use_vmtc`. By default both are off.

    Returns:
        `list[str]`: What was decided, as from `assemble_ta_llava`.

    Raises:
        `ValueError`: As from `assemble_ta_llava`; a field is not known, or its value is not possible.
    """
    known = {field.name for field in fields(VmtcCmaiLlavaConfig)} - {field.name for field in fields(LlavaConfig)}
    if unknown := sorted(vmtc_cmai_fields.keys() - known):
        raise ValueError(
            f"There are no fields {', '.join(unknown)}. Those of VMTC and CMAI are {', '.join(sorted(known))}."
        )
    parts = read_parts(out, vision_tower, language_model, gguf_file, chat_template)
    config = _build_config(
        VmtcCmaiLlavaConfig,
        vision_config=parts.vision_config,
        text_config=parts.text_config,
        vision_feature_select_strategy=parts.select_strategy,
        image_token_index=parts.image_token_id,
        **vmtc_cmai_fields,
    )
    config.image_seq_length = count_visual_tokens(config, parts.num_patches)
    processor = VmtcCmaiLlavaProcessor(
        parts.image_processor,
        parts.tokenizer,
        patch_size=parts.vision_config.patch_size,
        vision_feature_select_strategy=parts.select_strategy,
        chat_template=parts.chat_template_for(parts.image_token),
        image_token=parts.image_token,
        num_additional_image_tokens=int(parts.select_strategy == "default"),  # the model drops it again
        use_vmtc=config.use_vmtc,
        vmtc_num_visual_tokens=config.vmtc_num_visual_tokens,
        vmtc_keep_ratio=config.vmtc_keep_ratio,
        spd_factor=config.spd_factor,
    )
    return _write_model(out, parts, VmtcCmaiLlavaForConditionalGeneration, config, processor, seed)


# --- the response marker -------------------------------------------------------------------------------------------


def find_response_marker(processor: TaLlavaProcessor, marker: str) -> list[int]:
    """
    Finds the token ids of a response marker inside a conversation. They may differ from those of the marker alone.

    Args:
        processor ([`TaLlavaProcessor`]): Its chat template must write the marker.
        marker (`str`): A text such as `"<start_of_turn>model"`.

    Raises:
        `ValueError`: The marker shares a token with other text, or the same tokens stand elsewhere too.
    """
    found = set()
    for question in _QUESTIONS:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "An answer."}]
        for messages in (turns[:1], turns + turns[:1]):
            text = processor.apply_chat_template(messages, add_generation_prompt=True)
            found.add(_marker_ids(processor, marker, str(text), count=(len(messages) + 1) // 2))
    if len(found) != 1:
        raise ValueError(
            f"The response marker {marker!r} is tokenised in {len(found)} ways, {sorted(map(list, found))}, depending on "
            "what stands before it. Pass a `chat_template` with a line break before the marker."
        )
    return list(found.pop())


def _marker_ids(processor: TaLlavaProcessor, marker: str, text: str, count: int) -> tuple[int, ...]:
    """Ids of the last marker in a text that has `count` of them."""
    encoded = processor(text=text, text_kwargs={"return_offsets_mapping": True})
    start = text.rindex(marker)
    end = start + len(marker)
    row = encoded["input_ids"][0]
    tokens = [
        (token, first, last)
        for token, (first, last) in zip(row, encoded["offset_mapping"][0])
        if first < end and last > start
    ]
    ids = tuple(token for token, _, _ in tokens)
    outside = text[min(tokens[0][1], start) : start] + text[end : max(tokens[-1][2], end)]
    num_found = sum(tuple(row[i : i + len(ids)]) == ids for i in range(len(row)))
    if outside.strip() or num_found != count:
        raise ValueError(
            f"The response marker {marker!r} cannot be found by its tokens: the conversation {text!r} has {count} of them, "
            f"but the tokens {list(ids)} stand in it {num_found} times"
            + (f" and reach into {outside!r}." if outside.strip() else ".")
        )
    return ids


# --- the model -----------------------------------------------------------------------------------------------------


def _build_config(config_class: Any, **settings: Any) -> Any:
    try:
        return config_class(**settings)
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(why_refused(error)) from error


def _write_model(out: str | Path, parts: Parts, model_class: Any, config: Any, processor: Any, seed: int) -> list[str]:
    """Loads the parts, puts them into a model, and writes it. Returns the notes."""
    try:  # finds settings that do not fit the parts before the weights are loaded
        with torch.device("meta"), torch.no_grad():
            model_class(deepcopy(config)).eval().get_image_features(parts.pixel_values.to("meta"))
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"These settings do not fit the parts: {why_refused(error)}") from error
    tower, language_model = parts.load_tower(), parts.load_language_model()
    dtype = language_model.dtype
    if tower.dtype != dtype:
        parts.notes.append(
            f"The vision tower is saved in {tower.dtype}, all else in {dtype}, which both are loaded in."
        )
    config.text_config.dtype, config.vision_config.dtype = dtype, tower.dtype
    model = _join(model_class, config, tower, language_model, seed)
    model.generation_config = _generation_config(language_model, parts)

    with atomic_folder(Path(out)) as unfinished:
        processor.save_pretrained(unfinished)
        model.save_pretrained(unfinished)
        config.dtype = dtype  # the library has written that of the first weight
        config.save_pretrained(unfinished)
    return parts.notes


def _join(model_class: Any, config: Any, tower: Any, language_model: Any, seed: int) -> Any:
    """A model with the weights of tower and language model, and new ones for all else."""
    table, head = language_model.get_input_embeddings().weight, language_model.get_output_embeddings().weight
    is_tied = head is table
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = is_tied  # what the weights say
    with torch.device("meta"):
        model = model_class(config)
    state = {f"model.vision_tower.{name}": value for name, value in tower.state_dict().items()}
    state |= {f"model.language_model.{name}": value for name, value in language_model.base_model.state_dict().items()}
    table = _grow(table, config.text_config.vocab_size)
    state["model.language_model.embed_tokens.weight"] = table
    state["lm_head.weight"] = table if is_tied else _grow(head, config.text_config.vocab_size)
    model.load_state_dict(state, strict=False, assign=True)
    _init_new_weights(model, state.keys(), language_model.dtype, seed)
    model.tie_weights()
    return model


@torch.no_grad()
def _grow(table: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`table` `(rows, d)` with `num_rows` rows at least. The new rows are the mean of the others."""
    if len(table) >= num_rows:
        return table
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(num_rows - len(table), -1)])


@torch.no_grad()
def _init_new_weights(model: Any, loaded: Iterable[str], dtype: torch.dtype, seed: int) -> None:
    """Makes the weights of a model on the meta device that were not `loaded`, as the model itself initialises them."""
    new = {name.rpartition(".")[0] for name in model.state_dict().keys() - set(loaded)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in sorted(new):
            module = model.get_submodule(name).to_empty(device="cpu", recurse=False).to(dtype)
            model._init_weights(module)


def _generation_config(language_model: Any, parts: Parts) -> GenerationConfig:
    """That of the language model. It also stops at the end of a turn, and never writes the placeholder."""
    tokenizer = parts.tokenizer
    settings = language_model.generation_config.to_dict()
    settings.pop("_from_model_config", None)
    model_eos = settings.get("eos_token_id")
    eos_token_ids = [*(model_eos if isinstance(model_eos, list) else [model_eos]), tokenizer.eos_token_id]
    eos_token_ids.append(tokenizer.convert_tokens_to_ids(parts.turns.end_of_turn))
    settings["eos_token_id"] = list(dict.fromkeys(token for token in eos_token_ids if token is not None))
    settings["pad_token_id"] = tokenizer.pad_token_id
    settings["suppress_tokens"] = sorted({*(settings.get("suppress_tokens") or ()), parts.image_token_id})
    if not settings.get("do_sample"):  # these fields have no effect then, but some checkpoints have them
        for name in _SAMPLING_FIELDS:
            settings.pop(name, None)
    return GenerationConfig.from_dict(settings)
