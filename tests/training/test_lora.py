"""LoRA: adapters that can be merged, and weights in 4 bits."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_runs import MODEL, READING, losses, weights
from transformers import AutoModelForImageTextToText, AutoProcessor

from ta_llava.publishing.merge import merge_adapter
from ta_llava.training.run import _load_model, train
from ta_llava.training.summary import SUMMARY


def test_lora_with_its_defaults_is_another_recipe(recipe):
    recipe = replace(recipe, train=[*READING, "language_model"])
    train(recipe)
    with pytest.raises(ValueError, match=r"was begun with `lora` None, not {}. Choose another `output_dir`"):
        train(replace(recipe, lora={}))


def test_lora_gives_an_adapter_that_can_be_merged(recipe, tmp_path):
    from peft import PeftModel

    parts = [*READING, "language_model"]
    folder = train(replace(recipe, train=parts, lora={"r": 4, "lora_dropout": 0.0}))
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    base = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder).eval()
    merge_adapter(folder, tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "## Training" in card and "language model (LoRA)" in card and "Model Card for Model ID" not in card
    assert card.startswith("---") and "# merged" in card
    assert (tmp_path / "merged" / SUMMARY).read_text() == (folder / SUMMARY).read_text()
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    text = "<start_of_turn>user\n<image>\nis there a circle in the image?<end_of_turn>\n<start_of_turn>model\n"
    inputs = processor(text=text, images=Image.new("RGB", (64, 64), "red"), return_tensors="pt")
    with torch.no_grad():
        difference = (adapted(**inputs).logits - merged(**inputs).logits).abs().max()
    before, after = weights(MODEL), merged.state_dict()
    changed = {name for name in before if (before[name].half() != after[name].half()).any()}
    assert difference < 0.05  # the merged weights are in the model's half precision
    assert any("prefix_embedding" in name for name in changed) and any("q_proj" in name for name in changed)
    assert not any("vision_tower" in name or "embed_tokens" in name for name in changed)


def test_lora_on_a_language_model_in_4_bits(recipe, tmp_path):
    """Only the language model's matrices are, and not those of the adapters, which are trained."""
    parts = [*READING, "language_model"]
    whole = train(replace(recipe, train=parts, lora={"r": 4}))
    folder = train(replace(recipe, train=parts, lora={"r": 4}, load_in_4bit=True, output_dir=str(tmp_path / "4bit")))
    one, other = (json.loads((path / SUMMARY).read_text())["parameters"] for path in (whole, folder))
    assert one == other
    assert losses(folder) == pytest.approx(losses(whole), rel=0.2)
    saved, start = load_file(folder / "adapter_model.safetensors"), weights(MODEL)
    moved = [name for name in start if (saved.get(f"base_model.model.{name}", start[name]) != start[name]).any()]
    assert any("text_adapter" in name for name in moved) and any("prefix_embedding" in name for name in moved)
    in_4_bits = {
        name
        for name, module in _load_model(replace(recipe, load_in_4bit=True)).named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    assert len(in_4_bits) == 7 * 8 and all(".language_model." in name for name in in_4_bits)
    merge_adapter(folder, tmp_path / "merged")
    assert weights(tmp_path / "merged").keys() == start.keys()
