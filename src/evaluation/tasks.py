"""Tasks of the evaluation: their questions, and how answers are scored."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets

from ..common.errors import one_line
from ..data.easy_vqa import QUESTION_TYPES, load_easy_vqa, question_type, wording_prior
from ..data.samples import IMAGE, SampleError, locate_image, open_image, read_sample
from ..encoded_images import encoded_bytes
from . import pope
from .results import DESCRIPTIONS, Scores


TASKS = ("easy-vqa", "json", "folder", "pope", "if16")


@dataclass(frozen=True)
class HeldImage:
    """
    An image that lies in a dataset, not in a file of its own; it is read when it is needed.

    Args:
        records (`Dataset`): With images that are not decoded.
        index (`int`): Its record.
        number (`int`): Its place among the images of the record.
    """

    records: datasets.Dataset
    index: int
    number: int

    def open(self) -> Any:
        """The RGB image. Raises `ValueError` if it cannot be read."""
        return open_image(read_sample(self.records[self.index], self.index).images[self.number])


@dataclass
class Question:
    """
    One question and its answer.

    Args:
        id (`str`): For messages and the file of predictions.
        images (`list`): Path or [`HeldImage`] each.
        text (`str`): The question.
        expected (`str`): The answer; empty where any could be right.
        type (`str`, *optional*): Kind of question, which is scored on its own too.
    """

    id: str
    images: list[Any]
    text: str
    expected: str = ""
    type: str | None = None


@dataclass
class Task:
    """
    Questions, and how answers to them are scored.

    Args:
        questions (`list[Question]`): In the order in which they are asked.
        score (`Callable`): From the answers, in that order, to scores by name of a row of the table.
        note (`str`): What the scores are, for the reader.
        settings (`dict`): What the questions were made with, where a task has such.
        requests (`list[Question]`): What is asked before, if anything.
        revise (`Callable`): From the answers to the requests to the questions as they are asked then.
    """

    questions: list[Question]
    score: Callable[[list[str]], Scores]
    note: str
    settings: dict[str, Any] = field(default_factory=dict)
    requests: list[Question] = field(default_factory=list)
    revise: Callable[[list[str]], list[Question]] | None = None


# --- tasks ---------------------------------------------------------------------------------------------------------


def build_task(
    task: str,
    data: str | Path | None,
    image_folder: str | Path | None,
    split: str | None,
    num_questions: int | None,
    describe_first: bool,
    **settings: Any,
) -> Task:
    if task == "easy-vqa" and data is not None:
        raise ValueError(f"easy-vqa brings its own data, so {data} would not be used.")
    if task in ("json", "folder", "pope") and data is None:
        raise ValueError(f"The task {task} needs data: name its {'folder' if task == 'folder' else 'file'}.")
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(f"There is no folder {image_folder} of images.")
    if task == "pope":
        return _pope(Path(str(data)), image_folder, num_questions, **settings)
    if task == "easy-vqa" or data is None:
        questions, score, note = _easy_vqa()
        if task == "if16":
            questions = one_per_image(questions)
    elif task == "folder" or (task == "if16" and Path(data).is_dir()):
        questions = _read_folder(Path(data), image_folder, split)
        score, note = _exact_match, _EXACT_MATCH
    else:
        questions = _read_file(Path(data), image_folder)
        score, note = _exact_match, _EXACT_MATCH
    questions = evenly_spaced(questions, num_questions)
    if task == "if16":
        return _instruction_following(questions, settings["seed"], describe_first)
    return Task(questions, lambda answers: score(questions, answers), note)


_EXACT_MATCH = "accuracy: share of answers that are the expected one, white space around it aside."


def _exact_match(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Per type, in the order in which they come, and over `"all"`: `questions` and `accuracy`."""
    total: dict[str, list[bool]] = {}
    for question, given in zip(questions, answers):
        if question.type is not None:
            total.setdefault(question.type, []).append(given.strip() == question.expected.strip())
    total["all"] = [given.strip() == question.expected.strip() for question, given in zip(questions, answers)]
    return {
        name: {"questions": len(correct), "accuracy": sum(correct) / len(correct)} for name, correct in total.items()
    }


def _easy_vqa() -> tuple[list[Question], Callable[[Sequence[Question], Sequence[str]], Scores], str]:
    try:
        test = load_easy_vqa("test")
    except ImportError as error:
        raise ValueError(one_line(error)) from error
    questions = [
        Question(f"{Path(scene.path).stem}-{index}", [scene.path], text, expected, question_type(text, expected))
        for scene in test
        for index, (text, expected) in enumerate(scene.questions)
    ]

    def score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        scores = _exact_match(questions, answers)
        prior = wording_prior(load_easy_vqa("train"), test)
        return {name: {**scores[name], "prior": prior[name]} for name in (*QUESTION_TYPES, "all") if name in scores}

    note = f"{_EXACT_MATCH} prior: that of the most frequent training answer to the same wording, without the image."
    return questions, score, note


