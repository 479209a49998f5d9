"""
How well a model answers questions whose answers are known: what `ta-llava evaluate` does.

    from ta_llava.evaluate import evaluate

    evaluate("checkpoints/ta-llava-tiny", "easy-vqa", "runs/easy-vqa")["scores"]["all"]

The output folder gets `predictions.jsonl`, batch by batch while the questions are asked, and at the end `results.json` and
`results.md`. A run that was interrupted goes on where it was; one that is finished is only scored again. What is asked
before the questions, to describe the images, is answered in `descriptions.jsonl`.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import AutoProcessor

from . import pope
from .adapters import is_adapter, model_of_adapter
from .complete_files import write_text
from .easy_vqa_data import QUESTION_TYPES, load_easy_vqa, question_type, wording_prior
from .encoded_images import encoded_bytes
from .error_messages import config_of, loading_from, one_line
from .inference import answer, load
from .model_card import describe_evaluation, full_path
from .training_data import IMAGE, SampleError, find_damaged_files, locate_image, open_image, read_sample


TASKS = ("easy-vqa", "json", "folder", "pope", "if16")
PREDICTIONS, RESULTS, TABLE, SETTINGS = "predictions.jsonl", "results.json", "results.md", "settings.json"
DESCRIPTIONS = "descriptions.jsonl"

# What the answers depend on besides the weights, of which size and date are looked at, in the folder of a model.
_MODEL_FILES = ("*config.json", "tokenizer*", "chat_template*", "*.safetensors")
_ANEW = "Choose another folder, or delete this one to begin anew."

Scores = dict[str, dict[str, Any]]


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


def evaluate(
    model: str | Path,
    task: str,
    output_dir: str | Path,
    *,
    data: str | Path | None = None,
    image_folder: str | Path | None = None,
    split: str | None = None,
    num_questions: int | None = None,
    num_visual_tokens: int | None = None,
    cmai_max_ratio: float | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    strategy: str = "random",
    objects_per_image: int = 3,
    seed: int = 0,
    describe_first: bool = False,
    benchmark: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Asks a model the questions of a task, by greedy decoding, and scores its answers.

    Args:
        model (`str` or `Path`):
            Folder or Hub repo.
        task (`str`):
            One of `TASKS`: `"easy-vqa"`, the official test split; `"json"`, a file of samples in LLaVA's format, one
            question and its answer each, and `"folder"`, the same as `save_to_disk` of `datasets` writes it, with a key
            `type` where types are scored on their own; `"pope"`, questions about objects (see [`pope.build_questions`]),
            made from a file of records with `image` and `objects`; `"if16"`, how well instructions are followed.
        output_dir (`str` or `Path`):
            Folder for predictions and results.
        data (`str` or `Path`, *optional*):
            File of `"json"` and `"pope"`, folder of `"folder"`; for `"if16"` a file as of `"json"` or a folder as of
            `"folder"`, instead of the test split of easy-VQA.
        image_folder (`str` or `Path`, *optional*):
            What relative paths of images start from; where `data` lies by default.
        split (`str`, *optional*):
            Of a folder with several.
        num_questions (`int`, *optional*):
            Evenly spaced sample of so many questions; all of them by default. Those of `"pope"` come in pairs, so an odd
            number becomes the next lower one, but at least 2; those of `"if16"` are asked once with each instruction.
        num_visual_tokens, cmai_max_ratio (*optional*):
            VMTC and CMAI, see [`inference.load`].
        batch_size (`int`):
            Questions asked at a time; does not change an answer.
        max_new_tokens (`int`):
            Longest answer in tokens.
        strategy, objects_per_image, seed:
            Of `"pope"`, see [`pope.build_questions`]; the seed also of `"if16"`.
        describe_first (`bool`):
            Of `"if16"`: its upper limit. The model describes the images of a question, in at most `max_new_tokens` too and
            once for all questions about them, and is asked about its description instead of the images.
        benchmark (`str`, *optional*):
            What the data are called as a benchmark on the Hub, `"user/dataset"`, or `"user/dataset:task"` where it has
            several, for its leaderboard: [`export_model`] writes the score as the Hub wants it.
        progress (`bool`):
            Show progress bars.

    Returns:
        `dict`: What is in `results.json`: `model`, `model_type`, `task`, `scores` (a dict per row of the table), `note`,
        `settings` and `benchmark`.

    Raises:
        `ValueError`: Before the model is loaded, if there is no such task, its data cannot be used, an image is missing or
            damaged, there is none to describe first, the model has no image processor, or the output folder holds
            something else.
    """
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}, only {', '.join(TASKS)}.")
    numbers = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "num_questions": num_questions}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}.")
    if describe_first and task != "if16":
        raise ValueError(
            f"Only if16 describes the images first, the task {task} does not; leave `describe_first` out."
        )
    if benchmark is not None and not re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", benchmark):
        raise ValueError(f"A benchmark on the Hub is called USER/DATASET or USER/DATASET:TASK, not {benchmark!r}.")
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder for the results.")
    model_type, files_of_model = _check_model(model)
    built = _build_task(
        task,
        data,
        image_folder,
        split,
        num_questions,
        describe_first,
        strategy=strategy,
        objects_per_image=objects_per_image,
        seed=seed,
    )
    _check_images(built.questions, progress)
    settings = {
        "task": task,
        "model": full_path(model),
        "visual_tokens": num_visual_tokens,
        "cmai": cmai_max_ratio,
        "max_new_tokens": max_new_tokens,
        "data": None if data is None else full_path(data),
        **built.settings,
        "num_questions": len(built.questions),
        "files_of_model": files_of_model,
        "content_of_data": _fingerprint(built.questions),
    }

    load_once = cache(lambda: load(model, num_visual_tokens, cmai_max_ratio))
    if not folder.exists():
        load_once()  # what cannot be loaded leaves no folder behind
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            _check_settings(folder, settings)

            def ask(questions: Sequence[Question], path: Path) -> list[str]:
                answers = _read_answers(path, questions)
                if len(answers) < len(questions):
                    loaded = load_once()
                    write_text(folder / SETTINGS, _as_json(settings))
                    _ask(loaded, questions, answers, path, batch_size, max_new_tokens, progress)
                return answers

            questions = built.questions
            if built.revise is not None:
                questions = built.revise(ask(built.requests, folder / DESCRIPTIONS))
            answers = ask(questions, folder / PREDICTIONS)
            scores = built.score(answers)
            results = {
                "model": str(model),
                "model_type": model_type,
                "task": task,
                "scores": scores,
                "note": built.note,
                "settings": settings,
                "benchmark": benchmark,
            }
            write_text(folder / RESULTS, _as_json(results))
            title = describe_evaluation(task, settings)
            write_text(folder / TABLE, f"# {model}: {title}\n\n{format_table(scores)}\n\n{built.note}\n")
    except Timeout as error:
        raise ValueError(f"Another process is writing to {folder}. Wait for it, or choose another folder.") from error
    return results


