"""CMAI: each function of the maths against loops written from the paper's equations, and what one forward pass computes."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import build_llava, llava_inputs, llava_prompt
from transformers import DynamicCache

from ta_llava import cmai
from ta_llava.cmai import (
    Inhibition,
    attention_weights,
    focus_scores,
    focus_weights,
    head_averaged_scores,
    inhibited_pairs,
    inhibition_ratio,
    threshold_rank,
)


# --- the maths -----------------------------------------------------------------------------------------------------


def test_the_ratio_grows_linearly_from_0_to_its_maximum():
    assert [inhibition_ratio(layer, 4, 0.6) for layer in range(4)] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert inhibition_ratio(0, 1, 0.6) == 0


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("num_queries", [1, 5])
def test_scores_are_averaged_over_heads(heads, kv_heads, num_queries):
    query, key = torch.randn(2, heads, num_queries, 8), torch.randn(2, kv_heads, 7, 8)
    expected = torch.zeros(2, num_queries, 7)
    for b in range(2):
        for j in range(num_queries):
            for k in range(7):
                for head in range(heads):
                    expected[b, j, k] += 0.3 * query[b, head, j] @ key[b, head // (heads // kv_heads), k] / heads
    torch.testing.assert_close(head_averaged_scores(query, key, 0.3), expected)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_weights_are_the_softmax_over_what_is_allowed(softcap):
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 6, 8)
    allowed = torch.rand(2, 3, 6) < 0.6
    allowed[..., 0] = True
    weights = attention_weights(query, key, 0.5, allowed, softcap)
    for b in range(2):
        for head in range(4):
            for j in range(3):
                scores = [0.5 * float(query[b, head, j] @ key[b, head // 2, k]) for k in range(6)]
                if softcap is not None:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                powers = [math.exp(scores[k]) if allowed[b, j, k] else 0.0 for k in range(6)]
                expected = torch.tensor([power / sum(powers) for power in powers])
                torch.testing.assert_close(weights[b, head, j], expected)


@pytest.mark.parametrize("num_texts, num_images", [(1, 1), (1, 5), (4, 3), (7, 9)])
@pytest.mark.parametrize("focus", ["sum", "discounted_sum", "focus"])
def test_focus_is_that_of_equations_9_to_11_and_table_5(num_texts, num_images, focus):
    text_to_text, text_to_image = torch.randn(2, num_texts, num_texts), torch.randn(2, num_texts, num_images)
    index = torch.arange(num_texts)
    distance = (index[:, None] - index[None]).expand(2, -1, -1)
    neighbors = text_to_text.masked_fill(distance <= 0, 0)
    given = distance if focus == "discounted_sum" else None
    weights = focus_weights(neighbors, distance <= 0, given, focus, discount=0.7)
    actual = focus_scores(text_to_image, weights, text_to_image)
    for b in range(2):
        for j in range(num_texts):
            for k in range(num_images):
                expected = text_to_image[b, j, k].clone()
                for h in range(j):
                    if focus == "focus":
                        expected += text_to_text[b, j, h] * text_to_image[b, h, k]
                    elif focus == "sum":
                        expected += text_to_image[b, h, k]
                    elif focus == "discounted_sum":
                        expected += 0.7 ** (j - h) * text_to_image[b, h, k]
                torch.testing.assert_close(actual[b, j, k], expected)


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.6, 0.77, 1.0])
@pytest.mark.parametrize("num_images", [1, 2, 5, 36])
@pytest.mark.parametrize("ties", [False, True])
def test_what_is_inhibited_is_below_the_quantile_of_what_is_seen(ratio, num_images, ties):
    focus = torch.randint(0, 3, (3, 4, num_images)).float() if ties else torch.randn(3, 4, num_images)
    seen = torch.rand(3, 4, num_images) < 0.7
    seen[0, 0] = False
    seen[1] = True
    rank = threshold_rank(seen.sum(-1), torch.tensor(ratio))
    inhibited = inhibited_pairs(focus.masked_fill(~seen, torch.inf), num_images, rank[..., None])
    for b in range(3):
        for j in range(4):
            values = focus[b, j][seen[b, j]]
            for k in range(num_images):
                if seen[b, j, k]:
                    assert inhibited[b, j, k] == bool(focus[b, j, k] < torch.quantile(values.double(), ratio))


def test_equal_focus_inhibits_nothing():
    rank = threshold_rank(torch.full((1, 1, 1), 9), torch.tensor(0.6))
    assert not inhibited_pairs(torch.ones(1, 1, 9), threshold_rank(9, 0.6) + 1, rank).any()


# --- one forward pass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("focus", ["tia", "sum", "discounted_sum", "focus"])
@torch.no_grad()
def test_steps_of_a_conversation_give_what_one_pass_gives(backbone, focus):
    """A batch without padding: single tokens, several at once, and again single ones after a crop."""
    model = build_llava(backbone, cmai_focus=focus)
    inputs = llava_inputs([llava_prompt(length=7, seed=1), llava_prompt(length=7, seed=2)])
    assert inputs["attention_mask"].all()
    new_tokens = torch.randint(10, 60, (2, 4), generator=torch.Generator().manual_seed(5))
    cache = DynamicCache()
    logits = [model(**inputs, past_key_values=cache).logits]
    for tokens in new_tokens.split([1, 1, 2], dim=1):
        logits.append(model(input_ids=tokens, past_key_values=cache).logits)
    ids = torch.cat([inputs["input_ids"], new_tokens], dim=1)
    expected = model(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=1e-4)
    cache.crop(-1)
    again = model(input_ids=new_tokens[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(again, expected[:, -1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backbone", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_aligned_rows_are_computed_as_any_others_are(monkeypatch, backbone, dtype):
    """A prompt, single tokens, several at once, and what follows crops to the prompt's end and into the prompt."""
    model = build_llava(backbone).to(dtype)
    inputs = llava_inputs([llava_prompt(length=7, seed=1), llava_prompt(length=7, seed=2)])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    tokens = torch.randint(10, 60, (2, 6), generator=torch.Generator().manual_seed(5))
    kinds = []

    def converse() -> torch.Tensor:
        cache = DynamicCache()
        logits = [model(**inputs, past_key_values=cache).logits]
        for step in tokens.split([1, 1, 2, 1, 1], dim=1):
            logits.append(model(input_ids=step, past_key_values=cache).logits)
        for num_removed in (6, 9):
            cache.crop(-num_removed)
            for step in tokens[:, :num_removed].split(1, dim=1):
                logits.append(model(input_ids=step, past_key_values=cache).logits)
        return torch.cat(logits, dim=1)

    def scattered(*args) -> cmai._ScatteredKeys:
        kinds.append("aligned")
        return cmai._ScatteredKeys(*args)

    actual = converse()
    monkeypatch.setattr(cmai, "_AlignedKeys", scattered)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual, converse(), atol=tolerance, rtol=1e-4)
    assert kinds.count("aligned") == 1 + 4 + 6  # all but the two tokens at once, which have a mask, and the last 6


