"""What saves work at inference and must not change an answer: images encoded once, kept caches, compiled graphs."""

import copy

import pytest
import torch
from conftest import (
    EXAMPLE_IMAGE,
    IMAGE,
    MODEL,
    NUM_PREFIX_TOKENS,
    PAD,
    SHIPPED_MODEL,
    TURN,
    batch_of,
    build_config,
    build_model,
    make_lively,
    prompt_ids,
    random_images,
    random_tokens,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention
from transformers import AutoModelForImageTextToText, DynamicCache, StaticCache
from transformers.integrations.flex_attention import WrappedFlexAttention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ta_llava import TaLlavaForConditionalGeneration, modeling_ta_llava


TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
GENERATION = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": PAD, "disable_compile": True}
MODES = [
    {"do_sample": False},
    {"do_sample": False, "cache_implementation": "static"},
    {"do_sample": False, "use_cache": False},
    {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "temperature": 3.0, "num_return_sequences": 2},
]


def mixed_batch() -> dict[str, torch.Tensor]:
    """Three rows, with two images, with one and a filler that must not be looked at, and with none."""
    batch = batch_of([prompt_ids(5, 1), prompt_ids(9, 2), prompt_ids(7, 3, image=False)])
    image_mask = torch.tensor([[1, 1], [1, 0], [0, 0]])
    images = random_images(3, 2).masked_fill(image_mask[:, :, None, None, None] == 0, torch.nan)
    return {**batch, "pixel_values": images, "image_mask": image_mask}


def encode(model, inputs: dict) -> dict:
    """The same inputs, with their images encoded."""
    inputs = dict(inputs)
    encoded = model.encode_image(inputs.pop("pixel_values"), inputs.pop("image_mask", None))
    return {**inputs, "encoded_images": encoded}


class Calls:
    """Counts, while it is open, how often the parts of a model ran, and how many columns went through layer 0."""

    def __init__(self, model):
        base = model.model
        self.parts = {
            "tower": base.vision_tower,
            "projector": base.multi_modal_projector,
            "vision keys": base.vision_adapter.cross_attn.k_proj,
            "vision values": base.vision_adapter.cross_attn.v_proj,
            "vision reads": base.vision_adapter.mlp,
            "text reads": base.text_adapter.mlp,
        }
        self.layer, self.counts, self.columns = base.language_model.layers[0], dict.fromkeys(self.parts, 0), []

    def __enter__(self):
        def count(name):
            return lambda *_: self.counts.__setitem__(name, self.counts[name] + 1)

        self.hooks = [part.register_forward_hook(count(name)) for name, part in self.parts.items()]
        self.hooks.append(
            self.layer.register_forward_hook(lambda _, args, output: self.columns.append(output.shape[1]))
        )
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


# --- images encoded once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(mode))
def test_answers_from_encoded_images_are_those_from_pixels(model, mode):
    outputs = []
    for inputs in (mixed_batch(), encode(model, mixed_batch())):
        torch.manual_seed(0)
        outputs.append(model.generate(**inputs, **GENERATION, **mode))
    assert torch.equal(*outputs)
    assert len(outputs[0][:, -8:].unique()) > 3


@torch.no_grad()
def test_encoding_is_not_done_again(model):
    """Tower, projector and the vision adapter's projections run once for all questions; the prefix reads each."""
    images = random_images(1, 2)
    with Calls(model) as encoding:
        encoded = model.encode_image(images)
    assert encoding.counts == {**dict.fromkeys(encoding.counts, 1), "vision reads": 0, "text reads": 0}
    questions = [torch.tensor([prompt_ids(length, length)]) for length in (4, 9)]
    with Calls(model) as calls:
        answers = [model.generate(ids, encoded_images=encoded, **GENERATION) for ids in questions]
    assert calls.counts == {**dict.fromkeys(calls.counts, 0), "vision reads": 2, "text reads": 4}
    for ids, answer in zip(questions, answers):
        assert torch.equal(answer, model.generate(ids, pixel_values=images, **GENERATION))
    assert not torch.equal(*(answer[:, -8:] for answer in answers))


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(mode))
def test_one_image_goes_with_many_questions(model, mode):
    questions = batch_of([prompt_ids(5, 1), prompt_ids(9, 2), prompt_ids(7, 3)])
    images = random_images(1, 2)
    outputs = []
    for given in ({"pixel_values": images.expand(3, -1, -1, -1, -1)}, {"encoded_images": model.encode_image(images)}):
        torch.manual_seed(0)
        outputs.append(model.generate(**questions, **given, **GENERATION, **mode))
    assert torch.equal(*outputs)


