"""LLaVA's JSON and chat messages become batches: labels where they belong, nothing bad trained on, nothing lost."""

import base64
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import datasets
import pandas as pd
import pytest
import torch
from conftest import EXAMPLE_IMAGE, SHIPPED_MODEL
from PIL import Image
from tiny_parts import build_image_processor, build_tokenizer
from transformers import AutoModelForImageTextToText, LlavaNextProcessor, PreTrainedTokenizerFast
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from ta_llava import TaLlavaProcessor, VmtcCmaiLlavaProcessor
from ta_llava.building.chat_templates import GEMMA_CHAT_TEMPLATE
from ta_llava.data import samples
from ta_llava.data.report import DataReport
from ta_llava.data.samples import SampleError, find_damaged_files, read_sample
from ta_llava.training.dataset import COLUMNS, Collator, iterate_images, prepare_dataset
from ta_llava.training.encoding import SampleEncoder


NUM_VISUAL_TOKENS, NUM_PREFIX_TOKENS = 9, 3
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
# As on the Hub: images first, lists only, and no token at the end of a turn.
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'text') %}{{ item['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Text only; the last answer is preceded by an empty thought, which a prefix of a conversation has elsewhere.
QWEN3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What ends a conversation does not end a turn.
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# As Gemma's own, which also has no system messages.
GEMMA_TEXT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of `datasets` for each test."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def build_byte_tokenizer(model_max_length: int = 4096) -> PreTrainedTokenizerFast:
    """A token for every byte, so that any text comes back as it was, and a BOS token before everything."""
    return build_tokenizer(
        "bytes",
        ["<image>", "<start_of_turn>", "<end_of_turn>", "<|im_end|>", "<|end|>"],
        {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"},
        starts_with_bos=True,
        model_max_length=model_max_length,
        padding_side="left",
    )


def build_ta_llava(chat_template: str = GEMMA_CHAT_TEMPLATE, **kwargs) -> TaLlavaProcessor:
    return TaLlavaProcessor(
        build_image_processor(),
        build_byte_tokenizer(**kwargs),
        num_prefix_tokens=NUM_PREFIX_TOKENS,
        chat_template=chat_template,
    )


def build_llava(chat_template: str = VICUNA, **kwargs) -> VmtcCmaiLlavaProcessor:
    return VmtcCmaiLlavaProcessor(
        build_image_processor(),
        build_byte_tokenizer(**kwargs),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        use_vmtc=True,
        vmtc_num_visual_tokens=NUM_VISUAL_TOKENS,
        chat_template=chat_template,
    )


BUILDERS = {"ta_llava": build_ta_llava, "llava": build_llava}


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def any_processor(request):
    return BUILDERS[request.param]()


@pytest.fixture(scope="module")
def ta_llava() -> TaLlavaProcessor:
    return build_ta_llava()


def turns(*values: str) -> list[dict]:
    return [{"from": "gpt" if index % 2 else "human", "value": value} for index, value in enumerate(values)]


def record(*values: str, **kwargs) -> dict:
    return {"id": "a", "image": "one.png", "conversations": turns(*values or ("<image>\nWhat?", "A ball.")), **kwargs}


def answers(processor, labels) -> str:
    """What the labels say, a bar for each gap."""
    groups: list[list[int]] = [[]]
    for label in [*labels]:
        if label != -100:
            groups[-1].append(int(label))
        elif groups[-1]:
            groups.append([])
    return "|".join(processor.tokenizer.decode(group) for group in groups if group)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images one.png to three.png, of one colour and different sizes each."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for index, name in enumerate(["one", "two", "sub/three"]):
        Image.new("RGB", (30 + 10 * index, 40), (80 * index, 0, 200)).save(images / f"{name}.png")
    (images / "text.png").write_text("no image")
    content = EXAMPLE_IMAGE.read_bytes()
    (images / "truncated.png").write_bytes(content[: len(content) // 2])
    return images


def write_json(path: Path, records: list) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{', '.join(lines)}]")
    return path


# --- one sample ----------------------------------------------------------------------------------------------------


def test_both_formats_are_read(tmp_path):
    sample = read_sample({**record(" q ", "a"), "id": 7, "conversations": turns("q <image>", "a")}, 3, tmp_path)
    assert (sample.id, sample.images) == ("7", [str(tmp_path / "one.png")])
    assert sample.messages == [{"role": "user", "content": "q <image>"}, {"role": "assistant", "content": "a"}]

    image = Image.new("RGB", (4, 4))
    items = [{"type": "text", "text": "See"}, {"type": "image", "text": None}, {"type": "text", "text": "and say."}]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": items},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    sample = read_sample({"messages": messages, "images": [image]}, 3, tmp_path)
    assert (sample.id, sample.images) == ("3", [image])
    assert sample.messages[0] == {"role": "system", "content": "Be brief."}
    assert sample.messages[1]["content"] == [items[0], {"type": "image"}, items[2]]
    assert sample.messages[2] == {"role": "assistant", "content": "Yes."}

    absolute = read_sample(record(image=["/x/one.png", "b.png"], conversations=turns("<image><image>q", "a")), 0, "/y")
    assert absolute.images == ["/x/one.png", "/y/b.png"]
    assert read_sample(record("q", "a", image=None)).images == []
    legacy = {"from": ["human", "gpt"], "value": ["<image>q", "a"]}  # a list of dicts in older versions of `datasets`
    assert read_sample(record(conversations=legacy)).messages == read_sample(record("<image>q", "a")).messages


BAD_RECORDS = {
    "neither": ({"id": "a", "image": "one.png"}, "neither `conversations` nor `messages`"),
    "no turns": (record(conversations=[]), "at least one"),
    "not turns": (record(conversations="hello"), "must be a list of turns"),
    "role": (record(conversations=[{"from": "robot", "value": "<image>q"}]), "Turn 1 is from 'robot'"),
    "no value": (record(conversations=[{"from": "human"}]), "Turn 1 has no text"),
    "item": (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        "Turn 1 holds {'type': 'video'}, which is neither",
    ),
    "empty answer": (record("<image>q", " \n"), "Turn 2, of the assistant, is empty"),
    "empty question": (record("<image>\n", "a"), "Turn 1, of the user, is empty"),
    "last from user": (record("<image>q", "a", "q"), "last turn is of the user"),
    "two answers": (
        record(conversations=[*turns("<image>q", "a"), {"from": "gpt", "value": "b"}]),
        "Turn 3 is of the assistant and follows a turn of the assistant",
    ),
    "two questions": (record(conversations=[*turns("<image>q")] * 2), "Turn 2 is of the user and follows"),
    "answer first": (record(conversations=turns("q", "a")[1:]), "It has no question"),
    "two answers first": (
        record(conversations=[*turns("q", "a")[1:] * 2, *turns("q", "a")]),
        "Turn 1 is of the assistant and is the first",
    ),
    "image in answer": (record("q", "see <image>"), "Turn 2 has <image> outside a question"),
    "images missing": (record("<image><image>q", "a"), "There are 2 <image> in the questions, but 1 images"),
    "images too many": (record("q", "a"), "There are 0 <image> in the questions, but 1 images"),
    "surrogate": (record("<image>q", "a\ud83d"), "Turn 2 has a broken character"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_what_is_wrong_with_a_record_is_said(name):
    bad, message = BAD_RECORDS[name]
    with pytest.raises(SampleError) as error:
        read_sample(bad, 5, None, "data.json")
    assert str(error.value).startswith(f"Sample {bad.get('id', 5)} (record 5 of data.json): ")
    assert message in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # as processes do


# --- tokens and labels ---------------------------------------------------------------------------------------------

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
    with pytest.raises(SampleError, match="does not write all answers, once and as they are"):
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
    with pytest.raises(ValueError, match="does not write what the assistant says"):
        SampleEncoder(build_llava("{{ messages[0]['content'] }}"))
    with pytest.raises(ValueError, match="does not write what the user says"):
        SampleEncoder(build_llava("Hello"))
    processor = build_llava()
    processor.use_vmtc, processor.image_processor.do_center_crop = False, False
    with pytest.raises(ValueError, match="writes 36 to 54 tokens for an image, by its shape"):
        SampleEncoder(processor)
    processor.patch_size = None
    with pytest.raises(ValueError, match="does not know the size of a patch"):
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


# --- data sets -----------------------------------------------------------------------------------------------------


def mixed_records() -> list[dict]:
    """As in LLaVA's files: ids of two types or none, with and without image, one image or several."""
    return [
        record(id=1),
        record("Hello?", "Hello!", "Bye?", "Bye!", id="text", image=None),
        {"image": "sub/three.png", "conversations": turns("What?\n<image>", "Three.")},
        record("<image><image>q", "Two.", id="two", image=["one.png", "two.png"], model="", meta={"x": [1]}),
        record("<image>q", "word " * 300, id="long"),
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_files_of_llava(tmp_path, folder, any_processor, suffix, streaming):
    source = write_json(tmp_path / f"data{suffix}", mixed_records())
    dataset, report = prepare_dataset(source, any_processor, image_folder=folder, streaming=streaming)
    rows = list(dataset)
    assert [row["id"] for row in rows] == ["1", "2", "two"]
    assert report == DataReport(kept=3, text_only=1, too_long=1, bad=0, max_length=1024)
    assert rows[2]["images"] == [str(folder / "one.png"), str(folder / "two.png")]
    encoder = SampleEncoder(any_processor)
    for row, index in zip(rows, [0, 2, 3]):
        assert set(row) == set(COLUMNS)
        assert row == encoder(read_sample(mixed_records()[index], index, folder))
    assert isinstance(dataset, datasets.IterableDataset if streaming else datasets.Dataset)
    assert len(list(dataset)) == 3 and report.kept == 3  # a second epoch is not counted

    dataset, report = prepare_dataset(
        source, any_processor, image_folder=folder, streaming=streaming, keep_text_only=True, max_length=4096
    )
    assert [row["id"] for row in dataset] == ["1", "text", "2", "two", "long"]
    assert (report.kept, report.text_only, report.too_long) == (5, 0, 0)
    assert list(iterate_images(dataset)) == [
        str(folder / name) for name in ("one.png", "sub/three.png", "one.png", "two.png", "one.png")
    ]


def test_the_report_says_it_all():
    report = DataReport(kept=3, text_only=1, too_long=2, bad=4, max_length=64)
    assert str(report) == "3 of 10 samples kept; left out: 1 without an image, 2 over 64 tokens, 4 bad"


def test_the_context_of_the_model_is_a_limit_too(tmp_path, folder):
    source = write_json(tmp_path / "data.json", mixed_records())
    _, report = prepare_dataset(source, build_ta_llava(model_max_length=80), image_folder=folder)
    assert (report.max_length, report.too_long) == (80, 1)
    with pytest.raises(ValueError, match="`max_length` is 3, but a sample has 3 placeholders"):
        prepare_dataset(source, build_ta_llava(), image_folder=folder, max_length=3)


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_samples(tmp_path, folder, ta_llava, streaming):
    good = [record(id="first"), record("<image>q", "b", id="last")]
    bad = [
        record(id="missing", image="none.png"),
        record(id="text", image="text.png"),
        record(id="truncated", image="truncated.png"),
        record("<image>q", "", id="empty"),
        '{"id": "cut off", ',
        "[1]",
    ]
    source = write_json(tmp_path / "data.jsonl", [good[0], *bad, good[1]])
    file = tmp_path / "new" / "bad.jsonl"
    kwargs = {"image_folder": folder, "streaming": streaming, "bad_samples_file": file}

    with pytest.raises(
        SampleError, match=r"Sample missing \(record 1 of .*data.jsonl\): There is no image file '.*none"
    ):
        list(prepare_dataset(source, ta_llava, **kwargs)[0])

    dataset, report = prepare_dataset(source, ta_llava, on_bad_sample="skip", **kwargs)
    assert [row["id"] for row in dataset] == ["first", "last"]
    assert (report.kept, report.bad, report.total) == (2, 6, 8)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["index"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["id"] for line in lines] == ["missing", "text", "truncated", "empty", "5", "6"]
    words = [
        "no image file",
        "not a readable image",
        "truncated",
        "Turn 2, of the assistant, is empty",
        "not JSON",
        "object",
    ]
    assert all(word in line["reason"] for word, line in zip(words, lines))

    dataset, _ = prepare_dataset(source, ta_llava, on_bad_sample="skip", **kwargs)
    assert len(list(dataset)) == 2
    assert len(file.read_text().splitlines()) == 6  # said once


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_left(tmp_path, folder, ta_llava, streaming):
    source = write_json(tmp_path / "data.json", [mixed_records()[1], record(id="x", image="none.png")])
    with pytest.raises(ValueError, match="nothing to train on in .*0 of 2 samples kept.* 1 without an image.* 1 bad"):
        prepare_dataset(source, ta_llava, image_folder=folder, on_bad_sample="skip", streaming=streaming)


def test_a_second_call_is_quick_and_sees_what_changed(tmp_path, folder, ta_llava, monkeypatch):
    source = write_json(tmp_path / "data.json", [record(id=index) for index in range(3)] + [record(image="two.png")])
    kwargs = {"image_folder": folder, "on_bad_sample": "skip"}
    first, _ = prepare_dataset(source, ta_llava, **kwargs)

    opened, encoded = [], []
    encode, open_image = SampleEncoder.__call__, samples.open_image
    monkeypatch.setattr(SampleEncoder, "__call__", lambda self, one: encoded.append(one.id) or encode(self, one))
    monkeypatch.setattr(samples, "open_image", lambda one: opened.append(Path(one).name) or open_image(one))
    second, report = prepare_dataset(source, ta_llava, **kwargs)
    assert not opened and not encoded
    assert list(second) == list(first) and report.kept == 4

    (folder / "two.png").write_text("damaged since")
    dataset, report = prepare_dataset(source, ta_llava, **kwargs)
    assert opened == ["two.png"] and not encoded
    assert (len(dataset), report.bad) == (3, 1)
    (folder / "two.png").unlink()
    assert prepare_dataset(source, ta_llava, **kwargs)[1].bad == 1

    # Other data, or another processor, are another result.
    write_json(source, [record(id="new")])
    assert [row["id"] for row in prepare_dataset(source, ta_llava, **kwargs)[0]] == ["new"]
    other = build_ta_llava(GEMMA_TEXT.replace("<start_of_turn>", "TURN "))
    assert prepare_dataset(source, other, **kwargs)[0][0]["input_ids"] != first[0]["input_ids"]


def test_images_are_checked_once_also_after_an_interruption(tmp_path, folder, monkeypatch):
    names = ["one.png", "two.png", "truncated.png", "one.png", "none.png"]
    paths, memory = [str(folder / name) for name in names], tmp_path / "new" / "memory.jsonl"
    opened = []
    open_image = samples.open_image
    monkeypatch.setattr(samples, "open_image", lambda one: opened.append(Path(one).name) or open_image(one))
    first = find_damaged_files(paths, memory, num_threads=2)
    assert sorted(first) == sorted(paths[2:5:2]) and sorted(opened) == ["one.png", "truncated.png", "two.png"]
    memory.write_text(memory.read_text()[:-5])  # the last line, of the damaged image, is cut off
    assert find_damaged_files(paths, memory) == first and opened[3:] == ["truncated.png"]
    assert find_damaged_files(paths, memory) == first and len(opened) == 4


def test_several_processes_make_the_same(tmp_path, folder, ta_llava, monkeypatch):
    source = write_json(tmp_path / "data.json", mixed_records() * 2)
    one, report = prepare_dataset(source, ta_llava, image_folder=folder)
    rows = list(one)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    two, report_of_two = prepare_dataset(source, ta_llava, image_folder=folder, num_proc=2)
    assert list(two) == rows and report_of_two == report


def trl_records(folder: Path) -> list[dict]:
    def sample(names: list[str], answer: str) -> dict:
        question = [*[{"type": "image", "text": None} for _ in names], {"type": "text", "text": "What?"}]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        return {"messages": messages, "images": [str(folder / name) for name in names]}

    return [sample(["one.png"], "One."), sample([], "None."), sample(["two.png", "one.png"], "Two.")]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("held", ["paths", "images"])
def test_datasets_of_chat_messages(tmp_path, folder, any_processor, held, streaming):
    source = datasets.Dataset.from_list(trl_records(folder))
    if held == "images":
        source = source.cast_column("images", datasets.Sequence(datasets.Image()))
        source = source.map(lambda row: row)
    datasets.DatasetDict({"train": source}).save_to_disk(tmp_path / "saved")
    sources = [source, tmp_path / "saved"]
    if streaming:
        sources.append(source.to_iterable_dataset())
    batches = []
    for one in sources:
        dataset, report = prepare_dataset(one, any_processor, streaming=streaming)
        rows = list(dataset)
        assert [row["id"] for row in rows] == ["0", "2"] and (report.kept, report.text_only) == (2, 1)
        assert len(list(iterate_images(dataset))) == 3
        batches.append(Collator(any_processor)(rows))
    paths = [str(folder / name) for name in ("one.png", "two.png", "one.png")]
    expected = any_processor(images=paths, return_tensors="pt")["pixel_values"].flatten(0, -4)
    for batch in batches:
        pixels = batch["pixel_values"]
        pixels = pixels[batch["image_mask"].bool()] if "image_mask" in batch else pixels
        torch.testing.assert_close(pixels, expected)
    with pytest.raises(ValueError, match="no split 'validation', but train"):
        prepare_dataset(tmp_path / "saved", any_processor, split="validation")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_image_inside_a_dataset(folder, ta_llava, streaming):
    content = {name: (folder / f"{name}.png").read_bytes() for name in ("one", "truncated", "text")}
    features = {
        "image": datasets.Image(),
        "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
        "id": datasets.Value("int64"),
    }
    rows = [
        {"id": index, "image": {"bytes": data, "path": None}, "conversations": turns("<image>What?", "It.")}
        for index, data in enumerate([content["one"], content["truncated"], content["text"], content["one"]])
    ]
    source = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    with pytest.raises(SampleError, match=r"Sample 1 \(record 1\): "):
        list(prepare_dataset(source, ta_llava, streaming=streaming)[0])
    dataset, report = prepare_dataset(source, ta_llava, streaming=streaming, on_bad_sample="skip")
    rows = list(dataset)
    assert [row["id"] for row in rows] == ["0", "3"] and report.bad == 2
    assert Collator(ta_llava)(rows)["pixel_values"].shape == (2, 1, 3, 24, 24)


def as_column(files: list[bytes], kind: str) -> list:
    """The files of images as tools write them that do not know `datasets`."""
    text = [base64.b64encode(content).decode() for content in files]
    return {
        "structs": [{"bytes": content, "path": f"{index}.png"} for index, content in enumerate(files)],
        "structs without a path": [{"bytes": content, "path": None} for content in files],
        "lists of structs": [[{"bytes": content, "path": None}] for content in files],
        "bytes": files,
        "lists of bytes": [[content] for content in files],
        "base64": text,
        "lists of base64": [[each] for each in text],
        "data URLs": [f"data:image/png;base64,{each}" for each in text],
    }[kind]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        "structs",
        "structs without a path",
        "lists of structs",
        "bytes",
        "lists of bytes",
        "base64",
        "lists of base64",
        "data URLs",
    ],
)
def test_columns_of_images_that_no_longer_say_so(tmp_path, folder, any_processor, kind, streaming):
    paths = [folder / "one.png", folder / "sub" / "three.png"]
    column = as_column([path.read_bytes() for path in paths], kind)
    name = "images" if kind.startswith("lists") else "image"
    rows = {"id": ["a", "b"], "conversations": [turns("<image>\nWhat?", "It.")] * 2, name: column}
    (tmp_path / "saved").mkdir()
    path = tmp_path / "saved" / "train.parquet"
    pd.DataFrame(rows).to_parquet(path)
    sources = [path, tmp_path / "saved", datasets.Dataset.from_parquet(str(path)), datasets.Dataset.from_dict(rows)]
    if streaming:
        sources.append(sources[2].to_iterable_dataset())
    expected = any_processor(images=[*map(str, paths)], return_tensors="pt")["pixel_values"].flatten(0, -4)
    for source in sources:
        dataset, report = prepare_dataset(source, any_processor, streaming=streaming)
        batch = Collator(any_processor)(list(dataset))
        torch.testing.assert_close(batch["pixel_values"].flatten(0, -4), expected)
        assert report.kept == len(list(iterate_images(dataset))) == 2

    lines = [{**record(id=id), "image": image} for id, image in zip(rows["id"], column)]
    if kind in ("base64", "data URLs"):
        source = write_json(tmp_path / "data.jsonl", lines)
        dataset, _ = prepare_dataset(source, any_processor, image_folder=folder, streaming=streaming)
        torch.testing.assert_close(Collator(any_processor)(list(dataset))["pixel_values"].flatten(0, -4), expected)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_an_image_in_a_column_of_structs(tmp_path, folder, ta_llava, streaming):
    content = (folder / "one.png").read_bytes()
    images = [{"bytes": content, "path": None}, None, {"bytes": (folder / "text.png").read_bytes(), "path": None}]
    questions = ["<image>What?", "What?", "<image>What?"]
    rows = {"conversations": [turns(question, "It.") for question in questions], "image": images}
    pd.DataFrame(rows).to_parquet(tmp_path / "data.parquet")
    settings = {"streaming": streaming, "on_bad_sample": "skip", "keep_text_only": True}
    dataset, report = prepare_dataset(tmp_path / "data.parquet", ta_llava, **settings)
    assert Collator(ta_llava)(list(dataset))["image_mask"].tolist() == [[1], [0]]
    assert (report.kept, report.bad) == (2, 1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "image, holds", [({"data": b"x"}, "'data'"), ([1, 2], "int64"), (3.5, "float64"), ([[b"x"]], "binary")]
)
def test_columns_that_cannot_be_images_are_refused_in_one_line(tmp_path, ta_llava, image, holds, streaming):
    pd.DataFrame({"conversations": [turns("<image>What?", "It.")], "image": [image]}).to_parquet(
        tmp_path / "x.parquet"
    )
    message = rf"^The column `image` of .*x.parquet holds .*{holds}.* `dataset.cast_column\("
    with pytest.raises(ValueError, match=message) as error:
        prepare_dataset(tmp_path / "x.parquet", ta_llava, streaming=streaming)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("image", [{"path": "one.png"}, 5])
def test_images_in_json_are_texts(tmp_path, folder, ta_llava, image, streaming):
    source = write_json(tmp_path / "data.json", [record(image=image)])
    with pytest.raises(SampleError, match="in JSON an image is its path, or its file in base64"):
        prepare_dataset(source, ta_llava, image_folder=folder, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_conversation_that_begins_with_an_answer_loses_it_as_in_llava(tmp_path, folder, any_processor, streaming):
    greeting = {"from": "gpt", "value": "Hello."}
    records = [
        record(id="a"),
        record(id="b", conversations=[greeting, *turns("<image>\nWhat?", "A ball.")]),
        record(id="c", conversations=[{"from": "system", "value": "Be brief."}, greeting, *turns("<image>q", "a")]),
        record(id="d", conversations=[greeting, *turns("q", "a")], image=None),
    ]
    source = write_json(tmp_path / "data.json", records[:2] + records[3:])
    dataset, report = prepare_dataset(source, any_processor, image_folder=folder, streaming=streaming)
    rows = list(dataset)
    assert rows[0]["input_ids"] == rows[1]["input_ids"] and rows[0]["labels"] == rows[1]["labels"]
    assert (report.kept, report.text_only, report.began_with_answer) == (2, 1, 1)
    assert str(report).endswith("0 bad; 1 began with an answer, which was dropped")
    assert read_sample(records[2]).messages[1]["role"] == "user"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "There is no file"),
        ("empty.json", "[]", "no records in"),
        ("empty.jsonl", "\n", "no records in"),
        ("object.json", "{}", "is not an array of records"),
        ("lines.json", "{}\n{}", "is not JSON: Extra data.* Call it .jsonl"),
        ("data.csv", "a,b", "neither a .json, nor a .jsonl, nor a .parquet"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_sources_that_cannot_be_read(tmp_path, ta_llava, name, content, message, streaming):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        prepare_dataset(tmp_path / name, ta_llava, streaming=streaming)


def test_a_wrong_image_folder_is_found_before_all_is_tokenised(tmp_path, folder, ta_llava, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    source = write_json(tmp_path / "data.json", [record(id=index) for index in range(500)])
    encoded, encode = [], SampleEncoder.__call__
    monkeypatch.setattr(SampleEncoder, "__call__", lambda self, one: encoded.append(one.id) or encode(self, one))
    with pytest.raises(SampleError, match=r"Sample 0 .* no image file '.*elsewhere.*15 more samples are bad"):
        prepare_dataset(source, ta_llava, image_folder=tmp_path / "elsewhere")
    assert len(encoded) == 16


def test_wrong_arguments(tmp_path, ta_llava):
    source = write_json(tmp_path / "data.json", [record()])
    with pytest.raises(ValueError, match="no such folder"):
        prepare_dataset(source, ta_llava, image_folder=tmp_path / "none")
    with pytest.raises(ValueError, match='"error" or "skip", got \'drop\''):
        prepare_dataset(source, ta_llava, on_bad_sample="drop")
    with pytest.raises(ValueError, match="not a list"):
        prepare_dataset([record()], ta_llava)


# --- batches -------------------------------------------------------------------------------------------------------


def batch_items(processor, folder: Path, *images: list[str]) -> list[dict]:
    encoder = SampleEncoder(processor)
    samples = [
        read_sample(record("<image>" * len(row) + "q" * (index + 1), "a", image=row), index, folder)
        for index, row in enumerate(images)
    ]
    return [encoder(sample) for sample in samples]


def test_batches_are_padded_on_the_right(folder, any_processor):
    items = batch_items(any_processor, folder, ["one.png"], ["one.png", "two.png"], [])
    batch = Collator(any_processor)(items)
    for row, item in enumerate(items):
        length = item["length"]
        assert batch["input_ids"][row, :length].tolist() == item["input_ids"]
        assert batch["labels"][row, :length].tolist() == item["labels"]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert (batch["input_ids"][row, length:] == any_processor.tokenizer.pad_token_id).all()
        assert (batch["labels"][row, length:] == -100).all()
    flat = [str(folder / name) for name in ("one.png", "one.png", "two.png")]
    pixels = any_processor(images=flat, return_tensors="pt")["pixel_values"].flatten(0, -4)
    if isinstance(any_processor, TaLlavaProcessor):
        assert batch["image_mask"].tolist() == [[1, 0], [1, 1], [0, 0]]
        assert torch.equal(batch["pixel_values"][batch["image_mask"].bool()], pixels)
        assert not batch["pixel_values"][~batch["image_mask"].bool()].any()
    else:
        assert torch.equal(batch["pixel_values"], pixels) and "image_mask" not in batch
    assert set(Collator(any_processor)(items[2:])) == {"input_ids", "attention_mask", "labels"}


class Features:
    """Features of images by their names; no image is opened for them."""

    def get(self, image: str) -> torch.Tensor:
        return torch.full((4, 5), float(len(Path(image).name)))


def test_features_take_the_place_of_pixels(folder, any_processor):
    items = batch_items(any_processor, folder, ["none.png"], [], ["x.png", "none.png"])
    batch = Collator(any_processor, Features())(items)
    assert "pixel_values" not in batch
    if isinstance(any_processor, TaLlavaProcessor):
        assert batch["image_mask"].tolist() == [[1, 0], [0, 0], [1, 1]]
        assert batch["vision_features"].shape == (3, 2, 4, 5)
        assert batch["vision_features"][:, :, 0, 0].tolist() == [[8, 0], [0, 0], [5, 8]]
    else:
        assert batch["vision_features"].shape == (3, 4, 5)
        assert batch["vision_features"][:, 0, 0].tolist() == [8, 5, 8]


def test_images_that_vanished_and_tokenizers_without_padding(folder, any_processor):
    items = batch_items(any_processor, folder, ["none.png"])
    with pytest.raises(ValueError, match=r"Sample a: There is no image file '.*none.png'"):
        Collator(any_processor)(items)
    processor = build_llava()
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        Collator(processor)


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