def format_table(scores: Scores) -> str:
    """The scores as a Markdown table: a row each, shares in per cent."""
    columns = list(dict.fromkeys(column for row in scores.values() for column in row))
    lines = ["| | " + " | ".join(column.replace("_", " ") for column in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for name, row in scores.items():
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(column)) for column in columns) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2%}" if isinstance(value, float) else str(value)


# --- tasks ---------------------------------------------------------------------------------------------------------


def _build_task(
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


def _check_images(questions: Sequence[Question], progress: bool) -> None:
    """Reads all images to their end, as training does; raises `ValueError` for those that cannot be."""
    paths = (image for question in questions for image in question.images if isinstance(image, str))
    memory = Path(datasets.config.HF_DATASETS_CACHE) / "ta_llava_checked_images.jsonl"
    damaged = find_damaged_files(paths, memory, num_threads=os.cpu_count() or 1)
    bad = []
    off = None if progress else True
    find_damage = cache(_find_damage)  # images may come in several questions
    for question in tqdm(questions, desc="images", unit="question", leave=False, disable=off):
        for image in question.images:
            reason = damaged.get(image, "") if isinstance(image, str) else find_damage(image)
            if reason:
                bad.append(f"Question {question.id}: {reason}")
    if bad:
        more = f" ({len(bad) - 1} more images are missing or damaged.)" if len(bad) > 1 else ""
        raise ValueError(bad[0] + more)


def _find_damage(image: HeldImage) -> str:
    try:
        image.open()
    except ValueError as error:
        return one_line(error)
    return ""


# --- what must not change while a run is interrupted -----------------------------------------------------------------


def _check_model(model: str | Path) -> tuple[str, str]:
    """
    The type of a model, and what its answers depend on, as a short text: of a folder its files, of a Hub repo the commit.

    Raises:
        `ValueError`: There is no config or no image processor.
    """
    if is_adapter(model):
        model_type, of_base = _check_model(model_of_adapter(model))
        return model_type, _digest_of_files(model, of_base)
    config = config_of(model)
    with loading_from(model):
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(
            f"{model} has no image processor, so it cannot be asked about images. Is it a language model alone, or is its "
            "processor_config.json missing?"
        )
    return config.model_type, _digest_of_files(model, str(getattr(config, "_commit_hash", None)))


def _digest_of_files(model: str | Path, beside: str) -> str:
    digest = hashlib.sha256(beside.encode())
    for path in sorted({path for pattern in _MODEL_FILES for path in Path(model).glob(pattern)}):
        status = path.stat()
        is_large = path.suffix == ".safetensors"
        digest.update(path.name.encode())
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode() if is_large else path.read_bytes())
    return digest.hexdigest()[:16]


