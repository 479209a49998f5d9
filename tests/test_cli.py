import json
import sys

import pytest
from conftest import EXAMPLE_IMAGE, FIXTURES, ROOT
from typer.testing import CliRunner

from ta_llava.cli import app


RUNNER = CliRunner()


def run(*arguments) -> tuple[int, str, str]:
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_ask():
    code, out, _ = run("ask", EXAMPLE_IMAGE, "what color is the shape?")
    assert (code, out.strip()) == (0, "teal")
    code, out, _ = run("ask", EXAMPLE_IMAGE, "what shape is in the image?", "--json")
    assert code == 0
    assert json.loads(out) == {
        "image": str(EXAMPLE_IMAGE),
        "question": "what shape is in the image?",
        "answer": "triangle",
    }


@pytest.mark.parametrize("options", [(), ("--model", ROOT / "checkpoints" / "llava-tiny")])
def test_ask_with_vmtc_and_cmai(options):
    """Without --model it is the shipped LLaVA."""
    code, out, _ = run(
        "ask", EXAMPLE_IMAGE, "what color is the shape?", "--visual-tokens", 16, "--cmai", 0.6, *options
    )
    assert (code, out.strip()) == (0, "teal")
    code, out, error = run("ask", EXAMPLE_IMAGE, "what?", "--visual-tokens", 100, *options)
    assert code == 1 and out == "" and "100" in error and "64" in error


@pytest.mark.parametrize(
    ("command", "module", "extra"), [("train", "train", "train"), ("evaluate", "evaluate", "evaluate")]
)
def test_what_is_not_installed_is_named_with_the_extra_that_has_it(monkeypatch, tmp_path, command, module, extra):
    monkeypatch.setitem(sys.modules, f"ta_llava.{module}", None)
    code, out, error = run(command, tmp_path, *(["-o", tmp_path] if command == "evaluate" else []))
    assert code == 1 and out == "" and f"pip install 'ta-llava[{extra}]'" in error


def test_ask_in_batches():
    code, out, _ = run("ask", "--batch", ROOT / "examples" / "questions.jsonl", "--json", "--batch-size", 3)
    assert code == 0
    answers = [json.loads(line)["answer"] for line in out.splitlines()]
    assert answers == ["triangle", "no", "red", "a red circle"]


def test_several_images_in_one_question():
    code, out, _ = run("ask", EXAMPLE_IMAGE, EXAMPLE_IMAGE, "what color is the shape?", "--json")
    assert code == 0
    record = json.loads(out)
    assert record["image"] == [str(EXAMPLE_IMAGE)] * 2 and record["answer"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "line 2: expected"),
        ('{"image": "teal.png"}', "line 2: expected"),
        ('{"image": "none.png", "question": "what?"}', "line 2: there is no image file"),
        ('{"image": 3, "question": "what?"}', "line 2: `image` must be a path"),
        ('{"image": "teal.png", "question": " "}', "line 2: `question` must be text"),
    ],
)
def test_a_bad_line_of_a_batch_is_named_before_any_work(tmp_path, line, message):
    (tmp_path / "teal.png").write_bytes(EXAMPLE_IMAGE.read_bytes())
    path = tmp_path / "questions.jsonl"
    path.write_text('{"image": "teal.png", "question": "what color is the shape?"}\n' + line)
    code, out, error = run("ask", "--batch", path)
    assert code == 1 and out == "" and message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask"], "give an image and a question"),
        (["ask", EXAMPLE_IMAGE], "give an image and a question"),
        (["ask", "none.png", "what?"], "none.png"),
        (["ask", __file__, "what?"], "not a readable image"),
        (["ask", EXAMPLE_IMAGE, " "], "is empty"),
        (["ask", EXAMPLE_IMAGE, "shape " * 600], "context holds 512"),
        (["ask", "--batch", "none.jsonl"], "none.jsonl"),
        (["ask", "--batch", EXAMPLE_IMAGE], "teal_triangle.png is not a text file"),
        (["train", EXAMPLE_IMAGE], "teal_triangle.png cannot be read"),
        (["ask", EXAMPLE_IMAGE, "what?", "--batch", "questions.jsonl"], "not both"),
        (["ask", EXAMPLE_IMAGE, "what?", "--model", FIXTURES], "No model could be loaded"),
    ],
)
def test_bad_input_is_a_message_not_a_traceback(arguments, message):
    code, _, error = run(*arguments)
    assert code == 1 and error.startswith("error: ") and message in error and "Traceback" not in error


def test_a_repo_id_without_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, error = run("ask", EXAMPLE_IMAGE, "what?", "--model", "nobody/no-such-model")
    assert code == 1 and "No model could be loaded from 'nobody/no-such-model'" in error


def test_export(tmp_path):
    code, _, _ = run("export", ROOT / "checkpoints" / "ta-llava-tiny", tmp_path / "out")
    assert code == 0 and (tmp_path / "out" / "modeling_ta_llava.py").is_file()
    code, _, error = run("export", ROOT / "checkpoints" / "ta-llava-tiny", tmp_path / "out")
    assert code == 1 and "exists already" in error


def test_convert_original(tmp_path):
    folder = FIXTURES / "original_ta_llava"
    code, _, error = run("convert-original", folder, tmp_path / "out", "--vision-tower", folder / "tiny-clip")
    assert code == 0 and "no tokenizer" in error
    assert (tmp_path / "out" / "model.safetensors").is_file()
    code, _, error = run(
        "convert-original", tmp_path / "out", tmp_path / "two", "--vision-tower", folder / "tiny-clip"
    )
    assert code == 1 and "'ta_llava'" in error and "tallava_gemma" in error
