"""Recipes: what a run of training is told, read from YAML and checked."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import TrainingArguments
from transformers.utils import is_bitsandbytes_available

from ..common.errors import how_to_install, one_line
from .parts import PARTS


@dataclass
class DataSettings:
    """Samples to train on or to evaluate with; see [`prepare_dataset`]."""

    path: str = ""
    image_folder: str | None = None
    split: str = "train"
    streaming: bool = False
    num_proc: int | None = None
    max_length: int = 1024
    keep_text_only: bool = False
    on_bad_sample: Literal["error", "skip"] = "error"


@dataclass
class Recipe:
    """
    One phase of training.

    Args:
        model (`str`): Folder or Hub repo to start from.
        output_dir (`str`): Folder for what comes out.
        train (`list[str]`): Parts that are trained, of `PARTS`; all others are frozen.
        data, evaluation_data ([`DataSettings`]): Samples; the latter optional, for the Trainer's `eval_strategy`.
        global_batch_size (`int`): Samples of one step, over all processes and accumulation.
        cache_vision_features (`str`, *optional*): Folder of a [`VisionFeatureCache`], filled first where it is not.
        lora (`dict`, *optional*): Fields of `peft.LoraConfig`. The language model is trained by LoRA, the other parts of
            `train` fully.
        load_in_4bit (`bool`): The language model's weights in 4 bits, by bitsandbytes; for LoRA.
        training_arguments (`dict`): Fields of `transformers.TrainingArguments`.
    """

    model: str = ""
    output_dir: str = ""
    train: list[str] = field(default_factory=list)
    data: DataSettings = field(default_factory=DataSettings)
    evaluation_data: DataSettings | None = None
    global_batch_size: int = 128
    cache_vision_features: str | None = None
    lora: dict[str, Any] | None = None
    load_in_4bit: bool = False
    training_arguments: dict[str, Any] = field(default_factory=dict)


# --- recipes -------------------------------------------------------------------------------------------------------


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """
    Reads a recipe.

    Args:
        path (`str` or `Path`): YAML file.
        overrides (`Sequence[str]`): `key=value` each, the key with dots (`training_arguments.learning_rate=1e-4`), the
            value in YAML.

    Raises:
        `ValueError`: No such file, no YAML, or a key that a recipe does not have.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The recipe {path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"The recipe {path} must be a mapping of keys to values.")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"An override must be key=value, got {override!r}.")
        *parents, last = key.split(".")
        place = content
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ValueError(f"The override {override!r} goes into {parent!r}, which has no keys.")
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"The value of the override {override!r} is no YAML.") from error
    for name in ("data", "evaluation_data"):
        if content.get(name) is not None:
            content[name] = _build(DataSettings, content[name], f"`{name}` of the recipe {path}")
    for name in ("training_arguments", "lora"):
        content[name] = _as_number(content.get(name))
    recipe = _build(Recipe, content, f"the recipe {path}")
    _build(TrainingArguments, recipe.training_arguments, f"`training_arguments` of the recipe {path}", only_check=True)
    return recipe


def _build(settings_class: Any, content: Any, where: str, only_check: bool = False) -> Any:
    """An object of a dataclass from a mapping, whose keys and simple types are checked."""
    if not isinstance(content, dict):
        raise ValueError(f"{where[0].upper() + where[1:]} must be a mapping, got {content!r}.")
    known = {entry.name: entry for entry in fields(settings_class)}
    if unknown := [key for key in content if key not in known]:
        nearest = difflib.get_close_matches(str(unknown[0]), known, n=3, cutoff=0)
        raise ValueError(f"Unknown key {unknown[0]!r} in {where}. The nearest are {', '.join(nearest)}.")
    content = {key: value for key, value in content.items() if value is not None}
    for key, value in content.items():
        kind: Any = known[key].type
        allowed = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}.get(kind)
        if allowed is not None and type(value) not in allowed:
            raise ValueError(f"`{key}` in {where} must be of type {kind.__name__}, got {value!r}.")
    return None if only_check else settings_class(**content)


