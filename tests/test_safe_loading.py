"""What is read of a checkpoint, and of which size it may be. By which ways of users, is in `test_trust.py`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import text_config
from full_size_configs import CLIP_LARGE, GEMMA_2_9B, LLAMA_405B, VICUNA_13B
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaForCausalLM

from ta_llava import safe_loading
from ta_llava.safe_loading import _least_weights, check_sizes, load_config, read_safetensors


INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(text_config("llama", num_hidden_layers=1)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A checkpoint, to be changed."""
    return shutil.copytree(saved, tmp_path / "model")


def read(source, **kwargs):
    return read_safetensors(LlamaForCausalLM.from_pretrained, source, **kwargs)


def put_into_shard(folder: Path, name: str, index: str = INDEX) -> None:
    weights = folder / "model.safetensors"
    weight_map = dict.fromkeys(load_file(weights), name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / name).parent.mkdir(exist_ok=True)
    weights.rename(folder / name)


@pytest.mark.parametrize("name", ["..weights.safetensors", "...safetensors", "parts/../weights.safetensors"])
def test_names_that_only_look_as_if_they_led_outside(saved, folder, name):
    (folder / "parts").mkdir()
    put_into_shard(folder, name)
    assert torch.equal(read(folder).lm_head.weight, read(saved).lm_head.weight)


@pytest.mark.parametrize("name", ["../weights.safetensors", "parts/../../weights.safetensors"])
def test_names_that_lead_outside(folder, name):
    (folder / "parts").mkdir()
    put_into_shard(folder, name)
    with pytest.raises(ValueError, match=r"outside of its folder"):
        read(folder)


@pytest.mark.parametrize(
    "kwargs", [{"subfolder": "part"}, {"variant": "fp16"}, {"subfolder": "part", "variant": "fp16"}]
)
def test_subfolders_and_variants(saved, tmp_path, kwargs):
    """Their weights are read, and refused, as those of the folder itself."""
    root = tmp_path / "model"
    folder = shutil.copytree(saved, root / kwargs.get("subfolder", ""))
    ending = f".{kwargs['variant']}" if "variant" in kwargs else ""
    weights = folder / f"model{ending}.safetensors"
    (folder / "model.safetensors").rename(weights)
    assert torch.equal(read(root, **kwargs).lm_head.weight, read(saved).lm_head.weight)

    state = load_file(weights)
    weights.unlink()
    torch.save(state, folder / f"pytorch_model{ending}.bin")
    with pytest.raises(ValueError, match=rf"are pickles \(.*pytorch_model{ending}\.bin\)"):
        read(root, **kwargs)
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, f"pytorch_model{ending}.bin")}
    (folder / f"model.safetensors.index{ending}.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="are not safetensors"):
        read(root, **kwargs)


def test_pickles_beside_are_not_blamed_for_what_is_missing(folder):
    (folder / "pytorch_model.bin").write_bytes(b"")
    put_into_shard(folder, "model-00001-of-00001.safetensors")
    (folder / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(OSError, match="00001-of-00001") as error:
        read(folder)
    assert "are pickles" not in str(error.value)


def test_without_a_config_there_is_no_model(folder):
    """The library would make one of the sizes of Llama-7B."""
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json, so it is not a checkpoint"):
        read_safetensors(pytest.fail, folder)


def test_a_file_in_place_of_a_folder(folder, monkeypatch):
    """The library reads one where PEFT is not installed."""
    monkeypatch.setattr(safe_loading, "is_peft_available", lambda: False)
    config = load_config(folder)
    save_file(load_file(folder / "model.safetensors"), folder / "weights.bin")
    with pytest.raises(ValueError, match=r"weights\.bin' are not safetensors"):
        read_safetensors(pytest.fail, folder / "weights.bin", config=config)


def test_the_config_that_is_passed_is_the_one_that_counts(folder):
    """Not that in the folder, which names weights here."""
    config = load_config(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "transformers_weights": "adapter_model.bin"}))
    assert read(folder, config=config).config.num_hidden_layers == 1
    with pytest.raises(ValueError, match="`transformers_weights` of `config` names 'adapter_model.bin'"):
        read(folder)
    with pytest.raises(ValueError, match="`transformers_weights` of `config` names 'adapter_model.bin'"):
        read(folder, config=load_config(folder))


