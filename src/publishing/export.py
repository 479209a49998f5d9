"""Writes a model as a folder that loads anywhere: weights, config, processor, their code, and a model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from transformers import AutoProcessor
from transformers.utils import has_file, logging

from ..common.errors import one_line
from ..common.families import COMPRESSED_TYPES
from ..common.files import atomic_folder, check_new_folder
from ..common.loading import check_processor, config_of, load_complete, loading_from
from ..configuration_ta_llava import TaLlavaConfig
from .evaluations import write_eval_results
from .existing_card import CARD, find_card, is_unedited, tells_same_training
from .model_card import write_model_card


def export_model(
    model: str | Path, folder: str | Path, results: Sequence[str | Path] = (), overwrite_card: bool = False
) -> None:
    """
    Copies a TA-LLaVA, or a LLaVA with VMTC and CMAI, from a folder or Hub repo to a folder from which `AutoConfig`,
    `AutoModel`, `AutoModelForImageTextToText`, `AutoProcessor` and `pipeline` load it with `trust_remote_code=True`,
    where this package is not installed. The folder appears when it is complete.

    Args:
        model (`str` or `Path`): Folder or Hub repo.
        folder (`str` or `Path`): New folder.
        results (`Sequence`): Results for the model card, see [`write_model_card`].
        overwrite_card (`bool`): Write a new model card even if `model` has a `README.md`. By default, that one is copied; an
            unedited one is written anew if there are `results`.

    Raises:
        `ValueError`: `folder` is not new; `model` is neither of the two, or lacks weights; there are `results`, but its
            `README.md` was edited, or tells of training that a new one would not; or the `results` cannot be used.
    """
    folder = Path(folder)
    check_new_folder(folder)
    processor, files = check_export(model, folder.resolve().name, results, overwrite_card)
    write_export(model, processor, files, folder)


def check_export(
    model: str | Path, name: str, results: Sequence[str | Path] = (), overwrite_card: bool = False
) -> tuple[Any, dict[str, str]]:
    """
    Prepares what [`export_model`] writes to a folder called `name`, so that errors are found before weights are loaded.
    Arguments and errors are those of `export_model`.

    Returns:
        The processor, and the content of the model card and of the scores on benchmarks, by path.
    """
    processor = _load_processor(model)
    files = write_eval_results(model, results)
    card = None if overwrite_card else find_card(model)
    if card and results and not is_unedited(card):
        raise ValueError(
            f"{model} has a {CARD} that was edited, so the results cannot be added to it. Add --overwrite-card to write a "
            "new one."
        )
    if card:
        try:
            ModelCard(card)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"The metadata in the {CARD} of {model} is not YAML: {one_line(error)}") from error
    if card and not results:
        return processor, {**files, CARD: card}
    new_card = write_model_card(model, name, results)
    if card and not tells_same_training(card, new_card):
        raise ValueError(
            f"{model} has a {CARD} that tells of its training. A new one with the results would not, since training is "
            "recorded only in the folder that was trained. Use --results with that folder, or --overwrite-card to do "
            "without."
        )
    return processor, {**files, CARD: new_card}


def write_export(model: str | Path, processor: Any, files: dict[str, str], folder: Path) -> None:
    """
    Writes `folder`, complete or not at all. `processor` and `files` are those of [`check_export`].

    Raises:
        `ValueError`: The model lacks weights, or they cannot be loaded.
    """
    weights = load_complete(model, dtype="auto")
    with atomic_folder(folder) as unfinished:
        has_bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # loading has shown one already
        try:
            # The library cannot undo its reading of quantised weights, so they are saved by the names that it gave them.
            weights.save_pretrained(unfinished, save_original_format=not getattr(weights, "is_quantized", False))
        finally:
            if has_bars:
                logging.enable_progress_bar()
        processor.save_pretrained(unfinished)
        for path, content in files.items():
            (unfinished / path).parent.mkdir(exist_ok=True)
            (unfinished / path).write_bytes(content.encode())  # its line breaks unchanged


def _load_processor(model: str | Path) -> Any:
    """
    The processor of a model that can be exported.

    Raises:
        `ValueError`: There is no processor, or the model cannot be exported.
    """
    with loading_from(model):
        has_adapter = has_file(str(model), "adapter_config.json")
    if has_adapter:  # it would be loaded too, and only the adapter would be saved
        raise ValueError(f"{model} has a PEFT adapter. Merge it into its model first, with `ta-llava merge`.")
    config = config_of(model)
    known = (TaLlavaConfig.model_type, *COMPRESSED_TYPES)
    if config.model_type not in known:
        raise ValueError(
            f"{model} is a {config.model_type!r} model, not a {', '.join(map(repr, known[:-1]))} or {known[-1]!r}. "
            "`ta-llava compress` makes one from a LLaVA."
        )
    with loading_from(model):
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    check_processor(processor, model)
    return processor
