import json

import pytest
import torch
import train_llava_next_tiny
from PIL import Image
from shape_pictures import GRIDS
from train_ta_llava_tiny import claim_folder
from transformers import LlavaForConditionalGeneration

from ta_llava import VmtcCmaiLlavaNextForConditionalGeneration, VmtcCmaiLlavaNextProcessor
from ta_llava.common.shipped_models import DEFAULT_LLAVA


def test_it_starts_from_the_shipped_llava(tmp_path):
    train_llava_next_tiny.build_start(tmp_path, seed=0)
    model = VmtcCmaiLlavaNextForConditionalGeneration.from_pretrained(tmp_path)
    shipped = LlavaForConditionalGeneration.from_pretrained(DEFAULT_LLAVA, dtype=torch.float32).state_dict()
    weights = model.state_dict()
    assert weights.keys() - shipped.keys() == {"model.image_newline"}
    assert all(torch.equal(weights[name], value) for name, value in shipped.items())
    assert model.config.is_stock() and 0 < weights["model.image_newline"].std() < 0.5
    processor = VmtcCmaiLlavaNextProcessor.from_pretrained(tmp_path)
    views = [
        len(processor.image_processor(Image.new("RGB", (64 * columns, 64 * rows)))["pixel_values"][0])
        for rows, columns in GRIDS
    ]
    assert views == [3, 3, 5, 3, 3]


def test_a_quick_trial_gives_a_model_that_is_scored_with_each_budget(tmp_path):
    pytest.importorskip("easy_vqa")
    train_llava_next_tiny.train_llava_next_tiny(tmp_path, scale=1e-6)
    table = train_llava_next_tiny.score(tmp_path)
    rows = {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in table.splitlines()[2:])}
    assert list(rows) == ["most frequent answer", *train_llava_next_tiny.BUDGETS]
    # One picture of each grid; a newline for each row of the grid of patches, or of tiles
    tokens = {name: float(cells[0]) for name, cells in rows.items()}
    grids = [(8 * 17, 1), (16 * 9, 2), (16 * 17, 2), (6 * 17, 1), (16 * 7, 2)]
    assert tokens["all"] == 64 + sum(count for count, _ in grids) / 5
    newlines = sum(rows_of_tiles for _, rows_of_tiles in grids) / 5
    for name, of_view in (("half", 32), ("ninth", 7)):
        for kind in ("", "-paper", "-random"):
            assert tokens[name + kind] == pytest.approx(of_view * (4 * 3 + 5) / 5 + newlines, abs=0.05)
        assert tokens[f"{name}-total"] == pytest.approx(tokens[name], abs=0.3)
    samples = json.loads((tmp_path / "data" / "test.json").read_text())
    for name in train_llava_next_tiny.BUDGETS:
        results = json.loads((tmp_path / "scores" / name / "results.json").read_text())
        assert results["scores"]["all"]["questions"] == len(samples)
    configs = {
        name: VmtcCmaiLlavaNextForConditionalGeneration.config_class.from_pretrained(
            train_llava_next_tiny.with_budget(tmp_path, name)
        )
        for name in train_llava_next_tiny.BUDGETS
    }
    assert [config.use_vmtc for config in configs.values()] == [False, *[True] * 8]
    assert configs["ninth"].vmtc_stage_placement == "last" and configs["ninth-paper"].vmtc_stage_placement == "spaced"
    assert configs["ninth-total"].vmtc_total_visual_tokens == 24
    assert configs["ninth-random"].vmtc_method == "last_layer_prune"


def test_a_trial_is_not_taken_for_a_part_of_another_run(tmp_path):
    claim_folder(tmp_path, seed=0, scale=0.1)
    claim_folder(tmp_path, seed=0, scale=0.1)
    with pytest.raises(ValueError, match=r"begun with {'seed': 0, 'scale': 0.1}, not {'seed': 0, 'scale': 1.0}"):
        train_llava_next_tiny.train_llava_next_tiny(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["arguments.json"]
