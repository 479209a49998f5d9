"""The benchmark runs and its deterministic part is right; its timings are no business of a test."""

import subprocess
import sys

from conftest import ROOT


# The rows of a table, and the visual tokens of each.
VARIANTS = {
    "LLaVA, 64": 64,
    "VMTC, 32": 32,
    "VMTC, 7": 7,
    "VMTC, 4": 4,
    "CMAI, 64": 64,
    "CMAI + VMTC, 32": 32,
    "CMAI + VMTC, 7": 7,
}


def cache_bytes(label: str, num_visual_tokens: int) -> int:
    """Of one row: 8 layers in float32; with CMAI the text's rows of 7 of them, and once the columns as int64."""
    columns = 40 + num_visual_tokens
    keys_and_values = 8 * 2 * columns * 2 * 32 * 4
    return keys_and_values + (7 * 40 * num_visual_tokens * 4 + columns * 8 if "CMAI" in label else 0)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("|")[1:-1]]


def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "compare_vmtc_cmai.py", "--configs", "tiny", "--repeats", "1"]
    options = ["--dtypes", "float32", "--batch-sizes", "1", "2", "--output-dir", tmp_path]
    subprocess.run([*command, *options], check=True, capture_output=True)
    report = (tmp_path / "compare_vmtc_cmai.md").read_text()

    sections = report.split("Batch ")[1:]
    assert len(sections) == 2
    for batch_size, section in zip((1, 2), sections):
        table = [cells(line) for line in section.split("### Bars")[0].splitlines() if line.startswith("|")]
        header, rows = table[0], table[2:]
        assert [row[0] for row in rows] == list(VARIANTS)
        assert all(len(row) == len(header) for row in rows)
        for (label, num_visual_tokens), row in zip(VARIANTS.items(), rows):
            size = cache_bytes(label, num_visual_tokens)
            ratio = cache_bytes("LLaVA", 64) / size
            assert (
                row[header.index("cache after the prefill")] == f"{batch_size * size / 1024:,.0f} KiB ({ratio:.2f}x)"
            )
            assert ("%" in row[header.index("VMTC's own work")]) == ("VMTC" in label)

    bars = [cells(line) for line in report.split("### Bars")[1].splitlines() if line.startswith("|")]
    assert bars[0][1:] == ["tiny, float32, batch 1", "tiny, float32, batch 2"]
    assert len(bars) == 2 + 15
    held = [row for row in bars[2:] if not row[0].startswith("whole prefill")]  # those are for 7B
    assert all("yes" in cell or "**no**" in cell for row in held for cell in row[1:])
