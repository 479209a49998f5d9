"""Reads and checks the parts of a new model: vision tower, image processor, language model and tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..common.errors import one_line
from ..common.files import check_new_folder
from ..common.loading import load_complete, loading_from
from ..safe_loading import check_image_size, load_config
from .chat_templates import VICUNA_CHAT_TEMPLATE, Turns, add_images, recognise_turns


IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
# Tokens that the vocabularies of Gemma and Llama-3 keep free.
UNUSED_TOKENS = ("<unused0>", "<|reserved_special_token_0|>")

VISION_TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov2")
LANGUAGE_MODELS = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
_VICUNA_VOCABULARY = 32000


@dataclass
class Parts:
    """
    The parts of a new model. Their weights are not loaded yet.

    Args:
        load_tower (`Callable`): Loads the vision tower.
        load_language_model (`Callable`): Loads the language model.
        vision_config: Config of the vision tower.
        image_processor: Image processor of the vision tower.
        pixel_values (`torch.Tensor` of shape `(1, 3, H, W)`): What the image processor makes of some image.
        num_patches (`int`): Patches of an image.
        select_strategy (`str`): The `vision_feature_select_strategy` that fits the tower.
        text_config: Config of the language model, with the new size of the vocabulary.
        num_rows (`int`): Rows of the embedding table that is saved.
        tokenizer: Tokenizer of the language model, with placeholder and padding token.
        own_template (`str`): Chat template for conversations of text.
        turns ([`Turns`]): Turns of the chat template.
        image_token (`str`), image_token_id (`int`): The placeholder of an image.
        notes (`list[str]`): What was decided, one sentence each.
    """

    load_tower: Callable[[], PreTrainedModel]
    load_language_model: Callable[[], Any]
    vision_config: Any
    image_processor: Any
    pixel_values: torch.Tensor
    num_patches: int
    select_strategy: str
    text_config: Any
    num_rows: int
    tokenizer: Any
    own_template: str
    turns: Turns
    image_token: str
    image_token_id: int
    notes: list[str]

    def chat_template_for(self, image_token: str, video_token: str | None = None) -> str:
        """The chat template with images, and with videos if they have a token."""
        return add_images(self.own_template, self.turns, image_token, self.tokenizer.special_tokens_map, video_token)


def read_parts(
    out: str | Path,
    vision_tower: str | Path,
    language_model: str | Path,
    gguf_file: str | None,
    chat_template: str | None,
) -> Parts:
    """
    Reads everything but the weights, and checks that it can become a model in the folder `out`. Arguments are those of
    `assemble_ta_llava`.

    Raises:
        `ValueError`: `out` is not new; a part cannot be loaded, or has another kind; or the tokenizer does not fit.
    """
    check_new_folder(Path(out))
    gguf = {} if gguf_file is None else {"gguf_file": gguf_file}
    if gguf_file is not None and Path(language_model).is_dir() and not (Path(language_model) / gguf_file).is_file():
        raise ValueError(f"There is no file {gguf_file} in {language_model}.")
    vision_config = load_vision_config(vision_tower)
    text_config = _load_text_config(language_model, gguf)
    image_processor = load_part("image processor", vision_tower, AutoImageProcessor.from_pretrained)
    tokenizer = load_part("tokenizer", language_model, AutoTokenizer.from_pretrained, **gguf)
    pixel_values = _process_an_image(vision_tower, image_processor)
    num_patches, select_strategy = _count_patches(vision_tower, vision_config, pixel_values)

    notes: list[str] = []
    _prepare_tokenizer(tokenizer, language_model, notes)
    own_template = _choose_template(tokenizer, language_model, text_config, chat_template, notes)
    turns = _find_turns(tokenizer, language_model, own_template, notes)
    num_rows = text_config.vocab_size
    image_token, image_token_id = _add_placeholder(tokenizer, num_rows)
    # Some tokenizers also pad with a token that the model does not have.
    text_config.vocab_size = max(num_rows, image_token_id + 1, tokenizer.pad_token_id + 1)
    grown = f"; the embedding table grew from {num_rows} to {text_config.vocab_size} rows"
    notes.append(
        f"The placeholder is {image_token!r}, id {image_token_id}{grown if text_config.vocab_size > num_rows else ''}."
    )
    return Parts(
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
        own_template=own_template,
        turns=turns,
        image_token=image_token,
        image_token_id=image_token_id,
        notes=notes,
    )


# --- loading -------------------------------------------------------------------------------------------------------


def load_part(what: str, source: str | Path, from_pretrained: Callable, **kwargs: Any) -> Any:
    """
    Loads a part by `from_pretrained`. If its source is a folder, the Hub is not asked for missing files.

    Args:
        what (`str`): Names the part in messages.
        source (`str` or `Path`): Folder or Hub repo.
        from_pretrained (`Callable`): Method of an auto class; `kwargs` are its arguments.

    Raises:
        `ValueError`: There is no such folder or repo, or its files cannot be loaded.
    """
    if Path(source).is_file():
        raise ValueError(f"{source} is a file, not the folder of a checkpoint.")
    with loading_from(source, what):
        return from_pretrained(source, local_files_only=Path(source).is_dir(), trust_remote_code=False, **kwargs)


def load_weights(what: str, source: str | Path, auto_class: Any, **kwargs: Any) -> Any:
    """Loads a part with all its weights, as [`load_part`] and [`load_complete`] do."""
    return load_complete(source, auto_class, what=what, local_files_only=Path(source).is_dir(), **kwargs)


def load_vision_config(source: str | Path) -> Any:
    """
    The config of a vision tower.

    Args:
        source (`str` or `Path`): Folder or Hub repo.

    Raises:
        `ValueError`: There is no config, or it is that of another kind of model.
    """
    config = load_part("config", source, load_config)
    vision_config = config.vision_config if config.model_type in ("clip", "siglip") else config
    vision_config._name_or_path = _public_name(source)
    if vision_config.model_type not in VISION_TOWERS:
        raise ValueError(
            f"{source} is a {config.model_type!r} model, not a vision tower: a CLIP or SigLIP, whole or its vision side "
            "alone, or a DINOv2 without registers."
        )
    return vision_config


def _load_text_config(source: str | Path, gguf: dict[str, str]) -> Any:
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
    config._name_or_path = _public_name(source)
    return config


def _public_name(source: str | Path) -> str:
    """The name to save for a source. The path of a folder means nothing on other machines."""
    return "" if Path(source).is_dir() else str(source)


# --- the vision tower ----------------------------------------------------------------------------------------------


def _process_an_image(source: str | Path, image_processor: Any) -> torch.Tensor:
    """An image as the tower gets it, `(1, 3, H, W)`."""
    try:
        check_image_size(image_processor)
        return torch.as_tensor(image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"])
    except Exception as error:  # it may be a processor of other things than images
        raise ValueError(f"The image processor in {source} does not work: {one_line(error)}") from error


def _count_patches(source: str | Path, vision_config: Any, pixel_values: torch.Tensor) -> tuple[int, str]:
    """
    Runs a tower without weights on `pixel_values` `(1, 3, H, W)`.

    Returns:
        The number of patches, and the `vision_feature_select_strategy`: "default" if another token precedes them.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            tower: nn.Module = AutoModel.from_config(vision_config).eval()
            states = tower(pixel_values.to("meta"), output_hidden_states=True, return_dict=True).hidden_states
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"The vision tower in {source} cannot read what its image processor makes, images of "
            f"{pixel_values.shape[-1]} x {pixel_values.shape[-2]} pixels: {one_line(error)}"
        ) from error
    size = vision_config.patch_size
    num_patches = (pixel_values.shape[-2] // size) * (pixel_values.shape[-1] // size)
    return num_patches, "full" if states[-1].shape[1] == num_patches else "default"


# --- the tokenizer -------------------------------------------------------------------------------------------------


def _prepare_tokenizer(tokenizer: Any, source: str | Path, notes: list[str]) -> None:
    """Gives a tokenizer a padding token if it has none, and lets it pad as `generate()` needs it."""
    if not tokenizer.is_fast or len(tokenizer) < 3:
        raise ValueError(f"{source} has no tokenizer.json, which is needed. Save its fast tokenizer with it.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise ValueError(f"The tokenizer of {source} has no token to pad with: no pad, unk or EOS token.")
        notes.append(f"The tokenizer had no padding token; {tokenizer.pad_token!r} is it now.")
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs.pop("local_files_only", None)  # would be saved


def _choose_template(
    tokenizer: Any, source: str | Path, text_config: Any, chat_template: str | None, notes: list[str]
) -> str:
    """The given chat template, or that of the tokenizer, or Vicuna's for a tokenizer that can only be Vicuna's."""
    if chat_template is not None:
        return chat_template
    if tokenizer.chat_template is not None:
        return tokenizer.get_chat_template()
    if text_config.model_type == "llama" and text_config.vocab_size == _VICUNA_VOCABULARY:
        notes.append("The tokenizer had no chat template; it got Vicuna's.")
        return VICUNA_CHAT_TEMPLATE
    raise ValueError(
        f"The tokenizer of {source} has no chat template, and which one it should have cannot be known. Pass "
        "`chat_template`, a Jinja template with turns of Gemma, ChatML, Llama-2, Llama-3, Mistral or Vicuna."
    )


def _find_turns(tokenizer: Any, source: str | Path, chat_template: str, notes: list[str]) -> Turns:
    turns = recognise_turns(chat_template, tokenizer.special_tokens_map)
    if len(tokenizer.encode(turns.end_of_turn, add_special_tokens=False)) != 1:
        raise ValueError(
            f"The chat template ends a turn with {turns.end_of_turn!r}, which is no token of the tokenizer of "
            f"{source}. Pass a `chat_template` that ends a turn with one, such as {tokenizer.eos_token!r}."
        )
    notes.append(f"Turns are those of {turns.name}; {turns.end_of_turn!r} ends an answer.")
    return turns


def _add_placeholder(tokenizer: Any, num_rows: int) -> tuple[str, int]:
    """Makes the placeholder a special token of the tokenizer; see `assemble_ta_llava`. Returns its name and id."""
    vocabulary = tokenizer.get_vocab()
    unused = next((token for token in UNUSED_TOKENS if vocabulary.get(token, num_rows) < num_rows), None)
    has_spare_row = max(vocabulary.values()) + 1 < num_rows
    token = IMAGE_TOKEN if IMAGE_TOKEN in vocabulary or has_spare_row or unused is None else unused
    tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    return token, tokenizer.convert_tokens_to_ids(token)
