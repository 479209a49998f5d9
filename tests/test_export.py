"""Exported folders load where this package is not installed: each test script runs in an environment without it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLE_IMAGE, SHIPPED_MODEL

from ta_llava.export import export_model
from ta_llava.inference import answer, load


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

    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    arguments = [str(folder), str(EXAMPLE_IMAGE), str(tmp_path / "logits.pt"), json.dumps(QUESTIONS)]
    process = subprocess.run(
        [python_without_the_package, "-c", SCRIPT, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    results = json.loads(process.stdout.splitlines()[-1])
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


def test_what_is_no_such_model_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=f"no model in '{tmp_path / 'model'}'"):
        export_model(tmp_path / "model", tmp_path / "out")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match="'llava' model, not a 'ta_llava'"):
        export_model(tmp_path / "model", tmp_path / "out")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a PEFT adapter.*`ta-llava merge`"):
        export_model(tmp_path / "model", tmp_path / "out")


def test_a_model_that_lacks_weights_is_refused(tmp_path):
    """Loading would fill them with random ones."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(SHIPPED_MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.py"))
    weights = load_file(SHIPPED_MODEL / "model.safetensors")
    name = next(name for name in weights if "prefix" in name)
    del weights[name]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    (tmp_path / "model" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=f"lacks 1 weights, such as '{name}'"):
        export_model(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_card_that_is_there_goes_along(tmp_path):
    shutil.copytree(SHIPPED_MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.py"))
    (tmp_path / "model" / "README.md").write_text("mine")
    export_model(tmp_path / "model", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    with pytest.raises(ValueError, match=r"has a README\.md.*--overwrite-card"):
        export_model(tmp_path / "model", tmp_path / "other", results=[tmp_path])
    export_model(tmp_path / "model", tmp_path / "other", overwrite_card=True)
    assert (tmp_path / "other" / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")


TA_LLAVA_FILES = {
    "configuration_ta_llava",
    "modeling_ta_llava",
    "processing_ta_llava",
    "image_loading",
    "safe_loading",
    "vmtc",
}


@pytest.mark.parametrize(
    "hub_files", [TA_LLAVA_FILES, {"vmtc_cmai_patch", "vmtc", "cmai", "image_loading", "safe_loading"}]
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
