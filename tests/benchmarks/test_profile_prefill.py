"""The profile of a prefill, on the small setup."""

import pytest
import torch
from compare_with_llava import SETUPS, TA_LLAVA, build_systems, make_inputs, run_prefill
from profile_prefill import counting, format_stages, profile


@pytest.fixture(scope="module")
def parts():
    setup, device = SETUPS["tiny"], torch.device("cpu")
    torch.manual_seed(0)
    return build_systems(setup, torch.float32, device).ta_llava, make_inputs(setup, 2, 1, torch.float32, device)


@torch.no_grad()
def test_each_stage_is_counted_where_it_happens(parts):
    model, inputs = parts
    calls = iter(range(10_000))
    with counting(model, lambda: float(next(calls))) as counts:  # each begin and end counts one
        run_prefill(model, inputs.input_ids[TA_LLAVA], pixel_values=inputs.pixel_values)
    # Eight layers: the text adapter follows layers 0 and 4, that of vision 1 and 5, whose keys and values are made once.
    assert counts == {
        "vision tower": 1,
        "projector": 1,
        "vision adapter, keys and values": 1,
        "vision adapter, reading": 2,
        "text adapter, keys and values": 2,
        "text adapter, reading": 2,
        "language model, attention": 8,
        "language model, MLP": 8,
        "language modelling head": 1,
    }


@torch.no_grad()
def test_the_stages_are_all_of_it(parts):
    model, inputs = parts
    seconds, operations, num_bytes = profile(model, inputs, repeats=1)
    for values in (operations, num_bytes):  # all products of matrices are in some stage
        assert sum(value for stage, value in values.items() if stage != "all") == values["all"]
    assert sum(value for stage, value in seconds.items() if stage != "all") <= seconds["all"]
    mlp = model.model.language_model.layers[0].mlp
    rows = inputs.input_ids[TA_LLAVA].numel()
    assert operations["language model, MLP"] == 8 * 2 * rows * sum(weight.numel() for weight in mlp.parameters())
    table = format_stages(seconds, operations, num_bytes, (1e9, 1e12))
    floor = f"{operations['projector'] / 1e9 * 1000:,.1f}"  # bound by its operations, at these rates
    assert f"| {floor} |" in next(line for line in table.splitlines() if line.startswith("| projector"))