@torch.no_grad()
def test_encoded_images_of_one_picture_a_row_and_after_a_move(model):
    """`(E, 3, H, W)` is one image a row; what was moved or converted is brought back to where the model needs it."""
    batch, images = batch_of([prompt_ids(5, 1), prompt_ids(8, 2)]), random_images(2)
    expected = model(**batch, pixel_values=images).logits
    encoded = model.encode_image(images[:, 0])
    assert not any(states.requires_grad for states in encoded.values())
    assert {name: tuple(states.shape) for name, states in encoded.items()} == {
        "key": (2, 2, 9, 8),
        "value": (2, 2, 9, 8),
        "image_mask": (2, 1),
    }
    torch.testing.assert_close(model(**batch, encoded_images=encoded).logits, expected, **TOLERANCE)
    torch.testing.assert_close(model(**batch, encoded_images=encoded.to(torch.float64)).logits, expected, **TOLERANCE)
    half = encoded.to("cpu", torch.bfloat16)
    assert (half.key.dtype, half.image_mask.dtype) == (torch.bfloat16, torch.bool)
    assert encoded.to("meta").image_mask.device.type == "meta"
    assert (model(**batch, encoded_images=half).logits - expected).abs().max() < 0.5


@torch.no_grad()
def test_encoded_images_that_do_not_fit(gemma):
    batch, images = batch_of([prompt_ids(5, 1), prompt_ids(8, 2), prompt_ids(6, 3)]), random_images(3)
    encoded = gemma.encode_image(images)
    two = gemma.encode_image(images[:2])
    other = build_model(text_kwargs={"num_key_value_heads": 4, "head_dim": 16})
    with pytest.raises(ValueError, match="2 key heads of width 8, .* 4 of width 16"):
        other(**batch, encoded_images=encoded)
    for also in (
        {"pixel_values": images},
        {"image_mask": torch.ones(3, 1)},
        {"vision_features": torch.ones(3, 1, 9, 24)},
    ):
        with pytest.raises(ValueError, match="`encoded_images` or images in another form, not both"):
            gemma(**batch, encoded_images=encoded, **also)
    for call in (gemma, gemma.generate):
        with pytest.raises(ValueError, match="`encode_image`, got Tensor"):
            call(**batch, encoded_images=encoded.key)
        with pytest.raises(ValueError, match="`encoded_images` has 2 rows, but the text has 3"):
            call(**batch, encoded_images=two)
    with pytest.raises(ValueError, match="Row 1 has 1 images but its text does not begin with placeholder"):
        gemma(**batch_of([prompt_ids(5, 1), prompt_ids(8, 2, image=False)]), encoded_images=two)
    with pytest.raises(ValueError, match=r"\(3, 12, 12\): expected \(rows, images, 3"):
        gemma.encode_image(images[0, 0])
    with pytest.raises(TypeError, match="as the processor makes it, got a str"):
        gemma.encode_image("shape.png")
    with pytest.raises(ValueError, match=r"image_mask.*\(1, 2\).*\(3, 1\)"):
        gemma.encode_image(images, torch.ones(1, 2))


def test_assisted_decoding_with_encoded_images(gemma):
    inputs = {"input_ids": torch.tensor([prompt_ids(6, 6)]), "pixel_values": random_images(1, seed=6)}
    assistant = make_lively(copy.deepcopy(gemma), seed=0)
    with torch.no_grad():  # an assistant that is often, not always, right
        assistant.lm_head.weight += 0.05 * torch.randn_like(assistant.lm_head.weight)
    expected = gemma.generate(**inputs, **GENERATION, do_sample=False)
    answer = gemma.generate(**encode(gemma, inputs), **GENERATION, do_sample=False, assistant_model=assistant)
    assert torch.equal(answer, expected)


@pytest.mark.parametrize("form", ["vision_features", "encoded_images"])
def test_images_in_every_form_are_given_to_the_prefill_only(gemma, form):
    """A compiled decode step cannot tell by the cache that it is none of the prefill's business."""
    inputs = encode(gemma, {"input_ids": torch.tensor([prompt_ids()]), "pixel_values": random_images(1)})
    if form == "vision_features":
        inputs = {
            "input_ids": inputs["input_ids"],
            "vision_features": gemma.get_vision_features(random_images(1))[None],
        }
    given = []
    hook = gemma.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs.get(form) is not None), with_kwargs=True
    )
    gemma.generate(**inputs, **GENERATION)
    hook.remove()
    assert given == [True] + [False] * 7


