"""Files and folders that appear complete or not at all, whenever the program ends."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to. The file gets its own name when its content is on the disk."""
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
    """Gives an empty folder to write to. It then becomes `path`, which must be new or an empty folder."""
    path = path.resolve()  # a link stays, and leads to the folder
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        unfinished = Path(scratch) / "unfinished"  # inside, because other users may not read the outer folder
        unfinished.mkdir()
        yield unfinished
        if path.is_dir():
            path.rmdir()
        unfinished.rename(path)


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8, as [`atomic_file`] does. A missing folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def temporary_name(path: Path) -> Path:
    """The path of a file while [`atomic_file`] writes it."""
    return path.with_name(f".{path.name}.tmp")


def check_new_folder(folder: Path) -> None:
    """Raises `ValueError` if a folder has files in it already, or is the current one."""
    if folder.resolve() == Path.cwd():
        raise ValueError(f"{folder} is the current folder. Name a new one.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and is not an empty folder.")
