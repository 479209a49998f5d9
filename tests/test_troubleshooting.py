"""The troubleshooting guide quotes messages that the code prints, and all that a user can meet."""

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


FILES = (*sorted((ROOT / "src").glob("*.py")), ROOT / "hub_card" / "space" / "app.py")
REPORTS = ("Error", "error", "warn", "warning", "warning_once")  # ends of the names of what is called with a message

# Not in the guide: reasons that stand inside other messages, which are; and what only code that is wrong meets.
NOT_LISTED = {
    "it has no checksums",
    "it has no frames, or does not say how many",
    "it is no JSON object",
    "it is not about the question that was asked",
    "\0 has no \0.",  # fields of a config.json, after its name
    "A grid has 1 or 4 shapes, not \0.",
    "\0 tokens cannot make \0 clusters that are not empty.",
}


@pytest.fixture(scope="module")
def literals() -> list[str]:
    """All texts of the code, without docstrings, with `\\0` for what is put into them."""
    found = []
    for path in FILES:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if node in docstrings:
                continue
            if (text := text_of(node)) is not None:
                found.append(text)
    return found


def text_of(node: ast.AST) -> str | None:
    """The text on one line of a node that is one."""
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
        return " ".join("".join(parts).split())
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return " ".join(node.value.split())
    return None


def texts_in(node: ast.AST) -> list[str]:
    """The texts in a node, with at least two words each."""
    if (text := text_of(node)) is not None:
        return [text] if len(re.findall("[A-Za-z]{2,}", text)) > 1 else []
    return [text for child in ast.iter_child_nodes(node) for text in texts_in(child)]


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


def test_every_message_is_in_the_guide():
    pieces = [[piece.strip() for piece in message.split("...")] for cell, _ in ROWS for message in quoted(cell)]
    missing = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith(REPORTS)):
                continue
            texts = [text for text in texts_in(node) if text not in NOT_LISTED]
            if texts and not any(has_in_order(text, words) for text in texts for words in pieces):
                missing.append(f"{path.name}, line {node.lineno}: {texts[0]}")
    assert not missing


def test_every_row_has_a_cause_and_every_link_a_target():
    assert all(len(row) == 2 and row[1].removesuffix("|").strip() for row in ROWS)
    headings = {
        re.sub(r"[^\w -]", "", line[3:].lower()).replace(" ", "-") for line in GUIDE.splitlines() if line[:3] == "## "
    }
    links = re.findall(r"\]\(#([\w-]+)\)", GUIDE)
    assert links and set(links) == headings
