"""The tasks of the evaluation: for each, a function that builds its questions and says how answers are scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ..common.errors import one_line
from ..data.easy_vqa import QUESTION_TYPES, Scene, load_easy_vqa, question_type, wording_prior
from ..data.samples import locate_image
from . import instruction_following, pope
from .questions import Question, read_question_file, read_question_folder, read_records
from .results import DESCRIPTIONS, Scores


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """
    What a user chooses about a task; see [`evaluate`] for each of them.
    """

    data: Path | None = None
    image_folder: Path | None = None
    split: str | None = None
    num_questions: int | None = None
    strategy: str = "random"
    objects_per_image: int = 3
    seed: int = 0
    describe_first: bool = False


@dataclass
class Task:
    """
    Questions, and how answers to them are scored.

    Args:
        questions (`list[Question]`): The questions in the order in which they are asked.
        score (`Callable`): Turns the answers, in that order, into scores by row of the table.
        note (`str`): Tells the reader what the scores are.
        settings (`dict`): Fields of [`EvaluationSettings`] that belong to this task.
        requests (`list[Question]`): What is asked before the questions, if anything.
        revise (`Callable`, *optional*): Turns the answers to the requests into the questions that are asked then.
    """

    questions: list[Question]
    score: Callable[[list[str]], Scores]
    note: str
    settings: dict[str, Any] = field(default_factory=dict)
    requests: list[Question] = field(default_factory=list)
    revise: Callable[[list[str]], list[Question]] | None = None


def build_task(name: str, options: TaskOptions) -> Task:
    """
    Builds the questions of a task.

    Raises:
        `ValueError`: The data are missing, cannot be used, or are not for this task; or a package is missing.
    """
    if options.image_folder is not None and not options.image_folder.is_dir():
        raise ValueError(f"There is no folder {options.image_folder} of images.")
    return TASKS[name](options)


# --- exact match: easy-vqa, json and folder ------------------------------------------------------------------------

_EXACT_MATCH = "accuracy: share of answers that are the expected one, white space around it aside."


def build_easy_vqa(options: TaskOptions) -> Task:
    """The official test questions of easy-VQA, with the accuracy of a guess from their wording alone beside the model's."""
    if options.data is not None:
        raise ValueError(f"easy-vqa brings its own data, so {options.data} would not be used.")
    test = _easy_vqa_test()
    questions = evenly_spaced(_easy_vqa_questions(test), options.num_questions)

    def score(answers: Sequence[str]) -> Scores:
        scores = score_exact_match(questions, answers)
        prior = wording_prior(load_easy_vqa("train"), test)
        return {name: {**scores[name], "prior": prior[name]} for name in (*QUESTION_TYPES, "all") if name in scores}

    note = f"{_EXACT_MATCH} prior: that of the most frequent training answer to the same wording, without the image."
    return Task(questions, score, note)


def build_json(options: TaskOptions) -> Task:
    """A file of samples in LLaVA's format, one question and its answer each."""
    if options.data is None:
        raise ValueError("The task json needs data: name its file.")
    return _build_exact_match(read_question_file(options.data, options.image_folder), options)


def build_folder(options: TaskOptions) -> Task:
    """The same samples in a folder of `datasets`."""
    if options.data is None:
        raise ValueError("The task folder needs data: name its folder.")
    return _build_exact_match(read_question_folder(options.data, options.image_folder, options.split), options)


def _build_exact_match(questions: list[Question], options: TaskOptions) -> Task:
    questions = evenly_spaced(questions, options.num_questions)
    return Task(questions, lambda answers: score_exact_match(questions, answers), _EXACT_MATCH)


