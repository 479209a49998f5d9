"""
Our models on the Hub are used like any other, in environments without this package: in pipelines, with streaming, adapters,
other dtypes and kinds of attention, and by `transformers serve`. `publishing/test_push.py` tests that they load.
"""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import EXAMPLE_IMAGE, SHIPPED_LLAVA, SHIPPED_MODEL, make_environment
from hub_server import HubServer

from ta_llava.building.compress import compress_llava
from ta_llava.inference import answer, load
from ta_llava.publishing.export import export_model


REPOS = ["alice/ta-llava", "alice/llava"]
QUESTIONS = ["what color is the shape?", "what shape is in the image?"]
ANSWERS = ["teal", "triangle"]

# Attention of the vision tower and of the language model, by what was asked for. SDPA cannot soft-cap scores for Gemma-2.
ATTENTION = {
    "alice/ta-llava": {"sdpa": ["sdpa", "eager"], "eager": ["eager", "eager"]},
    "alice/llava": {"sdpa": ["sdpa", "sdpa"], "eager": ["eager", "eager"]},
}
REFUSED = {
    "alice/ta-llava": {
        "flash_attention_2": "FlashAttention2",
        "no_such_attention": '`attn_implementation="no_such_attention"` is not supported',
    },
    "alice/llava": {
        name: f'CMAI does not work with `attn_implementation="{name}"`'
        for name in ("flash_attention_2", "flex_attention", "no_such_attention")
    },
}

USE = """
import importlib.util, io, json, sys, threading
assert importlib.util.find_spec("ta_llava") is None, "the package must not be importable here"
from contextlib import redirect_stdout

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer, TextStreamer, pipeline

repos, image, questions = json.loads(sys.argv[1])
trust = {"trust_remote_code": True}


def chat(question, url):
    content = [{"type": "image", "url": url}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def texts(output):
    return output["generated_text"] if isinstance(output, dict) else [texts(each) for each in output]


def logits(model):
    cast = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        return model(**cast).logits[:, -1].float()


def distance(one, two):
    return (one - two).abs().max().item()


report = {}
for repo in repos:
    results = report[repo] = {}
    url = f"{image}/{repo}/resolve/main/image.png"
    pipe = pipeline("image-text-to-text", model=repo, dtype=torch.float32, **trust)
    model, processor = pipe.model, AutoProcessor.from_pretrained(repo, **trust)
    short = {"max_new_tokens": 8, "return_full_text": False}
    one = pipe(text=chat(questions[0], url), **short)
    several = pipe(text=[chat(question, url) for question in questions], batch_size=2, **short)
    prompt = processor.apply_chat_template(chat(questions[1], url), add_generation_prompt=True)
    plain = pipe(images=url, text=prompt, **short)
    lists = pipe(images=[url, url], text=[prompt, prompt], batch_size=2, **short)
    results["pipeline"] = {"one": texts(one), "several": texts(several), "plain": texts(plain), "lists": texts(lists)}
    results["one token"] = texts(pipe(text=chat(questions[1], url), **{**short, "max_new_tokens": 1}))

    inputs = processor.apply_chat_template(
        [chat(question, url) for question in questions], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt", processor_kwargs={"padding": True},
    )
    first = processor.apply_chat_template(
        [chat(questions[0], url)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    arguments = {**first, "max_new_tokens": 8, "streamer": streamer}
    threading.Thread(target=model.generate, kwargs=arguments).start()
    results["TextIteratorStreamer"] = "".join(streamer)
    with redirect_stdout(io.StringIO()) as printed:
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.generate(**first, max_new_tokens=8, streamer=streamer)
    results["TextStreamer"] = printed.getvalue().strip()

    reference = logits(model)
    scale = reference.abs().max().item()
    load = AutoModelForImageTextToText.from_pretrained
    for name, kwargs in {
        "sdpa": {"attn_implementation": "sdpa", "device_map": "auto", "dtype": torch.float32},
        "eager": {"attn_implementation": "eager", "dtype": torch.float32},
        "auto": {"dtype": "auto"},
        "bfloat16": {"dtype": torch.bfloat16},
    }.items():
        other = load(repo, **kwargs, **trust)
        attention = [part._attn_implementation for part in (other.config.vision_config, other.config.text_config)]
        results[name] = [str(other.dtype), attention, distance(logits(other), reference) / scale]
    for name in ("flash_attention_2", "flex_attention", "no_such_attention"):
        try:
            load(repo, attn_implementation=name, **trust)
        except (ValueError, ImportError) as error:
            results[name] = " ".join(str(error).split())

    # A loaded model that is saved again is complete.
    model.save_pretrained("saved")
    processor.save_pretrained("saved")
    AutoProcessor.from_pretrained("saved", **trust)
    results["saved"] = distance(logits(load("saved", dtype=torch.float32, **trust)), reference)

    # An adapter of the language model is pushed. It loads by its own name, and on top of its model.
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=r".*language_model.*\\.q_proj", init_lora_weights=False)
    adapted = get_peft_model(load(repo, dtype=torch.float32, **trust), lora).eval()
    expected = logits(adapted)
    adapted.push_to_hub(repo + "-lora")
    results["effect"] = distance(expected, reference)
    on_top = PeftModel.from_pretrained(load(repo, dtype=torch.float32, **trust), repo + "-lora").eval()
    by_name = load(repo + "-lora", dtype=torch.float32, **trust).eval()
    results["lora"] = [distance(logits(each), expected) for each in (on_top, by_name)]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A TA-LLaVA, a LLaVA with VMTC and CMAI, and an image in the repo of each."""
    folder = tmp_path_factory.mktemp("models")
    export_model(SHIPPED_MODEL, folder / "ta-llava")
    compress_llava(SHIPPED_LLAVA, folder / "llava", 16, 0.6)
    with HubServer() as server:
        for name in ("ta-llava", "llava"):
            files = {path.name: path.read_bytes() for path in (folder / name).iterdir()}
            server.add(f"alice/{name}", {**files, "image.png": EXAMPLE_IMAGE.read_bytes()})
        yield server


