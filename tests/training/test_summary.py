"""`training_summary.json` is read as it was written, also by other versions, and what is none is named."""

import json

import pytest

from ta_llava.data.report import DataReport
from ta_llava.training.recipe import DataSettings, Recipe
from ta_llava.training.summary import SUMMARY, ParameterCount, TrainingSummary


LOG = [
    {"step": 1, "loss": 0.5},
    {"step": 2, "loss": 0.25, "learning_rate": 1e-3},
    {"step": 2, "eval_loss": 0.3},
    {"step": 2, "train_loss": 0.375, "train_runtime": 90.0},
]


@pytest.mark.parametrize("evaluation_data", [None, DataReport(kept=2)])
def test_what_is_written_is_read(tmp_path, evaluation_data):
    settings = DataSettings(path="data.json", num_proc=2)
    recipe = Recipe(model="a/b", train=["projector"], data=settings, lora={"r": 4})
    if evaluation_data is not None:
        recipe.evaluation_data = settings
    parameters = {"projector": ParameterCount(3, 0), "vision_tower": ParameterCount(0, 5)}
    summary = TrainingSummary(recipe, DataReport(kept=8, bad=1), LOG, parameters, evaluation_data)
    summary.write(tmp_path)
    assert TrainingSummary.read(tmp_path) == summary
    assert (summary.steps, summary.train_loss, summary.seconds) == (2, 0.375, 90.0)
    assert summary.losses == [(1, 0.5), (2, 0.25)]

    # The names in the file are those that earlier versions wrote.
    content = json.loads((tmp_path / SUMMARY).read_text())
    names = {"recipe", "data", "parameters", "log"} | ({"evaluation_data"} if evaluation_data else set())
    assert content.keys() == names
    assert content["parameters"]["vision_tower"] == {"trainable": 0, "frozen": 5}


def test_other_versions_are_read(tmp_path):
    """Fields that are missing get their default, and those that are not known are ignored."""
    recipe = {"output_dir": "out", "data": {"path": "x.json", "new": 1}, "evaluation_data": None, "new": {}}
    content = {"recipe": recipe, "data": {"kept": 3, "new": 4}, "log": LOG, "new": []}
    (tmp_path / SUMMARY).write_text(json.dumps(content))
    expected = Recipe(output_dir="out", data=DataSettings(path="x.json"))
    assert TrainingSummary.read(tmp_path) == TrainingSummary(expected, DataReport(kept=3), LOG)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        "{}",
        json.dumps({"recipe": {}, "data": {}, "log": []}),
        json.dumps({"recipe": {}, "data": {}, "log": [{"step": 1}]}),
        json.dumps({"recipe": [], "data": 5, "log": LOG}),
    ],
)
def test_what_is_no_summary_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / SUMMARY).write_text(content)
    with pytest.raises(ValueError, match=r"training_summary\.json is not as `ta-llava train` writes it"):
        TrainingSummary.read(tmp_path)
