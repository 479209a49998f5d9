"""Each task builds its questions and scores their answers; nothing is asked if it could not be scored."""

import json
import sys

import pytest
from samples import EXAMPLES, SAMPLES, TURNS, sample

from ta_llava.evaluation import instruction_following
from ta_llava.evaluation.questions import Question
from ta_llava.evaluation.tasks import (
    TASKS,
    TaskOptions,
    build_task,
    evenly_spaced,
    one_per_image,
    score_exact_match,
)


OBJECTS = [{"image": "red_circle.png", "objects": ["circle"]}, {"image": "teal_triangle.png", "objects": ["triangle"]}]


def options(tmp_path, records: list[dict], **kwargs) -> TaskOptions:
    """Options with a file of records about the example images."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return TaskOptions(data=path, image_folder=EXAMPLES, **kwargs)


def test_white_space_around_an_answer_does_not_count():
    questions = [Question("a", [], "color?", " red ", "color"), Question("b", [], "shape?", "circle")]
    assert score_exact_match(questions, ["red\n", "a circle"]) == {
        "color": {"questions": 1, "accuracy": 1.0},
        "all": {"questions": 2, "accuracy": 0.5},
    }


def test_each_type_is_scored_and_all(tmp_path):
    task = build_task("json", options(tmp_path, [sample(*item) for item in SAMPLES], num_questions=2))
    assert [question.text for question in task.questions] == [SAMPLES[0][1], SAMPLES[2][1]]
    assert task.score(["teal", "circle"]) == {
        "color": {"questions": 1, "accuracy": 1.0},
        "all": {"questions": 2, "accuracy": 0.5},
    }


def test_a_sample_of_pope_has_as_many_of_both_answers(tmp_path):
    task = build_task("pope", options(tmp_path, OBJECTS, objects_per_image=1, num_questions=3))
    assert [question.expected for question in task.questions] == ["yes", "no"]
    assert task.settings == {"strategy": "random", "objects_per_image": 1, "seed": 0}


def test_pope_needs_its_metrics(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match="need scikit-learn"):
        build_task("pope", options(tmp_path, OBJECTS, objects_per_image=1))


def test_instructions_need_their_checkers(tmp_path, monkeypatch):
    def load_checkers():
        raise ValueError("Checking answers needs lm-eval.")

    monkeypatch.setattr(instruction_following, "load_checkers", load_checkers)
    with pytest.raises(ValueError, match="needs lm-eval"):
        build_task("if16", options(tmp_path, [sample(*SAMPLES[0])]))


def test_there_must_be_an_image_to_describe(tmp_path):
    alone = {"id": "alone", "conversations": [{"from": "human", "value": "what is red?"}, TURNS[1]]}
    records = [sample(*SAMPLES[0]), alone]
    with pytest.raises(ValueError, match="Question alone has no image to describe first: .* without `describe_first`"):
        build_task("if16", options(tmp_path, records, describe_first=True))
    assert len(build_task("if16", options(tmp_path, records)).questions) == 2 * len(instruction_following.TASKS)


@pytest.mark.parametrize("task", [name for name in TASKS if name != "if16"])
def test_data_that_are_missing_or_not_used_are_a_message(task):
    data = EXAMPLES / "none.json" if task == "easy-vqa" else None
    with pytest.raises(ValueError, match=f"{task} (brings its own data, so .*none.json|needs data)"):
        build_task(task, TaskOptions(data=data))


def test_the_last_question_about_each_image():
    asked = [("a", ["1.png"]), ("b", ["2.png"]), ("c", ["1.png"]), ("d", []), ("e", []), ("f", ["1.png", "2.png"])]
    questions = [Question(name, images, "?") for name, images in asked]
    assert [question.id for question in one_per_image(questions)] == ["c", "b", "d", "e", "f"]


def test_evenly_spaced():
    assert evenly_spaced(list(range(10)), 4) == [0, 2, 5, 7]
    assert evenly_spaced(list(range(10)), 6) == [0, 1, 3, 5, 6, 8]  # not the first six
    assert evenly_spaced([1, 2], 3) == evenly_spaced([1, 2], None) == [1, 2]
