import copy
import itertools
import json
import pickle

import pytest
import torch
from conftest import (
    BOS,
    FIXTURES,
    IMAGE,
    MODEL,
    NUM_PREFIX_TOKENS,
    PAD,
    TURN,
    batch_of,
    build_config,
    build_model,
    make_lively,
    prompt_ids,
    random_images,
    random_tokens,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionModel, DynamicCache, StaticCache

from ta_llava import TaLlavaForConditionalGeneration, TaLlavaModel, modeling_ta_llava
from ta_llava.modeling_ta_llava import find_instruction_end


TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def row_inputs(seed: int = 0, length: int = 6, response: int = 0, images: int = 1) -> dict[str, torch.Tensor]:
    ids = prompt_ids(length, seed, response=response)
    return {"input_ids": torch.tensor([ids]), "pixel_values": random_images(1, images, seed)}


# --- the maths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["first", "last"])
@pytest.mark.parametrize("marker", [[4], [3, 4], [3, 3, 4]])
def test_find_instruction_end_against_a_plain_search(scope, marker):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 6, (200, 9), generator=generator)
    matches = torch.stack([ids == token for token in marker])
    expected = []
    for row in ids.tolist():
        starts = [start for start in range(len(row)) if row[start : start + len(marker)] == marker]
        start = None if not starts else starts[0] if scope == "first" else starts[-1]
        expected.append(len(row) if start is None else start + len(marker) - 1)
    assert find_instruction_end(matches, scope).tolist() == expected
    assert 9 in expected and len(set(expected)) > 3


def test_find_instruction_end_in_a_text_shorter_than_the_marker():
    assert find_instruction_end(torch.ones(3, 2, 2, dtype=torch.bool), "first").tolist() == [2, 2]


def test_a_mask_of_images_of_another_shape_is_refused(model):
    with pytest.raises(ValueError, match=r"`image_mask` has shape \(1,\)"):
        model(**row_inputs(response=1, images=1), image_mask=torch.ones(1))


