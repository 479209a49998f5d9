"""
Questions about objects that are in an image and about some that are not, to find a model that sees what is not there.

As in POPE (Li et al. 2023, *Evaluating Object Hallucination in Large Vision-Language Models*), for any images whose objects
are known: `{"image": "kitchen.jpg", "objects": ["knife", "oven"]}` each.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
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
        image (`str`): As the record has it.
        object (`str`): What is asked for.
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
    For each image as many questions about objects that are in it as about objects that are not, in turn.

    Those that are in it are drawn at random; the seed alone decides which, so that they are the same with all strategies. Of
    those that are in the dataset but not in the image come, with `"random"`, any; with `"popular"`, those that most images
    have; with `"adversarial"`, those that most often come together with the objects of the image. Where that is equal the
    one that more images have comes first, then the alphabet decides. Images with too few objects to ask for are left out,
    as in POPE, and counted in a warning.

    Args:
        records (`Sequence[Mapping]`): With `image`, a path, and `objects`, a list of names. Case does not matter.
        strategy (`str`): One of `STRATEGIES`.
        objects_per_image (`int`): Questions with the answer yes, and with the answer no, about each image.
        seed (`int`): Of what is drawn.

    Raises:
        `ValueError`: A record without image or objects, an image that comes twice, or too few objects to ask for.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"There is no strategy {strategy!r} of POPE, only {', '.join(STRATEGIES)}.")
    if objects_per_image < 1:
        raise ValueError(f"At least 1 object per image must be asked for, got {objects_per_image}.")
    present = _read_objects(records)
    frequency = Counter(name for names in present.values() for name in names)
    by_frequency = sorted(frequency, key=lambda name: (-frequency[name], name))
    together: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for names in present.values():
        for name in names:
            together[name].update(names)

    draw_present, draw_absent = random.Random(f"present {seed}"), random.Random(f"absent {seed}")
    questions, num_left_out = [], 0
    for image, names in present.items():
        if len(names) < objects_per_image:
            num_left_out += 1
            continue
        absent = [name for name in by_frequency if name not in names]
        if len(absent) < objects_per_image:
            raise ValueError(
                f"{objects_per_image} objects that are not in {image!r} are to be asked for, but of the {len(frequency)} in "
                f"the dataset only {len(absent)} are not in it. Ask for fewer (`--objects-per-image`)."
            )
        if strategy == "random":
            draw_absent.shuffle(absent)
        elif strategy == "adversarial":  # a stable sort: where this is equal, the order by frequency stays
            absent.sort(key=lambda other: -sum(together[name][other] for name in names))
        for yes, no in zip(draw_present.sample(names, objects_per_image), absent):
            questions += [
                PopeQuestion(image, yes, _ask_for(yes), "yes"),
                PopeQuestion(image, no, _ask_for(no), "no"),
            ]
    if not questions:
        most = max(len(names) for names in present.values())
        raise ValueError(
            f"{objects_per_image} objects that are in an image are to be asked for, but no image has more than {most}. Ask "
            "for fewer (`--objects-per-image`)."
        )
    if num_left_out:
        logger.warning(
            f"{num_left_out} of {len(present)} images are left out: they have less than {objects_per_image} objects."
        )
    return questions


def _read_objects(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The objects of each image, every one once, in lower case."""
    present: dict[str, list[str]] = {}
    for index, record in enumerate(records):
        where = f"Record {index}"
        image, objects = record.get("image"), record.get("objects")
        if not isinstance(image, str) or not image:
            raise ValueError(f"{where} has no path as `image`, but {image!r}.")
        if image in present:
            raise ValueError(f"{where} has an image that came before, {image!r}. List all its objects in one record.")
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
    What a free answer says, as POPE has it, so that scores compare: "no" if a "No", "no" or "not" is among the words of
    the first sentence, up to a full stop and without commas; anything else, also an empty answer, is "yes".
    """
    words = text.partition(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def load_metrics() -> ModuleType:
    """
    The metrics of scikit-learn. To be called before answers are made, so that none are made in vain.

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
    Args:
        answers (`Sequence[str]`): What the model said, see [`parse_answer`].
        expected (`Sequence[str]`): "yes" or "no" each.

    Returns:
        `dict[str, float]`: `accuracy`; `precision`, `recall` and `f1` of "yes", 0 where there is none; `yes_ratio`, the
        share of answers that say yes.

    Raises:
        `ValueError`: No answers, another number of expected ones, or scikit-learn is not installed.
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
