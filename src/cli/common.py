"""What commands share: options, errors as messages, and checks that come before torch and transformers are imported."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..common.sources import check_source
from ..encoded_images import encoded_bytes, shorten


# --- options -------------------------------------------------------------------------------------------------------

OutFolder = Annotated[Path, typer.Argument(help="New folder to write.", show_default=False)]
VisualTokens = Annotated[
    int | None,
    typer.Option(
        help="Turn VMTC on and keep this many visual tokens per image, or per view if the model cuts images into views. For "
        "LLaVA models only.",
        show_default=False,
    ),
]
Cmai = Annotated[
    float | None,
    typer.Option(
        help="Turn CMAI on and inhibit this share of the image tokens, in (0, 1], in the last layer; 0 turns CMAI off. For "
        "LLaVA models only. Settings you don't pass are unchanged.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Number of questions to answer at a time. It does not change the answers.")
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the model with torch.compile, on a GPU as CUDA graphs. The first answers take minutes, later ones "
        "less time. Answers change by no more than rounding.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")]


# --- errors --------------------------------------------------------------------------------------------------------


@contextmanager
def errors_as_messages(extra: str = "train") -> Iterator[None]:
    """
    Turns an error in the user's input into one line on stderr and exit code 1, instead of a traceback. A package that is
    not installed is named with the `extra` that has it. Ctrl-C gives exit code 130.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if is_main_process():
            typer.echo(f"Interrupted. {error}".rstrip(), err=True)
        raise typer.Exit(130) from error
    except ModuleNotFoundError as error:
        from ..common.errors import how_to_install

        typer.echo(f"error: {error}. What this command needs is in an extra: {how_to_install(extra)}.", err=True)
        raise typer.Exit(1) from error
    except (ValueError, OSError, _config_error()) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error


def _config_error() -> type[Exception]:
    """What a config raises for a wrong value. Its import takes as long as all others of a command that has no error."""
    from huggingface_hub.errors import StrictDataclassError

    return StrictDataclassError


def is_main_process() -> bool:
    """Whether this process prints: it is the only one, or the first of several that train together."""
    return os.environ.get("RANK", "0") == "0"


# --- checks --------------------------------------------------------------------------------------------------------


def check_exists(*paths: Path | None) -> None:
    """Raises `ValueError` for a path to nothing; `None` is a path that was not given."""
    for path in paths:
        if path is not None and not path.exists():
            raise ValueError(f"There is no file or folder {path}.")


def check_sources(*sources: str | None) -> None:
    """Raises `ValueError` for a model that is no folder and no possible Hub repo; `None` is one that was not given."""
    for source in sources:
        if source is not None:
            check_source(source)


def check_image(image: str) -> None:
    """Raises `ValueError` for what is no URL, no path and no image in base64. It need not be a readable image."""
    if "://" in image or os.path.exists(image) or encoded_bytes(image) is not None:
        return
    raise ValueError(f"There is no image file {shorten(image)!r}, and it is no URL or base64-encoded image.")


def read_text(path: Path) -> str:
    """
    Raises:
        `ValueError`: There is no such file, or it is not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {path}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}.") from error
