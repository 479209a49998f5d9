"""The notebook in `examples/` runs from top to bottom on the shipped models."""

import ast

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient


NOTEBOOK = ROOT / "examples" / "ta_llava_and_vmtc.ipynb"
ANSWERS = {
    "what color is the shape?": "teal",
    "what shape is in the image?": "triangle",
    "is there a circle in the image?": "no",
}


@pytest.fixture(scope="module")
def cells() -> list:
    """The code cells, executed in the folder of the notebook."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell, kind: str) -> list[str]:
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def test_all_models_answer_right(cells):
    last_lines = ("llava_answers", "compressed_answers", "ta_llava_answers", "encoded_answers")
    answered = [cell for cell in cells if cell.source.splitlines()[-1] in last_lines]
    assert len(answered) == 4
    for cell in answered:
        assert ast.literal_eval(shown(cell, "text/plain")[0]) == ANSWERS


def test_pictures_and_costs_are_shown(cells):
    assert sum(bool(shown(cell, "image/png")) for cell in cells) == 4
    [cost] = [output.text for cell in cells for output in cell.outputs if output.get("name") == "stdout"]
    [tokens] = [line for line in cost.splitlines() if line.startswith("| tokens in the language model")]
    assert tokens.endswith("| 104 | 56 | 44 |")  # 64 visual tokens, 16 of them, or 4 prefix tokens, and 40 of text


def test_no_outputs_are_committed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(
        not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code"
    )
