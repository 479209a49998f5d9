import json
import shutil

import pytest
from conftest import EXAMPLE_IMAGE, FIXTURES, ROOT, SHIPPED_MODEL
from PIL import Image

from ta_llava.compress import compress_llava
from ta_llava.inference import DEFAULT_LLAVA, DEFAULT_MODEL, answer, load


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


@pytest.mark.parametrize(
    "flags", [{}, {"num_visual_tokens": 16}, {"cmai_max_ratio": 0.6}, {"num_visual_tokens": 16, "cmai_max_ratio": 0.6}]
)
def test_the_shipped_llava_with_and_without_vmtc_and_cmai(flags):
    model, processor = load(DEFAULT_LLAVA, **flags)
    assert type(model).__module__.startswith("ta_llava" if flags else "transformers")  # a stock checkpoint
    assert getattr(model.config, "use_vmtc", False) == ("num_visual_tokens" in flags)
    assert getattr(model.config, "use_cmai", False) == ("cmai_max_ratio" in flags)
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    assert list(answer(model, processor, QUESTIONS[:1])) == ["teal"]
    text = len(processor.tokenizer(QUESTIONS[0][1])["input_ids"])
    assert seen[0] - flags.get("num_visual_tokens", 64) in range(text, text + 12)


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        (DEFAULT_MODEL, {"num_visual_tokens": 16}, "'ta_llava' model; VMTC and CMAI work on 'llava'"),
        (DEFAULT_LLAVA, {"num_visual_tokens": 65}, "65"),
        (DEFAULT_LLAVA, {"cmai_max_ratio": 1.5}, "from 0 to 1, got 1.5"),
        (FIXTURES, {"cmai_max_ratio": 0.5}, "no config.json"),
    ],
)
def test_flags_that_cannot_be(model, flags, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(model, **flags)
    assert str(caught.value).count(str(model)) <= 1


def test_flags_that_are_not_given_are_as_the_config_says(tmp_path):
    compress_llava(DEFAULT_LLAVA, tmp_path / "out", 32, 0.9)
    for flags, expected in (
        ({"num_visual_tokens": 16}, (True, 16, True, 0.9)),
        ({"cmai_max_ratio": 0.5}, (True, 32, True, 0.5)),
        ({"cmai_max_ratio": 0}, (True, 32, False, 0.9)),
    ):
        model, processor = load(tmp_path / "out", **flags)
        config = model.config
        assert (config.use_vmtc, config.vmtc_num_visual_tokens, config.use_cmai, config.cmai_max_ratio) == expected
        assert list(answer(model, processor, QUESTIONS[:1])) == ["teal"]


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
