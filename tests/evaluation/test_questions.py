"""Questions are read from files and folders, and what is wrong with a sample names it."""

import json

import pytest
from samples import EXAMPLES, SAMPLES, TURNS, sample

from ta_llava.data.samples import SampleError
from ta_llava.evaluation.questions import Question, read_question_file, read_records


def test_a_sample_is_a_question_with_its_answer(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sample(*item) for item in SAMPLES]))
    questions = read_question_file(path, EXAMPLES)
    image = str(EXAMPLES / "teal_triangle.png")
    text = "what color is the shape?"
    assert questions[0] == Question(f"teal_triangle: {text}", [image], text, "teal", "color")
    assert [question.type for question in questions] == ["color", "color", None, "caption", "yes/no"]


def test_images_of_a_file_are_paths(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{**sample(*SAMPLES[0]), "id": "odd", "image": {"bytes": "", "path": "a.png"}}]))
    with pytest.raises(ValueError, match=r"Question odd of .*data.json must name its images by paths, got \{'bytes'"):
        read_question_file(path, EXAMPLES)


SYSTEM = {"from": "system", "value": "Be short."}
BAD_SAMPLES = {
    "no answer": ({"conversations": TURNS[:1]}, "It has no answer to compare with"),
    "an empty answer": ({"conversations": [TURNS[0], {"from": "gpt", "value": " "}]}, "Turn 2, .* is empty"),
    "an empty question": ({"conversations": [{"from": "human", "value": "<image>"}, TURNS[1]]}, "Turn 1, .* is empty"),
    "several questions": (
        {"conversations": [*TURNS, {"from": "human", "value": "why?"}, TURNS[1]]},
        "the turns user, assistant, user, assistant",
    ),
    "a system message": ({"conversations": [SYSTEM, *TURNS]}, "the turns system, user, assistant"),
    "no conversation": ({"conversations": None}, "neither `conversations` nor `messages`"),
    "too many images": ({"image": ["red_circle.png"] * 2}, "There are 1 <image> in the questions, but 2 images"),
    "an image inside": (
        {"conversations": [{"from": "human", "value": "what <image> is it?"}, TURNS[1]]},
        "<image> inside its question",
    ),
    "a type without a name": ({"type": 3}, "Its `type` must be a name"),
    "a type called all": ({"type": "all"}, "Its `type` must be a name"),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_a_bad_sample_is_named(tmp_path, case):
    changes, message = BAD_SAMPLES[case]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sample(*SAMPLES[1]), {**sample(*SAMPLES[0]), "id": "odd", **changes}]))
    with pytest.raises(SampleError, match=rf"Sample odd \(record 1 of .*data.json\): .*{message}"):
        read_question_file(path, EXAMPLES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "is not JSON"),
        ("hello", "neither an array of JSON nor JSON lines; line 1"),
        ('{"id": 1}\n{"id":', "neither an array of JSON nor JSON lines; line 2"),
        ("", "no records"),
        ("[]", "no records"),
        ("[3]", "Record 0 of .* is not a JSON object, but 3"),
        (b"\xff\xfe\x00", "is not JSON"),
    ],
)
def test_a_file_that_is_not_of_records(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_records_with_a_byte_order_mark(tmp_path):
    (tmp_path / "data.json").write_bytes(b'\xef\xbb\xbf[{"id": "\xc3\xa9"}]')
    assert read_records(tmp_path / "data.json") == [{"id": "é"}]
