"""The number of operations that each system starts stays within its budget."""

import count_launches
import pytest
import torch


@pytest.mark.parametrize(
    "count", [count_launches.count_ta_llava, count_launches.count_vmtc, count_launches.count_cmai]
)
def test_operations_stay_within_their_budgets(count):
    torch.manual_seed(0)
    for row in count():
        assert row.ours <= row.budget * row.stock, f"{row.name}: {row.ours} operations, LLaVA has {row.stock}"


def test_views_allocations_and_excluded_modules_do_not_count():
    layer = torch.nn.Linear(4, 4, bias=False)
    states = torch.randn(2, 4)
    with torch.no_grad(), count_launches.LaunchCounter(layer) as counter:
        layer(states.view(1, 2, 4).transpose(0, 1)) + 1
        torch.empty(3)
    assert counter.count == 1
