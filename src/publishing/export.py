"""Writes models as folders that load anywhere: weights, config, processor, the code that defines them, and a model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import has_file, logging

from ..common.errors import one_line
from ..common.files import check_new_folder, complete_folder_or_not_at_all
from ..common.loading import check_complete, check_processor, config_of, loading_from
from ..configuration_ta_llava import TaLlavaConfig
from ..vmtc_cmai_patch import VmtcCmaiLlavaConfig
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
        results (`Sequence`): For the model card, see [`write_model_card`].
        overwrite_card (`bool`): Write a model card also where `model` has a `README.md`. Otherwise that is copied or, if
            it is as this package wrote it and there are `results`, written anew with them.

    Raises:
        `ValueError`: `folder` is not new; `model` is neither of them, or lacks weights; there are `results`, but its
            `README.md` was edited, or tells of training that a new one would not; or the `results` are none.
    """
    folder = Path(folder)
    check_new_folder(folder)
    processor, files = check_export(model, folder.resolve().name, results, overwrite_card)
    write_export(model, processor, files, folder)


def check_export(
    model: str | Path, name: str, results: Sequence[str | Path] = (), overwrite_card: bool = False
) -> tuple[Any, dict[str, str]]:
    """
    Of what [`export_model`] writes to a folder called `name` the processor, and the content by path of the model card and
    of the scores on benchmarks: what can be wrong with them is found before weights are loaded. Arguments and errors are
    those of `export_model`.
    """
    processor = _load_processor(model)
    files = write_eval_results(model, results)
    card = None if overwrite_card else find_card(model)
    if card and results and not is_unedited(card):
        raise ValueError(
            f"{model} has a {CARD} that was edited, into which the results would not go. With --overwrite-card a new one "
            "is written."
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
            f"{model} has a {CARD} that tells of its training, of which a new one with the results would not: that is "
            "recorded only in the folder that was trained. Give --results with that folder; or --overwrite-card, to do "
            "without."
        )
    return processor, {**files, CARD: new_card}


def write_export(model: str | Path, processor: Any, files: dict[str, str], folder: Path) -> None:
    """
    Writes `folder`, when all is there. `processor` and `files` are those of [`check_export`].

    Raises:
        `ValueError`: The model lacks weights, or they cannot be loaded.
    """
    with loading_from(model):
        weights, info = AutoModelForImageTextToText.from_pretrained(
            model, dtype="auto", trust_remote_code=False, output_loading_info=True
        )
    check_complete(str(model), info["missing_keys"])
    with complete_folder_or_not_at_all(folder) as unfinished:
        has_bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # a second one, after that of loading
        try:
            # The library cannot undo how it read quantised weights; unlike others, they have the names that it gave them.
            weights.save_pretrained(unfinished, save_original_format=not getattr(weights, "is_quantized", False))
        finally:
            if has_bars:
                logging.enable_progress_bar()
        processor.save_pretrained(unfinished)
        for path, content in files.items():
            (unfinished / path).parent.mkdir(exist_ok=True)
            (unfinished / path).write_bytes(content.encode())  # with the line breaks that it has


def _load_processor(model: str | Path) -> Any:
    """
    The processor of a model that can be exported.

    Raises:
        `ValueError`: There is none, or it is another model.
    """
    with loading_from(model):
        has_adapter = has_file(str(model), "adapter_config.json")
    if has_adapter:  # it would be loaded too, and then be all that is saved
        raise ValueError(f"{model} has a PEFT adapter. Merge it into its model first, with `ta-llava merge`.")
    config = config_of(model)
    if config.model_type not in (TaLlavaConfig.model_type, VmtcCmaiLlavaConfig.model_type):
        raise ValueError(
            f"{model} is a {config.model_type!r} model, not a {TaLlavaConfig.model_type!r} or "
            f"{VmtcCmaiLlavaConfig.model_type!r}. Of a LLaVA `ta-llava compress` makes one."
        )
    with loading_from(model):
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    check_processor(processor, model)
    return processor
