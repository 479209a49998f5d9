"""What a `README.md` that exists tells: whether somebody edited it, which commit its example loads, what it records."""

import hashlib
import json
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from transformers.utils import logging


logger = logging.get_logger(__name__)

CARD = "README.md"

# The line of the card's example that names what is loaded.
_PIN = re.compile(r'^repo, revision = ".*", "(.*)"(?=\r?$)', re.MULTILINE)
# The last line, which has a digest of the others.
_SEAL = re.compile(r"\n<!-- ta-llava (\w+): `ta-llava push` writes this card anew unless it was edited -->\n$")
# The description in the form that `push_to_hub` of transformers writes.
_BLANK = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)


# --- where it is ---------------------------------------------------------------------------------------------------


def find_card(model: str | Path) -> str | None:
    """
    The `README.md` of a folder or Hub repo, or `None` if there is none or it is blank. If a repo cannot be reached and its
    card was not downloaded before, there is none, with a warning.
    """
    path = Path(model) / CARD
    if Path(model).is_dir():
        return _unless_blank(read_utf8(path)) if path.is_file() else None
    try:
        return download_card(str(model))
    except LocalEntryNotFoundError:
        logger.warning(f"The {CARD} of {model} cannot be downloaded now, so a new one is written.")
        return None


def download_card(repo_id: str, revision: str | None = None) -> str | None:
    """The `README.md` of a Hub repo, or `None` if there is none or it is blank."""
    try:
        return _unless_blank(read_utf8(Path(hf_hub_download(repo_id, CARD, revision=revision))))
    except RemoteEntryNotFoundError:
        return None


def read_utf8(path: Path) -> str:
    """The text of a file, its line breaks unchanged. Raises `ValueError` if it is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8. Save it as UTF-8.") from error


def _unless_blank(card: str) -> str | None:
    """The card, or `None` if it is the form of `push_to_hub` that nobody has filled in."""
    if _BLANK not in card:
        return card
    blank = ModelCard.from_template(ModelCardData(), model_description=_BLANK)
    return None if ModelCard(card).text.split() == blank.text.split() else card


# --- whether it was edited -----------------------------------------------------------------------------------------


def seal(card: str) -> str:
    """A new card with a last line that shows later whether it was edited."""
    return f"{card}\n<!-- ta-llava {_digest(card)}: `ta-llava push` writes this card anew unless it was edited -->\n"


def is_unedited(card: str) -> bool:
    """Whether a card is as [`seal`] left it. [`pin_revision`] and other line breaks don't count as edits."""
    card = card.replace("\r\n", "\n")
    match = _SEAL.search(card)
    return match is not None and match[1] == _digest(card[: match.start()])


def _digest(card: str) -> str:
    return hashlib.sha256(_PIN.sub("", card).encode()).hexdigest()[:16]


# --- which commit its example loads --------------------------------------------------------------------------------


def pin_line(repo_id: str, revision: str) -> str:
    """The line of the example that names what is loaded."""
    return f"repo, revision = {json.dumps(repo_id)}, {json.dumps(revision)}"


def pin_revision(card: str, repo_id: str, revision: str) -> str:
    """The card with `repo_id` and `revision` in its example. A card with another example is unchanged."""
    return _PIN.sub(lambda _: pin_line(repo_id, revision), card)


def pinned_revision(card: str, repo_id: str) -> str | None:
    """The commit of `repo_id` in the card's example, if it has one."""
    for match in _PIN.finditer(card):
        if match[0] == pin_line(repo_id, match[1]) and re.fullmatch("[0-9a-f]{40}", match[1]):
            return match[1]
    return None


def renew_pin(card: str, repo_id: str, revision: str) -> str:
    """An edited card with `revision` in its example, if the example names a commit of `repo_id`."""
    earlier = pinned_revision(card, repo_id)
    return card if earlier is None else card.replace(pin_line(repo_id, earlier), pin_line(repo_id, revision))


# --- what it records -----------------------------------------------------------------------------------------------


def tells_same_training(card: str, new_card: str) -> bool:
    """Whether a new card has all that a card says of training. The new one may be written where less is known."""
    return "Training" not in lost_sections(card, new_card)


def lost_sections(card: str, new_card: str) -> list[str]:
    """Which of the sections Training and Results have lines that a new card lacks."""
    lost = []
    for title in ("Training", "Results"):
        section = re.search(rf"^## {title}\n(.*?)^## ", card.replace("\r\n", "\n"), re.MULTILINE | re.DOTALL)
        if section is not None and not set(section[1].splitlines()) <= set(new_card.splitlines()):
            lost.append(title)
    return lost
