"""Each snippet of the README and of `docs/` runs when you paste it alone in a clone. Small models replace the large ones."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer
from conftest import ROOT, SHIPPED_LLAVA, SHIPPED_MODEL
from families import build_processor, build_stock
from hub_server import HubServer
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ta_llava.building.compress import compress_llava
from ta_llava.cli import app
from ta_llava.publishing.export import export_model


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNER = Path(__file__).parent / "run_snippets.py"

# Beginnings of commands that are not run here, and why. Their options, recipes and targets are still checked.
NOT_RUN = {
    "git clone": "the network",
    "hf auth": "the Hub and its passwords",
    "lmms-eval": "is not installed here; its models and tasks have tests of their own",
    "make": "sets up environments, or takes minutes to hours",
    "pip install": "the network",
    "python benchmarks/bench_gpu.py": "compiles for minutes, and has tests of its own",
    "python -m ta_llava.data.easy_vqa": "writes 5,000 images",
    "ta-llava convert-original": "needs a checkpoint of the authors' code",
    "ta-llava cost": "is slow, and has tests of its own",
    "ta-llava evaluate MODEL --task if16": "needs a model that follows instructions",
    "ta-llava evaluate checkpoints/llava-tiny": "9,673 questions",
    "ta-llava evaluate runs/llava-next-tiny/model": "comes after 16 minutes of training",
    "ta-llava merge runs/ta-llava/phase3-lora": "comes after hours of training",
    "ta-llava push runs/ta-llava/phase3": "comes after hours of training",
    "ta-llava train": "minutes to hours of training",
    "torchrun": "several GPUs",
    "vllm": "has an environment and tests of its own",
}
PROGRAMS = ("git", "hf", "lmms-eval", "make", "pip", "python", "ta-llava", "torchrun", "vllm")
# A stand-in for each program. It logs the arguments that the shell passes to it.
STAND_IN = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" >> "$COMMANDS_LOG"; echo >> "$COMMANDS_LOG"
"""
TURNS = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else "
    "message.role) + '\n' }}{{ message.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


class Snippet(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}"


def snippets(*languages: str) -> list[Snippet]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            found.append(Snippet(str(page.relative_to(ROOT)), line, match[1], match[2]))
    return [snippet for snippet in found if snippet.language in languages]


PYTHON = snippets("python")
SESSIONS = [snippet for snippet in snippets("") if snippet.text.startswith("$ ")]


