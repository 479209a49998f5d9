"""LLaVA's JSON and chat messages become batches: nothing bad is trained on, and nothing is lost."""

import base64
import json
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
from sample_records import (
    GEMMA_TEXT,
    build_llava,
    build_ta_llava,
    record,
    turns,
    write_json,
)

from ta_llava import TaLlavaProcessor
from ta_llava.data import samples
from ta_llava.data.report import DataReport
from ta_llava.data.samples import SampleError, read_sample
from ta_llava.training.dataset import COLUMNS, Collator, iterate_images, prepare_dataset
from ta_llava.training.encoding import SampleEncoder


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
