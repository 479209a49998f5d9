"""Every language model and every vision tower that the README names, as small models and at their published sizes."""

import copy
import itertools

import pytest
import torch
from conftest import (
    IMAGE,
    MODEL,
    NUM_PREFIX_TOKENS,
    PAD,
    TURN,
    batch_of,
    make_lively,
    prompt_ids,
    random_images,
    text_config,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DynamicCache,
    Gemma2Config,
    LlamaConfig,
    Qwen2Config,
    SiglipVisionConfig,
    StaticCache,
)

from ta_llava import TaLlavaConfig, TaLlavaForConditionalGeneration
from ta_llava.analysis.cost import clip_large, full_size_config
from ta_llava.prefix_adapters import signed_rotary
from ta_llava.vision_towers import blocks_of


TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
HEAD_DIM = 12  # four heads of it are wider than the model
THETA = 700.0  # rotary base of layer 0
WINDOWED_FROM_LAYER_3 = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}

# What `conftest.text_config` does not set: a rotary base of their own, and capping and windows that the tests can feel.
LANGUAGE_MODELS = {
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": THETA},
            "full_attention": {"rope_type": "default", "rope_theta": 90_000.0},
        }
    },
    "llama": {},
    "mistral": {},
    "qwen2": WINDOWED_FROM_LAYER_3,
    "qwen3": WINDOWED_FROM_LAYER_3,
}
TOWERS = {
    "clip": (CLIPVisionConfig, {"intermediate_size": 32}),
    "siglip": (SiglipVisionConfig, {"intermediate_size": 32}),
    "dinov2": (Dinov2Config, {"mlp_ratio": 2}),
}
REGISTERS = (Dinov2WithRegistersConfig, {"mlp_ratio": 2, "num_register_tokens": 2})


def build_model(language_model: str = "llama", tower: str = "clip", **kwargs) -> TaLlavaForConditionalGeneration:
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}, **LANGUAGE_MODELS[language_model]}
    tower_class, vision = {**TOWERS, "dinov2_with_registers": REGISTERS}[tower]
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 12, "patch_size": 4}
    config = TaLlavaConfig(
        vision_config=tower_class(**sizes, **vision),
        text_config=text_config(language_model, head_dim=HEAD_DIM, **text),
        num_prefix_tokens=NUM_PREFIX_TOKENS,
        image_token_id=IMAGE,
        response_marker_ids=[TURN, MODEL],
        **kwargs,
    )
    torch.manual_seed(0)
    return make_lively(TaLlavaForConditionalGeneration(config)).eval()


PAIRS = [*((name, "clip") for name in LANGUAGE_MODELS), *(("llama", name) for name in TOWERS if name != "clip")]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def model(request) -> TaLlavaForConditionalGeneration:
    """Every language model with CLIP, every other tower with Llama; tests that change it make a copy."""
    return build_model(*request.param)


@pytest.fixture(scope="module", params=LANGUAGE_MODELS)
def language_model(request) -> TaLlavaForConditionalGeneration:
    return build_model(request.param)


def mixed_batch(side: str = "left", response: int = 0) -> dict[str, torch.Tensor]:
    """Rows of several lengths, with two images, one and none; filler that must never be looked at."""
    rows = [
        prompt_ids(5, 1, response=response),
        prompt_ids(9, 2, response=response),
        prompt_ids(14, 3, image=False, response=response),
    ]
    image_mask = torch.tensor([[1, 1], [1, 0], [0, 0]])
    images = random_images(3, 2).masked_fill(image_mask[:, :, None, None, None] == 0, torch.nan)
    return {**batch_of(rows, side), "pixel_values": images, "image_mask": image_mask}


# --- the form of the adapters --------------------------------------------------------------------------------------


def leaves(module: nn.Module) -> dict[str, str]:
    """Names and printed forms (class, sizes, epsilon, bias) of the modules that have no parts."""
    return {
        name: repr(part)
        for name, part in module.named_modules()
        if not any(part.children()) and not isinstance(part, nn.Identity)
    }


@torch.no_grad()
@pytest.mark.parametrize("adapter_name", ["text_adapter", "vision_adapter"])
def test_an_adapter_is_a_layer_of_the_backbone(language_model, adapter_name):
    """The same parts; and with the same weights, an adapter that reads its own input is the layer without causal mask."""
    base, config = language_model.model, language_model.config.text_config
    layer = make_lively(AutoModel.from_config(config).layers[0], seed=3).eval()
    adapter = copy.deepcopy(getattr(base, adapter_name))

    def adapter_name_of(name: str) -> str:
        name = name.replace("self_attn.", "cross_attn.")
        has_four_norms = hasattr(layer, "pre_feedforward_layernorm")
        return name if has_four_norms else name.replace("post_attention_layernorm", "pre_feedforward_layernorm")

    assert leaves(adapter) == {adapter_name_of(name): form for name, form in leaves(layer).items()}
    adapter.load_state_dict({adapter_name_of(name): value for name, value in layer.state_dict().items()})

    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    cos, sin = base.language_model.rotary_emb(states, torch.arange(5)[None], **base.rotary_kwargs)
    expected = layer(states, position_embeddings=(cos, sin), attention_mask=torch.zeros(2, 1, 5, 5))
    rotary = signed_rotary(cos, sin)
    key, value = adapter("project", states, *rotary)
    mask = torch.zeros(2, 1, 1, 5)
    torch.testing.assert_close(adapter("read", states, key, value, mask, *rotary), expected, **TOLERANCE)


