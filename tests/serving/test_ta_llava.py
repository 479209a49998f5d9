"""TA-LLaVA on vLLM answers as `generate()` does, and never from a part of a prompt."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import SHIPPED_MODEL
from vllm_engines import (
    Request,
    ask_generate,
    ask_vllm,
    assert_same,
    engine,
    graph_mode,
    num_preemptions,
    picture,
    rename_tower,
    requests,
    save_random_model,
)

from ta_llava.image_inputs import TaLlavaEncodedImages
from ta_llava.modeling_ta_llava import TaLlavaModel
from ta_llava.serving import config_hooks, ta_llava


L = 4  # prefix tokens of the shipped model


@pytest.fixture(scope="module")
def expected():
    return ask_generate(SHIPPED_MODEL, requests(40))


@pytest.fixture(scope="module")
def shipped():
    """It stops to work when another engine ends, so the tests that use it come first."""
    return engine(SHIPPED_MODEL)


def test_40_requests_in_16_slots_alone_and_in_either_order(shipped, expected):
    assert_same(ask_vllm(shipped, requests(40)), expected)
    assert_same(ask_vllm(shipped, requests(40)[::-1]), expected[::-1])
    assert_same([ask_vllm(shipped, [request])[0] for request in requests(6)], expected[:6])


def test_two_questions_about_one_image_in_either_order_encode_it_once(shipped, monkeypatch):
    calls = []
    encode_image = TaLlavaModel.encode_image

    def counting(self, pixel_values, *args):
        calls.append(len(pixel_values))
        return encode_image(self, pixel_values, *args)

    monkeypatch.setattr(TaLlavaModel, "encode_image", counting)
    asked = [Request([picture(50)], "what color?"), Request([picture(50)], "is there a circle?")]
    first = [ask_vllm(shipped, [request])[0] for request in asked]
    second = [ask_vllm(shipped, [request])[0] for request in asked[::-1]][::-1]
    assert calls == [1]
    monkeypatch.undo()
    expected = ask_generate(SHIPPED_MODEL, asked)
    assert_same(first, expected)
    assert_same(second, expected)


def test_images_are_told_apart_by_all_their_uuids(shipped):
    """Two requests name the same first image, and two more have names that look alike if one joins them."""
    uuids = (["first", "second 0"], ["first", "second 1"], ["a+b", "c"], ["a", "b+c"])
    asked = [Request([picture(60), picture(61 + n)], "what shape?", names) for n, names in enumerate(uuids)]
    assert shipped.llm_engine.renderer.mm_processor_cache is not None
    expected = ask_generate(SHIPPED_MODEL, asked)
    assert_same([ask_vllm(shipped, [request])[0] for request in asked], expected)


@pytest.mark.parametrize("mode", ["NONE", "PIECEWISE", "FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
def test_graphs_are_split_where_the_prefix_reads(mode):
    attention = "vllm::unified_attention_with_output"
    compilation = SimpleNamespace(cudagraph_mode=graph_mode(mode), splitting_ops=[attention])
    config_hooks.split_graphs(SimpleNamespace(compilation_config=compilation), "vllm::read")
    assert compilation.splitting_ops == [attention, "vllm::read"]


@pytest.mark.parametrize(("mode", "is_refused"), [("NONE", False), ("FULL_DECODE_ONLY", False), ("PIECEWISE", True)])
def test_a_prompt_is_never_one_graph(mode, is_refused):
    """Without operators to split at, and always in the mode FULL."""
    compilation = SimpleNamespace(cudagraph_mode=graph_mode(mode), splitting_ops=[])
    config = SimpleNamespace(compilation_config=compilation)
    with pytest.raises(ValueError, match="replayed as one CUDA graph") if is_refused else nullcontext():
        config_hooks.split_graphs(config, "vllm::read")
    compilation.cudagraph_mode, compilation.splitting_ops = graph_mode("FULL"), ["attention"]
    with pytest.raises(ValueError, match="replayed as one CUDA graph"):
        config_hooks.split_graphs(config, "vllm::read")


def test_a_prompt_with_an_image_needs_a_response_marker(shipped):
    prompt = {"prompt": "<image>what color?", "multi_modal_data": {"image": picture(0)}}
    with pytest.raises(ValueError, match="A prompt with images has no response marker"):
        shipped.generate(prompt, use_tqdm=False)


def test_chunked_prefill_and_prefix_caching_are_off_also_if_asked_for(expected):
    llm = engine(
        SHIPPED_MODEL,
        enable_chunked_prefill=True,
        max_num_batched_tokens=32,
        long_prefill_token_threshold=16,
        enable_prefix_caching=True,
        block_size=32,
    )
    config = llm.llm_engine.vllm_config
    assert not config.scheduler_config.enable_chunked_prefill
    assert not config.cache_config.enable_prefix_caching
    assert config.scheduler_config.max_num_batched_tokens == 256
    for _ in range(2):
        assert_same(ask_vllm(llm, requests(20)), expected[:20])


def test_requests_that_are_preempted_answer_the_same(expected):
    llm = engine(SHIPPED_MODEL, block_size=32, num_gpu_blocks_override=18, disable_log_stats=False)
    assert_same(ask_vllm(llm, requests(20)), expected[:20])
    assert num_preemptions(llm) > 0


def test_a_compiled_decoder_answers_the_same(expected, monkeypatch, tmp_path):
    """In a process of its own, because nothing is compiled in this one."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    llm = engine(SHIPPED_MODEL, enforce_eager=False)
    assert any((tmp_path / "torch_compile_cache").rglob("*.so"))
    assert_same(ask_vllm(llm, requests(20)), expected[:20])


