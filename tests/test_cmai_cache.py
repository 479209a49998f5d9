"""The cache of CMAI: its state follows every operation on the cache."""

import copy

import pytest
import torch
from conftest import IMAGE, build_llava, llava_inputs, llava_prompt
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer, StaticLayer

from ta_llava.cmai_cache import prepare_cache


PROMPTS = [llava_prompt(length=7, seed=1), llava_prompt(length=5, seed=2), llava_prompt(length=9, seed=3, images=2)]
NEXT = torch.randint(10, 60, (3, 4), generator=torch.Generator().manual_seed(5))


def make_cache(model, kind):
    return StaticCache(model.config.text_config, max_cache_len=48) if kind == "static" else DynamicCache()


def filled_cache(model, kind, prompts=PROMPTS):
    """A cache after a batch of prompts, and their inputs."""
    inputs = llava_inputs(prompts)
    cache = make_cache(model, kind)
    model(**inputs, past_key_values=cache)
    return cache, inputs


def logits_after(model, cache, inputs, next_tokens):
    """Logits of `next_tokens` `(B, t)`, one after the other."""
    mask, outputs = inputs["attention_mask"], []
    for token in next_tokens.T:
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], dim=1)
        outputs.append(model(input_ids=token[:, None], attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(outputs, dim=1)


def logits_without_cache(model, inputs, next_tokens):
    ids = torch.cat([inputs["input_ids"], next_tokens], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(next_tokens)], dim=1)
    outputs = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"], use_cache=False)
    return outputs.logits[:, -next_tokens.shape[1] :]


def select_rows(inputs, rows, num_images):
    """The inputs of some rows; `num_images` of each row of `inputs`."""
    pixels = inputs["pixel_values"].split(num_images)
    return {
        "input_ids": inputs["input_ids"][rows],
        "attention_mask": inputs["attention_mask"][rows],
        "pixel_values": torch.cat([pixels[row] for row in rows]),
    }


def reorder(cache):
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    return [2, 0, 2]


def select(cache):
    cache.batch_select_indices(torch.tensor([2, 1]))
    return [2, 1]


def repeat(cache):
    cache.batch_repeat_interleave(2)
    return [0, 0, 1, 1, 2, 2]


def offload(cache):
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    return [0, 1, 2]


@pytest.mark.parametrize("backbone", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "kind, operation",
    [
        ("dynamic", reorder),
        ("static", reorder),
        ("dynamic", select),
        ("dynamic", repeat),
        ("dynamic", offload),
        ("static", offload),
    ],
)
@torch.no_grad()
def test_the_state_follows_the_batch(backbone, kind, operation):
    model = build_llava(backbone)
    cache, inputs = filled_cache(model, kind)
    rows = operation(cache)
    inputs = select_rows(inputs, rows, [1, 1, 2])
    next_tokens = NEXT[rows]
    actual = logits_after(model, cache, inputs, next_tokens)
    torch.testing.assert_close(actual, logits_without_cache(model, inputs, next_tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("backbone", ["llama", "qwen3"])
@pytest.mark.parametrize("cropped", [1, 3, 6])
@torch.no_grad()
def test_a_cropped_cache_goes_on_as_if_the_rest_had_never_been(backbone, cropped, kind):
    """Cropped by what came after the prompt, and into the prompt."""
    if kind == "static" and not getattr(StaticLayer, "is_croppable", False):
        pytest.skip("this version of the library has no static caches that can be cropped")
    model = build_llava(backbone)
    inputs = llava_inputs(PROMPTS[:1])
    cache = make_cache(model, kind)
    ids = torch.cat([inputs["input_ids"], torch.randint(10, 60, (1, 3))], dim=1)
    model(input_ids=ids, pixel_values=inputs["pixel_values"], past_key_values=cache)
    other = torch.randint(10, 60, (1, 2))
    model(input_ids=other, past_key_values=cache)
    cache.crop(-cropped)
    ids = torch.cat([ids, other], dim=1)[:, :-cropped]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]}
    actual = logits_after(model, cache, inputs, NEXT[:1])
    torch.testing.assert_close(actual, logits_without_cache(model, inputs, NEXT[:1]), atol=1e-4, rtol=1e-4)
    if kind == "dynamic":
        assert cache.layers[1].text_to_image.shape[1] == cache.layers[0].text_columns.shape[1]


@torch.no_grad()
def test_a_cache_cropped_into_the_image_takes_another_image():
    model = build_llava("llama")
    first, second = llava_inputs(PROMPTS[:1], seed=1), llava_inputs([llava_prompt(length=6, seed=8)], seed=2)
    second["input_ids"][0, :2] = first["input_ids"][0, :2]
    cache = DynamicCache()
    model(**first, past_key_values=cache)
    cache.crop(-(first["input_ids"].shape[1] - 1))  # what is left is the first token
    rest = {**second, "input_ids": second["input_ids"][:, 1:]}
    actual = model(**rest, past_key_values=cache).logits
    torch.testing.assert_close(actual, model(**second).logits[:, 1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backbone", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_a_reset_cache_is_as_new(backbone, kind):
    model = build_llava(backbone)
    cache, _ = filled_cache(model, kind)
    cache.reset()
    prompts = [
        llava_prompt(length=4, seed=11, images=2),
        llava_prompt(length=9, seed=12),
        llava_prompt(length=3, seed=13),
    ]
    inputs = llava_inputs(prompts, seed=9)
    model(**inputs, past_key_values=cache)
    actual = logits_after(model, cache, inputs, NEXT)
    torch.testing.assert_close(actual, logits_without_cache(model, inputs, NEXT), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_a_reset_cache_has_forgotten_a_prompt_of_the_same_shape(kind):
    model = build_llava("llama")
    cache, _ = filled_cache(model, kind)
    logits_after(model, cache, llava_inputs(PROMPTS), NEXT)
    cache.reset()
    inputs = llava_inputs([[*row[:-3], *reversed(row[-3:])] for row in PROMPTS], seed=9)
    model(**inputs, past_key_values=cache)
    actual = logits_after(model, cache, inputs, NEXT)
    torch.testing.assert_close(actual, logits_without_cache(model, inputs, NEXT), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backbone", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_a_later_turn_may_bring_an_image(backbone, kind):
    model = build_llava(backbone)
    cache, inputs = filled_cache(model, kind, PROMPTS[:1])
    turn = llava_inputs([llava_prompt(length=4, seed=21)], seed=5)
    model(input_ids=turn["input_ids"], pixel_values=turn["pixel_values"], past_key_values=cache)
    inputs = {
        "input_ids": torch.cat([inputs["input_ids"], turn["input_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], turn["attention_mask"]], dim=1),
        "pixel_values": torch.cat([inputs["pixel_values"], turn["pixel_values"]]),
    }
    actual = logits_after(model, cache, inputs, NEXT[:1])
    torch.testing.assert_close(actual, logits_without_cache(model, inputs, NEXT[:1]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_cache_may_be_cropped_again_and_further():
    model = build_llava("llama")
    cache, inputs = filled_cache(model, "dynamic", PROMPTS[:1])
    logits_after(model, cache, inputs, NEXT[:1])
    cache.crop(-3)
    cache.crop(-4)  # one that came later, three of the prompt
    ids = inputs["input_ids"][:, :-3]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]}
    actual = logits_after(model, cache, inputs, NEXT[:1])
    torch.testing.assert_close(actual, logits_without_cache(model, inputs, NEXT[:1]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_copied_cache_goes_its_own_way():
    model = build_llava("llama")
    cache, inputs = filled_cache(model, "dynamic")
    other = copy.deepcopy(cache)
    expected = logits_after(model, cache, inputs, NEXT)
    assert torch.equal(logits_after(model, other, inputs, NEXT), expected)


@torch.no_grad()
def test_the_cache_holds_one_number_per_text_and_image_token():
    model = build_llava("llama")
    cache, inputs = filled_cache(model, "dynamic", PROMPTS[:1])
    is_image = inputs["input_ids"][0] == IMAGE
    num_images = int(is_image.sum())
    num_texts = len(is_image) - int(is_image.nonzero().amax()) - 1  # of the text, what stands after the image
    assert cache.layers[0].text_to_image is None  # nothing is inhibited there
    assert all(layer.text_to_image.shape == (1, num_texts, num_images) for layer in cache.layers[1:])
    assert cache.layers[1].keys.shape[2] == inputs["input_ids"].shape[1]
    logits_after(model, cache, inputs, NEXT[:1])
    assert cache.layers[1].text_to_image.shape == (1, num_texts + 4, num_images)


@torch.no_grad()
def test_a_cache_filled_without_cmai_is_refused():
    model = build_llava("llama", use_cmai=False)
    cache, _ = filled_cache(model, "dynamic")
    model.config.use_cmai = True
    with pytest.raises(ValueError, match="The cache holds .* columns that were computed without CMAI"):
        model(input_ids=NEXT[:, :1], past_key_values=cache)


def test_caches_of_an_unknown_kind_are_refused():
    class OtherLayer(QuantizedLayer):
        def _quantize(self, tensor, axis):
            return tensor

        def _dequantize(self, tensor):
            return tensor

    model = build_llava("llama")
    cache = DynamicCache()
    cache.layers = [OtherLayer() for _ in range(4)]
    with pytest.raises(ValueError, match="CMAI does not support caches with a OtherLayer, only with DynamicLayer"):
        prepare_cache(cache, model.config.text_config)


@torch.no_grad()
def test_a_cache_filled_in_inference_mode_goes_on_outside():
    model = build_llava("llama")
    with torch.inference_mode():
        cache, _ = filled_cache(model, "dynamic", PROMPTS[:1])
        model(input_ids=NEXT[:1, :1], past_key_values=cache)
    inside = copy.deepcopy(cache)
    outside = model(input_ids=NEXT[:1, 1:2], past_key_values=cache).logits
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=NEXT[:1, 1:2], past_key_values=inside).logits, outside)
