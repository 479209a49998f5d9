"""What CMAI inhibits: the numbers are those of the model, and the picture shows them."""

import numpy as np
import pytest
import torch
from conftest import EXAMPLE_IMAGE, build_model, make_lively
from pictures import SHAPE, heat, pixels_of_panels
from PIL import Image

from ta_llava import VmtcCmaiLlavaConfig, VmtcCmaiLlavaForConditionalGeneration
from ta_llava.analysis.asking import prompt_inputs
from ta_llava.analysis.drawing import DROPPED, HEADING_HEIGHT, KEPT, compose
from ta_llava.analysis.inhibition import CmaiView, inhibition_panels, trace_inhibition
from ta_llava.analysis.vmtc_stages import StageView, stage_panels
from ta_llava.common.shipped_models import DEFAULT_LLAVA
from ta_llava.inference import answer, load
from ta_llava.vision_towers import compression_of_call


def lively_llava(**kwargs) -> VmtcCmaiLlavaForConditionalGeneration:
    """With random weights, VMTC to 16 tokens and CMAI, for the processor of the shipped LLaVA with the same budget."""
    defaults = {"use_vmtc": True, "vmtc_num_visual_tokens": 16, "vmtc_merge_weights": "normalized", "use_cmai": True}
    config = VmtcCmaiLlavaConfig.from_pretrained(DEFAULT_LLAVA, **{**defaults, **kwargs})
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = make_lively(VmtcCmaiLlavaForConditionalGeneration(config)).float().eval()
    model.generation_config.suppress_tokens = list(range(7))  # special ones, which are no words
    return model


@pytest.fixture(scope="module")
def llava_processor():
    return load(DEFAULT_LLAVA, 16, 0.6)[1]


@torch.no_grad()
def slow_inhibition(model, processor, question: str, max_new_tokens: int) -> tuple[str, np.ndarray]:
    """
    The answer, and of each of its words and each patch the share of layers in which no head of it has any weight, from
    the attention weights of one pass over prompt and answer; of words of several tokens the mean.
    """
    inputs = prompt_inputs(processor, EXAMPLE_IMAGE, question)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    length = inputs["input_ids"].shape[1]
    model.set_attn_implementation({"text_config": "eager"})
    attentions = model(input_ids=output, pixel_values=inputs["pixel_values"], output_attentions=True).attentions
    columns = (output[0] == model.config.image_token_id).nonzero().flatten().tolist()
    compression = compression_of_call(
        model.config, model.model.vision_tower, inputs["pixel_values"], model.config.vision_feature_layer
    )
    model.model.vision_tower(inputs["pixel_values"], compression=compression)
    shares = np.zeros((output.shape[1] - length, 64))
    for step in range(len(shares)):
        for patch in range(64):
            token = patch
            for becomes in compression.trace:
                token = int(becomes[0, token]) if token >= 0 else -1
            hidden = [bool((layer[0, :, length - 1 + step, columns[token]] == 0).all()) for layer in attentions]
            shares[step, patch] = sum(hidden) / len(attentions) if token >= 0 else np.nan
    words: list[list[np.ndarray]] = []
    for token, values in zip(processor.tokenizer.convert_ids_to_tokens(output[0, length:]), shares):
        if token.startswith("\N{LOWER ONE EIGHTH BLOCK}") or not words:
            words.append([])
        words[-1].append(values.reshape(8, 8))
    text = processor.decode(output[0, length:], skip_special_tokens=True).strip()
    return text, np.stack([sum(values) / len(values) for values in words])


