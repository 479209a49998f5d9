"""Vision towers that compress their tokens: against a tower that is written out block by block, and in TA-LLaVA."""

import copy
import pickle

import pytest
import torch
from conftest import build_config, build_model, make_lively, random_images
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PixtralVisionConfig,
    SiglipVisionConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ta_llava import TaLlavaConfig, TaLlavaForConditionalGeneration
from ta_llava.vision_towers import TowerCompression, blocks_of, compression_of_call, make_compressible
from ta_llava.vmtc import TRAINING_FREE_VMTC, VmtcConfig, VmtcStage, compress_tokens


# --- the tower -----------------------------------------------------------------------------------------------------


VISION_CONFIGS = {
    "clip": (CLIPVisionConfig, {"projection_dim": 24, "intermediate_size": 32}),
    "siglip": (SiglipVisionConfig, {"intermediate_size": 32}),
    "dinov2": (Dinov2Config, {"mlp_ratio": 2, "drop_path_rate": 0.1}),
}


def build_tower(kind, implementation="sdpa"):
    config_class, kwargs = VISION_CONFIGS[kind]
    config = config_class(
        hidden_size=24, num_hidden_layers=5, num_attention_heads=3, image_size=24, patch_size=4, **kwargs
    )
    torch.manual_seed(0)
    tower = make_lively(AutoModel.from_config(config, attn_implementation=implementation)).eval()
    make_compressible(tower)
    return tower


def tower_settings(tower, **kwargs):
    flags = {"use_vmtc": True, "vmtc_num_visual_tokens": 9, "vmtc_merge_weights": "normalized"}
    config = VmtcConfig(**(flags | kwargs))
    config.vision_config = tower.config
    return config


def slow_tower(tower, pixel_values, feature_layer, stages, kept_tokens="importance"):
    """Hidden states of a tower that compresses, block by block from its own modules, with attention written out."""
    states = tower.embeddings(pixel_values)
    states = tower.pre_layrnorm(states) if hasattr(tower, "pre_layrnorm") else states
    has_class_token = tower.config.model_type != "siglip_vision_model"
    blocks = tower.encoder.layer if hasattr(tower.encoder, "layer") else tower.encoder.layers
    heads = tower.config.num_attention_heads
    for index in range(feature_layer):
        block = blocks[index]
        is_clip = hasattr(block, "layer_norm1")
        attention = block.self_attn if is_clip else block.attention
        normed = (block.layer_norm1 if is_clip else block.norm1)(states)
        q, k, v = (
            getattr(attention, name)(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        attended = (weights @ v).transpose(1, 2).flatten(2)
        attended = attention.out_proj(attended) if is_clip else block.layer_scale1(attention.o_proj(attended))
        states = states + attended
        if index in stages:
            row = weights[:, :, 0, 1:] if has_class_token else weights.mean(2)
            first = int(has_class_token)
            patches, _ = compress_tokens(
                states[:, first:],
                row.mean(1),
                stages[index].num_kept,
                stages[index].num_clusters,
                "normalized",
                kept_tokens,
            )
            states = torch.cat([states[:, :first], patches], 1)
        mlp = block.mlp(block.layer_norm2(states)) if is_clip else block.layer_scale2(block.mlp(block.norm2(states)))
        states = states + mlp
    return states


@pytest.mark.parametrize("kind", list(VISION_CONFIGS))
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["cluster", "merge", "layerwise_prune", "last_layer_prune"])
@torch.no_grad()
def test_a_tower_compresses_between_attention_and_mlp(kind, implementation, method):
    tower = build_tower(kind, implementation)
    pixel_values = torch.randn(2, 3, 24, 24)
    config = tower_settings(tower, vmtc_method=method)
    compression = compression_of_call(config, tower, pixel_values, feature_layer=-2)
    outputs = tower(pixel_values, output_hidden_states=True, compression=compression)
    expected = slow_tower(tower, pixel_values, 4, compression.stages)
    torch.testing.assert_close(outputs.hidden_states[-2], expected, atol=1e-4, rtol=1e-4)
    first = int(kind != "siglip")
    lengths, length = [], 36
    for index in range(5):
        if index in compression.stages:
            length = compression.stages[index].num_kept + compression.stages[index].num_clusters
        lengths.append(length + first)
    assert [states.shape[1] for states in outputs.hidden_states[1:]] == lengths
    stage_lengths = [stage.num_kept + stage.num_clusters for stage in compression.stages.values()]
    assert [becomes.shape[1] for becomes in compression.trace] == [36, *stage_lengths[:-1]]


@pytest.mark.parametrize("kind", list(VISION_CONFIGS))
@pytest.mark.parametrize("feature_layer, layers", [(-2, [1, 2, 3]), (-1, [2, 3, 4])])
@torch.no_grad()
def test_without_training_the_last_blocks_that_run_keep_what_is_novel(kind, feature_layer, layers):
    tower = build_tower(kind)
    pixel_values = torch.randn(2, 3, 24, 24)
    config = tower_settings(tower, **TRAINING_FREE_VMTC)
    compression = compression_of_call(config, tower, pixel_values, feature_layer)
    assert list(compression.stages) == layers
    states = tower(pixel_values, output_hidden_states=True, compression=compression).hidden_states[layers[-1] + 1]
    expected, other = (
        slow_tower(tower, pixel_values, layers[-1] + 1, compression.stages, kept_tokens)
        for kept_tokens in ("importance_and_novelty", "importance")
    )
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, other, atol=1e-3)