@pytest.mark.parametrize(
    "rows, text_columns, image_columns",
    [
        (["tiittt"], [[3, 4, 5]], [[1, 2]]),
        (["iittt", "iittt"], [[2, 3, 4]] * 2, [[0, 1]] * 2),
        (["tiittt", "iitttt"], [[3, 4, 5, -1], [2, 3, 4, 5]], [[1, 2], [0, 1]]),
        (["iittt", "ttttt"], [[2, 3, 4], [-1, -1, -1]], [[0, 1], [-1, -1]]),
        (["iittit"], [[2, 3, 5]], [[0, 1, 4]]),
        (["iitt-"], [[2, 3]], [[0, 1]]),
        (["tii"], [[-1]], [[1, 2]]),
        (["ttt"], [[0, 1, 2]], [[]]),
    ],
)
def test_rows_are_those_of_text_after_an_image(rows, text_columns, image_columns):
    """Without an image every column has a row, as in a step of the decoding."""
    is_image = torch.tensor([[token == "i" for token in row] for row in rows])
    is_text = torch.tensor([[token == "t" for token in row] for row in rows])
    text = SimpleNamespace(num_hidden_layers=4)
    config = SimpleNamespace(
        text_config=text, cmai_attention="scores", cmai_focus="focus", cmai_discount=0.9, cmai_max_ratio=0.6
    )
    inhibition = Inhibition(config, is_image, is_text, 0, None)
    assert inhibition.text_columns.tolist() == text_columns
    assert inhibition.image_columns.tolist() == image_columns
    has_images = is_image.any().item()
    assert inhibition.ratios == pytest.approx([0, 0.2, 0.4, 0.6] if has_images else [0, 0, 0, 0])
