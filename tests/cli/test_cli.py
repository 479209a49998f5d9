import json
import os
import re
import shlex
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import typer
from command_line import run
from conftest import EXAMPLE_IMAGE, FIXTURES, ROOT

from ta_llava.cli import app


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
    ("command", "module", "extra"),
    [("train", "training.run", "train"), ("evaluate", "evaluation.evaluate", "evaluate")],
)
def test_what_is_not_installed_is_named_with_the_extra_that_has_it(monkeypatch, tmp_path, command, module, extra):
    """It is found after the checks of paths."""
    monkeypatch.setitem(sys.modules, f"ta_llava.{module}", None)
    code, out, error = run(command, tmp_path, *(["-o", tmp_path] if command == "evaluate" else []))
    assert code == 1 and out == "" and f"pip install -e '.[{extra}]'` in a clone" in error


def test_ctrl_c_is_one_line(monkeypatch):
    def interrupt(*arguments, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ta_llava.inference.load", interrupt)
    assert run("ask", EXAMPLE_IMAGE, "what?") == (130, "", "Interrupted.\n")


def test_version():
    assert run("--version") == (0, f"ta-llava {metadata.version('ta-llava')}\n", "")
    assert f"\nversion: {metadata.version('ta-llava')}\n" in (ROOT / "CITATION.cff").read_text()


def test_a_question_without_quotes_is_shown_with_them():
    code, _, error = run("ask", EXAMPLE_IMAGE, "what's", "the", "shape?")
    quoted = shlex.join(["ta-llava", "ask", str(EXAMPLE_IMAGE), "what's the shape?"])
    assert code == 1 and 'no image file "what\'s"' in error and error.endswith(f"in quotes: {quoted}\n")
    code, _, error = run("ask", "none.png", "what", "shape?")
    assert code == 1 and "none.png" in error and "quotes" not in error


def test_a_question_before_the_image_is_shown_behind_it():
    code, _, error = run("ask", "what color?", EXAMPLE_IMAGE)
    swapped = shlex.join(["ta-llava", "ask", str(EXAMPLE_IMAGE), "what color?"])
    assert code == 1 and error.endswith(f"Put the question last: {swapped}\n")
    assert run("ask", "what", "color?", EXAMPLE_IMAGE)[2].endswith(f"Put the question last: {swapped}\n")
    for mistyped in (["none.png", "what color?"], ["none.png", EXAMPLE_IMAGE]):
        code, _, error = run("ask", *mistyped)
        assert code == 1 and "Put the question last" not in error


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_a_llava_of_the_original_code_is_refused(tmp_path, model_type):
    folder = tmp_path / "llava-v1.5-7b"
    folder.mkdir()
    settings = {"model_type": model_type, "mm_vision_tower": "openai/clip", "hidden_size": 4096, "vocab_size": 32000}
    (folder / "config.json").write_text(json.dumps(settings))
    for arguments in (
        ["cost", folder],
        ["cost", folder / "config.json"],
        ["compress", folder, tmp_path / "out"],
        ["ask", EXAMPLE_IMAGE, "what?", "--model", folder],
        ["ask", EXAMPLE_IMAGE, "what?", "--model", folder, "--visual-tokens", 16],
    ):
        code, out, error = run(*arguments)
        assert code == 1 and out == "" and error.count("\n") == 1 and error.count(str(folder)) == 1
        assert "`mm_vision_tower`" in error and "convert_llava_weights_to_hf.py" in error
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_not_there_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", pytest.fail)
    path = tmp_path / "none"
    for arguments in (
        ["ask", EXAMPLE_IMAGE, "what?", "--model", path],
        ["ask", EXAMPLE_IMAGE, "what?", "--model", path, "--cmai", 0.6],
        ["cost", path],
        ["compress", path, tmp_path / "out"],
        ["export", path, tmp_path / "out"],
        ["push", path, "me/model"],
        ["visualize", EXAMPLE_IMAGE, "--model", path, "-o", tmp_path / "out.png"],
        ["visualize", EXAMPLE_IMAGE, "what?", "--show", "prefix", "--model", path, "-o", tmp_path / "out.png"],
        ["evaluate", path, "-o", tmp_path / "out", "--questions", 1],
        ["merge", path, tmp_path / "out"],
        ["init", tmp_path / "out", "--vision-tower", path, "--language-model", path],
    ):
        code, _, error = run(*arguments)
        assert code == 1 and error.startswith(f"error: There is no folder '{path}'") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


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


def test_of_a_folder_each_picture_is_asked_about(tmp_path):
    (tmp_path / "b.PNG").write_bytes(EXAMPLE_IMAGE.read_bytes())
    (tmp_path / "a.png").write_bytes((ROOT / "examples" / "red_circle.png").read_bytes())
    for other in ("notes.txt", "paper.pdf", "._a.png"):
        (tmp_path / other).write_text("no picture")
    question = "what color is the shape?"
    code, out, error = run("ask", tmp_path, question)
    assert code == 0, error
    answers = [(tmp_path / "a.png", "red"), (tmp_path / "b.PNG", "teal")]
    assert out.splitlines() == [f"{path}: {question} {answer}" for path, answer in answers]
    code, out, _ = run("ask", tmp_path, question, "--json")
    assert [json.loads(line)["image"] for line in out.splitlines()] == [str(path) for path, _ in answers]


def test_a_damaged_picture_does_not_keep_a_folder_from_being_asked_about(tmp_path):
    content = EXAMPLE_IMAGE.read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "b.png").write_bytes(content)
    (tmp_path / "c.png").touch()
    question = "what color is the shape?"
    code, out, error = run("ask", tmp_path, question, "--json")
    assert code == 1 and [json.loads(line)["answer"] for line in out.splitlines()] == ["teal"]
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert ["a.png" in lines[0], "c.png" in lines[1], len(lines)] == [True, True, 3]
    assert "2 of 3 pictures cannot be read" in lines[2]
    (tmp_path / "b.png").unlink()
    code, out, error = run("ask", tmp_path, question, "--model", "no/model")
    assert code == 1 and out == "" and "a.png" in error and "c.png" in error
    assert error.endswith("error: 2 of 2 images cannot be read, so nothing was asked.\n")


