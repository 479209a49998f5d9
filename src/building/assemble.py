"""Builds new models from a pretrained vision tower and a pretrained language model."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
)

from ..common.errors import one_line
from ..common.files import atomic_folder, check_new_folder
from ..common.loading import load_complete, loading_from
from ..configuration_ta_llava import TaLlavaConfig
from ..modeling_ta_llava import TaLlavaForConditionalGeneration
from ..processing_ta_llava import TaLlavaProcessor
from ..safe_loading import check_image_size, load_config
from ..vmtc import count_visual_tokens
from ..vmtc_cmai_patch import VmtcCmaiLlavaConfig, VmtcCmaiLlavaForConditionalGeneration, VmtcCmaiLlavaProcessor
from .chat_templates import VICUNA_CHAT_TEMPLATE, Turns, add_images, recognise_turns


IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
# Tokens that vocabularies keep free, in Gemma and Llama-3.
UNUSED_TOKENS = ("<unused0>", "<|reserved_special_token_0|>")

VISION_TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov2")
LANGUAGE_MODELS = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
_VICUNA_VOCABULARY = 32000

# In a generation config they say how to sample, and may not be saved with one that does not.
_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

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
    Writes a new TA-LLaVA, to be trained: the vision tower and the language model as they are, to the bit, and a projector,
    a prefix and two adapters that have learned nothing yet. The folder loads anywhere with `trust_remote_code=True`, and
    appears when it is complete. If both parts are folders, nothing is asked of the Hub.

    Placeholder: the tokenizer's `<image>`, if it has one. Otherwise it is added where the embedding table has a row to
    spare; or an unused token serves (`UNUSED_TOKENS`); or, as the last choice, table and head grow by a row, as they do for
    a padding token that has none. A new row is the mean of the old ones: its logit is then the mean of theirs, so that it is
    at most as likely as a token drawn at random. `generate()` never writes the placeholder (`suppress_tokens` of the
    generation config).

    Dtype: each part is saved in its own, the new weights in that of the language model, which is also the dtype in the
    config. So `from_pretrained` gives a tower of another dtype that of the language model, unless told otherwise.

    Args:
        out (`str` or `Path`):
            New folder.
        vision_tower (`str` or `Path`):
            Folder or Hub repo of a CLIP or SigLIP, whole or its vision side alone, or of a DINOv2, with image processor.
        language_model (`str` or `Path`):
            Folder or Hub repo of a causal language model (`LANGUAGE_MODELS`), with tokenizer.
        gguf_file (`str`, *optional*):
            Name of a GGUF file in there, to read instead of safetensors; its weights are de-quantised.
        chat_template (`str`, *optional*):
            Jinja template for conversations of text, of one of `chat_templates.FAMILIES`. Defaults to that of the tokenizer;
            a Llama with 32000 tokens and no template gets Vicuna's. What is saved takes images, and renders conversations
            of text as this one does.
        num_prefix_tokens, adapter_interval, projector_type:
            Those of [`TaLlavaConfig`].
        seed (`int`):
            The same seed gives the same new weights.

    Returns:
        `list[str]`: What was decided about placeholder, padding, turns and dtypes, a sentence each.

    Raises:
        `ValueError`: `out` is not new; a part cannot be loaded, or is no such part; the template is of no known family;
            settings that are not possible.
    """
    if isinstance(num_prefix_tokens, int) and num_prefix_tokens < 1:
        raise ValueError(f"`num_prefix_tokens` must be at least 1, got {num_prefix_tokens}.")
    if projector_type not in ("linear", "mlp"):
        raise ValueError(f"`projector_type` must be 'linear' or 'mlp', got {projector_type!r}.")
    parts = _read_parts(out, vision_tower, language_model, gguf_file, chat_template)
    num_layers = parts.text_config.num_hidden_layers
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
    config = _checked(
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
    return _build(out, parts, TaLlavaForConditionalGeneration, config, processor, seed)


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
    Writes a new LLaVA, to be trained, with VMTC and CMAI as `vmtc_cmai_fields` say: the vision tower and the language model
    as they are, and a projector of two layers that has learned nothing yet.

    Args:
        out, vision_tower, language_model, gguf_file, chat_template, seed:
            As for `assemble_ta_llava`, which also says what becomes of placeholder and dtype. If an unused token is the
            placeholder, its name stands for an image in prompts too (`processor.image_token`).
        vmtc_cmai_fields:
            Fields of [`VmtcCmaiLlavaConfig`] that a LLaVA does not have, such as `use_vmtc`. By default all is off.

    Returns:
        `list[str]`: As `assemble_ta_llava`.

    Raises:
        `ValueError`: As `assemble_ta_llava`; a field that is not known, or a value that is not possible.
    """
    known = {field.name for field in fields(VmtcCmaiLlavaConfig)} - {field.name for field in fields(LlavaConfig)}
    if unknown := sorted(vmtc_cmai_fields.keys() - known):
        raise ValueError(
            f"There are no fields {', '.join(unknown)}. Those of VMTC and CMAI are {', '.join(sorted(known))}."
        )
    parts = _read_parts(out, vision_tower, language_model, gguf_file, chat_template)
    config = _checked(
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
        num_additional_image_tokens=int(parts.select_strategy == "default"),  # it is dropped again
        use_vmtc=config.use_vmtc,
        vmtc_num_visual_tokens=config.vmtc_num_visual_tokens,
        vmtc_keep_ratio=config.vmtc_keep_ratio,
        spd_factor=config.spd_factor,
    )
    return _build(out, parts, VmtcCmaiLlavaForConditionalGeneration, config, processor, seed)


def find_response_marker(processor: TaLlavaProcessor, marker: str) -> list[int]:
    """
    Ids of the tokens that a response marker has inside a conversation, where they may be others than alone.

    Args:
        processor ([`TaLlavaProcessor`]): With a chat template that writes the marker.
        marker (`str`): Such as `"<start_of_turn>model"`.

    Raises:
        `ValueError`: The marker is not made of tokens of its own, or the same tokens stand elsewhere too.
    """
    found = set()
    for question in _QUESTIONS:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "An answer."}]
        for messages in (turns[:1], turns + turns[:1]):
            text = processor.apply_chat_template(messages, add_generation_prompt=True)
            encoded = processor(text=text, return_offsets_mapping=True)
            start = text.rindex(marker)
            end = start + len(marker)
            tokens = [
                (token, first, last)
                for token, (first, last) in zip(encoded["input_ids"][0], encoded["offset_mapping"][0])
                if first < end and last > start
            ]
            ids = tuple(token for token, _, _ in tokens)
            outside = text[min(tokens[0][1], start) : start] + text[end : max(tokens[-1][2], end)]
            row = encoded["input_ids"][0]
            count = sum(tuple(row[i : i + len(ids)]) == ids for i in range(len(row)))
            if outside.strip() or count != (len(messages) + 1) // 2:
                raise ValueError(
                    f"The response marker {marker!r} cannot be found by its tokens: the conversation {text!r} has "
                    f"{(len(messages) + 1) // 2} of them, but the tokens {list(ids)} stand in it {count} times"
                    + (f" and reach into {outside!r}." if outside.strip() else ".")
                )
            found.add(ids)
    if len(found) != 1:
        raise ValueError(
            f"The response marker {marker!r} is tokenised in {len(found)} ways, {sorted(map(list, found))}, depending on "
            "what stands before it. Pass a `chat_template` with a line break before the marker."
        )
    return list(found.pop())


# --- what is there -------------------------------------------------------------------------------------------------


@dataclass
class _Parts:
    """What both models need to know of their parts; the weights are not loaded yet."""

    load_tower: Callable[[], nn.Module]
    load_language_model: Callable[[], Any]
    vision_config: Any
    image_processor: Any
    pixel_values: torch.Tensor  # of some image
    num_patches: int
    select_strategy: str
    text_config: Any  # its vocabulary is the new one
    num_rows: int  # of the embedding table that is there
    tokenizer: Any
    own_template: str
    turns: Turns
    image_token: str
    image_token_id: int
    notes: list[str]

    def chat_template_for(self, image_token: str, video_token: str | None = None) -> str:
        return add_images(self.own_template, self.turns, image_token, self.tokenizer.special_tokens_map, video_token)


def _read_parts(
    out: str | Path,
    vision_tower: str | Path,
    language_model: str | Path,
    gguf_file: str | None,
    chat_template: str | None,
) -> _Parts:
    """Everything but the weights, checked."""
    check_new_folder(Path(out))
    gguf = {} if gguf_file is None else {"gguf_file": gguf_file}
    if gguf_file is not None and Path(language_model).is_dir() and not (Path(language_model) / gguf_file).is_file():
        raise ValueError(f"There is no file {gguf_file} in {language_model}.")
    vision_config = load_vision_config(vision_tower)
    text_config = _text_config(language_model, gguf)
    image_processor = load_part("image processor", vision_tower, AutoImageProcessor.from_pretrained)
    tokenizer = load_part("tokenizer", language_model, AutoTokenizer.from_pretrained, **gguf)
    if not tokenizer.is_fast or len(tokenizer) < 3:
        raise ValueError(f"{language_model} has no tokenizer.json, which is needed. Save its fast tokenizer with it.")
    pixel_values = _example_of(vision_tower, image_processor)
    num_patches, select_strategy = _count_visual_tokens(vision_tower, vision_config, pixel_values)

    notes: list[str] = []
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise ValueError(f"The tokenizer of {language_model} has no token to pad with: no pad, unk or EOS token.")
        notes.append(f"The tokenizer had no padding token; {tokenizer.pad_token!r} is it now.")
    tokenizer.padding_side = "left"  # as `generate()` needs it
    tokenizer.init_kwargs.pop("local_files_only", None)  # would be saved

    if chat_template is None and tokenizer.chat_template is not None:
        chat_template = tokenizer.get_chat_template()
    if chat_template is None and text_config.model_type == "llama" and text_config.vocab_size == _VICUNA_VOCABULARY:
        chat_template = VICUNA_CHAT_TEMPLATE
        notes.append("The tokenizer had no chat template; it got Vicuna's.")
    if chat_template is None:
        raise ValueError(
            f"The tokenizer of {language_model} has no chat template, and which one it should have cannot be known. Pass "
            "`chat_template`, a Jinja template with turns of Gemma, ChatML, Llama-2, Llama-3, Mistral or Vicuna."
        )
    turns = recognise_turns(chat_template, tokenizer.special_tokens_map)
    if len(tokenizer.encode(turns.end_of_turn, add_special_tokens=False)) != 1:
        raise ValueError(
            f"The chat template ends a turn with {turns.end_of_turn!r}, which is no token of the tokenizer of "
            f"{language_model}. Pass a `chat_template` that ends a turn with one, such as {tokenizer.eos_token!r}."
        )
    notes.append(f"Turns are those of {turns.name}; {turns.end_of_turn!r} ends an answer.")

    num_rows = text_config.vocab_size
    image_token, image_token_id = _add_placeholder(tokenizer, num_rows)
    # Some tokenizers also pad with a token that the model does not have.
    text_config.vocab_size = max(num_rows, image_token_id + 1, tokenizer.pad_token_id + 1)
    grown = f"; the embedding table grew from {num_rows} to {text_config.vocab_size} rows"
    notes.append(
        f"The placeholder is {image_token!r}, id {image_token_id}{grown if text_config.vocab_size > num_rows else ''}."
    )
    return _Parts(
        load_tower=lambda: load_weights("vision tower", vision_tower, AutoModel, config=vision_config, dtype="auto"),
        load_language_model=lambda: load_weights(
            "language model", language_model, AutoModelForCausalLM, dtype="auto", **gguf
        ),
        vision_config=vision_config,
        image_processor=image_processor,
        pixel_values=pixel_values,
        num_patches=num_patches,
        select_strategy=select_strategy,
        text_config=text_config,
        num_rows=num_rows,
        tokenizer=tokenizer,
        own_template=chat_template,
        turns=turns,
        image_token=image_token,
        image_token_id=image_token_id,
        notes=notes,
    )


def load_part(what: str, source: str | Path, from_pretrained: Callable, **kwargs: Any) -> Any:
    """
    What `from_pretrained` loads, which for a folder does not ask the Hub for what is missing.

    Args:
        what (`str`): What it is, for the message.
        source (`str` or `Path`): Folder or Hub repo.
        from_pretrained, kwargs: That of an auto class, and its arguments.

    Raises:
        `ValueError`: There is no such folder or repo, or what is there cannot be loaded.
    """
    if Path(source).is_file():
        raise ValueError(f"{source} is a file, not the folder of a checkpoint.")
    with loading_from(source, what):
        return from_pretrained(source, local_files_only=Path(source).is_dir(), trust_remote_code=False, **kwargs)


def load_weights(what: str, source: str | Path, auto_class: Any, **kwargs: Any) -> Any:
    """A part with all its weights; see [`load_complete`]."""
    return load_complete(source, auto_class, what=what, local_files_only=Path(source).is_dir(), **kwargs)


def load_vision_config(source: str | Path) -> Any:
    """
    The config of a vision tower.

    Args:
        source (`str` or `Path`): Folder or Hub repo.

    Raises:
        `ValueError`: There is none, or it is another model.
    """
    config = load_part("config", source, load_config)
    vision_config = config.vision_config if config.model_type in ("clip", "siglip") else config
    vision_config._name_or_path = "" if Path(source).is_dir() else str(source)  # a folder is of this machine
    if vision_config.model_type not in VISION_TOWERS:
        raise ValueError(
            f"{source} is a {config.model_type!r} model, not a vision tower: a CLIP or SigLIP, whole or its vision side "
            "alone, or a DINOv2 without registers."
        )
    return vision_config


def _text_config(source: str | Path, gguf: dict[str, str]) -> Any:
    config = load_part("config", source, load_config, **gguf)
    if config.model_type not in LANGUAGE_MODELS:
        hint = ""
        if getattr(config, "is_encoder_decoder", False):
            hint = " It has an encoder and a decoder."
        elif hasattr(config, "vision_config"):
            hint = " It sees already; save its language model alone, with a head, as a causal language model."
        raise ValueError(
            f"{source} is a {config.model_type!r} model, not one of the causal language models that are supported: "
            f"{', '.join(LANGUAGE_MODELS)}.{hint}"
        )
    if getattr(config, "quantization_config", None) is not None and not gguf:
        raise ValueError(f"The weights of {source} are quantised. Use the checkpoint that they were made from.")
    config._name_or_path = "" if Path(source).is_dir() else str(source)  # a folder is of this machine
    return config


def _example_of(source: str | Path, image_processor: Any) -> torch.Tensor:
    """An image as the tower gets it, `(1, 3, H, W)`."""
    try:
        check_image_size(image_processor)
        return torch.as_tensor(image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"])
    except Exception as error:  # it may be one for other things than images
        raise ValueError(f"The image processor in {source} does not work: {one_line(error)}") from error


def _count_visual_tokens(source: str | Path, vision_config: Any, pixel_values: torch.Tensor) -> tuple[int, str]:
    """
    Patches of an image such as `pixel_values` `(1, 3, H, W)`, and what becomes of the tower's first token
    (`vision_feature_select_strategy`): it is run without weights.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            tower = AutoModel.from_config(vision_config).eval()
            states = tower(pixel_values.to("meta"), output_hidden_states=True, return_dict=True).hidden_states
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"The vision tower in {source} cannot read what its image processor makes, images of "
            f"{pixel_values.shape[-1]} x {pixel_values.shape[-2]} pixels: {one_line(error)}"
        ) from error
    size = vision_config.patch_size
    num_patches = (pixel_values.shape[-2] // size) * (pixel_values.shape[-1] // size)
    return num_patches, "full" if states[-1].shape[1] == num_patches else "default"


# --- what becomes of it --------------------------------------------------------------------------------------------


def _add_placeholder(tokenizer: Any, num_rows: int) -> tuple[str, int]:
    """Name and id of the placeholder, now a special token of the tokenizer; see `assemble_ta_llava`."""
    vocabulary = tokenizer.get_vocab()
    unused = next((token for token in UNUSED_TOKENS if vocabulary.get(token, num_rows) < num_rows), None)
    has_spare_row = max(vocabulary.values()) + 1 < num_rows
    token = IMAGE_TOKEN if IMAGE_TOKEN in vocabulary or has_spare_row or unused is None else unused
    tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    return token, tokenizer.convert_tokens_to_ids(token)


def _checked(config_class: Any, **settings: Any) -> Any:
    try:
        return config_class(**settings)
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(one_line(error.__cause__ or error)) from error


def _build(out: str | Path, parts: _Parts, model_class: Any, config: Any, processor: Any, seed: int) -> list[str]:
    """Loads the parts, puts them into a model, and writes it."""
    try:  # settings that do not fit the parts are found before the weights are loaded
        with torch.device("meta"), torch.no_grad():
            model_class(deepcopy(config)).eval().get_image_features(parts.pixel_values.to("meta"))
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"These settings do not fit the parts: {one_line(error.__cause__ or error)}") from error
    tower, language_model = parts.load_tower(), parts.load_language_model()
    dtype = language_model.dtype
    if tower.dtype != dtype:
        parts.notes.append(
            f"The vision tower is saved in {tower.dtype}, all else in {dtype}, which both are loaded in."
        )

    table, head = language_model.get_input_embeddings().weight, language_model.get_output_embeddings().weight
    is_tied = head is table
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = is_tied  # what the weights say
    config.text_config.dtype, config.vision_config.dtype = dtype, tower.dtype
    with torch.device("meta"):
        model = model_class(config)
    state = {f"model.vision_tower.{name}": value for name, value in tower.state_dict().items()}
    state |= {f"model.language_model.{name}": value for name, value in language_model.base_model.state_dict().items()}
    state["model.language_model.embed_tokens.weight"] = _grow(table, config.text_config.vocab_size)
    state["lm_head.weight"] = (
        state["model.language_model.embed_tokens.weight"] if is_tied else _grow(head, config.text_config.vocab_size)
    )
    model.load_state_dict(state, strict=False, assign=True)
    _init_new_weights(model, state.keys(), dtype, seed)
    model.tie_weights()
    model.generation_config = _generation_config(language_model, parts)

    with atomic_folder(Path(out)) as unfinished:
        processor.save_pretrained(unfinished)
        model.save_pretrained(unfinished)
        config.dtype = dtype  # the library has written that of the first weight
        config.save_pretrained(unfinished)
    return parts.notes