@torch.no_grad()
def test_adapters_rotate_by_the_base_of_layer_0(language_model):
    """Prefix, image and instruction each count from 0, whatever the padding. Gemma-3's other layers have another base."""
    base, batch = language_model.model, mixed_batch()
    length = batch["input_ids"].shape[1]
    num_instruction_tokens = torch.tensor([5, 9, 14]) + 2  # BOS, words, and the marker but its last token
    sources = {
        "text_adapter": torch.arange(length) >= length - 1 - num_instruction_tokens[:, None],
        "vision_adapter": batch["image_mask"].bool().repeat_interleave(9, dim=1),
    }
    sources["text_adapter"][:, -1] = False
    prefix = torch.ones(1, NUM_PREFIX_TOKENS, dtype=torch.bool)
    frequencies = THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)

    calls = []
    hooks = [
        getattr(base, name).register_forward_pre_hook(
            lambda module, args, name=name: calls.append((name, args[0] == "read", *args[-2:]))
        )
        for name in sources
    ]
    language_model(**batch)
    for hook in hooks:
        hook.remove()
    assert {call[:2] for call in calls} == set(itertools.product(sources, (False, True)))
    for name, is_prefix, cos, sin in calls:
        tokens = prefix if is_prefix else sources[name]
        positions = torch.cat([torch.arange(count) for count in tokens.sum(dim=-1)])
        angles = (positions[:, None] * frequencies).repeat(1, 2)
        torch.testing.assert_close(cos[tokens], angles.cos(), **TOLERANCE)
        sign = torch.tensor([-1.0, 1.0]).repeat_interleave(HEAD_DIM // 2)
        torch.testing.assert_close(sin[tokens], sign * angles.sin(), **TOLERANCE)


@torch.no_grad()
def test_the_prefix_is_scaled_as_words_are(language_model):
    """Gemma multiplies its embeddings by sqrt(d); others do not."""
    model = copy.deepcopy(language_model)
    words = torch.tensor([[20, 21, 22]])
    model.model.prefix_embedding.weight.copy_(model.get_input_embeddings().weight[words[0]])
    ids, images = torch.tensor([prompt_ids()]), random_images(1)
    states = model(input_ids=ids, pixel_values=images, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(states[:, :NUM_PREFIX_TOKENS], model.get_input_embeddings()(words))


# --- the tower -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tower", TOWERS)
def test_visual_tokens_are_the_patches_of_the_tower(tower):
    """All patches, without the class token where there is one; SigLIP has none to drop."""
    model = build_model(tower=tower, vmtc_num_stages=2)
    alone = AutoModel.from_config(model.config.vision_config).eval()
    alone.load_state_dict(model.model.vision_tower.state_dict())
    images = random_images(2)[:, 0]
    patches = alone(images, output_hidden_states=True).hidden_states[-2][:, -9:]
    assert torch.equal(model.get_vision_features(images), patches)
    model.set_visual_budget(4)
    assert model.get_vision_features(images).shape == (2, 4, 24)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-4, -2, -1, 0, 3])
@pytest.mark.parametrize("tower", [*TOWERS, "dinov2_with_registers"])
def test_features_are_the_hidden_state_that_the_config_names(tower, layer):
    """Also of a tower whose blocks are not known, all of which run."""
    model = build_model(tower=tower, vision_feature_layer=layer, vision_feature_select_strategy="full")
    images = random_images(2)[:, 0]
    states = model.model.vision_tower(images, output_hidden_states=True).hidden_states
    assert torch.equal(model.get_vision_features(images), states[layer])


@torch.no_grad()
@pytest.mark.parametrize("tower", TOWERS)
def test_only_blocks_that_are_needed_run_but_all_states_can_be_had(tower):
    model, images, runs = build_model(tower=tower), random_images(2)[:, 0], []
    for index, block in enumerate(blocks_of(model.model.vision_tower)):
        block.mlp.register_forward_hook(lambda *_, index=index: runs.append(index))
    features = model.get_vision_features(images)
    assert runs == [0, 1]
    outputs = model.get_image_features(images)
    assert runs == [0, 1, 0, 1, 2] and [states.shape[-1] for states in outputs.hidden_states] == [24] * 4
    assert torch.equal(outputs.hidden_states[-2][:, -9:], features)