def test_damaged_images_of_a_batch_are_all_named_before_any_work(tmp_path):
    content = EXAMPLE_IMAGE.read_bytes()
    (tmp_path / "good.png").write_bytes(content)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    lines = [{"image": image, "question": "what?"} for image in ("good.png", "a.png", ["good.png", "b.png"], "a.png")]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, out, error = run("ask", "--batch", tmp_path / "questions.jsonl", "--model", "no/model")
    assert code == 1 and out == "" and error.count("a.png") == error.count("b.png") == 1
    assert error.endswith("error: 2 of 3 images cannot be read, so nothing was asked.\n")


def test_a_folder_without_pictures_or_among_images_is_named(tmp_path):
    code, out, error = run("ask", tmp_path, "what?")
    assert code == 1 and out == "" and f"folder {tmp_path} has no pictures in it" in error
    alone = shlex.join(["ta-llava", "ask", str(tmp_path), "what is it?"])
    for images in ([tmp_path, EXAMPLE_IMAGE], [EXAMPLE_IMAGE, tmp_path], [tmp_path, tmp_path]):
        code, out, error = run("ask", *images, "what is it?")
        assert code == 1 and out == "" and f"'{tmp_path}' is a folder" in error and alone in error
    code, _, error = run("ask", "what color?", tmp_path)
    assert code == 1 and error.endswith(shlex.join(["ta-llava", "ask", str(tmp_path), "what color?"]) + "\n")


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
        (["ask"], "an image and a question"),
        (["ask", EXAMPLE_IMAGE], "an image and a question"),
        (["ask", "none.png", "what?"], "none.png"),
        (["ask", __file__, "what?"], "not a readable image"),
        (["ask", EXAMPLE_IMAGE, " "], "is empty"),
        (["ask", EXAMPLE_IMAGE, "shape " * 600], "context holds 512"),
        (["ask", "--batch", "none.jsonl"], "There is no file none.jsonl."),
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


# --- before torch and transformers are imported --------------------------------------------------------------------


CONSOLE_SCRIPT = [str(Path(sys.executable).parent / "ta-llava")]
MODULE = [sys.executable, "-m", "ta_llava.cli"]
COMPLETION = {"_TA_LLAVA_COMPLETE": "complete_bash", "COMP_WORDS": "ta-llava ask --visual-t", "COMP_CWORD": "2"}