def reference_prefix(model, ids: list[int], images: torch.Tensor) -> list[torch.Tensor]:
    """
    Algorithm 1 of the paper for one unpadded row, step by step: the prefix `(L, d)` after each layer, from the parts of
    the library's own language model.
    """
    base, lm = model.model, model.model.language_model
    prefix_length, interval = base.config.num_prefix_tokens, base.config.adapter_interval
    gemma = lm.config.model_type == "gemma2"
    text = torch.tensor([ids[prefix_length:]])
    marker = base.config.response_marker_ids
    starts = [i for i in range(text.shape[1]) if text[0, i : i + len(marker)].tolist() == marker]
    end = starts[0] + len(marker) - 1 if starts else text.shape[1]

    tower = base.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    visual = base.multi_modal_projector(tower).flatten(0, 1)
    prefix = base.prefix_embedding.weight * (lm.config.hidden_size**0.5 if gemma else 1)
    states = torch.cat([prefix, lm.embed_tokens(text)[0]])
    length = len(states)

    def block(adapter, prefix, source):
        attention = adapter.cross_attn
        heads, kv_heads, width = lm.config.num_attention_heads, lm.config.num_key_value_heads, lm.config.head_dim

        def rotate(vectors):  # (length, heads, width), positions 0, 1, ...
            cos, sin = lm.rotary_emb(vectors, torch.arange(len(vectors))[None])
            half = torch.cat([-vectors[..., width // 2 :], vectors[..., : width // 2]], dim=-1)
            return vectors * cos[0][:, None] + half * sin[0][:, None]

        normed, keys = adapter.input_layernorm(prefix), adapter.input_layernorm(source)
        query = rotate(attention.q_proj(normed).view(-1, heads, width))
        key = rotate(attention.k_proj(keys).view(-1, kv_heads, width))
        value = attention.v_proj(keys).view(-1, kv_heads, width)
        outputs = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = query[:, head] @ key[:, group].T * width**-0.5
            scores = 50 * torch.tanh(scores / 50) if gemma else scores
            outputs.append(torch.softmax(scores, dim=-1) @ value[:, group])
        attended = attention.o_proj(torch.cat(outputs, dim=-1))
        prefix = prefix + adapter.post_attention_layernorm(attended)
        fed = adapter.mlp(adapter.pre_feedforward_layernorm(prefix))
        return prefix + adapter.post_feedforward_layernorm(fed)

    positions = torch.arange(length)
    distance = positions[:, None] - positions[None]
    rotary = lm.rotary_emb(states, positions[None])
    prefixes = []
    for index, layer in enumerate(lm.layers):
        window = lm.config.sliding_window if gemma and lm.config.layer_types[index] == "sliding_attention" else length
        allowed = (distance >= 0) & (distance < window)
        mask = torch.zeros(length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
        states = layer(states[None], attention_mask=mask, position_embeddings=rotary)[0]
        prefix, text_states = states[:prefix_length], states[prefix_length:]
        if index != len(lm.layers) - 1 and index % interval == 0:
            prefix = block(base.text_adapter, prefix, text_states[:end])
        if index != len(lm.layers) - 1 and index % interval == 1:
            prefix = block(base.vision_adapter, prefix, visual)
        states = torch.cat([prefix, text_states])
        prefixes.append(prefix)
    return prefixes


@torch.no_grad()
@pytest.mark.parametrize("num_images", [1, 2])
def test_prefix_after_each_layer_against_the_algorithm(model, num_images):
    inputs = row_inputs(response=4, length=9, images=num_images)
    output = model(**inputs, output_hidden_states=True)
    expected = reference_prefix(model, inputs["input_ids"][0].tolist(), inputs["pixel_values"][0])
    assert len(output.hidden_states) == len(expected) + 1
    for index, prefix in enumerate(expected[:-1]):  # the last hidden state comes after the final norm
        actual = output.hidden_states[index + 1][0, :NUM_PREFIX_TOKENS]
        torch.testing.assert_close(actual, prefix, **TOLERANCE)


@torch.no_grad()
def test_parity_with_the_original_code():
    """The fixture was written by the authors' code: logits, loss and the prefix after every layer agree."""
    folder = FIXTURES / "original_ta_llava"
    case = load_file(folder / "case_a.safetensors")
    from ta_llava.building.convert_original import convert_original

    model = convert_original(folder, folder / "tiny-clip").eval()
    last_layer_output = []
    hook = model.model.language_model.layers[-1].register_forward_hook(
        lambda module, args, output: last_layer_output.append(output)
    )
    placeholders = torch.full((2, 8), model.config.image_token_id)
    input_ids = torch.cat([placeholders, case["input_ids"]], dim=1)
    labels = torch.cat([torch.full((2, 8), -100), case["labels"]], dim=1)
    output = model(input_ids=input_ids, pixel_values=case["pixel_values"], labels=labels, output_hidden_states=True)
    hook.remove()
    states = [*output.hidden_states[1:-1], last_layer_output[0]]
    assert len(states) == 10
    torch.testing.assert_close(
        torch.stack(model.get_image_features(case["pixel_values"]).pooler_output), case["image_features"]
    )
    torch.testing.assert_close(output.logits[:, 8:], case["logits"], atol=2e-4, rtol=0)
    torch.testing.assert_close(output.loss[None], case["loss"], atol=2e-4, rtol=0)
    for index, state in enumerate(states):
        torch.testing.assert_close(state[:, :8], case[f"prefix_after_layer.{index}"], atol=2e-4, rtol=0)


# --- instruction and response --------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_response_does_not_leak_into_the_prefix(model):
    """Another response of the same length: prefix and all logits before it are the same to the bit."""
    inputs = row_inputs(response=5)
    other = copy.deepcopy(inputs)
    other["input_ids"][0, -5:] = torch.tensor([11, 12, TURN, MODEL, 13])  # a second marker does not matter either
    first, second = (model(**given, output_hidden_states=True) for given in (inputs, other))
    for one, two in zip(first.hidden_states, second.hidden_states):
        assert torch.equal(one[:, :-5], two[:, :-5])
    assert torch.equal(first.logits[:, :-5], second.logits[:, :-5])
    assert not torch.equal(first.logits[:, -5:], second.logits[:, -5:])


@torch.no_grad()
def test_the_prefix_reads_instruction_and_image(model):
    inputs = row_inputs()
    prefix = model(**inputs, output_hidden_states=True).hidden_states[-1][:, :NUM_PREFIX_TOKENS]
    other_question, other_image = copy.deepcopy(inputs), copy.deepcopy(inputs)
    other_question["input_ids"][0, NUM_PREFIX_TOKENS + 2] = 33
    other_image["pixel_values"] = random_images(1, seed=9)
    for other in (other_question, other_image):
        assert not torch.allclose(
            prefix, model(**other, output_hidden_states=True).hidden_states[-1][:, :NUM_PREFIX_TOKENS], atol=1e-3
        )


def prefix_of(model, ids: list[int]) -> torch.Tensor:
    output = model(input_ids=torch.tensor([ids]), pixel_values=random_images(1), output_hidden_states=True)
    return output.hidden_states[-1][:, :NUM_PREFIX_TOKENS]


@torch.no_grad()
def test_the_word_model_in_a_question_does_not_end_the_instruction():
    """With the marker of two ids what follows the bare word still counts; with the authors' one-id marker it does not."""
    question = [10, MODEL, 11, 12]
    ids = [IMAGE] * NUM_PREFIX_TOKENS + [BOS, *question, TURN, MODEL]
    changed = ids.copy()
    changed[NUM_PREFIX_TOKENS + 4] = 40  # the last word of the question
    model = build_model()
    assert not torch.equal(prefix_of(model, ids), prefix_of(model, changed))
    model = build_model(response_marker_ids=[MODEL])
    assert torch.equal(prefix_of(model, ids), prefix_of(model, changed))


@torch.no_grad()
def test_a_row_without_a_marker_is_all_instruction(model):
    ids = [IMAGE] * NUM_PREFIX_TOKENS + [BOS, 10, 11, 12, 13]
    changed = [*ids[:-1], 40]
    assert not torch.equal(prefix_of(model, ids), prefix_of(model, changed))


@torch.no_grad()
def test_instruction_scope_last_reads_up_to_the_last_marker():
    first_turn = [IMAGE] * NUM_PREFIX_TOKENS + [BOS, 10, 11, TURN, MODEL, 12, 13]
    ids = [*first_turn, 14, 15, TURN, MODEL, 16]
    other_second_question = [*first_turn, 14, 45, TURN, MODEL, 16]
    other_response = [*first_turn, 14, 15, TURN, MODEL, 46]
    for scope, second_question_matters in (("first", False), ("last", True)):
        model = build_model(instruction_scope=scope)
        assert torch.equal(prefix_of(model, ids), prefix_of(model, other_second_question)) != second_question_matters
        assert torch.equal(prefix_of(model, ids), prefix_of(model, other_response))


@torch.no_grad()
def test_text_only_rows_are_the_language_model_alone(model):
    """To the bit for a batch of text; next to rows with images, as near as batching allows."""
    language_model = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    language_model.model.load_state_dict(model.model.language_model.state_dict())
    language_model.lm_head.load_state_dict(model.lm_head.state_dict())
    text = prompt_ids(9, seed=3, image=False, response=2)
    expected = language_model(input_ids=torch.tensor([text])).logits
    assert torch.equal(model(input_ids=torch.tensor([text])).logits, expected)

    batch = batch_of([prompt_ids(4), text], side="right")
    output = model(**batch, pixel_values=random_images(2), image_mask=torch.tensor([[1], [0]]))
    torch.testing.assert_close(output.logits[1:, : len(text)], expected, **TOLERANCE)


# --- batches, padding, several images ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_rows(model, side):
    """Rows of other lengths, with no, one and two images: each row as if it were alone."""
    rows = [prompt_ids(5, 1, response=2), prompt_ids(11, 2, image=False), prompt_ids(8, 3)]
    images = [random_images(1, 1, 1), None, random_images(1, 2, 2)]
    pixel_values = torch.full((3, 2, 3, 12, 12), torch.nan)  # filler must never be looked at
    pixel_values[0, :1], pixel_values[2] = images[0][0], images[2][0]
    batch = batch_of(rows, side)
    image_mask = torch.tensor([[1, 0], [0, 0], [1, 1]])
    logits = model(**batch, pixel_values=pixel_values, image_mask=image_mask).logits
    for index, (row, pixels) in enumerate(zip(rows, images)):
        alone = model(input_ids=torch.tensor([row]), pixel_values=pixels).logits[0]
        together = logits[index, -len(row) :] if side == "left" else logits[index, : len(row)]
        torch.testing.assert_close(together, alone, **TOLERANCE)


@torch.no_grad()
def test_several_images_are_read_in_order_and_their_place_in_the_batch_does_not_matter(model):
    images = random_images(1, 3, 5)
    ids = torch.tensor([prompt_ids()])
    logits = model(input_ids=ids, pixel_values=images).logits
    swapped = model(input_ids=ids, pixel_values=images[:, [1, 0, 2]]).logits
    assert not torch.allclose(logits, swapped, atol=1e-4)
    spread = torch.zeros(1, 5, 3, 12, 12)
    spread[:, [0, 2, 4]] = images
    with_gaps = model(input_ids=ids, pixel_values=spread, image_mask=torch.tensor([[1, 0, 1, 0, 1]])).logits
    torch.testing.assert_close(with_gaps, logits, **TOLERANCE)


@torch.no_grad()
def test_all_views_of_a_large_picture_are_read_through_one_prefix(model):
    """As in `docs/ta_llava.md`, the whole picture and four tiles are the images of a row."""
    inputs = row_inputs(images=5)
    logits = model(**inputs).logits
    assert logits.shape[1] == inputs["input_ids"].shape[1] == row_inputs(images=1)["input_ids"].shape[1]
    for view in range(5):
        pixel_values = inputs["pixel_values"].clone()
        pixel_values[:, view] = random_images(1, 1, seed=9)[:, 0]
        changed = model(**{**inputs, "pixel_values": pixel_values}).logits
        assert (changed - logits)[:, -1].abs().max() > 1e-3
    generated = [
        model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    ]
    assert torch.equal(*generated)


@torch.no_grad()
def test_image_index_embeddings_tell_images_apart(model, tmp_path):
    """A trained model that is given them stays what it is; then they are what its checkpoint has."""
    model.save_pretrained(tmp_path)
    assert not any("image_index" in name for name in model.state_dict())
    given = {"num_image_index_embeddings": 3, "output_loading_info": True}
    indexed, info = TaLlavaForConditionalGeneration.from_pretrained(tmp_path, **given)
    assert set(info["missing_keys"]) == {"model.image_index_embedding.weight"} and not info["unexpected_keys"]
    weight = indexed.model.image_index_embedding.weight
    assert weight.shape == (3, 32) and not weight.any()

    batch = batch_of([prompt_ids(4, 1), prompt_ids(7, 2), prompt_ids(6, 3, image=False)])
    batch["pixel_values"], batch["image_mask"] = (
        random_images(3, 4),
        torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0] * 4]),
    )
    real = batch["attention_mask"].bool()
    expected = model(**batch)
    assert torch.equal(indexed(**batch).logits[real], expected.logits[real])

    weight.copy_(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)))
    output = indexed(**batch)
    added = (output.image_hidden_states - expected.image_hidden_states)[batch["image_mask"].bool()]
    of_image = weight[torch.tensor([0, 1, 2, 0])][:, None].expand_as(
        added
    )  # of its real images; filler does not count
    torch.testing.assert_close(added, of_image, **TOLERANCE)
    difference = (output.logits - expected.logits).abs().amax(dim=-1)
    assert difference[:2][real[:2]].amax() > 0.01
    torch.testing.assert_close(output.logits[2][real[2]], expected.logits[2][real[2]])
    encoded = {"encoded_images": indexed.encode_image(batch.pop("pixel_values"), batch.pop("image_mask"))}
    torch.testing.assert_close(indexed(**batch, **encoded).logits[real], output.logits[real], **TOLERANCE)

    indexed.save_pretrained(tmp_path / "indexed")
    loaded = TaLlavaForConditionalGeneration.from_pretrained(tmp_path / "indexed")
    assert torch.equal(loaded.model.image_index_embedding.weight, weight)


