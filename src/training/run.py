"""
Training by recipes: one YAML file says which model, which data and which parts, `transformers.Trainer` does the rest.

    ta-llava train recipes/ta_llava/phase1.yaml --override data.path=... --override global_batch_size=64
    ta-llava curriculum recipes/ta_llava/phase*.yaml --model init --output-dir runs/ta-llava

The output folder holds the trained model with its processor, and while a run is under way the checkpoints of the Trainer:
an interrupted run goes on from the last of them, a finished one is not run again.
"""

import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from ..common.errors import one_line
from ..common.files import temporary_name, write_text
from ..common.loading import config_of, load_complete
from ..common.sources import check_source
from ..vision_towers import blocks_of
from .dataset import Collator, iterate_images, prepare_dataset
from .lora import add_lora
from .parts import count_parameters, describe_parameters, module_names, train_only
from .recipe import DataSettings, Recipe, accumulation_steps, check_recipe
from .summary import SUMMARY, ParameterCount, TrainingSummary
from .vision_feature_cache import VisionFeatureCache


_STARTED = "recipe.json"
# Settings that may change when a run goes on.
_FREE = ("output_dir", "num_proc", "dataloader_", "logging_", "save_", "report_to", "disable_tqdm", "ddp_")
_ROOM_FOR_SMALL_FILES = 1 << 20  # bytes
_SHUFFLED_AT_ONCE = 1000  # samples of a stream


# --- a run ---------------------------------------------------------------------------------------------------------


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of the Trainer that was written to its end (its state is the last file); warns of others."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            TrainerState.load_from_json(str(path / "trainer_state.json"))
            return path
        except (OSError, ValueError):  # is not there, or was cut off itself
            pass
        warnings.warn(f"{path} was not written to its end; it is not used.")  # noqa: B028  # once, whoever asks
    return None