def run_as_process(*arguments, program=CONSOLE_SCRIPT, **variables) -> tuple[int, str, set[str]]:
    """Exit code, output and imported packages of `ta-llava` in a process of its own."""
    process = subprocess.run(
        [*program, *map(str, arguments)],
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1", "OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = process.stderr.splitlines()
    imported = {line.rsplit("|", 1)[1].strip() for line in lines if line.startswith("import time:")}
    errors = [line for line in lines if not line.startswith("import time:")]
    return process.returncode, "\n".join([process.stdout, *errors]), {name.split(".")[0] for name in imported}


@pytest.mark.parametrize("program", [CONSOLE_SCRIPT, MODULE], ids=["console script", "module"])
@pytest.mark.parametrize(
    ("arguments", "variables", "code", "text"),
    [
        (["--help"], {}, 0, "visualize"),
        (["train", "--help"], {}, 0, "--override"),
        (["--version"], {}, 0, metadata.version("ta-llava")),
        (["aks"], {}, 2, "aks"),
        (["ask", "--modle", "x"], {}, 2, "--modle"),
        ([], COMPLETION, 0, "--visual-tokens"),
    ],
    ids=["help", "help of a command", "version", "typo in a command", "typo in an option", "completion"],
)
def test_help_and_typos_need_neither_torch_nor_transformers(program, arguments, variables, code, text):
    if variables and program is MODULE:
        pytest.skip("shells complete the console script alone")
    status, output, packages = run_as_process(*arguments, program=program, **variables)
    assert status == code and text in output
    assert "ta_llava" in packages and packages.isdisjoint(("torch", "transformers"))


MISSING = [
    (["ask", "none.png", "what?"], "none.png"),
    (["ask", EXAMPLE_IMAGE, "which", "shape?"], "'which shape?'"),
    (["ask", "--batch", "none.jsonl"], "none.jsonl"),
    (["ask", EXAMPLE_IMAGE, "what?", "--model", "no/such/model"], "no/such/model"),
    (["visualize", "none.png"], "none.png"),
    (["visualize", EXAMPLE_IMAGE, "--model", "no/such/model"], "no/such/model"),
    (["cost", "none/config.json"], "none/config.json"),
    (["compress", "no/such/model", "out"], "no/such/model"),
    (["init", "out", "--vision-tower", "no/such/model", "--language-model", "."], "no/such/model"),
    (["init-llava", "out", "--vision-tower", ".", "--language-model", ".", "--chat-template", "none"], "none"),
    (["convert-original", "none", "out", "--vision-tower", "."], "none"),
    (["train", "none.yaml"], "none.yaml"),
    (["curriculum", __file__, "none.yaml"], "none.yaml"),
    (["merge", "no/such/model", "out"], "no/such/model"),
    (["evaluate", ".", "-o", "out", "--data", "none.json"], "none.json"),
    (["export", ".", "out", "--results", "none"], "none"),
    (["export", ".", FIXTURES], "is not an empty folder"),
    (["push", "no/such/model", "me/model"], "no/such/model"),
]


@pytest.mark.parametrize(("arguments", "named"), MISSING, ids=lambda value: str(value[0]))
def test_a_missing_file_needs_neither_torch_nor_transformers(arguments, named):
    status, output, packages = run_as_process(*arguments)
    assert status == 1 and "error: " in output and named in output and "Traceback" not in output
    assert packages.isdisjoint(("torch", "transformers"))


def test_every_command_is_asked_for_a_missing_file():
    assert {arguments[0] for arguments, _ in MISSING} == set(typer.main.get_command(app).commands)


# --- the Auto classes, which the command line registers when it needs models ----------------------------------------

# Each module is imported alone, in a child of a process that has imported what takes long.
IMPORT_ALONE = """
import importlib, os, sys
sys.argv[0] = "ta-llava"
import datasets, ta_llava.modeling_ta_llava, ta_llava.vmtc_cmai_patch
assert "ta_llava.auto_classes" not in sys.modules
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        importlib.import_module(name)
        os._exit("ta_llava.auto_classes" not in sys.modules)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_modules_that_load_or_save_models_register_their_classes():
    source = ROOT / "src"
    paths = [source / "inference.py", *source.glob("*/*.py")]
    paths = [path for path in paths if re.search(r"\bAuto[A-Z]\w+\b|save_pretrained", path.read_text())]
    names = [f"ta_llava.{'.'.join(path.relative_to(source).with_suffix('').parts)}" for path in paths]
    assert len(names) > 8 and "ta_llava.cli.building" in names
    # The commands import the others; vLLM calls a plugin, which registers them.
    names = [name for name in names if not name.startswith(("ta_llava.cli.", "ta_llava.serving."))]
    process = subprocess.run([sys.executable, "-c", IMPORT_ALONE, *names], capture_output=True, text=True, check=False)
    assert process.stdout.splitlines() == [f"{name} 0" for name in names], process.stderr[-3000:]


def test_what_the_console_script_saves_carries_its_code(tmp_path):
    folder = FIXTURES / "original_ta_llava"
    status, output, _ = run_as_process(
        "convert-original", folder, tmp_path / "out", "--vision-tower", folder / "tiny-clip"
    )
    assert status == 0, output
    auto_map = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert auto_map.keys() >= {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}
    assert (tmp_path / "out" / "modeling_ta_llava.py").is_file()
    status, output, _ = run_as_process("export", ROOT / "checkpoints" / "ta-llava-tiny", tmp_path / "exported")
    assert status == 0, output
    settings = json.loads((tmp_path / "exported" / "processor_config.json").read_text())
    assert settings["auto_map"]["AutoProcessor"].startswith("processing_ta_llava.")
