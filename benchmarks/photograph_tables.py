"""Tables of `photographs.py`: accuracy with 95 % intervals over questions and seeds, differences, and times."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from grocery_questions import TYPES
from photograph_answers import ALL_TOKENS, CMAI, TOME, file_name, methods, vmtc_variants
from photograph_models import ta_llava_name
from rivals import RIVALS


CONFIDENCE = 0.95
RESAMPLES = 1000
BASELINES = ("random", "uniform", "SPD")
AVERAGE = "average"


@dataclass
class Resamples:
    """
    Draws of pictures and seeds for bootstrap intervals. All methods share the draws, so that their differences are paired.
    Pictures are drawn and not questions, since answers about one picture go together.

    Args:
        pictures (`np.ndarray` of shape `(draws, pictures)`): How often each picture was drawn.
        seeds (`np.ndarray` of shape `(draws, seeds)`): How often each seed was drawn.
    """

    pictures: np.ndarray
    seeds: np.ndarray

    @classmethod
    def draw(cls, num_pictures: int, num_seeds: int, draws: int = RESAMPLES) -> "Resamples":
        """The first draw has every picture and seed once: it gives the measured value."""
        generator = np.random.default_rng(0)
        drawn = [
            np.concatenate([np.ones((1, number)), generator.multinomial(number, np.full(number, 1 / number), draws)])
            for number in (num_pictures, num_seeds)
        ]
        return cls(*drawn)


def accuracies(
    scores: np.ndarray, types: Sequence[str], pictures: np.ndarray, resamples: Resamples
) -> dict[str, np.ndarray]:
    """
    Accuracy per type of question, and the average over types, in percent, for each draw.

    Args:
        scores (`np.ndarray` of shape `(seeds, questions)`): From 0 to 1.
        types (`Sequence[str]`): Type of each question.
        pictures (`np.ndarray` of shape `(questions,)`): Index of the picture of each question.
        resamples ([`Resamples`]): The draws.
    """
    over_seeds = resamples.seeds @ scores / scores.shape[0]
    result = {}
    for name in dict.fromkeys(types):
        columns = np.flatnonzero([name == other for other in types])
        weights = resamples.pictures[:, pictures[columns]]
        result[name] = 100 * (over_seeds[:, columns] * weights).sum(axis=1) / weights.sum(axis=1)
    result[AVERAGE] = np.mean(list(result.values()), axis=0)
    return result


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The measured value, which is the first draw, and half the width of the bootstrap interval."""
    low, high = np.percentile(draws[1:], [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(draws[0]), float(high - low) / 2


def cell(draws: np.ndarray, sign: str = "") -> str:
    value, half = interval(draws)
    return f"{value:{sign}.1f} ± {half:.1f}"


class Results:
    """
    Scores of all models, from the files of `photograph_answers`.

    Args:
        folder (`Path`): Folder of the run.
        config (`dict`): Config of the run.
        data ([`Data`]): Pictures and questions.
    """

    def __init__(self, folder: Path, config: dict[str, Any], data: Any):
        self.folder, self.config = folder, config
        self.types = [question.type for _, question in data.questions]
        places = {picture.path: index for index, picture in enumerate(data.test)}
        self.pictures = np.array([places[picture.path] for picture, _ in data.questions])
        self.resamples = Resamples.draw(len(data.test), len(config["seeds"]))

    def read(self, model: str, name: str) -> dict[str, np.ndarray]:
        rows = []
        for seed in self.config["seeds"]:
            text = (self.folder / "scores" / f"{model}-{seed}" / f"{name}.json").read_text(encoding="utf-8")
            rows.append(json.loads(text)["scores"])
        return accuracies(np.array(rows), self.types, self.pictures, self.resamples)

    def has(self, model: str, name: str) -> bool:
        """Whether the model of every seed has answered."""
        folders = [self.folder / "scores" / f"{model}-{seed}" for seed in self.config["seeds"]]
        return all((folder / f"{name}.json").is_file() for folder in folders)

    def has_llava(self, tuned: bool) -> bool:
        """Whether the LLaVAs have answered with every method and budget, as they are or `tuned`."""
        names = [
            f"{file_name(method)}-{budget}"
            for method in methods(self.config, tuned)
            for budget in self.config["budgets"]
        ]
        names += [f"{file_name(name)}-all" for name in (ALL_TOKENS, CMAI)]
        return all(self.has("llava-tuned" if tuned else "llava", name) for name in names)

    def llava(self, method: str, budget: int | None, tuned: bool = False) -> dict[str, np.ndarray]:
        return self.read("llava-tuned" if tuned else "llava", f"{file_name(method)}-{budget or 'all'}")

    def all_methods(self, budget: int, tuned: bool = False) -> dict[str, dict[str, np.ndarray]]:
        return {method: self.llava(method, budget, tuned) for method in methods(self.config, tuned)}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def format_average(results: Results, tuned: bool = False) -> str:
    budgets = results.config["budgets"]
    everything, inhibited = (results.llava(name, None, tuned)[AVERAGE] for name in (ALL_TOKENS, CMAI))
    by_budget = {budget: results.all_methods(budget, tuned) for budget in budgets}
    rows = [
        [method, *(cell(by_budget[budget][method][AVERAGE]) for budget in budgets)]
        for method in methods(results.config, tuned)
    ]
    table = markdown(["visual tokens", *map(str, budgets)], rows)
    return (
        f"## Accuracy {how(results.config, tuned)}, average over {len(set(results.types))} types of questions\n\n"
        f"All tokens: {cell(everything)} %, with CMAI {cell(inhibited)} %.\n\n{table}"
    )


def how(config: dict[str, Any], tuned: bool) -> str:
    return f"after a training of {config['stages']['tuning']['steps']} steps" if tuned else "without training"


def format_differences(results: Results, tuned: bool = False) -> str:
    """Each variant of VMTC against the best rival, against the baselines, and against all tokens."""
    everything = results.llava(ALL_TOKENS, None, tuned)[AVERAGE]
    rivals = [name for name in (*RIVALS, TOME) if name not in BASELINES]
    rows = []
    for budget in results.config["budgets"]:
        scores = {method: result[AVERAGE] for method, result in results.all_methods(budget, tuned).items()}
        best = max(rivals, key=lambda name: scores[name][0])
        for variant in (name for name in vmtc_variants(results.config) if name in scores):
            others = [best, "SPD", "random"]
            row = [variant, str(budget), best, *(cell(scores[variant] - scores[name], "+") for name in others)]
            rows.append([*row, cell(scores[variant] - everything, "+")])
    header = [
        "points",
        "visual tokens",
        "best rival",
        "minus the best rival",
        "minus SPD",
        "minus random",
        "minus all tokens",
    ]
    return f"## VMTC against the others, {how(results.config, tuned)}\n\n{markdown(header, rows)}"


def format_types(results: Results) -> str:
    types = [name for name in TYPES if name in results.types]
    numbers = {name: results.types.count(name) for name in types}
    header = ["", *(f"{name} ({numbers[name]})" for name in types), AVERAGE]
    parts = []
    for budget in results.config["budgets"]:
        scores = {name: results.llava(name, None) for name in (ALL_TOKENS, CMAI)} | results.all_methods(budget)
        rows = [
            [method, *(f"{result[name][0]:.1f}" for name in (*types, AVERAGE))] for method, result in scores.items()
        ]
        parts.append(f"### {budget} visual tokens\n\n{markdown(header, rows)}")
    return "## Accuracy by type of question, without training\n\n" + "\n\n".join(parts)


def format_ta_llava(results: Results, operations: dict[tuple[int, bool], int], times: dict[str, Any]) -> str:
    """
    Accuracy and operations of TA-LLaVAs, by prefix tokens and whether they are blind to the question, the difference between
    the two of a length, and those of LLaVA.
    """
    columns = [*(name for name in TYPES if name in results.types), AVERAGE]

    def cells(scores: dict[str, np.ndarray], sign: str = "") -> list[str]:
        return [cell(scores[name], sign) for name in columns]

    scores = {prefix: results.read(ta_llava_name(*prefix), "all") for prefix in operations}
    rows = []
    for (length, blind), count in operations.items():
        title = f"TA-LLaVA, {length} prefix tokens{', blind to the question' if blind else ''}"
        rows.append([title, *cells(scores[length, blind]), f"{count / 1e9:.2f}"])
        if blind and (length, False) in scores:
            aware = scores[length, False]
            gained = {name: aware[name] - scores[length, True][name] for name in columns}
            rows.append([f"what reading the question brings, {length}", *cells(gained, "+"), ""])
    count = times["rows"][0]["prefill_operations"]
    rows.append(["LLaVA, all tokens", *cells(results.llava(ALL_TOKENS, None)), f"{count / 1e9:.2f}"])
    return f"## TA-LLaVA\n\n{markdown(['', *columns, 'GFLOP, prefill'], rows)}"


def format_times(times: dict[str, Any]) -> str:
    """Times relative to all tokens in the same run, and counted operations."""
    base = times["rows"][0]
    rows = [
        [
            row["method"],
            str(row["tokens"]),
            f"{row['tower_s'] / base['tower_s']:.2f}",
            f"{row['prefill_s'] / base['prefill_s']:.2f}",
            f"{row['tower_operations'] / 1e9:.2f}",
            f"{row['prefill_operations'] / 1e9:.2f}",
        ]
        for row in times["rows"]
    ]
    header = ["", "visual tokens", "tower and method", "prefill", "GFLOP, tower and method", "GFLOP, prefill"]
    return (
        f"## Time and operations\n\nMedian of {times['rounds']} rounds on {times['machine']}, one thread, {times['images']} "
        f"images; 1 is the model with all tokens: {1000 * base['tower_s'] / times['images']:.0f} ms for the tower and "
        f"{1000 * base['prefill_s'] / times['images']:.0f} ms for the prefill of an image.\n\n{markdown(header, rows)}"
    )
