"""The troubleshooting guide quotes messages that the code prints."""

import ast
import re

import pytest
from conftest import ROOT


GUIDE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# Messages of the libraries change with their versions; symptoms are no messages.
ROWS = [
    line.removeprefix("| ").split(" | ")
    for line in GUIDE.partition("\n## Symptoms")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| message")
]
OWN = [cell for cell, _ in ROWS if not cell.endswith(("(transformers)", "(huggingface_hub)"))]


@pytest.fixture(scope="module")
def literals() -> list[str]:
    """All texts of the code, without docstrings, with `\\0` for what is put into them."""
    found = []
    for path in (*(ROOT / "src").glob("*.py"), ROOT / "hub_card" / "space" / "app.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if node in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append(" ".join("".join(parts).split()))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(" ".join(node.value.split()))
    return found


def quoted(cell: str) -> list[str]:
    """The code spans of a cell; those with backticks in them are between two of them."""
    return [match[2].strip() for match in re.finditer(r"(`+)(.+?)(?<!`)\1(?!`)", cell)]


def has_in_order(text: str, pieces: list[str]) -> bool:
    place = 0
    for piece in pieces:
        found = text.find(piece, place)
        if found < 0:
            return False
        place = found + len(piece)
    return True


def test_every_quoted_message_is_in_the_code(literals):
    messages = [message for cell in OWN for message in quoted(cell)]
    assert len(messages) >= len(OWN) > 100
    for message in messages:
        pieces = [piece.strip() for piece in message.split("...")]
        assert sum(map(len, pieces)) >= 12, f"{message!r} has too few words to be found by"
        assert any(has_in_order(text, pieces) for text in literals), f"no message has the words {message!r}"


def test_every_row_has_a_cause_and_every_link_a_target():
    assert all(len(row) == 2 and row[1].removesuffix("|").strip() for row in ROWS)
    headings = {
        re.sub(r"[^\w -]", "", line[3:].lower()).replace(" ", "-") for line in GUIDE.splitlines() if line[:3] == "## "
    }
    links = re.findall(r"\]\(#([\w-]+)\)", GUIDE)
    assert links and set(links) == headings
