"""A checkpoint or list of samples from anywhere: what is wrong is refused with a message, and nothing in it is executed."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import EXAMPLE_IMAGE, ROOT, SHIPPED_MODEL
from hub_server import HubServer
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, Gemma2Config, LlamaConfig
from typer.testing import CliRunner

from ta_llava import TaLlavaConfig, TaLlavaForConditionalGeneration, VmtcCmaiLlavaConfig
from ta_llava.cli import app
from ta_llava.safe_loading import check_sizes
from ta_llava.training_data import SampleError, read_sample


# A TA-LLaVA, a stock LLaVA, and that with VMTC.
MODELS = {
    "ta_llava": (SHIPPED_MODEL, ()),
    "llava": (ROOT / "checkpoints" / "llava-tiny", ()),
    "vmtc": (ROOT / "checkpoints" / "llava-tiny", ("--visual-tokens", "16")),
}


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def ask(folder: Path, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
    arguments = ["ask", str(EXAMPLE_IMAGE), "what color is the shape?", "--model", str(folder), *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit)  # which would be a traceback
    return result.exit_code, result.stdout.strip(), result.stderr


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write_pickle(folder: Path, name: str = "pytorch_model.bin") -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save({"weight": Touch(folder.parent / "executed")}, folder / name)


def write_index(folder: Path, shard: str) -> None:
    """The weights moved to another file, which an index names."""
    weights = folder / "model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights.rename(folder / shard)


def index_of_a_pickle(folder: Path) -> None:
    write_index(folder, "model.bin")
    write_pickle(folder, "model.bin")


def grow(part: str, field: str):
    return lambda folder: change_json(folder / "config.json", lambda config: config[part].update({field: 10**9}))


def shorten(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100_000)


def scramble(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[8:40] = b"\xff" * 32
    (folder / "model.safetensors").write_bytes(content)


def take_tokenizer_outside(folder: Path) -> None:
    outside = folder.parent / "tokenizer.json"
    (folder / "tokenizer.json").rename(outside)
    change_json(folder / "tokenizer_config.json", lambda config: config.update(tokenizer_file=str(outside)))


def write_template(template: str):
    return lambda folder: (folder / "chat_template.jinja").write_text(template)


BAD = {
    "pickle": (write_pickle, ["are pickles (pytorch_model.bin)", "safetensors.torch.save_file"]),
    "index of a pickle": (index_of_a_pickle, ["'model.bin'", "no safetensors"]),
    "index of a file outside": (
        lambda folder: write_index(folder, "../outside.safetensors"),
        ["outside of its folder"],
    ),
    "layers": (grow("text_config", "num_hidden_layers"), ["num_hidden_layers", "text_config", "1000000000", "1000."]),
    "width": (grow("vision_config", "hidden_size"), ["hidden_size", "vision_config", "1000000000", "100000."]),
    "short weights": (shorten, ["damaged or cut off"]),
    "scrambled weights": (scramble, ["damaged or cut off"]),
    "tokenizer outside": (take_tokenizer_outside, ["tokenizer"]),
    "template that looks into Python": (write_template("{{ ''.__class__.__mro__ }}"), ["chat template", "unsafe"]),
    "template without an end": (write_template("{% for i in range(10**9) %}x{% endfor %}"), ["chat template"]),
    "template that reads a file": (write_template("{% include '/etc/hostname' %}"), ["chat template"]),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("model", MODELS)
def test_a_bad_checkpoint_is_refused_in_one_line(tmp_path, model, bad):
    source, options = MODELS[model]
    folder = shutil.copytree(source, tmp_path / "model")
    spoil, messages = BAD[bad]
    spoil(folder)
    code, out, error = ask(folder, options)
    assert code == 1 and out == ""
    assert error.startswith("error: ") and error.count("\n") == 1
    assert str(folder) in error and all(message in error for message in messages)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("model", "reference"),
    [
        ("ta_llava", "code.Class"),
        ("ta_llava", "../code.Class"),
        ("ta_llava", "nobody/nothing--code.Class"),
        ("llava", "../code.Class"),
        ("vmtc", "../code.Class"),
    ],
)
def test_code_of_a_checkpoint_is_not_looked_at(tmp_path, model, reference):
    """The command line has its own, whatever `auto_map` says."""
    source, options = MODELS[model]
    folder = shutil.copytree(source, tmp_path / "model")
    for path in (folder / "code.py", tmp_path / "code.py"):
        path.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'executed')!r}).touch()\nclass Class: pass\n")
    auto_classes = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        change_json(folder / name, lambda config: config.update(auto_map=dict.fromkeys(auto_classes, reference)))
    assert ask(folder, options) == (0, "teal", "")
    assert not (tmp_path / "executed").exists()


def test_pickles_are_converted_as_the_message_says(tmp_path, monkeypatch):
    folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="are pickles") as error:
        TaLlavaForConditionalGeneration.from_pretrained(folder)
    monkeypatch.chdir(folder)
    eval(re.search("`(.*)`", str(error.value))[1], {"safetensors": safetensors, "torch": torch})
    converted = TaLlavaForConditionalGeneration.from_pretrained(folder).state_dict()
    assert all(torch.equal(converted[key], value) for key, value in weights.items())


def test_pickles_cannot_be_asked_for():
    with pytest.raises(ValueError, match="`use_safetensors` is False, but only"):
        TaLlavaForConditionalGeneration.from_pretrained(SHIPPED_MODEL, use_safetensors=False)


def test_pickles_on_the_hub(tmp_path, monkeypatch):
    """Neither weights, nor what an index calls weights, nor an adapter; the first are not even downloaded."""
    files = {
        path.name: path.read_bytes() for path in SHIPPED_MODEL.iterdir() if path.suffix in (".json", ".jinja", ".py")
    }
    write_pickle(tmp_path)
    pickled = (tmp_path / "pytorch_model.bin").read_bytes()
    index = json.dumps(
        {"metadata": {}, "weight_map": dict.fromkeys(load_file(SHIPPED_MODEL / "model.safetensors"), "a.bin")}
    )
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "hub")
        hub.add("alice/pickled", {**files, "pytorch_model.bin": pickled})
        hub.add("alice/index", {**files, "model.safetensors.index.json": index, "a.bin": pickled})
        code, _, error = ask("alice/pickled")
        assert code == 1 and "are pickles (pytorch_model.bin)" in error
        downloads = [request.path for request in hub.requests if request.method == "GET"]
        assert not any("pytorch_model.bin" in path for path in downloads) and downloads
        code, _, error = ask("alice/index")
        assert code == 1 and "a.bin" in error and "no safetensors" in error
        config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
        hub.add("alice/adapter", {"adapter_config.json": json.dumps(config), "adapter_model.bin": pickled})
        with pytest.raises(ValueError, match=r"adapter_model\.bin.*no safetensors"):
            TaLlavaForConditionalGeneration.from_pretrained(SHIPPED_MODEL).load_adapter("alice/adapter")
    assert not (tmp_path.parent / "executed").exists()


def test_a_pickled_adapter_is_not_merged(tmp_path):
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(SHIPPED_MODEL)}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    write_pickle(tmp_path / "adapter", "adapter_model.bin")
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "adapter"), str(tmp_path / "out")])
    assert result.exit_code == 1 and "has no adapter_model.safetensors" in result.stderr
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("config_class", [TaLlavaConfig, VmtcCmaiLlavaConfig])
@pytest.mark.parametrize(
    ("text_config", "field"),
    [
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"model_type": "gemma2", "vocab_size": 10**9}, "vocab_size"),
        ({"model_type": "gpt2", "n_layer": 10**9}, "n_layer"),  # that class's name of it
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 1e300}}, "num_hidden_layers"),
    ],
)
def test_sizes_that_no_model_has(config_class, text_config, field):
    with pytest.raises(ValueError, match=rf"`{field}` of `text_config.*` is .*no model has more than \d+"):
        config_class(text_config=text_config)


def test_prefix_tokens_that_no_model_has():
    with pytest.raises(Exception, match="at most 10000, got 1000000000"):
        TaLlavaConfig(num_prefix_tokens=10**9)


CLIP_LARGE = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
GEMMA_2_9B = Gemma2Config(
    hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16, vocab_size=256000
)
VICUNA_13B = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
LLAMA_405B = LlamaConfig(
    hidden_size=16384,
    intermediate_size=53248,
    num_hidden_layers=126,
    num_attention_heads=128,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
)


@pytest.mark.parametrize("text_config", [GEMMA_2_9B, VICUNA_13B, LLAMA_405B])
@pytest.mark.parametrize("config_class", [TaLlavaConfig, VmtcCmaiLlavaConfig])
def test_sizes_that_models_have(config_class, text_config):
    parts = {"vision_config": CLIP_LARGE.to_dict(), "text_config": text_config.to_dict()}
    check_sizes("config", parts)
    assert config_class(**parts).text_config.num_hidden_layers == text_config.num_hidden_layers


@pytest.mark.parametrize("image", ["../secret.png", "a/../../secret.png"])
def test_an_image_of_a_sample_does_not_leave_the_folder(tmp_path, image):
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    with pytest.raises(SampleError, match="outside of"):
        read_sample({"id": "1", "image": image, "conversations": turns}, image_folder=tmp_path)
    inside = read_sample({"id": "1", "image": "a/../b.png", "conversations": turns}, image_folder=tmp_path)
    assert Path(inside.images[0]).resolve() == tmp_path / "b.png"
    records = [{"image": image, "objects": ["cat"]}, {"image": "b.png", "objects": ["dog"]}]
    (tmp_path / "objects.jsonl").write_text("\n".join(map(json.dumps, records)))
    arguments = ["evaluate", str(SHIPPED_MODEL), "--task", "pope", "--data", str(tmp_path / "objects.jsonl")]
    result = CliRunner().invoke(app, [*arguments, "--objects-per-image", "1", "-o", str(tmp_path / "out")])
    assert result.exit_code == 1 and "outside of" in result.stderr and image in result.stderr
