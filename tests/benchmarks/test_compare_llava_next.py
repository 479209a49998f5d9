"""The benchmark of LLaVA-NeXT runs, and counts tokens and bytes rightly."""

import os
import subprocess
import sys

from conftest import ROOT


def test_the_benchmark_runs(tmp_path):
    out = tmp_path / "next.md"
    command = [sys.executable, ROOT / "benchmarks" / "compare_llava_next.py", "--config", "tiny", "--repeats", "1"]
    # By default in bfloat16 too where the CPU is fast in it
    subprocess.run([*command, "--dtypes", "float32", "--output", out], check=True, capture_output=True)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in out.read_text().splitlines() if line[:1] == "|"
    ]
    # 64 patches of each of 5 views; a newline for each of the 16 rows of the grid, or of the 2 rows of tiles
    tokens = {"LLaVA-NeXT": 5 * 64 + 16, "VMTC, 7 of each view": 5 * 7 + 2, "VMTC, 4 of each view": 5 * 4 + 2}
    assert {row[0]: int(row[1]) for row in rows[2:]} == tokens
    for row in rows[2:]:
        size, stock = (8 * 2 * (count + 40) * 2 * 32 * 4 / 1024 for count in (tokens[row[0]], tokens["LLaVA-NeXT"]))
        assert row[-1] == f"{size:,.0f} KiB ({stock / size:.2f}x)"
    assert len(rows[0]) == 7

    # The prefill alone, on as many tokens
    slow = [*command, "--prefill-only", "--dtypes", "bfloat16", "--cpu-time", "--output", out]
    subprocess.run(slow, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    text = out.read_text()
    assert "rounds: 1, CPU time, torch" in text and "threads: 1" in text
    two = subprocess.run(slow, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert two.returncode == 2 and "--cpu-time is for one thread, not 2: set OMP_NUM_THREADS=1" in two.stderr
    alone = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    assert alone[0] == ["", "tokens", "prefill behind it", "cache"] and "bfloat16" in text and "float32" not in text
    assert {row[0]: int(row[1]) for row in alone[2:]} == tokens
