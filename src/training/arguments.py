"""The arguments of the Trainer that follow from a recipe."""

import os
import warnings
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from ..common.errors import one_line
from ..common.precision import has_fast_bfloat16
from ..library_versions import checkpointing_argument
from .recipe import Recipe, accumulation_steps


def build_training_arguments(recipe: Recipe) -> TrainingArguments:
    """
    Arguments of the Trainer: those of the recipe, and what follows from the rest of it.

    Raises:
        `ValueError`: An argument is not possible, or does not go with the others.
    """
    settings: dict[str, Any] = {
        "use_cpu": not torch.accelerator.is_available(),
        "ddp_timeout": 24 * 3600,  # while the first process prepares the data, the others wait
        # The model gives every parameter a gradient, except those of the tower's blocks behind its features.
        "ddp_find_unused_parameters": "vision_tower" in recipe.train,
        "eval_strategy": "no" if recipe.evaluation_data is None else "epoch",
        **recipe.training_arguments,
    }
    settings = {checkpointing_argument(name): value for name, value in settings.items()}
    if "gradient_accumulation_steps" in settings:
        raise ValueError("`gradient_accumulation_steps` follows from `global_batch_size`; leave it out of the recipe.")
    if recipe.data.streaming:
        # Each process reads all samples and takes its share. Workers would each do so again.
        settings |= {"dataloader_num_workers": 0, "accelerator_config": {"dispatch_batches": False}}
    num_devices = int(os.environ.get("WORLD_SIZE", "1"))
    if num_devices == 1 and not settings["use_cpu"]:  # one process uses all devices
        num_devices = max(torch.accelerator.device_count(), 1)
    batch_size = settings.setdefault("per_device_train_batch_size", 8)
    # Set before the arguments are built: DeepSpeed's config takes the number from them at once.
    settings["gradient_accumulation_steps"] = accumulation_steps(recipe, batch_size, num_devices)
    try:
        arguments = TrainingArguments(output_dir=recipe.output_dir, remove_unused_columns=False, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`training_arguments` are not possible: {one_line(error)}") from error
    _check_sharding(recipe, arguments)
    if arguments.bf16 and arguments.use_cpu and not has_fast_bfloat16():
        warnings.warn(
            "This CPU multiplies in bfloat16 many times slower than in float32: set `training_arguments.bf16=false`.",
            stacklevel=2,
        )
    return arguments


def _check_sharding(recipe: Recipe, arguments: TrainingArguments) -> None:
    """Raises `ValueError` for settings that do not go with FSDP or DeepSpeed."""
    state_dict_type = (getattr(arguments, "fsdp_plugin_args", None) or {}).get("state_dict_type", "FULL_STATE_DICT")
    if state_dict_type != "FULL_STATE_DICT":
        raise ValueError(
            f'`state_dict_type` of FSDP must be "FULL_STATE_DICT", to save a model, got {state_dict_type!r}.'
        )
    if recipe.cache_vision_features and is_deepspeed_zero3_enabled():
        raise ValueError("With ZeRO-3 no process has the whole vision tower: leave out `cache_vision_features`.")
    # All processes must gather the shards of the same weights. For a batch without an image the model runs the tower for
    # that reason, but only in training, and not if other batches have cached features.
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


def half_precision(recipe: Recipe) -> torch.dtype | None:
    """The dtype of mixed precision, if the recipe has it on."""
    arguments = recipe.training_arguments
    return torch.bfloat16 if arguments.get("bf16") else torch.float16 if arguments.get("fp16") else None
