"""The benchmark runs and its deterministic part is right; its timings are no business of a test."""

import copy
import json
import sys
from dataclasses import replace
from functools import partial

import compare_with_llava
import pytest
import torch
from compare_with_llava import LLAVA, Q_FORMER, SETUPS, TA_LLAVA, build_systems, check_backbones, measure


TINY = replace(SETUPS["tiny"], rounds_per_repeat=1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def systems():
    return build_systems(TINY, torch.float32, CPU)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("|")[1:-1]]


def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    # The same small model twice: the second is the other row of the first's tables.
    setups = {"tiny": replace(TINY, reference="half"), "half": replace(TINY, cpu_layers=4)}
    monkeypatch.setattr(compare_with_llava, "SETUPS", setups)
    report = tmp_path / "report.md"
    options = ["--configs", "tiny", "half", "--repeats", "1", "--batch-sizes", "1", "2", "--images", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["compare_with_llava.py", *options, "--output", str(report)])
    compare_with_llava.main()
    assert capsys.readouterr().out.strip() == report.read_text().strip()

    first, second = report.read_text().split("### ")[1:]
    assert "4 of the language model's 8 layers" in second and "4 of" not in first
    for section, num_rows in ((first, 5), (second, 4)):
        table = [cells(line) for line in section.splitlines() if line.startswith("|")]
        header = table[0]
        for index, num_images in enumerate((1, 1, 2, 2)):  # two batch sizes each
            rows = table[index * (num_rows + 2) :][2 : num_rows + 2]
            tokens = [40 + count for count in (64 * num_images, 32 * num_images, 4, 4, 64 * num_images)]
            assert [row[1] for row in rows] == [str(count) for count in tokens[:num_rows]]
            ratios = [row[header.index("cache after the prefill, MiB")].split("(")[-1] for row in rows[1:]]
            assert ratios == [f"{tokens[0] / count:.2f}x)" for count in tokens[1:num_rows]]

    results = json.loads(report.with_suffix(".json").read_text())
    for result in results.values():
        records = [record for record in result["records"] if record["system"] == LLAVA]
        cells_measured = [(record["num_images"], record["batch_size"]) for record in records]
        assert cells_measured == [(1, 1), (1, 2), (2, 1), (2, 2)]
        for record in records:  # 8 layers, keys and values of 2 heads of 32 in float32, whatever was measured
            assert record["cache_bytes"] == record["batch_size"] * record["num_tokens"] * 8 * 2 * 2 * 32 * 4
            assert record["peak_bytes"] > record["cache_bytes"]
        # The same model, half of whose layers were measured.
        assert records[0]["weight_bytes"] == results["tiny"]["records"][0]["weight_bytes"]


def test_the_most_that_is_allocated_in_a_call_is_found():
    def allocate() -> torch.Tensor:
        first = torch.zeros(1_000_000)
        second = first + 1
        del first
        return torch.cat([second, second])

    assert compare_with_llava.allocated_bytes(allocate) == 3 * 4_000_000


def test_backbones_are_shared_and_projectors_are_not(systems):
    check_backbones(systems)
    backbone = sum(p.nbytes for p in systems.ta_llava.model.language_model.parameters())
    backbone += sum(p.nbytes for p in systems.ta_llava.model.vision_tower.parameters())
    weights = systems.weight_bytes()  # the head is tied to the embeddings
    assert weights[LLAVA] == backbone + 4 * 2 * (128 * 128 + 128)
    assert weights[Q_FORMER] == backbone + sum(p.nbytes for p in systems.qformer.parameters())
    assert all(parameter.std() > 0 for parameter in systems.qformer.parameters())
    assert all(torch.isfinite(buffer).all() for model in systems.models.values() for buffer in model.buffers())


@pytest.mark.parametrize(
    "part, unfair",
    [
        ("vision tower", lambda model: setattr(model.model.vision_tower.post_layernorm, "weight", new_weight())),
        ("language model", lambda model: setattr(model.model.language_model.norm, "weight", new_weight())),
        ("attention", lambda model: model.model.vision_tower.set_attn_implementation("eager")),
    ],
)
def test_an_unfair_comparison_is_refused(part, unfair):
    systems = build_systems(TINY, torch.float32, CPU)
    unfair(systems.ta_llava)
    with pytest.raises(RuntimeError, match=f"not fair.*{part}"):
        check_backbones(systems)


def new_weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(128))


def test_another_number_of_tokens_is_refused(systems):
    with pytest.raises(RuntimeError, match="LLaVA: the number of visual tokens is 64, expected 16"):
        wrong = {**TINY.vision_config, "patch_size": 16}
        measure(replace(TINY, vision_config=wrong), systems, batch_size=1, num_images=1, repeats=1)


def test_the_q_former_reads_image_and_instruction(systems):
    qformer = copy.deepcopy(systems.qformer)
    ids, features = torch.randint(7, 75, (2, 5)), torch.randn(2, 64, 128)
    with torch.no_grad():
        for parameter in qformer.parameters():
            parameter.normal_(std=0.3)
        tokens = qformer(ids, features)
        assert tokens.shape == (2, 32, 128)
        assert not torch.allclose(tokens[0], qformer(ids, features.flip(0))[0])
        assert not torch.allclose(tokens[0], qformer(ids.flip(0), features)[0])


@pytest.mark.parametrize("name", [LLAVA, Q_FORMER, TA_LLAVA])
def test_features_stand_for_their_images(systems, name):
    inputs = compare_with_llava.make_inputs(TINY, batch_size=2, num_images=2, dtype=torch.float32)
    model, input_ids = systems.models[name], inputs.input_ids[name]
    project = partial(systems.qformer, inputs.instruction_ids) if name == Q_FORMER else None

    def values(**images) -> torch.Tensor:
        return compare_with_llava.run_prefill(model, input_ids, **images, project=project)[1].layers[-1].values

    with torch.no_grad():
        features = compare_with_llava.run_tower(model, inputs.pixel_values)
        of_images = values(pixel_values=inputs.pixel_values)
        torch.testing.assert_close(values(features=features), of_images)
        assert not torch.equal(values(features=torch.randn_like(features)), of_images)


def test_a_missing_gpu_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_with_llava.py", "--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        compare_with_llava.main()
    assert "finds no GPU" in capsys.readouterr().err
