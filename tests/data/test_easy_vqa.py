from collections import Counter

import pytest

from ta_llava.data.easy_vqa import (
    COLORS,
    SHAPES,
    Scene,
    load_easy_vqa,
    question_type,
    wording_prior,
)


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Scene]]:
    return {split: load_easy_vqa(split) for split in ("train", "test")}


def test_the_official_split(splits):
    sizes = {split: (len(scenes), sum(len(scene.questions) for scene in scenes)) for split, scenes in splits.items()}
    assert sizes == {"train": (4000, 38575), "test": (1000, 9673)}
    assert not {scene.path for scene in splits["train"]} & {scene.path for scene in splits["test"]}


def test_scenes_agree_with_every_answer(splits):
    """What is deduced from some questions must give the right answer to all of them."""
    for scene in splits["train"]:
        for question, answer in scene.questions:
            mentioned = set(question.rstrip("?").split()) & {*COLORS, *SHAPES}
            if answer in COLORS and scene.color:
                assert answer == scene.color
            elif answer in SHAPES and scene.shape:
                assert answer == scene.shape
            elif answer in ("yes", "no") and scene.color and scene.shape:
                present = bool(mentioned & {scene.color, scene.shape})
                negated = bool({"not", "no"} & set(question.split()))
                assert answer == ("yes" if present != negated else "no")
    known = Counter((scene.color is not None, scene.shape is not None) for scene in splits["train"])
    assert known[True, True] > 3500


def test_question_types():
    assert question_type("is there a blue shape?", "no") == "yes/no, colour"
    assert question_type("is no circle present?", "yes") == "yes/no, shape"
    assert question_type("what color is the circle?", "red") == "which colour"
    assert question_type("what is the blue shape?", "circle") == "which shape"


def test_the_wording_prior_is_a_count(splits):
    train = [Scene("", [("a?", "yes"), ("a?", "yes"), ("a?", "no"), ("what color?", "red")])]
    test = [Scene("", [("a?", "yes"), ("a?", "no"), ("what color?", "blue"), ("never asked?", "no")])]
    prior = wording_prior(train, test)
    assert prior == {"yes/no, shape": 1 / 3, "all": 1 / 4, "which colour": 0.0}
    prior = wording_prior(splits["train"], splits["test"])
    assert 0.85 < prior["yes/no, colour"] < 0.9 and 0.65 < prior["yes/no, shape"] < 0.7
