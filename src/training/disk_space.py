"""Disk space of a run: a disk without room is found before the first step, and one that gets full is named."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainingArguments

from ..common.errors import one_line
from .recipe import Recipe


_ROOM_FOR_SMALL_FILES = 1 << 20  # bytes


def check_space(
    recipe: Recipe, arguments: TrainingArguments, counts: dict[str, tuple[int, int]], num_samples: int
) -> None:
    """
    Checks that there is room for the trained model and for the checkpoints that lie beside it at the same time.

    Args:
        recipe ([`Recipe`]), arguments (`TrainingArguments`): Settings of the run.
        counts (`dict[str, tuple[int, int]]`): Trainable and frozen parameters of each part.
        num_samples (`int`): Samples of an epoch.

    Raises:
        `ValueError`: The disk of the output folder has too little room.
    """
    trained, frozen = (sum(count[index] for count in counts.values()) for index in (0, 1))
    weights = 4 * (trained if recipe.lora is not None else trained + frozen)
    checkpoint = weights + 8 * trained  # with the two moments of Adam
    if arguments.fsdp:  # writes the weights twice
        checkpoint += weights
    num_checkpoints = _count_checkpoints(arguments, math.ceil(num_samples / recipe.global_batch_size))
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


def _count_checkpoints(arguments: TrainingArguments, steps_of_epoch: int) -> int:
    """Checkpoints that a whole run writes."""
    if arguments.save_strategy == "no":
        return 0
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(steps_of_epoch * arguments.num_train_epochs)
    if arguments.save_strategy == "epoch":
        interval = steps_of_epoch
    else:
        interval = math.ceil(arguments.save_steps if arguments.save_steps >= 1 else arguments.save_steps * steps)
    return math.ceil(steps / max(interval, 1))


@contextmanager
def explaining_a_full_disk(folder: Path) -> Iterator[None]:
    """Says what to do when the disk of a folder is full. torch and safetensors have no error of their own for that."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError):  # raised by torch, or for the memory that processes share
            is_full = shutil.disk_usage(folder).free < _ROOM_FOR_SMALL_FILES
        else:
            is_full = "No space left" in str(error)
        if not is_full:
            raise
        raise ValueError(
            f"The disk of {folder} is full ({one_line(error)}). Free some of it and start again: complete files there are "
            "used, and nothing else is lost."
        ) from error
