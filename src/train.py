"""
Training by recipes: one YAML file says which model, which data and which parts, `transformers.Trainer` does the rest.

    ta-llava train recipes/ta_llava/phase1.yaml --override data.path=... --override global_batch_size=64
    ta-llava curriculum recipes/ta_llava/phase*.yaml --model init --output-dir runs/ta-llava

The output folder holds the trained model with its processor, and while a run is under way the checkpoints of the Trainer:
an interrupted run goes on from the last of them, a finished one is not run again.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import is_bitsandbytes_available

from .configuration_ta_llava import TaLlavaConfig
from .training_data import Collator, iterate_images, prepare_dataset
from .vision_feature_cache import VisionFeatureCache
from .vmtc import _blocks_of
from .vmtc_cmai_patch import VmtcCmaiLlavaConfig


# Modules of the parts that a recipe may name under `train`, in the model without its head.
PARTS = {
    TaLlavaConfig.model_type: {
        "projector": ("multi_modal_projector",),
        "prefix": ("prefix_embedding",),
        "adapters": ("text_adapter", "vision_adapter"),
        "language_model": ("language_model", "lm_head"),
        "vision_tower": ("vision_tower",),
    },
    VmtcCmaiLlavaConfig.model_type: {
        "projector": ("multi_modal_projector",),
        "language_model": ("language_model", "lm_head"),
        "vision_tower": ("vision_tower",),
    },
}
# The linear layers of the language model, whatever its family calls them.
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
SUMMARY = "training_summary.json"
_STARTED = "recipe.json"


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
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"The recipe {path} cannot be read: {' '.join(str(error).split())}") from error
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
    recipe = _build(Recipe, content, f"the recipe {path}")
    recipe.training_arguments = {key: _as_number(value) for key, value in recipe.training_arguments.items()}
    _build(TrainingArguments, recipe.training_arguments, f"`training_arguments` of the recipe {path}", only_check=True)
    return recipe


def _build(settings_class: Any, content: Any, where: str, only_check: bool = False) -> Any:
    """An object of a dataclass from a mapping, whose keys and simple types are checked."""
    if not isinstance(content, dict):
        raise ValueError(f"{where[0].upper() + where[1:]} must be a mapping, got {content!r}.")
    known = {entry.name: entry for entry in fields(settings_class)}
    if unknown := [key for key in content if key not in known]:
        raise ValueError(f"Unknown key {unknown[0]!r} in {where}. There are: {', '.join(sorted(known))}.")
    if only_check:
        return None
    content = {key: value for key, value in content.items() if value is not None}
    for key, value in content.items():
        for kind in (bool, int, str):
            if known[key].type is kind and type(value) is not kind:
                raise ValueError(f"`{key}` in {where} must be of type {kind.__name__}, got {value!r}.")
    return settings_class(**content)


def _as_number(value: Any) -> Any:
    """YAML takes 1e-3 for text."""
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
    if not recipe.train:
        raise ValueError(f"The recipe trains nothing: name at least one of {', '.join(parts)} under `train`.")
    if unknown := [part for part in recipe.train if part not in parts]:
        raise ValueError(f"A {model_type} has no part {unknown[0]!r} to train, only {', '.join(parts)}.")
    if not recipe.data.path:
        raise ValueError("The recipe has no `data.path`. Give it, e.g. by --override data.path=FILE.")
    if not recipe.output_dir:
        raise ValueError("The recipe has no `output_dir`. Give it, e.g. by --output-dir FOLDER.")
    for settings in (recipe.data, recipe.evaluation_data):
        if settings is not None and settings.on_bad_sample not in ("error", "skip"):
            raise ValueError(f'`on_bad_sample` must be "error" or "skip", got {settings.on_bad_sample!r}.')
    if recipe.cache_vision_features and recipe.data.streaming:
        raise ValueError("`cache_vision_features` needs all images beforehand, but the recipe streams its data.")
    if recipe.cache_vision_features and "vision_tower" in recipe.train:
        raise ValueError("`cache_vision_features` needs a frozen vision tower, but the recipe trains `vision_tower`.")
    if recipe.lora is not None and "language_model" not in recipe.train:
        raise ValueError("`lora` trains the language model, but the recipe does not name `language_model` in `train`.")
    if recipe.load_in_4bit and (recipe.lora is None or not is_bitsandbytes_available()):
        missing = "bitsandbytes, which is not installed" if recipe.lora is not None else "`lora`"
        raise ValueError(f"`load_in_4bit` needs {missing}.")


def accumulation_steps(recipe: Recipe, per_device_batch_size: int, num_devices: int) -> int:
    """
    Forward passes of a device in one step, so that all together see `global_batch_size` samples.

    Raises:
        `ValueError`: It cannot be divided.
    """
    at_once = per_device_batch_size * num_devices
    if recipe.global_batch_size % at_once:
        raise ValueError(
            f"`global_batch_size` is {recipe.global_batch_size}, which {num_devices} devices with "
            f"`per_device_train_batch_size` {per_device_batch_size} cannot share: make it a multiple of {at_once}, or the "
            "batch of a device smaller."
        )
    return recipe.global_batch_size // at_once


# --- what is trained -----------------------------------------------------------------------------------------------


def train_only(model: Any, parts: Sequence[str]) -> None:
    """Freezes all of a model but the named `PARTS`."""
    model.requires_grad_(False)
    for part in parts:
        for module in _modules_of(model, part):
            module.requires_grad_(True)


def _modules_of(model: Any, part: str) -> list[nn.Module]:
    names = PARTS[model.config.model_type][part]
    return [getattr(model if name == "lm_head" else model.model, name) for name in names]


def count_parameters(model: Any) -> dict[str, tuple[int, int]]:
    """Trainable and frozen parameters of each part; those that parts share (tied embeddings) count once."""
    seen: set[int] = set()
    counts = {}
    for part in PARTS[model.config.model_type]:
        trainable = frozen = 0
        for module in _modules_of(model, part):
            for parameter in module.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    trainable += parameter.numel() * parameter.requires_grad
                    frozen += parameter.numel() * (not parameter.requires_grad)
        counts[part] = (trainable, frozen)
    return counts


def describe_parameters(counts: dict[str, tuple[int, int]]) -> str:
    lines = [f"{'part':<16}{'trainable':>16}{'frozen':>16}"]
    total = tuple(map(sum, zip(*counts.values())))
    for part, (trainable, frozen) in [*counts.items(), ("all", total)]:
        lines.append(f"{part:<16}{trainable:>16,}{frozen:>16,}")
    return "\n".join(lines)


def add_lora(model: Any, recipe: Recipe) -> Any:
    """The model as a `PeftModel`: LoRA in the language model, the other parts of the recipe trained fully."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if recipe.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    parts = PARTS[model.config.model_type]
    fully = [name for part in recipe.train if part != "language_model" for name in parts[part]]
    settings = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": LORA_TARGETS, **(recipe.lora or {})}
    return get_peft_model(model, LoraConfig(modules_to_save=fully or None, **settings))


