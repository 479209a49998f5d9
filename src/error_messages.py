"""What error messages of the tooling share."""

from safetensors import SafetensorError


def one_line(error: BaseException) -> str:
    """The text of an error without its line breaks, shortened; its kind, if it has no text."""
    return " ".join(str(error).split())[:500] or type(error).__name__


def why_not_loaded(error: BaseException) -> str:
    """What is wrong with the files of a model, from what loading them raised."""
    if isinstance(error, SafetensorError):
        return f"its weights are damaged or cut off ({one_line(error)}). Get their files again."
    return one_line(error)
