"""Where the prefix looks: the numbers are those of the model, and the picture shows them."""

import numpy as np
import pytest
import torch
from conftest import EXAMPLE_IMAGE, SHIPPED_MODEL, build_llava, make_lively, text_config
from pictures import SHAPE, TEAL, heat, pixels_of_panels
from PIL import Image
from transformers import GenerationConfig

from ta_llava import TaLlavaConfig, TaLlavaForConditionalGeneration, prefix_adapters
from ta_llava.analysis.asking import prompt_inputs
from ta_llava.analysis.drawing import (
    DROPPED,
    HEADING_HEIGHT,
    KEPT,
    LEGEND_HEIGHT,
    MARGIN,
    TITLE_HEIGHT,
    compose,
)
from ta_llava.analysis.prefix_attention import PrefixView, prefix_panels, trace_prefix
from ta_llava.analysis.vmtc_stages import trace_stages
from ta_llava.inference import answer, load


@pytest.fixture(scope="module")
def shipped():
    """Model and processor; tests that change the model make their own."""
    return load(SHIPPED_MODEL)


def lively_ta_llava(backbone: str, **kwargs) -> TaLlavaForConditionalGeneration:
    """With random weights, for the processor of the shipped model."""
    config = TaLlavaConfig.from_pretrained(SHIPPED_MODEL, **kwargs)
    config.text_config = text_config(backbone, vocab_size=config.text_config.vocab_size)
    torch.manual_seed(0)
    return make_lively(TaLlavaForConditionalGeneration(config)).float().eval()


def weights_of_the_vision_adapter(monkeypatch, model, inputs) -> list[torch.Tensor]:
    """The attention weights `(heads, L, M)` that the model itself uses, one per time that the prefix reads the image."""
    weights, attend = [], prefix_adapters.eager_attention_forward

    def keep(module, *args, **kwargs):
        output = attend(module, *args, **kwargs)
        if module is model.model.vision_adapter.cross_attn:
            weights.append(output[1][0])
        return output

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(prefix_adapters, "eager_attention_forward", keep)
        model(**inputs)
    return weights


@pytest.mark.parametrize("backbone", ["gemma2", "llama", "qwen3"])
def test_the_map_is_the_mean_of_the_weights_that_the_model_uses(processor, monkeypatch, backbone):
    model = lively_ta_llava(backbone)
    view = trace_prefix(model, processor, EXAMPLE_IMAGE, SHAPE, max_new_tokens=4)  # llama and qwen3 by SDPA
    model.set_attn_implementation("eager")
    weights = weights_of_the_vision_adapter(monkeypatch, model, prompt_inputs(processor, EXAMPLE_IMAGE, SHAPE))
    assert view.layers == [1] and view.attention.shape == (1, 8, 8) and len(weights) == 1
    for row in range(8):
        for column in range(8):
            values = [float(query[row * 8 + column]) for by_head in weights[0] for query in by_head]
            assert float(view.attention[0, row, column]) == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert view.attention.std() > 0.001  # not the same everywhere, which any mixture of patches would be