# --- a run ---------------------------------------------------------------------------------------------------------


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of the Trainer that was written to its end: its state is the last file of all."""
    complete = folder.glob("checkpoint-*/trainer_state.json")
    return max((path.parent for path in complete), key=lambda path: int(path.name.split("-")[1]), default=None)


def train(recipe: Recipe) -> Path:
    """
    Runs a recipe, or goes on with it, or does nothing if it is finished.

    Returns:
        `Path`: `output_dir`, with model (or PEFT adapter) and processor.

    Raises:
        `ValueError`: See [`check_recipe`] and [`prepare_dataset`]; or the output folder is another recipe's.
    """
    if not recipe.model:
        raise ValueError("The recipe has no `model` to start from. Give it, e.g. by --model FOLDER.")
    config = AutoConfig.from_pretrained(recipe.model, trust_remote_code=False)
    check_recipe(recipe, config.model_type)
    folder = Path(recipe.output_dir)
    if _is_finished(recipe, folder):
        print(f"{folder} is finished: nothing to do.")
        return folder
    arguments = _training_arguments(recipe)
    set_seed(arguments.seed)

    processor = AutoProcessor.from_pretrained(recipe.model, trust_remote_code=False)
    with arguments.main_process_first(desc="preparing the data"):
        dataset, report = _load_data(recipe.data, processor, folder / "bad_samples.jsonl")
        evaluation = None
        if recipe.evaluation_data is not None:
            evaluation, _ = _load_data(recipe.evaluation_data, processor, folder / "bad_evaluation_samples.jsonl")
    model = _load_model(recipe)
    train_only(model, recipe.train)
    features = None
    if recipe.cache_vision_features:
        with arguments.main_process_first(desc="computing vision features"):
            dtype = (
                torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
            )  # None: the tower's
            features = VisionFeatureCache(
                recipe.cache_vision_features, model.to(arguments.device), processor, dtype=dtype
            )
            if arguments.process_index == 0:
                for samples in (dataset, evaluation):
                    if samples is not None:
                        features.fill(iterate_images(samples))
    base = model
    if recipe.lora is not None:
        model = add_lora(base, recipe)
    counts = count_parameters(base)
    if arguments.process_index == 0:
        print(f"{folder}: {report}\n{describe_parameters(counts)}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _STARTED).write_text(json.dumps(asdict(recipe), indent=1), encoding="utf-8")

    if arguments.fsdp:
        _wrap_layers(arguments, base)
    trainer = Trainer(
        model,
        arguments,
        data_collator=Collator(processor, features),
        train_dataset=dataset,
        eval_dataset=evaluation,
        callbacks=[_SaveProcessor(processor)],
    )
    if arguments.fsdp and arguments.world_size > 1 and not trainer.is_fsdp_enabled:
        raise ValueError("FSDP was asked for, but accelerate does not shard over processes of this kind of device.")
    checkpoint = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    for settings in (base.config, base.config.text_config, base.generation_config):
        settings.use_cache = True  # the Trainer turns it off for itself
    trainer.save_model(str(folder))
    if arguments.process_index == 0:
        processor.save_pretrained(folder)
        summary = {
            "recipe": asdict(recipe),
            "data": asdict(report),
            "parameters": {part: {"trainable": t, "frozen": f} for part, (t, f) in counts.items()},
            "log": trainer.state.log_history,
        }
        unfinished = folder / f"{SUMMARY}.tmp"
        unfinished.write_text(json.dumps(summary, indent=1), encoding="utf-8")
        unfinished.rename(folder / SUMMARY)
    return folder


def run_curriculum(recipes: Sequence[Recipe]) -> Path:
    """
    Runs recipes in turn, each from what came out of the one before; all are checked before the first begins.

    Raises:
        `ValueError`: See [`train`]; LoRA before the last phase, or two phases with one output folder.
    """
    if not recipes:
        raise ValueError("A curriculum needs at least one recipe.")
    folders = [recipe.output_dir for recipe in recipes]
    if len(set(folders)) < len(folders):
        raise ValueError(f"Each phase needs an `output_dir` of its own, got {', '.join(folders)}.")
    if any(recipe.lora is not None for recipe in recipes[:-1]):
        raise ValueError("LoRA gives an adapter, from which no other phase can start: only the last may use it.")
    model_type = AutoConfig.from_pretrained(recipes[0].model, trust_remote_code=False).model_type
    for recipe in recipes:
        check_recipe(recipe, model_type)
        if not _is_finished(recipe, Path(recipe.output_dir)):
            _training_arguments(recipe)
    model = recipes[0].model
    for recipe in recipes:
        model = str(train(replace(recipe, model=model)))
    return Path(model)


def _is_finished(recipe: Recipe, folder: Path) -> bool:
    """Whether this recipe has been run to its end in this folder; raises if another one has been begun there."""
    if not (folder / _STARTED).is_file():
        return False
    started = json.loads((folder / _STARTED).read_text(encoding="utf-8"))
    for key, value in asdict(recipe).items():
        if started.get(key) != value and not (key == "model" and not value):
            raise ValueError(
                f"{folder} was begun with `{key}` {started.get(key)!r}, not {value!r}. Choose another `output_dir`, or "
                "remove the folder."
            )
    return (folder / SUMMARY).is_file()


def _training_arguments(recipe: Recipe) -> TrainingArguments:
    settings: dict[str, Any] = {"use_cpu": not torch.accelerator.is_available(), **recipe.training_arguments}
    if "gradient_accumulation_steps" in settings:
        raise ValueError("`gradient_accumulation_steps` follows from `global_batch_size`; leave it out of the recipe.")
    num_devices = int(os.environ.get("WORLD_SIZE", "1"))
    if num_devices == 1 and not settings["use_cpu"]:  # one process uses all devices
        num_devices = max(torch.accelerator.device_count(), 1)
    batch_size = settings.setdefault("per_device_train_batch_size", 8)
    # Beforehand: DeepSpeed's config takes the number over as soon as there are arguments.
    settings["gradient_accumulation_steps"] = accumulation_steps(recipe, batch_size, num_devices)
    return TrainingArguments(output_dir=recipe.output_dir, remove_unused_columns=False, **settings)


def _wrap_layers(arguments: TrainingArguments, model: Any) -> None:
    """
    Lets FSDP shard layer by layer. By itself it would look for all classes that tower and language model name as not to be
    split, and fail for those of CLIP that are not there; the adapters, which more than one layer uses, stay in the root.
    """
    settings: Any = arguments.fsdp_plugin_args  # type: ignore[attr-defined]
    layers = [*model.model.language_model.layers, *_blocks_of(model.model.vision_tower)]
    names = sorted({type(layer).__name__ for layer in layers})
    settings.setdefault("transformer_cls_names_to_wrap", ",".join(names))


def _load_data(settings: DataSettings, processor: Any, bad_samples_file: Path) -> tuple[Any, Any]:
    return prepare_dataset(
        settings.path,
        processor,
        image_folder=settings.image_folder,
        max_length=settings.max_length,
        keep_text_only=settings.keep_text_only,
        on_bad_sample=settings.on_bad_sample,
        bad_samples_file=bad_samples_file,
        streaming=settings.streaming,
        num_proc=settings.num_proc,
        split=settings.split,
    )


def _load_model(recipe: Recipe) -> Any:
    """In float32, in which the weights that are trained must be kept; mixed precision is the Trainer's."""
    if not recipe.load_in_4bit:
        return AutoModelForImageTextToText.from_pretrained(recipe.model, dtype=torch.float32, trust_remote_code=False)
    others = [name for part in ("projector", "prefix", "adapters", "vision_tower") for name in _names_of(part)]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[*others, "lm_head"],
    )
    return AutoModelForImageTextToText.from_pretrained(
        recipe.model, quantization_config=quantization, trust_remote_code=False
    )


