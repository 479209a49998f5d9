"""Stock LLaVA checkpoints, as they lie on the Hub, become folders that answer with VMTC and CMAI."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from command_line import run
from conftest import EXAMPLE_IMAGE, make_lively, run_without_the_package
from huggingface_hub.errors import StrictDataclassFieldValidationError
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_parts import SPECIAL_TOKENS, build_image_processor, build_tokenizer
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
    SiglipVisionConfig,
)

from ta_llava import VmtcCmaiLlavaConfig, VmtcCmaiLlavaForConditionalGeneration, VmtcCmaiLlavaProcessor
from ta_llava.building.compress import VMTC_PRESETS, compress_llava
from ta_llava.publishing.export import export_model
from ta_llava.vmtc import TRAINING_FREE_VMTC


IMAGE_SIZE, PATCH_SIZE, NUM_PATCHES = 24, 4, 36
WORDS = ["USER", "ASSISTANT", ":", "?", "what", "color", "is", "the", "shape"]
IMAGE_TOKEN_ID = len(SPECIAL_TOKENS)
VOCAB_SIZE = len(SPECIAL_TOKENS) + 1 + len(WORDS)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}:{% for item in message['content'] %}"
    "{{ ' <image>' if item['type'] == 'image' else ' ' + item['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
TOWERS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig, "dinov2": Dinov2Config}


def build_stock_model(tower: str = "clip", **kwargs) -> LlavaForConditionalGeneration:
    vision_config = TOWERS[tower](
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text_config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision_config, text_config=text_config, image_token_index=IMAGE_TOKEN_ID, **kwargs
    )
    torch.manual_seed(0)
    return make_lively(LlavaForConditionalGeneration(config)).eval()


def build_stock_processor(**kwargs) -> LlavaProcessor:
    tokenizer = build_tokenizer("words", ["<image>"], words=WORDS, padding_side="left")
    return LlavaProcessor(build_image_processor(IMAGE_SIZE), tokenizer, chat_template=CHAT_TEMPLATE, **kwargs)


NEW_PROCESSOR = {
    "patch_size": PATCH_SIZE,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def save_stock(folder: Path, tower: str = "clip", processor: dict | None = None, **kwargs) -> Path:
    build_stock_model(tower, **kwargs).save_pretrained(folder, max_shard_size="40KB")
    build_stock_processor(**(NEW_PROCESSOR if processor is None else processor)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A checkpoint of several shards."""
    folder = save_stock(tmp_path_factory.mktemp("hub") / "stock")
    assert len(list(folder.glob("*.safetensors"))) > 2 and (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.fixture
def own_stock(stock, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(stock, tmp_path / "stock"))


def load(folder: Path, **kwargs):
    model, info = VmtcCmaiLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), VmtcCmaiLlavaProcessor.from_pretrained(folder)


def vmtc_settings(config):
    """Those of a preset."""
    return {name: getattr(config, name) for name in TRAINING_FREE_VMTC}


def inputs_of(processor, **kwargs):
    return processor(
        images=EXAMPLE_IMAGE, text="USER: <image> what color is the shape?", return_tensors="pt", **kwargs
    )