def test_prompts_for_encoded_images(processor):
    """The shipped model answers questions whose images its processor has not seen."""
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL)
    options = {"max_new_tokens": 8, "do_sample": False}

    def chat(*content, **kwargs):
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **kwargs,
        )

    encoded = model.encode_image(**processor(images=EXAMPLE_IMAGE, return_tensors="pt"))
    answers = []
    for question in ("what color is the shape?", "what is the shape?"):
        text = {"type": "text", "text": question}
        inputs = chat({"type": "image"}, text, processor_kwargs={"images_encoded": True})
        whole = chat({"type": "image", "path": str(EXAMPLE_IMAGE)}, text)
        assert inputs.keys() == {"input_ids", "attention_mask"}
        assert torch.equal(inputs["input_ids"], whole["input_ids"])
        answers.append(model.generate(**inputs, encoded_images=encoded, **options))
        assert torch.equal(answers[-1], model.generate(**whole, **options))
    assert [processor.decode(answer[0], skip_special_tokens=True).split()[-1] for answer in answers] == [
        "teal",
        "triangle",
    ]

    both = processor(images=[[EXAMPLE_IMAGE, EXAMPLE_IMAGE], [EXAMPLE_IMAGE]], return_tensors="pt")
    assert both["image_mask"].tolist() == [[1, 1], [1, 0]]  # nested: one list per row, without a text too
    assert len(model.encode_image(**both).key) == 2
    with pytest.raises(ValueError, match=r"but got 0 images\..*pass `images_encoded=True`"):
        chat({"type": "image"}, {"type": "text", "text": "what is it?"})

    rows = processor(text=["<video> a", "b"], images_encoded=True)["input_ids"]
    assert [row.count(processor.image_token_id) for row in rows] == [processor.num_prefix_tokens, 0]
    with pytest.raises(ValueError, match="or `images_encoded=True` for a text alone, not both"):
        processor(images=EXAMPLE_IMAGE, text="<image> a", images_encoded=True)


# --- the next turn of a conversation -------------------------------------------------------------------------------


def next_turn(sequences: torch.Tensor, length: int = 5, seed: int = 77) -> dict[str, torch.Tensor]:
    """A conversation of unpadded rows with another question at its end."""
    question = torch.tensor([[*random_tokens(length, seed), TURN, MODEL]]).expand(sequences.shape[0], -1)
    conversation = torch.cat([sequences, question], dim=1)
    return {"input_ids": conversation, "attention_mask": torch.ones_like(conversation)}


@pytest.mark.parametrize("form", ["pixels", "encoded", "left out", "new tokens only"])
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_a_next_turn_prefills_its_own_tokens(model, cache_class, form):
    """A batch of two conversations: two answers, and only what is new goes through the layers; no prefix, no image."""
    config = model.config.text_config
    cache = StaticCache(config, max_cache_len=64) if cache_class is StaticCache else DynamicCache(config=config)
    images = {"pixel_values": random_images(2, seed=2)}
    options = {**GENERATION, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(
        torch.tensor([prompt_ids(6, 1), prompt_ids(6, 2)]), **images, past_key_values=cache, **options
    )
    past_length = int(first.past_key_values.get_seq_length())
    assert past_length == first.sequences.shape[1] - 1

    whole = next_turn(first.sequences)
    given = {
        "pixels": images,
        "encoded": {"encoded_images": model.encode_image(**images)},
        "left out": {},
        "new tokens only": {},
    }[form]
    turn = {**whole, **given}
    if form == "new tokens only":
        turn["input_ids"] = whole["input_ids"][:, past_length:]
    given_images = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: given_images.extend(kwargs.keys() & {*images, "encoded_images"}), with_kwargs=True
    )
    with Calls(model) as calls:
        second = model.generate(**turn, past_key_values=first.past_key_values, **options)
    hook.remove()
    assert set(calls.counts.values()) == {0} and not given_images
    assert calls.columns == [1 + 5 + 2] + [1] * 7  # the last word of the answer, the question, the marker
    expected = model.generate(**whole, **images, **options).sequences[:, -8:]
    assert torch.equal(second.sequences[:, -8:], expected)
    assert not torch.equal(expected[0], expected[1])


