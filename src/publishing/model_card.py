"""
The model card of a model that is published: `README.md`, with what is known of it and nothing else; and its scores on
benchmarks of the Hub, from which the Hub makes leaderboards.

What is known stands in the config, in `training_summary.json` of `ta-llava train` and in `results.json` of
`ta-llava evaluate`, and is counted by [`count_cost`]; the words are those of `hub_card/model_card.md.jinja`.
"""

import filecmp
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from transformers import LlavaConfig
from transformers.utils import logging

from ..analysis.cost import LANGUAGE_MODEL, Cost, count_cost, in_millions, read_config, scaled
from ..common.errors import one_line
from ..common.shipped_models import DEFAULT_LLAVA, DEFAULT_MODEL
from ..configuration_ta_llava import TaLlavaConfig
from ..evaluation.results import dataset_of, describe_evaluation, full_path, is_repo, settings_of
from ..modeling_ta_llava import TaLlavaForConditionalGeneration
from ..training.summary import SUMMARY, TrainingSummary
from ..vmtc import count_visual_tokens
from ..vmtc_cmai_patch import VmtcCmaiLlavaConfig, VmtcCmaiLlavaForConditionalGeneration
from .licences import LICENCE_TERMS, find_licence


logger = logging.get_logger(__name__)

CARD = "README.md"
_RESULTS, _WEIGHTS = "results.json", "model.safetensors"
_TEXT_TOKENS = 40

_NAMES = {
    "clip_vision_model": "CLIP",
    "siglip_vision_model": "SigLIP",
    "dinov2": "DINOv2",
    "gemma2": "Gemma-2",
    "gemma3_text": "Gemma-3",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
# Of a task with several, the one that its paper compares models by comes first.
_LEADING_METRICS = ("f1", "accuracy", "success_rate")

# The line of the card's example that names what is loaded, and the last line, which tells whether the card was edited.
_PIN = re.compile(r'^repo, revision = ".*", "(.*)"(?=\r?$)', re.MULTILINE)
_BLANK = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)
_SEAL = re.compile(r"\n<!-- ta-llava (\w+): `ta-llava push` writes this card anew unless it was edited -->\n$")


def write_model_card(model: str | Path, name: str, results: Sequence[str | Path] = ()) -> str:
    """
    The card of a TA-LLaVA, or of a LLaVA with VMTC and CMAI.

    Args:
        model (`str` or `Path`): Folder or Hub repo.
        name (`str`): Of the folder or repo that gets the card.
        results (`Sequence`): Folders that `ta-llava evaluate` has written, besides those inside `model`. Where it was asked
            of another folder or repo, the card names that. A `results.json` inside `model` that is something else, or
            cannot be of it, is left out, with a warning.

    Returns:
        `str`: Metadata in YAML, and Markdown.

    Raises:
        `ValueError`: The config cannot be read; one of the `results` has none, or those of another type of model or with
            settings that `model` cannot have.
    """
    config, image_size = read_config(model)
    patches = (image_size // config.vision_config.patch_size) ** 2
    cost = count_cost(config, _TEXT_TOKENS, image_size=image_size)
    evaluations = _read_evaluations(model, results)
    phases, start = _read_training(Path(model))
    parts = [part for part in (config.vision_config, config.text_config) if is_repo(part._name_or_path)]
    origin = next(filter(is_repo, (start, getattr(config, "base_model_name_or_path", None))), None)
    bases = [origin] if origin else [part._name_or_path for part in parts]
    is_shipped = _is_shipped(Path(model))
    names = [*bases, *(part._name_or_path for part in parts)]
    licence = "apache-2.0" if is_shipped else find_licence(names)
    is_ta_llava = config.model_type == TaLlavaConfig.model_type
    model_class = TaLlavaForConditionalGeneration if is_ta_llava else VmtcCmaiLlavaForConditionalGeneration

    data = ModelCardData(
        base_model=bases or None,
        datasets=sorted({phase["dataset"] for phase in phases if phase["dataset"]}) or None,
        library_name="transformers",
        license=licence,
        pipeline_tag="image-text-to-text",
        tags=list(model_class.model_tags),
        model_name=name if evaluations else None,
        eval_results=[result for evaluation in evaluations for result in evaluation["eval_results"]] or None,
    )
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(
        files("ta_llava.hub_card").joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    ).render(
        name=name,
        pin=_pin(name, "main"),
        config=config,
        is_ta_llava=is_ta_llava,
        use_cmai=not is_ta_llava and config.use_cmai,
        image_size=image_size,
        patches=patches,
        visual_tokens=None if is_ta_llava else cost.num_tokens - _TEXT_TOKENS,
        text_tokens=_TEXT_TOKENS,
        cost=cost,
        parts=_describe_parts(config, cost),
        parameters=in_millions(sum(cost.parameters.values())),
        operations=scaled(sum(cost.operations.values()), "FLOP"),
        cache=scaled(cost.cache_bytes, "B"),
        base_models=bases,
        phases=phases,
        results=evaluations,
        licence=licence,
        terms=LICENCE_TERMS.get(licence or ""),
        is_shipped=is_shipped,
        # `compress` sets it for weights that were trained without; they may have been trained with it since.
        may_be_untrained_vmtc=config.use_vmtc and config.vmtc_merge_weights == "normalized" and not phases,
    )
    card = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.rstrip()}\n"))
    return f"{card}\n<!-- ta-llava {_digest(card)}: `ta-llava push` writes this card anew unless it was edited -->\n"


