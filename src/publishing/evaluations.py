"""The evaluations of a model that is published: on its model card, and on the leaderboards of the Hub."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml, snapshot_download
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers.utils import logging

from ..analysis.cost import read_config
from ..common.families import family_of
from ..configuration_ta_llava import TaLlavaConfig
from ..evaluation.results import (
    RESULTS,
    EvaluationResults,
    EvaluationSettings,
    columns_of,
    describe_vmtc_and_cmai,
    format_score,
    full_path,
)
from ..vmtc import count_visual_tokens
from .existing_card import read_utf8


logger = logging.get_logger(__name__)

# A leaderboard shows one score. Papers compare models by the first of these that a task has.
_LEADING_METRICS = ("f1", "accuracy", "success_rate")


@dataclass(frozen=True)
class Evaluation:
    """
    An evaluation as it is published.

    Args:
        results ([`EvaluationResults`]): The results.
        of_another (`str`, *optional*): Name of the model that was evaluated, if it is not the published one.
        why_no_benchmark (`str`, *optional*): Why the score may not be that of the published model as its config sets it.
    """

    results: EvaluationResults
    of_another: str | None
    why_no_benchmark: str | None

    @property
    def title(self) -> str:
        return ", ".join([self.results.title, *self._other_model])

    @property
    def note(self) -> str:
        return self.results.note

    @property
    def columns(self) -> list[str]:
        return columns_of(self.results.scores)

    @property
    def rows(self) -> list[tuple[str, list[str]]]:
        """Name and cells of each row of the table."""
        return [
            (name, [format_score(row.get(column), ",") for column in self.columns])
            for name, row in self.results.scores.items()
        ]

    @property
    def metrics(self) -> dict[str, float]:
        """The scores over all questions: the last row."""
        summary = list(self.results.scores.values())[-1]
        return {name: value for name, value in summary.items() if name not in ("questions", "prior")}

    @property
    def leading_score(self) -> float | None:
        """The score for a leaderboard."""
        return next((self.metrics[name] for name in _LEADING_METRICS if name in self.metrics), None)

    @property
    def metadata(self) -> list[EvalResult]:
        """The scores over all questions, as the metadata of a model card have them."""
        settings = self.results.settings
        return [
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=settings.dataset.lower().replace(" ", "-"),
                dataset_name=settings.dataset,
                dataset_split="test" if settings.task == "easy-vqa" else None,
                dataset_args={"num_questions": settings.num_questions},
                metric_type=name,
                metric_name=", ".join([name.replace("_", " "), *self.results.labels, *self._other_model]),
                metric_value=value,
            )
            for name, value in self.metrics.items()
        ]

    @property
    def _other_model(self) -> list[str]:
        return [] if self.of_another is None else [f"of `{self.of_another}`"]


def read_evaluations(model: str | Path, results: Sequence[str | Path]) -> list[Evaluation]:
    """
    Reads the evaluations inside the folder of a model, then those of other folders. A `results.json` inside the folder that
    cannot be used is left out, with a warning.

    Raises:
        `ValueError`: One of the `results` has none, or none that can be of this model.
    """
    config, image_size = read_config(model)
    patches = (image_size // config.vision_config.patch_size) ** 2
    named = {}
    for folder in results:
        path = Path(folder) / RESULTS
        if not path.is_file():
            raise ValueError(f"There is no {RESULTS} in {folder}. `ta-llava evaluate MODEL -o {folder}` writes it.")
        named[path.resolve()] = path
    inside = sorted([*Path(model).glob(RESULTS), *Path(model).glob(f"*/{RESULTS}")])
    found = {path.resolve(): path for path in inside}
    evaluations = []
    for key, path in {**found, **named}.items():
        try:
            evaluations.append(_read_evaluation(path, model, config, patches))
        except ValueError as error:
            if key in named:
                raise
            logger.warning_once(f"{error}. It is left out of the model card.")
    return evaluations


def _read_evaluation(path: Path, model: str | Path, config: Any, patches: int) -> Evaluation:
    results = EvaluationResults.read(path)
    if cannot_be := _why_of_another(results, config.model_type, patches):
        raise ValueError(f"{path} cannot be of {model}: {cannot_be}. Evaluate that model, or leave these results out.")
    evaluated, of_another = results.settings.model, None
    if evaluated not in (None, full_path(model)):  # of a folder its name alone: paths are of this machine
        of_another = Path(evaluated).name if Path(evaluated).is_absolute() else evaluated
    return Evaluation(results, of_another, _why_no_benchmark(results.settings, model, config, patches))


def _why_of_another(results: EvaluationResults, model_type: str, patches: int) -> str | None:
    """Why results cannot be of a model of this type with this many patches per image; `None` if they can."""
    is_ta_llava = model_type == TaLlavaConfig.model_type
    types = (model_type,) if is_ta_llava else family_of(model_type).types
    evaluated, settings = results.model_type, results.settings
    if evaluated is not None and evaluated not in types:
        return f"a {evaluated!r} model was evaluated, and this one is a {model_type!r}"
    if is_ta_llava and (settings.visual_tokens is not None or settings.cmai is not None):
        return f"the settings were {', '.join(results.labels)}, which a TA-LLaVA does not have"
    if settings.visual_tokens is not None and settings.visual_tokens > patches:
        return f"it was evaluated with {settings.visual_tokens} visual tokens, but an image has {patches} patches here"
    return None


def _why_no_benchmark(settings: EvaluationSettings, model: str | Path, config: Any, patches: int) -> str | None:
    """Why a score is not known to be that of the model as its config sets it; `None` if it is."""
    if settings.model is None:
        return "which model was evaluated is not recorded"
    if settings.model != full_path(model):
        return f"{settings.model} was evaluated"
    if config.model_type == TaLlavaConfig.model_type:
        return None  # it has none of these settings
    total = getattr(config, "vmtc_total_visual_tokens", None) if config.use_vmtc else None
    visual_tokens = count_visual_tokens(config, patches) if total is None else None
    cmai = config.cmai_max_ratio if config.use_cmai else 0
    if settings.visual_tokens in (None, visual_tokens) and settings.cmai in (None, cmai):
        return None
    labels = [] if total is None else [f"{total} visual tokens of a whole picture"]
    labels += describe_vmtc_and_cmai(visual_tokens, cmai, config.model_type)
    return f"it was evaluated with {', '.join(settings.labels(config.model_type))}, and has {', '.join(labels)}"


# --- leaderboards --------------------------------------------------------------------------------------------------


def write_eval_results(model: str | Path, results: Sequence[str | Path] = ()) -> dict[str, str]:
    """
    Writes the scores of a model on benchmarks of the Hub as the Hub wants them: a YAML file for each evaluation that names
    its benchmark (`ta-llava evaluate --benchmark`), besides the files that `model` has already. Evaluations of another
    model, of one that is not recorded, or with other settings than the config's are left out, with a warning. Args and
    errors are those of [`write_model_card`].

    Returns:
        `dict`: The content of each file, by its path in the repo.
    """
    files = {f"{EVAL_RESULTS_FOLDER}/{path.name}": read_utf8(path) for path in _find_eval_results(model)}
    for evaluation in read_evaluations(model, results):
        benchmark = evaluation.results.benchmark
        if benchmark is None:
            continue
        if evaluation.why_no_benchmark is not None:
            logger.warning(
                f"The score on {benchmark} is left out of {EVAL_RESULTS_FOLDER}: {evaluation.why_no_benchmark}. Evaluate "
                f"{model} as it is."
            )
            continue
        dataset, _, task = benchmark.partition(":")
        entry = EvalResultEntry(dataset, task or "default", evaluation.leading_score, notes=evaluation.title)
        # One file for each setting: the Hub shows one score of a file for a benchmark.
        name = re.sub(r"[^\w.]+", "-", f"{dataset.rpartition('/')[2]} {task} {evaluation.title}").strip("-")
        content = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        files[f"{EVAL_RESULTS_FOLDER}/{name}.yaml"] = content
    return files


def _find_eval_results(model: str | Path) -> list[Path]:
    pattern = f"{EVAL_RESULTS_FOLDER}/*.yaml"
    if Path(model).is_dir():
        return sorted(Path(model).glob(pattern))
    try:
        return sorted(Path(snapshot_download(str(model), allow_patterns=pattern)).glob(pattern))
    except LocalEntryNotFoundError:
        return []  # `find_card` warns that the repo cannot be reached
