"""The commands that train models."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import check_exists, check_sources, errors_as_messages, is_main_process


if TYPE_CHECKING:
    from ..training.recipe import Recipe


_Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        help="Set a key of the recipe: key=value, e.g. training_arguments.learning_rate=1e-4. Repeatable.",
    ),
]
_CacheFolder = Annotated[
    Path | None,
    typer.Option(
        help="Compute the features of the frozen vision tower once, keep them in this folder, and reuse them."
    ),
]
_OnBadSample = Annotated[
    str | None, typer.Option(help="error: stop at a bad sample. skip: leave it out and record it.")
]


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file, such as those in recipes/.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub repo to start from. Default: the recipe's model.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder to write to. Default: the recipe's.")] = None,
    override: _Overrides = None,
    cache_vision_features: _CacheFolder = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Train the language model with LoRA, and save an adapter.")
    ] = False,
    on_bad_sample: _OnBadSample = None,
) -> None:
    """Train a model with a recipe. Rerun the same command to resume from the last checkpoint."""
    with errors_as_messages():
        check_exists(recipe)
        check_sources(model)

        from ..training.recipe import load_recipe
        from ..training.run import train as run

        loaded = load_recipe(recipe, override or ())
        _set_options(loaded, cache_vision_features, lora, on_bad_sample)
        loaded.model = model or loaded.model
        loaded.output_dir = str(output_dir or loaded.output_dir)
        folder = run(loaded)
    _print_where(folder, loaded.lora is not None)


def curriculum(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipes, in the order of the phases.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub repo that the first phase starts from.")] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Write each phase to a folder in this one, named after its recipe.")
    ] = None,
    override: _Overrides = None,
    cache_vision_features: _CacheFolder = None,
    lora: Annotated[bool, typer.Option("--lora", help="Use LoRA in the last phase.")] = False,
    on_bad_sample: _OnBadSample = None,
) -> None:
    """Train with several recipes in turn. Each starts from the result of the one before."""
    with errors_as_messages():
        check_exists(*recipes)
        check_sources(model)

        from ..training.recipe import load_recipe
        from ..training.run import run_curriculum

        phases = [load_recipe(path, override or ()) for path in recipes]
        phases[0].model = model or phases[0].model
        for path, phase in zip(recipes, phases):
            _set_options(phase, cache_vision_features, lora and phase is phases[-1], on_bad_sample)
            if output_dir is not None:
                phase.output_dir = str(output_dir / path.stem)
        folder = run_curriculum(phases)
    _print_where(folder, phases[-1].lora is not None)


def _set_options(recipe: "Recipe", cache_vision_features: Path | None, lora: bool, on_bad_sample: str | None) -> None:
    if cache_vision_features is not None:
        recipe.cache_vision_features = str(cache_vision_features)
    if lora and recipe.lora is None:
        recipe.lora = {}
    if on_bad_sample is not None:
        for data in filter(None, (recipe.data, recipe.evaluation_data)):
            data.on_bad_sample = on_bad_sample  # type: ignore[assignment]  # `check_recipe` checks the value


def _print_where(folder: Path, is_adapter: bool) -> None:
    if not is_main_process():
        return
    if is_adapter:
        typer.echo(
            f"The LoRA adapter is in {folder}. It needs the model that it was trained on. Ask both with `ta-llava ask IMAGE "
            f"QUESTION --model {folder}`, or merge them into one model with `ta-llava merge {folder} OUT`."
        )
    else:
        typer.echo(f"The model is in {folder}.")
