"""Questions with known answers, read from files of records and from folders of `datasets`."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from ..common.errors import one_line
from ..data.samples import IMAGE, SampleError, open_image, read_sample
from ..encoded_images import encoded_bytes


@dataclass(frozen=True)
class HeldImage:
    """
    An image that is stored in a dataset, not in a file of its own. It is read when it is needed.

    Args:
        records (`Dataset`): Dataset whose images are not decoded.
        index (`int`): Index of the record.
        number (`int`): Place of the image among the images of the record.
    """

    records: datasets.Dataset
    index: int
    number: int

    def open(self) -> Image.Image:
        """The RGB image. Raises `ValueError` if it cannot be read."""
        return open_image(read_sample(self.records[self.index], self.index).images[self.number])


@dataclass
class Question:
    """
    One question and its answer.

    Args:
        id (`str`): Name of the question in messages and in the file of predictions.
        images (`list`): Images as paths or [`HeldImage`]s.
        text (`str`): The question.
        expected (`str`): The right answer; empty where any answer could be right.
        type (`str`, *optional*): Kind of question. Each kind gets a score of its own.
    """

    id: str
    images: list[Any]
    text: str
    expected: str = ""
    type: str | None = None


def read_question_file(path: Path, image_folder: str | Path | None) -> list[Question]:
    """
    Reads the questions of a JSON file of samples. Relative paths of images start from `image_folder`, or from the
    file's own folder.

    Raises:
        `ValueError`: The file cannot be read, or a sample is not one question and its answer about image files.
    """
    questions = read_questions(read_records(path), image_folder or path.parent, str(path))
    for question in questions:
        for image in question.images:
            if not isinstance(image, str) or encoded_bytes(image) is not None:
                raise ValueError(
                    f"Question {question.id} of {path} must name its images by paths, got {image!r:.100}."
                )
    return questions


def read_question_folder(path: Path, image_folder: str | Path | None, split: str | None) -> list[Question]:
    """
    Reads the questions of a folder that `save_to_disk` of `datasets` has written. Relative paths of images start from
    `image_folder`, or from the folder itself.

    Raises:
        `ValueError`: The folder cannot be read, has no such split, or a sample is not one question and its answer.
    """
    records = _without_decoding(_load_split(path, split))
    questions = read_questions(records, image_folder or path, str(path))
    if not questions:
        raise ValueError(f"There are no records in {path}.")
    for index, question in enumerate(questions):
        question.images = [
            image if isinstance(image, str) and encoded_bytes(image) is None else HeldImage(records, index, number)
            for number, image in enumerate(question.images)
        ]
    return questions


def read_records(path: str | Path) -> list[Any]:
    """
    Reads the records of a file with a JSON array, or with one JSON object per line.

    Raises:
        `ValueError`: There is no such file, it is a folder, it has neither format, or it has no records.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file of records. Folders of datasets are for folder and if16.")
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        records = json.loads(text) if text.startswith("[") else None
    except ValueError as error:  # of the encoding too
        raise ValueError(f"{path} is not JSON: {one_line(error)}") from error
    if records is None:
        records = _read_json_lines(text, path)
    if not records:
        raise ValueError(f"There are no records in {path}.")
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"Record {index} of {path} is not a JSON object, but {record!r:.100}.")
    return records


def _read_json_lines(text: str, path: Path) -> list[Any]:
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"{path} is neither an array of JSON nor JSON lines; line {number}: {one_line(error)}"
                ) from error
    return records


def _load_split(path: Path, split: str | None) -> datasets.Dataset:
    """The dataset of a folder: the split of that name, or the only one."""
    if not path.is_dir():
        raise ValueError(f"There is no folder {path}.")
    try:
        records = datasets.load_from_disk(str(path))
    except Exception as error:  # files may be missing or damaged in any way
        raise ValueError(f"{path} is no dataset that `save_to_disk` has written: {one_line(error)}") from error
    if isinstance(records, datasets.DatasetDict):
        name = next(iter(records)) if split is None and len(records) == 1 else split
        if name not in records:
            raise ValueError(f"{path} has the splits {', '.join(records)}; {split or 'none'} was asked for.")
        return records[name]
    if split is not None:
        raise ValueError(f"{path} has no splits; {split} was asked for.")
    return records


def _without_decoding(records: datasets.Dataset) -> datasets.Dataset:
    """The dataset with its images as they are stored: reading all records would decode them all."""
    for name, feature in records.features.items():
        if isinstance(feature, datasets.Image):
            records = records.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            records = records.cast_column(name, datasets.Sequence(datasets.Image(decode=False)))
    return records


def read_questions(records: Iterable[Mapping[str, Any]], image_folder: str | Path, source: str) -> list[Question]:
    """
    Turns samples in the format of LLaVA or TRL into questions.

    Args:
        records (`Iterable[Mapping]`): Samples, see [`read_sample`].
        image_folder (`str` or `Path`): Folder that relative paths of images start from.
        source (`str`): Name of the data in error messages.

    Raises:
        [`SampleError`]: A sample is not one question and its answer.
    """
    return [_read_question(record, index, image_folder, source) for index, record in enumerate(records)]


def _read_question(record: Mapping[str, Any], index: int, image_folder: str | Path, source: str) -> Question:
    name = str(index) if record.get("id") is None else str(record["id"])
    turns = record.get("conversations") or record.get("messages")
    last = turns[-1] if isinstance(turns, list) else None
    if isinstance(last, Mapping) and (last.get("from") or last.get("role")) in ("human", "user"):
        raise SampleError(name, index, source, "It has no answer to compare with.")
    sample = read_sample(record, index, image_folder, source)
    roles = [message["role"] for message in sample.messages]
    if roles != ["user", "assistant"]:
        raise SampleError(
            name, index, source, f"It has the turns {', '.join(roles)}, but must have one question and its answer."
        )
    text, expected = (_text_of(message["content"]) for message in sample.messages)
    if IMAGE in text:
        raise SampleError(name, index, source, f"It has {IMAGE} inside its question, but images must come before it.")
    kind = record.get("type")
    if kind is not None and (not isinstance(kind, str) or not kind or kind == "all"):
        raise SampleError(name, index, source, f'Its `type` must be a name, and not "all", got {kind!r}.')
    return Question(sample.id, sample.images, text, expected, kind)


def _text_of(content: str | list[dict]) -> str:
    """The text without the images before and after it."""
    if isinstance(content, list):
        content = "".join(IMAGE if item["type"] == "image" else item["text"] for item in content)
    return re.sub(rf"^(\s*{IMAGE})+|({IMAGE}\s*)+$", "", content).strip()
