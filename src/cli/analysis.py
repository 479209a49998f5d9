"""The commands that show what a model looks at and what it costs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from .common import Cmai, VisualTokens, check_exists, check_image, check_sources, errors_as_messages


OVERLAYS = ("vmtc", "prefix", "cmai")


def visualize(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Image file or URL.")],
    questions: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[QUESTION]...", help="One or more questions for prefix, one for cmai.", show_default=False
        ),
    ] = None,
    show: Annotated[
        str,
        typer.Option(
            help="vmtc: show which patches VMTC keeps and merges. prefix: show where the prefix of a TA-LLaVA looks for "
            "each question. cmai: show what CMAI inhibits for each word of a LLaVA's answer."
        ),
    ] = "vmtc",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Picture to write. Default: vmtc.png, prefix.png or cmai.png."),
    ] = None,
    visual_tokens: Annotated[
        int | None,
        typer.Option(
            help="Keep this many visual tokens. Default: the model's setting, or half of the patches for vmtc with a model "
            "without VMTC.",
            show_default=False,
        ),
    ] = None,
    cmai: Annotated[
        float | None,
        typer.Option(
            help="Inhibit this share of the image tokens in the last layer (cmai). Default: the model's setting, or 0.6.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub repo. For vmtc: a LLaVA, a TA-LLaVA or a vision tower (CLIP, SigLIP, DINOv2). Default: a "
            "shipped model."
        ),
    ] = None,
) -> None:
    """Draw what a model does with an image: what VMTC merges, where a prefix looks, or what CMAI inhibits."""
    with errors_as_messages():
        questions = questions or []
        _check_overlay(show, questions, visual_tokens, cmai)
        out = out or Path(f"{show}.png")
        _check_picture(out, image)
        check_sources(model)
        lines = _draw(image, questions, show, out, visual_tokens, cmai, model)
    typer.echo("\n".join([*lines, f"Wrote {out}."]))


def _check_overlay(show: str, questions: list[str], visual_tokens: int | None, cmai: float | None) -> None:
    """Raises `ValueError` for arguments of `visualize` that do not go together."""
    if show not in OVERLAYS:
        raise ValueError(f"--show must be vmtc, prefix or cmai, got {show!r}.")
    if show == "vmtc" and questions:
        raise ValueError(f"VMTC does not read the question {questions[0]!r}. Add --show prefix or --show cmai.")
    if show == "prefix" and not questions:
        raise ValueError("--show prefix needs one or more questions after the image.")
    if show == "cmai" and len(questions) != 1:
        raise ValueError(f"--show cmai needs one question after the image, got {len(questions)}.")
    if show == "prefix" and visual_tokens is not None:
        raise ValueError("--visual-tokens is not for --show prefix, which shows a TA-LLaVA.")
    if show != "cmai" and cmai is not None:
        raise ValueError("--cmai is for --show cmai only.")


def _check_picture(out: Path, image: str) -> None:
    """Raises `ValueError` if no picture of `image` can be written to `out`, or there is no image."""
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{out} has no suffix of a picture, such as .png.")
    if not out.parent.is_dir():
        raise ValueError(f"There is no folder {out.parent}.")
    check_image(image)
    if out.exists() and Path(image).exists() and out.samefile(image):
        raise ValueError(f"{out} is the image itself. Name another file with -o.")


def _draw(
    image: str,
    questions: list[str],
    show: str,
    out: Path,
    visual_tokens: int | None,
    cmai: float | None,
    model: str | None,
) -> list[str]:
    """Writes the picture; returns the lines to print about it."""
    from transformers.utils import logging

    from ..analysis.visualize import visualize, visualize_inhibition, visualize_prefix
    from ..common.shipped_models import DEFAULT_LLAVA, DEFAULT_MODEL
    from ..image_loading import load_rgb_image

    opened = load_rgb_image(image)
    logging.set_verbosity_error()  # otherwise it reports the weights of the language model as left over
    logging.disable_progress_bar()
    if show == "vmtc":
        picture, stages = visualize(opened, model or DEFAULT_MODEL, visual_tokens)
        lines = [stage.title for stage in stages]
        lines = lines or ["All patches are kept, so nothing is merged. Pass fewer --visual-tokens."]
    elif show == "prefix":
        picture, views = visualize_prefix(opened, questions, model or DEFAULT_MODEL)
        lines = [f"{view.question} {view.answer}" for view in views]
    else:
        picture, view = visualize_inhibition(opened, questions[0], model or DEFAULT_LLAVA, visual_tokens, cmai)
        lines = [f"{view.question} {view.answer}"]
    picture.save(out)
    return lines


def cost(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG|MODEL]...",
            help="config.json, folder or Hub repo of a TA-LLaVA or LLaVA, or llava-next-7b. The weights are not read. "
            "Default: the paper's TA-LLaVA; with --visual-tokens or --cmai LLaVA-1.5-7B.",
        ),
    ] = None,
    visual_tokens: VisualTokens = None,
    cmai: Cmai = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Number of text tokens in the prompt.")] = 40,
    images: Annotated[int, typer.Option(min=1, help="Number of images in the prompt.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Count parameters, operations and cache of models, beside LLaVA-1.5-7B and 13B."""
    with errors_as_messages():
        check_exists(*(Path(name) for name in models or () if name.endswith(".json")))
        check_sources(*(name for name in models or () if "/" in name))  # others may be names of models of full size

        from transformers.utils import logging

        from ..analysis.cost import FULL_SIZE, REFERENCES, count_cost, format_cost, read_config
        from ..building.compress import with_vmtc_and_cmai
        from ..evaluation.results import describe_vmtc_and_cmai

        logging.set_verbosity_error()
        configs = {}  # all are read before anything is counted
        changes = visual_tokens is not None or cmai is not None
        for name in models or (FULL_SIZE[1:2] if changes else FULL_SIZE[:1]):
            config, size = configs[name] = read_config(name)
            if changes:
                settings = describe_vmtc_and_cmai(visual_tokens, None, config.model_type)
                settings += [f"CMAI {cmai or 'off'}"] if cmai is not None else []
                configs[", ".join([name, *settings])] = with_vmtc_and_cmai(config, visual_tokens, cmai), size
        configs |= {name: read_config(name) for name in REFERENCES}
        costs = {name: count_cost(config, text_tokens, images, size) for name, (config, size) in configs.items()}
        if as_json:
            typer.echo(json.dumps({name: asdict(value) for name, value in costs.items()}, indent=1))
        else:
            typer.echo(format_cost(costs, [name for name in FULL_SIZE[1:] if name in costs]))