def test_image_index_embeddings_are_trained_and_not_exceeded():
    model = build_model(num_image_index_embeddings=2).train()
    weight = model.model.image_index_embedding.weight
    ids = torch.tensor([prompt_ids(response=3)])
    model(input_ids=ids, pixel_values=random_images(1, 2), labels=ids).loss.backward()
    assert (weight.grad.abs().amax(dim=-1) > 0).all()
    message = r"A row has 3 images, but there are index embeddings for 2 \(`num_image_index_embeddings`\)"
    for call in (lambda images: model(input_ids=ids, pixel_values=images), model.encode_image):
        with pytest.raises(ValueError, match=message):
            call(random_images(1, 3))


@torch.no_grad()
def test_pixel_values_of_four_dimensions_are_one_image_a_row(model):
    batch = batch_of([prompt_ids(4, 1), prompt_ids(7, 2)])
    images = random_images(2)
    assert torch.equal(model(**batch, pixel_values=images[:, 0]).logits, model(**batch, pixel_values=images).logits)


@torch.no_grad()
def test_vision_features_stand_for_pixel_values(model):
    batch = batch_of([prompt_ids(4, 1), prompt_ids(7, 2)])
    images = random_images(2, 2)
    features = model.get_vision_features(images)
    assert features.shape == (4, 9, 24)
    expected = model(**batch, pixel_values=images)
    output = model(**batch, vision_features=features.view(2, 2, 9, 24))
    assert torch.equal(output.logits, expected.logits)
    assert expected.image_hidden_states.shape == (2, 2, 9, 32)
    with pytest.raises(ValueError, match="width 20, the vision tower 24"):
        model(**batch, vision_features=features.view(2, 2, 9, 24)[..., :20])
    with pytest.raises(ValueError, match="not both"):
        model(**batch, vision_features=features.view(2, 2, 9, 24), pixel_values=images)


