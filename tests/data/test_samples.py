"""Records in the formats of LLaVA and TRL become samples; damaged images are found once."""

import pickle
from pathlib import Path

import pytest
from PIL import Image
from sample_records import record, save_images, turns

from ta_llava.data import samples
from ta_llava.data.samples import SampleError, find_damaged_files, read_sample


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_images(tmp_path / "images")


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