@pytest.mark.parametrize(
    ("arguments", "flags", "message"),
    [
        ([], (True, None, True, 0.6), "VMTC with 50% of the visual tokens, CMAI up to 0.6."),
        (["--visual-tokens", 9], (True, 9, False, 0.6), "VMTC with 9 visual tokens."),
        (["--cmai", 0.3], (False, None, True, 0.3), "CMAI up to 0.3."),
        (["--visual-tokens", 9, "--cmai", 1], (True, 9, True, 1.0), "VMTC with 9 visual tokens, CMAI up to 1.0."),
        (["--visual-tokens", NUM_PATCHES], (True, NUM_PATCHES, False, 0.6), "VMTC with 36 visual tokens."),
        (["--cmai", 0], (False, None, False, 0.6), "neither VMTC nor CMAI."),
    ],
)
def test_the_command_line_turns_on_what_it_names_or_both(stock, tmp_path, arguments, flags, message):
    out = tmp_path / "new" / "out"
    code, printed, _ = run("compress", stock, out, *arguments)
    first, *rest = printed.splitlines()
    assert (code, first) == (0, f"Wrote {out}: {message}")
    assert ["AutoModelForImageTextToText" in line for line in rest] == ([] if "neither" in message else [True])
    model, processor = load(out)
    config = model.config
    assert (config.use_vmtc, config.vmtc_num_visual_tokens, config.use_cmai, config.cmai_max_ratio) == flags
    assert vmtc_settings(config) == TRAINING_FREE_VMTC
    assert (processor.use_vmtc, processor.vmtc_num_visual_tokens) == flags[:2]
    inputs = inputs_of(processor)
    expected = {(True, None): NUM_PATCHES // 2, (False, None): NUM_PATCHES}.get(flags[:2], flags[1])
    assert (inputs["input_ids"] == IMAGE_TOKEN_ID).sum() == expected
    assert model(**inputs).logits.isfinite().all()
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # nothing is left of the work


def test_the_papers_settings_on_request(stock, tmp_path):
    paper, free = tmp_path / "paper", tmp_path / "free"
    assert run("compress", stock, paper, "--visual-tokens", 9, "--preset", "paper")[0] == 0
    config = load(paper)[0].config
    stock_settings = vmtc_settings(VmtcCmaiLlavaConfig())
    assert vmtc_settings(config) == stock_settings == VMTC_PRESETS["paper"]
    assert stock_settings != TRAINING_FREE_VMTC
    edit_json(paper / "config.json", vmtc_layers=[1, 2])  # they would replace the stages of the preset
    config = compress_llava(paper, free, preset="training-free")
    assert vmtc_settings(config) == TRAINING_FREE_VMTC
    assert (config.vmtc_layers, config.vmtc_num_visual_tokens) == (None, 9)
    code, _, error = run("compress", stock, tmp_path / "none", "--preset", "best")
    assert code != 0 and "training-free, paper, got 'best'" in error
    assert not (tmp_path / "none").exists()


def test_a_llava_that_was_trained_without_vmtc_gets_the_preset_too(stock, tmp_path):
    """Its `config.json` is of our own type, with the fields of the paper, but its weights never saw VMTC."""
    own = tmp_path / "own"
    load(stock)[0].save_pretrained(own)
    load(stock)[1].save_pretrained(own)
    assert vmtc_settings(load(own)[0].config) == VMTC_PRESETS["paper"]
    for arguments in ((9,), ()):
        config = compress_llava(own, tmp_path / f"free-{len(arguments)}", *arguments)
        assert config.use_vmtc and vmtc_settings(config) == TRAINING_FREE_VMTC
    assert vmtc_settings(compress_llava(own, tmp_path / "cmai", cmai_max_ratio=0.6)) == VMTC_PRESETS["paper"]  # off
    assert vmtc_settings(compress_llava(own, tmp_path / "paper", 9, preset="paper")) == VMTC_PRESETS["paper"]
    assert vmtc_settings(compress_llava(tmp_path / "paper", tmp_path / "on", 12)) == VMTC_PRESETS["paper"]


def test_the_folder_has_all_that_the_hub_needs(stock, tmp_path):
    out = tmp_path / "out"
    compress_llava(stock, out)
    names = {path.name for path in out.iterdir()}
    code = {
        "vmtc_cmai_patch.py",
        "vmtc_cmai_mixins.py",
        "vmtc.py",
        "cmai.py",
        "cmai_cache.py",
        "vision_towers.py",
        "vision_language_model.py",
        "attention_masks.py",
        "library_versions.py",
        "library_layers.py",
        "chat_messages.py",
        "encoded_images.py",
        "image_loading.py",
        "safe_loading.py",
    }
    assert {name for name in names if name.endswith(".py")} == code
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "processor_config.json"} <= names
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["VmtcCmaiLlavaForConditionalGeneration"]
    assert config["model_type"] == "vmtc_cmai_llava"
    models = {"AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"}
    assert set(config["auto_map"]) == {"AutoConfig", "AutoProcessor", *models}
    processor = json.loads((out / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "vmtc_cmai_patch.VmtcCmaiLlavaProcessor"}


def test_weights_are_linked(stock, tmp_path):
    # As in the Hub's cache, where a snapshot is symbolic links.
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in stock.iterdir():
        (snapshot / path.name).symlink_to(path)
    compress_llava(snapshot, tmp_path / "out")
    shards = sorted(stock.glob("*.safetensors"))
    for shard in shards:
        linked = tmp_path / "out" / shard.name
        assert linked.stat().st_ino == shard.stat().st_ino and not linked.is_symlink()
    assert not os.path.samefile(tmp_path / "out" / "generation_config.json", stock / "generation_config.json")


@pytest.mark.parametrize("how", ["no links", "--copy"])
def test_weights_are_copied_where_they_cannot_or_should_not_be_linked(stock, tmp_path, monkeypatch, how):
    def refuse(*arguments, **kwargs):
        raise OSError(18, "Invalid cross-device link")

    if how == "no links":
        monkeypatch.setattr(os, "link", refuse)
    assert run("compress", stock, tmp_path / "out", *([how] if how == "--copy" else []))[0] == 0
    for shard in stock.glob("*.safetensors"):
        copied = tmp_path / "out" / shard.name
        assert copied.stat().st_ino != shard.stat().st_ino and copied.read_bytes() == shard.read_bytes()
    load(tmp_path / "out")


def test_with_the_flags_off_logits_are_those_of_the_stock_model(stock, tmp_path):
    compress_llava(stock, tmp_path / "out", 9, 0.6)
    model, processor = load(tmp_path / "out", use_vmtc=False, use_cmai=False)
    processor.use_vmtc = False
    expected = LlavaForConditionalGeneration.from_pretrained(stock).eval()
    inputs = LlavaProcessor.from_pretrained(stock)(
        images=Image.open(EXAMPLE_IMAGE).convert("RGB"),
        text="USER: <image> what color is the shape?",
        return_tensors="pt",
    )
    own = inputs_of(processor)
    assert all(torch.equal(inputs[key], own[key]) for key in ("input_ids", "pixel_values"))
    with torch.no_grad():
        assert torch.equal(model(**own).logits, expected(**inputs).logits)
    with_flags, _ = load(tmp_path / "out")
    compressed = inputs_of(VmtcCmaiLlavaProcessor.from_pretrained(tmp_path / "out"))
    assert not torch.equal(with_flags(**compressed).logits[:, -1], model(**own).logits[:, -1])


@pytest.mark.parametrize("layout", ["one file", "names of today", "bfloat16", "separate files"])
def test_layouts_of_the_hub(tmp_path, layout):
    stock = tmp_path / "stock"
    model = build_stock_model().to(torch.bfloat16 if layout == "bfloat16" else torch.float32)
    model.save_pretrained(stock)
    build_stock_processor().save_pretrained(stock)
    weights = stock / "model.safetensors"
    assert any(key.startswith("language_model.model.") for key in load_file(weights))
    if layout == "names of today":
        save_file(model.state_dict(), weights, metadata={"format": "pt"})
    if layout == "separate files":  # as before processors were saved whole
        (stock / "chat_template.jinja").unlink()
        (stock / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
        settings = json.loads((stock / "processor_config.json").read_text())
        images = {**settings.pop("image_processor"), "processor_class": "LlavaProcessor"}
        (stock / "preprocessor_config.json").write_text(json.dumps(images))
        (stock / "processor_config.json").unlink()
        (stock / "generation_config.json").unlink()

    compress_llava(stock, tmp_path / "out", 9)
    assert (tmp_path / "out" / "model.safetensors").samefile(weights)
    loaded, processor = load(tmp_path / "out", dtype="auto")
    assert processor.chat_template == CHAT_TEMPLATE
    assert loaded.dtype == model.dtype
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert loaded.generate(**inputs_of(processor).to(loaded.dtype), max_new_tokens=2).shape[1] > 9


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("budget", [None, 9])
def test_placeholders_equal_features_where_the_stock_processor_does_not_say(tmp_path, tower, strategy, budget):
    stock = save_stock(tmp_path / "stock", tower, processor={}, vision_feature_select_strategy=strategy)
    settings = json.loads((stock / "processor_config.json").read_text())
    assert settings["patch_size"] is None and settings["vision_feature_select_strategy"] is None
    compress_llava(stock, tmp_path / "out", budget, 0.5)
    model, processor = load(tmp_path / "out")
    assert processor.patch_size == PATCH_SIZE and processor.vision_feature_select_strategy == strategy
    assert processor.num_additional_image_tokens == (0 if tower == "siglip" else 1)
    inputs = inputs_of(processor)
    count = (budget or NUM_PATCHES) + (tower != "siglip") - (strategy == "default")
    assert (inputs["input_ids"] == IMAGE_TOKEN_ID).sum() == count
    assert len(model.get_image_features(inputs["pixel_values"]).pooler_output[0]) == count
    assert model(**inputs).logits.isfinite().all()
    # The budget of a call is counted the same way.
    if budget is not None:
        assert model(**inputs_of(processor, num_visual_tokens=5), num_visual_tokens=5).logits.isfinite().all()


def test_a_single_file_counts_more_than_an_index_that_an_earlier_save_left(own_stock, tmp_path):
    newer = build_stock_model()
    with torch.no_grad():
        newer.lm_head.weight.fill_(0.5)
    newer.save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / "model.safetensors", own_stock)
    compress_llava(own_stock, tmp_path / "out", 9)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert (load(tmp_path / "out")[0].lm_head.weight == 0.5).all()


@pytest.mark.parametrize("flags", [(9, 0.6), (9, 0), (None, 0.6)])
def test_the_stock_class_refuses_a_compressed_folder(stock, tmp_path, flags):
    """It would run without VMTC and CMAI, and warn of the model type at most."""
    compress_llava(stock, tmp_path / "one", *flags)
    model, processor = load(tmp_path / "one")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "two")  # as after training
    for folder in (tmp_path / "one", tmp_path / "two"):
        for stock_class in (LlavaForConditionalGeneration, LlavaModel):
            with pytest.raises(
                StrictDataclassFieldValidationError, match="Load the model with AutoModelForImageTextToText"
            ):
                stock_class.from_pretrained(folder)
        assert not hasattr(load(folder)[0].config, "stock_llava")


