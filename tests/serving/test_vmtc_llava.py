"""LLaVA with VMTC on vLLM answers as `generate()` does."""

import pytest
from conftest import SHIPPED_LLAVA
from vllm_engines import (
    Request,
    ask_generate,
    ask_vllm,
    assert_same,
    engine,
    num_preemptions,
    picture,
    rename_tower,
    requests,
    save_random_model,
)

from ta_llava import VmtcCmaiLlavaProcessor
from ta_llava.building.compress import compress_llava


NUM_VISUAL_TOKENS = 16
OVERRIDES = {
    "architectures": ["VmtcCmaiLlavaForConditionalGeneration"],
    "use_vmtc": True,
    "vmtc_num_visual_tokens": NUM_VISUAL_TOKENS,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The shipped LLaVA with VMTC on."""
    folder = tmp_path_factory.mktemp("vmtc") / "model"
    compress_llava(SHIPPED_LLAVA, folder, num_visual_tokens=NUM_VISUAL_TOKENS)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return ask_generate(folder, requests(40))


def test_40_requests_in_16_slots_alone_and_in_either_order(folder, expected):
    llm = engine(folder)
    assert_same(ask_vllm(llm, requests(40)), expected)
    assert_same(ask_vllm(llm, requests(40)[::-1]), expected[::-1])
    assert_same([ask_vllm(llm, [request])[0] for request in requests(6)], expected[:6])


def test_a_stock_checkpoint_needs_only_overrides(expected):
    assert_same(ask_vllm(engine(SHIPPED_LLAVA, hf_overrides=OVERRIDES), requests(10)), expected[:10])


def test_prompts_may_come_in_chunks_and_prefixes_from_the_cache(folder, expected):
    llm = engine(
        folder, enable_chunked_prefill=True, max_num_batched_tokens=32, enable_prefix_caching=True, block_size=32
    )
    for _ in range(2):  # the second time from the cache
        assert_same(ask_vllm(llm, requests(20)), expected[:20])


def test_requests_that_are_preempted_answer_the_same(folder, expected):
    llm = engine(folder, block_size=32, num_gpu_blocks_override=14, disable_log_stats=False)
    assert_same(ask_vllm(llm, requests(20)), expected[:20])
    assert num_preemptions(llm) > 0


def test_overrides_change_the_budget(folder, tmp_path):
    llm = engine(folder, hf_overrides={"vmtc_num_visual_tokens": 5})
    compress_llava(folder, tmp_path / "small", num_visual_tokens=5)
    found = ask_vllm(llm, requests(5))
    assert_same(found, ask_generate(tmp_path / "small", requests(5)))
    assert found[0].prompt_ids.count(6) == 5


MODELS = {
    "clip and llama": ("llama2", "clip_vision", {}),
    "old names of clip": ("llama2", "clip_vision", {}),
    "siglip and qwen2": ("chatml", "siglip", {}),
    "clip and mistral": ("mistral", "clip_vision", {"vmtc_method": "layerwise_prune"}),
    "siglip and gemma": ("gemma", "siglip", {"vmtc_kept_tokens": "importance_and_novelty", "vmtc_num_stages": 2}),
    "spatial down-sampling": ("llama3", "clip_vision", {"use_vmtc": False, "spd_factor": 2}),
    "vmtc off": ("llama3", "clip_vision", {"use_vmtc": False}),
}


@pytest.mark.parametrize("name", MODELS)
def test_towers_and_backbones(name, tmp_path):
    family, tower, fields = MODELS[name]
    fields = {"use_vmtc": True, "vmtc_num_visual_tokens": 9, "vmtc_merge_weights": "normalized", **fields}
    folder = save_random_model(tmp_path, "llava", family, tower, **fields)
    expected = ask_generate(folder, requests(8))
    if name == "old names of clip":
        rename_tower(folder)
    assert_same(ask_vllm(engine(folder), requests(8)), expected)


def test_cmai_is_refused(tmp_path):
    compress_llava(SHIPPED_LLAVA, tmp_path / "model", num_visual_tokens=NUM_VISUAL_TOKENS, cmai_max_ratio=0.6)
    with pytest.raises(Exception, match="use_cmai"):
        engine(tmp_path / "model")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vmtc_num_visual_tokens": 65}, "The budget is 65 visual tokens, but an image has 64 patches"),
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(folder, overrides, message):
    with pytest.raises(Exception, match=message):
        engine(folder, hf_overrides=overrides)


def test_a_request_cannot_change_the_budget(folder):
    llm = engine(folder)
    prompt = VmtcCmaiLlavaProcessor.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color?"}]}]
    )
    with pytest.raises(ValueError, match="cannot change the number of visual tokens"):
        llm.generate(
            {
                "prompt": prompt,
                "multi_modal_data": {"image": picture(0)},
                "mm_processor_kwargs": {"num_visual_tokens": 3},
            },
            use_tqdm=False,
        )
    assert len(ask_vllm(llm, [Request([picture(0)], "what color?")])) == 1