@torch.no_grad()
def test_get_image_features_gives_one_item_per_real_image(model):
    images = random_images(2, 2)
    output = model.get_image_features(images, image_mask=torch.tensor([[1, 0], [1, 1]]))
    assert [tuple(item.shape) for item in output.pooler_output] == [(9, 32)] * 3
    torch.testing.assert_close(
        output.pooler_output[2], model.get_image_features(images[1, 1:]).pooler_output[0], **TOLERANCE
    )


@torch.no_grad()
def test_text_with_filler_images_only(model):
    """Collators of fixed size make such batches: they are text."""
    batch = batch_of([prompt_ids(image=False, seed=1), prompt_ids(image=False, seed=2)])
    expected = model(**batch).logits
    filler = {"pixel_values": torch.zeros(2, 1, 3, 12, 12), "image_mask": torch.zeros(2, 1, dtype=torch.long)}
    assert torch.equal(model(**batch, **filler).logits, expected)


@torch.no_grad()
def test_inputs_embeds_give_the_same_as_ids(model):
    batch = batch_of([prompt_ids(4, 1, response=2), prompt_ids(8, 2), prompt_ids(6, 3, image=False)])
    images = {"pixel_values": random_images(3), "image_mask": torch.tensor([[1], [1], [0]])}
    expected = model(**batch, **images).logits
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(model(inputs_embeds=embeds, **batch, **images).logits, expected)


# --- cache ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_cached_logits_are_uncached_logits(model, cache_class):
    """Prefill of the prompt, then the response in pieces of several lengths."""
    rows = [prompt_ids(7, 1, response=9), prompt_ids(4, 2, response=12), prompt_ids(7, 3, image=False, response=12)]
    batch = batch_of(rows)
    images = {"pixel_values": random_images(3), "image_mask": torch.tensor([[1], [1], [0]])}
    expected = model(**batch, **images, use_cache=False).logits
    config = model.config.text_config
    cache = StaticCache(config, max_cache_len=64) if cache_class is StaticCache else DynamicCache(config=config)
    length = batch["input_ids"].shape[1]
    pieces = [0, length - 9, length - 8, length - 7, length - 4, length - 1, length]
    for start, end in itertools.pairwise(pieces):
        output = model(
            input_ids=batch["input_ids"][:, start:end],
            attention_mask=batch["attention_mask"][:, :end],
            past_key_values=cache,
            use_cache=True,
            # given again, as `generate()` does when it goes on from a cache, the images must not be read again
            **images,
        )
        real = batch["attention_mask"][:, start:end].bool()
        torch.testing.assert_close(output.logits[real], expected[:, start:end][real], **TOLERANCE)


@torch.no_grad()
def test_adapters_run_in_the_prefill_only_and_project_the_image_once(model):
    calls = {"text": 0, "vision": 0, "vision keys": 0, "tower": 0}

    def count(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    base = model.model
    hooks = [
        base.text_adapter.mlp.register_forward_hook(count("text")),
        base.vision_adapter.mlp.register_forward_hook(count("vision")),
        base.vision_adapter.cross_attn.k_proj.register_forward_hook(count("vision keys")),
        base.vision_tower.register_forward_hook(count("tower")),
    ]
    model.generate(**row_inputs(), max_new_tokens=5, do_sample=False, eos_token_id=None)
    for hook in hooks:
        hook.remove()
    assert calls == {"text": 2, "vision": 1, "vision keys": 1, "tower": 1}  # after layers 0 and 4, and 1, of 6


# --- generate ------------------------------------------------------------------------------------------------------


GENERATION = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": PAD}


def generation_batch() -> dict[str, torch.Tensor]:
    batch = batch_of([prompt_ids(5, 1), prompt_ids(9, 2), prompt_ids(7, 3, image=False)])
    return {**batch, "pixel_values": random_images(3, 2), "image_mask": torch.tensor([[1, 1], [1, 0], [0, 0]])}


@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=lambda mode: "-".join(mode),
)
def test_generation_is_the_same_with_every_cache_and_without(model, mode):
    outputs = []
    for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.manual_seed(0)
        outputs.append(model.generate(**generation_batch(), **GENERATION, **mode, **cache, disable_compile=True))
    rows = 3 * mode.get("num_return_sequences", 1)
    assert all(output.shape[0] == rows for output in outputs)
    assert all(torch.equal(output, outputs[0]) for output in outputs[1:])


