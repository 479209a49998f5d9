"""What the pictures of VMTC, of the prefix and of CMAI show: their numbers are those of the models; and the pixels."""

import shutil

import numpy as np
import pytest
import torch
from command_line import run
from conftest import EXAMPLE_IMAGE, SHIPPED_MODEL, build_llava, make_lively, text_config
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ta_llava import (
    TaLlavaConfig,
    TaLlavaForConditionalGeneration,
    VmtcCmaiLlavaConfig,
    VmtcCmaiLlavaForConditionalGeneration,
    modeling_ta_llava,
)
from ta_llava.analysis.drawing import (
    DROPPED,
    HEADING_HEIGHT,
    HEAT_OPACITY,
    KEPT,
    LEGEND_HEIGHT,
    MARGIN,
    TITLE_HEIGHT,
    _load_fonts,
    cluster_color,
    heat_colors,
    panel_boxes,
)
from ta_llava.analysis.visualize import (
    CmaiView,
    PrefixView,
    StageView,
    _split_words,
    compose_trace,
    draw_inhibition,
    draw_prefix,
    draw_stages,
    prompt_inputs,
    trace_inhibition,
    trace_prefix,
    trace_stages,
    visualize,
    visualize_inhibition,
    visualize_prefix,
)
from ta_llava.common.shipped_models import DEFAULT_LLAVA
from ta_llava.inference import answer, load
from ta_llava.vision_towers import compression_of_call
from ta_llava.vmtc import VmtcStage, compress_tokens


# --- the trace -----------------------------------------------------------------------------------------------------


def slow_composition(trace, stages):
    """Tokens as sets of patches; of each stage, the tokens that are single patches and those that are clusters."""
    tokens = [({patch}, False) for patch in range(len(trace[0]))]
    composed = []
    for becomes, stage in zip(trace, stages):
        after = [(set(), False) for _ in range(stage.num_kept + stage.num_clusters)]
        for (patches, is_cluster), target in zip(tokens, becomes.tolist()):
            if target >= 0:
                merged = target >= stage.num_kept
                after[target] = (after[target][0] | patches, after[target][1] or is_cluster or merged)
        tokens = after
        singles = {patch for patches, is_cluster in tokens if not is_cluster for patch in patches}
        composed.append((singles, {frozenset(patches) for patches, is_cluster in tokens if is_cluster}))
    return composed


def random_trace(num_tokens: int, stages: list[VmtcStage], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens, trace = torch.randn(1, num_tokens, 4, generator=generator), []
    for stage in stages:
        importance = torch.rand(1, tokens.shape[1], generator=generator)
        tokens, becomes = compress_tokens(tokens, importance, stage.num_kept, stage.num_clusters)
        trace.append(becomes[0])
    return trace


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "stages",
    [
        [(12, 3), (8, 3), (4, 2)],
        [(20, 4)],
        [(0, 5), (0, 2), (0, 1)],
        [(17, 1), (10, 1), (3, 1)],  # one token for all that are merged
        [(15, 0), (7, 0), (1, 0)],  # dropped
        [(15, 0), (7, 2), (1, 1)],
    ],
)
def test_the_composed_trace_is_that_of_sets_of_patches(stages, seed):
    stages = [VmtcStage(*stage) for stage in stages]
    trace = random_trace(25, stages, seed)
    views = compose_trace(trace, stages)
    num_before = 25
    for view, stage, (singles, clusters) in zip(views, stages, slow_composition(trace, stages), strict=True):
        by_number: dict = {}
        for patch, number in enumerate(view.clusters):
            by_number.setdefault(number, set()).add(patch)
        by_number.pop(DROPPED, None)
        assert by_number.pop(KEPT, set()) == singles
        assert set(map(frozenset, by_number.values())) == clusters
        assert (view.num_before, view.num_kept, view.num_merged) == (num_before, len(singles), len(clusters))
        assert view.num_dropped == (num_before - stage.num_kept if stage.num_clusters == 0 else 0)
        num_before = stage.num_kept + stage.num_clusters


