"""A checkpoint or list of samples from anywhere: what is wrong is refused with a message, and nothing in it is executed."""

import glob
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from command_line import run
from conftest import EXAMPLE_IMAGE, FIXTURES, ROOT, SHIPPED_LLAVA, SHIPPED_MODEL
from full_size_configs import CLIP_LARGE, GEMMA_2_9B, LLAMA_405B, VICUNA_13B
from hub_server import HubServer
from safetensors.torch import load_file
from tiny_parts import save_language_model, save_tower
from typer.testing import CliRunner

from ta_llava import TaLlavaConfig, TaLlavaForConditionalGeneration, VmtcCmaiLlavaConfig
from ta_llava.cli import app
from ta_llava.data.samples import SampleError, read_sample
from ta_llava.safe_loading import check_sizes


ORIGINAL = FIXTURES / "original_ta_llava"
# A TA-LLaVA, a stock LLaVA, and that with VMTC.
MODELS = {
    "ta_llava": (SHIPPED_MODEL, ()),
    "llava": (ROOT / "checkpoints" / "llava-tiny", ()),
    "vmtc": (ROOT / "checkpoints" / "llava-tiny", ("--visual-tokens", "16")),
}


@pytest.fixture
def unpickled(monkeypatch) -> list[str]:
    """Which functions that read pickles were called. They work nonetheless."""
    called: list[str] = []

    def spy(module, name):
        read = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, **kwargs: called.append(f"{module.__name__}.{name}") or read(*args, **kwargs)
        )

    for module, names in ((torch, ["load"]), (torch._weights_only_unpickler, ["load"]), (pickle, ["load", "loads"])):
        for name in names:
            spy(module, name)
    return called


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
    """The weights as a pickle: as good as before, so that what reads it goes on without an error."""
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()


def write_index(folder: Path, shard: str, index: str = "model.safetensors.index.json") -> None:
    """An index which says that all weights are in one file."""
    keys = load_file(folder / "model.safetensors")
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, shard)}))


def index_of_a_pickle(folder: Path) -> None:
    write_index(folder, "model.bin")
    write_pickle(folder, "model.bin")


def index_of_a_file_outside(folder: Path) -> None:
    write_index(folder, "../outside.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")


def pickles_in_shards(folder: Path) -> None:
    write_index(folder, "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json")
    write_pickle(folder, "pytorch_model-00001-of-00001.bin")


def change_config(folder: Path, **fields) -> None:
    """Of the model and of its parts."""

    def change(config):
        for part in (config, *(value for key, value in config.items() if key in ("text_config", "vision_config"))):
            part.update(fields)

    change_json(folder / "config.json", change)


def pickle_named_by_the_config(folder: Path) -> None:
    change_config(folder, transformers_weights="adapter_model.bin")
    write_pickle(folder, "adapter_model.bin")


def index_named_by_the_config(folder: Path) -> None:
    name = "other.safetensors.index.json"
    change_config(folder, transformers_weights=name)
    write_index(folder, "model.bin", name)
    write_pickle(folder, "model.bin")


LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}


