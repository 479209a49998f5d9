"""Files and folders that are there complete or not at all, whenever the program ends."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to; what has been written there is on the disk before it gets its own name."""
    unfinished = temporary_name(path)
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder to write to, which then gets its own name: a new one, or that of an empty folder."""
    path = path.resolve()  # a link stays, and leads to the folder
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        unfinished = Path(scratch) / "unfinished"  # inside, for the outer one is closed to other users
        unfinished.mkdir()
        yield unfinished
        if path.is_dir():
            path.rmdir()
        unfinished.rename(path)


def write_text(path: Path, text: str) -> None:
    """UTF-8, in a folder that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def temporary_name(path: Path) -> Path:
    """What a file is called until it is complete."""
    return path.with_name(f".{path.name}.tmp")


def check_new_folder(folder: Path) -> None:
    """Raises `ValueError` rather than writing among files that are there already."""
    if folder.resolve() == Path.cwd():
        raise ValueError(f"{folder} is the current folder. Name a new one.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and is not an empty folder.")
