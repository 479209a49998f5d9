"""
LLaVA with VMTC on vLLM's Transformers backend. This backend changes the activation functions of Transformers for the whole
process, so this file comes last, and makes all that it compares with before the first engine.
"""

import pytest
from conftest import SHIPPED_LLAVA
from vllm_engines import ask_generate, ask_vllm, assert_same, engine, requests

from ta_llava.building.compress import compress_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    compress_llava(SHIPPED_LLAVA, folder / "vmtc", num_visual_tokens=16)
    compress_llava(SHIPPED_LLAVA, folder / "cmai", num_visual_tokens=16, cmai_max_ratio=0.6)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return ask_generate(folder / "vmtc", requests(10))


def test_a_folder_is_served_by_its_own_code(folder, expected):
    llm = engine(folder / "vmtc", model_impl="transformers", trust_remote_code=True)
    assert_same(ask_vllm(llm, requests(10)), expected)
    assert_same(ask_vllm(llm, requests(10)[::-1]), expected[::-1])


def test_cmai_is_refused(folder):
    with pytest.raises(Exception, match="use_cmai"):
        engine(folder / "cmai", model_impl="transformers", trust_remote_code=True)
