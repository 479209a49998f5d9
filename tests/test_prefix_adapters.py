"""The parts of Algorithm 1 of TA-LLaVA: the schedule, the cross-attention, and where the prefix stands."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm, apply_rotary_pos_emb
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from ta_llava.prefix_adapters import (
    adapter_after_layer,
    apply_rotary,
    eager_attention_forward,
    fuse_norms,
    reading_masks,
    replace_prefix,
    signed_rotary,
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
    torch.testing.assert_close(apply_rotary(query, *signed_rotary(cos, sin)), expected_query)
    torch.testing.assert_close(apply_rotary(key, *signed_rotary(cos, sin)), expected_key)


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
    hidden = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None, None, :]
    output, _ = eager_attention_forward(
        nn.Module(), query.reshape(2, 2, 6, 8), key, value, hidden, scaling=0.3, softcap=softcap
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
    assert attention_mask[:, 0, 0].tolist() == [[0, -math.inf, 0], [0] * 3, [0] * 3]


@pytest.mark.parametrize(
    "dtype, weight_dtype",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("norm_class", [Gemma2RMSNorm, Gemma3RMSNorm, LlamaRMSNorm, Qwen3RMSNorm])
def test_fused_norms_compute_what_those_of_the_library_do(norm_class, dtype, weight_dtype):
    norm = norm_class(16).to(weight_dtype)
    torch.nn.init.normal_(norm.weight)
    states = (3 * torch.randn(2, 5, 16)).to(dtype)
    expected = norm(states)
    parent = nn.Sequential(copy.deepcopy(norm))
    fuse_norms(parent)
    assert type(parent[0]) is not norm_class and isinstance(parent[0], norm_class)
    actual = parent(states)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.to(dtype), expected.to(dtype))  # the library rounds once more on the way
