"""`training_summary.json`: what a finished run of training records about itself, for the model card among others."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..common.errors import one_line
from ..common.files import write_text
from ..data.report import DataReport
from .recipe import DataSettings, Recipe


SUMMARY = "training_summary.json"


@dataclass
class ParameterCount:
    """Parameters of one part of a model."""

    trainable: int
    frozen: int


@dataclass
class TrainingSummary:
    """
    The summary of a run.

    Args:
        recipe ([`Recipe`]): The recipe that was run.
        data ([`DataReport`]): Samples that were kept and left out.
        log (`list[dict]`): `log_history` of the Trainer. Its last entry is the one about the whole run.
        parameters (`dict[str, ParameterCount]`): Number of parameters, by part.
        evaluation_data ([`DataReport`], *optional*): The report on the data of the evaluation, if there was one.
    """

    recipe: Recipe
    data: DataReport
    log: list[dict[str, Any]]
    parameters: dict[str, ParameterCount] = field(default_factory=dict)
    evaluation_data: DataReport | None = None

    @property
    def steps(self) -> int:
        """Number of steps of the optimizer."""
        return self.log[-1]["step"]

    @property
    def train_loss(self) -> float:
        """Mean loss of the run."""
        return self.log[-1]["train_loss"]

    @property
    def seconds(self) -> float:
        """Duration of the run. If it was interrupted, only the time after the last interruption counts."""
        return next(entry["train_runtime"] for entry in self.log if "train_runtime" in entry)

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Step and loss of each entry of the log that has a loss."""
        return [(entry["step"], entry["loss"]) for entry in self.log if "loss" in entry]

    @classmethod
    def read(cls, folder: str | Path) -> "TrainingSummary":
        """
        Reads the summary in a folder. Fields that this version does not know are ignored.

        Raises:
            `ValueError`: The file is missing, or `ta-llava train` did not write it.
        """
        path = Path(folder) / SUMMARY
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            recipe = _known_fields(Recipe, content["recipe"])
            for name in ("data", "evaluation_data"):
                if recipe.get(name) is not None:
                    recipe[name] = DataSettings(**_known_fields(DataSettings, recipe[name]))
            evaluation_data = content.get("evaluation_data")
            summary = cls(
                recipe=Recipe(**recipe),
                data=DataReport(**_known_fields(DataReport, content["data"])),
                log=content["log"],
                parameters={part: ParameterCount(**count) for part, count in content.get("parameters", {}).items()},
                evaluation_data=evaluation_data and DataReport(**_known_fields(DataReport, evaluation_data)),
            )
            summary.steps, summary.train_loss  # noqa: B018  # the log must have them
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} is not as `ta-llava train` writes it: {one_line(error)}") from error
        return summary

    def write(self, folder: str | Path) -> None:
        """Writes the summary into a folder."""
        content = {name: value for name, value in asdict(self).items() if value is not None}
        write_text(Path(folder) / SUMMARY, json.dumps(content, indent=1))


def _known_fields(settings_class: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    return {entry.name: content[entry.name] for entry in fields(settings_class) if entry.name in content}
