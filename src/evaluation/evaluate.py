"""
Scores a model on questions with known answers: what `ta-llava evaluate` does.

    from ta_llava.evaluation.evaluate import evaluate

    evaluate("checkpoints/ta-llava-tiny", "easy-vqa", "runs/easy-vqa")["scores"]["all"]

The output folder gets `predictions.jsonl`, batch by batch while the questions are asked, and at the end `results.json` and
`results.md`. An interrupted run resumes where it stopped; a finished one is only scored again. Descriptions of the images
that are made before the questions go to `descriptions.jsonl`.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..common.adapters import is_adapter, model_of_adapter
from ..common.errors import one_line
from ..common.loading import config_of
from ..common.sources import REPO_NAME
from ..data.samples import find_damaged_files
from ..inference import answer, load, load_processor
from .questions import HeldImage, Question
from .results import DESCRIPTIONS, PREDICTIONS, SETTINGS, EvaluationResults, EvaluationSettings, full_path
from .tasks import TASKS, Task, TaskOptions, build_task


# Files in the folder of a model that its answers depend on. Weights are known by size and date alone.
_MODEL_FILES = ("*config.json", "tokenizer*", "chat_template*", "*.safetensors")
_ANEW = "Choose another folder, or delete this one to begin anew."


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
    compiled: bool = False,
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
            `"easy-vqa"` asks the official test questions. `"json"` takes a file of samples in LLaVA's format with one
            question and its answer each, and `"folder"` the same as `save_to_disk` of `datasets` writes it; samples with
            a key `type` are also scored by type. `"pope"` asks about objects (see [`pope.build_questions`]), from a file of
            records with `image` and `objects`. `"if16"` measures how well instructions are followed.
        output_dir (`str` or `Path`):
            Folder for predictions and results.
        data (`str` or `Path`, *optional*):
            File of `"json"` and `"pope"`, folder of `"folder"`. `"if16"` takes either of these formats of samples instead
            of the test split of easy-VQA.
        image_folder (`str` or `Path`, *optional*):
            Folder that relative paths of images start from. Defaults to the folder of `data`.
        split (`str`, *optional*):
            Split to take from a folder with several.
        num_questions (`int`, *optional*):
            Size of an evenly spaced sample of the questions; all of them by default. `"pope"` asks in pairs, so an odd
            number becomes the next lower one, but at least 2. `"if16"` asks each question once with each instruction.
        num_visual_tokens, cmai_max_ratio (*optional*):
            VMTC and CMAI, see [`inference.load`].
        batch_size (`int`):
            Questions asked at a time; does not change an answer.
        max_new_tokens (`int`):
            Longest answer in tokens.
        compiled (`bool`):
            Compile the model, see [`inference.compile_model`]. Answers change by no more than rounding.
        strategy, objects_per_image, seed:
            Settings of `"pope"`, see [`pope.build_questions`]; `"if16"` has the seed too.
        describe_first (`bool`):
            Measure the upper limit of `"if16"`: the model describes the images of a question, in at most `max_new_tokens`
            and once for all questions about them, and is asked about its description instead of the images.
        benchmark (`str`, *optional*):
            Name of the data as a benchmark on the Hub, `"user/dataset"`, or `"user/dataset:task"` if it has several tasks.
            [`export_model`] then writes the score for its leaderboard.
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
    _check_task(task, describe_first, benchmark)
    _check_numbers(batch_size=batch_size, max_new_tokens=max_new_tokens, num_questions=num_questions)
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder for the results.")
    model_type, files_of_model = _check_model(model)
    options = TaskOptions(
        data=None if data is None else Path(data),
        image_folder=None if image_folder is None else Path(image_folder),
        split=split,
        num_questions=num_questions,
        strategy=strategy,
        objects_per_image=objects_per_image,
        seed=seed,
        describe_first=describe_first,
    )
    built = build_task(task, options)
    _check_images(built.questions, progress)
    settings = EvaluationSettings(
        task=task,
        model=full_path(model),
        visual_tokens=num_visual_tokens,
        cmai=cmai_max_ratio,
        max_new_tokens=max_new_tokens,
        data=None if data is None else full_path(data),
        num_questions=len(built.questions),
        files_of_model=files_of_model,
        content_of_data=_fingerprint(built.questions),
        **built.settings,
    )

    load_once = cache(lambda: load(model, num_visual_tokens, cmai_max_ratio, compiled))
    if not folder.exists():
        load_once()  # a model that cannot be loaded leaves no folder behind
    with _only_process_in(folder):
        _check_settings(folder, settings)
        run = _Run(folder, settings, load_once, batch_size, max_new_tokens, progress)
        scores = built.score(run.answer_all(built))
        results = EvaluationResults(str(model), model_type, scores, built.note, settings, benchmark)
        results.write(folder)
    return results.to_dict()


# --- what is checked before the model is loaded ----------------------------------------------------------------------


def _check_task(task: str, describe_first: bool, benchmark: str | None) -> None:
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}, only {', '.join(TASKS)}.")
    if describe_first and task != "if16":
        raise ValueError(
            f"Only if16 describes the images first, the task {task} does not; leave `describe_first` out."
        )
    if benchmark is not None and not re.fullmatch(rf"{REPO_NAME}(:[\w.-]+)?", benchmark):
        raise ValueError(f"A benchmark on the Hub is called USER/DATASET or USER/DATASET:TASK, not {benchmark!r}.")


def _check_numbers(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}.")


def _check_model(model: str | Path) -> tuple[str, str]:
    """
    The type of a model, and a fingerprint of what its answers depend on: the files of a folder, the commit of a Hub repo.

    Raises:
        `ValueError`: There is no config or no image processor.
    """
    if is_adapter(model):
        model_type, of_base = _check_model(model_of_adapter(model))
        return model_type, _digest_of_files(model, of_base)
    config = config_of(model)
    processor = load_processor(model, config)
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(
            f"{model} has no image processor, so it cannot be asked about images. Is it a language model alone, or is its "
            "processor_config.json missing?"
        )
    return config.model_type, _digest_of_files(model, str(getattr(config, "_commit_hash", None)))


def _check_images(questions: Sequence[Question], progress: bool) -> None:
    """Reads all images to their end, as training does. Raises `ValueError` if images are missing or damaged."""
    paths = (image for question in questions for image in question.images if isinstance(image, str))
    memory = Path(datasets.config.HF_DATASETS_CACHE) / "ta_llava_checked_images.jsonl"
    damaged = find_damaged_files(paths, memory, num_threads=os.cpu_count() or 1)
    find_damage = cache(_find_damage)  # several questions may have the same image
    bad = []
    for question in _progress_bar(questions, progress, desc="images", leave=False):
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


# --- what must stay the same when an interrupted run resumes ---------------------------------------------------------


def _digest_of_files(model: str | Path, beside: str) -> str:
    digest = hashlib.sha256(beside.encode())
    for path in sorted({path for pattern in _MODEL_FILES for path in Path(model).glob(pattern)}):
        status = path.stat()
        is_large = path.suffix == ".safetensors"
        digest.update(path.name.encode())
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode() if is_large else path.read_bytes())
    return digest.hexdigest()[:16]


def _fingerprint(questions: Sequence[Question]) -> str:
    """A fingerprint of the questions, their answers, and the names and sizes of their images."""
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


@contextmanager
def _only_process_in(folder: Path) -> Iterator[None]:
    """Makes a folder and locks it. Raises `ValueError` if another process has locked it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"Another process is writing to {folder}. Wait for it, or choose another folder.") from error


