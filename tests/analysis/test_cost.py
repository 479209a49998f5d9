import json

import pytest
import torch
from conftest import FIXTURES, IMAGE, ROOT, SHIPPED_MODEL, build_llava_config, random_tokens
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, Dinov2Config, LlamaConfig, LlavaConfig
from typer.testing import CliRunner

from ta_llava import VmtcCmaiLlavaConfig, VmtcCmaiLlavaForConditionalGeneration
from ta_llava.analysis.cost import CPU_ATTENTION, LANGUAGE_MODEL, count_cost, full_size_config, read_config
from ta_llava.building.compress import with_vmtc_and_cmai
from ta_llava.cli import app
from ta_llava.vmtc import TRAINING_FREE_VMTC


LLAVA = ROOT / "checkpoints" / "llava-tiny"


@pytest.mark.parametrize("folder", [SHIPPED_MODEL, LLAVA])
def test_parameters_and_cache_are_those_of_the_real_model(folder):
    config, image_size = read_config(folder)
    assert image_size == 64
    cost = count_cost(config, text_tokens=10, image_size=image_size)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert sum(cost.parameters.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert cost.parameters["vision tower"] == sum(p.numel() for p in model.model.vision_tower.parameters())
    placeholders = 4 if folder == SHIPPED_MODEL else 64
    ids = torch.tensor([[model.config.image_token_id] * placeholders + [10] * 10])
    with torch.no_grad():
        cache = model(input_ids=ids, pixel_values=torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16)).past_key_values
    assert cost.cache_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cost.num_tokens == placeholders + 10


def test_a_tower_of_dinov2_is_counted():
    vision_config = Dinov2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    text_config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=60)
    cost = count_cost(VmtcCmaiLlavaConfig(vision_config=vision_config, text_config=text_config))
    assert cost.num_tokens == 4 + 40
    assert cost.operations["vision tower"] > 0


def test_operations_of_the_language_model_against_a_count_by_hand():
    text_config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=60,
    )
    tower = read_config(LLAVA)[0].vision_config
    config = VmtcCmaiLlavaConfig(vision_config=tower, text_config=text_config)
    cost = count_cost(config, text_tokens=11, num_images=2)
    tokens = 2 * 64 + 11
    assert cost.num_tokens == tokens
    projections = 4 * 32 * 32 + 3 * 32 * 48
    by_hand = 3 * (2 * tokens * projections + 2 * 2 * tokens * tokens * 32) + 2 * tokens * 32 * 60
    assert cost.operations[LANGUAGE_MODEL] == by_hand
    assert cost.operations["projector"] == 2 * (2 * 64) * (tower.hidden_size * 32 + 32 * 32)
    one = count_cost(config, text_tokens=11, num_images=1)
    assert cost.operations["vision tower"] == 2 * one.operations["vision tower"]
    fewer = count_cost(
        VmtcCmaiLlavaConfig(vision_config=tower, text_config=text_config, use_vmtc=True), text_tokens=11
    )
    assert fewer.num_tokens == 32 + 11 and fewer.operations["vision tower"] < one.operations["vision tower"]


@pytest.mark.parametrize(
    "settings", [{}, {"cmai_attention": "weights"}, {"cmai_focus": "tia"}, {"cmai_focus": "none"}]
)
def test_what_cmai_adds(settings):
    """Beside its attention, CMAI makes the same matrix products in the model itself."""
    config = build_llava_config(use_vmtc=False, cmai_max_ratio=0.6, **settings)
    images, texts = 36, 5
    ids = torch.tensor([[IMAGE] * images + random_tokens(texts, 0)])
    products = []
    for config.use_cmai in (False, True):
        model = VmtcCmaiLlavaForConditionalGeneration(config).eval()
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            model(input_ids=ids, pixel_values=torch.zeros(1, 3, 24, 24))
        by_kind = counter.get_flop_counts()["Global"]
        products.append(sum(by_kind[kind] for kind in (torch.ops.aten.bmm, torch.ops.aten.baddbmm) if kind in by_kind))
    config.use_cmai = False
    without = count_cost(config, text_tokens=texts).operations
    config.use_cmai = True
    added = count_cost(config, text_tokens=texts).operations[LANGUAGE_MODEL] - without[LANGUAGE_MODEL]
    # Not in the first of 4 layers. 4 heads of 8 numbers share 2 of the keys; the weights need each of them.
    width = 4 * 8 if "cmai_attention" in settings else 2 * 8
    focus = 0 if "cmai_focus" in settings else texts * (texts - 1) * images
    by_hand = 0 if settings.get("cmai_focus") == "none" else 3 * 2 * (texts * (images + texts) * width + focus)
    assert added == by_hand == products[1] - products[0]


