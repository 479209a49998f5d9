"""Texts of errors: what went wrong, in one line, and what to install."""

import re

from safetensors import SafetensorError


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks, at most 1000 characters. If it has no text, the name of its class."""
    return " ".join(str(error).split())[:1000] or type(error).__name__


def why_refused(error: BaseException) -> str:
    """What a config has against a value, in one line: the cause of its error, with the name of the field."""
    cause = one_line(error.__cause__ or error)
    field = re.match(r"Validation error for field '(\w+)'", str(error))
    return f"`{field[1]}` {cause}" if field and cause.startswith("must be") else cause


def why_not_loaded(error: BaseException) -> str:
    """Says what is wrong with the files of a model, given the error that loading them raised."""
    if isinstance(error, SafetensorError):
        return f"its weights are damaged or cut off ({one_line(error)}). Get their files again."
    return one_line(error)


def how_to_install(extra: str) -> str:
    """Says how to install an extra of this package, both in a clone and where the package is installed."""
    return f"`pip install -e '.[{extra}]'` in a clone, or `pip install 'ta-llava[{extra}]'` where it is installed"
