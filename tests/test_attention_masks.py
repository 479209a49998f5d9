"""Attention masks of every form say the same."""

import pytest
import torch
from conftest import build_config
from transformers import StaticCache
from transformers.masking_utils import create_masks_for_generate

from ta_llava.attention_masks import non_padding_columns


@pytest.mark.parametrize("form", ["2-D", "boolean", "additive", "dict"])
@pytest.mark.parametrize("past", [0, 3])
def test_padding_is_found_in_every_form_of_mask(form, past):
    tokens = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]]).bool()
    columns = 6 - past
    mask = tokens.long()
    if form != "2-D":
        causal = torch.ones(columns, 9).tril(past).bool()
        mask = (causal & torch.nn.functional.pad(tokens, (0, 3))[:, None]).unsqueeze(1)
        if form == "additive":
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        if form == "dict":
            mask = {"sliding_attention": None, "full_attention": mask}
    for length in (past, torch.tensor(past)):
        assert torch.equal(non_padding_columns(mask, 2, columns, tokens.device, length), tokens[:, past:])
    assert non_padding_columns(None, 2, columns, tokens.device, past) is None


def test_padding_is_found_in_the_masks_of_the_library():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    config = build_config("gemma2").text_config
    assert torch.equal(non_padding_columns(mask, 2, 5, mask.device), mask.bool())
    for implementation in ("eager", "sdpa"):
        config._attn_implementation = implementation
        prepared = create_masks_for_generate(
            config=config,
            inputs_embeds=torch.empty(2, 5, 0),
            attention_mask=mask,
            past_key_values=StaticCache(config, max_cache_len=16),
        )
        assert isinstance(prepared, dict) and prepared["full_attention"].dim() == 4
        assert torch.equal(non_padding_columns(prepared, 2, 5, mask.device), mask.bool())
        for form in prepared.values():
            assert torch.equal(non_padding_columns(form, 2, 5, mask.device), mask.bool())


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (1, 5), (5,), (2, 1, 5)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="attention_mask.*shape") as error:
        non_padding_columns(torch.ones(shape), 2, 5, torch.device("cpu"))
    assert str(shape) in str(error.value) and "(2, 5)" in str(error.value)