# --- the model -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_prefix_reads_image_and_instruction_and_never_the_response(model):
    """Another response: after every layer, all states before it are the same to the bit."""
    ids, images = torch.tensor([prompt_ids(6, response=12)]), random_images(1)
    response_start = ids.shape[1] - 12
    other_response, other_question = ids.clone(), ids.clone()
    other_response[0, -12:] = torch.tensor([*range(20, 28), TURN, MODEL, IMAGE, 28])
    other_question[0, NUM_PREFIX_TOKENS + 2] = 33

    def states(input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        output = model(input_ids=input_ids, pixel_values=pixel_values, output_hidden_states=True)
        return torch.stack(output.hidden_states)

    before = states(ids, images)
    after = states(other_response, images)
    assert torch.equal(after[:, :, :response_start], before[:, :, :response_start])
    assert not torch.allclose(after[:, :, response_start:], before[:, :, response_start:], atol=0.1)
    for changed in (states(other_question, images), states(ids, random_images(1, seed=9))):
        difference = (changed - before)[:, 0, :NUM_PREFIX_TOKENS].abs().amax(dim=(1, 2))
        assert difference[0] == 0 and difference[-1] > 0.01


@torch.no_grad()
def test_encoded_images_stand_for_pixels(model):
    batch = mixed_batch(response=3)
    expected, real = model(**batch).logits, batch["attention_mask"].bool()
    encoded = model.encode_image(batch.pop("pixel_values"), batch.pop("image_mask"))
    torch.testing.assert_close(model(**batch, encoded_images=encoded).logits[real], expected[real], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_rows(model, side):
    batch = mixed_batch(side, response=3)
    logits = model(**batch).logits
    for row in range(3):
        kept, count = batch["attention_mask"][row].bool(), int(batch["image_mask"][row].sum())
        alone = {"pixel_values": batch["pixel_values"][row : row + 1, :count]} if count else {}
        expected = model(input_ids=batch["input_ids"][row, kept][None], **alone).logits[0]
        torch.testing.assert_close(logits[row, kept], expected, **TOLERANCE)


@torch.no_grad()
def test_text_is_the_language_model_alone(model):
    """To the bit for a batch of text, and next to rows with images as near as batching allows."""
    language_model = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    language_model.model.load_state_dict(model.model.language_model.state_dict())
    language_model.lm_head.load_state_dict(model.lm_head.state_dict())
    text = batch_of([prompt_ids(14, 1, image=False), prompt_ids(6, 2, image=False, response=4)])
    assert torch.equal(model(**text).logits, language_model(**text).logits)

    batch = mixed_batch(response=3)
    real = batch["attention_mask"][2].bool()
    expected = language_model(batch["input_ids"][2, real][None]).logits[0]
    torch.testing.assert_close(model(**batch).logits[2, real], expected, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_cached_is_uncached(model, cache_class):
    """The prompt, then a response in pieces; both are longer than the windows of the models that have one."""
    config = model.config.text_config
    batch = mixed_batch(response=14)
    assert (getattr(config, "sliding_window", None) or 0) < 14
    expected = model(**batch, use_cache=False).logits
    cache = StaticCache(config, max_cache_len=64) if cache_class is StaticCache else DynamicCache(config=config)
    length = batch["input_ids"].shape[1]
    for start, end in itertools.pairwise([0, *range(length - 14, length - 11), length - 3, length - 1, length]):
        piece = {"input_ids": batch["input_ids"][:, start:end], "attention_mask": batch["attention_mask"][:, :end]}
        output = model(**{**batch, **piece}, past_key_values=cache, use_cache=True)
        real = batch["attention_mask"][:, start:end].bool()
        torch.testing.assert_close(output.logits[real], expected[:, start:end][real], **TOLERANCE)


def test_generated_text_does_not_depend_on_the_cache(model):
    """Drawn, not the likeliest: small models repeat one token for ever."""
    outputs = []
    for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.manual_seed(0)
        options = {
            "max_new_tokens": 14,
            "do_sample": True,
            "temperature": 6.0,
            "eos_token_id": None,
            "pad_token_id": PAD,
        }
        outputs.append(model.generate(**mixed_batch(), **options, **cache, disable_compile=True))
    assert len(outputs[0][:, -14:].unique()) > 10
    assert all(torch.equal(output, outputs[0]) for output in outputs[1:])


def test_saved_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = TaLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    with torch.no_grad():
        real = mixed_batch()["attention_mask"].bool()
        assert torch.equal(loaded.eval()(**mixed_batch()).logits[real], model(**mixed_batch()).logits[real])


def gradients(model, checkpointing: bool) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Gradients by parameter, and how often the MLPs of a layer, an adapter and a block of the tower ran."""
    model = copy.deepcopy(model).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    base, calls = model.model, {}
    encoder = base.vision_tower.encoder
    parts = {
        "layer": base.language_model.layers[0].mlp,
        "adapter": base.text_adapter.mlp,
        "block": (encoder.layers if hasattr(encoder, "layers") else encoder.layer)[0].mlp,
    }
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: calls.__setitem__(name, calls.get(name, 0) + 1))
    batch = mixed_batch(response=4)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels, use_cache=False).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}, calls


def test_gradients_reach_every_part_with_and_without_checkpointing(model):
    (plain, calls), (checkpointed, more_calls) = gradients(model, False), gradients(model, True)
    assert more_calls == {name: 2 * count for name, count in calls.items()}  # each ran again, backwards
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.isfinite(gradient).all(), name
        torch.testing.assert_close(checkpointed[name], gradient, **TOLERANCE)
        # In towers, a bias of keys moves all scores of a query alike.
        assert gradient.abs().max() > 0 or name.endswith("k_proj.bias"), name
    after_features = (
        "encoder.layers.2.",
        "encoder.layer.2.",
        "post_layernorm",
        "tower.layernorm",
        "tower.head",
        "mask_token",
    )
    unused = {name for name, _ in model.named_parameters()} - plain.keys()
    assert all(any(part in name for part in after_features) for name in unused), unused


# --- published sizes -----------------------------------------------------------------------------------------------


def llama(rope_theta: float, **sizes) -> LlamaConfig:
    return LlamaConfig(rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, **sizes)


# With the parameters that these models are published with; a head that is the embedding table counts once.
PUBLISHED = {
    "Gemma-2-2B": (full_size_config("ta-llava-gemma-2-2b").text_config, 2_614_341_888),
    "Gemma-2-9B": (
        Gemma2Config(
            hidden_size=3584,
            intermediate_size=14336,
            num_hidden_layers=42,
            num_attention_heads=16,
            num_key_value_heads=8,
        ),
        9_241_705_984,
    ),
    "Vicuna-7B": (
        llama(
            rope_theta=10_000.0,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            vocab_size=32000,
            max_position_embeddings=4096,
        ),
        6_738_415_616,
    ),
    "Qwen2.5-7B": (
        Qwen2Config(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        ),
        7_615_616_512,
    ),
    "SmolLM2-135M": (
        llama(
            rope_theta=100_000.0,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
        134_515_008,
    ),
    "SmolLM2-1.7B": (
        llama(
            rope_theta=130_000.0,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=24,
            num_attention_heads=32,
            vocab_size=49152,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
        1_711_376_384,
    ),
}


def count_layer(config) -> int:
    """Parameters of a layer of a language model: query, key, value, output, the three matrices of the MLP, norms."""
    width, head_dim = config.hidden_size, getattr(config, "head_dim", None)
    head_dim = head_dim or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    biases = queries + 2 * keys if config.model_type == "qwen2" else 0
    norms = 4 if config.model_type == "gemma2" else 2
    return 2 * width * queries + 2 * width * keys + biases + 3 * width * config.intermediate_size + norms * width


def count_clip(config) -> int:
    """Parameters of CLIP's vision model: embeddings, blocks of attention, MLP and two norms, and the norms around."""
    width, mlp_width = config.hidden_size, config.intermediate_size
    patches = (config.image_size // config.patch_size) ** 2
    embeddings = width + 3 * config.patch_size**2 * width + (patches + 1) * width
    attention, mlp = 4 * (width * width + width), 2 * width * mlp_width + mlp_width + width
    return embeddings + 2 * width + config.num_hidden_layers * (attention + mlp + 4 * width) + 2 * width


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_at_published_sizes(name):
    """With CLIP ViT-L/14@336, on the meta device."""
    text, published = PUBLISHED[name]
    with torch.device("meta"):
        model = TaLlavaForConditionalGeneration(TaLlavaConfig(vision_config=clip_large(), text_config=text))
    base, vision, width = model.model, model.config.vision_config, text.hidden_size

    def count(*parts: nn.Module) -> int:
        return sum(parameter.numel() for parameter in {p for part in parts for p in part.parameters()})

    tables = 1 if text.tie_word_embeddings else 2
    assert count(base.language_model, model.lm_head) == published
    assert published == tables * text.vocab_size * width + text.num_hidden_layers * count_layer(text) + width
    assert count(base.text_adapter) == count(base.vision_adapter) == count_layer(text)
    assert count(base.vision_tower) == count_clip(vision)
    added = count_clip(vision) + (vision.hidden_size + 1) * width + 32 * width + 2 * count_layer(text)
    assert count(model) == published + added