def test_the_stock_class_loads_a_folder_with_neither(stock, tmp_path):
    compress_llava(stock, tmp_path / "one", cmai_max_ratio=0)
    # As the docs say, it is got back from a compressed one too.
    compress_llava(stock, tmp_path / "two", 9, 0.6)
    off, processor = load(tmp_path / "two", use_vmtc=False, use_cmai=False)
    off.save_pretrained(tmp_path / "three")
    processor.use_vmtc = False
    inputs = inputs_of(processor)
    expected = LlavaForConditionalGeneration.from_pretrained(stock).eval()(**inputs).logits
    for folder in (tmp_path / "one", tmp_path / "three"):
        model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and torch.equal(model.eval()(**inputs).logits, expected)


def test_a_stock_processor_beside_a_compressed_model_is_named(stock, tmp_path):
    compress_llava(stock, tmp_path / "one", 9, 0.6)
    model, _ = load(tmp_path / "one")
    inputs = LlavaProcessor.from_pretrained(tmp_path / "one")(
        Image.new("RGB", (24, 24)), "<image>", return_tensors="pt"
    )
    with pytest.raises(ValueError, match="36 image placeholders.*9 visual tokens.*load a `VmtcCmaiLlavaProcessor`"):
        model(**inputs)


@pytest.mark.parametrize(
    ("arguments", "flags", "message"),
    [
        ([], (True, 9, True, 0.3), "VMTC with 9 visual tokens, CMAI up to 0.3."),
        (["--visual-tokens", 5], (True, 5, True, 0.3), "VMTC with 5 visual tokens, CMAI up to 0.3."),
        (["--cmai", 0.2], (True, 9, True, 0.2), "VMTC with 9 visual tokens, CMAI up to 0.2."),
        (["--cmai", 0], (True, 9, False, 0.3), "VMTC with 9 visual tokens."),
        (["--visual-tokens", 5, "--cmai", 0], (True, 5, False, 0.3), "VMTC with 5 visual tokens."),
    ],
)
def test_of_a_compressed_folder_what_is_not_named_stays(stock, tmp_path, arguments, flags, message):
    compress_llava(stock, tmp_path / "one", 9, 0.3)
    # How VMTC works is what it was trained with, if it was.
    edit_json(tmp_path / "one" / "config.json", vmtc_layers=[1, 2], **VMTC_PRESETS["paper"])
    code, printed, _ = run("compress", tmp_path / "one", tmp_path / "two", *arguments)
    assert (code, printed.splitlines()[0]) == (0, f"Wrote {tmp_path / 'two'}: {message}")
    model, processor = load(tmp_path / "two")
    config = model.config
    assert (config.use_vmtc, config.vmtc_num_visual_tokens, config.use_cmai, config.cmai_max_ratio) == flags
    assert (processor.use_vmtc, processor.vmtc_num_visual_tokens) == flags[:2]
    assert (vmtc_settings(config), config.vmtc_layers) == (VMTC_PRESETS["paper"], [1, 2])
    assert model(**inputs_of(processor)).logits.isfinite().all()