def commands_of(snippet: Snippet) -> list[list[str]]:
    """The commands of a snippet as the shell splits and expands them."""
    lines = snippet.text.splitlines()
    if snippet.language == "":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    with tempfile.TemporaryDirectory() as folder:
        for name in PROGRAMS:
            path = Path(folder, "programs", name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(STAND_IN)
            path.chmod(0o755)
        for made in (".venv/bin", "ta-llava"):  # by `make` and by `git clone`
            Path(folder, made).mkdir(parents=True)
        Path(folder, ".venv/bin/activate").touch()
        log = Path(folder, "commands.log")
        process = subprocess.run(
            ["bash", "-eu", "-c", "\n".join(lines)],
            cwd=folder,
            env={"PATH": f"{folder}/programs:/usr/bin:/bin", "COMMANDS_LOG": str(log)},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, f"{snippet}: {process.stderr}"
        return [line.split("\0")[:-1] for line in log.read_text().splitlines()]


COMMANDS = {snippet: commands_of(snippet) for snippet in snippets("bash") + SESSIONS}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Small stand-ins for the models that a reader has made or downloaded, by the names that the snippets use."""
    folder = tmp_path_factory.mktemp("models")
    compress_llava(SHIPPED_LLAVA, folder / "my-llava", 16, 0.6, link=False)
    export_model(SHIPPED_MODEL, folder / "my-model")
    torch.manual_seed(0)
    config = CLIPVisionConfig.from_pretrained(SHIPPED_LLAVA)
    CLIPVisionModel(config).save_pretrained(folder / "tower")
    size = {"height": config.image_size, "width": config.image_size}
    CLIPImageProcessorPil(size=size, do_center_crop=False).save_pretrained(folder / "tower")
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    for name, template, vocab_size in (("gemma", TURNS, len(tokenizer)), ("vicuna", None, 32000)):
        config = LlamaConfig.from_pretrained(SHIPPED_LLAVA, num_hidden_layers=5, vocab_size=vocab_size)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / name)
    for part in (build_stock("llava_next"), build_processor("llava_next", stock=True)):
        part.save_pretrained(folder / "next")
    return {
        "my-llava": folder / "my-llava",
        "my-model": folder / "my-model",
        "MODEL": SHIPPED_MODEL,
        "runs/easy-vqa": SHIPPED_MODEL,
        "runs/ta-llava/phase3": SHIPPED_MODEL,
        "llava-hf/llava-1.5-7b-hf": SHIPPED_LLAVA,
        "llava-hf/llava-v1.6-vicuna-7b-hf": folder / "next",
        "openai/clip-vit-large-patch14-336": folder / "tower",
        "google/gemma-2-2b-it": folder / "gemma",
        "lmsys/vicuna-7b-v1.5": folder / "vicuna",
    }


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory) -> dict:
    """Exit code and output of each Python snippet and of each command that is run."""
    with HubServer({"me": "hf_me"}) as hub:
        for name, path in models.items():
            if "/" in name and not name.startswith("runs/"):
                hub.add(name, files_of(path))
        commit = hub.add("me/my-ta-llava", files_of(models["my-model"]))
        keys, jobs = [], []
        for snippet in PYTHON:
            folder = clone(tmp_path_factory, models, snippet)
            keys.append(snippet)
            jobs.append({"folder": str(folder), "code": re.sub(r"\b[0-9a-f]{40}\b", commit, snippet.text)})
        for snippet, commands in COMMANDS.items():
            folder = clone(tmp_path_factory, models, snippet)
            for command in commands:
                if reason_not_to_run(command) is None:
                    keys.append((snippet, tuple(command)))
                    jobs.append({"folder": str(folder), "arguments": command[1:]})
        folder = tmp_path_factory.mktemp("jobs")
        (folder / "jobs.json").write_text(json.dumps(jobs))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **hub.environment(folder / "home", hub.token)}
        environment["HF_MODULES_CACHE"] = str(folder / "modules")
        process = subprocess.run(
            [sys.executable, RUNNER, folder / "jobs.json", folder / "results.json"],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr[-3000:]
        return dict(zip(keys, json.loads((folder / "results.json").read_text())))


def clone(tmp_path_factory, models: dict[str, Path], snippet: Snippet) -> Path:
    """A folder like a clone, in which the reader has run the earlier commands."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("checkpoints", "examples", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    made_here = re.findall(r"ta-llava (?:export|compress) \S+ (\S+)", snippet.text)
    for name, path in models.items():
        if name not in made_here and ("/" not in name or name.startswith("runs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(path)
    images = ["examples/red_circle.png", "examples/teal_triangle.png"]
    turns = [{"from": "human", "value": "<image>\nwhat shape is in the image?"}, {"from": "gpt", "value": "circle"}]
    (folder / "samples.json").write_text(json.dumps([{"id": "1", "image": images[0], "conversations": turns}]))
    objects = [
        {"image": image, "objects": [f"{place} {index}" for place in "abc"]} for index, image in enumerate(images)
    ]
    (folder / "objects.json").write_text(json.dumps(objects))
    return folder


def reason_not_to_run(command: list[str]) -> str | None:
    line = " ".join(command)
    return next((reason for start, reason in NOT_RUN.items() if f"{line} ".startswith(f"{start} ")), None)


@pytest.mark.parametrize("snippet", PYTHON, ids=str)
def test_a_snippet_of_python_runs_when_pasted_alone(runs, snippet):
    status, out, error = runs[snippet]
    assert status == 0, error[-3000:]
    # The comment after a `print` is its output.
    for comment in re.findall(r"^ *print\(.*\)  # ([a-z, ]+)$", snippet.text, re.MULTILINE):
        assert comment.split(", ") == out.split()[-len(comment.split(", ")) :]


@pytest.mark.parametrize("snippet", COMMANDS, ids=str)
def test_the_commands_of_a_snippet_run(runs, snippet):
    assert COMMANDS[snippet]
    for command in COMMANDS[snippet]:
        if reason_not_to_run(command) is None:
            assert command[0] == "ta-llava", f"say in NOT_RUN why {command} is not run"
            status, _, error = runs[snippet, tuple(command)]
            assert status == 0, f"{command}: {error[-3000:]}"
        else:
            check_arguments(command)


def check_arguments(command: list[str]) -> None:
    """Check that the modules, targets, files and options of a command exist, without running it."""
    program, *arguments = command
    assert all((ROOT / argument).is_file() for argument in arguments if argument.startswith("recipes/"))
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in arguments)
    if program == "pip":
        setup = ConfigParser()
        setup.read(ROOT / "setup.cfg")
        named = re.findall(r"\[(\w[\w-]*)\]", " ".join(arguments))
        assert set(named) <= set(setup["options.extras_require"])
    if "-m" in arguments:
        module = arguments[arguments.index("-m") + 1]
        assert importlib.util.find_spec(module) is not None
        program = "ta-llava" if module == "ta_llava.cli" else program
        arguments = arguments[arguments.index("-m") + 2 :]
    if program == "ta-llava":
        group = typer.main.get_command(app)
        name, found, rest = group.resolve_command(
            group.make_context("ta-llava", ["--help"], resilient_parsing=True), arguments
        )
        found.make_context(name, rest)


@pytest.mark.parametrize("snippet", SESSIONS, ids=str)
def test_a_session_prints_what_it_shows(runs, snippet):
    shown = re.split(r"^\$ .*\n", snippet.text, flags=re.MULTILINE)[1:]
    commands = [line[2:] for line in snippet.text.splitlines() if line.startswith("$ ")]
    printed = {command: out for (where, command), (_, out, _) in command_runs(runs) if where == snippet}
    for line, expected in zip(commands, shown, strict=True):
        if line.startswith("ta-llava "):
            assert printed[tuple(shlex.split(line))] == expected


def command_runs(runs: dict) -> list:
    return [(key, result) for key, result in runs.items() if not isinstance(key, Snippet)]


def test_what_is_not_run_is_in_a_snippet():
    lines = [" ".join(command) for commands in COMMANDS.values() for command in commands]
    assert not [start for start in NOT_RUN if not any(f"{line} ".startswith(f"{start} ") for line in lines)]
    assert SESSIONS and len(PYTHON) > 5 and sum(reason_not_to_run(line.split()) is None for line in lines) > 15