@pytest.mark.parametrize("mode", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}], ids=["greedy", "beams"])
def test_generation_of_a_batch_is_that_of_its_rows(model, mode):
    batch = generation_batch()
    together = model.generate(**batch, **GENERATION, **mode)[:, batch["input_ids"].shape[1] :]
    for row in range(3):
        kept = batch["attention_mask"][row].bool()
        count = int(batch["image_mask"][row].sum())
        alone = {"input_ids": batch["input_ids"][row, kept][None]}
        if count:
            alone["pixel_values"] = batch["pixel_values"][row : row + 1, :count]
        expected = model.generate(**alone, **GENERATION, **mode)[:, alone["input_ids"].shape[1] :]
        assert torch.equal(together[row : row + 1], expected)


def test_beams_keep_their_own_images(model):
    """Two rows with the same text and other images: with beams too, each answers about its own."""
    ids = torch.tensor([prompt_ids(5)] * 2)
    images = random_images(2, seed=4)
    together = model.generate(input_ids=ids, pixel_values=images, num_beams=4, **GENERATION)
    swapped = model.generate(input_ids=ids, pixel_values=images.flip(0), num_beams=4, **GENERATION)
    assert not torch.equal(together[0], together[1])
    assert torch.equal(together, swapped.flip(0))


def test_assisted_and_prompt_lookup_decoding_are_greedy_decoding(model):
    inputs = row_inputs(seed=6)
    greedy = model.generate(**inputs, **GENERATION, do_sample=False)
    lookup = model.generate(**inputs, **GENERATION, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(lookup, greedy)
    assistant = make_lively(copy.deepcopy(model), seed=0)
    with torch.no_grad():  # an assistant that is often, not always, right
        assistant.lm_head.weight += 0.05 * torch.randn_like(assistant.lm_head.weight)
    assert torch.equal(model.generate(**inputs, **GENERATION, do_sample=False, assistant_model=assistant), greedy)


def test_generation_from_inputs_embeds(model):
    batch = generation_batch()
    expected = model.generate(**batch, **GENERATION, do_sample=False)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    new_tokens = model.generate(
        inputs_embeds=embeds,
        **{key: value for key, value in batch.items() if key != "input_ids"},
        **GENERATION,
        do_sample=False,
    )
    assert torch.equal(new_tokens, expected[:, batch["input_ids"].shape[1] :])


@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_a_conversation_goes_on_from_a_returned_cache(model, cache_implementation):
    """The second turn, given whole and with the images again, equals the same conversation without a cache."""
    inputs = row_inputs(seed=2)
    options = {**GENERATION, "do_sample": False, "disable_compile": True}
    if cache_implementation == "static":
        cache = StaticCache(model.config.text_config, max_cache_len=64)
    else:
        cache = DynamicCache(config=model.config.text_config)
    first = model.generate(**inputs, past_key_values=cache, **options)
    conversation = torch.cat([first, torch.tensor([[*random_tokens(4, 77), TURN, MODEL]])], dim=1)
    inputs = {**inputs, "input_ids": conversation, "attention_mask": torch.ones_like(conversation)}
    expected = model.generate(**inputs, use_cache=False, **options)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **options), expected)


@torch.no_grad()
def test_a_placeholder_that_the_model_writes_is_a_word(model):
    """With and without a cache: only the placeholders before all text are the prefix."""
    inputs = row_inputs(response=3)
    inputs["input_ids"][0, -2] = IMAGE
    expected = model(**inputs, use_cache=False).logits
    cache = DynamicCache(config=model.config.text_config)
    prompt = model(
        **{**inputs, "input_ids": inputs["input_ids"][:, :-3]}, past_key_values=cache, use_cache=True
    ).logits
    response = model(input_ids=inputs["input_ids"][:, -3:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat([prompt, response], dim=1), expected, **TOLERANCE)


def test_compiled_decoding_with_a_static_cache(gemma):
    """The compiled decode step has no graph break and gives the tokens of eager decoding."""
    model = copy.deepcopy(gemma)
    inputs = generation_batch()
    expected = model.generate(**inputs, **GENERATION, do_sample=False)
    cache = StaticCache(model.config.text_config, max_cache_len=64)
    with torch.no_grad():
        output = model(**inputs, past_key_values=cache, use_cache=True)
        step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        mask, tokens = inputs["attention_mask"], []
        for _ in range(GENERATION["max_new_tokens"]):
            tokens.append(output.logits[:, -1].argmax(dim=-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            prepared = model.prepare_inputs_for_generation(
                tokens[-1], past_key_values=cache, attention_mask=mask, position_ids=mask.sum(dim=-1, keepdim=True) - 1
            )
            output = step(**prepared)
    assert torch.equal(torch.cat(tokens, dim=1), expected[:, inputs["input_ids"].shape[1] :])


def test_compiled_prefill(gemma):
    model = copy.deepcopy(gemma)
    inputs = generation_batch()  # filler and a row of text in it
    with torch.no_grad():
        expected = model(**inputs).logits
        compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(compiled[real], expected[real], **TOLERANCE)


def test_placeholders_without_images_are_accepted_with_a_warning(model, monkeypatch):
    """Assistants send them; the prefix then reads the text alone."""
    warnings = []
    monkeypatch.setattr(modeling_ta_llava.logger, "warning_once", warnings.append)
    ids = torch.tensor([prompt_ids()])
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids).logits).all()
        assert len(warnings) == 1 and "no images (`pixel_values`" in warnings[0]
        model(input_ids=ids, pixel_values=random_images(1))
    assert len(warnings) == 1


def test_token_types_of_the_processor_are_accepted(model):
    inputs = generation_batch()
    expected = model.generate(**inputs, **GENERATION, do_sample=False)
    types = (inputs["input_ids"] == IMAGE).long()
    assert torch.equal(model.generate(**inputs, mm_token_type_ids=types, **GENERATION, do_sample=False), expected)


def test_chunked_prefill_is_refused(model):
    with pytest.raises(ValueError, match="chunks of 4 tokens"):
        model.generate(**row_inputs(), **GENERATION, prefill_chunk_size=4)
    text = torch.tensor([prompt_ids(image=False)])
    whole, chunks = (
        model.generate(text, **GENERATION, do_sample=False, prefill_chunk_size=size) for size in (None, 4)
    )
    assert torch.equal(whole, chunks)


def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match="continuous batching.*generate"):
        model.generate_batch([prompt_ids()])