def write_eval_results(model: str | Path, results: Sequence[str | Path] = ()) -> dict[str, str]:
    """
    The scores of a model on benchmarks of the Hub, as it wants them: a file of YAML for each evaluation that names its
    benchmark (`ta-llava evaluate --benchmark`), besides those that `model` has already. An evaluation of another model, of
    one that is not recorded, or with other settings than the config's, is left out, with a warning. Args and errors are
    those of [`write_model_card`].

    Returns:
        `dict`: The content of each file, by its path in the repo.
    """
    files = {f"{EVAL_RESULTS_FOLDER}/{path.name}": _read_text(path) for path in _find_eval_results(model)}
    for evaluation in _read_evaluations(model, results):
        if evaluation["benchmark"] is not None and evaluation["not_as_it_is"] is not None:
            logger.warning(
                f"The score on {evaluation['benchmark']} is left out of {EVAL_RESULTS_FOLDER}: "
                f"{evaluation['not_as_it_is']}. Evaluate {model} as it is."
            )
        elif evaluation["benchmark"] is not None:
            dataset, _, task = evaluation["benchmark"].partition(":")
            notes = evaluation["title"]
            entry = EvalResultEntry(dataset, task or "default", evaluation["value"], notes=notes)
            # One file for each setting: the Hub shows one score of a file for a benchmark.
            name = re.sub(r"[^\w.]+", "-", f"{dataset.rpartition('/')[2]} {task} {notes}").strip("-")
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
        return []  # as of a card; that there is none then is warned of there


def pin_revision(card: str, repo_id: str, revision: str) -> str:
    """The card with `repo_id` and `revision` in its example; itself, if its example is another."""
    return _PIN.sub(lambda _: _pin(repo_id, revision), card)


def pinned_revision(card: str, repo_id: str) -> str | None:
    """The commit of `repo_id` in the card's example, if it has one."""
    for match in _PIN.finditer(card):
        if match[0] == _pin(repo_id, match[1]) and re.fullmatch("[0-9a-f]{40}", match[1]):
            return match[1]
    return None


def renew_pin(card: str, repo_id: str, revision: str) -> str:
    """A card that somebody edited, with `revision` where its example names a commit of `repo_id`; else itself."""
    earlier = pinned_revision(card, repo_id)
    return card if earlier is None else card.replace(_pin(repo_id, earlier), _pin(repo_id, revision))


def find_card(model: str | Path) -> str | None:
    """
    The `README.md` of a folder or Hub repo, if there is one with something in it. Of a repo that cannot be reached, and
    whose card was not downloaded before, there is none; this is warned of.
    """
    path = Path(model) / CARD
    if Path(model).is_dir():
        return _unless_blank(_read_text(path)) if path.is_file() else None
    try:
        return download_card(str(model))
    except LocalEntryNotFoundError:
        logger.warning(f"The {CARD} of {model} cannot be downloaded now, so a new one is written.")
        return None


def download_card(repo_id: str, revision: str | None = None) -> str | None:
    """The `README.md` of a Hub repo, if there is one with something in it."""
    try:
        return _unless_blank(_read_text(Path(hf_hub_download(repo_id, CARD, revision=revision))))
    except RemoteEntryNotFoundError:
        return None


def is_unedited(card: str) -> bool:
    """Whether a card is as [`write_model_card`] wrote it, but for [`pin_revision`] and the kind of its line breaks."""
    card = card.replace("\r\n", "\n")
    match = _SEAL.search(card)
    return match is not None and match[1] == _digest(card[: match.start()])


def tells_same_training(card: str, new_card: str) -> bool:
    """Whether all that a card says of training is in another, which was written where less may be known of it."""
    return "Training" not in lost_sections(card, new_card)