def _as_number(value: Any) -> Any:
    """The same with texts like 1e-3, which YAML does not take for numbers, as numbers."""
    if isinstance(value, dict):
        return {key: _as_number(entry) for key, entry in value.items()}
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def check_recipe(recipe: Recipe, model_type: str) -> None:
    """
    What can be found wrong with a recipe before anything is loaded.

    Raises:
        `ValueError`: Parts that the model does not have, settings that exclude each other, a missing path.
    """
    parts = PARTS.get(model_type)
    if parts is None:
        raise ValueError(
            f"{recipe.model} is a {model_type!r} model; recipes train {' and '.join(map(repr, PARTS))}. Make one from parts "
            "with `ta-llava init` or `ta-llava init-llava`, or of a LLaVA with `ta-llava compress`."
        )
    if not recipe.train or not isinstance(recipe.train, list):
        raise ValueError(f"`train` must be a list with at least one of {', '.join(parts)}, got {recipe.train!r}.")
    if unknown := [part for part in recipe.train if part not in parts]:
        raise ValueError(f"A {model_type} has no part {unknown[0]!r} to train, only {', '.join(parts)}.")
    if not recipe.data.path:
        raise ValueError("The recipe has no `data.path`. Give it, e.g. by --override data.path=FILE.")
    if not recipe.output_dir:
        raise ValueError("The recipe has no `output_dir`. Give it, e.g. by --output-dir FOLDER.")
    if recipe.global_batch_size < 1:
        raise ValueError(f"`global_batch_size` must be at least 1, got {recipe.global_batch_size}.")
    for settings in (recipe.data, recipe.evaluation_data):
        if settings is None:
            continue
        if settings.on_bad_sample not in ("error", "skip"):
            raise ValueError(f'`on_bad_sample` must be "error" or "skip", got {settings.on_bad_sample!r}.')
        if Path(settings.path).suffix in (".json", ".jsonl", ".parquet") and not Path(settings.path).is_file():
            raise ValueError(f"There is no file {settings.path} (`path` of the data).")
        if settings.image_folder is not None and not Path(settings.image_folder).is_dir():
            raise ValueError(f"There is no folder {settings.image_folder} (`image_folder` of the data).")
    arguments = recipe.training_arguments
    if recipe.data.streaming and not arguments.get("max_steps"):
        raise ValueError("How long streamed data is cannot be known: set `training_arguments.max_steps`.")
    if recipe.evaluation_data is None and arguments.get("eval_strategy", "no") != "no":
        raise ValueError("`eval_strategy` asks for evaluation, but the recipe has no `evaluation_data`.")
    if arguments.get("save_only_model"):
        raise ValueError("With `save_only_model` an interrupted run could not go on: its optimizer would be lost.")
    if recipe.cache_vision_features and recipe.data.streaming:
        raise ValueError("`cache_vision_features` needs all images beforehand, but the recipe streams its data.")
    if recipe.cache_vision_features and "vision_tower" in recipe.train:
        raise ValueError("`cache_vision_features` needs a frozen vision tower, but the recipe trains `vision_tower`.")
    if recipe.lora is not None and "language_model" not in recipe.train:
        raise ValueError(
            "`lora` trains the language model, but the recipe does not name `language_model` in `train`. Take one that "
            "does, such as recipes/ta_llava/phase3.yaml."
        )
    if recipe.lora is not None:
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ValueError(f"`lora` needs peft: {how_to_install('train')}.") from error
        _build(LoraConfig, recipe.lora, "`lora` of the recipe", only_check=True)
        if "modules_to_save" in recipe.lora:
            raise ValueError("`modules_to_save` of `lora` follows from `train`; leave it out of the recipe.")
    if recipe.load_in_4bit and (recipe.lora is None or not is_bitsandbytes_available()):
        missing = "bitsandbytes, which is not installed" if recipe.lora is not None else "`lora`"
        raise ValueError(f"`load_in_4bit` needs {missing}.")


def accumulation_steps(recipe: Recipe, per_device_batch_size: int, num_devices: int) -> int:
    """
    Forward passes of a device in one step, so that all together see `global_batch_size` samples.

    Raises:
        `ValueError`: It cannot be divided.
    """
    if per_device_batch_size < 1:
        raise ValueError(f"`per_device_train_batch_size` must be at least 1, got {per_device_batch_size}.")
    at_once = per_device_batch_size * num_devices
    if recipe.global_batch_size % at_once:
        raise ValueError(
            f"`global_batch_size` is {recipe.global_batch_size}, which {num_devices} devices with "
            f"`per_device_train_batch_size` {per_device_batch_size} cannot share: make it a multiple of {at_once}, or the "
            "batch of a device smaller."
        )
    return recipe.global_batch_size // at_once