# --- outputs, training, saving -------------------------------------------------------------------------------------


@torch.no_grad()
def test_outputs_are_those_of_the_language_model(model):
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    inputs = row_inputs(response=3)
    length = inputs["input_ids"].shape[1]
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(1, length, 32)] * 7
    assert [tuple(weights.shape) for weights in output.attentions] == [(1, 4, length, length)] * 6
    assert isinstance(model(**inputs, return_dict=False), tuple)


@torch.no_grad()
def test_eager_and_sdpa_agree():
    model = build_model("llama")
    batch = generation_batch()
    assert model.model.language_model.config._attn_implementation == "sdpa"
    logits = model(**batch).logits
    model.set_attn_implementation("eager")
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[real], logits[real], **TOLERANCE)


@torch.no_grad()
def test_labels_and_logits_to_keep(model):
    inputs = row_inputs(response=4)
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    output = model(**inputs, labels=labels)
    expected = nn.functional.cross_entropy(output.logits[0, -5:-1].float(), labels[0, -4:])
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, output.logits[:, -2:], **TOLERANCE)
    kept = model(**inputs, logits_to_keep=torch.tensor([1, 5])).logits
    torch.testing.assert_close(kept, output.logits[:, [1, 5]], **TOLERANCE)


@torch.no_grad()
def test_gemma_caps_its_logits():
    model = build_model("gemma2", text_kwargs={"final_logit_softcapping": 0.5})
    assert model(**row_inputs()).logits.abs().max() <= 0.5


def training_gradients(model, checkpointing: bool) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = generation_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_reach_every_part_with_and_without_checkpointing(model):
    plain, checkpointed = training_gradients(model, False), training_gradients(model, True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(checkpointed[name], gradient, **TOLERANCE)
    unused = {name for name, _ in model.named_parameters()} - plain.keys()
    assert all("vision_tower.encoder.layers.2" in name or "post_layernorm" in name for name in unused), unused
    for part in ("prefix_embedding", "text_adapter", "vision_adapter", "multi_modal_projector", "vision_tower"):
        gradients = [gradient for name, gradient in plain.items() if part in name and not name.endswith("k_proj.bias")]
        assert gradients and all(gradient.abs().max() > 0 for gradient in gradients), part


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("length", [1, 10])  # shorter than the prefix too
@pytest.mark.parametrize("given", [None, "pixel_values", "vision_features"])
def test_a_batch_without_an_image_gives_what_reads_images_gradients_of_zero(model, given, length, checkpointing):
    """Other processes wait for them; and a frozen language model alone would have nothing to go back to."""
    batch = batch_of([[BOS, *random_tokens(length, 1)], [BOS, *random_tokens(length, 2)[1:]]], side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    filler = {"pixel_values": random_images(2), "vision_features": torch.randn(2, 1, 9, 24)}
    if given is not None:
        batch |= {given: filler[given], "image_mask": torch.zeros(2, 1)}
    with torch.no_grad():
        expected = model(**batch, labels=labels)
    model = copy.deepcopy(model).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    for part in (model.model.language_model, model.lm_head):
        part.requires_grad_(False)
    outputs = model(**batch, labels=labels, use_cache=False)
    assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.loss, expected.loss)
    assert outputs.image_hidden_states is None
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    without = {name for name, gradient in gradients.items() if gradient is None}
    assert all("vision_tower.encoder.layers.2" in name or "post_layernorm" in name for name in without), without
    assert all(not gradient.any() for gradient in gradients.values() if gradient is not None)


def test_a_batch_without_an_image_trains_the_language_model_as_if_alone(model):
    batch = batch_of([[BOS, *random_tokens(8, 1)], [BOS, *random_tokens(2, 2)]], side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients = []
    for training in (False, True):
        trained = copy.deepcopy(model).train(training)
        trained(**batch, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in trained.named_parameters() if "language_model" in name})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **TOLERANCE)