@pytest.mark.parametrize(
    ("attention", "kwargs"),
    [
        ("sdpa", {}),
        ("eager", {}),
        ("sdpa", {"cmai_attention": "weights"}),
        ("sdpa", {"vmtc_method": "layerwise_prune"}),
    ],
)
def test_what_is_inhibited_has_no_weight_in_the_attention(llava_processor, attention, kwargs):
    model = lively_llava(**kwargs)
    model.set_attn_implementation({"text_config": attention})
    view = trace_inhibition(model, llava_processor, EXAMPLE_IMAGE, SHAPE, max_new_tokens=6)
    text, shares = slow_inhibition(model, llava_processor, SHAPE, 6)
    assert view.answer == text and view.words == text.split() and len(view.words) > 3
    assert np.allclose(view.inhibited.numpy(), shares, atol=1e-6, equal_nan=True)
    assert view.inhibited.isnan().any() == ("vmtc_method" in kwargs)
    assert 0 < view.inhibited.nan_to_num().mean() < 1 and not view.inhibited[0].equal(view.inhibited[1])
    assert (view.num_layers, len(view.stages)) == (6, 3)


def test_keeping_what_is_inhibited_does_not_change_the_answer(llava_processor):
    model = lively_llava()
    (expected,) = answer(model, llava_processor, [([EXAMPLE_IMAGE], SHAPE)], max_new_tokens=12)
    view = trace_inhibition(model, llava_processor, EXAMPLE_IMAGE, SHAPE, max_new_tokens=12)
    assert view.answer == expected
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_budget_of_a_call(llava_processor):
    view = trace_inhibition(lively_llava(), llava_processor, EXAMPLE_IMAGE, SHAPE, 36, max_new_tokens=1)
    assert view.stages[-1].num_kept + view.stages[-1].num_merged == 36


def test_averaged_visual_tokens_are_squares_of_patches():
    model = lively_llava(use_vmtc=False, vmtc_num_visual_tokens=None, spd_factor=2)
    processor = load(DEFAULT_LLAVA, cmai_max_ratio=0.6)[1]
    processor.spd_factor = 2
    inhibited = trace_inhibition(model, processor, EXAMPLE_IMAGE, SHAPE, max_new_tokens=3).inhibited
    assert inhibited.equal(inhibited[:, ::2, ::2].repeat_interleave(2, dim=1).repeat_interleave(2, dim=2))
    assert inhibited[0].unique().numel() > 1


def test_the_picture_of_cmai():
    pixels = np.random.default_rng(0).integers(0, 256, (322, 480, 3)).astype(np.uint8)
    inhibited = torch.tensor([[[0.0, 0.25, torch.nan], [0.5, 0.0, 0.0]], [[0.0] * 3, [0.25] * 3]])
    stage = StageView([KEPT, KEPT, DROPPED, KEPT, 1, 1], 6, 3, 1, 1)
    image = Image.fromarray(pixels)
    for stages in ([], [stage]):
        view = CmaiView("what?", "red circle", ["red", "circle"], inhibited, 4, stages)
        panels = pixels_of_panels(
            compose(inhibition_panels(image, view, 160)), 3 + len(stages), (480, 322), HEADING_HEIGHT
        )
        for panel, values in zip(panels[-2:], inhibited):
            assert np.abs(panel[:320] - heat(pixels[:320], 1 - values / 0.5, 160)).max() <= 1.5
            assert np.array_equal(panel[320:], pixels[320:])  # on no patch
    merged = np.array(compose(stage_panels(image, [stage], 160)))
    assert np.array_equal(panels[1], pixels_of_panels(Image.fromarray(merged), 2, (480, 322), 0)[1])
    nothing = compose(inhibition_panels(image, CmaiView("what?", "", [], inhibited[:0], 4, []), 160))
    assert np.array_equal(pixels_of_panels(nothing, 1, (480, 322), HEADING_HEIGHT)[0], pixels)


@torch.no_grad()
def test_a_model_without_cmai_is_a_message(llava_processor):
    with pytest.raises(ValueError, match="'ta_llava' model, but CMAI works in a"):
        trace_inhibition(build_model(), llava_processor, EXAMPLE_IMAGE, SHAPE)
    with pytest.raises(ValueError, match="CMAI is off"):
        trace_inhibition(lively_llava(use_cmai=False), llava_processor, EXAMPLE_IMAGE, SHAPE)
