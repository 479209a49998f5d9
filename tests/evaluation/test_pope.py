"""Questions about objects that are in an image, and about those that are not, as in POPE."""

import pytest

from ta_llava.evaluation.pope import STRATEGIES, build_questions, parse_answer, score


# Frequencies: cup 4, table 3, spoon 2, dog 2, and once apple, cat and umbrella.
RECORDS = [
    {"image": "a.png", "objects": ["cup", "table"]},
    {"image": "b.png", "objects": ["cup", "table", "spoon"]},
    {"image": "c.png", "objects": ["Cup", "cup ", "spoon", "apple"]},
    {"image": "d.png", "objects": ["dog", "cat"]},
    {"image": "e.png", "objects": ["dog", "umbrella"]},
    {"image": "f.png", "objects": ["cup", "table"]},
]


def absent(questions) -> dict[str, list[str]]:
    """Objects that are asked for though they are not there, by image."""
    asked: dict[str, list[str]] = {}
    for question in questions:
        if question.expected == "no":
            asked.setdefault(question.image, []).append(question.object)
    return asked


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_image_gets_as_many_of_both_and_all_are_true(strategy):
    questions = build_questions(RECORDS, strategy, objects_per_image=2, seed=3)
    there = {record["image"]: {name.strip().lower() for name in record["objects"]} for record in RECORDS}
    assert [question.expected for question in questions] == ["yes", "no"] * (len(RECORDS) * 2)
    for question in questions:
        assert (question.object in there[question.image]) == (question.expected == "yes")
    assert len({(question.image, question.object) for question in questions}) == len(questions)


def test_popular_objects_are_those_of_most_images():
    asked = absent(build_questions(RECORDS, "popular", objects_per_image=2))
    assert asked["a.png"] == ["dog", "spoon"]  # two images each, so by the alphabet
    assert asked["d.png"] == ["cup", "table"]


def test_adversarial_objects_are_those_that_come_with_the_present_ones():
    asked = absent(build_questions(RECORDS, "adversarial", objects_per_image=2))
    assert asked["a.png"] == ["spoon", "apple"]  # with cup and table three times, and once; dog never
    assert asked["d.png"] == ["umbrella", "cup"]  # with the dog; then nothing is, and most images have a cup
    assert absent(build_questions(RECORDS, "popular", objects_per_image=2)) != asked


def test_the_seed_decides_and_the_present_objects_are_those_of_all_strategies():
    records = [{"image": f"{index}.png", "objects": list("abcdefgh"[index:])} for index in range(3)]
    records.append({"image": "z.png", "objects": list("zyxwvuts")})
    kwargs = {"objects_per_image": 3}
    assert build_questions(records, seed=1, **kwargs) == build_questions(records, seed=1, **kwargs)
    assert build_questions(records, seed=1, **kwargs) != build_questions(records, seed=2, **kwargs)
    present = [
        [question.object for question in build_questions(records, strategy, **kwargs) if question.expected == "yes"]
        for strategy in STRATEGIES
    ]
    assert present[0] == present[1] == present[2]


def test_the_wording():
    texts = {question.object: question.text for question in build_questions(RECORDS, objects_per_image=2)}
    assert texts["dog"] == "Is there a dog in the image?"
    assert texts["umbrella"] == "Is there an umbrella in the image?"


def test_images_with_few_objects_are_left_out_and_counted(capsys, monkeypatch):
    from ta_llava.evaluation import pope

    warnings: list[str] = []
    monkeypatch.setattr(pope.logger, "warning", warnings.append)
    questions = build_questions(RECORDS, objects_per_image=3)
    assert {question.image for question in questions} == {"b.png", "c.png"}
    assert warnings == ["4 of 6 images are left out: they have less than 3 objects."]


def without(**changes) -> list[dict]:
    return [*RECORDS, {"image": "g.png", "objects": ["cup"], **changes}]


@pytest.mark.parametrize(
    ("records", "kwargs", "message"),
    [
        (RECORDS, {"strategy": "hard"}, "no strategy 'hard' of POPE, only random, popular, adversarial"),
        (RECORDS, {"objects_per_image": 0}, "`objects_per_image` must be at least 1, got 0"),
        (RECORDS, {"objects_per_image": 4}, "4 objects that are in an image.* no image has more than 3"),
        (
            [{"image": "a.png", "objects": list("abcd")}, {"image": "b.png", "objects": list("de")}],
            {"objects_per_image": 2},
            r"2 objects that are not in 'a.png'.* of the 5 in the dataset only 1 are not in it",
        ),
        (without(objects=[]), {}, r"Record 6 \('g.png'\) has no list of `objects`"),
        (without(objects=None), {}, r"Record 6 \('g.png'\) has no list of `objects`"),
        (without(objects="cup"), {}, r"Record 6 \('g.png'\) has no list of `objects`"),
        (without(objects=["cup", " "]), {}, r"Record 6 \('g.png'\) has `objects` that are no names"),
        (without(image=""), {}, "Record 6 has no path as `image`"),
        (without(image="a.png"), {}, "Record 6 has an image of an earlier record, 'a.png'"),
        ([], {}, "no records"),
    ],
)
def test_what_cannot_be_asked_is_a_message(records, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_questions(records, **kwargs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        ("No", "no"),
        ("No, there is none.", "no"),
        ("There is not a dog.", "no"),
        ("There is no dog in the image. Yes.", "no"),
        ("Yes. There is no cat, though.", "yes"),  # the first sentence counts
        ("nothing", "yes"),  # whole words count
        ("", "yes"),
    ],
)
def test_answers_are_read_as_by_pope(text, expected):
    assert parse_answer(text) == expected


def test_the_scores():
    answers = ["yes", "Yes, there is.", "no", "yes", "no", "no"]
    expected = ["yes", "yes", "yes", "no", "no", "no"]
    scores = score(answers, expected)
    assert scores == pytest.approx(
        {"accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 6}
    )
    assert score(["no", "no"], ["yes", "no"]) == {
        "accuracy": 0.5,
        "precision": 0,
        "recall": 0,
        "f1": 0,
        "yes_ratio": 0,
    }


@pytest.mark.parametrize(
    ("answers", "expected", "message"),
    [
        ([], [], "0 answers to 0 questions"),
        (["yes"], ["yes", "no"], "1 answers to 2 questions"),
        (["yes"], ["maybe"], "got 'maybe'"),
    ],
)
def test_what_cannot_be_scored_is_a_message(answers, expected, message):
    with pytest.raises(ValueError, match=message):
        score(answers, expected)
