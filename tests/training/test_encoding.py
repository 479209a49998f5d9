"""Token ids are those of the processor, and labels are where the answers are."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from conftest import EXAMPLE_IMAGE, SHIPPED_MODEL
from sample_records import (
    BUILDERS,
    GEMMA_TEXT,
    LLAVA_HF,
    NUM_PREFIX_TOKENS,
    NUM_VISUAL_TOKENS,
    PHI3,
    QWEN3,
    VICUNA,
    answers,
    build_llava,
    build_ta_llava,
    record,
    turns,
)
from transformers import AutoModelForImageTextToText, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from ta_llava import TaLlavaProcessor, VmtcCmaiLlavaProcessor
from ta_llava.building.chat_templates import GEMMA_CHAT_TEMPLATE
from ta_llava.data.samples import SampleError, read_sample
from ta_llava.training.dataset import Collator
from ta_llava.training.encoding import SampleEncoder


CONVERSATIONS = [
    (1, ["<image>\nWhat is it?", "A ball."]),
    (1, ["What is it?\n<image>", "A ball.", "Is <it> red?", "yes", "yes?", "yes"]),
    (2, ["Compare <image> and <image>", "No. 日本語 👍🏽", "And\nthis", "  <b> is\n not\n"]),
    (0, ["Hello!", "Hello!"]),
]


@pytest.mark.parametrize(("num_images", "values"), CONVERSATIONS)
def test_ids_are_those_of_the_processor_and_answers_are_labelled(any_processor, num_images, values):
    sample = read_sample(record(*values, image=[str(EXAMPLE_IMAGE)] * num_images))
    encoder = pickle.loads(pickle.dumps(SampleEncoder(any_processor)))
    item = encoder(sample)
    text = any_processor.apply_chat_template(sample.messages)
    expected = any_processor(text=[text], images=[EXAMPLE_IMAGE] * num_images or None)["input_ids"][0]
    assert item["input_ids"] == list(expected) and item["length"] == len(expected)
    assert all(label in (-100, token) for label, token in zip(item["labels"], expected, strict=True))
    end = "</s>" if isinstance(any_processor, VmtcCmaiLlavaProcessor) else "<end_of_turn>"
    written = [value if end == "</s>" else value.strip() for value in values[1::2]]
    lead = " " if end == "</s>" else ""  # a prompt ends in "ASSISTANT:"
    assert answers(any_processor, item["labels"]) == "|".join(lead + answer + end for answer in written)


def test_messages_with_items_go_to_the_template_as_they_are(any_processor):
    processor = BUILDERS["ta_llava" if isinstance(any_processor, TaLlavaProcessor) else "llava"](GEMMA_CHAT_TEMPLATE)
    items = [{"type": "text", "text": "See "}, {"type": "image"}, {"type": "text", "text": "\n\nand say."}]
    messages = [
        {"role": "user", "content": items},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
    ]
    item = SampleEncoder(processor)(read_sample({"messages": messages, "images": [str(EXAMPLE_IMAGE)]}))
    # Its template writes the BOS token; the processor of LLaVA must then be told not to.
    text = processor.apply_chat_template(messages)
    expected = processor(text=[text], images=[EXAMPLE_IMAGE], add_special_tokens=False)["input_ids"][0]
    assert item["input_ids"] == list(expected)
    assert item["input_ids"].count(processor.tokenizer.bos_token_id) == 1
    assert answers(processor, item["labels"]) == "Yes<end_of_turn>"


@pytest.mark.parametrize("builder", sorted(BUILDERS))
@pytest.mark.parametrize(
    ("template", "labelled"),
    [
        (VICUNA, " is a</s>| a</s>"),
        (LLAVA_HF, " is a| a"),
        (QWEN3, "is a<|im_end|>|<think>\n\n</think>\n\na<|im_end|>"),
        (PHI3, "is a<|end|>|a<|end|>"),
        (GEMMA_TEXT, "is a<end_of_turn>|a<end_of_turn>"),
    ],
)
def test_any_template_will_do(builder, template, labelled):
    processor = BUILDERS[builder](template)
    encoder = SampleEncoder(processor)
    # A question that holds what is around an answer, and the answers.
    question = "a is a USER: b ASSISTANT: a</s>"
    for first in (f"<image>\n{question}", f"{question} <image>"):
        item = encoder(read_sample(record(first, "is a", question, "a")))
        assert answers(processor, item["labels"]) == labelled
        num_placeholders = NUM_PREFIX_TOKENS if builder == "ta_llava" else NUM_VISUAL_TOKENS
        assert item["input_ids"].count(processor.image_token_id) == num_placeholders


def test_white_space_of_the_data_does_not_lead_astray():
    trimming = VICUNA.replace("message['content'] + eos_token", "message['content'] | trim + '\n' + eos_token")
    item = SampleEncoder(processor := build_llava(trimming))(read_sample(record("<image>q", " yes\n", "q", "no\n\n")))
    assert answers(processor, item["labels"]) == " yes\n</s>| no\n</s>"

    # Templates that take lists only write their own line break.
    processor = build_llava(LLAVA_HF)
    for question in ("<image>\nWhat?", "What?\n<image>", "<image>What?"):
        item = SampleEncoder(processor)(read_sample(record(question, "a")))
        images = "<image>" * NUM_VISUAL_TOKENS
        assert processor.tokenizer.decode(item["input_ids"]) == f"<s>USER: {images}\nWhat? ASSISTANT: a "


def test_a_template_without_an_end_of_turn_is_warned_of(monkeypatch):
    warnings = []
    monkeypatch.setattr("ta_llava.training.encoding.logger.warning", warnings.append)
    SampleEncoder(build_llava(VICUNA))
    assert not warnings
    SampleEncoder(build_llava(LLAVA_HF))
    assert "no token that ends the turn" in warnings[0]


def test_what_a_template_refuses_or_changes_is_a_bad_sample():
    with_system = record(conversations=[{"from": "system", "value": "Be brief."}, *turns("<image>q", "a")])
    with pytest.raises(SampleError, match=r"Sample a \(record 0\): The chat template refuses it: System role not sup"):
        SampleEncoder(build_ta_llava(GEMMA_TEXT))(read_sample(with_system))
    processor = build_llava()
    assert answers(processor, SampleEncoder(processor)(read_sample(with_system))["labels"]) == " a</s>"
    shouting = VICUNA.replace("message['content'] + eos_token", "message['content'] | upper + eos_token")
    with pytest.raises(SampleError, match="all answers"):
        SampleEncoder(build_llava(shouting))(read_sample(record("<image>q", "a")))
    without_image = VICUNA.replace(
        "'USER: ' + message['content']", "'USER: ' + message['content'].replace('<image>', '')"
    )
    with pytest.raises(ValueError, match="images"):
        SampleEncoder(build_llava(without_image))(read_sample(record("<image>q", "a")))


def test_processors_that_cannot_be_used_are_refused():
    processor = build_llava()
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        SampleEncoder(processor)
    with pytest.raises(ValueError, match="assistant"):
        SampleEncoder(build_llava("{{ messages[0]['content'] }}"))
    with pytest.raises(ValueError, match="user"):
        SampleEncoder(build_llava("Hello"))
    processor = build_llava()
    processor.use_vmtc, processor.image_processor.do_center_crop = False, False
    with pytest.raises(ValueError, match="writes 36 to 54 tokens for an image, by its shape"):
        SampleEncoder(processor)
    processor.patch_size = None
    with pytest.raises(ValueError, match="`patch_size`"):
        SampleEncoder(processor)
    slow = build_llava()
    slow.tokenizer = SimpleNamespace(is_fast=False)
    with pytest.raises(ValueError, match="fast tokenizer"):
        SampleEncoder(slow)
    llava = build_llava()
    next_processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
        llava.tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    with pytest.raises(ValueError, match="tokens for an image|in a way that is not known here"):
        SampleEncoder(next_processor)


@pytest.fixture(scope="module")
def shipped_model():
    return AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL, dtype=torch.float32).eval()


@pytest.mark.parametrize("changed", [2, 3], ids=["second question", "second answer"])
def test_a_later_turn_does_not_reach_what_comes_before_it(processor, shipped_model, changed):
    values = ["<image>\nwhat color is the shape?", "teal", "is there a circle in the image?", "no"]
    others = [*values]
    others[changed] = {2: "is there a triangle in the image?", 3: "yes"}[changed]
    encoder, collator = SampleEncoder(processor), Collator(processor)
    items = [encoder(read_sample(record(*texts, image=str(EXAMPLE_IMAGE)))) for texts in (values, others)]
    first, second = (collator([item]) for item in items)
    assert first["input_ids"].shape == second["input_ids"].shape
    place = int((first["input_ids"] != second["input_ids"]).int().argmax())
    with torch.no_grad():
        logits, other_logits = (shipped_model(**batch).logits for batch in (first, second))
    assert torch.equal(logits[:, :place], other_logits[:, :place])
    assert not torch.equal(logits[:, place:], other_logits[:, place:])
    # The labels are what the answers are learned from, both of them.
    assert answers(processor, items[0]["labels"]).count("|") == 1
    assert shipped_model(**first).loss.isfinite()
