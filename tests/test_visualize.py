"""What the pictures of VMTC show: the trace composed over stages, and the pixels."""

import shutil

import numpy as np
import pytest
import torch
from conftest import EXAMPLE_IMAGE, SHIPPED_MODEL, build_llava, make_lively
from PIL import Image
from test_cli import run
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ta_llava import TaLlavaForConditionalGeneration
from ta_llava.visualize import (
    DROPPED,
    KEPT,
    MARGIN,
    TITLE_HEIGHT,
    StageView,
    cluster_color,
    compose_trace,
    draw_stages,
    panel_boxes,
    visualize,
)
from ta_llava.vmtc import VmtcStage, compress_tokens, compression_of_call


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
    assert picture.shape == (2 * (height + TITLE_HEIGHT) + 2 * MARGIN, 4 * (width + MARGIN) + MARGIN, 3)
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


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_command_writes_a_picture(tmp_path):
    out = tmp_path / "out.png"
    code, printed, _ = run("visualize", EXAMPLE_IMAGE, "--visual-tokens", 16, "-o", out)
    assert code == 0 and printed.splitlines()[-1] == f"Wrote {out}." and "64 -> 48 (" in printed
    picture, _ = visualize(EXAMPLE_IMAGE, num_visual_tokens=16)
    assert np.array_equal(np.array(Image.open(out)), np.array(picture))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png"], "none.png"),
        ([__file__], "not a readable image"),
        ([EXAMPLE_IMAGE, "-o", "out.txt"], "no ending of a picture"),
        ([EXAMPLE_IMAGE, "-o", "no/such/folder/out.png"], "There is no folder no/such/folder"),
        ([EXAMPLE_IMAGE, "--visual-tokens", 65], "The budget is 65 visual tokens, but an image has 64 patches"),
        ([EXAMPLE_IMAGE, "--visual-tokens", 0], "from 1 to 64"),
        ([EXAMPLE_IMAGE, "--model", EXAMPLE_IMAGE.parent], "No vision tower could be loaded"),
    ],
)
def test_bad_input_is_a_message_before_a_model_is_loaded(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    code, _, error = run("visualize", *arguments)
    assert code == 1 and error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
