import json
import shutil
import sys

import pytest
import train_ta_llava_small as train_small
from conftest import SHIPPED_MODEL

from ta_llava.data import easy_vqa as easy_vqa_data
from ta_llava.evaluation import evaluate, tasks


def test_a_quick_trial_from_other_parts(tmp_path, monkeypatch):
    """The shipped model stands for the one of real parts, which the tests do not have."""
    pytest.importorskip("easy_vqa")
    load = easy_vqa_data.load_easy_vqa
    for module in (easy_vqa_data, tasks):
        monkeypatch.setattr(module, "load_easy_vqa", lambda split: load(split)[:12])
    shutil.copytree(SHIPPED_MODEL, tmp_path / "run" / "init")
    command = ["train_small", "--output-dir", str(tmp_path / "run"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", [*command, "--scale", "1e-6", "--questions", "8"])
    train_small.main()

    record = json.loads((tmp_path / "results" / "train_small.json").read_text())
    assert list(record["results"]) == ["untrained", "after phase 1", "after phase 2", "after phase 3"]
    untrained = record["results"]["untrained"]["all"]
    assert (untrained["questions"], untrained["accuracy"]) == (8, 1.0)
    assert list(record["phases"]) == ["after phase 1", "after phase 2", "after phase 3"]
    for log in record["phases"].values():
        assert (log["steps"], log["samples"], len(log["losses"])) == (1, 16, 1)
    table = (tmp_path / "results" / "train_small.md").read_text()
    assert "| untrained |" in table and "all (8)" in table
    assert (tmp_path / "results" / "train_small.png").stat().st_size > 10_000

    # What was measured is not measured again.
    monkeypatch.setattr(evaluate, "load", lambda *arguments: pytest.fail("loaded again"))
    train_small.main()
