"""Writes models as folders that load anywhere: weights, config, processor, the code that defines them, and a model card."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .configuration_ta_llava import TaLlavaConfig
from .error_messages import one_line
from .model_card import CARD, find_card, write_model_card
from .vmtc_cmai_patch import VmtcCmaiLlavaConfig


def check_new_folder(folder: Path) -> None:
    """Raises `ValueError` rather than writing among files that are there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and is not an empty folder.")


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
        overwrite_card (`bool`): Write a model card also where `model` has a `README.md`, which is copied otherwise.

    Raises:
        `ValueError`: `folder` is not new; `model` is neither of them, or lacks weights; its `README.md` has no place for
            `results`, or these are none.
    """
    folder = Path(folder)
    check_new_folder(folder)
    processor, card = check_export(model, folder.resolve().name, results, overwrite_card)
    write_export(model, processor, card, folder)


def check_export(
    model: str | Path, name: str, results: Sequence[str | Path] = (), overwrite_card: bool = False
) -> tuple[Any, str]:
    """
    The processor and the model card of what [`export_model`] writes to a folder called `name`: what can be wrong with
    them is found before weights are loaded. Arguments and errors are those of `export_model`.
    """
    processor = _load_processor(model)
    card = None if overwrite_card else find_card(model)
    if card is not None and results:
        raise ValueError(
            f"{model} has a {CARD}, into which the results would not go. With --overwrite-card a new one is written."
        )
    return processor, card or write_model_card(model, name, results)


def write_export(model: str | Path, processor: Any, card: str, folder: Path) -> None:
    """
    Writes `folder`, when all is there.

    Raises:
        `ValueError`: The model lacks weights.
    """
    weights, info = AutoModelForImageTextToText.from_pretrained(
        model, dtype="auto", trust_remote_code=False, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{model} lacks {len(missing)} weights, such as {missing[0]!r}.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        unfinished = Path(scratch) / "model"
        weights.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        (unfinished / CARD).write_text(card, encoding="utf-8")
        if folder.is_dir():  # empty
            folder.rmdir()
        unfinished.rename(folder)


def _load_processor(model: str | Path) -> Any:
    """
    The processor of a model that can be exported.

    Raises:
        `ValueError`: There is none, or it is another model.
    """
    if (Path(model) / "adapter_config.json").is_file():
        raise ValueError(f"{model} is a PEFT adapter. Merge it into its model first, with `ta-llava merge`.")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # of the network, the Hub, or files that may be damaged in any way
        raise ValueError(
            f"There is no model in {str(model)!r}, a folder here or a repo on the Hub: {one_line(error)}"
        ) from error
    if config.model_type not in (TaLlavaConfig.model_type, VmtcCmaiLlavaConfig.model_type):
        raise ValueError(
            f"{model} is a {config.model_type!r} model, not a {TaLlavaConfig.model_type!r} or "
            f"{VmtcCmaiLlavaConfig.model_type!r}. Of a LLaVA `ta-llava compress` makes one."
        )
    return AutoProcessor.from_pretrained(model, trust_remote_code=False)
