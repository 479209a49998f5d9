"""LoRA adapters, as `ta-llava train --lora` writes them: recognises them, finds their model, and merges them into it."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file, has_file

from .errors import how_to_install, one_line, why_not_loaded
from .sources import check_source


def is_adapter(source: str | Path) -> bool:
    """Whether a folder or Hub repo has a PEFT adapter and no model beside it."""
    if Path(source).exists():
        return (Path(source) / ADAPTER_CONFIG_NAME).is_file() and not (Path(source) / CONFIG_NAME).is_file()
    try:
        check_source(source)
        return has_file(str(source), ADAPTER_CONFIG_NAME) and not has_file(str(source), CONFIG_NAME)
    except Exception:  # the network, the Hub or the name; loading it as a model says what is wrong
        return False


def model_of_adapter(adapter: str | Path, model: str | None = None) -> str:
    """
    Folder or Hub repo of the model that an adapter was trained on.

    Args:
        adapter (`str` or `Path`): Folder or Hub repo of the adapter.
        model (`str`, *optional*): Use this model instead of the one that the adapter names.

    Raises:
        `ValueError`: peft is not installed, the adapter is not a LoRA adapter, its weights are pickles, or there is no such
            model.
    """
    try:
        from peft import PeftConfig, PeftType
        from peft.utils import SAFETENSORS_WEIGHTS_NAME
    except ImportError as error:
        raise ValueError(
            f"{adapter} is an adapter, which needs peft: {how_to_install('train')}. Or merge it into its model where peft "
            f"is installed: `ta-llava merge {adapter} OUT`."
        ) from error
    check_source(adapter)
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (ValueError, OSError) as error:
        raise ValueError(f"{adapter} is no PEFT adapter: {one_line(error)}") from error
    if config.peft_type != PeftType.LORA:  # other kinds name further files, which may be pickles
        raise ValueError(f"{adapter} is an adapter of kind {config.peft_type}; only LoRA is merged.")
    source = model or config.base_model_name_or_path
    if not source:
        raise ValueError(
            f"{adapter} does not name its model. Give it with `ta-llava merge {adapter} OUT --model MODEL`."
        )
    try:
        check_source(source)
    except ValueError as error:
        raise ValueError(
            f"{adapter} is an adapter of {source}: {error} Name its model with `ta-llava merge {adapter} OUT --model MODEL`."
        ) from error
    if not has_file(adapter, SAFETENSORS_WEIGHTS_NAME):
        raise ValueError(
            f"{adapter} has no {SAFETENSORS_WEIGHTS_NAME}, and only safetensors are read: pickles can run code."
        )
    return source


def merge_into(base: Any, adapter: str | Path, source: str) -> Any:
    """
    Merges an adapter into the weights of `base`, a model that was loaded from `source`.

    Raises:
        `ValueError`: The adapter is damaged, or does not fit the model.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    try:
        adapted = PeftModel.from_pretrained(base, str(adapter))
        with safe_open(cached_file(adapter, SAFETENSORS_WEIGHTS_NAME), framework="pt") as weights:
            saved = set(weights.keys())
    except (SafetensorError, RuntimeError, ValueError) as error:  # other sizes, other modules
        raise ValueError(f"{adapter} does not fit {source}: {why_not_loaded(error)}") from error
    if different := sorted(get_peft_model_state_dict(adapted).keys() ^ saved):
        raise ValueError(
            f"{adapter} does not fit {source}: {len(different)} weights are missing or left over, such as {different[0]!r}."
        )
    return adapted.merge_and_unload()
