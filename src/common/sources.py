"""Names of models: a folder that is here, or a repo that can be on the Hub. Needs no heavy import."""

import re
from pathlib import Path


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
