"""What the tooling shares where a model is named that is not there, or not as it must be."""

from safetensors import SafetensorError


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