MODELS = {
    "gemma and siglip": ("gemma", "siglip", {}, {}),
    "llama 2 and clip": ("llama2", "clip_vision", {"adapter_interval": 2}, {}),
    "llama 3, two layers of projector": ("llama3", "clip_vision", {"projector_type": "mlp"}, {}),
    "mistral and dinov2": ("mistral", "dinov2", {}, {}),
    "qwen2, instruction before the last marker": ("chatml", "clip_vision", {}, {"instruction_scope": "last"}),
    "qwen3, vmtc": ("qwen3", "clip_vision", {}, {"use_vmtc": True, "vmtc_num_visual_tokens": 7}),
    "old names of clip": ("chatml", "clip_vision", {}, {}),
    "index embeddings": ("chatml", "clip_vision", {}, {"num_image_index_embeddings": 3}),
}


@pytest.mark.parametrize("name", MODELS)
def test_backbones_and_towers(name, tmp_path):
    family, tower, arguments, config_fields = MODELS[name]
    folder = save_random_model(tmp_path, "ta-llava", family, tower, config_fields, num_prefix_tokens=5, **arguments)
    expected = ask_generate(folder, requests(8))
    if name == "old names of clip":
        rename_tower(folder)
    assert_same(ask_vllm(engine(folder), requests(8)), expected)


def test_a_config_of_the_checkpoints_own_code_is_served_too(expected):
    assert_same(ask_vllm(engine(SHIPPED_MODEL, trust_remote_code=True), requests(5)), expected[:5])


def test_an_unknown_language_model_is_refused(tmp_path):
    folder = save_random_model(tmp_path, "ta-llava", "gemma3", "clip_vision")
    with pytest.raises(Exception, match="The language model is a 'gemma3_text'"):
        engine(folder)


def test_settings_that_split_prompts_are_refused(monkeypatch):
    monkeypatch.setattr(config_hooks.TaLlavaHook, "verify_and_update_config", lambda vllm_config: None)
    with pytest.raises(Exception, match="needs each prompt whole in one step"):
        engine(SHIPPED_MODEL, enable_chunked_prefill=True, max_num_batched_tokens=32)


@pytest.mark.parametrize("chunk", [16, 24])
def test_a_part_of_a_prompt_is_an_error(chunk, monkeypatch):
    """As if the checks before it were gone."""
    monkeypatch.setattr(config_hooks.TaLlavaHook, "verify_and_update_config", lambda vllm_config: None)
    monkeypatch.setattr(ta_llava, "check_whole_prompts", lambda vllm_config: None)
    llm = engine(SHIPPED_MODEL, enable_chunked_prefill=True, max_num_batched_tokens=chunk, enable_prefix_caching=False)
    with pytest.raises(RuntimeError, match="A part of a prompt has arrived"):
        ask_vllm(llm, [Request([picture(0)], "what is in the image? " * 3)])


@pytest.mark.parametrize(("images", "tokens"), [(1, 3), (2, 3), (1, 8), (3, 7)])
def test_packed_rows_are_unpacked(images, tokens):
    """The numbers of visual tokens are fewer than the rows, a multiple of them, or neither."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(2, 3, images * tokens, 6, generator=generator) for _ in range(2))
    prefix = torch.randn(L, 10, generator=generator)
    rows = ta_llava.pack(TaLlavaEncodedImages(key=key, value=value, image_mask=None), prefix)
    assert all(torch.equal(row[:, :10], prefix) for row in rows)
    found_key, found_value, mask = ta_llava.unpack(torch.stack(rows)[:, :, 10:], head_dim=6, num_heads=3)
    count = images * tokens
    assert torch.equal(found_key[:, :, :count], key)
    assert torch.equal(found_value[:, :, :count], value)
    assert mask[:, :count].all()
    assert not mask[:, count:].any()