def test_padded_conversations_go_on_with_their_padding(model):
    options = {**GENERATION, "do_sample": False, "return_dict_in_generate": True}
    inputs = mixed_batch()
    first = model.generate(**inputs, **options)
    turn = {**inputs, **next_turn(first.sequences)}
    turn["attention_mask"][:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    expected = model.generate(**turn, **options).sequences
    with Calls(model) as calls:
        second = model.generate(**turn, past_key_values=first.past_key_values, **options)
    assert torch.equal(second.sequences, expected)
    assert set(calls.counts.values()) == {0} and calls.columns[0] == 8


def test_images_of_a_later_turn_need_a_fresh_prefill(gemma):
    """The prefix in the cache has not read them, and would answer as if they were not there."""
    options = {**GENERATION, "return_dict_in_generate": True}
    ids = torch.tensor([prompt_ids()])
    for first_images, later_images in ((1, 2), (0, 1)):
        images = {"pixel_values": random_images(1, first_images)} if first_images else {}
        first = gemma.generate(ids if first_images else ids[:, NUM_PREFIX_TOKENS:], **images, **options)
        turn = next_turn(torch.cat([ids, first.sequences[:, -8:]], dim=1))
        message = rf"have \[{later_images}\] images now, those in `past_key_values` \[{first_images}\]"
        with pytest.raises(ValueError, match=message):
            gemma.generate(
                **turn, pixel_values=random_images(1, later_images), past_key_values=first.past_key_values, **options
            )


def test_a_new_prompt_does_not_go_on_from_the_cache_of_another(gemma):
    """Its image would not be looked at, and its placeholders be read as words."""
    options = {**GENERATION, "return_dict_in_generate": True}
    ids = torch.tensor([prompt_ids()])
    first = gemma.generate(ids, pixel_values=random_images(1), **options)
    with pytest.raises(ValueError, match=f"has {NUM_PREFIX_TOKENS} placeholder tokens"):
        gemma.generate(ids, pixel_values=random_images(1, seed=9), past_key_values=first.past_key_values, **options)


def test_rows_with_other_numbers_of_images_are_refused(gemma):
    options = {**GENERATION, "return_dict_in_generate": True}
    ids, images = torch.tensor([prompt_ids(), prompt_ids()]), random_images(2, 2)
    mask = torch.tensor([[1, 1], [1, 0]])
    first = gemma.generate(ids, pixel_values=images, image_mask=mask, **options)
    with pytest.raises(ValueError, match=r"have \[1, 2\] images now, those in `past_key_values` \[2, 1\]"):
        gemma.generate(
            **next_turn(first.sequences),
            pixel_values=images,
            image_mask=mask.flip(0),
            past_key_values=first.past_key_values,
            **options,
        )


def test_a_cache_that_forward_has_filled_knows_its_images_too(gemma):
    text = torch.tensor([prompt_ids()])[:, NUM_PREFIX_TOKENS:]
    cache = gemma(text, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"have \[1\] images now, those in `past_key_values` \[0\]"):
        gemma.generate(
            next_turn(text)["input_ids"], pixel_values=random_images(1), past_key_values=cache, **GENERATION
        )


def test_rows_of_a_cache_may_be_repeated(gemma):
    """One prefill, then a question for each of its copies; the images may be given along."""
    options = {**GENERATION, "do_sample": False, "return_dict_in_generate": True}
    images = {"pixel_values": random_images(1)}
    first = gemma.generate(torch.tensor([prompt_ids()]), **images, **options)
    first.past_key_values.batch_repeat_interleave(2)
    turns = [next_turn(first.sequences, seed=seed) for seed in (1, 2)]
    both = {name: torch.cat([turn[name] for turn in turns]) for name in turns[0]}
    images = {"pixel_values": images["pixel_values"].repeat_interleave(2, dim=0)}
    second = gemma.generate(**both, **images, past_key_values=first.past_key_values, **options)
    assert torch.equal(second.sequences, gemma.generate(**both, **images, **options).sequences)


def test_an_assistant_begins_with_an_empty_cache(gemma):
    options = {**GENERATION, "return_dict_in_generate": True, "prompt_lookup_num_tokens": 2}
    first = gemma.generate(torch.tensor([prompt_ids()]), pixel_values=random_images(1), **options)
    with pytest.raises(ValueError, match="from a filled `past_key_values`"):
        gemma.generate(**next_turn(first.sequences), past_key_values=first.past_key_values, **options)


def test_a_cache_does_not_follow_the_last_question(gemma, monkeypatch):
    """With `instruction_scope="last"` a kept prefix has read the first question; that is told, with what to do."""
    warnings = []
    monkeypatch.setattr(modeling_ta_llava.logger, "warning_once", warnings.append)
    model = copy.deepcopy(gemma)
    options = {**GENERATION, "do_sample": False, "return_dict_in_generate": True}
    inputs = {"input_ids": torch.tensor([prompt_ids(6, 2)]), "pixel_values": random_images(1)}
    answers = {}
    for scope in ("first", "last"):
        model.config.instruction_scope = scope
        first = model.generate(**inputs, **options)
        assert not warnings
        cut_short = {**inputs, "input_ids": first.sequences}
        model.generate(**cut_short, past_key_values=copy.deepcopy(first.past_key_values), **options)
        assert not warnings, "the answer goes on, with no new question"
        turn = {**inputs, **next_turn(first.sequences, length=9)}
        with torch.no_grad():
            answers[scope] = [
                model(**turn).logits[:, -1],
                model(
                    turn["input_ids"][:, first.sequences.shape[1] - 1 :],
                    past_key_values=copy.deepcopy(first.past_key_values),
                ).logits[:, -1],
            ]
        model.generate(**turn, past_key_values=first.past_key_values, **options)
        assert len(warnings) == (scope == "last")
    text = model.generate(inputs["input_ids"][:, NUM_PREFIX_TOKENS:], **options)
    model.generate(**next_turn(text.sequences), past_key_values=text.past_key_values, **options)
    assert len(warnings) == 1, "a conversation without images has no prefix"
    torch.testing.assert_close(*answers["first"], **TOLERANCE)
    assert not torch.allclose(*answers["last"], atol=1e-3)
    assert "instruction_scope" in warnings[0] and "empty cache" in warnings[0]


# --- compiled graphs -----------------------------------------------------------------------------------------------


def bucket(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Prompts whose questions have these lengths, padded on the left to 16 columns, and their images."""
    rows = [[PAD] * 16 + prompt_ids(length, length) for length in lengths]
    rows = [row[-16:] for row in rows]
    assert all(row.count(IMAGE) == NUM_PREFIX_TOKENS for row in rows)
    inputs = {"input_ids": torch.tensor(rows)}
    return {**inputs, "attention_mask": (inputs["input_ids"] != PAD).long(), "pixel_values": random_images(len(rows))}


@pytest.mark.parametrize(("backbone", "form"), [("gemma2", "pixels"), ("llama", "encoded")])
def test_compiled_prompts_of_one_bucket_share_their_graphs(backbone, form):
    """One graph of the prefill and one of a decode step, without breaks, from a cold start, for prompts of all lengths."""
    eager = build_model(backbone, text_kwargs={"num_hidden_layers": 4})
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    model.forward = torch.compile(model.forward, fullgraph=True, backend=graphs)
    options = {**GENERATION, "do_sample": False, "cache_implementation": "static", "max_new_tokens": 4}
    options.update(output_logits=True, return_dict_in_generate=True)
    for lengths, stance in (((5, 9), "default"), ((8, 2), "fail_on_recompile"), ((7, 6), "fail_on_recompile")):
        inputs = bucket(lengths)
        given = encode(eager, inputs) if form == "encoded" else inputs
        with torch.compiler.set_stance(stance):
            compiled = model.generate(**given, **options)
        expected = eager.generate(**inputs, **options)
        assert torch.equal(compiled.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(compiled.logits), torch.stack(expected.logits), **TOLERANCE)
    assert graphs.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("multiple", [16, 64])
def test_the_processor_pads_to_buckets(processor, multiple):
    """The placeholders stay side by side, before the text and after the padding."""
    texts = ["<image>what?", "<image>" + "what color is the shape? " * 5, "what?"]
    batch = processor(text=texts, images_encoded=True, padding=True, padding_side="left", pad_to_multiple_of=multiple)
    alone = [processor(text=text, images_encoded=True)["input_ids"][0] for text in texts]
    length = -(-max(map(len, alone)) // multiple) * multiple
    for row, mask, ids in zip(batch["input_ids"], batch["attention_mask"], alone):
        assert mask == [0] * (length - len(ids)) + [1] * len(ids)
        assert row[length - len(ids) :] == ids


# --- attention implementations -------------------------------------------------------------------------------------


@pytest.fixture
def uncompiled_flex_attention(monkeypatch):
    """PyTorch's flex attention as it is defined; compiled, its first call takes long."""
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: flex_attention.flex_attention)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)