def _pope(
    data: Path,
    image_folder: str | Path | None,
    num_questions: int | None,
    strategy: str,
    objects_per_image: int,
    seed: int,
) -> Task:
    pope.load_metrics()  # which are an extra
    records = read_records(data)
    folder = image_folder or data.parent
    try:
        asked = pope.build_questions(records, strategy, objects_per_image, seed)
        images = {each.image: locate_image(each.image, folder) for each in asked}
    except ValueError as error:
        raise ValueError(f"{data}: {error}") from error
    # In pairs, lest a sample holds more of one answer than of the other.
    pairs = list(zip(asked[::2], asked[1::2]))
    chosen = evenly_spaced(pairs, None if num_questions is None else max(num_questions // 2, 1))
    questions = [
        Question(f"{each.image}-{each.object}", [images[each.image]], each.text, each.expected)
        for pair in chosen
        for each in pair
    ]

    def score(answers: list[str]) -> Scores:
        scores = pope.score(answers, [question.expected for question in questions])
        return {strategy: {"questions": len(answers), **scores}}

    note = (
        'As in POPE: an answer with "no" or "not" in its first sentence says no, any other yes; precision, recall and f1 '
        "are those of yes."
    )
    return Task(questions, score, note, {"strategy": strategy, "objects_per_image": objects_per_image, "seed": seed})


def _instruction_following(questions: list[Question], seed: int, describe_first: bool) -> Task:
    """Every question with each of the instructions."""
    from .instruction_following import (
        build_prompts,
        description_request,
        load_checkers,
        prompt_from_description,
        score,
    )

    load_checkers()  # which are an extra
    prompts = build_prompts([(question.images, question.text) for question in questions], seed)
    ids = [question.id for question in questions for _ in range(len(prompts) // len(questions))]
    asked = [
        Question(f"{name}-{prompt.task}", prompt.images, prompt.prompt, type=prompt.task)
        for name, prompt in zip(ids, prompts)
    ]

    def score_all(answers: list[str]) -> Scores:
        rates = score(prompts, answers)
        return {name: {"questions": row["asked"], "success_rate": row["success_rate"]} for name, row in rates.items()}

    note = "success rate: share of answers that follow the instruction, whatever they say; average: that of the rates."
    if not describe_first:
        return Task(asked, score_all, note, {"seed": seed})

    requests = []
    for question in one_per_image(questions):
        if not question.images:
            raise ValueError(
                f"Question {question.id} has no image to describe first: leave it out, or ask without `describe_first`."
            )
        images, text = description_request(question.images)
        requests.append(Question(f"{question.id}-description", images, text))

    def revise(descriptions: list[str]) -> list[Question]:
        found = {tuple(request.images): text for request, text in zip(requests, descriptions)}
        return [
            replace(question, images=[], text=prompt_from_description(prompt, found[tuple(prompt.images)]).prompt)
            for question, prompt in zip(asked, prompts)
        ]

    note += f" Upper limit: asked about the model's own descriptions ({DESCRIPTIONS}) instead of the images."
    return Task(asked, score_all, note, {"seed": seed, "describe_first": True}, requests, revise)


def one_per_image(questions: Sequence[Question]) -> list[Question]:
    """
    The last of the questions about each image, or about the same images, in the order of the images; and all without one.
    """
    return list({tuple(question.images) or question.id: question for question in questions}.values())


def evenly_spaced(items: list[Any], count: int | None) -> list[Any]:
    """So many of the items, from the first on; all of them if `count` is `None` or there are no more."""
    if count is None or count >= len(items):
        return items
    return [items[index * len(items) // count] for index in range(count)]


# --- data ----------------------------------------------------------------------------------------------------------


def read_records(path: str | Path) -> list[Any]:
    """
    The records of a file with a JSON array, or with one JSON object a line.

    Raises:
        `ValueError`: There is no such file, or it is a folder, neither of the two, or empty.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file of records. Folders of datasets are for folder and if16.")
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON: {one_line(error)}") from error
    records: list[Any] = []
    if text.startswith("["):
        try:
            records = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {one_line(error)}") from error
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(
                        f"{path} is neither an array of JSON nor JSON lines; line {number}: {one_line(error)}"
                    ) from error
    if not records:
        raise ValueError(f"There are no records in {path}.")
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"Record {index} of {path} is not a JSON object, but {record!r:.100}.")
    return records


def _read_file(path: Path, image_folder: str | Path | None) -> list[Question]:
    questions = read_questions(read_records(path), image_folder or path.parent, str(path))
    for question in questions:
        for image in question.images:
            if not isinstance(image, str) or encoded_bytes(image) is not None:
                raise ValueError(
                    f"Question {question.id} of {path} must name its images by paths, got {image!r:.100}."
                )
    return questions


def _read_folder(path: Path, image_folder: str | Path | None, split: str | None) -> list[Question]:
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
        records = records[name]
    elif split is not None:
        raise ValueError(f"{path} has no splits; {split} was asked for.")
    for name, feature in records.features.items():  # else all images would be decoded here
        if isinstance(feature, datasets.Image):
            records = records.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            records = records.cast_column(name, datasets.Sequence(datasets.Image(decode=False)))
    questions = read_questions(records, image_folder or path, str(path))
    if not questions:
        raise ValueError(f"There are no records in {path}.")
    for index, question in enumerate(questions):
        question.images = [
            image if isinstance(image, str) and encoded_bytes(image) is None else HeldImage(records, index, number)
            for number, image in enumerate(question.images)
        ]
    return questions


def read_questions(records: Iterable[Mapping[str, Any]], image_folder: str | Path, source: str) -> list[Question]:
    """
    The questions of samples in the format of LLaVA or TRL.

    Args:
        records (`Iterable[Mapping]`): See [`training_data.read_sample`].
        image_folder (`str` or `Path`): What relative paths of images start from.
        source (`str`): For error messages.

    Raises:
        [`SampleError`]: One of them is no sample of one question and its answer.
    """
    return [_read_question(record, index, image_folder, source) for index, record in enumerate(records)]


def _read_question(record: Mapping[str, Any], index: int, image_folder: str | Path, source: str) -> Question:
    """
    Raises:
        [`SampleError`]: It is no sample of one question and its answer.
    """
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