def _check_settings(folder: Path, settings: EvaluationSettings) -> None:
    """Raises `ValueError` if the folder has answers from a run with other settings."""
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
    now = settings.to_dict()
    for name in dict.fromkeys([*now, *begun_with]):
        if now.get(name) != begun_with.get(name):
            raise ValueError(
                f"{folder} was begun with `{name}` {begun_with.get(name)!r}, not {now.get(name)!r}. {_ANEW}"
            )


def _read_answers(path: Path, questions: Sequence[Question]) -> list[str]:
    """
    The answers that an earlier run has left, to the first of the questions. A last line that was cut off is removed.

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


@dataclass
class _Run:
    """Asks the questions of a task that are not answered in its folder yet."""

    folder: Path
    settings: EvaluationSettings
    load_once: Callable[[], tuple[PreTrainedModel, ProcessorMixin]]
    batch_size: int
    max_new_tokens: int
    progress: bool

    def answer_all(self, task: Task) -> list[str]:
        """The answers to the questions of a task, after the answers to what is asked before, if anything."""
        questions = task.questions
        if task.revise is not None:
            questions = task.revise(self._answer(task.requests, self.folder / DESCRIPTIONS))
        return self._answer(questions, self.folder / PREDICTIONS)

    def _answer(self, questions: Sequence[Question], path: Path) -> list[str]:
        """The answers that `path` has, and then the model's, which are appended to it batch by batch."""
        answers = _read_answers(path, questions)
        if len(answers) == len(questions):
            return answers
        loaded = self.load_once()
        self.settings.write(self.folder)
        bar = _progress_bar(None, self.progress, desc=path.stem, total=len(questions), initial=len(answers))
        with path.open("a", encoding="utf-8") as file, bar:
            for start in range(len(answers), len(questions), self.batch_size):
                batch = questions[start : start + self.batch_size]
                asked = [([_as_source(image) for image in question.images], question.text) for question in batch]
                given = list(answer(*loaded, asked, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens))
                file.write("".join(map(_prediction, batch, given)))
                file.flush()
                answers += given
                bar.update(len(batch))
        return answers


def _progress_bar(items: Sequence[Question] | None, progress: bool, **kwargs: Any) -> tqdm:
    return tqdm(items, unit="question", disable=None if progress else True, **kwargs)


def _as_source(image: str | HeldImage) -> Any:
    return image.open() if isinstance(image, HeldImage) else image


def _prediction(question: Question, given: str) -> str:
    """A line of the file of predictions."""
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