def test_placeholders_in_the_labels_do_not_count(model, monkeypatch):
    """Labels as TRL makes them, of `input_ids`; and the prefix must not have read what is to be predicted."""
    warnings = []
    monkeypatch.setattr(modeling_ta_llava.logger, "warning_once", warnings.append)
    model = copy.deepcopy(model).train()
    inputs = row_inputs(response=3)
    copied = inputs["input_ids"].clone()
    masked = copied.masked_fill(copied == IMAGE, -100)
    losses = [model(**inputs, labels=labels).loss for labels in (copied, masked)]
    assert torch.equal(*losses)
    assert all("-100" in warning for warning in warnings)
    assert ["include its instruction" in warning for warning in warnings] == [True, False, True]
    assert "placeholders" in warnings[1]  # of the copy alone
    answer = masked.clone()
    answer[:, : copied[0].tolist().index(MODEL) + 1] = -100
    model(**inputs, labels=answer)
    model(**inputs, labels=answer[:, -4:], logits_to_keep=4)  # as some collators have it
    model.eval()(**inputs, labels=copied)
    text = torch.tensor([prompt_ids(image=False, response=3)])
    model.train()(input_ids=text, labels=text)  # no prefix reads it
    assert len(warnings) == 3
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    other = model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"], labels=copied)
    torch.testing.assert_close(other.loss, losses[0], **TOLERANCE)
    assert len(warnings) == 5


def test_a_row_that_was_cut_before_its_answer_is_warned_of_as_such(monkeypatch):
    warnings = []
    monkeypatch.setattr(modeling_ta_llava.logger, "warning_once", warnings.append)
    inputs = row_inputs(response=3)
    cut = inputs["input_ids"][:, :-5]  # marker and answer
    build_model().train()(cut, inputs["pixel_values"], labels=torch.full_like(cut, -100))
    assert len(warnings) == 1 and "truncated before its answer" in warnings[0] and "`max_length`" in warnings[0]


def test_reentrant_checkpointing_is_refused(model):
    model = copy.deepcopy(model).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="cannot be reentrant"):
        model(**row_inputs())
    assert torch.isfinite(model.eval()(**row_inputs()).logits).all()


def test_a_missing_response_marker_is_warned_of(monkeypatch):
    """In training the prefix then reads the labels, and what is learned is worthless; else no chat template was used."""
    warnings = []
    monkeypatch.setattr(modeling_ta_llava.logger, "warning_once", warnings.append)
    model = build_model(response_marker_ids=[TURN, 50]).train()
    model(**row_inputs(response=3))
    assert len(warnings) == 1 and "response_marker_ids" in warnings[0]
    model.eval()(**row_inputs(response=3))
    assert len(warnings) == 2 and "apply_chat_template" in warnings[1]
    build_model().train()(**row_inputs(response=3))
    build_model().eval()(**row_inputs(response=3))
    assert len(warnings) == 2


def test_frozen_parts_stay_and_trained_parts_move(model):
    model = copy.deepcopy(model).train()
    model.model.vision_tower.requires_grad_(False)
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    batch = generation_batch()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        trained = any(part in name for part in ("prefix_embedding", "adapter", "projector"))
        assert torch.equal(value, before[name]) != trained, name


def without_provenance(config: dict) -> dict:
    """A config without what loading fills in."""
    provenance = {"dtype", "_name_or_path", "architectures", "transformers_version"}
    return {
        key: without_provenance(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in provenance
    }


def test_saved_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = TaLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert without_provenance(loaded.config.to_dict()) == without_provenance(model.config.to_dict())
    inputs = row_inputs()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
        base = AutoModel.from_pretrained(tmp_path).eval()
        assert type(base) is TaLlavaModel
        assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_tied_embeddings_and_resizing(model):
    model = copy.deepcopy(model)
    tied = model.config.text_config.tie_word_embeddings
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    inputs = row_inputs()
    with torch.no_grad():
        logits = model(**inputs).logits
        model.resize_token_embeddings(80)
        assert model.config.text_config.vocab_size == 80
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert torch.equal(model(**inputs).logits[..., :60], logits)


def test_bf16_and_fp16_stay_close(model):
    inputs = row_inputs()
    with torch.no_grad():
        probabilities = model(**inputs).logits.softmax(dim=-1)
        for dtype in (torch.bfloat16, torch.float16):
            output = copy.deepcopy(model).to(dtype)(**inputs)  # images stay fp32, as the processor makes them
            assert output.logits.dtype == dtype
            assert (output.logits.float().softmax(dim=-1) - probabilities).abs().max() < 0.15


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_initialisation_is_that_of_the_parts(from_checkpoint, tmp_path):
    """
    Gemma's norms start at zero, CLIP's weights at CLIP's own scale, the adapters as the layers of the language model:
    in a new model, and for what a checkpoint does not have.
    """
    config = build_config("gemma2")
    torch.manual_seed(0)
    model = TaLlavaForConditionalGeneration(config)
    if from_checkpoint:
        model.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        state = {name: value for name, value in state.items() if "vision_tower" not in name and "adapter" not in name}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        model = TaLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert all((value == 0).all() for name, value in model.model.text_adapter.named_parameters() if "norm" in name)
    tower, expected = model.model.vision_tower.state_dict(), CLIPVisionModel(config.vision_config).state_dict()
    for name, value in tower.items():
        if name.endswith("weight") and "norm" not in name and value.dim() > 1:
            assert abs(value.std() / expected[name].std() - 1) < 0.25, name
    std = model.model.vision_adapter.cross_attn.q_proj.weight.std()
    assert abs(std / config.text_config.initializer_range - 1) < 0.25


def test_the_default_is_the_published_architecture():
    """Built on the meta device: CLIP ViT-L/14@336 (0.30 B), Gemma-2-2B (2.61 B) and two adapters of one layer each."""
    from ta_llava import TaLlavaConfig

    with torch.device("meta"):
        model = TaLlavaForConditionalGeneration(TaLlavaConfig())
    base = model.model

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(base.language_model) == 2_614_341_888
    assert count(base.text_adapter) == count(base.vision_adapter) == count(base.language_model.layers[0])
    assert count(base.multi_modal_projector) == 1024 * 2304 + 2304
    assert base.prefix_embedding.weight.shape == (32, 2304)
    assert count(base.vision_tower) == 303_507_456


@torch.no_grad()
def test_models_can_be_pickled():
    model = build_model()
    inputs = row_inputs()
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(**inputs).logits, model(**inputs).logits)
    assert type(copied.model.language_model.layers[0]) is type(model.model.language_model.layers[0])