def score_exact_match(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """`questions` and `accuracy` of each type, in the order of the types' first questions, and of `"all"`."""
    correct: dict[str, list[bool]] = {}
    for question, given in zip(questions, answers):
        if question.type is not None:
            correct.setdefault(question.type, []).append(given.strip() == question.expected.strip())
    correct["all"] = [given.strip() == question.expected.strip() for question, given in zip(questions, answers)]
    return {name: {"questions": len(each), "accuracy": sum(each) / len(each)} for name, each in correct.items()}


def _easy_vqa_test() -> list[Scene]:
    try:
        return load_easy_vqa("test")
    except ImportError as error:
        raise ValueError(one_line(error)) from error


def _easy_vqa_questions(scenes: list[Scene]) -> list[Question]:
    return [
        Question(f"{Path(scene.path).stem}-{index}", [scene.path], text, expected, question_type(text, expected))
        for scene in scenes
        for index, (text, expected) in enumerate(scene.questions)
    ]


# --- pope ----------------------------------------------------------------------------------------------------------


def build_pope(options: TaskOptions) -> Task:
    """Questions about objects that are in an image and about objects that are not, from a file of records."""
    if options.data is None:
        raise ValueError("The task pope needs data: name its file.")
    pope.load_metrics()  # an extra: it must be there before anything is asked
    records = read_records(options.data)
    folder = options.image_folder or options.data.parent
    try:
        asked = pope.build_questions(records, options.strategy, options.objects_per_image, options.seed)
        images = {each.image: locate_image(each.image, folder) for each in asked}
    except ValueError as error:
        raise ValueError(f"{options.data}: {error}") from error
    # In pairs, so that a sample has as many questions with the answer yes as with no.
    pairs = list(zip(asked[::2], asked[1::2]))
    chosen = evenly_spaced(pairs, None if options.num_questions is None else max(options.num_questions // 2, 1))
    questions = [
        Question(f"{each.image}-{each.object}", [images[each.image]], each.text, each.expected)
        for pair in chosen
        for each in pair
    ]

    def score(answers: list[str]) -> Scores:
        scores = pope.score(answers, [question.expected for question in questions])
        return {options.strategy: {"questions": len(answers), **scores}}

    note = (
        'As in POPE: an answer with "no" or "not" in its first sentence says no, any other yes; precision, recall and f1 '
        "are those of yes."
    )
    names = ("strategy", "objects_per_image", "seed")
    return Task(questions, score, note, {name: getattr(options, name) for name in names})


# --- if16 ----------------------------------------------------------------------------------------------------------


def build_if16(options: TaskOptions) -> Task:
    """Every question with each of the 16 instructions of [`instruction_following`]."""
    questions = evenly_spaced(_questions_to_instruct(options), options.num_questions)
    instruction_following.load_checkers()  # an extra: it must be there before anything is asked
    prompts = instruction_following.build_prompts(
        [(question.images, question.text) for question in questions], options.seed
    )
    ids = [question.id for question in questions for _ in range(len(prompts) // len(questions))]
    asked = [
        Question(f"{name}-{prompt.task}", prompt.images, prompt.prompt, type=prompt.task)
        for name, prompt in zip(ids, prompts)
    ]

    def score(answers: list[str]) -> Scores:
        rates = instruction_following.score(prompts, answers)
        return {name: {"questions": row["asked"], "success_rate": row["success_rate"]} for name, row in rates.items()}

    note = "success rate: share of answers that follow the instruction, whatever they say; average: that of the rates."
    task = Task(asked, score, note, {"seed": options.seed})
    return _with_descriptions(task, questions, prompts) if options.describe_first else task


def _questions_to_instruct(options: TaskOptions) -> list[Question]:
    """The questions of a file or folder; without data one question about each test image of easy-VQA."""
    if options.data is None:
        return one_per_image(_easy_vqa_questions(_easy_vqa_test()))
    if options.data.is_dir():
        return read_question_folder(options.data, options.image_folder, options.split)
    return read_question_file(options.data, options.image_folder)


def _with_descriptions(task: Task, questions: list[Question], prompts: Sequence[instruction_following.Prompt]) -> Task:
    """The upper limit of the task: the model first describes the images, and is then asked about its descriptions."""
    requests = []
    for question in one_per_image(questions):
        if not question.images:
            raise ValueError(
                f"Question {question.id} has no image to describe first: leave it out, or ask without `describe_first`."
            )
        images, text = instruction_following.description_request(question.images)
        requests.append(Question(f"{question.id}-description", images, text))

    def revise(descriptions: list[str]) -> list[Question]:
        found = {tuple(request.images): text for request, text in zip(requests, descriptions)}
        described = [
            instruction_following.prompt_from_description(prompt, found[tuple(prompt.images)]) for prompt in prompts
        ]
        return [
            replace(question, images=[], text=prompt.prompt) for question, prompt in zip(task.questions, described)
        ]

    note = f"{task.note} Upper limit: asked about the model's own descriptions ({DESCRIPTIONS}) instead of the images."
    settings = {**task.settings, "describe_first": True}
    return replace(task, note=note, settings=settings, requests=requests, revise=revise)


def one_per_image(questions: Sequence[Question]) -> list[Question]:
    """
    The last question about each image (or about the same images), in the order of the images, and all questions without
    an image.
    """
    return list({tuple(question.images) or question.id: question for question in questions}.values())


def evenly_spaced(items: list[T], count: int | None) -> list[T]:
    """`count` of the items, evenly spaced from the first; all of them if `count` is `None` or there are no more."""
    if count is None or count >= len(items):
        return items
    return [items[index * len(items) // count] for index in range(count)]


TASKS: dict[str, Callable[[TaskOptions], Task]] = {
    "easy-vqa": build_easy_vqa,
    "json": build_json,
    "folder": build_folder,
    "pope": build_pope,
    "if16": build_if16,
}
