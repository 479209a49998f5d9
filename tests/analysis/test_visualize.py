"""Pictures from the name of a model: what is loaded, which settings hold, and what the command says."""

import shutil

import numpy as np
import pytest
import torch
from command_line import run
from conftest import EXAMPLE_IMAGE, SHIPPED_MODEL, build_llava, make_lively
from pictures import SHAPE, TEAL
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
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ta_llava import TaLlavaForConditionalGeneration, VmtcCmaiLlavaForConditionalGeneration
from ta_llava.analysis.drawing import DROPPED, KEPT, MARGIN, TITLE_HEIGHT, panel_boxes
from ta_llava.analysis.visualize import visualize, visualize_inhibition, visualize_prefix
from ta_llava.analysis.vmtc_stages import compose_trace
from ta_llava.building.compress import compress_llava
from ta_llava.common.shipped_models import DEFAULT_LLAVA
from ta_llava.vision_towers import compression_of_call
from ta_llava.vmtc import TRAINING_FREE_VMTC


def test_the_shipped_model_sees_what_the_picture_shows():
    picture, views = visualize(EXAMPLE_IMAGE, num_visual_tokens=16)
    assert [view.title.split(" (")[0] for view in views] == ["64 -> 48", "48 -> 32", "32 -> 16"]
    assert all(set(view.clusters) >= {KEPT} and DROPPED not in view.clusters for view in views)
    boxes = panel_boxes(4, (320, 320))
    seen = np.array(picture.crop(boxes[0]))[::5, ::5]
    assert np.array_equal(seen, np.array(Image.open(EXAMPLE_IMAGE).convert("RGB").resize((64, 64), Image.BICUBIC)))
    # The same through the whole model.
    model = TaLlavaForConditionalGeneration.from_pretrained(SHIPPED_MODEL, dtype=torch.float32).eval()
    for name, value in TRAINING_FREE_VMTC.items():
        setattr(model.config, name, value)
    model.set_visual_budget(16)
    image_processor = AutoProcessor.from_pretrained(SHIPPED_MODEL).image_processor
    pixels = image_processor(Image.open(EXAMPLE_IMAGE).convert("RGB"), return_tensors="pt")["pixel_values"]
    tower = model.model.vision_tower
    compression = compression_of_call(model.config, tower, pixels, -1)
    tower(pixels, compression=compression)
    expected = compose_trace([becomes[0] for becomes in compression.trace], list(compression.stages.values()))
    assert views == expected


def test_a_budget_of_all_patches_shows_the_image_alone():
    picture, views = visualize(EXAMPLE_IMAGE, num_visual_tokens=64)
    assert views == [] and picture.size == (320 + 2 * MARGIN, 320 + TITLE_HEIGHT + MARGIN)


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


def test_a_llava_with_cmai_shows_its_own_settings(tmp_path):
    compress_llava(DEFAULT_LLAVA, tmp_path / "out", 32, 0.9)
    own = visualize_inhibition(EXAMPLE_IMAGE, SHAPE, tmp_path / "out")[1]
    assert own.stages[-1].num_kept + own.stages[-1].num_merged == 32
    budget = visualize_inhibition(EXAMPLE_IMAGE, SHAPE, tmp_path / "out", num_visual_tokens=32)[1]
    assert budget.inhibited.equal(own.inhibited)  # 0.9 of the config
    ratio = visualize_inhibition(EXAMPLE_IMAGE, SHAPE, tmp_path / "out", cmai_max_ratio=0.6)[1]
    assert ratio.stages[-1].num_kept + ratio.stages[-1].num_merged == 32  # of the config
    assert not ratio.inhibited.equal(own.inhibited)


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
