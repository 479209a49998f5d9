"""Recipes: the settings of a training run, read from YAML and checked."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import TrainingArguments
from transformers.utils import is_bitsandbytes_available

from ..common.errors import how_to_install, one_line
from ..common.families import VIEWS_TYPES
from .parts import PARTS
from .typed_yaml import load_yaml, typed_fields


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
        output_dir (`str`): Folder for the results.
        train (`list[str]`): Parts of the model to train, of `PARTS`. All others are frozen.
        data ([`DataSettings`]): Samples to train on.
        evaluation_data ([`DataSettings`], *optional*): Samples for the Trainer's `eval_strategy`.
        global_batch_size (`int`): Samples of one step, over all processes and accumulation.
        cache_vision_features (`str`, *optional*): Folder of a [`VisionFeatureCache`]. Missing features are computed first.
        lora (`dict`, *optional*): Fields of `peft.LoraConfig`. The language model is trained by LoRA, the other parts of
            `train` fully.
        load_in_4bit (`bool`): Load the language model's weights in 4 bits, by bitsandbytes. Needs `lora`.
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


# --- reading -------------------------------------------------------------------------------------------------------


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """
    Reads a recipe. Each value gets the type that its field declares; see [`typed_fields`].

    Args:
        path (`str` or `Path`): YAML file.
        overrides (`Sequence[str]`): Settings that replace those of the file, as `key=value`. The key has dots
            (`training_arguments.learning_rate=1e-4`), and the value is YAML.

    Raises:
        `ValueError`: The file is missing or no YAML, it has a key that a recipe does not have, or a value of another type.
    """
    try:
        content = load_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The recipe {path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"The recipe {path} must be a mapping of keys to values.")
    for override in overrides:
        _override(content, override)
    where = f"the recipe {path}"
    for name in ("data", "evaluation_data"):
        if content.get(name) is not None:
            content[name] = DataSettings(**_without_none(DataSettings, content[name], f"`{name}` of {where}"))
    if content.get("training_arguments") is not None:
        arguments = typed_fields(TrainingArguments, content["training_arguments"], f"`training_arguments` of {where}")
        content["training_arguments"] = arguments
    if content.get("lora") is not None:
        content["lora"] = _lora_fields(content["lora"], f"`lora` of {where}")
    return Recipe(**_without_none(Recipe, content, where))


def _override(content: dict[str, Any], override: str) -> None:
    """Puts the value of `key=value` into the content of a recipe."""
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
        place[last] = load_yaml(value)
    except yaml.YAMLError as error:
        raise ValueError(f"The value of the override {override!r} is no YAML.") from error


def _without_none(settings_class: type, content: Any, where: str) -> dict[str, Any]:
    """The fields of a dataclass in a mapping. `null` stands for the default."""
    values = typed_fields(settings_class, content, where)
    return {key: value for key, value in values.items() if value is not None}


def _lora_fields(content: Any, where: str) -> dict[str, Any]:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError(f"`lora` needs peft: {how_to_install('train')}.") from error
    return typed_fields(LoraConfig, content, where)


# --- checks --------------------------------------------------------------------------------------------------------


def check_recipe(recipe: Recipe, model_type: str) -> None:
    """
    Finds what is wrong with a recipe before anything is loaded.

    Raises:
        `ValueError`: Parts that the model does not have, settings that exclude each other, or a missing path.
    """
    parts = PARTS.get(model_type)
    if parts is None:
        raise ValueError(
            f"{recipe.model} is a {model_type!r} model; recipes train {' and '.join(map(repr, PARTS))}. Make one from parts "
            "with `ta-llava init` or `ta-llava init-llava`, or from a LLaVA with `ta-llava compress`."
        )
    if not recipe.train or not isinstance(recipe.train, list):
        raise ValueError(f"`train` must be a list with at least one of {', '.join(parts)}, got {recipe.train!r}.")
    if unknown := [part for part in recipe.train if part not in parts]:
        raise ValueError(f"A {model_type} has no part {unknown[0]!r} to train, only {', '.join(parts)}.")
    if not recipe.output_dir:
        raise ValueError("The recipe has no `output_dir`. Give it, e.g. by --output-dir FOLDER.")
    if recipe.global_batch_size < 1:
        raise ValueError(f"`global_batch_size` must be at least 1, got {recipe.global_batch_size}.")
    _check_data(recipe)
    if recipe.cache_vision_features and model_type in VIEWS_TYPES:
        raise ValueError(
            f"`cache_vision_features` is not for a {model_type!r} model, whose images differ in their number of features. "
            "Leave it out of the recipe."
        )
    _check_combinations(recipe)
    _check_lora(recipe)


def _check_data(recipe: Recipe) -> None:
    if not recipe.data.path:
        raise ValueError("The recipe has no `data.path`. Give it, e.g. by --override data.path=FILE.")
    for settings in filter(None, (recipe.data, recipe.evaluation_data)):
        if settings.on_bad_sample not in ("error", "skip"):
            raise ValueError(f'`on_bad_sample` must be "error" or "skip", got {settings.on_bad_sample!r}.')
        if Path(settings.path).suffix in (".json", ".jsonl", ".parquet") and not Path(settings.path).is_file():
            raise ValueError(f"There is no file {settings.path} (`path` of the data).")
        if settings.image_folder is not None and not Path(settings.image_folder).is_dir():
            raise ValueError(f"There is no folder {settings.image_folder} (`image_folder` of the data).")


def _check_combinations(recipe: Recipe) -> None:
    """Raises for settings that need or exclude others."""
    arguments = recipe.training_arguments
    if recipe.data.streaming and not arguments.get("max_steps"):
        raise ValueError("The length of streamed data is not known: set `training_arguments.max_steps`.")
    if recipe.evaluation_data is None and arguments.get("eval_strategy", "no") != "no":
        raise ValueError("`eval_strategy` asks for evaluation, but the recipe has no `evaluation_data`.")
    if arguments.get("save_only_model"):
        raise ValueError("With `save_only_model` an interrupted run cannot be resumed: its optimizer would be lost.")
    if recipe.cache_vision_features and recipe.data.streaming:
        raise ValueError("`cache_vision_features` needs all images beforehand, but the recipe streams its data.")
    if recipe.cache_vision_features and "vision_tower" in recipe.train:
        raise ValueError("`cache_vision_features` needs a frozen vision tower, but the recipe trains `vision_tower`.")


def _check_lora(recipe: Recipe) -> None:
    if recipe.lora is not None:
        if "language_model" not in recipe.train:
            raise ValueError(
                "`lora` trains the language model, but the recipe does not name `language_model` in `train`. Take one that "
                "does, such as recipes/ta_llava/phase3.yaml."
            )
        _lora_fields(recipe.lora, "`lora` of the recipe")
        if "modules_to_save" in recipe.lora:
            raise ValueError("`modules_to_save` of `lora` follows from `train`; leave it out of the recipe.")
    if recipe.load_in_4bit and (recipe.lora is None or not is_bitsandbytes_available()):
        missing = "bitsandbytes, which is not installed" if recipe.lora is not None else "`lora`"
        raise ValueError(f"`load_in_4bit` needs {missing}.")


def accumulation_steps(recipe: Recipe, per_device_batch_size: int, num_devices: int) -> int:
    """
    Forward passes of a device in one step, so that all devices together see `global_batch_size` samples.

    Raises:
        `ValueError`: The devices cannot share the samples evenly.
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
