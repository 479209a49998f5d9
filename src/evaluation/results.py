"""Results of an evaluation, as files and as a table."""

from pathlib import Path
from typing import Any

from ..common.sources import is_repo_name


PREDICTIONS, RESULTS, TABLE, SETTINGS = "predictions.jsonl", "results.json", "results.md", "settings.json"
DESCRIPTIONS = "descriptions.jsonl"

Scores = dict[str, dict[str, Any]]


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


_DATASETS = {"easy-vqa": "easy-VQA", "if16": "IF16", "pope": "POPE"}


# --- what is known -------------------------------------------------------------------------------------------------


def is_repo(name: Any) -> bool:
    """Whether a recorded name can only be that of a Hub repo, as far as can be seen from here."""
    return isinstance(name, str) and is_repo_name(name) and not Path(name).exists() and not Path(name).parent.is_dir()


def full_path(name: str | Path) -> str:
    """The whole path of what is here, as `ta-llava evaluate` records it; else the name, which is that of a repo."""
    return str(Path(name).resolve()) if Path(name).exists() else str(name)


def describe_evaluation(task: str, settings: dict[str, Any]) -> str:
    """What was asked, and with which settings: `task` and `settings` of a `results.json`, in words."""
    return ", ".join([dataset_of(task, settings), f"{settings['num_questions']:,} questions", *settings_of(settings)])


def dataset_of(task: str, settings: dict[str, Any]) -> str:
    dataset = _DATASETS.get(task) or Path(settings["data"]).stem
    return f"{dataset} on {Path(settings['data']).stem}" if settings.get("data") and task in _DATASETS else dataset


def settings_of(settings: dict[str, Any]) -> list[str]:
    named = [
        text.format(settings[key])
        for key, text in (("visual_tokens", "{} visual tokens"), ("cmai", "CMAI {}"), ("strategy", "{} objects"))
        if settings.get(key) is not None
    ]
    return [*named, "descriptions instead of images"] if settings.get("describe_first") else named
