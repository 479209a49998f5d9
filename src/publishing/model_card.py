"""
Writes the model card of a model that is published: `README.md`, with what is known of the model and nothing else.

The facts come from the config, from `training_summary.json` of `ta-llava train`, from `results.json` of
`ta-llava evaluate`, and from [`count_cost`]. The words are in `hub_card/model_card.md.jinja`.
"""

import filecmp
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from ..analysis.cost import (
    LANGUAGE_MODEL,
    Cost,
    count_cost,
    count_views,
    in_millions,
    largest_picture,
    read_config,
    scaled,
)
from ..common.families import family_of, has_views
from ..common.shipped_models import DEFAULT_LLAVA, DEFAULT_MODEL
from ..configuration_ta_llava import TaLlavaConfig
from ..evaluation.results import is_repo
from ..modeling_ta_llava import TaLlavaForConditionalGeneration
from ..training.summary import SUMMARY, TrainingSummary
from .evaluations import read_evaluations
from .existing_card import pin_line, seal
from .licences import CODE_LICENCE, LICENCE_TERMS, find_licence


_WEIGHTS = "model.safetensors"
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


def write_model_card(model: str | Path, name: str, results: Sequence[str | Path] = ()) -> str:
    """
    Writes the card of a TA-LLaVA, or of a LLaVA with VMTC and CMAI.

    Args:
        model (`str` or `Path`): Folder or Hub repo.
        name (`str`): Name of the folder or repo that gets the card.
        results (`Sequence`): Folders that `ta-llava evaluate` has written, besides those inside `model`. If another folder
            or repo was evaluated, the card names it. A `results.json` inside `model` that is something else, or cannot be
            of it, is left out, with a warning.

    Returns:
        `str`: Metadata in YAML, and Markdown.

    Raises:
        `ValueError`: The config cannot be read; one of the `results` has none, or those of another type of model or with
            settings that `model` cannot have.
    """
    config, image_size = read_config(model)
    evaluations = read_evaluations(model, results)
    phases, start = _read_training(Path(model))
    is_shipped = _is_shipped(Path(model))
    parts = [part._name_or_path for part in (config.vision_config, config.text_config) if is_repo(part._name_or_path)]
    origin = next(filter(is_repo, (start, getattr(config, "base_model_name_or_path", None))), None)
    bases = [origin] if origin else parts
    licence = CODE_LICENCE if is_shipped else find_licence([*bases, *parts])
    is_ta_llava = config.model_type == TaLlavaConfig.model_type
    model_class = TaLlavaForConditionalGeneration if is_ta_llava else family_of(config.model_type).head

    data = ModelCardData(
        base_model=bases or None,
        datasets=sorted({phase["dataset"] for phase in phases if phase["dataset"]}) or None,
        library_name="transformers",
        license=licence,
        pipeline_tag="image-text-to-text",
        tags=list(model_class.model_tags),
        model_name=name if evaluations else None,
        eval_results=[result for evaluation in evaluations for result in evaluation.metadata] or None,
    )
    text = _template().render(
        name=name,
        pin=pin_line(name, "main"),
        base_models=bases,
        phases=phases,
        results=evaluations,
        licence=licence,
        terms=LICENCE_TERMS.get(licence or ""),
        is_shipped=is_shipped,
        # `compress` sets it for weights that were trained without VMTC; they may have been trained with it since.
        may_be_untrained_vmtc=config.use_vmtc and config.vmtc_merge_weights == "normalized" and not phases,
        **_describe_architecture(config, image_size),
    )
    return seal(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.rstrip()}\n")))


def _template() -> jinja2.Template:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(
        files("ta_llava.hub_card").joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    )


def _is_shipped(model: Path) -> bool:
    """Whether a folder has the weights of a model that comes with the package."""
    weights = model / _WEIGHTS
    shipped = [folder / _WEIGHTS for folder in (DEFAULT_MODEL, DEFAULT_LLAVA)]
    return weights.is_file() and any(file.is_file() and filecmp.cmp(weights, file, shallow=False) for file in shipped)


def _read_training(folder: Path) -> tuple[list[dict[str, Any]], str | None]:
    """
    The phases of training that led to a folder, in order, and the Hub repo that they began with. Names in a recipe are only
    followed where the recipe was run: elsewhere the name of a folder could pass for that of a repo.
    """
    phases: list[dict[str, Any]] = []
    seen: set[Path] = set()
    while (folder / SUMMARY).is_file() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        summary = TrainingSummary.read(folder)
        recipe = summary.recipe
        # A model that an adapter was merged into has the adapter's summary.
        here, written = folder / SUMMARY, Path(recipe.output_dir) / SUMMARY
        is_here = written.is_file() and filecmp.cmp(here, written, shallow=False)
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


# --- in words ------------------------------------------------------------------------------------------------------


def _describe_architecture(config: Any, image_size: int) -> dict[str, Any]:
    """Variables of the template that are known from the config alone."""
    cost = count_cost(config, _TEXT_TOKENS, image_size=image_size)
    is_ta_llava = config.model_type == TaLlavaConfig.model_type
    height, width, patches = image_size, image_size, (image_size // config.vision_config.patch_size) ** 2
    if has_views(config):
        (height, width), patches = largest_picture(config), patches * count_views(config)
    return {
        "config": config,
        "has_views": has_views(config),
        "is_ta_llava": is_ta_llava,
        "use_cmai": not is_ta_llava and config.use_cmai,
        "image": f"{height} x {width}",
        "patches": patches,
        "visual_tokens": None if is_ta_llava else cost.num_tokens - _TEXT_TOKENS,
        "text_tokens": _TEXT_TOKENS,
        "cost": cost,
        "parts": _describe_parts(config, cost),
        "parameters": in_millions(sum(cost.parameters.values())),
        "operations": scaled(sum(cost.operations.values()), "FLOP"),
        "cache": scaled(cost.cache_bytes, "B"),
    }


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
