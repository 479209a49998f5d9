import json
import shutil

import pytest
from conftest import EXAMPLE_IMAGE, FIXTURES, ROOT, SHIPPED_MODEL
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


FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "processor_config.json")


@pytest.mark.parametrize("file", [*FILES, "chat_template.jinja"])
def test_a_folder_with_a_missing_file(tmp_path, file):
    """The message names the folder; the command line shows it instead of a traceback."""
    folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    (folder / file).unlink()
    with pytest.raises(ValueError, match=r"from '.*model'|in '.*model' has no"):
        load(folder)


@pytest.mark.parametrize("file", FILES)
def test_a_folder_with_a_damaged_file(tmp_path, file):
    folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="No model could be loaded"):
        load(folder)


def test_a_config_that_does_not_fit_the_weights(tmp_path):
    folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for field, value in (("num_prefix_tokens", 5), ("adapter_interval", 1), ("adapter_interval", "x")):
        (folder / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(ValueError, match="No model could be loaded"):
            load(folder)
