"""What an evaluation leaves in its folder: the names of the files, and `settings.json`, `results.json` and `results.md`."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, get_type_hints

from ..common.errors import one_line
from ..common.families import VIEWS_TYPES
from ..common.files import write_text
from ..common.sources import is_repo_name


PREDICTIONS, RESULTS, TABLE, SETTINGS = "predictions.jsonl", "results.json", "results.md", "settings.json"
DESCRIPTIONS = "descriptions.jsonl"

# By row of the table, then by column.
Scores = dict[str, dict[str, float]]

# Tasks with questions of their own; the others are called by the name of their data.
_DATASETS = {"easy-vqa": "easy-VQA", "if16": "IF16", "pope": "POPE"}


@dataclass(kw_only=True)
class EvaluationSettings:
    """
    What a model was asked: `settings.json`, and `settings` in `results.json`. A run resumes in its folder only if all
    settings are the same.

    Args:
        task (`str`): Name of the task.
        model (`str`, *optional*): Hub repo, or absolute path of a folder.
        visual_tokens (`int`, *optional*): Visual tokens per image, if they were not the model's own setting.
        cmai (`float`, *optional*): Share inhibited in the last layer, if it was not the model's own setting; 0 is off.
        max_new_tokens (`int`, *optional*): Longest answer in tokens.
        data (`str`, *optional*): Absolute path of the file or folder with the questions.
        strategy (`str`, *optional*): Strategy of `"pope"`.
        objects_per_image (`int`, *optional*): Objects per image of `"pope"`.
        seed (`int`, *optional*): Seed of `"pope"` and `"if16"`.
        describe_first (`bool`, *optional*): Whether `"if16"` asked about descriptions instead of the images.
        num_questions (`int`): Number of questions.
        files_of_model (`str`, *optional*): Fingerprint of the model.
        content_of_data (`str`, *optional*): Fingerprint of the questions.
    """

    task: str
    model: str | None = None
    visual_tokens: int | None = None
    cmai: int | float | None = None
    max_new_tokens: int | None = None
    data: str | None = None
    strategy: str | None = None
    objects_per_image: int | None = None
    seed: int | None = None
    describe_first: bool | None = None
    num_questions: int
    files_of_model: str | None = None
    content_of_data: str | None = None

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """
        Reads the settings from JSON. Settings of earlier versions may lack some keys; unknown keys are ignored.

        Raises:
            `TypeError` or `ValueError`: A setting is missing or has the wrong type.
        """
        settings = cls(**{field.name: content[field.name] for field in fields(cls) if field.name in content})
        for name, kind in get_type_hints(cls).items():
            if not isinstance(value := getattr(settings, name), kind):
                raise ValueError(f"`{name}` is {value!r}")
        if settings.task not in _DATASETS and settings.data is None:
            raise ValueError(f"the task {settings.task!r} has no `data`")
        return settings

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are saved. Settings of other tasks are left out."""
        of_some_tasks = ("strategy", "objects_per_image", "seed", "describe_first")
        return {name: value for name, value in vars(self).items() if value is not None or name not in of_some_tasks}

    def write(self, folder: Path) -> None:
        """Writes `settings.json`."""
        write_text(folder / SETTINGS, _as_json(self.to_dict()))

    @property
    def dataset(self) -> str:
        """What was asked, in words."""
        data = Path(self.data).stem if self.data else ""
        named = _DATASETS.get(self.task)
        return data if named is None else f"{named} on {data}" if data else named

    def labels(self, model_type: str | None) -> list[str]:
        """How a model of some type was asked, in words: the settings that change the scores."""
        labels = describe_vmtc_and_cmai(self.visual_tokens, self.cmai, model_type)
        labels += [] if self.strategy is None else [f"{self.strategy} objects"]
        labels += ["descriptions instead of images"] if self.describe_first else []
        return labels


