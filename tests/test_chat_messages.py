"""A word such as `<image>` that somebody types in a chat is text, and takes no image."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from conftest import EXAMPLE_IMAGE
from transformers import AutoProcessor, ProcessorMixin

from ta_llava import VmtcCmaiLlavaProcessor
from ta_llava.chat_messages import escape_placeholders, logger
from ta_llava.common.shipped_models import DEFAULT_LLAVA, DEFAULT_MODEL
from ta_llava.data.samples import read_sample
from ta_llava.training.encoding import SampleEncoder


# From transformers 5.24 on there is `sanitize_control_tokens`, and `processor_kwargs` may hold images.
IS_NEW = "sanitize_control_tokens" in inspect.signature(ProcessorMixin.apply_chat_template).parameters
KWARGS = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
IMAGE = {"type": "image", "path": str(EXAMPLE_IMAGE)}


@pytest.fixture(params=["ta_llava", "vmtc_cmai"])
def processor(request):
    """Of either system."""
    if request.param == "ta_llava":
        return AutoProcessor.from_pretrained(DEFAULT_MODEL)
    return VmtcCmaiLlavaProcessor.from_pretrained(DEFAULT_LLAVA, use_vmtc=True, vmtc_num_visual_tokens=16)


def user(*content) -> list[dict]:
    return [{"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}]


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def assert_same(inputs, expected):
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[key], expected[key]) for key in inputs)


@pytest.mark.parametrize("typed", ["<image>", "what is <image>?\n<image>"])
def test_what_is_typed_beside_an_image_takes_no_image(processor, caplog, typed):
    escaped = typed.replace("<image>", "< image>")
    logger.warning_once.cache_clear()
    messages = [*user(IMAGE, text(typed)), {"role": "assistant", "content": f"It is {typed}."}, *user(typed)]
    inputs = processor.apply_chat_template(messages, **KWARGS)
    expected = [*user(IMAGE, text(escaped)), {"role": "assistant", "content": f"It is {escaped}."}, *user(escaped)]
    assert_same(inputs, processor.apply_chat_template(expected, **KWARGS))
    assert messages[0]["content"][1]["text"] == typed  # the caller's own
    assert "The text of message 0 holds '<image>'" in caplog.text and "It becomes '< image>'" in caplog.text
    # The prompt as text, and then the processor: so too.
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt.count("<image>") == 1
    assert_same(processor(images=EXAMPLE_IMAGE, text=prompt, return_tensors="pt"), inputs)


def test_what_is_typed_in_a_chat_without_images_is_text(processor):
    for content in ("what is <image>?", [text("what is <image>?")]):
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **KWARGS)
        assert_same(inputs, processor.apply_chat_template(user("what is < image>?"), **KWARGS))
        assert "pixel_values" not in inputs
    rows = [user(IMAGE, text("what is <image>?")), user("what is <image>?")]
    batch = processor.apply_chat_template(rows, **KWARGS, processor_kwargs={"padding": True})
    assert len(batch["pixel_values"].flatten(0, -4)) == (2 if "image_mask" in batch else 1)


def test_the_word_stays_the_place_of_an_image_that_is_given_beside_the_messages(processor):
    """As in LLaVA's data, whose text holds it."""
    messages = user("<image>\nwhat color is the shape?")
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt.count("<image>") == 1
    expected = processor(images=EXAMPLE_IMAGE, text=prompt, return_tensors="pt")
    assert_same(processor.apply_chat_template(user(IMAGE, text("what color is the shape?")), **KWARGS), expected)
    if IS_NEW:
        images = {"images": [EXAMPLE_IMAGE]}
        assert_same(processor.apply_chat_template(messages, **KWARGS, processor_kwargs=images), expected)


def test_the_word_stays_the_place_of_an_image_that_is_encoded():
    processor = AutoProcessor.from_pretrained(DEFAULT_MODEL)
    kwargs = {**KWARGS, "processor_kwargs": {"images_encoded": True}}
    inputs = processor.apply_chat_template(user("<image>what color is the shape?"), **kwargs)
    assert_same(
        inputs, processor.apply_chat_template(user({"type": "image"}, text("what color is the shape?")), **kwargs)
    )


def test_a_typed_video_or_placeholder_is_text():
    processor = AutoProcessor.from_pretrained(DEFAULT_MODEL)
    inputs = processor.apply_chat_template(user(IMAGE, text("what is <video>?")), **KWARGS)
    assert_same(inputs, processor.apply_chat_template(user(IMAGE, text("what is < video>?")), **KWARGS))
    # The placeholder's own token need not be the word.
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<unk>")
    inputs = processor.apply_chat_template(user(IMAGE, text("<unk> or color?")), **KWARGS)
    with_space = processor.apply_chat_template(user(IMAGE, text("< unk> or color?")), **KWARGS)
    assert torch.equal(inputs["input_ids"], with_space["input_ids"])


@pytest.mark.skipif(not IS_NEW, reason="from transformers 5.24 on")
def test_it_goes_with_the_sanitizing_of_the_library(processor):
    messages = user(IMAGE, text("<image> or <end_of_turn>?"))
    inputs = processor.apply_chat_template(messages, **KWARGS, sanitize_control_tokens=True)
    placeholders = (inputs["input_ids"] == processor.image_token_id).sum()
    assert placeholders == getattr(processor, "num_prefix_tokens", 16)
    end_of_turn = processor.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert (inputs["input_ids"] == end_of_turn).sum() == 1


def test_other_chats_are_left_as_they_are():
    words = ["<image>", "<video>"]
    messages = [*user(IMAGE, text("<image>")), SimpleNamespace(role="user", content="<image>"), {"role": "tool"}]
    assert escape_placeholders(messages, words)[1:] == messages[1:]
    chat = SimpleNamespace(messages=user(IMAGE, text("<video>")))
    assert escape_placeholders(chat, words) == user(IMAGE, text("< video>"))
    assert escape_placeholders([chat, user("<image>")], words) == [user(IMAGE, text("< video>")), user("<image>")]
    assert escape_placeholders("no chat", words, True) == "no chat"


def test_in_a_sample_to_train_on_the_word_is_always_an_image(processor):
    items = [{"type": "image"}, text("<image>\nwhat color is the shape?")]
    turns = [{"role": "user", "content": items}, {"role": "assistant", "content": "teal"}]
    turns += [{"role": "user", "content": "<image>\nand here?"}, {"role": "assistant", "content": "red"}]
    mixed = read_sample({"messages": turns, "images": ["a.png", "b.png", "c.png"]})
    turns[0]["content"] = "<image>\n<image>\nwhat color is the shape?"
    words = read_sample({"messages": turns, "images": ["a.png", "b.png", "c.png"]})
    encoder = SampleEncoder(processor)
    assert encoder(mixed)["input_ids"] == encoder(words)["input_ids"]