def test_looking_at_the_prefix_does_not_change_the_answer(shipped):
    model, processor = shipped
    expected = list(answer(model, processor, [([EXAMPLE_IMAGE], question) for question in (SHAPE, TEAL)]))
    views = [trace_prefix(model, processor, EXAMPLE_IMAGE, question) for question in (SHAPE, TEAL)]
    assert [view.answer for view in views] == expected == ["triangle", "yes"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_instruction_changes_where_the_prefix_looks(shipped):
    """Its colour is looked for inside of the shape, its form at the corners."""
    shape, teal = (trace_prefix(*shipped, EXAMPLE_IMAGE, question) for question in (SHAPE, TEAL))
    assert shape.layers == teal.layers == [1, 5]
    assert torch.allclose(shape.attention.sum(dim=(1, 2)), torch.ones(2))
    inside = [view.attention[:, 4, 3:5].sum(dim=-1) for view in (shape, teal)]
    assert (inside[1] > 2 * inside[0]).all()
    corners = [view.attention[:, 3, [2, 5]].sum(dim=-1) for view in (shape, teal)]
    assert (corners[0] > 2 * corners[1]).all()


@pytest.mark.parametrize("method", ["cluster", "layerwise_prune"])
def test_a_merged_token_shares_out_what_it_receives(processor, monkeypatch, method):
    model = lively_ta_llava("gemma2", vmtc_method=method, vmtc_merge_weights="normalized")
    model.set_visual_budget(16)
    view = trace_prefix(model, processor, EXAMPLE_IMAGE, SHAPE, max_new_tokens=4)
    inputs = prompt_inputs(processor, EXAMPLE_IMAGE, SHAPE)
    weights = weights_of_the_vision_adapter(monkeypatch, model, inputs)[0].mean(dim=(0, 1))
    clusters = trace_stages(model.config, model.model.vision_tower, inputs["pixel_values"][:, 0])[-1].clusters
    attention = view.attention.flatten()
    dropped = torch.tensor(clusters) == DROPPED
    assert torch.equal(attention.isnan(), dropped) and dropped.any() == (method == "layerwise_prune")
    kept = [patch for patch, number in enumerate(clusters) if number == KEPT]
    merged: dict[int, list[int]] = {}
    for patch, number in enumerate(clusters):
        if number > 0:
            merged.setdefault(number, []).append(patch)
    shares = sorted([float(attention[patch]) for patch in kept] + [float(attention[p].sum()) for p in merged.values()])
    assert shares == pytest.approx(sorted(weights.tolist()), abs=1e-6)
    assert all(attention[patches].unique().numel() == 1 for patches in merged.values())


def test_the_traced_answer_is_greedy_whatever_the_checkpoint_generates_by(shipped):
    model, processor = shipped
    expected = trace_prefix(model, processor, EXAMPLE_IMAGE, "describe the image.").answer
    stock = model.generation_config
    settings = {"num_beams": 4, "num_return_sequences": 3, "repetition_penalty": 50.0, "no_repeat_ngram_size": 1}
    model.generation_config = GenerationConfig(**{**stock.to_dict(), **settings})
    try:
        assert trace_prefix(model, processor, EXAMPLE_IMAGE, "describe the image.").answer == expected
    finally:
        model.generation_config = stock


def test_the_picture_of_the_prefix():
    pixels = np.random.default_rng(0).integers(0, 256, (320, 480, 3)).astype(np.uint8)
    maps = torch.rand(2, 2, 2, 3)
    maps[1, 1, 0, 0] = 4.0
    views = [PrefixView(question, "yes", [1, 5], attention) for question, attention in zip("ab", maps)]
    picture = compose(prefix_panels(Image.fromarray(pixels), views, 160))
    height = HEADING_HEIGHT + TITLE_HEIGHT + 320 + MARGIN
    assert picture.size == (4 * (480 + MARGIN) + MARGIN, 2 * height + LEGEND_HEIGHT)
    for row, attention in enumerate(maps):
        panels = pixels_of_panels(picture, 4, (480, 320), row * height + HEADING_HEIGHT)
        assert np.array_equal(panels[0], pixels)
        for panel, values in zip(panels[1:], [*attention, attention.mean(dim=0)]):
            assert np.abs(panel - heat(pixels, values / 4, 160)).max() <= 1.5  # one scale for all


@pytest.mark.parametrize(
    ("highest", "percent"), [(1 / 576, "0.17%"), (0.0149, "1.5%"), (0.123, "12%"), (0.996, "100%"), (1.0, "100%")]
)
def test_the_legend_has_two_digits(monkeypatch, highest, percent):
    texts = []
    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", lambda self, place, text, **kwargs: texts.append(text))
    view = PrefixView("what?", "yes", [1], torch.tensor([[[0.0, highest]]]))
    compose(prefix_panels(Image.new("RGB", (20, 10)), [view], 10))
    assert texts[-1] == f"{percent} on one patch"


def test_long_questions_do_not_run_out_of_the_picture():
    view = PrefixView("what is it? " * 30, "yes", [1], torch.rand(1, 2, 2))
    pixels = np.array(compose(prefix_panels(Image.new("RGB", (300, 300)), [view], 150)))
    assert (pixels[:HEADING_HEIGHT, -MARGIN:] == 255).all() and (pixels[:HEADING_HEIGHT] < 128).any()


@torch.no_grad()
def test_a_model_without_a_prefix_that_looks_is_a_message(shipped):
    model, processor = shipped
    with pytest.raises(ValueError, match="'vmtc_cmai_llava' model, but only a TA-LLaVA has a prefix"):
        trace_prefix(build_llava(), processor, EXAMPLE_IMAGE, SHAPE)
    shallow = lively_ta_llava("llama", adapter_interval=100)
    for layer in shallow.model.language_model.layers:
        layer.prefix_source = None
    with pytest.raises(ValueError, match="never reads the image"):
        trace_prefix(shallow, processor, EXAMPLE_IMAGE, SHAPE)
    with pytest.raises(ValueError, match="question is empty"):
        trace_prefix(model, processor, EXAMPLE_IMAGE, " ")