class RecipeTrainer(Trainer):
    """
    The Trainer, with checkpoints as [`train`] needs them: with the processor, of the model's own class also where FSDP
    trains another, and loaded by `from_pretrained`, which knows the names of the weights in them.
    """

    def __init__(self, *args, processor: Any, **kwargs):
        # Not as `processing_class`: the Trainer would make the tokenizer's EOS the model's, which ends a turn with another.
        self.processor = processor
        super().__init__(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        sharded_class: Any = type(self.model)
        if self.is_fsdp_enabled and sharded_class.__name__.startswith("FSDP"):
            self.model.__class__ = sharded_class.__bases__[-1]
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.__class__ = sharded_class
        self.processor.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target: Any = self.model if model is None else model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(target, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if isinstance(self.model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


def train(recipe: Recipe) -> Path:
    """
    Runs a recipe, or goes on with it, or does nothing if it is finished.

    Returns:
        `Path`: `output_dir`, with model (or PEFT adapter) and processor.

    Raises:
        `ValueError`: See [`check_recipe`] and [`prepare_dataset`]; or the output folder holds something else, or the model
            lacks weights.
        `KeyboardInterrupt`: Ctrl-C; the message says where the same call goes on.
    """
    try:
        return _train(recipe)
    except KeyboardInterrupt as error:
        checkpoint = last_complete_checkpoint(Path(recipe.output_dir))
        if checkpoint is not None:
            remedy = f"Run the same command again: it goes on from {checkpoint}."
        else:
            remedy = f"There is no checkpoint in {recipe.output_dir} yet: the same command starts from the first step."
        raise KeyboardInterrupt(remedy) from error


def _train(recipe: Recipe) -> Path:
    if not recipe.model:
        raise ValueError("The recipe has no `model` to start from. Give it, e.g. by --model FOLDER.")
    check_recipe(recipe, _model_type(recipe.model))
    folder = Path(recipe.output_dir)
    if _is_finished(recipe, folder):
        print(f"{folder} is finished already.")
        return folder
    arguments = _training_arguments(recipe)
    is_main = arguments.process_index == 0
    set_seed(arguments.seed)

    processor = AutoProcessor.from_pretrained(recipe.model, trust_remote_code=False)
    with arguments.main_process_first(desc="preparing the data"):
        dataset, report = _load_data(recipe.data, processor, folder / "bad_samples.jsonl")
        evaluation = evaluation_report = None
        if recipe.evaluation_data is not None:
            evaluation, evaluation_report = _load_data(
                recipe.evaluation_data, processor, folder / "bad_evaluation_samples.jsonl"
            )
    if recipe.data.streaming:
        dataset = dataset.shuffle(seed=arguments.seed, buffer_size=_SHUFFLED_AT_ONCE)
    model = _load_model(recipe)
    # What LoRA trains is not there yet, and weights of 4 bits cannot be trained.
    train_only(model, [part for part in recipe.train if recipe.lora is None or part != "language_model"])
    features = None
    if recipe.cache_vision_features:
        with arguments.main_process_first(desc="computing vision features"):
            model.to(arguments.device)
            features = VisionFeatureCache(recipe.cache_vision_features, model, processor, _half_precision(recipe))
            for samples in (dataset, evaluation) if is_main else ():
                if samples is not None:
                    with _explaining_a_full_disk(features.folder):
                        features.fill(iterate_images(samples))
    checkpoint = last_complete_checkpoint(folder)
    base = model
    if recipe.lora is not None:
        model = add_lora(base, recipe)
    counts = count_parameters(base)
    if is_main:
        print(
            f"{folder}: {report}" if not recipe.data.streaming else f"{folder}: samples are read while they are used"
        )
        if evaluation_report is not None:
            print(f"evaluation: {evaluation_report}")
        print(describe_parameters(counts))
        if checkpoint is not None:
            print(f"going on from {checkpoint}")
        at_once, passes = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
        devices = recipe.global_batch_size // (at_once * passes)
        print(
            f"{recipe.global_batch_size} samples a step: {at_once} at once x {passes} passes x {devices} devices",
            flush=True,
        )
        write_text(folder / _STARTED, json.dumps(asdict(recipe), indent=1))

    if is_main:
        num_samples = 0 if recipe.data.streaming else len(dataset)
        _check_space(recipe, arguments, counts, num_samples)
    if arguments.fsdp:
        _wrap_layers(arguments, base)
    trainer = RecipeTrainer(
        model,
        arguments,
        data_collator=Collator(processor, features),
        train_dataset=dataset,
        eval_dataset=evaluation,
        processor=processor,
    )
    if arguments.fsdp and arguments.world_size > 1 and not trainer.is_fsdp_enabled:
        raise ValueError("FSDP was asked for, but accelerate does not shard over processes of this kind of device.")
    with _explaining_a_full_disk(folder):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        for settings in (base.config, base.config.text_config, base.generation_config):
            settings.use_cache = True  # the Trainer turns it off for itself
        trainer.save_model(str(folder))
    if is_main:
        if recipe.data.streaming:
            print(f"{folder}: {report}", flush=True)
        parameters = {part: ParameterCount(*count) for part, count in counts.items()}
        summary = TrainingSummary(recipe, report, trainer.state.log_history, parameters, evaluation_report)
        summary.write(folder)
    trainer.accelerator.wait_for_everyone()  # the next phase starts from these files
    return folder


def run_curriculum(recipes: Sequence[Recipe]) -> Path:
    """
    Runs recipes in turn, each from what came out of the one before; all are checked before the first begins.

    Raises:
        `ValueError`: See [`train`]; LoRA before the last phase, two phases with one output folder, or one cache of features
            for different dtypes.
    """
    if not recipes or not recipes[0].model:
        raise ValueError("A curriculum needs at least one recipe, and a model for the first. Give it with --model.")
    folders = [recipe.output_dir for recipe in recipes]
    if len(set(folders)) < len(folders):
        raise ValueError(f"Each phase needs an `output_dir` of its own, got {', '.join(folders)}.")
    if any(recipe.lora is not None for recipe in recipes[:-1]):
        raise ValueError("LoRA gives an adapter, from which no other phase can start: only the last may use it.")
    models = [recipes[0].model, *folders]
    recipes = [replace(recipe, model=model) for recipe, model in zip(recipes, models)]
    model_type = _model_type(models[0])
    dtypes: dict[str, torch.dtype | None] = {}
    for recipe in recipes:
        check_recipe(recipe, model_type)
        if recipe.cache_vision_features:
            dtype = _half_precision(recipe)
            if dtypes.setdefault(recipe.cache_vision_features, dtype) != dtype:
                raise ValueError(
                    f"The phases share the cache {recipe.cache_vision_features}, but not `bf16` and `fp16`, in which its "
                    "features are. Set them alike, or give a cache to each."
                )
        if not _is_finished(recipe, Path(recipe.output_dir)):
            _training_arguments(recipe)
    for recipe in recipes:
        folder = train(recipe)
    return folder


def _model_type(model: str) -> str:
    try:
        check_source(model)
    except ValueError as error:
        raise ValueError(f"{error} Run the phase before it first, or give --model.") from error
    return config_of(model).model_type


def _is_finished(recipe: Recipe, folder: Path) -> bool:
    """Whether this recipe has been run to its end in this folder; raises if something else is there."""
    if not (folder / _STARTED).is_file():
        own = ("bad_samples.jsonl", "bad_evaluation_samples.jsonl", temporary_name(Path(_STARTED)).name, _STARTED)
        if folder.exists() and (not folder.is_dir() or any(path.name not in own for path in folder.iterdir())):
            raise ValueError(f"{folder} exists already and holds something else. Choose another `output_dir`.")
        return False
    is_finished = (folder / SUMMARY).is_file()
    if is_finished or last_complete_checkpoint(folder) is not None:
        started = _flat(json.loads((folder / _STARTED).read_text(encoding="utf-8")))
        asked = _flat(json.loads(json.dumps(asdict(recipe))))
        for key in sorted(started.keys() | asked.keys()):
            name = key.rpartition(".")[2]
            if started.get(key) != asked.get(key) and not name.startswith(_FREE):
                former = "" if is_finished else "Go on with the former, or choose"
                raise ValueError(
                    f"{folder} was begun with `{key}` {started.get(key)!r}, not {asked.get(key)!r}. "
                    f"{former or 'Choose'} another `output_dir`."
                )
    return is_finished


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under keys with dots; those that are `None` are not there, but an empty `lora` is."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def _half_precision(recipe: Recipe) -> torch.dtype | None:
    arguments = recipe.training_arguments
    return torch.bfloat16 if arguments.get("bf16") else torch.float16 if arguments.get("fp16") else None


def _training_arguments(recipe: Recipe) -> TrainingArguments:
    settings: dict[str, Any] = {
        "use_cpu": not torch.accelerator.is_available(),
        "ddp_timeout": 24 * 3600,  # while the first process prepares the data, the others wait
        # The model gives every parameter a gradient, but for the tower's blocks behind its features.
        "ddp_find_unused_parameters": "vision_tower" in recipe.train,
        "eval_strategy": "no" if recipe.evaluation_data is None else "epoch",
        **recipe.training_arguments,
    }
    known = {entry.name for entry in fields(TrainingArguments)}
    for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):  # newer versions of the library rename it
        new_name = name.replace("gradient", "activation")
        if name in settings and new_name in known:
            settings[new_name] = settings.pop(name)
    if "gradient_accumulation_steps" in settings:
        raise ValueError("`gradient_accumulation_steps` follows from `global_batch_size`; leave it out of the recipe.")
    if recipe.data.streaming:
        # Each process reads all and takes its share, without workers, which would count for themselves.
        settings |= {"dataloader_num_workers": 0, "accelerator_config": {"dispatch_batches": False}}
    num_devices = int(os.environ.get("WORLD_SIZE", "1"))
    if num_devices == 1 and not settings["use_cpu"]:  # one process uses all devices
        num_devices = max(torch.accelerator.device_count(), 1)
    batch_size = settings.setdefault("per_device_train_batch_size", 8)
    # Beforehand: DeepSpeed's config takes the number over as soon as there are arguments.
    settings["gradient_accumulation_steps"] = accumulation_steps(recipe, batch_size, num_devices)
    try:
        arguments = TrainingArguments(output_dir=recipe.output_dir, remove_unused_columns=False, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`training_arguments` are not possible: {one_line(error)}") from error
    state_dict_type = (getattr(arguments, "fsdp_plugin_args", None) or {}).get("state_dict_type", "FULL_STATE_DICT")
    if state_dict_type != "FULL_STATE_DICT":
        raise ValueError(
            f'`state_dict_type` of FSDP must be "FULL_STATE_DICT", to save a model, got {state_dict_type!r}.'
        )
    if recipe.cache_vision_features and is_deepspeed_zero3_enabled():
        raise ValueError("With ZeRO-3 no process has the whole vision tower: leave out `cache_vision_features`.")
    # All processes must gather the shards of the same weights. A batch without an image runs the tower to that end, but only
    # in training, and not where the others read features.
    is_sharded = bool(arguments.fsdp) or is_deepspeed_zero3_enabled()
    if is_sharded and recipe.data.keep_text_only and recipe.cache_vision_features:
        raise ValueError(
            "With FSDP, batches without an image (`data.keep_text_only`) do not go with `cache_vision_features`: leave one "
            "out."
        )
    if is_sharded and recipe.evaluation_data is not None and recipe.evaluation_data.keep_text_only:
        raise ValueError(
            "With FSDP and ZeRO-3, evaluation during training cannot have batches without an image: set "
            "`evaluation_data.keep_text_only` to false."
        )
    return arguments


def _check_space(
    recipe: Recipe, arguments: TrainingArguments, counts: dict[str, tuple[int, int]], num_samples: int
) -> None:
    """Raises if there is no room for the trained model and the checkpoints that lie beside it at the same time."""
    trained, frozen = (sum(count[index] for count in counts.values()) for index in (0, 1))
    weights = 4 * (trained if recipe.lora is not None else trained + frozen)
    checkpoint = (
        weights + 8 * trained + (weights if arguments.fsdp else 0)
    )  # Adam's moments; FSDP writes weights twice
    steps_of_epoch = math.ceil(num_samples / recipe.global_batch_size)
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(steps_of_epoch * arguments.num_train_epochs)
    interval = arguments.save_steps if arguments.save_steps >= 1 else math.ceil(arguments.save_steps * steps)
    interval = steps_of_epoch if arguments.save_strategy == "epoch" else interval
    num_checkpoints = 0 if arguments.save_strategy == "no" else math.ceil(steps / max(interval, 1))
    limit = arguments.save_total_limit or num_checkpoints
    while_saving = checkpoint * min(num_checkpoints, limit + 1)  # one is written before another is deleted
    needed = max(while_saving, checkpoint * min(num_checkpoints, limit) + weights)
    folder = Path(recipe.output_dir)
    needed -= sum(file.stat().st_size for file in folder.glob("checkpoint-*/*"))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder} needs {needed / 1e9:.1f} GB, {checkpoint / 1e9:.1f} GB for each checkpoint, but its disk has "
            f"{free / 1e9:.1f} GB free. Free some of it, or choose another `output_dir`, or a smaller "
            "`training_arguments.save_total_limit`."
        )


@contextmanager
def _explaining_a_full_disk(folder: Path) -> Iterator[None]:
    """Says what to do when the disk of a folder is full, for which torch and safetensors have no error of their own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError):  # torch's own, or of the memory that processes share
            is_full = shutil.disk_usage(folder).free < _ROOM_FOR_SMALL_FILES
        else:
            is_full = "No space left" in str(error)
        if not is_full:
            raise
        raise ValueError(
            f"The disk of {folder} is full ({one_line(error)}). Free some of it and start again: what is complete there is "
            "used, and nothing else lost."
        ) from error


def _wrap_layers(arguments: TrainingArguments, model: Any) -> None:
    """
    Lets FSDP shard layer by layer. By itself it would look for all classes that tower and language model name as not to be
    split, and fail for those of CLIP that are not there; the adapters, which more than one layer uses, stay in the root.
    """
    settings: Any = arguments.fsdp_plugin_args  # type: ignore[attr-defined]
    layers = [*model.model.language_model.layers, *blocks_of(model.model.vision_tower)]
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
        return load_complete(recipe.model, dtype=torch.float32)
    others = [name for part in ("projector", "prefix", "adapters", "vision_tower") for name in module_names(part)]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[*(f"model.{name}" for name in others), "lm_head"],  # matched from the start
    )
    return load_complete(recipe.model, quantization_config=quantization)