def pickled_adapter(folder: Path) -> None:
    """Of the model itself, which is beside it."""
    adapter = {**LORA, "base_model_name_or_path": f"alice/{folder.name}"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save({}, folder / "adapter_model.bin")


# What is done to a checkpoint, and what must be said about it.
PICKLES = {
    "weights": (write_pickle, "are pickles (pytorch_model.bin), which can run code"),
    "shards": (pickles_in_shards, "are pickles (pytorch_model.bin.index.json), which can run code"),
    "shards of an index": (index_of_a_pickle, "The weights in 'model.bin' are not safetensors"),
    "named": (pickle_named_by_the_config, "`transformers_weights` of `config` names 'adapter_model.bin'"),
    "index named": (
        index_named_by_the_config,
        "`transformers_weights` of `config` names 'other.safetensors.index.json'",
    ),
    "adapter": (pickled_adapter, "has no adapter_model.safetensors"),
}


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


TEMPLATE = "The chat template in "
BAD = {
    "index of a file outside": (index_of_a_file_outside, ["names '../outside.safetensors'", "outside of its folder."]),
    "layers": (
        grow("text_config", "num_hidden_layers"),
        ["`num_hidden_layers` of `", "text_config` is 1000000000, but no model has more than 1000."],
    ),
    "width": (
        grow("vision_config", "hidden_size"),
        ["`hidden_size` of `", "vision_config` is 1000000000, but no model has more than 100000."],
    ),
    "labels": (
        grow("text_config", "num_labels"),
        ["`num_labels` of `", "text_config` is 1000000000, but no model has more than 100000."],
    ),
    "more weights than files hold": (
        lambda folder: change_json(
            folder / "config.json",
            lambda config: config["text_config"].update(hidden_size=16384, intermediate_size=100_000),
        ),
        ["asks for at least ", " weights, but its files have "],
    ),
    "short weights": (shorten, ["its weights are damaged or cut off (", "not fully covered). Get their files again."]),
    "scrambled weights": (scramble, ["its weights are damaged or cut off (", "index 0). Get their files again."]),
    "tokenizer outside": (take_tokenizer_outside, ["Couldn't instantiate the backend tokenizer"]),
    "template that looks into Python": (
        write_template("{{ ''.__class__.__mro__ }}"),
        [TEMPLATE, "access to attribute '__class__' of 'str' object is unsafe"],
    ),
    "template without an end": (
        write_template("{% for i in range(10**9) %}x{% endfor %}"),
        [TEMPLATE, "Range too big."],
    ),
    "template that reads a file": (
        write_template("{% include '/etc/hostname' %}"),
        [TEMPLATE, "no loader for this environment"],
    ),
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
    assert str(folder) in error and all(message in error for message in messages), error


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


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    save_tower(folder / "tower")
    save_language_model(folder / "language-model")
    return folder


# What is loaded, and the command that loads it.
WAYS = {
    "TA-LLaVA": (SHIPPED_MODEL, lambda model, parts, out: ["ask", EXAMPLE_IMAGE, "what?", "--model", model]),
    "export": (SHIPPED_MODEL, lambda model, parts, out: ["export", model, out]),
    "LLaVA": (SHIPPED_LLAVA, lambda model, parts, out: ["ask", EXAMPLE_IMAGE, "what?", "--model", model]),
    "LLaVA with VMTC": (
        SHIPPED_LLAVA,
        lambda model, parts, out: ["ask", EXAMPLE_IMAGE, "what?", "--model", model, "--visual-tokens", 16],
    ),
    "tower of a LLaVA": (
        SHIPPED_LLAVA,
        lambda model, parts, out: ["visualize", EXAMPLE_IMAGE, "--model", model, "-o", out.with_suffix(".png")],
    ),
    "tower": (
        "tower",
        lambda model, parts, out: ["init", out, "--vision-tower", model, "--language-model", parts / "language-model"],
    ),
    "language model": (
        "language-model",
        lambda model, parts, out: ["init", out, "--vision-tower", parts / "tower", "--language-model", model],
    ),
}


# `export` takes no folder with an adapter at all.
CASES = [(way, what) for way in WAYS for what in PICKLES if (way, what) != ("export", "adapter")]


def spoiled(way: str, what: str, parts: Path, tmp_path: Path) -> Path:
    source, _ = WAYS[way]
    folder = shutil.copytree(parts / source, tmp_path / "model")
    PICKLES[what][0](folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_the_ways_by_which_pickles_are_tried_work(tmp_path, parts, unpickled, way):
    source, command = WAYS[way]
    code, _, error = run(*command(parts / source, parts, tmp_path / "out"))
    assert code == 0, error
    assert not unpickled


@pytest.mark.parametrize(("way", "what"), CASES)
def test_pickles_in_a_folder_are_not_read(tmp_path, parts, unpickled, way, what):
    folder = spoiled(way, what, parts, tmp_path)
    code, out, error = run(*WAYS[way][1](folder, parts, tmp_path / "out"))
    assert unpickled == []
    assert code == 1 and out == "" and error.count("\n") == 1
    assert PICKLES[what][1] in error
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("way", "what"), [(way, what) for way, what in CASES if way != "export" and what != "index named"]
)
def test_pickles_on_the_hub_are_not_even_downloaded(tmp_path, monkeypatch, parts, unpickled, way, what):
    folder = spoiled(way, what, parts, tmp_path)
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "hub")
        hub.add("alice/model", {path.name: path.read_bytes() for path in folder.iterdir()})
        code, out, error = run(*WAYS[way][1]("alice/model", parts, tmp_path / "out"))
        downloads = [request.path for request in hub.requests if request.method == "GET"]
    assert unpickled == []
    assert code == 1 and out == "" and error.count("error: ") == 1
    assert PICKLES[what][1] in error
    assert any(path.endswith("config.json") for path in downloads)
    assert not any(path.endswith(".bin") for path in downloads)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "way", ["TA-LLaVA", "LLaVA", "LLaVA with VMTC", "tower of a LLaVA", "tower", "language model"]
)
def test_a_config_does_not_give_its_fields_other_names(tmp_path, parts, unpickled, way):
    """Under another name the library would find the name of a pickle."""
    folder = shutil.copytree(parts / WAYS[way][0], tmp_path / "model")
    change_config(folder, attribute_map={"transformers_weights": "other"}, other="adapter_model.bin")
    write_pickle(folder, "adapter_model.bin")
    code, out, error = run(*WAYS[way][1](folder, parts, tmp_path / "out"))
    assert code == 1 and out == "" and "has an `attribute_map`" in error and unpickled == []


