"""Names of models: a folder that is here, or a repo that can be on the Hub. This file needs no heavy import."""

import re
from pathlib import Path


REPO_NAME = r"\w[\w.-]*/[\w.-]+"


def is_repo_name(name: str) -> bool:
    """Whether a repo on the Hub can have this name, `USER/NAME`."""
    return re.fullmatch(REPO_NAME, name) is not None


def check_source(source: str | Path) -> None:
    """
    Checks that a model is a folder here or can be a repo on the Hub. It saves the library from asking the Hub, again and
    again where it cannot be reached, for a name that no repo has.

    Raises:
        `ValueError`: There is no such folder, and no repo can be meant: the name has another form, or its parent is a folder
            here.
    """
    name = str(source)
    if Path(name).exists():
        return
    if not is_repo_name(name):
        raise ValueError(f"There is no folder {name!r}, and a repo on the Hub is called USER/NAME.")
    if Path(name).parent.is_dir():
        parent = str(Path(name).parent)
        raise ValueError(
            f"There is no folder {name!r}. If you mean a repo on the Hub, start this where there is no folder {parent!r}."
        )