def test_the_models_of_the_papers():
    """Gemma-2-2B with 72 tokens takes 0.38, LLaVA-1.5-7B with 616 tokens 8.34 and its tower 0.38 TFLOP."""
    ours, llava = (count_cost(full_size_config(name)) for name in ("ta-llava-gemma-2-2b", "llava-1.5-7b"))
    assert (ours.num_tokens, llava.num_tokens) == (32 + 40, 576 + 40)
    assert ours.operations[LANGUAGE_MODEL] == pytest.approx(0.38e12, rel=0.02)
    assert llava.operations[LANGUAGE_MODEL] == pytest.approx(8.34e12, rel=0.01)
    assert llava.operations["vision tower"] == pytest.approx(0.38e12, rel=0.02)
    # TA-LLaVA runs no block behind its features, which are those of the last but one of 24.
    assert ours.operations["vision tower"] == pytest.approx(23 / 24 * llava.operations["vision tower"], rel=1e-3)
    assert sum(ours.operations.values()) < 0.95e12
    assert ours.cache_bytes == 2 * 26 * 4 * 256 * 72 * 2


def test_the_command(tmp_path):
    run = CliRunner()
    config = SHIPPED_MODEL / "config.json"
    result = run.invoke(app, ["cost", str(config), "--text-tokens", "10", "--json"])
    assert result.exit_code == 0, result.output
    costs = json.loads(result.stdout)
    assert list(costs) == [str(config), "llava-1.5-7b", "llava-1.5-13b"]
    assert costs[str(config)]["num_tokens"] == 4 + 10
    table = run.invoke(app, ["cost", str(LLAVA)]).stdout
    assert "prefill, llava-1.5-7b / this" in table and "KV cache, llava-1.5-13b / this" in table
    rows = {
        name: cells for _, name, *cells, _ in (line.split(" | ") for line in table.replace("|", " | ").splitlines())
    }
    rows = {name.strip(): [cell.strip() for cell in cells] for name, cells in rows.items()}
    assert rows["parameters"] == ["2.08 M", "7,063 M", "13,351 M"] and rows["- adapters"] == ["", "", ""]
    assert rows["prefill"][0] == "405 MFLOP" and rows["KV cache"][1] == "323 MB"

    costs = json.loads(run.invoke(app, ["cost", "--visual-tokens", "64", "--cmai", "0.6", "--json"]).stdout)
    stock, compressed, _ = costs.values()
    assert list(costs) == ["llava-1.5-7b", "llava-1.5-7b, 64 visual tokens, CMAI 0.6", "llava-1.5-13b"]
    assert (compressed["num_tokens"], stock["num_tokens"]) == (64 + 40, 576 + 40)
    assert compressed["operations"]["vision tower"] < stock["operations"]["vision tower"]
    assert compressed["parameters"] == stock["parameters"]

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for source, message in (
        (tmp_path, "is a 'llama' model"),
        (FIXTURES, "No model could be loaded"),
        ("llava", "llava-1.5-7b"),
    ):
        result = run.invoke(app, ["cost", str(source)])
        assert result.exit_code == 1 and message in result.stderr
    for source, options, message in (
        (SHIPPED_MODEL, ["--visual-tokens", "16"], "TA-LLaVA"),
        (LLAVA, ["--visual-tokens", "65"], "an image has 64 patches"),
        (LLAVA, ["--cmai", "2"], "The CMAI ratio must be from 0 to 1, got 2.0."),
    ):
        result = run.invoke(app, ["cost", str(source), *options])
        assert result.exit_code == 1 and message in result.stderr


@pytest.mark.parametrize("settings", [{"num_visual_tokens": 16}, {"cmai_max_ratio": 0.6}])
def test_what_vmtc_and_cmai_would_save_a_stock_llava(settings):
    """As much as in a LLaVA that has them."""
    ours = read_config(LLAVA)[0]
    stock = LlavaConfig(**{**ours.to_dict(), "model_type": "llava"})
    flags = {"use_vmtc": True, "vmtc_num_visual_tokens": 16, **TRAINING_FREE_VMTC}
    flags = flags if "num_visual_tokens" in settings else {"use_cmai": True}
    changed = VmtcCmaiLlavaConfig.from_dict({**ours.to_dict(), **flags})
    assert count_cost(with_vmtc_and_cmai(stock, **settings)) == count_cost(changed) != count_cost(stock)
    assert not with_vmtc_and_cmai(changed, cmai_max_ratio=0).use_cmai