def test_a_cluster_keeps_its_number_while_it_lives():
    stages = [VmtcStage(3, 2), VmtcStage(3, 1), VmtcStage(1, 1)]
    trace = [
        torch.tensor([0, 1, 2, 3, 3, 4, 4, 4]),  # clusters of 2 and 3 patches
        torch.tensor([3, 0, 3, 1, 2]),  # both clusters are kept, two single patches merged
        torch.tensor([0, 1, 1, 1]),  # all clusters become one
    ]
    first, second, third = compose_trace(trace, stages)
    assert first.clusters == [KEPT, KEPT, KEPT, 1, 1, 2, 2, 2]
    assert second.clusters == [3, KEPT, 3, 1, 1, 2, 2, 2]
    assert third.clusters == [2, KEPT, 2, 2, 2, 2, 2, 2]
    assert second.title == "5 -> 4 (1 kept, 3 merged)" and third.title == "4 -> 2 (1 kept, 1 merged)"


def test_a_cluster_of_one_patch_is_a_cluster_from_then_on():
    stages = [VmtcStage(1, 1), VmtcStage(1, 0)]
    views = compose_trace([torch.tensor([0, 1]), torch.tensor([-1, 0])], stages)
    assert [view.clusters for view in views] == [[KEPT, 1], [DROPPED, 1]]
    assert [view.title for view in views] == ["2 -> 2 (1 kept, 1 merged)", "2 -> 1 (0 kept, 1 merged, 1 dropped)"]


def test_no_stage_is_nothing():
    assert compose_trace([], []) == []


def test_clusters_have_colors_of_their_own():
    colors = [cluster_color(number) for number in range(1, 101)]
    assert len(set(colors)) == 100 and all(0 <= value <= 255 for color in colors for value in color)


