"""The parts of Algorithm 1 of TA-LLaVA: the schedule, the cross-attention, and where the prefix stands."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb

from ta_llava.prefix_adapters import (
    adapter_after_layer,
    apply_rotary,
    eager_attention_forward,
    reading_masks,
    replace_prefix,
)


def test_adapter_schedule_is_that_of_the_paper():
    schedule = [adapter_after_layer(layer, 26, 4) for layer in range(26)]
    assert [layer for layer, source in enumerate(schedule) if source == "text"] == [0, 4, 8, 12, 16, 20, 24]
    assert [layer for layer, source in enumerate(schedule) if source == "vision"] == [
        1,
        5,
        9,
        13,
        17,
        21,
    ]  # 25 is last
    assert [adapter_after_layer(layer, 5, 2) for layer in range(5)] == ["text", "vision", "text", "vision", None]


def test_apply_rotary_is_that_of_the_library():
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    cos, sin = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    expected_query, expected_key = apply_rotary_pos_emb(query, key, cos, sin)
    assert torch.equal(apply_rotary(query, cos, sin), expected_query)
    assert torch.equal(apply_rotary(key, cos, sin), expected_key)


def test_replace_prefix_writes_only_its_columns():
    states, prefix = torch.randn(2, 6, 3), torch.randn(2, 2, 3)
    columns = torch.tensor([[0, 1], [3, 4]])
    replaced = replace_prefix(states, columns, prefix)
    expected = states.clone()
    expected[0, 0:2], expected[1, 3:5] = prefix[0], prefix[1]
    assert torch.equal(replaced, expected)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_adapter_attention_against_loops(softcap):
    """Grouped-query cross-attention with soft-capping, one number at a time; heads that share keys are below each other."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 0, 0, 1]]).bool()
    output, _ = eager_attention_forward(
        nn.Module(), query.reshape(2, 2, 6, 8), key, value, mask[:, None, None, :], scaling=0.3, softcap=softcap
    )
    output = output.transpose(1, 2).reshape(query.shape)
    for row in range(2):
        for head in range(4):
            for token in range(3):
                scores = []
                for position in range(5):
                    score = 0.3 * sum(query[row, head, token, i] * key[row, head // 2, position, i] for i in range(8))
                    score = score if softcap is None else softcap * torch.tanh(score / softcap)
                    scores.append(score if mask[row, position] else torch.tensor(-torch.inf))
                weights = torch.softmax(torch.stack(scores), dim=0)
                expected = sum(weights[position] * value[row, head // 2, position] for position in range(5))
                torch.testing.assert_close(output[row, head, token], expected, atol=1e-5, rtol=1e-5)


def test_reading_masks_leave_no_row_without_a_key():
    """Rows that read, that have nothing to read, and that have no prefix."""
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0]]).bool()
    reads, attention_mask = reading_masks(torch.tensor([True, True, False]), mask)
    assert reads.flatten().tolist() == [True, False, False] and reads.shape == (3, 1, 1)
    assert attention_mask[:, 0, 0].tolist() == [[True, False, True], [True] * 3, [True] * 3]