@torch.no_grad()
def _grow(table: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A copy of `table` `(rows, d)` with `num_rows` rows, the new ones their mean; itself, if it has so many."""
    if len(table) >= num_rows:
        return table
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(num_rows - len(table), -1)])


@torch.no_grad()
def _init_new_weights(model: Any, loaded: Iterable[str], dtype: torch.dtype, seed: int) -> None:
    """Gives a model on the meta device the weights that were not `loaded`, as the model itself initialises them."""
    new = {name.rpartition(".")[0] for name in model.state_dict().keys() - set(loaded)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in sorted(new):
            module = model.get_submodule(name).to_empty(device="cpu", recurse=False).to(dtype)
            model._init_weights(module)


def _generation_config(language_model: Any, parts: _Parts) -> GenerationConfig:
    """That of the language model, which also ends with a turn, and never writes the placeholder."""
    tokenizer = parts.tokenizer
    settings = language_model.generation_config.to_dict()
    settings.pop("_from_model_config", None)
    own = settings.get("eos_token_id")
    eos_token_ids = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    eos_token_ids.append(tokenizer.convert_tokens_to_ids(parts.turns.end_of_turn))
    settings["eos_token_id"] = list(dict.fromkeys(token for token in eos_token_ids if token is not None))
    settings["pad_token_id"] = tokenizer.pad_token_id
    settings["suppress_tokens"] = sorted({*(settings.get("suppress_tokens") or ()), parts.image_token_id})
    if not settings.get("do_sample"):  # then they have no effect, but some checkpoints have them
        for name in _SAMPLING_FIELDS:
            settings.pop(name, None)
    return GenerationConfig.from_dict(settings)
