import json
import shutil

import pytest
import torch
from conftest import FIXTURES, SHIPPED_MODEL
from safetensors.torch import load_file, save_file

from ta_llava import TaLlavaForConditionalGeneration
from ta_llava.building.convert_original import build_processor, convert_original


ORIGINAL = FIXTURES / "original_ta_llava"


@pytest.fixture
def copied(tmp_path):
    """The fixture, to be changed."""
    return shutil.copytree(ORIGINAL, tmp_path / "original")


def test_the_depth_comes_from_the_keys():
    model = convert_original(ORIGINAL, ORIGINAL / "tiny-clip")
    assert model.config.text_config.num_hidden_layers == 10  # their config says 12
    assert model.config.num_prefix_tokens == 8
    assert model.config.response_marker_ids == [106, 2516]


def test_every_weight_is_taken_over_and_saved(tmp_path):
    """As many numbers as the original has, and the same ones, in a folder that loads without a key missing."""
    model = convert_original(ORIGINAL, ORIGINAL / "tiny-clip")
    original = load_file(ORIGINAL / "model.safetensors")
    state = model.state_dict()
    state.pop("lm_head.weight")  # tied
    assert sorted(value.sum().item() for value in state.values()) == sorted(
        value.sum().item() for value in original.values()
    )
    model.save_pretrained(tmp_path)
    loaded, info = TaLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_missing_and_left_over_keys_are_named(copied):
    state = load_file(copied / "model.safetensors")
    state["model.extra.weight"] = state.pop("model.norm.weight")
    save_file(state, copied / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 keys are missing.*norm.*1 are left over.*extra"):
        convert_original(copied, copied / "tiny-clip")


def test_a_wrong_vision_tower_is_a_message(copied):
    with pytest.raises(ValueError, match="There is no folder './none'"):
        convert_original(copied, "./none")
    with pytest.raises(ValueError, match="'ta_llava' model, not a vision tower"):
        convert_original(copied, SHIPPED_MODEL)
    config = json.loads((copied / "tiny-clip" / "config.json").read_text())
    for changes, message in (
        ({"num_hidden_layers": config["num_hidden_layers"] + 1}, "16 keys are missing"),
        ({"patch_size": config["patch_size"] // 2}, r"patch_embedding.weight has the shape \(.*\), not \("),
    ):
        (copied / "tiny-clip" / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=f"{message}.*Is .*tiny-clip its vision tower.*'tiny-clip'"):
            convert_original(copied, copied / "tiny-clip")


def test_a_checkpoint_without_a_tower_gets_a_complete_one(copied):
    expected = convert_original(copied, copied / "tiny-clip").state_dict()
    state = load_file(copied / "model.safetensors")
    prefix = "model.vision_tower.vision_tower."
    tower = {key.removeprefix(prefix): state.pop(key) for key in sorted(state) if key.startswith(prefix)}
    save_file(state, copied / "model.safetensors")
    save_file(tower, copied / "tiny-clip" / "model.safetensors", {"format": "pt"})
    converted = convert_original(copied, copied / "tiny-clip").state_dict()
    assert tower and all(torch.equal(converted[name], value) for name, value in expected.items())

    dropped = next(key for key in tower if key.endswith("mlp.fc1.weight"))
    save_file({key: tower[key] for key in tower if key != dropped}, copied / "tiny-clip" / "model.safetensors")
    with pytest.raises(ValueError, match="The vision tower in .*tiny-clip lacks 1 weights, such as .*fc1.weight"):
        convert_original(copied, copied / "tiny-clip")


def test_sharded_weights(copied):
    state = load_file(copied / "model.safetensors")
    names = sorted(state)
    shards = {"model-1.safetensors": names[:50], "model-2.safetensors": names[50:]}
    for file, keys in shards.items():
        save_file({key: state[key] for key in keys}, copied / file)
    (copied / "model.safetensors").unlink()
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    converted, expected = (
        convert_original(copied, copied / "tiny-clip"),
        convert_original(ORIGINAL, ORIGINAL / "tiny-clip"),
    )
    for name, value in expected.state_dict().items():
        assert torch.equal(converted.state_dict()[name], value)
    (copied / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match="no weight file.*model-2"):
        convert_original(copied, copied / "tiny-clip")


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no file .*config.json"):
        convert_original(tmp_path, ORIGINAL / "tiny-clip")
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises(ValueError, match="'gemma2'.*'tallava_gemma'"):
        convert_original(tmp_path, ORIGINAL / "tiny-clip")


def test_damaged_originals_are_named(copied):
    content = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(content[:1000])
    with pytest.raises(ValueError, match="damaged or cut off"):
        convert_original(copied, copied / "tiny-clip")
    config = json.loads((copied / "config.json").read_text())
    del config["num_learnable_tokens"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no num_learnable_tokens"):
        convert_original(copied, copied / "tiny-clip")
    for content, message in (("{", "config.json is not JSON"), ("[]", "config.json is not a JSON object")):
        (copied / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            convert_original(copied, copied / "tiny-clip")


def test_generation_stops_where_a_turn_ends(copied):
    assert convert_original(copied, copied / "tiny-clip").generation_config.eos_token_id == [1, 107]
    (copied / "generation_config.json").write_text('{"eos_token_id": [1, 9], "top_k": 7, "do_sample": true}')
    generation_config = convert_original(copied, copied / "tiny-clip").generation_config
    assert generation_config.eos_token_id == [1, 9] and generation_config.top_k == 7


def test_a_folder_with_a_tokenizer_gets_a_processor(copied, processor):
    """The placeholder is an unused token of the vocabulary, here its id 7, and is not shown in decoded text."""
    from transformers import CLIPImageProcessor

    processor.tokenizer.save_pretrained(copied)
    CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(
        copied / "tiny-clip"
    )
    config = convert_original(copied, copied / "tiny-clip").config
    built = build_processor(copied, copied / "tiny-clip", config)
    inputs = built(images=torch.zeros(60, 56, 3), text="<image>the shape", return_tensors="pt")
    assert inputs["input_ids"][0, :8].tolist() == [7] * 8 and inputs["pixel_values"].shape == (1, 1, 3, 56, 56)
    assert built.decode(inputs["input_ids"][0], skip_special_tokens=True) == "the shape"