def lost_sections(card: str, new_card: str) -> list[str]:
    """Which of training and results a card tells more of than another, which was written where less may be known."""
    lost = []
    for title in ("Training", "Results"):
        section = re.search(rf"^## {title}\n(.*?)^## ", card.replace("\r\n", "\n"), re.MULTILINE | re.DOTALL)
        if section is not None and not set(section[1].splitlines()) <= set(new_card.splitlines()):
            lost.append(title)
    return lost


def _read_text(path: Path) -> str:
    """The text, with the line breaks that it has. Raises `ValueError` if it is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8. Save it as UTF-8.") from error


def _unless_blank(card: str) -> str | None:
    """The card, unless it is the form to fill in that `push_to_hub` of transformers makes, and nobody has."""
    if _BLANK not in card:
        return card
    blank = ModelCard.from_template(ModelCardData(), model_description=_BLANK)
    return None if ModelCard(card).text.split() == blank.text.split() else card


def _pin(repo_id: str, revision: str) -> str:
    return f"repo, revision = {json.dumps(repo_id)}, {json.dumps(revision)}"


def _digest(card: str) -> str:
    return hashlib.sha256(_PIN.sub("", card).encode()).hexdigest()[:16]


def _is_shipped(model: Path) -> bool:
    """Whether a folder has the weights of a model that comes with the package."""
    weights = model / _WEIGHTS
    shipped = [folder / _WEIGHTS for folder in (DEFAULT_MODEL, DEFAULT_LLAVA)]
    return weights.is_file() and any(file.is_file() and filecmp.cmp(weights, file, shallow=False) for file in shipped)


def _read_training(folder: Path) -> tuple[list[dict[str, Any]], str | None]:
    """
    The phases of training that led to a folder, the first first, and the Hub repo that they began with. What a recipe
    calls a model or data is only looked for from where it was run: elsewhere a folder could pass for a repo.
    """
    phases: list[dict[str, Any]] = []
    seen: set[Path] = set()
    while (folder / SUMMARY).is_file() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        summary = TrainingSummary.read(folder)
        recipe = summary.recipe
        # What an adapter was merged into has the adapter's summary.
        own, written = folder / SUMMARY, Path(recipe.output_dir) / SUMMARY
        is_here = written.is_file() and filecmp.cmp(own, written, shallow=False)
        source = recipe.data.path
        dataset = source if is_here and is_repo(source) and not Path(source).suffix else None
        trained = [
            f"{part} (LoRA)" if part == "language_model" and recipe.lora is not None else part for part in recipe.train
        ]
        phases.insert(
            0,
            {
                "name": Path(recipe.output_dir).name,
                "trained": ", ".join(trained).replace("_", " "),
                "data": f"[{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else Path(source).name,
                "dataset": dataset,
                "samples": f"{summary.data.kept:,}",
                "batch": recipe.global_batch_size,
                "steps": f"{summary.steps:,}",
                "learning_rate": recipe.training_arguments.get("learning_rate", "default"),
                "loss": f"{summary.train_loss:.3g}",
            },
        )
        if not is_here or not Path(recipe.model).is_dir():
            return phases, recipe.model if is_here and is_repo(recipe.model) else None
        folder = Path(recipe.model)
    return phases, None


def _read_evaluations(model: str | Path, results: Sequence[str | Path]) -> list[dict[str, Any]]:
    """
    The evaluations inside the folder of a model, then those of other folders.

    Raises:
        `ValueError`: One of the `results` has none, or none that can be of this model.
    """
    config, image_size = read_config(model)
    patches = (image_size // config.vision_config.patch_size) ** 2
    named = {}
    for folder in results:
        path = Path(folder) / _RESULTS
        if not path.is_file():
            raise ValueError(f"There is no {_RESULTS} in {folder}. `ta-llava evaluate MODEL -o {folder}` writes it.")
        named[path.resolve()] = path
    inside = sorted([*Path(model).glob(_RESULTS), *Path(model).glob(f"*/{_RESULTS}")])
    found = {path.resolve(): path for path in inside}
    evaluations = []
    for key, path in {**found, **named}.items():
        try:
            evaluations.append(_read_results(path, model, config, patches))
        except ValueError as error:
            if key in named:
                raise
            logger.warning_once(f"{error}. It is left out of the model card.")
    return evaluations


def _read_results(path: Path, model: str | Path, config: Any, patches: int) -> dict[str, Any]:
    """The table of an evaluation, and its last row, which is over all questions, as metadata."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        task, scores, settings = content["task"], content["scores"], content["settings"]
        cannot_be = _why_of_another(content, config.model_type, patches)
        dataset, described = dataset_of(task, settings), settings_of(settings)
        evaluated = settings.get("model")
        of_another = []
        if evaluated not in (None, full_path(model)):  # of a folder its name alone: paths are of this machine
            of_another = [f"of `{Path(evaluated).name if Path(evaluated).is_absolute() else evaluated}`"]
        columns = list(dict.fromkeys(column for row in scores.values() for column in row))
        summary = list(scores.values())[-1]
        metrics = {name: summary[name] for name in columns if name not in ("questions", "prior")}
        evaluation = {
            "benchmark": content.get("benchmark"),
            "not_as_it_is": _why_not_as_it_is(settings, model, config, patches),
            "value": next((metrics[name] for name in _LEADING_METRICS if name in metrics), None),
            "title": ", ".join([describe_evaluation(task, settings), *of_another]),
            "columns": columns,
            "rows": [(name, [_cell(row.get(column)) for column in columns]) for name, row in scores.items()],
            "note": content["note"],
            "eval_results": [
                EvalResult(
                    task_type="image-text-to-text",
                    dataset_type=dataset.lower().replace(" ", "-"),
                    dataset_name=dataset,
                    dataset_split="test" if task == "easy-vqa" else None,
                    dataset_args={"num_questions": settings["num_questions"]},
                    metric_type=name,
                    metric_name=", ".join([name.replace("_", " "), *described, *of_another]),
                    metric_value=value,
                )
                for name, value in metrics.items()
            ],
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is not as `ta-llava evaluate` writes it: {one_line(error)}") from error
    if cannot_be is not None:
        raise ValueError(f"{path} cannot be of {model}: {cannot_be}. Evaluate that model, or leave these results out.")
    return evaluation


def _why_of_another(content: dict[str, Any], model_type: str, patches: int) -> str | None:
    """Why a `results.json` cannot be of a model of this type, with so many patches in an image; `None` if it can."""
    is_ta_llava = model_type == TaLlavaConfig.model_type
    types = (model_type,) if is_ta_llava else (LlavaConfig.model_type, VmtcCmaiLlavaConfig.model_type)
    evaluated, budget = content.get("model_type"), content["settings"].get("visual_tokens")
    if evaluated is not None and evaluated not in types:
        return f"a {evaluated!r} model was evaluated, and this one is a {model_type!r}"
    if is_ta_llava and any(content["settings"].get(key) is not None for key in ("visual_tokens", "cmai")):
        return f"the settings were {', '.join(settings_of(content['settings']))}, which a TA-LLaVA does not have"
    if budget is not None and budget > patches:
        return f"it was evaluated with {budget} visual tokens, but an image has {patches} patches here"
    return None


def _why_not_as_it_is(settings: dict[str, Any], model: str | Path, config: Any, patches: int) -> str | None:
    """Why a score that may be of this model is not known to be of it as its config says; `None` if it is."""
    if settings.get("model") is None:
        return "which model was evaluated is not recorded"
    if settings["model"] != full_path(model):
        return f"{settings['model']} was evaluated"
    if config.model_type == TaLlavaConfig.model_type:
        return None  # which has none of these settings
    own = {
        "visual_tokens": count_visual_tokens(config, patches),
        "cmai": config.cmai_max_ratio if config.use_cmai else 0,
    }
    if all(settings.get(key) in (None, value) for key, value in own.items()):
        return None
    return f"it was evaluated with {', '.join(settings_of(settings))}, and has {', '.join(settings_of(own))}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2%}" if isinstance(value, float) else f"{value:,}"


# --- how it is said ------------------------------------------------------------------------------------------------


def _describe_parts(config: Any, cost: Cost) -> list[dict[str, str]]:
    def describe(part: Any) -> str:
        kind = _NAMES.get(part.model_type, part.model_type)
        return f"{kind}, {part.num_hidden_layers} layers of width {part.hidden_size}"

    vision, text = config.vision_config, config.text_config
    kinds = {
        "vision tower": f"{describe(vision)}, patches of {vision.patch_size} pixels",
        "projector": "linear"
        if getattr(config, "projector_type", "mlp") == "linear"
        else "two layers",  # LLaVA's has two
        LANGUAGE_MODEL: f"{describe(text)}, {text.vocab_size:,} tokens",
    }
    if config.model_type == TaLlavaConfig.model_type:
        kinds["adapters"] = (
            f"{config.num_prefix_tokens} prefix tokens, which read every {config.adapter_interval} layers"
        )
    return [
        {"name": name, "kind": kinds[name], "parameters": in_millions(number)}
        for name, number in cost.parameters.items()
    ]
