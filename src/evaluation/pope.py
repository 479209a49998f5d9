"""
Asks about objects that are in an image and about objects that are not, to show whether a model sees what is not there.

This is POPE (Li et al. 2023, *Evaluating Object Hallucination in Large Vision-Language Models*) for any images whose objects
are known. Each image has a record `{"image": "kitchen.jpg", "objects": ["knife", "oven"]}`.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from transformers.utils import logging

from ..common.errors import how_to_install


logger = logging.get_logger(__name__)

STRATEGIES = ("random", "popular", "adversarial")


@dataclass
class PopeQuestion:
    """
    One question.

    Args:
        image (`str`): Path as in the record.
        object (`str`): Name of the object that is asked about.
        text (`str`): The question.
        expected (`str`): "yes" or "no".
    """

    image: str
    object: str
    text: str
    expected: str


def build_questions(
    records: Sequence[Mapping[str, Any]], strategy: str = "random", objects_per_image: int = 3, seed: int = 0
) -> list[PopeQuestion]:
    """
    Builds questions about each image: in turn one about an object that is in it, and one about an object that is not.

    Present objects are drawn at random by the seed alone, so they are the same with all strategies. Absent objects come from
    the other images. `"random"` draws them at random. `"popular"` takes those that most images have. `"adversarial"` takes
    those that appear most often together with the objects of the image; among equals, the one that more images have comes
    first, and then the alphabet decides. Images with too few objects are left out, as in POPE, and counted in a warning.

    Args:
        records (`Sequence[Mapping]`): Records with `image`, a path, and `objects`, a list of names. Case does not matter.
        strategy (`str`): One of `STRATEGIES`.
        objects_per_image (`int`): Number of present objects, and of absent ones, to ask about per image.
        seed (`int`): Seed of the random draws.

    Raises:
        `ValueError`: A record has no image or no objects, an image comes twice, or there are too few objects.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"There is no strategy {strategy!r} of POPE, only {', '.join(STRATEGIES)}.")
    if objects_per_image < 1:
        raise ValueError(f"`objects_per_image` must be at least 1, got {objects_per_image}.")
    all_present = _read_objects(records)
    present = {image: names for image, names in all_present.items() if len(names) >= objects_per_image}
    if not present:
        most = max(len(names) for names in all_present.values())
        raise ValueError(
            f"The questions need {objects_per_image} objects that are in an image, but no image has more than {most}. Ask "
            "for fewer (`--objects-per-image`)."
        )
    if num_left_out := len(all_present) - len(present):
        logger.warning(
            f"{num_left_out} of {len(all_present)} images are left out: they have less than {objects_per_image} objects."
        )
    draw_present = random.Random(f"present {seed}")
    questions = []
    for (image, names), absent in zip(present.items(), _absent_objects(all_present, present, strategy, seed)):
        if len(absent) < objects_per_image:
            num_objects = len({name for others in all_present.values() for name in others})
            raise ValueError(
                f"The questions need {objects_per_image} objects that are not in {image!r}, but of the {num_objects} in the "
                f"dataset only {len(absent)} are not in it. Ask for fewer (`--objects-per-image`)."
            )
        for yes, no in zip(draw_present.sample(names, objects_per_image), absent):
            questions += [
                PopeQuestion(image, yes, _ask_for(yes), "yes"),
                PopeQuestion(image, no, _ask_for(no), "no"),
            ]
    return questions


def _absent_objects(
    all_present: Mapping[str, list[str]], present: Mapping[str, list[str]], strategy: str, seed: int
) -> Iterator[list[str]]:
    """For each image of `present`, the objects of `all_present` that are not in it, in the order of the strategy."""
    frequency = Counter(name for names in all_present.values() for name in names)
    by_frequency = sorted(frequency, key=lambda name: (-frequency[name], name))
    together: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for names in all_present.values():
        for name in names:
            together[name].update(names)
    draw = random.Random(f"absent {seed}")
    for names in present.values():
        absent = [name for name in by_frequency if name not in names]
        if strategy == "random":
            draw.shuffle(absent)
        elif strategy == "adversarial":  # the sort is stable: equals stay in the order of frequency
            absent.sort(key=lambda other: -sum(together[name][other] for name in names))
        yield absent


def _read_objects(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The objects of each image, each once and in lower case."""
    present: dict[str, list[str]] = {}
    for index, record in enumerate(records):
        where = f"Record {index}"
        image, objects = record.get("image"), record.get("objects")
        if not isinstance(image, str) or not image:
            raise ValueError(f"{where} has no path as `image`, but {image!r}.")
        if image in present:
            raise ValueError(
                f"{where} has an image of an earlier record, {image!r}. List all its objects in one record."
            )
        if not isinstance(objects, list) or not objects:
            raise ValueError(f"{where} ({image!r}) has no list of `objects` with at least one in it, but {objects!r}.")
        if not all(isinstance(name, str) and name.strip() for name in objects):
            raise ValueError(f"{where} ({image!r}) has `objects` that are no names: {objects!r:.200}.")
        present[image] = list(dict.fromkeys(" ".join(name.lower().split()) for name in objects))
    if not present:
        raise ValueError("There are no records to ask questions about.")
    return present


def _ask_for(name: str) -> str:
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def parse_answer(text: str) -> str:
    """
    Reads a free answer by the rule of POPE, so that scores are comparable. It is "no" if "No", "no" or "not" is among the
    words of the first sentence, up to a full stop and without commas. Any other answer, even an empty one, is "yes".
    """
    words = text.partition(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def load_metrics() -> ModuleType:
    """
    The metrics of scikit-learn. Call this before the model is asked, to find out whether it is installed.

    Raises:
        `ValueError`: It is not installed.
    """
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ValueError(f"The scores of POPE need scikit-learn: {how_to_install('evaluate')} ({error}).") from error
    return metrics


def score(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """
    Scores answers to questions of POPE.

    Args:
        answers (`Sequence[str]`): Answers of the model, see [`parse_answer`].
        expected (`Sequence[str]`): The right answers, "yes" or "no".

    Returns:
        `dict[str, float]`: `accuracy`; `precision`, `recall` and `f1` of "yes", 0 if they are undefined; `yes_ratio`, the
        share of answers that say yes.

    Raises:
        `ValueError`: There are no answers, `expected` has another length or other words, or scikit-learn is not installed.
    """
    if not answers or len(answers) != len(expected):
        raise ValueError(f"There are {len(answers)} answers to {len(expected)} questions.")
    unknown = sorted(set(expected) - {"yes", "no"})
    if unknown:
        raise ValueError(f'The expected answers must be "yes" or "no", got {unknown[0]!r}.')
    metrics = load_metrics()
    given = [parse_answer(answer) for answer in answers]
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        expected, given, average="binary", pos_label="yes", zero_division=0
    )
    return {
        "accuracy": float(metrics.accuracy_score(expected, given)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "yes_ratio": given.count("yes") / len(given),
    }
