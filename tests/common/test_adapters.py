"""Adapters that are damaged or of another model are refused."""

import json

import pytest
from conftest import SHIPPED_MODEL
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from ta_llava.publishing.merge import merge_adapter


def test_an_adapter_that_does_not_fit_is_not_merged(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    adapted.save_pretrained(tmp_path / "adapter")
    path, settings = tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "adapter" / "adapter_config.json"
    saved, config = load_file(path), json.loads(settings.read_text())
    settings.write_text(json.dumps({**config, "base_model_name_or_path": str(SHIPPED_MODEL)}))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    save_file({f"other.{name}": value for name, value in saved.items()}, path)
    with pytest.raises(ValueError, match=f"does not fit .*: {2 * len(saved)} weights are missing or left over"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged or cut off"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    settings.write_text(json.dumps({"peft_type": "IA3", "base_model_name_or_path": str(SHIPPED_MODEL)}))
    with pytest.raises(ValueError, match="only LoRA is merged"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
