"""Writes models as folders that load anywhere: weights, config, processor and the code that defines them."""

from pathlib import Path

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .configuration_ta_llava import TaLlavaConfig
from .vmtc_cmai_patch import VmtcCmaiLlavaConfig


def check_new_folder(folder: Path) -> None:
    """Raises `ValueError` rather than writing among files that are there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and is not an empty folder.")


def export_model(model: str | Path, folder: str | Path) -> None:
    """
    Copies a TA-LLaVA, or a LLaVA with VMTC and CMAI, from a folder or Hub repo to a folder from which `AutoConfig`,
    `AutoModel`, `AutoModelForImageTextToText`, `AutoProcessor` and `pipeline` load it with `trust_remote_code=True`,
    where this package is not installed.

    Raises:
        `ValueError`: `folder` is not new, or `model` is neither of them.
    """
    folder = Path(folder)
    check_new_folder(folder)
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    if config.model_type not in (TaLlavaConfig.model_type, VmtcCmaiLlavaConfig.model_type):
        raise ValueError(
            f"{model} is a {config.model_type!r} model, not a {TaLlavaConfig.model_type!r} or "
            f"{VmtcCmaiLlavaConfig.model_type!r}. Of a LLaVA `ta-llava compress` makes one."
        )
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    AutoModelForImageTextToText.from_pretrained(model, dtype="auto", trust_remote_code=False).save_pretrained(folder)
    processor.save_pretrained(folder)
