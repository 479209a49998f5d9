"""
LLaVAs with VMTC on vLLM's Transformers backend. This backend changes the activation functions of Transformers for the whole
process, so this file comes last, and makes all that it compares with before the first engine.
"""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    requests,
    save_model_of_views,
    save_random_model,
)

from ta_llava.building.compress import compress_llava


VMTC = {"use_vmtc": True, "vmtc_num_visual_tokens": 9, "vmtc_merge_weights": "normalized"}
MODELS = {
    "clip and qwen2": lambda folder: save_random_model(folder, "llava", "chatml", "clip_vision", **VMTC),
    "clip and mistral": lambda folder: save_random_model(folder, "llava", "mistral", "clip_vision", **VMTC),
    "llava-next": lambda folder: save_model_of_views(folder, "llava_next", use_vmtc=True, vmtc_num_visual_tokens=9),
    "llava-next, budget of a picture": lambda folder: save_model_of_views(
        folder, "llava_next", use_vmtc=True, vmtc_total_visual_tokens=30
    ),
}

ONE_IMAGE = [request for request in requests(10) if len(request.images) < 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    compress_llava(SHIPPED_LLAVA, folder / "vmtc", num_visual_tokens=16)
    compress_llava(SHIPPED_LLAVA, folder / "small", num_visual_tokens=5)
    compress_llava(SHIPPED_LLAVA, folder / "cmai", num_visual_tokens=16, cmai_max_ratio=0.6)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    saved = {name: save(tmp_path_factory.mktemp("model")) for name, save in MODELS.items()}
    folder = tmp_path_factory.mktemp("model")
    saved["llava-onevision"] = save_model_of_views(folder, "llava_onevision", use_vmtc=True, vmtc_num_visual_tokens=9)
    return saved


@pytest.fixture(scope="module", autouse=True)
def expected(folder, models):
    """By the name of a model, before there is an engine."""
    for path in (folder / "vmtc", folder / "small", *models.values()):
        drop_suppressed_tokens(path)
    return {
        "vmtc": ask_generate(folder / "vmtc", requests(40)),
        "alone": ask_generate(folder / "vmtc", [Request([picture(3)], "what color is it?")]),
        "small": ask_generate(folder / "small", requests(5)),
        **{name: ask_generate(models[name], requests(8)) for name in MODELS},
        "llava-onevision": ask_generate(models["llava-onevision"], ONE_IMAGE),
    }


def drop_suppressed_tokens(folder: Path) -> None:
    """vLLM does not read them, so `generate()` must not leave them out either."""
    path = folder / "generation_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields.pop("suppress_tokens", None)
    path.write_text(json.dumps(fields), encoding="utf-8")


def transformers_engine(folder: Path, **kwargs: Any) -> Any:
    return engine(folder, model_impl="transformers", trust_remote_code=True, **kwargs)


def test_40_requests_in_16_slots_alone_and_in_either_order(folder, expected):
    llm = transformers_engine(folder / "vmtc")
    assert_same(ask_vllm(llm, requests(40)), expected["vmtc"])
    assert_same(ask_vllm(llm, requests(40)[::-1]), expected["vmtc"][::-1])
    assert_same([ask_vllm(llm, [request])[0] for request in requests(6)], expected["vmtc"][:6])


ALONE = """
import json, sys
sys.modules["ta_llava"] = None  # importing it fails, as where it is not installed
from vllm import LLM, SamplingParams
llm = LLM(
    sys.argv[1], model_impl="transformers", trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=256,
    kv_cache_memory_bytes=2**27,
)
content = [{"type": "image_url", "image_url": {"url": sys.argv[2]}}, {"type": "text", "text": "what color is it?"}]
[output] = llm.chat([{"role": "user", "content": content}], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
print(json.dumps([output.prompt_token_ids, list(output.outputs[0].token_ids)]))
"""


def test_an_exported_folder_is_served_by_its_own_code_where_the_package_is_not_installed(folder, expected, tmp_path):
    picture(3).save(tmp_path / "picture.png")
    [answer] = expected["alone"]
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "picture.png").read_bytes()).decode()
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder / "vmtc"), url],
        env={**os.environ, "VLLM_PLUGINS": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.splitlines()[-1]) == [answer.prompt_ids, answer.ids]


def test_prompts_may_come_in_chunks_and_prefixes_from_the_cache(folder, expected):
    llm = transformers_engine(
        folder / "vmtc",
        enable_chunked_prefill=True,
        max_num_batched_tokens=32,
        enable_prefix_caching=True,
        block_size=32,
    )
    for _ in range(2):  # the second time from the cache
        assert_same(ask_vllm(llm, requests(20)), expected["vmtc"][:20])


def test_requests_that_are_preempted_answer_the_same(folder, expected):
    llm = transformers_engine(folder / "vmtc", block_size=32, num_gpu_blocks_override=14, disable_log_stats=False)
    assert_same(ask_vllm(llm, requests(20)), expected["vmtc"][:20])
    assert num_preemptions(llm) > 0


def test_overrides_of_model_and_processor_change_the_budget(folder, expected):
    budget = 5
    llm = transformers_engine(
        folder / "vmtc",
        hf_overrides={"vmtc_num_visual_tokens": budget},
        mm_processor_kwargs={"num_visual_tokens": budget},
    )
    assert_same(ask_vllm(llm, requests(5)), expected["small"])


@pytest.mark.parametrize("name", MODELS)
def test_backbones_and_views(name, models, expected):
    assert_same(ask_vllm(transformers_engine(models[name]), requests(8)), expected[name])


def test_one_image_of_a_llava_onevision(models, expected):
    """
    Its tower is a SigLIP. If a prompt has several pictures, it cuts none into views, but vLLM looks at each alone. So vLLM
    must not get several.
    """
    llm = transformers_engine(models["llava-onevision"], limit_mm_per_prompt={"image": 1})
    assert_same(ask_vllm(llm, ONE_IMAGE), expected["llava-onevision"])
    with pytest.raises(Exception, match="At most 1 image"):
        ask_vllm(llm, [Request([picture(0), picture(1)], "what is it?")])


def test_cmai_is_refused(folder):
    with pytest.raises(Exception, match="use_cmai"):
        transformers_engine(folder / "cmai")