@dataclass
class EvaluationResults:
    """
    The results of an evaluation: `results.json`.

    Args:
        model (`str`): The model as the user named it.
        model_type (`str`, *optional*): Type of its config; earlier versions did not record it.
        scores (`dict[str, dict[str, float]]`): Rows of the table; the last one is over all questions.
        note (`str`): What the scores mean.
        settings ([`EvaluationSettings`]): What was asked and how.
        benchmark (`str`, *optional*): Name of the data as a benchmark on the Hub.
    """

    model: str | None
    model_type: str | None
    scores: Scores
    note: str
    settings: EvaluationSettings
    benchmark: str | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Reads a `results.json`.

        Raises:
            `ValueError`: It is not as `ta-llava evaluate` writes it.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            task, scores, settings = content["task"], content["scores"], content["settings"]
            results = cls(
                model=content.get("model"),
                model_type=content.get("model_type"),
                scores=scores,
                note=content["note"],
                settings=EvaluationSettings.from_dict({"task": task, **settings}),
                benchmark=content.get("benchmark"),
            )
            for name in ("model", "model_type", "benchmark"):
                if not isinstance(value := getattr(results, name), str | None):
                    raise ValueError(f"`{name}` is {value!r}")
            if not isinstance(results.note, str):
                raise ValueError(f"`note` is {results.note!r}")
            if not scores or not all(
                isinstance(value, int | float) for row in scores.values() for value in row.values()
            ):
                raise ValueError(f"`scores` is {scores!r}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not as `ta-llava evaluate` writes it: {one_line(error)}") from error
        return results

    @property
    def labels(self) -> list[str]:
        """How the model was asked, in words."""
        return self.settings.labels(self.model_type)

    @property
    def title(self) -> str:
        """What was asked and how, in words."""
        return ", ".join([self.settings.dataset, f"{self.settings.num_questions:,} questions", *self.labels])

    def to_dict(self) -> dict[str, Any]:
        """The results as they are saved."""
        return {
            "model": self.model,
            "model_type": self.model_type,
            "task": self.settings.task,
            "scores": self.scores,
            "note": self.note,
            "settings": self.settings.to_dict(),
            "benchmark": self.benchmark,
        }

    def write(self, folder: Path) -> None:
        """Writes `results.json`, and `results.md` with its table."""
        write_text(folder / RESULTS, _as_json(self.to_dict()))
        table = f"# {self.model}: {self.title}\n\n{format_table(self.scores)}\n\n{self.note}\n"
        write_text(folder / TABLE, table)


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


# --- in words ------------------------------------------------------------------------------------------------------


def describe_vmtc_and_cmai(visual_tokens: int | None, cmai: float | None, model_type: str | None) -> list[str]:
    """The settings of a model that are not `None`, in words."""
    of_what = " of each view" if model_type in VIEWS_TYPES else ""
    labels = [] if visual_tokens is None else [f"{visual_tokens} visual tokens{of_what}"]
    return labels if cmai is None else [*labels, f"CMAI {cmai}"]


def columns_of(scores: Scores) -> list[str]:
    """The columns of the table: all names of scores, in the order of their first row."""
    return list(dict.fromkeys(column for row in scores.values() for column in row))


def format_table(scores: Scores) -> str:
    """The scores as a Markdown table with one row each, shares in per cent."""
    columns = columns_of(scores)
    lines = ["| | " + " | ".join(column.replace("_", " ") for column in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for name, row in scores.items():
        lines.append(f"| {name} | " + " | ".join(format_score(row.get(column)) for column in columns) + " |")
    return "\n".join(lines)


def format_score(value: float | None, count_format: str = "") -> str:
    """A score as a cell of a table: a share in per cent, a count by `count_format`, nothing for `None`."""
    if value is None:
        return ""
    return f"{value:.2%}" if isinstance(value, float) else f"{value:{count_format}}"


# --- names of models -----------------------------------------------------------------------------------------------


def is_repo(name: Any) -> bool:
    """Whether a recorded name can only be that of a Hub repo, as far as can be seen from here."""
    return isinstance(name, str) and is_repo_name(name) and not Path(name).exists() and not Path(name).parent.is_dir()


def full_path(name: str | Path) -> str:
    """The absolute path of a file or folder that exists; any other name is a Hub repo and stays as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else str(name)