def attend_like_flash(
    module, query, key, value, attention_mask, scaling, softcap=None, sliding_window=None, is_causal=None, **kwargs
):
    """What flash attention computes, from the mask `(B, keys)` that it is given, causal or not as the module says."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    num_queries, num_keys = scores.shape[-2:]
    kept = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool)
    if module.is_causal if is_causal is None else is_causal:
        distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
        kept = (distance >= 0) & (distance < (sliding_window or num_keys))
    if attention_mask is not None:
        assert attention_mask.dim() == 2
        kept = kept & attention_mask[:, None, None, :].bool()
    weights = scores.masked_fill(~kept, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def implementations(model) -> dict[str, str]:
    return {name: getattr(model.config, name)._attn_implementation for name in ("text_config", "vision_config")}


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["gemma2", "llama"])
def test_every_attention_implementation_gives_the_same(backbone, uncompiled_flex_attention, monkeypatch):
    """Soft-capping included. The language model and the tower run what is asked for, the adapters eager or SDPA."""
    softcap = {"attn_logit_softcapping": 2.0} if backbone == "gemma2" else {}
    model = build_model(backbone, text_kwargs=softcap)
    model.set_attn_implementation("eager")
    inputs = mixed_batch()
    real = inputs["attention_mask"].bool()
    options = {**GENERATION, "do_sample": False}
    expected, answer = model(**inputs).logits, model.generate(**inputs, **options)

    used = {}
    for name, attend in [*ALL_ATTENTION_FUNCTIONS.items(), ("flash_attention_2", attend_like_flash)]:

        def recording(module, *args, name=name, attend=attend, **kwargs):
            used.setdefault(type(module).__name__, set()).add(name)
            return attend(module, *args, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, recording)

    for name in ("flex_attention", "flash_attention_2"):
        used.clear()
        if name == "flash_attention_2":  # `set_attn_implementation` looks for the package
            model.config._attn_implementation = name
        else:
            model.set_attn_implementation(name)
        torch.testing.assert_close(model(**inputs).logits[real], expected[real], **TOLERANCE)
        text_attention = type(model.model.language_model.layers[0].self_attn).__name__
        adapters = {} if softcap else {"TaLlavaCrossAttention": {"sdpa"}}
        assert used == {text_attention: {name}, "CLIPAttention": {name}, **adapters}
        assert torch.equal(model.generate(**inputs, **options), answer)


@torch.no_grad()
def test_sdpa_is_for_what_does_not_soft_cap():
    """Asked for, by name or by default, when a model is made or later: Gemma-2 is eager, its tower runs SDPA."""
    config = build_config("gemma2")
    made = TaLlavaForConditionalGeneration._from_config(copy.deepcopy(config), attn_implementation="sdpa")
    for model in (made, TaLlavaForConditionalGeneration(copy.deepcopy(config))):
        assert implementations(model) == {"text_config": "eager", "vision_config": "sdpa"}
    made.set_attn_implementation("eager")
    assert implementations(made) == {"text_config": "eager", "vision_config": "eager"}
    nested = {"vision_config": "sdpa", "text_config": {"": "sdpa"}}
    for asked in ("sdpa", {"vision_config": "sdpa", "text_config": "sdpa"}, nested):
        made.set_attn_implementation({"vision_config": "eager"})
        made.set_attn_implementation(asked)
        assert implementations(made) == {"text_config": "eager", "vision_config": "sdpa"}
    without = build_config("gemma2", text_kwargs={"attn_logit_softcapping": None})
    assert implementations(TaLlavaForConditionalGeneration(without))["vision_config"] == "sdpa"


def test_each_part_has_its_own_attention_implementation(tmp_path):
    config = build_config("llama")
    TaLlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    for text, vision in (("eager", "sdpa"), ("sdpa", "eager"), ("flex_attention", "sdpa")):
        by_part = {"text_config": text, "vision_config": vision}
        loaded = TaLlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=by_part)
        assert implementations(loaded) == by_part
        loaded.set_attn_implementation({"text_config": vision})
        assert implementations(loaded) == {"text_config": vision, "vision_config": vision}
