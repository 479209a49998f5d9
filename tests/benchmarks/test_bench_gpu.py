"""The GPU benchmark runs without a GPU at tiny sizes, resumes, and says what it skipped. No timing is looked at."""

import json
from dataclasses import replace

import bench_gpu
import pytest
import torch
from bench_gpu import CUDA_GRAPHS, EAGER, Cell, bars_of, list_cells
from packaging import version


TINY = ["--device", "cpu", "--tiny", "--parts", "ta-llava", "vmtc-cmai", "--repeats", "1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Two layers for each language model, and graphs without kernels, which would take minutes."""
    monkeypatch.setitem(bench_gpu.MODES, bench_gpu.COMPILED, {"backend": "eager"})
    for setups in (bench_gpu.ta_llava_and_llava.SETUPS, bench_gpu.vmtc_cmai.SETUPS):
        shallow = {**setups["tiny"].text_config, "num_hidden_layers": 2}
        monkeypatch.setitem(setups, "tiny", replace(setups["tiny"], text_config=shallow))


def test_the_benchmark_runs_and_resumes(tmp_path, capsys):
    options = [*TINY, "--images", "1", "2", "--batch-sizes", "2", "--output-dir", str(tmp_path)]
    bench_gpu.main([*options, "--modes", "eager"])
    (file,) = tmp_path.glob("*.json")
    first = json.loads(file.read_text())["cells"]
    assert len(first) == 4
    systems = {
        part: {name for cell in first.values() if cell["part"] == part for name in cell["medians"]}
        for part in ("ta-llava", "vmtc-cmai")
    }
    assert systems == {
        "ta-llava": {"LLaVA", "TA-LLaVA"},
        "vmtc-cmai": {"LLaVA, 64", "VMTC, 7", "CMAI, 64", "CMAI + VMTC, 7"},
    }

    capsys.readouterr()
    bench_gpu.main([*options, "--modes", "eager"])
    assert "eager" not in capsys.readouterr().out.split("#")[0]  # measured before
    assert json.loads(file.read_text())["cells"] == first
    if version.parse(torch.__version__) < version.parse("2.10"):
        return  # torch 2.9 cannot compile stock LLaVA's prefill
    options = ["--images", "1", "--batch-sizes", "2", "--output-dir", str(tmp_path)]
    bench_gpu.main([*TINY[:3], "--parts", "ta-llava", "--repeats", "1", *options])
    result, report = json.loads(file.read_text()), file.with_suffix(".md").read_text()
    printed = capsys.readouterr()
    assert printed.err == ""  # no cell failed, and all compute the same tokens
    assert len(result["cells"]) == 4 + 1 and first.items() <= result["cells"].items()
    assert set(result["skipped"].values()) == {"there is no GPU", "flash-attn or a GPU is missing"}
    compiled = next(cell for cell in result["cells"].values() if cell["mode"] == "compiled")
    assert {*bench_gpu.QUANTITIES} - {*compiled["medians"]["LLaVA"]} == {"kernels of the first token"}
    assert "| LLaVA |" in report and "decode, per token: LLaVA / TA-LLaVA | compiled, batch 2, images 1" in report


def test_compiled_cmai_computes_the_tokens_of_eager_mode(capsys):
    comparison = bench_gpu.build_comparison("vmtc-cmai", "tiny", torch.device("cpu"), bench_gpu.LIBRARY)
    name = "CMAI + VMTC, 7"
    alone = replace(comparison, models={name: comparison.models[name]})
    bench_gpu.measure_cell(Cell("vmtc-cmai", bench_gpu.LIBRARY, "compiled", 2, 1), alone, repeats=1)
    assert capsys.readouterr().err == ""


def test_when_the_time_is_up_it_says_what_is_left(tmp_path):
    bench_gpu.main([*TINY, "--modes", "eager", "--budget", "0", "--output-dir", str(tmp_path)])
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert not result["cells"] and len(result["skipped"]) == 16
    assert any("the budget of 0 seconds is used up" in why for why in result["skipped"].values())


def test_a_cell_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    build = bench_gpu.build_comparison

    def fail(part, *arguments):
        if part == "ta-llava":
            raise RuntimeError("out of memory")
        return build(part, *arguments)

    monkeypatch.setattr(bench_gpu, "build_comparison", fail)
    options = ["--modes", "eager", "--images", "1", "--batch-sizes", "1", "--output-dir", str(tmp_path)]
    bench_gpu.main([*TINY, *options])
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [cell["part"] for cell in result["cells"].values()] == ["vmtc-cmai"]
    assert "RuntimeError: out of memory" in result["skipped"].values()


def test_bars():
    def limits(*cell):
        systems = ["LLaVA, 576", "VMTC, 64", "CMAI, 576", "CMAI + VMTC, 64"]
        return {(bar.quantity, bar.system): bar.limit for bar in bars_of(Cell(*cell, 1), systems)}

    first, decode = bench_gpu.FIRST_TOKEN, bench_gpu.DECODE
    where = ("ta-llava", "library's choice")
    assert limits(*where, EAGER, 1) == {(first, "TA-LLaVA"): 1.0, (decode, "TA-LLaVA"): 1.0}
    assert limits(*where, CUDA_GRAPHS, 1)[first, "TA-LLaVA"] == 1.5
    assert limits(*where, CUDA_GRAPHS, 8)[first, "TA-LLaVA"] == 3.0
    where = ("vmtc-cmai", "library's choice", EAGER)
    assert limits(*where, 1)[first, "VMTC, 64"] == 1.5 and limits(*where, 8)[first, "VMTC, 64"] == 3.0
    assert limits(*where, 1)[decode, "VMTC, 64"] == 1.0
    cmai = {key: limit for key, limit in limits(*where, 8).items() if "CMAI" in key[1]}
    assert cmai == {(quantity, name): 1.1 for quantity in (first, decode) for name in ("CMAI, 576", "CMAI + VMTC, 64")}


def test_the_most_important_cells_come_first():
    cells = list_cells(["ta-llava", "vmtc-cmai", "quantization"], [1, 8], [1, 4], [EAGER, "compiled", CUDA_GRAPHS])
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 * 4
    assert [cell.mode for cell in cells[:8]] == [EAGER] * 8
    assert cells[8] == Cell("ta-llava", "library's choice", CUDA_GRAPHS, 1, 1)
    assert {cell.attention for cell in cells[-8:]} == {"flash_attention_2"}