def test_a_reader_follows_the_layers_to_their_device(model):
    """With layers on several devices the library moves tensors, but does not know the reader. The meta device stands in."""
    readers = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: readers.append(kwargs["prefix_reader"]), with_kwargs=True
    )
    inputs = row_inputs()
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    reader = copy.deepcopy(readers[0])
    reader.text_adapter, reader.vision_adapter = reader.text_adapter.to("meta"), reader.vision_adapter.to("meta")
    states = torch.empty(*inputs["input_ids"].shape, 32, device="meta")
    assert {reader(states, source).device.type for source in ("text", "vision")} == {"meta"}


def test_the_language_model_keeps_its_layer_class_by_name(model):
    """Device placement and sharding find layers by the name of their class."""
    layer = model.model.language_model.layers[0]
    assert type(layer).__name__ in model.model.language_model._no_split_modules
    assert isinstance(layer, type(AutoModel.from_config(model.config.text_config).layers[0]))


# --- bad input -----------------------------------------------------------------------------------------------------


def test_wrong_numbers_of_placeholders(model):
    ids = prompt_ids()
    with pytest.raises(ValueError, match=r"Row 0 begins with 2 placeholder tokens \(id 7\).*needs 3"):
        model(input_ids=torch.tensor([ids[1:]]), pixel_values=random_images(1))
    with pytest.raises(ValueError, match="Row 0 begins with 4 placeholder tokens"):
        model(input_ids=torch.tensor([[IMAGE, *ids]]), pixel_values=random_images(1))
    with pytest.raises(ValueError, match="Row 0 has 1 images but its text does not begin with placeholder"):
        model(input_ids=torch.tensor([[BOS, *ids]]), pixel_values=random_images(1))
    with pytest.raises(ValueError, match="Row 0 begins with 3 placeholder tokens.*consecutive ones"):
        mask = torch.ones(1, len(ids) + 1)
        mask[0, 1] = 0
        model(input_ids=torch.tensor([[IMAGE, PAD, *ids[1:]]]), pixel_values=random_images(1), attention_mask=mask)
    with pytest.raises(ValueError, match="Row 1 has 1 images but its text does not begin with placeholder"):
        batch = batch_of([prompt_ids(), prompt_ids(image=False)])
        model(**batch, pixel_values=random_images(2))
    with pytest.raises(ValueError, match="Row 0 has 0 images but its text begins with placeholder"):
        model(input_ids=torch.tensor([ids]), pixel_values=random_images(1), image_mask=torch.tensor([[0]]))


def test_images_of_a_wrong_shape_dtype_or_device(model):
    ids = torch.tensor([prompt_ids()])
    with pytest.raises(ValueError, match=r"\(2, 1, 3, 12, 12\).*1 rows"):
        model(input_ids=ids, pixel_values=random_images(2))
    with pytest.raises(ValueError, match=r"image_mask.*\(1, 2\).*\(1, 1\)"):
        model(input_ids=ids, pixel_values=random_images(1), image_mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match="floating point.*uint8"):
        model(input_ids=ids, pixel_values=random_images(1).to(torch.uint8))
    with pytest.raises(ValueError, match="on meta, the model on cpu"):
        model(input_ids=ids, pixel_values=random_images(1).to("meta"))
    with pytest.raises(ValueError, match="token ids.*float32"):
        model(input_ids=ids.float())
    with pytest.raises(ValueError, match="exactly one"):
        model(pixel_values=random_images(1))


def test_a_sequence_longer_than_the_context(model):
    with pytest.raises(ValueError, match="134 tokens.*128"):
        model(input_ids=torch.tensor([prompt_ids(128)]), pixel_values=random_images(1))


def test_a_marker_of_none_and_bad_intervals_are_refused():
    with pytest.raises(Exception, match="response_marker_ids"):
        build_config(response_marker_ids=[])
    with pytest.raises(Exception, match="adapter_interval.*at least 2"):
        build_config(adapter_interval=1)
    for field in ({"image_token_id": 60}, {"response_marker_ids": [3, 61]}):
        with pytest.raises(ValueError, match="6[01] is not in its vocabulary of 60"):
            TaLlavaForConditionalGeneration(build_config(**field))
    with pytest.raises(ValueError, match="vision_feature_layer` is -5.*4 hidden states"):
        TaLlavaForConditionalGeneration(build_config(vision_feature_layer=-5))


def test_a_checkpoint_folder_with_a_missing_file(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        TaLlavaForConditionalGeneration.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "ta_llava"
