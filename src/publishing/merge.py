"""Merges a LoRA adapter into its model, as a folder of its own."""

import shutil
from pathlib import Path

from transformers import AutoProcessor
from transformers.utils import cached_file, has_file

from ..common.adapters import merge_into, model_of_adapter
from ..common.files import atomic_folder, check_new_folder, write_text
from ..common.loading import load_complete
from ..training.parts import PARTS
from ..training.summary import SUMMARY
from .existing_card import CARD
from .model_card import write_model_card


def merge_adapter(adapter: str | Path, out: str | Path, model: str | None = None) -> None:
    """
    Merges a PEFT adapter into its model and saves that as a folder of its own, with a model card.

    Args:
        adapter (`str` or `Path`): Folder or Hub repo of the adapter.
        out (`str` or `Path`): New folder.
        model (`str`, *optional*): The model it was trained on. Defaults to the one that the adapter names.

    Raises:
        `ValueError`: `out` is not new; `adapter` is not a LoRA adapter, is damaged, or does not fit its model; or the model
            is missing or lacks weights.
    """
    out = Path(out)
    check_new_folder(out)
    source = model_of_adapter(adapter, model)
    base = load_complete(source, dtype="auto")
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    merged = merge_into(base, adapter, source)
    with atomic_folder(out) as unfinished:
        merged.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        # For the model card, which replaces the form that PEFT leaves to fill in.
        if has_file(str(adapter), SUMMARY):
            shutil.copyfile(str(cached_file(str(adapter), SUMMARY)), unfinished / SUMMARY)
        if merged.config.model_type in PARTS:
            write_text(unfinished / CARD, write_model_card(unfinished, out.resolve().name))