@pytest.mark.parametrize("kind", list(VISION_CONFIGS))
@torch.no_grad()
def test_a_tower_that_is_not_asked_to_compress_is_the_stock_one(kind):
    tower = build_tower(kind)
    stock = AutoModel.from_config(tower.config).eval()
    stock.load_state_dict(tower.state_dict())
    pixel_values = torch.randn(2, 3, 24, 24)
    assert torch.equal(tower(pixel_values).last_hidden_state, stock(pixel_values).last_hidden_state)
    config = tower_settings(tower)
    tower(pixel_values, compression=compression_of_call(config, tower, pixel_values, -2))
    assert torch.equal(tower(pixel_values).last_hidden_state, stock(pixel_values).last_hidden_state)
    assert compression_of_call(config, tower, pixel_values, -2, num_visual_tokens=36) is None


@pytest.mark.parametrize("kind", list(VISION_CONFIGS))
@torch.no_grad()
def test_images_do_not_depend_on_the_batch_they_are_in(kind):
    tower = build_tower(kind)
    pixel_values = torch.randn(4, 3, 24, 24)
    config = tower_settings(tower)

    def features(pixels):
        return tower(pixels, compression=compression_of_call(config, tower, pixels, -2)).last_hidden_state

    alone = torch.cat([features(pixel_values[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(features(pixel_values), alone, atol=1e-5, rtol=1e-5)


def test_the_implementation_of_attention_can_be_changed_at_any_time():
    tower = build_tower("clip")
    pixel_values = torch.randn(1, 3, 24, 24)
    config = tower_settings(tower)
    outputs = []
    for implementation in ("sdpa", "eager", "sdpa"):
        tower.set_attn_implementation(implementation)
        compression = compression_of_call(config, tower, pixel_values, -2)
        outputs.append(tower(pixel_values, compression=compression).last_hidden_state)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs[0], outputs[2])


def test_another_implementation_of_attention_keeps_its_name():
    """Flash attention is told by its name; any other that makes no weights stands for it here."""
    AttentionInterface.register(
        "nameless_sdpa", lambda *args, compression=None, **kwargs: sdpa_attention_forward(*args, **kwargs)
    )
    AttentionMaskInterface.register("nameless_sdpa", sdpa_mask)
    tower = build_tower("clip")
    pixel_values = torch.randn(1, 3, 24, 24)
    config = tower_settings(tower)
    expected = tower(pixel_values, compression=compression_of_call(config, tower, pixel_values, -2)).last_hidden_state
    tower.config._attn_implementation = "nameless_sdpa"
    compression = compression_of_call(config, tower, pixel_values, -2)
    assert tower.config._attn_implementation == "nameless_sdpa"
    torch.testing.assert_close(
        tower(pixel_values, compression=compression).last_hidden_state, expected, atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_what_decides_is_float32_under_autocast():
    compression = TowerCompression({}, "normalized", has_class_token=True)
    states, query, key = torch.randn(2, 31, 8), torch.randn(2, 3, 31, 8), torch.randn(2, 3, 31, 8)
    row = compression.attention_row(query, key, 0.3)
    expected = compression(states, row, VmtcStage(10, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compression.attention_row(query, key, 0.3), row)
        assert torch.equal(compression(states, row, VmtcStage(10, 5)), expected)
    assert torch.equal(compression.trace[0], compression.trace[1])


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_tower_with_a_part_of_its_heads_is_refused(implementation):
    """As tensor parallel leaves it in each process. Each part would keep other patches."""
    tower = build_tower("clip", implementation)
    for block in blocks_of(tower):
        attention = block.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight.data, linear.bias.data = linear.weight.data[:8], linear.bias.data[:8]
        attention.out_proj.weight.data = attention.out_proj.weight.data[:, :8]
    pixel_values = torch.randn(1, 3, 24, 24)
    compression = compression_of_call(tower_settings(tower), tower, pixel_values, -2)
    with pytest.raises(ValueError, match="needs all 3 heads of the vision tower, but this process has 1"):
        tower(pixel_values, compression=compression)


@pytest.mark.parametrize("kind", list(VISION_CONFIGS))
def test_gradients_reach_all_blocks_also_with_checkpointing(kind):
    gradients = []
    for checkpointing in (False, True):
        tower = build_tower(kind)
        tower.train()
        for module in tower.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        if checkpointing:
            tower.gradient_checkpointing_enable({"use_reentrant": False})
        pixel_values = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
        compression = compression_of_call(tower_settings(tower), tower, pixel_values, -1)
        tower(pixel_values, compression=compression).last_hidden_state.square().mean().backward()
        blocks = tower.encoder.layer if hasattr(tower.encoder, "layer") else tower.encoder.layers
        gradients.append({name: p.grad.clone() for name, p in blocks.named_parameters()})
        assert all(gradient.abs().sum() > 0 for name, gradient in gradients[-1].items() if "k_proj.bias" not in name)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_blocks_survive_copying_and_pickling():
    tower = build_tower("clip")
    pixel_values = torch.randn(1, 3, 24, 24)
    compression = compression_of_call(tower_settings(tower), tower, pixel_values, -2)
    expected = tower(pixel_values, compression=compression).last_hidden_state
    for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert torch.equal(other(pixel_values, compression=compression).last_hidden_state, expected)
        assert type(other.encoder.layers[0]).__name__ == "CLIPEncoderLayer"


def test_what_a_tower_cannot_do_is_refused():
    tower = build_tower("clip")
    config = tower_settings(tower)
    pixel_values = torch.randn(1, 3, 24, 24)
    with pytest.raises(ValueError, match=r"one `vision_feature_layer`, got \[-2, -3\]"):
        compression_of_call(config, tower, pixel_values, [-2, -3])
    with pytest.raises(ValueError, match="`vision_feature_layer` is -6, but the vision tower has 5 blocks"):
        compression_of_call(config, tower, pixel_values, -6)
    with pytest.raises(ValueError, match="The budget is 9 visual tokens, but an image has 4 patches"):
        compression_of_call(config, tower, torch.randn(1, 3, 8, 8), -2)
    pixtral = AutoModel.from_config(PixtralVisionConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3))
    make_compressible(pixtral)
    with pytest.raises(ValueError, match="does not know the blocks of PixtralVisionModel"):
        compression_of_call(config, pixtral, pixel_values, -2)
    registers = AutoModel.from_config(
        Dinov2WithRegistersConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=24, patch_size=4
        )
    )
    with pytest.raises(ValueError, match="CLIP, SigLIP and DINOv2 without registers"):
        compression_of_call(config, registers, pixel_values, -2)


# --- in TA-LLaVA ---------------------------------------------------------------------------------------------------


def test_the_tower_of_ta_llava_compresses_too(tmp_path):
    model = build_model(use_vmtc=True, vmtc_num_visual_tokens=4, vmtc_num_stages=2)
    images = random_images(2)
    features = model.get_image_features(images)
    assert [tokens.shape for tokens in features.pooler_output] == [(4, 32)] * 2
    expected = slow_tower(model.model.vision_tower, images.flatten(0, 1), 2, {}).shape
    assert expected[1] == 10
    model.save_pretrained(tmp_path)
    loaded = TaLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.vmtc_num_visual_tokens == 4
    torch.testing.assert_close(loaded.get_image_features(images).pooler_output, features.pooler_output)
    loaded.set_visual_budget(2)
    assert loaded.get_image_features(images).pooler_output[0].shape == (2, 32)
    with pytest.raises(ValueError, match="must be a whole number from 1, got 0"):
        loaded.set_visual_budget(0)


def test_ta_llava_compresses_nothing_by_default():
    assert build_config().use_vmtc is False
    assert isinstance(build_config(), VmtcConfig)
    with pytest.raises(Exception, match="(?s)vmtc_keep_ratio.*must be above 0"):
        TaLlavaConfig(vmtc_keep_ratio=0.0)
