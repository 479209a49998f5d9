"""
How well a model answers questions whose answers are known: what `ta-llava evaluate` does.

    from ta_llava.evaluation.evaluate import evaluate

    evaluate("checkpoints/ta-llava-tiny", "easy-vqa", "runs/easy-vqa")["scores"]["all"]

The output folder gets `predictions.jsonl`, batch by batch while the questions are asked, and at the end `results.json` and
`results.md`. A run that was interrupted goes on where it was; one that is finished is only scored again. What is asked
before the questions, to describe the images, is answered in `descriptions.jsonl`.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import AutoProcessor

from ..common.adapters import is_adapter, model_of_adapter
from ..common.errors import one_line
from ..common.files import write_text
from ..common.loading import config_of, loading_from
from ..common.sources import REPO_NAME
from ..data.samples import find_damaged_files
from ..inference import answer, load
from .results import DESCRIPTIONS, PREDICTIONS, RESULTS, SETTINGS, TABLE, describe_evaluation, format_table, full_path
from .tasks import TASKS, HeldImage, Question, build_task


# What the answers depend on besides the weights, of which size and date are looked at, in the folder of a model.
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
    if benchmark is not None and not re.fullmatch(rf"{REPO_NAME}(:[\w.-]+)?", benchmark):
        raise ValueError(f"A benchmark on the Hub is called USER/DATASET or USER/DATASET:TASK, not {benchmark!r}.")
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder for the results.")
    model_type, files_of_model = _check_model(model)
    built = build_task(
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