def test_a_compressed_folder_with_both_off_is_one_with_neither(stock, tmp_path):
    compress_llava(stock, tmp_path / "one", cmai_max_ratio=0)
    config = compress_llava(tmp_path / "one", tmp_path / "two")
    assert (config.use_vmtc, config.vmtc_keep_ratio, config.use_cmai, config.cmai_max_ratio) == (True, 0.5, True, 0.6)


def test_a_compressed_folder_can_be_exported(stock, tmp_path):
    compress_llava(stock, tmp_path / "one", 9, 0.6)
    export_model(tmp_path / "one", tmp_path / "two")
    (one, processor), (two, _) = load(tmp_path / "one"), load(tmp_path / "two")
    inputs = inputs_of(processor)
    assert torch.equal(one(**inputs).logits, two(**inputs).logits)
    assert {
        "vmtc_cmai_patch.py",
        "vmtc_cmai_mixins.py",
        "cmai.py",
        "cmai_cache.py",
        "vision_towers.py",
        "vision_language_model.py",
        "attention_masks.py",
        "library_versions.py",
        "library_layers.py",
    } <= {path.name for path in (tmp_path / "two").iterdir()}


SCRIPT = """
import importlib.util, json, sys
assert importlib.util.find_spec("ta_llava") is None, "the package must not be importable here"

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

folder, image = sys.argv[1:]
trust = {"trust_remote_code": True}
results = {"config": type(AutoConfig.from_pretrained(folder, **trust)).__name__}
for auto_class in (AutoModel, AutoModelForImageTextToText):
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **trust)
    keys = [sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    results[auto_class.__name__] = [type(model).__name__, keys]
processor = AutoProcessor.from_pretrained(folder, **trust)
results["processor"] = type(processor).__name__
content = [{"type": "image", "path": image}, {"type": "text", "text": "what color is the shape ?"}]
chat = [{"role": "user", "content": content}]
pipe = pipeline("image-text-to-text", model=folder, **trust)
settings = {"generate_kwargs": {"max_new_tokens": 8, "min_new_tokens": 8}, "return_full_text": False}
results["chat"] = pipe(text=chat, **settings)[0]["generated_text"].strip()
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
results["image and text"] = pipe(images=Image.open(image), text=prompt, **settings)[0]["generated_text"].strip()
inputs = processor(images=image, text=prompt, return_tensors="pt")
output = model.eval().generate(**inputs, max_new_tokens=8, min_new_tokens=8)
results["generate"] = processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(json.dumps(results))
"""