def test_the_model_of_an_adapter_is_looked_at_too(tmp_path, monkeypatch, unpickled):
    """The library loads it in place of the one that was asked for, whatever that is."""
    other = shutil.copytree(SHIPPED_LLAVA, tmp_path / "other")
    index_of_a_pickle(other)
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "hub")
        hub.add("alice/other", {path.name: path.read_bytes() for path in other.iterdir()})
        files = {path.name: path.read_bytes() for path in SHIPPED_LLAVA.iterdir()}
        adapter = {**LORA, "base_model_name_or_path": "alice/other"}
        files |= {"adapter_config.json": json.dumps(adapter), "adapter_model.safetensors": safetensors.torch.save({})}
        hub.add("alice/model", files)
        code, _, error = ask("alice/model")
    assert code == 1 and "The weights in 'model.bin' are not safetensors" in error and unpickled == []


@pytest.mark.parametrize("what", ["weights", "shards"])
@pytest.mark.parametrize("way", ["LLaVA", "TA-LLaVA"])
def test_pickles_are_converted_as_the_message_says(tmp_path, monkeypatch, parts, way, what):
    folder = spoiled(way, what, parts, tmp_path)
    code, _, error = ask(folder)
    assert code == 1
    monkeypatch.chdir(folder)
    eval(re.search("`(.*)`", error)[1], {"glob": glob, "safetensors": safetensors, "torch": torch})
    converted, expected = (load_file(source / "model.safetensors") for source in (folder, WAYS[way][0]))
    assert converted.keys() == expected.keys() and all(torch.equal(converted[key], expected[key]) for key in expected)
    assert ask(folder) == (0, "teal", "")


def test_pickles_cannot_be_asked_for():
    with pytest.raises(ValueError, match="`use_safetensors` is False, but only"):
        TaLlavaForConditionalGeneration.from_pretrained(SHIPPED_MODEL, use_safetensors=False)


@pytest.mark.parametrize("what", PICKLES)
def test_compress_does_not_copy_pickles(tmp_path, unpickled, what):
    """Nor what names them: what it writes has safetensors under their usual names, or nothing is written."""
    folder = shutil.copytree(SHIPPED_LLAVA, tmp_path / "model")
    PICKLES[what][0](folder)
    code, _, error = run("compress", folder, tmp_path / "out", "--visual-tokens", 16)
    assert unpickled == []
    if what == "adapter":
        assert code == 0 and not list((tmp_path / "out").glob("adapter*"))
        assert ask(tmp_path / "out") == (0, "teal", "")
    else:
        assert code == 1 and "error: " in error and not (tmp_path / "out").exists()


def test_a_pickled_adapter_on_the_hub_is_not_loaded(tmp_path, monkeypatch, unpickled):
    model = TaLlavaForConditionalGeneration.from_pretrained(SHIPPED_MODEL)
    (tmp_path / "adapter").mkdir()
    pickled_adapter(tmp_path / "adapter")
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "hub")
        hub.add("alice/adapter", {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()})
        with pytest.raises(ValueError, match=r"adapter alice/adapter has no adapter_model\.safetensors"):
            model.load_adapter("alice/adapter")
    assert unpickled == []