@pytest.fixture(scope="module")
def python_of_a_user(tmp_path_factory) -> Path:
    """The Python of an environment with what adapters and servers need, but without this package."""
    # `transformers chat` needs requests up to 5.20.
    packages = ("transformers[serving]", "torch", "pillow", "accelerate", "peft", "requests")
    return make_environment(tmp_path_factory.mktemp("environment"), *packages)


def environment(hub: HubServer, home: Path) -> dict[str, str]:
    variables = {**os.environ, **hub.environment(home, hub.token)}
    variables.pop("PYTHONPATH", None)
    return variables


def test_in_every_way_of_the_library(hub, python_of_a_user, tmp_path):
    arguments = json.dumps([REPOS, hub.url, QUESTIONS])
    process = subprocess.run(
        [python_of_a_user, "-c", USE, arguments],
        cwd=tmp_path,
        env=environment(hub, tmp_path / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads(process.stdout.splitlines()[-1])
    for repo in REPOS:
        results = report[repo]
        assert results["pipeline"] == {
            "one": ["teal"],
            "several": [["teal"], ["triangle"]],
            "plain": ["triangle"],
            "lists": ["triangle", "triangle"],
        }
        assert results["one token"] == ["triangle"]
        assert results["TextIteratorStreamer"] == results["TextStreamer"] == "teal"
        for name, dtype, tolerance in (
            ("sdpa", "float32", 1e-4),
            ("eager", "float32", 1e-4),
            ("auto", "float16", 0.01),
            ("bfloat16", "bfloat16", 0.02),
        ):
            found_dtype, attention, distance = results[name]
            assert found_dtype == f"torch.{dtype}" and distance < tolerance, (repo, name, distance)
            if name in ("sdpa", "eager"):
                assert attention == ATTENTION[repo][name]
        for name, message in REFUSED[repo].items():
            assert message in results[name]
        assert results["saved"] == 0
        assert results["effect"] > 0.1 and max(results["lora"]) < 1e-4, (repo, results["effect"], results["lora"])
    assert set(hub.files("alice/ta-llava-lora")) >= {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def served(hub, python_of_a_user, tmp_path_factory):
    """Address of a `transformers serve` that serves everything on the hub, and its environment variables."""
    for package in ("fastapi", "openai", "uvicorn"):
        pytest.importorskip(package, reason="`pip install 'transformers[serving]'`")
    home = tmp_path_factory.mktemp("serve")
    variables = environment(hub, home / "home")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python_of_a_user, *TRANSFORMERS, "serve", "--trust-remote-code", "--host", "127.0.0.1"]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"], cwd=home, env=variables, stdout=log, stderr=log
        )
    try:
        for _ in range(300):
            assert server.poll() is None, (home / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except (OSError, urllib.error.URLError):
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1", variables
    finally:
        server.kill()  # `terminate` would wait for the timers that unload models
        server.wait()


@pytest.fixture(scope="module")
def without_image() -> dict[str, str]:
    """The answers of the models to the first question without an image."""
    models = [load(SHIPPED_MODEL), load(SHIPPED_LLAVA, 16, 0.6)]
    return {repo: next(answer(*model, [([], QUESTIONS[0])])) for repo, model in zip(REPOS, models)}


TRANSFORMERS = ("-c", "from transformers.cli.transformers import main; main()")


def test_transformers_serve(served, without_image):
    """OpenAI's client asks with an image, for a whole answer and for a stream, and asks a question without an image."""
    import openai

    client = openai.OpenAI(base_url=served[0], api_key="none", max_retries=0)
    url = "data:image/png;base64," + base64.b64encode(EXAMPLE_IMAGE.read_bytes()).decode()
    for repo in REPOS:
        for question, expected in zip(QUESTIONS, ANSWERS):
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
            request = {"model": repo, "messages": [{"role": "user", "content": content}], "max_tokens": 8}
            answer = client.chat.completions.create(**request)
            assert answer.choices[0].message.content == expected and answer.choices[0].finish_reason == "stop"
            chunks = client.chat.completions.create(**request, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        alone = {**request, "messages": [{"role": "user", "content": QUESTIONS[0]}]}
        assert client.chat.completions.create(**alone).choices[0].message.content == without_image[repo]
    assert {model.id for model in client.models.list()} == set(REPOS)  # in the cache, and can be served


def test_transformers_chat(served, without_image, python_of_a_user, tmp_path):
    url, variables = served
    flags = ["max_new_tokens=8", "do_sample=False"]
    process = subprocess.run(
        [python_of_a_user, *TRANSFORMERS, "chat", REPOS[0], url, *flags],
        input=f"{QUESTIONS[0]}\n!exit\n",
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    reply = re.search(rf"<{REPOS[0]}>:\s*(.*?)\s*\d+ tokens in", process.stdout, re.DOTALL)
    assert reply and reply[1] == without_image[REPOS[0]]


# The rules of `mlinter` are for files of these names; what is in a file that has none of them decides which it gets.
RULES = ("configuration_", "modeling_", "processing_")
LINTED_AS = {"vmtc_cmai_patch.py": RULES, "vmtc_cmai_mixins.py": RULES} | dict.fromkeys(
    ("cmai.py", "prefix_adapters.py"), ("modeling_",)
)
# TRF057 asks for docstrings that are put together from those of the library. Outside of the library this prints what it did
# not find, on every import.
RULES_OFF = ("TRF057",)


def test_the_linter_of_transformers(hub, tmp_path):
    """`mlinter` finds nothing in the code that travels with the models."""
    mlinter = pytest.importorskip("mlinter", reason="`pip install transformers-mlinter`")
    for repo in REPOS:
        folder = tmp_path / repo
        folder.mkdir(parents=True)
        for name, content in hub.files(repo).items():
            prefixes = LINTED_AS.get(name, ("",) if name.endswith(".py") and name.startswith(RULES) else ())
            for prefix in prefixes:
                (folder / f"{prefix}{name}").write_bytes(content)
        assert len(list(folder.iterdir())) >= len(RULES)
    settings = Path(mlinter.__file__).with_name("rules.toml").read_text(encoding="utf-8")
    for rule in RULES_OFF:
        settings, count = re.subn(rf"(\[rules\.{rule}\][^\[]*?default_enabled = )true", r"\1false", settings)
        assert count == 1
    (tmp_path / "rules.toml").write_text(settings, encoding="utf-8")
    options = ["--no-cache", "--no-progress", "--rules-toml", tmp_path / "rules.toml"]
    code = subprocess.run(
        [sys.executable, "-m", mlinter.__name__, *options, tmp_path, *tmp_path.rglob("*.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    output = " ".join((code.stdout + code.stderr).split())
    assert code.returncode == 0 and "no rule applies" not in output, output