def _fingerprint(questions: Sequence[Question]) -> str:
    """What is asked, as a short text: the questions with their answers, and names and sizes of the images."""
    digest = hashlib.sha256()
    for question in questions:
        images = [
            [os.path.basename(image), os.path.getsize(image)]
            if isinstance(image, str)
            else [image.records._fingerprint, image.index]
            for image in question.images
        ]
        asked = [question.id, images, question.text, question.expected, question.type]
        digest.update(json.dumps(asked, ensure_ascii=False).encode())  # a broken character shows here
    return digest.hexdigest()[:16]


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """
    Raises:
        `ValueError`: The folder has answers from a run with other settings.
    """
    paths = (folder / DESCRIPTIONS, folder / PREDICTIONS)
    begun = [path.name for path in paths if path.is_file() and b"\n" in path.read_bytes()]
    if not begun:
        return
    try:
        begun_with = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if not isinstance(begun_with, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has {begun[0]}, but no {SETTINGS} that says what they are of ({one_line(error)}). {_ANEW}"
        ) from error
    for name in dict.fromkeys([*settings, *begun_with]):
        if settings.get(name) != begun_with.get(name):
            raise ValueError(
                f"{folder} was begun with `{name}` {begun_with.get(name)!r}, not {settings.get(name)!r}. {_ANEW}"
            )


def _read_answers(path: Path, questions: Sequence[Question]) -> list[str]:
    """
    The answers that an earlier run has left, to the first of the questions. A last line that was cut off is taken away.

    Raises:
        `ValueError`: The file was changed.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    answers = []
    for number, line in enumerate(complete.decode(errors="replace").split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
            if [record["id"], record["question"]] != [questions[number - 1].id, questions[number - 1].text]:
                raise ValueError("it is not about the question that was asked")
            answers.append(str(record["answer"]))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}, line {number} is not as it was written: {one_line(error)}. {_ANEW}") from error
    if len(complete) < len(content):
        os.truncate(path, len(complete))
    return answers


# --- asking ---------------------------------------------------------------------------------------------------------


def _ask(
    loaded: tuple[Any, Any],
    questions: Sequence[Question],
    answers: list[str],
    path: Path,
    batch_size: int,
    max_new_tokens: int,
    progress: bool,
) -> None:
    """Asks what is not answered yet; the answers are appended to `answers` and, batch by batch, to the file."""
    off = None if progress else True
    bar = tqdm(desc=path.stem, total=len(questions), initial=len(answers), unit="question", disable=off)
    with path.open("a", encoding="utf-8") as file, bar:
        for start in range(len(answers), len(questions), batch_size):
            batch = questions[start : start + batch_size]
            asked = [([_as_source(image) for image in question.images], question.text) for question in batch]
            given = list(answer(*loaded, asked, batch_size=batch_size, max_new_tokens=max_new_tokens))
            file.write("".join(map(_prediction, batch, given)))
            file.flush()
            answers += given
            bar.update(len(batch))


def _as_source(image: Any) -> Any:
    return image.open() if isinstance(image, HeldImage) else image


def _prediction(question: Question, given: str) -> str:
    record: dict[str, Any] = {"id": question.id}
    if question.type is not None:
        record["type"] = question.type
    images = [image for image in question.images if isinstance(image, str)]
    if images:
        record["image"] = images[0] if len(images) == 1 else images
    record["question"] = question.text
    if question.expected:
        record["expected"] = question.expected
    record["answer"] = given
    return json.dumps(record, ensure_ascii=False) + "\n"


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