def test_a_pickled_adapter_is_not_merged(tmp_path, unpickled):
    config = {**LORA, "base_model_name_or_path": str(SHIPPED_MODEL)}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    torch.save({}, tmp_path / "adapter" / "adapter_model.bin")
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "adapter"), str(tmp_path / "out")])
    assert result.exit_code == 1 and "has no adapter_model.safetensors" in result.stderr
    assert unpickled == [] and not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("text_config", [GEMMA_2_9B, VICUNA_13B, LLAMA_405B])
@pytest.mark.parametrize("config_class", [TaLlavaConfig, VmtcCmaiLlavaConfig])
def test_sizes_that_models_have(config_class, text_config):
    parts = {"vision_config": CLIP_LARGE.to_dict(), "text_config": text_config.to_dict()}
    check_sizes("config", parts)
    assert config_class(**parts).text_config.num_hidden_layers == text_config.num_hidden_layers


WAYS_OF_CONFIGS = {
    **WAYS,
    "train": (
        SHIPPED_MODEL,
        lambda model, parts, out: [
            "train",
            ROOT / "recipes/ta_llava/phase1.yaml",
            "--model",
            model,
            "--output-dir",
            out,
        ],
    ),
    "tower of the authors' model": (
        "tower",
        lambda model, parts, out: ["convert-original", ORIGINAL, out, "--vision-tower", model],
    ),
}


@pytest.mark.parametrize("way", [way for way in WAYS_OF_CONFIGS if way != "export"])
def test_lists_that_no_model_has(tmp_path, parts, way):
    source, command = WAYS_OF_CONFIGS[way]
    folder = shutil.copytree(parts / source, tmp_path / "model")
    change_config(folder, layer_types=["full_attention"] * 2000)
    code, out, error = run(*command(folder, parts, tmp_path / "out"))
    assert code == 1 and out == "" and error.count("\n") == 1
    assert re.search(
        r"`layer_types` of `(config|text_config|vision_config)` has 2000, but no model has more than 1000", error
    )


def test_sizes_of_the_authors_model_that_no_model_has(tmp_path):
    folder = shutil.copytree(ORIGINAL, tmp_path / "original")
    change_json(folder / "config.json", lambda config: config.update(vocab_size=10**9))
    code, _, error = run("convert-original", folder, tmp_path / "out", "--vision-tower", ORIGINAL / "tiny-clip")
    assert code == 1 and "`vocab_size` of `config` is 1000000000, but no model has more than 10000000." in error


def name_code(folder: Path, name: str, **fields) -> None:
    """Code for all, of kinds that the library does not know: it would ask whether to run it."""
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoTokenizer"), "code.Class")
    fields = {"auto_map": auto_map, **fields}
    path = folder / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **fields}))


@pytest.mark.parametrize("place", ["config", "image processor", "tower of a LLaVA", "compress", "ask"])
def test_no_command_asks_whether_to_run_code(tmp_path, monkeypatch, processor, place):
    monkeypatch.setattr("builtins.input", lambda *arguments: pytest.fail("asked"))
    original = shutil.copytree(ORIGINAL, tmp_path / "original")
    processor.tokenizer.save_pretrained(original)
    tower = original / "tiny-clip"
    command = ["convert-original", original, tmp_path / "out", "--vision-tower", tower]
    if place == "config":
        name_code(tower, "config.json", model_type="unheard-of")
    elif place == "image processor":
        name_code(tower, "preprocessor_config.json", image_processor_type="UnheardOf")
    elif place in ("compress", "ask"):
        llava = shutil.copytree(SHIPPED_LLAVA, tmp_path / "llava")
        image_processor = {"auto_map": {"AutoImageProcessor": "code.Class"}, "image_processor_type": "UnheardOf"}
        change_json(llava / "processor_config.json", lambda config: config.update(image_processor=image_processor))
        arguments = {"compress": [llava, tmp_path / "out"], "ask": [EXAMPLE_IMAGE, "?", "--model", llava]}
        command = [place, *arguments[place], "--visual-tokens", 16]
    else:  # a config that the library knows, of a tower that it does not have alone
        llava = shutil.copytree(SHIPPED_LLAVA, tmp_path / "llava")
        fields = {"model_type": "blip_2_vision_model", "auto_map": {"AutoModel": "code.Class"}}
        change_json(llava / "config.json", lambda config: config["vision_config"].update(fields))
        command = ["visualize", EXAMPLE_IMAGE, "--model", llava, "-o", tmp_path / "out.png"]
    code, _, error = run(*command)
    assert code == 1 and error.count("\n") == 1 and "trust_remote_code" in error


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
