import pytest
from conftest import EXAMPLE_IMAGE, FIXTURES, ROOT
from PIL import Image

from ta_llava.inference import answer, load


@pytest.fixture(scope="module")
def shipped():
    return load()


RED_CIRCLE = ROOT / "examples" / "red_circle.png"
QUESTIONS = [
    ([EXAMPLE_IMAGE], "what color is the shape?"),
    ([RED_CIRCLE], "what color is the shape?"),
    ([EXAMPLE_IMAGE], "what shape is in the image?"),
    ([RED_CIRCLE], "describe the image."),
    ([RED_CIRCLE], "is there not a triangle in the image?"),
]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_do_not_depend_on_the_batch(shipped, batch_size):
    answers = list(answer(*shipped, QUESTIONS, batch_size=batch_size))
    assert answers == ["teal", "red", "triangle", "a red circle", "yes"]


def test_answers_come_as_they_are_found(shipped):
    """What was answered before a bad image is not lost."""
    answers = answer(*shipped, [*QUESTIONS[:2], ([FIXTURES / "none.png"], "what?")], batch_size=1)
    assert next(answers) == "teal"
    assert next(answers) == "red"
    with pytest.raises(ValueError, match="none.png"):
        next(answers)


def test_images_in_memory(shipped):
    with Image.open(RED_CIRCLE) as image:
        assert list(answer(*shipped, [([image], "what shape is present?")])) == ["circle"]


def test_an_empty_question_is_refused_before_any_work(shipped):
    with pytest.raises(ValueError, match="is empty"):
        next(answer(*shipped, [*QUESTIONS, ([RED_CIRCLE], " ")]))


def test_loading_from_nowhere():
    with pytest.raises(ValueError, match="No model could be loaded"):
        load(FIXTURES)