# --- the picture ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "patch_size"), [((24, 24), 4), ((320, 160), 16), ((27, 26), 4)])
def test_kept_patches_are_unchanged_merged_ones_tinted_and_dropped_ones_dark(size, patch_size):
    pixels = np.random.default_rng(0).integers(64, 256, (size[1], size[0], 3)).astype(np.uint8)
    columns, rows = size[0] // patch_size, size[1] // patch_size
    clusters = [(KEPT, 1, 2, DROPPED)[patch % 4] for patch in range(columns * rows)]
    view = StageView(clusters, columns * rows, 9, 2, 3)
    picture = np.array(draw_stages(Image.fromarray(pixels), [view] * 5, patch_size))

    factor = max(1, -(-300 // size[0]))
    width, height = size[0] * factor, size[1] * factor
    panels_height = 2 * (height + TITLE_HEIGHT + MARGIN)
    assert picture.shape == (panels_height + LEGEND_HEIGHT, 4 * (width + MARGIN) + MARGIN, 3)
    legend = picture[panels_height:]
    assert (legend < 128).any() and (legend[:, -MARGIN:] == 255).all()
    original, *panels = [
        picture[top:bottom, left:right] for left, top, right, bottom in panel_boxes(6, (width, height))
    ]
    large = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    assert np.array_equal(original, large)
    side = patch_size * factor
    for panel in panels:
        for patch, number in enumerate(clusters):
            row, column = divmod(patch, columns)
            here = np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]
            drawn, seen = panel[here].astype(int), large[here].astype(int)
            if number == KEPT:
                assert np.array_equal(drawn, seen)
            elif number == DROPPED:
                assert (drawn < 0.3 * seen).all()
            else:
                color = np.array(cluster_color(number))
                assert (np.abs(drawn - color) <= np.abs(seen - color)).all() and not np.array_equal(drawn, seen)
                assert (drawn[side // 2, 0] == color).all() and not (drawn[side // 2, side // 2] == color).all()
        # Pixels that are on no patch, where the size is no multiple of it.
        assert np.array_equal(panel[rows * side :], large[rows * side :])
    title = picture[:TITLE_HEIGHT]
    assert (title[:, MARGIN : MARGIN + width] < 128).any() and (title[:, -MARGIN:] == 255).all()


def test_the_titles_fit():
    view = StageView([KEPT] * 36, 576, 342, 63, 0)
    picture = np.array(draw_stages(Image.new("RGB", (24, 24)), [view], 4))
    gap = picture[:TITLE_HEIGHT, -2 * MARGIN :]
    assert view.title == "576 -> 405 (342 kept, 63 merged)" and (gap == 255).all()


def test_the_shipped_model_sees_what_the_picture_shows():
    picture, views = visualize(EXAMPLE_IMAGE, num_visual_tokens=16)
    assert [view.title.split(" (")[0] for view in views] == ["64 -> 48", "48 -> 32", "32 -> 16"]
    assert all(set(view.clusters) >= {KEPT} and DROPPED not in view.clusters for view in views)
    boxes = panel_boxes(4, (320, 320))
    seen = np.array(picture.crop(boxes[0]))[::5, ::5]
    assert np.array_equal(seen, np.array(Image.open(EXAMPLE_IMAGE).convert("RGB").resize((64, 64), Image.BICUBIC)))
    # The same through the whole model.
    model = TaLlavaForConditionalGeneration.from_pretrained(SHIPPED_MODEL, dtype=torch.float32).eval()
    model.config.vmtc_merge_weights = "normalized"
    model.set_visual_budget(16)
    image_processor = AutoProcessor.from_pretrained(SHIPPED_MODEL).image_processor
    pixels = image_processor(Image.open(EXAMPLE_IMAGE).convert("RGB"), return_tensors="pt")["pixel_values"]
    tower = model.model.vision_tower
    vmtc = compression_of_call(model.config, tower, pixels, -1)
    tower(pixels, vmtc=vmtc)
    expected = compose_trace([becomes[0] for becomes in vmtc.trace], list(vmtc.stages.values()))
    assert views == expected


def test_a_budget_of_all_patches_shows_the_image_alone():
    picture, views = visualize(EXAMPLE_IMAGE, num_visual_tokens=64)
    assert views == [] and picture.size == (320 + 2 * MARGIN, 320 + TITLE_HEIGHT + MARGIN)


# --- the prefix ----------------------------------------------------------------------------------------------------

SHAPE, TEAL = "what shape is in the image?", "is there a teal shape?"


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
    weights, attend = [], modeling_ta_llava.eager_attention_forward

    def keep(module, *args, **kwargs):
        output = attend(module, *args, **kwargs)
        if module is model.model.vision_adapter.cross_attn:
            weights.append(output[1][0])
        return output

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(modeling_ta_llava, "eager_attention_forward", keep)
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


# --- CMAI ----------------------------------------------------------------------------------------------------------


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
    vmtc = compression_of_call(
        model.config, model.model.vision_tower, inputs["pixel_values"], model.config.vision_feature_layer
    )
    model.model.vision_tower(inputs["pixel_values"], vmtc=vmtc)
    shares = np.zeros((output.shape[1] - length, 64))
    for step in range(len(shares)):
        for patch in range(64):
            token = patch
            for becomes in vmtc.trace:
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


def test_tokens_are_put_together_to_words():
    pieces = ["<bos>", "A", " red", " cir", "cle", ".", "\n", "Yes", "</s>"]

    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return "".join(pieces[i] for i in ids if not pieces[i].startswith("<"))

    words = _split_words(Tokenizer(), torch.arange(len(pieces)))
    assert words == [("A", [1]), ("red", [2]), ("circle.", [3, 4, 5]), ("Yes", [6, 7])]
    assert _split_words(Tokenizer(), torch.tensor([0, 8])) == []


# --- their pictures ------------------------------------------------------------------------------------------------


def heat(pixels, values, side):
    """The image in grey under the colours of the values."""
    grey = np.array(Image.fromarray(pixels).convert("L").convert("RGB")).astype(float)
    colors = heat_colors(values).repeat(side, axis=0).repeat(side, axis=1)
    return (1 - HEAT_OPACITY) * grey + HEAT_OPACITY * colors


def pixels_of_panels(picture, num_panels, size, top):
    pixels = np.array(picture).astype(float)
    return [pixels[top + t : top + b, left:right] for left, t, right, b in panel_boxes(num_panels, size)]


def test_heat_colors_get_lighter_with_the_value():
    lightness = np.array(Image.fromarray(heat_colors(torch.linspace(0, 1, 50)[None])).convert("L"))[0].astype(int)
    assert (np.diff(lightness) >= 0).all() and lightness[0] == 0 and lightness[-1] > 240
    assert heat_colors(torch.tensor([torch.nan])).tolist() == [[0, 0, 0]]


def test_the_picture_of_the_prefix():
    pixels = np.random.default_rng(0).integers(0, 256, (320, 480, 3)).astype(np.uint8)
    maps = torch.rand(2, 2, 2, 3)
    maps[1, 1, 0, 0] = 4.0
    views = [PrefixView(question, "yes", [1, 5], attention) for question, attention in zip("ab", maps)]
    picture = draw_prefix(Image.fromarray(pixels), views, 160)
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
    draw_prefix(Image.new("RGB", (20, 10)), [view], 10)
    assert texts[-1] == f"{percent} on one patch"


def test_the_picture_of_cmai():
    pixels = np.random.default_rng(0).integers(0, 256, (322, 480, 3)).astype(np.uint8)
    inhibited = torch.tensor([[[0.0, 0.25, torch.nan], [0.5, 0.0, 0.0]], [[0.0] * 3, [0.25] * 3]])
    stage = StageView([KEPT, KEPT, DROPPED, KEPT, 1, 1], 6, 3, 1, 1)
    image = Image.fromarray(pixels)
    for stages in ([], [stage]):
        view = CmaiView("what?", "red circle", ["red", "circle"], inhibited, 4, stages)
        panels = pixels_of_panels(draw_inhibition(image, view, 160), 3 + len(stages), (480, 322), HEADING_HEIGHT)
        for panel, values in zip(panels[-2:], inhibited):
            assert np.abs(panel[:320] - heat(pixels[:320], 1 - values / 0.5, 160)).max() <= 1.5
            assert np.array_equal(panel[320:], pixels[320:])  # on no patch
    merged = np.array(draw_stages(image, [stage], 160))
    assert np.array_equal(panels[1], pixels_of_panels(Image.fromarray(merged), 2, (480, 322), 0)[1])
    nothing = draw_inhibition(image, CmaiView("what?", "", [], inhibited[:0], 4, []), 160)
    assert np.array_equal(pixels_of_panels(nothing, 1, (480, 322), HEADING_HEIGHT)[0], pixels)


def test_long_questions_do_not_run_out_of_the_picture():
    view = PrefixView("what is it? " * 30, "yes", [1], torch.rand(1, 2, 2))
    pixels = np.array(draw_prefix(Image.new("RGB", (300, 300)), [view], 150))
    assert (pixels[:HEADING_HEIGHT, -MARGIN:] == 255).all() and (pixels[:HEADING_HEIGHT] < 128).any()


def test_characters_that_no_font_has_are_named(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    messages: list[str] = []
    monkeypatch.setattr("ta_llava.analysis.drawing.logger.error", messages.append)
    monkeypatch.setattr(
        "ta_llava.analysis.drawing.FONTS", ("none.ttf", f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf")
    )
    fonts = [_load_fonts(text) for text in ("a red square?", "a форма?", "a 图像?")]
    assert [font.getname()[0] for font, _ in fonts] == ["Aileron", "DejaVu Sans", "Aileron"]
    assert len(messages) == 1 and "boxes for 图像:" in messages[0]


# --- models --------------------------------------------------------------------------------------------------------

VISION = {"hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 3, "image_size": 24, "patch_size": 4}
TEXT = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "vocab_size": 30}
MODELS = {
    "clip": CLIPConfig(vision_config={**VISION, "intermediate_size": 32}, text_config=TEXT),
    "clip tower": CLIPVisionConfig(**VISION, intermediate_size=32),
    "siglip": SiglipConfig(vision_config={**VISION, "intermediate_size": 32}, text_config=TEXT),
    "dinov2": Dinov2Config(**VISION),
}


def save_with_image_processor(model, folder):
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"height": 24, "width": 24}, do_center_crop=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_vision_tower_alone(tmp_path, name):
    model = make_lively(AutoModel.from_config(MODELS[name]))
    _, views = visualize(EXAMPLE_IMAGE, save_with_image_processor(model, tmp_path))
    assert [view.title.split(" (")[0] for view in views] == ["36 -> 30", "30 -> 24", "24 -> 18"]
    _, views = visualize(EXAMPLE_IMAGE, tmp_path, 6)
    assert views[-1].num_kept + views[-1].num_merged == 6


def test_a_vision_tower_that_lacks_a_norm_is_a_message(tmp_path):
    """Of what comes before the blocks too."""
    save_with_image_processor(make_lively(AutoModel.from_config(MODELS["clip tower"])), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    names = [name for name in weights if "pre_layrnorm" in name]
    save_file({name: value for name, value in weights.items() if name not in names}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="The vision tower in .* lacks 2 weights, such as 'pre_layrnorm"):
        visualize(EXAMPLE_IMAGE, tmp_path)


def test_images_of_a_size_that_no_tower_has_are_a_message(tmp_path):
    save_with_image_processor(make_lively(AutoModel.from_config(MODELS["clip tower"])), tmp_path)
    CLIPImageProcessorPil(size={"height": 60000, "width": 24}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`size` of `image_processor` has 60000"):
        visualize(EXAMPLE_IMAGE, tmp_path)


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


@pytest.mark.parametrize("is_stock", [True, False])
def test_a_llava_shows_its_own_settings(tmp_path, is_stock):
    model = build_llava(vmtc_method="layerwise_prune")
    if is_stock:
        config = LlavaConfig(vision_config=model.config.vision_config, text_config=model.config.text_config)
        stock = LlavaForConditionalGeneration(config)
        stock.load_state_dict(model.state_dict())
        model = stock
    save_with_image_processor(model, tmp_path)
    _, views = visualize(EXAMPLE_IMAGE, tmp_path)
    assert views[-1].num_kept + views[-1].num_merged == (18 if is_stock else 9)
    assert (DROPPED in views[-1].clusters) == (not is_stock)


def test_what_has_no_tower_is_a_message(tmp_path):
    save_with_image_processor(AutoModel.from_config(LlamaConfig(**TEXT, intermediate_size=32)), tmp_path / "text")
    with pytest.raises(ValueError, match="'llama' model, which has no vision tower"):
        visualize(EXAMPLE_IMAGE, tmp_path / "text")
    save_with_image_processor(CLIPModel(MODELS["clip"]), tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="No vision tower could be loaded"):
        visualize(EXAMPLE_IMAGE, tmp_path / "clip")
    shutil.copyfile(tmp_path / "text" / "model.safetensors", tmp_path / "clip" / "model.safetensors")
    with pytest.raises(ValueError, match="lacks [0-9]+ weights, such as 'embeddings"):
        visualize(EXAMPLE_IMAGE, tmp_path / "clip")


@torch.no_grad()
def test_a_model_of_another_kind_is_a_message(shipped, llava_processor):
    model, processor = shipped
    with pytest.raises(ValueError, match="'ta_llava' model, but CMAI works in a"):
        trace_inhibition(model, processor, EXAMPLE_IMAGE, SHAPE)
    llava = lively_llava(use_cmai=False)
    with pytest.raises(ValueError, match="'vmtc_cmai_llava' model, but only a TA-LLaVA has a prefix"):
        trace_prefix(llava, llava_processor, EXAMPLE_IMAGE, SHAPE)
    with pytest.raises(ValueError, match="CMAI is off"):
        trace_inhibition(llava, llava_processor, EXAMPLE_IMAGE, SHAPE)
    shallow = lively_ta_llava("llama", adapter_interval=100)
    for layer in shallow.model.language_model.layers:
        layer.prefix_source = None
    with pytest.raises(ValueError, match="never reads the image"):
        trace_prefix(shallow, processor, EXAMPLE_IMAGE, SHAPE)
    with pytest.raises(ValueError, match="question is empty"):
        trace_prefix(model, processor, EXAMPLE_IMAGE, " ")


def test_a_llava_with_cmai_shows_its_own_settings(tmp_path):
    from ta_llava.building.compress import compress_llava

    compress_llava(DEFAULT_LLAVA, tmp_path / "out", 32, 0.9)
    own = visualize_inhibition(EXAMPLE_IMAGE, SHAPE, tmp_path / "out")[1]
    assert own.stages[-1].num_kept + own.stages[-1].num_merged == 32
    budget = visualize_inhibition(EXAMPLE_IMAGE, SHAPE, tmp_path / "out", num_visual_tokens=32)[1]
    assert budget.inhibited.equal(own.inhibited)  # 0.9 of the config
    ratio = visualize_inhibition(EXAMPLE_IMAGE, SHAPE, tmp_path / "out", cmai_max_ratio=0.6)[1]
    assert ratio.stages[-1].num_kept + ratio.stages[-1].num_merged == 32  # of the config
    assert not ratio.inhibited.equal(own.inhibited)


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_command_writes_a_picture(tmp_path):
    out = tmp_path / "out.png"
    code, printed, _ = run("visualize", EXAMPLE_IMAGE, "--visual-tokens", 16, "-o", out)
    assert code == 0 and printed.splitlines()[-1] == f"Wrote {out}." and "64 -> 48 (" in printed
    picture, _ = visualize(EXAMPLE_IMAGE, num_visual_tokens=16)
    assert np.array_equal(np.array(Image.open(out)), np.array(picture))


def test_the_command_draws_where_the_prefix_looks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed, _ = run("visualize", EXAMPLE_IMAGE, SHAPE, TEAL, "--show", "prefix")
    assert code == 0 and printed.splitlines() == [f"{SHAPE} triangle", f"{TEAL} yes", "Wrote prefix.png."]
    assert np.array_equal(
        np.array(Image.open("prefix.png")), np.array(visualize_prefix(EXAMPLE_IMAGE, [SHAPE, TEAL])[0])
    )


@pytest.mark.parametrize("options", [[], ["--visual-tokens", 16], ["--visual-tokens", 16, "--cmai", 0.3]])
def test_the_command_draws_what_cmai_inhibits(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    code, printed, _ = run("visualize", EXAMPLE_IMAGE, SHAPE, "--show", "cmai", *options)
    assert code == 0 and printed.splitlines() == [f"{SHAPE} triangle", "Wrote cmai.png."]
    expected, view = visualize_inhibition(EXAMPLE_IMAGE, SHAPE, DEFAULT_LLAVA, *options[1::2])
    assert np.array_equal(np.array(Image.open("cmai.png")), np.array(expected))
    assert (len(view.stages) > 0) == bool(options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png"], "none.png"),
        ([__file__], "not a readable image"),
        ([EXAMPLE_IMAGE, "-o", "out.txt"], "out.txt has no suffix"),
        ([EXAMPLE_IMAGE, "-o", "no/such/folder/out.png"], "There is no folder no/such/folder"),
        ([EXAMPLE_IMAGE, "--visual-tokens", 65], "The budget is 65 visual tokens, but an image has 64 patches"),
        ([EXAMPLE_IMAGE, "--visual-tokens", 0], "from 1 to 64"),
        ([EXAMPLE_IMAGE, "--model", EXAMPLE_IMAGE.parent], "No model could be loaded"),
        ([EXAMPLE_IMAGE, "--model", "./none"], "There is no folder './none'"),
        ([EXAMPLE_IMAGE, "what?"], "VMTC does not read the question 'what?'"),
        ([EXAMPLE_IMAGE, "--show", "all"], "vmtc, prefix or cmai, got 'all'"),
        ([EXAMPLE_IMAGE, "--cmai", 0.6], "--cmai is for --show cmai"),
        ([EXAMPLE_IMAGE, "--show", "prefix"], "needs one or more questions"),
        ([EXAMPLE_IMAGE, "what?", " ", "--show", "prefix"], "The question is empty"),
        (
            [EXAMPLE_IMAGE, "what?", "--show", "prefix", "--visual-tokens", 16],
            "--visual-tokens is not for --show prefix",
        ),
        ([EXAMPLE_IMAGE, "what?", "--show", "prefix", "--model", DEFAULT_LLAVA], "only a TA-LLaVA has a prefix"),
        ([EXAMPLE_IMAGE, "what?", "--show", "prefix", "--model", EXAMPLE_IMAGE.parent], "No model could be loaded"),
        ([__file__, "what?", "--show", "prefix"], "not a readable image"),
        ([EXAMPLE_IMAGE, "--show", "cmai"], "needs one question after the image, got 0"),
        ([EXAMPLE_IMAGE, "what?", "why?", "--show", "cmai"], "got 2"),
        ([EXAMPLE_IMAGE, "", "--show", "cmai"], "The question is empty"),
        ([EXAMPLE_IMAGE, "what?", "--show", "cmai", "--model", SHIPPED_MODEL], "'ta_llava' model, but CMAI works in"),
        ([EXAMPLE_IMAGE, "what?", "--show", "cmai", "--cmai", 0], "With a CMAI ratio of 0"),
        ([EXAMPLE_IMAGE, "what?", "--show", "cmai", "--cmai", 2], "from 0 to 1, got 2"),
        ([EXAMPLE_IMAGE, "what?", "--show", "cmai", "--visual-tokens", 65], "The budget is 65 visual tokens"),
    ],
)
def test_bad_input_is_a_message_before_a_model_is_loaded(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for model_class in (AutoModel, AutoModelForImageTextToText, VmtcCmaiLlavaForConditionalGeneration):
        monkeypatch.setattr(model_class, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    code, _, error = run("visualize", *arguments)
    assert code == 1 and error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
