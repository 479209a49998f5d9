"""
Runs recipes: a YAML file names the model, the data and the parts to train, and `transformers.Trainer` does the rest.

    ta-llava train recipes/ta_llava/phase1.yaml --override data.path=... --override global_batch_size=64
    ta-llava curriculum recipes/ta_llava/phase*.yaml --model init --output-dir runs/ta-llava

The output folder gets the trained model with its processor, and the checkpoints of the Trainer during the run. Rerun the
same command to resume an interrupted run from its last checkpoint. A finished run is not run again.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..common.files import temporary_name, write_text
from ..common.loading import config_of, load_complete
from ..common.sources import check_source
from ..data.report import DataReport
from ..vision_towers import blocks_of
from .arguments import build_training_arguments, half_precision
from .dataset import Collator, iterate_images, prepare_dataset
from .disk_space import check_space, explaining_a_full_disk
from .lora import add_lora
from .parts import count_parameters, describe_parameters, module_names, train_only
from .recipe import DataSettings, Recipe, check_recipe
from .summary import SUMMARY, ParameterCount, TrainingSummary
from .vision_feature_cache import VisionFeatureCache


_STARTED = "recipe.json"
_BAD_SAMPLES, _BAD_EVALUATION_SAMPLES = "bad_samples.jsonl", "bad_evaluation_samples.jsonl"
# Settings that may change when a run is resumed.
_FREE = ("output_dir", "num_proc", "dataloader_", "logging_", "save_", "report_to", "disable_tqdm", "ddp_")
_SHUFFLED_AT_ONCE = 1000  # samples of a stream


# --- a run ---------------------------------------------------------------------------------------------------------


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of the Trainer that is complete (its state is the last file). Warns about others."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            TrainerState.load_from_json(str(path / "trainer_state.json"))
            return path
        except (OSError, ValueError):  # the state is missing, or was cut off itself
            pass
        warnings.warn(f"{path} was not written to its end; it is not used.")  # noqa: B028 - once, whoever asks
    return None


class RecipeTrainer(Trainer):
    """
    The Trainer, with other checkpoints: they have the processor, name the model's own class also where FSDP trains another,
    and are loaded by `from_pretrained`, which knows the names of their weights.
    """

    def __init__(self, *args, processor: Any, **kwargs):
        # Not as `processing_class`: the Trainer would give the model the EOS of the tokenizer, which does not end a turn.
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
        checkpoint = self.state.best_model_checkpoint
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if checkpoint is not None and isinstance(self.model, PreTrainedModel) and not is_sharded:
            self._load_from_checkpoint(checkpoint)
        else:
            super()._load_best_model()


def train(recipe: Recipe) -> Path:
    """
    Runs a recipe, or resumes an interrupted run. A finished run is left as it is.

    Returns:
        `Path`: `output_dir`, with model (or PEFT adapter) and processor.

    Raises:
        `ValueError`: See [`check_recipe`] and [`prepare_dataset`]; or the output folder holds something else, or the model
            lacks weights.
        `KeyboardInterrupt`: Ctrl-C. The message says where the same call resumes.
    """
    try:
        return _train(recipe)
    except KeyboardInterrupt as error:
        checkpoint = last_complete_checkpoint(Path(recipe.output_dir))
        if checkpoint is not None:
            remedy = f"Run the same command again: it resumes from {checkpoint}."
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
    arguments = build_training_arguments(recipe)
    is_main = arguments.process_index == 0
    set_seed(arguments.seed)

    processor = AutoProcessor.from_pretrained(recipe.model, trust_remote_code=False)
    samples = _prepare_samples(recipe, arguments, processor)
    base = _load_model(recipe)
    # LoRA's weights do not exist yet, and weights of 4 bits cannot be trained.
    train_only(base, [part for part in recipe.train if recipe.lora is None or part != "language_model"])
    features = _cache_features(recipe, arguments, base, processor, samples)
    checkpoint = last_complete_checkpoint(folder)
    model = base if recipe.lora is None else add_lora(base, recipe)
    counts = count_parameters(base)
    if is_main:
        _print_plan(recipe, arguments, samples, counts, checkpoint)
        write_text(folder / _STARTED, json.dumps(asdict(recipe), indent=1))
        check_space(recipe, arguments, counts, 0 if recipe.data.streaming else len(samples.train))
    if arguments.fsdp:
        _wrap_layers(arguments, base)
    trainer = RecipeTrainer(
        model,
        arguments,
        data_collator=Collator(processor, features),
        train_dataset=samples.train,
        eval_dataset=samples.evaluation,
        processor=processor,
    )
    if arguments.fsdp and arguments.world_size > 1 and not trainer.is_fsdp_enabled:
        raise ValueError("FSDP was asked for, but accelerate does not shard over processes of this kind of device.")
    with explaining_a_full_disk(folder):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        for settings in (base.config, base.config.text_config, base.generation_config):
            settings.use_cache = True  # the Trainer turns it off for itself
        trainer.save_model(str(folder))
    if is_main:
        if recipe.data.streaming:
            print(f"{folder}: {samples.report}", flush=True)
        parameters = {part: ParameterCount(*count) for part, count in counts.items()}
        log = trainer.state.log_history
        TrainingSummary(recipe, samples.report, log, parameters, samples.evaluation_report).write(folder)
    trainer.accelerator.wait_for_everyone()  # the next phase starts from these files
    return folder


def run_curriculum(recipes: Sequence[Recipe]) -> Path:
    """
    Runs recipes in turn. Each starts from the model of the one before. All are checked before the first begins.

    Raises:
        `ValueError`: See [`train`]; or LoRA comes before the last phase, two phases have one output folder, or phases of
            different dtypes share a cache of features.
    """
    if not recipes or not recipes[0].model:
        raise ValueError("A curriculum needs at least one recipe, and a model for the first. Give it with --model.")
    folders = [recipe.output_dir for recipe in recipes]
    if len(set(folders)) < len(folders):
        raise ValueError(f"Each phase needs an `output_dir` of its own, got {', '.join(folders)}.")
    if any(recipe.lora is not None for recipe in recipes[:-1]):
        raise ValueError("LoRA gives an adapter, and no phase can start from one: only the last may use it.")
    models = [recipes[0].model, *folders]
    recipes = [replace(recipe, model=model) for recipe, model in zip(recipes, models)]
    model_type = _model_type(models[0])
    dtypes: dict[str, torch.dtype | None] = {}
    for recipe in recipes:
        check_recipe(recipe, model_type)
        if recipe.cache_vision_features:
            dtype = half_precision(recipe)
            if dtypes.setdefault(recipe.cache_vision_features, dtype) != dtype:
                raise ValueError(
                    f"The phases share the cache {recipe.cache_vision_features}, but differ in `bf16` or `fp16`, which set "
                    "the dtype of its features. Set them alike, or give each phase its own cache."
                )
        if not _is_finished(recipe, Path(recipe.output_dir)):
            build_training_arguments(recipe)
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
    """Whether this recipe was run to its end in this folder. Raises `ValueError` if the folder has something else."""
    if not (folder / _STARTED).is_file():
        of_run = (_BAD_SAMPLES, _BAD_EVALUATION_SAMPLES, temporary_name(Path(_STARTED)).name)
        if folder.exists() and (not folder.is_dir() or any(path.name not in of_run for path in folder.iterdir())):
            raise ValueError(f"{folder} exists already and holds something else. Choose another `output_dir`.")
        return False
    is_finished = (folder / SUMMARY).is_file()
    if is_finished or last_complete_checkpoint(folder) is not None:
        started = _flat(json.loads((folder / _STARTED).read_text(encoding="utf-8")))
        asked = _flat(json.loads(json.dumps(asdict(recipe))))
        for key in sorted(started.keys() | asked.keys()):
            name = key.rpartition(".")[2]
            if started.get(key) != asked.get(key) and not name.startswith(_FREE):
                remedy = "Choose" if is_finished else "Go back to the former, or choose"
                raise ValueError(
                    f"{folder} was begun with `{key}` {started.get(key)!r}, not {asked.get(key)!r}. {remedy} another "
                    "`output_dir`."
                )
    return is_finished


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under keys with dots, without those that are `None`. An empty `lora` is kept."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def _wrap_layers(arguments: TrainingArguments, model: Any) -> None:
    """
    Lets FSDP shard layer by layer. By default it looks for all classes that tower and language model declare as not to be
    split, and fails for those of CLIP that this model does not have. The adapters stay in the root, since several layers
    use them.
    """
    settings: Any = arguments.fsdp_plugin_args  # type: ignore[attr-defined]
    layers = [*model.model.language_model.layers, *blocks_of(model.model.vision_tower)]
    names = sorted({type(layer).__name__ for layer in layers})
    settings.setdefault("transformer_cls_names_to_wrap", ",".join(names))


@dataclass
class _Samples:
    """The data of a run, as [`prepare_dataset`] gives it."""

    train: Any
    report: DataReport
    evaluation: Any = None
    evaluation_report: DataReport | None = None


def _prepare_samples(recipe: Recipe, arguments: TrainingArguments, processor: Any) -> _Samples:
    folder = Path(recipe.output_dir)
    with arguments.main_process_first(desc="preparing the data"):
        samples = _Samples(*_load_data(recipe.data, processor, folder / _BAD_SAMPLES))
        if recipe.evaluation_data is not None:
            samples.evaluation, samples.evaluation_report = _load_data(
                recipe.evaluation_data, processor, folder / _BAD_EVALUATION_SAMPLES
            )
    if recipe.data.streaming:
        samples.train = samples.train.shuffle(seed=arguments.seed, buffer_size=_SHUFFLED_AT_ONCE)
    return samples


def _load_data(settings: DataSettings, processor: Any, bad_samples_file: Path) -> tuple[Any, DataReport]:
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


def _cache_features(
    recipe: Recipe, arguments: TrainingArguments, model: Any, processor: Any, samples: _Samples
) -> VisionFeatureCache | None:
    """The cache that a recipe names, filled by the main process with the features of all samples."""
    if not recipe.cache_vision_features:
        return None
    with arguments.main_process_first(desc="computing vision features"):
        model.to(arguments.device)
        cache = VisionFeatureCache(recipe.cache_vision_features, model, processor, half_precision(recipe))
        if arguments.process_index == 0:
            with explaining_a_full_disk(cache.folder):
                for dataset in (samples.train, samples.evaluation):
                    if dataset is not None:
                        cache.fill(iterate_images(dataset))
    return cache


def _print_plan(
    recipe: Recipe,
    arguments: TrainingArguments,
    samples: _Samples,
    counts: dict[str, tuple[int, int]],
    checkpoint: Path | None,
) -> None:
    report = "samples are read while they are used" if recipe.data.streaming else samples.report
    print(f"{recipe.output_dir}: {report}")
    if samples.evaluation_report is not None:
        print(f"evaluation: {samples.evaluation_report}")
    print(describe_parameters(counts))
    if checkpoint is not None:
        print(f"resuming from {checkpoint}")
    at_once, passes = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    devices = recipe.global_batch_size // (at_once * passes)
    print(
        f"{recipe.global_batch_size} samples a step: {at_once} at once x {passes} passes x {devices} devices",
        flush=True,
    )


def _load_model(recipe: Recipe) -> Any:
    """The model in float32, as its trained weights must be kept. Mixed precision is the Trainer's."""
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