def test_code_of_a_config_is_not_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", pytest.fail)
    config = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"layer_types": ["full_attention"] * 2000},
            "`layer_types` of `config` has 2000, but no model has more than 1000",
        ),
        ({"max_position_embeddings": 10**9}, "`max_position_embeddings` of `config` is 1000000000, but no model"),
        ({"image_size": [224, 10**9]}, "`image_size` of `config` has 1000000000, but no model has more than 100000"),
        ({"model_type": "gpt2", "n_positions": 10**9}, "`n_positions` of `config` is 1000000000"),
        ({"num_labels": 10**9}, "`num_labels` of `config` is 1000000000, but no model has more than 100000"),
        ({"parts": {"num_labels": 10**9}}, "`num_labels` of `config.parts` is 1000000000"),
        ({"model_type": "qwen3_moe", "num_experts": 10**9}, "`num_experts` of `config` is 1000000000, but no model"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 10**9}, "`n_routed_experts` of `config` is 1000000000"),
        ({"model_type": "mixtral", "num_local_experts": 10**9}, "`num_local_experts` of `config` is 1000000000"),
        (
            {"model_type": "gemma3n_text", "vocab_size_per_layer_input": 10**9},
            "`vocab_size_per_layer_input` of `config`",
        ),
        (
            {"model_type": "llava", "vision_config": {"num_query_tokens": 10**9}},
            "`num_query_tokens` of `config.vision_config` is 1000000000, but no model",
        ),
        ({"patch_size": [14, 10**5]}, "`patch_size` of `config` has 100000, but no model has more than 1000"),
        ({"parts": [{"hidden_size": 10**9}]}, "`hidden_size` of `config.parts` is 1000000000"),
        (
            {"text_config": {"attribute_map": {"num_hidden_layers": "n"}, "n": 10**9}},
            "`config.text_config` has an `attr",
        ),
    ],
)
def test_sizes_are_found_before_a_config_is_made(tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr(safe_loading.AutoConfig, "from_pretrained", pytest.fail)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path)


def test_lists_and_positions_that_models_have():
    many = {"max_position_embeddings": 10_485_760, "layer_types": ["full_attention"] * 126, "image_size": [336, 336]}
    check_sizes("config", {**LLAMA_405B.to_dict(), **many, "vision_config": CLIP_LARGE.to_dict()})


def test_large_numbers_that_are_no_sizes():
    """What fills no memory, and what a config says besides of how its model was made."""
    harmless = {"rope_theta": 10**9, "sliding_window": 2**31 - 1, "max_length": 10**30, "trained_tokens": 10**13}
    harmless |= {"training": {"tokens": 10**13}, "quantization_config": {"meta": {"samples": 10**12}}}
    harmless |= {"rope_parameters": {"rope_theta": 10**9, "rope_base": 10**9}, "id2label": {0: "a"}}
    check_sizes("config", {**LLAMA_405B.to_dict(), **harmless})


def test_a_type_that_is_none():
    check_sizes("config", {"model_type": ["llama"]})


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 200, "hidden_size": 16384, "intermediate_size": 100_000},
        {"num_hidden_layers": 1000},
        {"vocab_size": 10_000_000, "hidden_size": 4096},
        {"parts": [{"num_hidden_layers": 200, "hidden_size": 16384}]},
        {"model_type": "gpt2", "n_layer": 200, "n_embd": 16384},
        {"model_type": "clip_vision_model", "image_size": 100_000, "patch_size": 1},
    ],
)
def test_far_more_weights_than_the_files_hold(folder, fields):
    """They would be made before anything is missed. What is not said is as the library has it."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    num_bytes = (folder / "model.safetensors").stat().st_size
    message = rf"asks for at least \d+ weights, but its files have {num_bytes} bytes: its weights are damaged or"
    with pytest.raises(ValueError, match=message):
        read_safetensors(pytest.fail, folder)
    put_into_shard(folder, "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match=message):
        read_safetensors(pytest.fail, folder)


def test_far_more_weights_than_a_repo_holds(folder, tmp_path, monkeypatch):
    fields = {"num_hidden_layers": 200, "hidden_size": 16384}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "hub")
        hub.add("alice/model", {path.name: path.read_bytes() for path in folder.iterdir()})
        with pytest.raises(ValueError, match="The config of alice/model asks for at least"):
            read_safetensors(pytest.fail, "alice/model")


def test_a_weight_may_take_less_than_a_byte(folder):
    """As after quantisation, here with three of four weights gone."""
    weights = load_file(folder / "model.safetensors")
    dropped = sorted(weights, key=lambda name: -weights[name].numel())[:4]
    save_file(
        {name: value.half() for name, value in weights.items() if name not in dropped}, folder / "model.safetensors"
    )
    assert read(folder).config.num_hidden_layers == 1


@pytest.mark.parametrize("config", [LLAMA_405B, GEMMA_2_9B, VICUNA_13B, CLIP_LARGE])
def test_no_more_weights_are_asked_for_than_there_are(config):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
    assert count / 10 < _least_weights(config.to_dict()) < count