def test_a_compressed_folder_answers_without_the_package(stock, python_without_the_package, tmp_path):
    folder = tmp_path / "compressed"
    compress_llava(stock, folder, 9, 0.6)
    arguments = [str(folder), str(EXAMPLE_IMAGE)]
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    lines = run_without_the_package(python_without_the_package, tmp_path, SCRIPT, *arguments, **offline)
    results = json.loads(lines[-1])
    model, processor = load(folder)
    prompt = "USER: <image> what color is the shape ? ASSISTANT:"
    inputs = processor(images=EXAMPLE_IMAGE, text=prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8)
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert results == {
        "config": "VmtcCmaiLlavaConfig",
        "AutoModel": ["VmtcCmaiLlavaModel", results["AutoModel"][1]],
        "AutoModelForImageTextToText": ["VmtcCmaiLlavaForConditionalGeneration", [[], [], []]],
        "processor": "VmtcCmaiLlavaProcessor",
        "chat": expected,
        "image and text": expected,
        "generate": expected,
    }
    assert expected and results["AutoModel"][1][0] == []


def test_a_hub_repo_is_downloaded_weights_last(stock, tmp_path, monkeypatch):
    import fnmatch

    import ta_llava.building.compress

    cache, asked = tmp_path / "cache", []

    def snapshot_download(repo, allow_patterns):
        asked.append(allow_patterns)
        cache.mkdir(exist_ok=True)
        for path in stock.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(path, cache / path.name)
        return str(cache)

    monkeypatch.setattr(ta_llava.building.compress, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="36 patches"):
        compress_llava("somebody/llava", tmp_path / "out", 37)
    assert len(asked) == 1 and not list(cache.glob("*.safetensors"))
    compress_llava("somebody/llava", tmp_path / "out", 9)
    assert asked[-1] == sorted(path.name for path in stock.glob("*.safetensors"))
    load(tmp_path / "out")


