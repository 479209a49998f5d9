"""Converts checkpoints of the authors' TA-LLaVA code (`model_type` "tallava_gemma") to this implementation."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    Gemma2Config,
    GenerationConfig,
)

from ..common.errors import one_line
from ..configuration_ta_llava import TaLlavaConfig
from ..modeling_ta_llava import TaLlavaForConditionalGeneration
from ..processing_ta_llava import TaLlavaProcessor
from ..safe_loading import check_sizes
from .chat_templates import GEMMA_CHAT_TEMPLATE
from .parts import load_part, load_vision_config, load_weights


_END_OF_TURN_ID = 107  # in Gemma's vocabulary

# Names of weights in their code, and in ours. The first pattern that matches renames a key.
_KEY_MAPPING = [
    (r"^model\.vision_priori\.weight$", "model.prefix_embedding.weight"),
    (r"^model\.bottle_neck\.text_xattn\.self_attn\.", "model.text_adapter.cross_attn."),
    (r"^model\.bottle_neck\.vis_xattn\.self_attn\.", "model.vision_adapter.cross_attn."),
    (r"^model\.bottle_neck\.text_xattn\.", "model.text_adapter."),
    (r"^model\.bottle_neck\.vis_xattn\.", "model.vision_adapter."),
    (r"^model\.mm_projector\.", "model.multi_modal_projector."),
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
]


def convert_original(folder: str | Path, vision_tower: str | Path) -> TaLlavaForConditionalGeneration:
    """
    Loads a checkpoint that the authors' code has saved.

    Args:
        folder (`str` or `Path`):
            Folder with `config.json` and `model.safetensors`, in one file or sharded.
        vision_tower (`str` or `Path`):
            Folder or Hub repo of the vision tower. Its config is used, and its weights if the checkpoint has none.

    Returns:
        [`TaLlavaForConditionalGeneration`] in the dtype of the checkpoint.

    Raises:
        `ValueError`: The folder is no such checkpoint, `vision_tower` is no tower or another one, or weights are missing or
            left over.
    """
    folder = Path(folder)
    original = _read_config(folder)
    vision_config = load_vision_config(vision_tower)
    original_state = _load_weights(folder)
    config = _convert_config(original, original_state, vision_config)
    model = TaLlavaForConditionalGeneration(config)
    state = _convert_keys(original_state)
    if not any(key.startswith("model.vision_tower.") for key in state):
        tower = load_weights("vision tower", vision_tower, AutoModel, config=vision_config).state_dict()
        state.update({f"model.vision_tower.{key}": value for key, value in tower.items()})
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    _check_weights(folder, model.state_dict(), state, vision_tower, original.get("mm_vision_tower"))
    model.load_state_dict(state)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    else:  # Gemma's instruction-tuned models end a turn with <end_of_turn>
        model.generation_config.eos_token_id = [config.text_config.eos_token_id, _END_OF_TURN_ID]
    dtype = next(iter(original_state.values())).dtype
    return model.to(dtype)  # type: ignore[arg-type]  # the library's wrapper hides `self`


def _read_config(folder: Path) -> dict[str, Any]:
    """
    The `config.json` of a checkpoint.

    Raises:
        `ValueError`: The folder has none, or not one of the authors' code.
    """
    path = folder / "config.json"
    original = _read_json(path)
    if original.get("model_type") != "tallava_gemma":
        raise ValueError(
            f"{path} has model_type {original.get('model_type')!r}; the authors' checkpoints have 'tallava_gemma'."
        )
    needed = ("num_learnable_tokens", "mm_vision_select_layer", "mm_vision_select_feature", "mm_projector_type")
    if absent := [key for key in needed if key not in original]:
        raise ValueError(f"{path} has no {', '.join(absent)}.")
    check_sizes("config", original)
    return original


def _convert_config(
    original: dict[str, Any], original_state: dict[str, torch.Tensor], vision_config: Any
) -> TaLlavaConfig:
    # Their constructor counts the two adapters as layers and saves the sum: the keys tell the true depth.
    layers = {int(match[1]) for key in original_state if (match := re.match(r"model\.layers\.(\d+)\.", key))}
    text_fields = {field.name for field in fields(Gemma2Config)} - {"num_hidden_layers", "layer_types", "dtype"}
    settings: dict[str, Any] = {key: value for key, value in original.items() if key in text_fields}
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": original.get("rope_theta", 10000.0)}
    return TaLlavaConfig(
        vision_config=vision_config,
        text_config=Gemma2Config(num_hidden_layers=len(layers), **settings),
        num_prefix_tokens=original["num_learnable_tokens"],
        vision_feature_layer=original["mm_vision_select_layer"],
        vision_feature_select_strategy="default" if original["mm_vision_select_feature"] == "patch" else "full",
        projector_type="linear" if original["mm_projector_type"] == "linear" else "mlp",
    )


def _convert_keys(original_state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {}
    for key, value in original_state.items():
        pattern, name = next(((p, n) for p, n in _KEY_MAPPING if re.search(p, key)), ("^", ""))
        state[re.sub(pattern, name, key)] = value
    return state


def _check_weights(
    folder: Path,
    wanted: dict[str, torch.Tensor],
    state: dict[str, torch.Tensor],
    vision_tower: str | Path,
    original_tower: str | None,
) -> None:
    """Raises `ValueError` if the converted weights have other keys or shapes than the `wanted` ones of the model."""
    missing, left_over = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    trained_with = f"Is {vision_tower} its vision tower? Its config names {original_tower!r}."
    if missing or left_over:
        raise ValueError(
            f"The weights in {folder} do not fit: {len(missing)} keys are missing {missing[:5]}, {len(left_over)} are left "
            f"over {left_over[:5]}. {trained_with}"
        )
    if odd := [key for key in sorted(wanted) if state[key].shape != wanted[key].shape]:
        raise ValueError(
            f"The weights in {folder} do not fit: {odd[0]} has the shape {tuple(state[odd[0]].shape)}, not "
            f"{tuple(wanted[odd[0]].shape)}. {trained_with}"
        )


def build_processor(folder: str | Path, vision_tower: str | Path, config: TaLlavaConfig) -> TaLlavaProcessor:
    """The processor of a converted checkpoint, from its tokenizer, the image processor of the tower and Gemma's turns."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    image_processor = load_part("image processor", vision_tower, AutoImageProcessor.from_pretrained)
    # The placeholder is an unused token of Gemma's vocabulary, so that no embedding has to be added.
    placeholder = str(tokenizer.convert_ids_to_tokens(config.image_token_id))
    tokenizer.add_special_tokens({"additional_special_tokens": [placeholder]}, replace_extra_special_tokens=False)
    return TaLlavaProcessor(
        image_processor,
        tokenizer,
        num_prefix_tokens=config.num_prefix_tokens,
        image_token_id=config.image_token_id,
        chat_template=GEMMA_CHAT_TEMPLATE,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return content


def _load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, from one file or several."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(_read_json(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of weights.") from error
    state = {}
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"There is no weight file {folder / name}. Only safetensors are read.")
        try:
            state.update(load_file(folder / name))
        except SafetensorError as error:
            raise ValueError(f"The weight file {folder / name} is damaged or cut off: {error}") from error
    return state
