"""The benchmark runs and its deterministic part is right; its timings are no business of a test."""

import subprocess
import sys

from conftest import ROOT


def test_the_benchmark_runs(tmp_path):
    report = tmp_path / "report.md"
    command = [sys.executable, ROOT / "benchmarks" / "compare_with_llava.py", "--configs", "tiny", "--repeats", "1"]
    subprocess.run([*command, "--batch-sizes", "1", "2", "--output", report], check=True, capture_output=True)
    rows = [line for line in report.read_text().splitlines() if line.startswith("| cache after the prefill")]
    assert [row.split("|")[-2].strip() for row in rows] == ["2.36x", "2.36x"]  # (64 + 40) / (4 + 40) tokens
