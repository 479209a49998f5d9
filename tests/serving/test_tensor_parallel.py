"""Both systems on two processes, which share the heads of the language model, and of VMTC's tower."""

import pytest
from conftest import SHIPPED_LLAVA, SHIPPED_MODEL
from vllm_engines import ask_generate, ask_vllm, assert_same, engine, requests

from ta_llava.building.compress import compress_llava


@pytest.mark.parametrize("system", ["ta-llava", "vmtc"])
def test_two_processes_answer_as_one(system, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # a core for each
    folder = SHIPPED_MODEL
    if system == "vmtc":
        folder = tmp_path / "model"
        compress_llava(SHIPPED_LLAVA, folder, num_visual_tokens=16)
    llm = engine(folder, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert_same(ask_vllm(llm, requests(10)), ask_generate(folder, requests(10)))
