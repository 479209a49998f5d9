"""What the tooling shares where a model is named that is not there, or not as it must be."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from .safe_loading import load_config


ADAPTER_CONFIG = "adapter_config.json"  # of PEFT


def one_line(error: BaseException) -> str:
    """The text of an error without its line breaks, shortened; its kind, if it has no text."""
    return " ".join(str(error).split())[:1000] or type(error).__name__


def why_not_loaded(error: BaseException) -> str:
    """What is wrong with the files of a model, from what loading them raised."""
    if isinstance(error, SafetensorError):
        return f"its weights are damaged or cut off ({one_line(error)}). Get their files again."
    return one_line(error)


def how_to_install(extra: str) -> str:
    """How an extra of this package is installed, from its source or where the package is installed already."""
    return f"`pip install -e '.[{extra}]'` in a clone, or `pip install 'ta-llava[{extra}]'` where it is installed"


def check_source(source: str | Path) -> None:
    """
    Checks that what a user names as a model is here or can be a repo on the Hub, which would be asked for it, again and
    again where it cannot be reached.

    Raises:
        `ValueError`: There is no such folder. In a folder that is here it is looked for here only.
    """
    name = str(source)
    if Path(name).exists():
        return
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ValueError(f"There is no folder {name!r}, and a repo on the Hub is called USER/NAME.")
    if Path(name).parent.is_dir():
        parent = str(Path(name).parent)
        raise ValueError(
            f"There is no folder {name!r}. If a repo on the Hub is meant, start this where there is no folder {parent!r}."
        )


def check_complete(what: str, missing: Iterable[str]) -> None:
    """
    Checks that a model has all its weights: the library makes up those that are missing, and only logs it.

    Args:
        what (`str`): The model, for the message.
        missing (`Iterable[str]`): The `missing_keys` of `output_loading_info`.

    Raises:
        `ValueError`: It lacks some.
    """
    if names := sorted(missing):
        raise ValueError(
            f"{what} lacks {len(names)} weights, such as {names[0]!r}, and would work with random ones. Are files missing, "
            "or is config.json that of another model?"
        )


@contextmanager
def loading_from(source: str | Path) -> Iterator[None]:
    """
    What goes wrong while a model is loaded from a folder or Hub repo, as a `ValueError` that names it; see also
    [`check_source`].
    """
    check_source(source)
    try:
        yield
    except Exception as error:  # of the network, the Hub, or files that may be missing or damaged in any way
        taken_for = "" if Path(source).exists() else " (there is no such folder, so a repo on the Hub is meant)"
        raise ValueError(
            f"No model could be loaded from {str(source)!r}{taken_for}: {why_not_loaded(error)}"
        ) from error


def config_of(source: str | Path) -> Any:
    """
    The config of a model.

    Args:
        source (`str` or `Path`): Folder, `config.json` or Hub repo.

    Raises:
        `ValueError`: See [`check_source`]; none can be read there; or it is an adapter, or one of original code, see
            [`check_format`].
    """
    folder = Path(source)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"{source} is an adapter, not a model. Merge it into its model: `ta-llava merge {source} OUT`."
        )
    with loading_from(source):
        check_format(PreTrainedConfig.get_config_dict(source)[0])
        return load_config(source)


def check_format(settings: dict[str, Any]) -> None:
    """
    Checks that a `config.json` is none of the original code of LLaVA or TA-LLaVA: of LLaVA's, transformers knows no field
    and would take sizes of its own.

    Raises:
        `ValueError`: It is; the message, which does not name it, says how to convert the checkpoint.
    """
    if settings.get("model_type") == "tallava_gemma":
        raise ValueError(
            "it is a checkpoint of the authors' TA-LLaVA code. Convert it with `ta-llava convert-original FOLDER OUT "
            "--vision-tower TOWER`."
        )
    field = next((key for key in settings if key.startswith("mm_")), None)
    if field is not None and "text_config" not in settings:
        raise ValueError(
            f"it is a checkpoint of the original LLaVA code (its config.json has `{field}`), not one of transformers. Take "
            "a converted one, such as llava-hf/llava-1.5-7b-hf, or convert it with convert_llava_weights_to_hf.py from "
            "the source of transformers (src/transformers/models/llava)."
        )
