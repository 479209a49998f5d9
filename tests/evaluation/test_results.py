"""`results.json` is written and read by one class, and what others wrote is told apart."""

import json

import pytest

from ta_llava.evaluation.results import EvaluationResults, EvaluationSettings, format_score, format_table


SETTINGS = EvaluationSettings(
    task="pope",
    model="me/model",
    visual_tokens=16,
    cmai=0.6,
    max_new_tokens=64,
    data="/data/objects.json",
    strategy="popular",
    objects_per_image=3,
    seed=0,
    num_questions=1234,
    files_of_model="0123",
    content_of_data="4567",
)
SCORES = {"popular": {"questions": 1234, "accuracy": 0.5, "f1": 0.25}}


def test_what_is_written_is_read(tmp_path):
    results = EvaluationResults("model", "llava", SCORES, "As in POPE.", SETTINGS, "me/pope:popular")
    results.write(tmp_path)
    assert EvaluationResults.read(tmp_path / "results.json") == results
    content = json.loads((tmp_path / "results.json").read_text())
    assert list(content) == ["model", "model_type", "task", "scores", "note", "settings", "benchmark"]
    assert list(content["settings"]) == [
        *("task", "model", "visual_tokens", "cmai", "max_new_tokens", "data", "strategy", "objects_per_image", "seed"),
        *("num_questions", "files_of_model", "content_of_data"),
    ]
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert lines[0] == "# model: POPE on objects, 1,234 questions, 16 visual tokens, CMAI 0.6, popular objects"
    assert lines[-1] == "As in POPE."


def test_settings_of_other_tasks_are_not_written():
    settings = EvaluationSettings(task="easy-vqa", num_questions=5).to_dict()
    assert not {"strategy", "objects_per_image", "seed", "describe_first"} & settings.keys()
    assert settings["visual_tokens"] is None and settings["cmai"] is None


EARLIER = {
    "task": "json",
    "scores": {"all": {"questions": 2, "accuracy": 1.0}},
    "note": "accuracy",
    "settings": {"data": "shapes.json", "num_questions": 2, "temperature": 0},
}


def test_results_of_earlier_versions_are_read(tmp_path):
    """Without the model and its type, and with a setting that there is no more."""
    path = tmp_path / "results.json"
    path.write_text(json.dumps(EARLIER))
    results = EvaluationResults.read(path)
    assert results.model_type is None and results.title == "shapes, 2 questions"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scores": {}}, "`scores`"),
        ({"scores": {"all": {"accuracy": "high"}}}, "`scores`"),
        ({"scores": [0.5]}, "values"),
        ({"note": None}, "`note`"),
        ({"benchmark": 3}, "`benchmark`"),
        ({"settings": {"data": "a.json"}}, "num_questions"),
        ({"settings": {"num_questions": 2}}, "`data`"),
        ({"settings": {"data": "a.json", "num_questions": 2, "visual_tokens": "16"}}, "`visual_tokens` is '16'"),
        ({"settings": []}, "mapping"),
    ],
)
def test_results_of_something_else_are_a_message(tmp_path, changes, reason):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**EARLIER, **changes}))
    with pytest.raises(ValueError, match=rf"results\.json is not as `ta-llava evaluate` writes it: .*{reason}"):
        EvaluationResults.read(path)


def test_the_table():
    scores = {
        "color": {"questions": 3, "accuracy": 1 / 3},
        "all": {"questions": 4, "accuracy": 0.5, "yes_ratio": 0.25},
    }
    assert format_table(scores).splitlines() == [
        "| | questions | accuracy | yes ratio |",
        "|---|---:|---:|---:|",
        "| color | 3 | 33.33% |  |",
        "| all | 4 | 50.00% | 25.00% |",
    ]


def test_scores_in_cells():
    assert [format_score(value) for value in (None, 0.5, 1234)] == ["", "50.00%", "1234"]
    assert format_score(1234, ",") == "1,234"
