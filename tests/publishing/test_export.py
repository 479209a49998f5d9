"""Exported folders load where this package is not installed: each test script runs in an environment without it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import EXAMPLE_IMAGE, SHIPPED_MODEL, copy_without_a_weight, run_without_the_package
from hub_server import HubServer
from huggingface_hub import constants, parse_eval_result_entries
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from ta_llava.inference import answer, load
from ta_llava.publishing.existing_card import is_unedited
from ta_llava.publishing.export import export_model
from ta_llava.publishing.model_card import write_model_card


QUESTIONS = ["what color is the shape?", "is there a circle in the image?"]

SCRIPT = """
import importlib.util, json, sys
assert importlib.util.find_spec("ta_llava") is None, "the package must not be importable here"

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

folder, image, out, questions = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
trust = {"trust_remote_code": True}
results = {"config": type(AutoConfig.from_pretrained(folder, **trust)).__name__}
base, info = AutoModel.from_pretrained(folder, output_loading_info=True, **trust)
results["base"], results["base keys"] = type(base).__name__, sorted(info["missing_keys"])
model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **trust)
results["model"] = type(model).__name__
results["keys"] = [sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
processor = AutoProcessor.from_pretrained(folder, **trust)
results["processor"] = type(processor).__name__


def chat(question):
    content = [{"type": "image", "path": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


inputs = processor.apply_chat_template(
    [chat(question) for question in questions], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt", processor_kwargs={"padding": True},
)
with torch.no_grad():
    logits = model.eval()(**inputs).logits[:, -1]
torch.save(logits, out)
pipe = pipeline("image-text-to-text", model=folder, dtype=torch.float32, **trust)
results["pipeline, chat"] = pipe(text=chat(questions[0]), max_new_tokens=8, return_full_text=False)[0]["generated_text"]
chats = [chat(question) for question in questions]
answers = pipe(text=chats, max_new_tokens=8, return_full_text=False, batch_size=2)
results["pipeline, chats"] = [answer[0]["generated_text"] for answer in answers]
prompt = processor.apply_chat_template(chat(questions[1]), add_generation_prompt=True)
texts = pipe(images=Image.open(image), text=prompt, max_new_tokens=8, return_full_text=False)
results["pipeline, image and text"] = texts[0]["generated_text"]

# What was loaded from there, saved, loads again.
model.save_pretrained(folder + "-again")
processor.save_pretrained(folder + "-again")
again = AutoModelForImageTextToText.from_pretrained(folder + "-again", dtype=torch.float32, **trust)
AutoProcessor.from_pretrained(folder + "-again", **trust)
with torch.no_grad():
    results["again"] = torch.equal(again.eval()(**inputs).logits[:, -1], logits)
print(json.dumps(results))
"""


def test_an_exported_folder_loads_without_the_package(python_without_the_package, tmp_path):
    folder = tmp_path / "exported"
    export_model(SHIPPED_MODEL, folder)
    files = {path.name for path in folder.iterdir()}
    assert {
        "configuration_ta_llava.py",
        "modeling_ta_llava.py",
        "processing_ta_llava.py",
        "chat_template.jinja",
        "README.md",
    } <= files
    config = json.loads((folder / "config.json").read_text())
    assert {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"} <= set(config["auto_map"])
    assert config["text_config"]["model_type"] == "gemma2"  # all of it: building needs no other repo

    arguments = [str(folder), str(EXAMPLE_IMAGE), str(tmp_path / "logits.pt"), json.dumps(QUESTIONS)]
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    lines = run_without_the_package(python_without_the_package, tmp_path, SCRIPT, *arguments, **offline)
    results = json.loads(lines[-1])
    model, processor = load(SHIPPED_MODEL)
    expected = list(answer(model, processor, [([str(EXAMPLE_IMAGE)], question) for question in QUESTIONS]))
    assert results == {
        "config": "TaLlavaConfig",
        "base": "TaLlavaModel",
        "base keys": [],
        "model": "TaLlavaForConditionalGeneration",
        "keys": [[], [], []],
        "processor": "TaLlavaProcessor",
        "pipeline, chat": expected[0],
        "pipeline, chats": expected,
        "pipeline, image and text": expected[1],
        "again": True,
    }


def test_saving_a_loaded_model_keeps_the_weights(tmp_path):
    from safetensors.torch import load_file

    export_model(SHIPPED_MODEL, tmp_path / "exported")
    before, after = (load_file(folder / "model.safetensors") for folder in (SHIPPED_MODEL, tmp_path / "exported"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


def test_a_folder_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="exists already"):
        export_model(SHIPPED_MODEL, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt"]


def test_the_current_folder_is_no_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is the current folder"):
        export_model(SHIPPED_MODEL, ".")


def test_a_link_leads_to_the_new_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    export_model(SHIPPED_MODEL, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "model.safetensors").is_file()


def test_one_progress_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging, "_tqdm_active", True)
    export_model(SHIPPED_MODEL, tmp_path / "out")
    bars = capsys.readouterr().err
    assert "Loading weights" in bars and "shards" not in bars and logging.is_progress_bar_enabled()


def copy_of_the_model(folder: Path) -> Path:
    return shutil.copytree(SHIPPED_MODEL, folder, ignore=shutil.ignore_patterns("*.py"))


def test_a_model_with_an_adapter_is_not_exported_as_one(tmp_path, monkeypatch):
    """Of a repo the library would load both, and save the adapter alone."""
    files = {path.name: path.read_bytes() for path in copy_of_the_model(tmp_path / "model").iterdir()}
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "hub")
        hub.add("alice/both", {**files, "adapter_config.json": "{}"})
        with pytest.raises(ValueError, match="alice/both has a PEFT adapter"):
            export_model("alice/both", tmp_path / "out")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template"),
        (
            lambda folder: (folder / "chat_template.jinja").write_text("{{ 1 / 0 }}"),
            "chat template in .* cannot be used",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 9), "weights are damaged or cut off"),
        (
            lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"),
            "metadata in the README.md of .* not YAML",
        ),
        (lambda folder: (folder / "README.md").write_bytes(b"caf\xe9"), "README.md is not UTF-8"),
    ],
    ids=["no template", "bad template", "damaged weights", "metadata", "encoding"],
)
def test_damaged_files_are_named(tmp_path, spoil, message):
    folder = copy_of_the_model(tmp_path / "model")
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        export_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_such_model_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=f"No model could be loaded from '{tmp_path / 'model'}'"):
        export_model(tmp_path / "model", tmp_path / "out")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match="'llava' model, not a 'ta_llava'"):
        export_model(tmp_path / "model", tmp_path / "out")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has a PEFT adapter.*`ta-llava merge`"):
        export_model(tmp_path / "model", tmp_path / "out")


def test_a_model_that_lacks_weights_is_refused(tmp_path):
    """Loading would fill them with random ones."""
    name = copy_without_a_weight(tmp_path / "model")
    with pytest.raises(ValueError, match=f"lacks 1 weights, such as '{name}'"):
        export_model(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def copied(tmp_path):
    """The shipped model, to which a card can be added."""
    return Path(shutil.copytree(SHIPPED_MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.py")))


@pytest.fixture
def results(copied, tmp_path_factory):
    """Of an evaluation of that model."""
    folder = tmp_path_factory.mktemp("results")
    content = {
        "task": "easy-vqa",
        "scores": {"all": {"questions": 2, "accuracy": 0.5}},
        "note": "Exact match.",
        "settings": {"data": None, "num_questions": 2, "model": str(copied)},
        "benchmark": "me/easy-vqa",
    }
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def test_a_card_that_is_there_goes_along(copied, results, tmp_path):
    (copied / "README.md").write_bytes(b"mine\r\n")
    export_model(copied, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes() == b"mine\r\n"
    with pytest.raises(ValueError, match=r"has a README\.md that was edited.*--overwrite-card"):
        export_model(copied, tmp_path / "other", results=[results])
    export_model(copied, tmp_path / "other", overwrite_card=True)
    assert (tmp_path / "other" / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")


def test_results_are_added_to_a_card_that_nobody_edited(copied, results, tmp_path):
    card = write_model_card(copied, "model")
    (copied / "README.md").write_bytes(card.replace("\n", "\r\n").encode())
    export_model(copied, tmp_path / "out", results=[results])
    written = (tmp_path / "out" / "README.md").read_text()
    assert "| all | 2 | 50.00% |" in written and is_unedited(written)

    # And so is the score for the leaderboard of a benchmark, which goes along from then on.
    export_model(tmp_path / "out", tmp_path / "again")
    for name in ("out", "again"):
        [score] = (tmp_path / name / ".eval_results").iterdir()
        [entry] = parse_eval_result_entries(yaml.safe_load(score.read_text()))
        assert (entry.dataset_id, entry.value) == ("me/easy-vqa", 0.5)


def test_a_card_is_not_written_anew_where_that_loses_its_training(copied, results, tmp_path):
    summary = {
        "recipe": {
            "model": "me/start",
            "output_dir": str(copied),
            "train": ["projector"],
            "data": {"path": "captions.json"},
            "global_batch_size": 8,
            "training_arguments": {},
        },
        "data": {"kept": 10},
        "log": [{"step": 2, "train_loss": 0.5}],
    }
    (copied / "training_summary.json").write_text(json.dumps(summary))
    export_model(copied, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "| model | projector | captions.json | 10 |" in card
    with pytest.raises(ValueError, match=r"tells of its training.*--results with that folder"):
        export_model(tmp_path / "exported", tmp_path / "out", results=[results])
    export_model(copied, tmp_path / "out", results=[results])
    written = (tmp_path / "out" / "README.md").read_text()
    assert "| model | projector | captions.json | 10 |" in written and "| all | 2 | 50.00% |" in written


def test_a_repo_in_the_cache_needs_no_hub(tmp_path, monkeypatch, caplog):
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        files = {path.name: path.read_bytes() for path in SHIPPED_MODEL.iterdir()}
        hub.add("alice/model", {**files, "README.md": "mine"})
        AutoModelForImageTextToText.from_pretrained("alice/model")
        AutoProcessor.from_pretrained("alice/model")
        number = len(hub.requests)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        export_model("alice/model", tmp_path / "out")
        assert len(hub.requests) == number
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert is_unedited((tmp_path / "out" / "README.md").read_text())
    assert "The README.md of alice/model cannot be downloaded now, so a new one is written." in caplog.text


TA_LLAVA_FILES = {
    "configuration_ta_llava",
    "modeling_ta_llava",
    "processing_ta_llava",
    "chat_messages",
    "encoded_images",
    "image_loading",
    "safe_loading",
    "vmtc",
    "vision_towers",
    "vision_language_model",
    "prefix_adapters",
    "image_inputs",
    "attention_masks",
    "library_versions",
    "library_layers",
}


@pytest.mark.parametrize(
    "hub_files",
    [
        TA_LLAVA_FILES,
        {
            "vmtc_cmai_patch",
            "vmtc_cmai_mixins",
            "vmtc_cmai_views",
            "vmtc_cmai_llava_next",
            "vmtc_cmai_llava_onevision",
            "image_views",
            "vmtc",
            "cmai",
            "chat_messages",
            "cmai_cache",
            "vision_towers",
            "vision_language_model",
            "attention_masks",
            "library_versions",
            "library_layers",
            "encoded_images",
            "image_loading",
            "safe_loading",
        },
    ],
)
def test_the_hub_files_import_only_each_other_transformers_torch_and_pillow(hub_files):
    import ast

    import ta_llava

    allowed = {"transformers", "torch", "PIL", "numpy", "huggingface_hub", *sys.stdlib_module_names}
    source = Path(ta_llava.__file__).parent
    for name in sorted(hub_files):
        tree = ast.parse((source / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in hub_files
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names)


def test_the_shipped_code_is_that_of_the_package():
    """The checkpoint links to the files in `src/`: they cannot fall behind."""
    import ta_llava

    source = Path(ta_llava.__file__).parent
    names = {path.name for path in SHIPPED_MODEL.glob("*.py")}
    assert names == {f"{name}.py" for name in TA_LLAVA_FILES}
    assert all((SHIPPED_MODEL / name).read_text() == (source / name).read_text() for name in names)