# --- what is refused -----------------------------------------------------------------------------------------------


def edit_json(path: Path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def truncate(folder: Path):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])


def to_bin(folder: Path):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").touch()


def drop_tensor(folder: Path):
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    tensors.pop(min(tensors))
    save_file(tensors, shard)


DAMAGES = {
    "a truncated shard": (truncate, "model-00002-of-"),
    "a missing shard": (lambda folder: sorted(folder.glob("*.safetensors"))[0].unlink(), "names model-00001-of-"),
    "a tensor missing": (drop_tensor, "lacks 1 tensors"),
    "weights in .bin": (to_bin, "no weights in the safetensors format. Write them once"),
    "a bad index": (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "not an index"),
    "an index of other folders": (
        lambda folder: edit_json(folder / "model.safetensors.index.json", weight_map={"a": "../a.safetensors"}),
        "no files of its own folder",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "a config that is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "a config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "another architecture": (lambda folder: edit_json(folder / "config.json", model_type="llava_next"), "llava_next"),
    "several feature layers": (
        lambda folder: edit_json(folder / "config.json", vision_feature_layer=[-1, -2]),
        "one `vision_feature_layer`",
    ),
    "an unknown tower": (
        lambda folder: edit_json(
            folder / "config.json", vision_config={"model_type": "vit", "image_size": IMAGE_SIZE, "patch_size": 4}
        ),
        "VMTC does not know the blocks",
    ),
    "images of another size": (
        lambda folder: edit_json(folder / "config.json", vision_config={"patch_size": 4, "image_size": 32}),
        "doesn't match model",
    ),
    "another processor": (
        lambda folder: edit_json(folder / "processor_config.json", processor_class="PixtralProcessor"),
        "PixtralProcessor",
    ),
    "a processor that is not JSON": (
        lambda folder: (folder / "processor_config.json").write_text("{"),
        "processor_config.json",
    ),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("token*")], "No processor could be loaded"),
    "another placeholder": (lambda folder: edit_json(folder / "config.json", image_token_index=9), "image_token_id=9"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_a_message_and_nothing_is_written(own_stock, tmp_path, damage):
    make, message = DAMAGES[damage]
    make(own_stock)
    code, _, error = run("compress", own_stock, tmp_path / "out", "--visual-tokens", 9)
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stock"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--visual-tokens", 37], "The budget is 37 visual tokens, but an image has 36 patches"),
        (["--visual-tokens", 0], "from 1 to 36"),
        (["--visual-tokens=-1"], "from 1 to 36"),
        (["--cmai", 1.5], "from 0 to 1, got 1.5"),
        (["--cmai=-0.1"], "from 0 to 1, got -0.1"),
        (["--cmai", "nan"], "from 0 to 1, got nan"),
    ],
)
def test_a_bad_setting_is_a_message(stock, tmp_path, arguments, message):
    code, _, error = run("compress", stock, tmp_path / "out", *arguments)
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_not_there(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for source in ("nobody/no-such-model", tmp_path / "none", "a/b/c/d"):
        code, _, error = run("compress", source, tmp_path / "out")
        assert code == 1 and f"There is no folder {str(source)!r}" in error and error.count("\n") == 1
    code, _, error = run("compress", EXAMPLE_IMAGE, tmp_path / "out")
    assert code == 1 and "is a file" in error


def test_a_folder_is_not_overwritten(stock, tmp_path):
    (tmp_path / "mine.txt").touch()
    code, _, error = run("compress", stock, tmp_path)
    assert code == 1 and "exists already" in error
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert run("compress", stock, tmp_path / "empty")[0] == 0


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_interrupted_work_leaves_nothing(stock, tmp_path, monkeypatch, error):
    def stop(*arguments, **kwargs):
        raise error

    monkeypatch.setattr(os, "link", stop)
    monkeypatch.setattr(shutil, "copyfile", stop)
    with pytest.raises(type(error)):
        compress_llava(stock, tmp_path / "out")
    assert not list(tmp_path.iterdir())
