"""Writes models as folders that load anywhere: weights, config, processor and the code that defines them."""

from pathlib import Path

from transformers import AutoConfig, AutoProcessor

from .configuration_ta_llava import TaLlavaConfig
from .modeling_ta_llava import TaLlavaForConditionalGeneration


def check_new_folder(folder: Path) -> None:
    """Raises `ValueError` rather than writing among files that are there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and is not an empty folder.")


def export_model(model: str | Path, folder: str | Path) -> None:
    """
    Copies a TA-LLaVA, from a folder or Hub repo, to a folder from which `AutoConfig`, `AutoModel`,
    `AutoModelForImageTextToText`, `AutoProcessor` and `pipeline` load it with `trust_remote_code=True`, where this
    package is not installed.

    Raises:
        `ValueError`: `folder` is not new, or `model` is no TA-LLaVA.
    """
    folder = Path(folder)
    check_new_folder(folder)
    config = AutoConfig.from_pretrained(model)
    if config.model_type != TaLlavaConfig.model_type:
        raise ValueError(f"{model} is a {config.model_type!r} model, not a {TaLlavaConfig.model_type!r}.")
    processor = AutoProcessor.from_pretrained(model)
    TaLlavaForConditionalGeneration.from_pretrained(model, dtype="auto").save_pretrained(folder)
    processor.save_pretrained(folder)