def _names_of(part: str) -> tuple[str, ...]:
    return next((parts[part] for parts in PARTS.values() if part in parts), ())


class _SaveProcessor(TrainerCallback):
    """
    Puts the processor into every checkpoint. The Trainer would do it, but a Trainer that has the processor also makes the
    tokenizer's EOS that of the model, which ends a turn with another token.
    """

    def __init__(self, processor: Any):
        self.processor = processor

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.processor.save_pretrained(Path(args.output_dir) / f"checkpoint-{state.global_step}")


# --- LoRA ----------------------------------------------------------------------------------------------------------


def merge_adapter(adapter: str | Path, out: str | Path, model: str | None = None) -> None:
    """
    Merges a PEFT adapter into its model and saves that as a folder of its own.

    Args:
        adapter (`str` or `Path`): Folder or Hub repo of the adapter.
        out (`str` or `Path`): New folder.
        model (`str`, *optional*): The model it was trained on; by default the one that the adapter names.

    Raises:
        `ValueError`: `out` is not new, `adapter` is none, or its model is not there.
    """
    from peft import PeftConfig, PeftModel

    from .export import check_new_folder

    out = Path(out)
    check_new_folder(out)
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (ValueError, OSError) as error:
        raise ValueError(f"{adapter} is no PEFT adapter: {' '.join(str(error).split())}") from error
    source = model or config.base_model_name_or_path
    if not source:
        raise ValueError(f"{adapter} does not name its model. Give it with --model.")
    base = AutoModelForImageTextToText.from_pretrained(source, dtype="auto", trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    merged.save_pretrained(out)
    processor.save_pretrained(out)
