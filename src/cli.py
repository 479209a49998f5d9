"""The command line: `ta-llava --help`."""

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.errors import StrictDataclassError

from . import __version__


app = typer.Typer(
    help="TA-LLaVA, and VMTC and CMAI for LLaVA: ask questions about images; compress, train, export and convert models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@contextmanager
def _errors_as_messages(extra: str = "train") -> Iterator[None]:
    """
    Errors of the user's input as one line on stderr and exit code 1, instead of a traceback; so too what is not installed,
    with the extra that has it, and Ctrl-C, with exit code 130.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes that train together, the first speaks
            typer.echo(f"Interrupted. {error}".rstrip(), err=True)
        raise typer.Exit(130) from error
    except ModuleNotFoundError as error:
        from .common.errors import how_to_install

        typer.echo(f"error: {error}. What this command needs is in an extra: {how_to_install(extra)}.", err=True)
        raise typer.Exit(1) from error
    except (ValueError, OSError, StrictDataclassError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"ta-llava {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


_VisualTokens = Annotated[
    int | None, typer.Option(help="Of a LLaVA: VMTC on, with so many visual tokens per image.", show_default=False)
]
_Cmai = Annotated[
    float | None,
    typer.Option(
        help="Of a LLaVA: CMAI on, with this share of the image tokens, in (0, 1], inhibited in the last layer; off with 0. "
        "What is not given is as the model is set.",
        show_default=False,
    ),
]


@app.command()
def ask(
    question: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE... QUESTION",
            help="One or more images, then the question about them. Of a folder, each picture is asked about.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub repo. Default: the TA-LLaVA that is shipped; with --visual-tokens or --cmai the LLaVA."
        ),
    ] = None,
    visual_tokens: _VisualTokens = None,
    cmai: _Cmai = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            help='File with one JSON object a line: {"image": "a.png", "question": "..."}, or a list of images. Paths are '
            "relative to the file."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at a time, with --batch.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Answers as one JSON object a line.")] = False,
) -> None:
    """Answer questions about images."""
    question = question or []
    with _errors_as_messages():
        if batch is None and len(question) < 2:
            raise ValueError('give an image and a question, e.g. `ta-llava ask image.png "what color is the shape?"`.')
        if batch is not None and question:
            raise ValueError("give images and a question, or --batch, not both.")
        if question and not question[-1].strip():
            raise ValueError("the question is empty.")
        is_folder = len(question) == 2 and os.path.isdir(question[0])
        if batch is not None:
            items = _read_batch(batch)
        elif is_folder:
            items = [([picture], question[1]) for picture in _pictures_of(question[0])]
        else:
            items = [(question[:-1], question[-1])]
        is_many = batch is not None or is_folder
        sources: list[tuple[list[Any], str]] = list(items)

        from transformers.utils import logging

        from .common.shipped_models import DEFAULT_LLAVA, DEFAULT_MODEL
        from .inference import answer, load

        if not is_many:  # a wrong image is found before a model is loaded
            sources = [(_load_images(question), question[-1])]
        logging.disable_progress_bar()
        default = DEFAULT_MODEL if visual_tokens is None and cmai is None else DEFAULT_LLAVA
        loaded, processor = load(model or default, visual_tokens, cmai)
        answers = answer(
            loaded,
            processor,
            sources,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=is_many,
        )
        for (images, asked), text in zip(items, answers):
            if as_json:
                record: dict[str, Any] = {"image": images[0] if len(images) == 1 else images, "question": asked}
                line = json.dumps({**record, "answer": text}, ensure_ascii=False)
            else:
                line = f"{', '.join(images)}: {asked} {text}" if is_many else text
            print(line, flush=True)


def _pictures_of(folder: str) -> list[str]:
    """Paths of the pictures in a folder, by the endings of their names, in order; raises `ValueError` if there are none."""
    from PIL import Image

    kinds = Image.registered_extensions()
    endings = {ending for ending, kind in kinds.items() if Image.MIME.get(kind, "").startswith("image/")}
    pictures = sorted(path for path in Path(folder).glob("[!.]*") if path.suffix.lower() in endings and path.is_file())
    if not pictures:
        raise ValueError(f"the folder {folder} has no pictures in it, such as a .png or .jpg file.")
    return [str(path) for path in pictures]


def _load_images(arguments: list[str]) -> list[Any]:
    """
    The images of IMAGE... QUESTION; raises `ValueError` for a question that is not in quotes or not the last, and shows
    how it is.
    """
    from .image_loading import load_rgb_image

    images: list[Any] = []
    for argument in arguments[:-1]:
        try:
            images.append(load_rgb_image(argument))
        except ValueError as error:
            if "://" in argument or os.path.exists(argument):
                raise
            if os.path.exists(arguments[-1]) and not Path(argument).suffix:
                paths = [each for each in arguments if os.path.exists(each)]
                words = [each for each in arguments if not os.path.exists(each)]
                swapped = shlex.join(["ta-llava", "ask", *paths, " ".join(words)])
                raise ValueError(f"{error} The question comes last: {swapped}") from error
            if not images:
                raise
            number = len(images)
            quoted = shlex.join(["ta-llava", "ask", *arguments[:number], " ".join(arguments[number:])])
            raise ValueError(f"{error} Words of a question must be in quotes: {quoted}") from error
    return images


def _read_batch(path: Path) -> list[tuple[list[str], str]]:
    """Images and question of every line; everything that can be found wrong is, before a model is loaded."""
    items = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
            images, question = record["image"], record["question"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{where}: expected {{"image": ..., "question": ...}}, got {line[:80]!r}.') from error
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise ValueError(f"{where}: `image` must be a path or URL, or a list of them, got {images!r}.")
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{where}: `question` must be text, got {question!r}.")
        local = [image if "://" in image else str(path.parent / image) for image in images]
        for image in local:
            if "://" not in image and not Path(image).is_file():
                raise ValueError(f"{where}: there is no image file {image}.")
        items.append((local, question))
    if not items:
        raise ValueError(f"{path} has no questions in it.")
    return items


_Results = Annotated[
    list[Path] | None,
    typer.Option(help="Folder of `ta-llava evaluate`, for the model card, besides those in MODEL. Repeatable."),
]


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub repo of a TA-LLaVA or a compressed LLaVA.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    results: _Results = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Write a model card also where MODEL has a README.md.")
    ] = False,
) -> None:
    """Write a folder that loads anywhere with trust_remote_code=True, without this package."""
    with _errors_as_messages():
        from .publishing.export import export_model

        export_model(model, out, results or (), overwrite_card)
    typer.echo(f"Wrote {out}.")


@app.command()
def push(
    model: Annotated[str, typer.Argument(help="Folder or Hub repo of a TA-LLaVA or a compressed LLaVA.")],
    repo: Annotated[str, typer.Argument(help="On the Hub: NAME or USER/NAME. Made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repo.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made if it is not there.", show_default="main")] = None,
    results: _Results = None,
    overwrite_card: Annotated[
        bool,
        typer.Option("--overwrite-card", help="Write a model card also where REPO or MODEL has one that was edited."),
    ] = False,
) -> None:
    """Upload what `export` writes to the Hugging Face Hub."""
    with _errors_as_messages():
        from .publishing.push import push_model

        pushed = push_model(
            model, repo, private=private, revision=revision, results=results or (), overwrite_card=overwrite_card
        )
    typer.echo(f"Pushed {pushed.url}\nThe revision to pin is {pushed.revision}.")
    if pushed.kept_card:
        typer.echo(
            "The repo has a README.md that was edited, or with training or results that a new one would not have, so it was "
            "kept, but for the revision in its example. --overwrite-card replaces it by a new one, with the results that "
            "--results names, `hf upload REPO FOLDER/README.md README.md` by yours.",
            err=True,
        )


@app.command()
def compress(
    llava: Annotated[str, typer.Argument(help="Folder or Hub repo of a LLaVA, e.g. llava-hf/llava-1.5-7b-hf.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    visual_tokens: Annotated[
        int | None, typer.Option(help="VMTC on, with so many visual tokens per image.", show_default=False)
    ] = None,
    cmai: Annotated[
        float | None,
        typer.Option(
            help="CMAI on, with this share of the image tokens, in (0, 1], inhibited in the last layer; off with 0.",
            show_default=False,
        ),
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the weights, also where the file system can link to them.")
    ] = False,
) -> None:
    """
    Write a LLaVA with fewer visual tokens (VMTC) and inhibited attention to them (CMAI), weights unchanged, that loads
    anywhere with trust_remote_code=True.

    What of --visual-tokens and --cmai is not given stays as LLAVA is set. With neither, of a LLaVA that has both off, both
    are turned on: half of the tokens, and 0.6.
    """
    with _errors_as_messages():
        from transformers.utils import logging

        from .building.compress import compress_llava

        logging.set_verbosity_error()
        config = compress_llava(llava, out, visual_tokens, cmai, link=not copy, progress=True)
    budget = config.vmtc_num_visual_tokens or f"{config.vmtc_keep_ratio:.0%} of the"
    settings = [f"VMTC with {budget} visual tokens"] if config.use_vmtc else []
    settings += [f"CMAI up to {config.cmai_max_ratio}"] if config.use_cmai else []
    typer.echo(f"Wrote {out}: {', '.join(settings) or 'neither VMTC nor CMAI'}.")
    if settings:
        typer.echo(
            "Load it with AutoModelForImageTextToText and AutoProcessor, and trust_remote_code=True. "
            "LlavaForConditionalGeneration has neither VMTC nor CMAI, and refuses it."
        )


@app.command()
def visualize(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Image file or URL.")],
    questions: Annotated[
        list[str] | None,
        typer.Argument(metavar="[QUESTION]...", help="For prefix one or more, for cmai one.", show_default=False),
    ] = None,
    show: Annotated[
        str,
        typer.Option(
            help="vmtc: which patches VMTC keeps and merges. prefix: where the prefix of a TA-LLaVA looks for each "
            "question. cmai: what CMAI inhibits for each word of a LLaVA's answer."
        ),
    ] = "vmtc",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Picture to write. Default: vmtc.png, prefix.png or cmai.png."),
    ] = None,
    visual_tokens: Annotated[
        int | None,
        typer.Option(
            help="Visual tokens to leave. Default: as the model is set; for vmtc of a model without VMTC half of its "
            "patches.",
            show_default=False,
        ),
    ] = None,
    cmai: Annotated[
        float | None,
        typer.Option(
            help="For cmai: share of the image tokens inhibited in the last layer. Default: as the model is set, or 0.6.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub repo; for vmtc of a LLaVA, a TA-LLaVA or a vision tower (CLIP, SigLIP, DINOv2). Default: a "
            "model shipped with the package."
        ),
    ] = None,
) -> None:
    """Draw what a model does with an image: what VMTC merges, where a prefix looks, or what CMAI inhibits."""
    with _errors_as_messages():
        from PIL import Image
        from transformers.utils import logging

        from .image_loading import load_rgb_image

        questions = questions or []
        _check_overlay(show, questions, visual_tokens, cmai)
        out = out or Path(f"{show}.png")
        if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
            raise ValueError(f"{out} has no ending of a picture, such as .png.")
        if not out.parent.is_dir():
            raise ValueError(f"There is no folder {out.parent}.")
        opened = load_rgb_image(image)
        if out.exists() and Path(image).exists() and out.samefile(image):
            raise ValueError(f"{out} is the image itself. Name another file with -o.")

        from .analysis.visualize import visualize as draw
        from .analysis.visualize import visualize_inhibition, visualize_prefix
        from .common.shipped_models import DEFAULT_LLAVA, DEFAULT_MODEL

        logging.set_verbosity_error()  # else it reports the weights of the language model as left over
        logging.disable_progress_bar()
        if show == "vmtc":
            picture, stages = draw(opened, model or DEFAULT_MODEL, visual_tokens)
            lines = [stage.title for stage in stages]
            lines = lines or ["All patches are left, so nothing is merged; ask for fewer --visual-tokens."]
        elif show == "prefix":
            picture, views = visualize_prefix(opened, questions, model or DEFAULT_MODEL)
            lines = [f"{view.question} {view.answer}" for view in views]
        else:
            picture, view = visualize_inhibition(opened, questions[0], model or DEFAULT_LLAVA, visual_tokens, cmai)
            lines = [f"{view.question} {view.answer}"]
        picture.save(out)
    typer.echo("\n".join([*lines, f"Wrote {out}."]))


def _check_overlay(show: str, questions: list[str], visual_tokens: int | None, cmai: float | None) -> None:
    """Raises `ValueError` for arguments of `visualize` that do not go together."""
    if show not in ("vmtc", "prefix", "cmai"):
        raise ValueError(f"--show is {show!r}; it can be vmtc, prefix or cmai.")
    if show == "vmtc" and questions:
        raise ValueError(f"VMTC does not read the question {questions[0]!r}. Add --show prefix or --show cmai.")
    if show == "prefix" and not questions:
        raise ValueError("--show prefix needs one or more questions after the image.")
    if show == "cmai" and len(questions) != 1:
        raise ValueError(f"--show cmai needs one question after the image, got {len(questions)}.")
    if show == "prefix" and visual_tokens is not None:
        raise ValueError("--show prefix shows a TA-LLaVA as it is set, without --visual-tokens.")
    if show != "cmai" and cmai is not None:
        raise ValueError("--cmai is for --show cmai.")


_VisionTower = Annotated[
    str, typer.Option(help="Folder or Hub repo of a CLIP, SigLIP or DINOv2, with image processor.", show_default=False)
]
_LanguageModel = Annotated[
    str, typer.Option(help="Folder or Hub repo of a causal language model, with tokenizer.", show_default=False)
]
_GgufFile = Annotated[str | None, typer.Option(help="A GGUF file in there to read, instead of safetensors.")]
_ChatTemplate = Annotated[
    Path | None, typer.Option(help="A file with a Jinja template for a language model that has none.")
]
_Seed = Annotated[int, typer.Option(help="Of the weights that are new.")]


@app.command()
def init(
    out: Annotated[Path, typer.Argument(help="New folder.")],
    vision_tower: _VisionTower,
    language_model: _LanguageModel,
    gguf_file: _GgufFile = None,
    chat_template: _ChatTemplate = None,
    num_prefix_tokens: Annotated[int, typer.Option(help="Learned tokens that read question and image.")] = 32,
    adapter_interval: Annotated[int, typer.Option(help="They read every so many layers.")] = 4,
    projector: Annotated[str, typer.Option(help="linear or mlp.")] = "linear",
    seed: _Seed = 0,
) -> None:
    """Make a TA-LLaVA, to be trained, from a vision tower and a language model."""
    with _errors_as_messages():
        from transformers.utils import logging

        from .building.assemble import assemble_ta_llava

        logging.set_verbosity_error()

        notes = assemble_ta_llava(
            out,
            vision_tower,
            language_model,
            gguf_file=gguf_file,
            chat_template=_read_template(chat_template),
            num_prefix_tokens=num_prefix_tokens,
            adapter_interval=adapter_interval,
            projector_type=projector,
            seed=seed,
        )
    typer.echo("\n".join([*notes, f"Wrote {out}."]))


@app.command()
def init_llava(
    out: Annotated[Path, typer.Argument(help="New folder.")],
    vision_tower: _VisionTower,
    language_model: _LanguageModel,
    gguf_file: _GgufFile = None,
    chat_template: _ChatTemplate = None,
    visual_tokens: Annotated[
        int | None, typer.Option(help="VMTC on, with so many visual tokens per image.", show_default=False)
    ] = None,
    cmai: Annotated[
        float | None, typer.Option(help="CMAI on, with this share inhibited in the last layer.", show_default=False)
    ] = None,
    seed: _Seed = 0,
) -> None:
    """Make a LLaVA, to be trained, with VMTC and CMAI as asked for, from a vision tower and a language model."""
    with _errors_as_messages():
        from transformers.utils import logging

        from .building.assemble import assemble_llava
        from .building.compress import vmtc_cmai_flags

        logging.set_verbosity_error()

        notes = assemble_llava(
            out,
            vision_tower,
            language_model,
            gguf_file=gguf_file,
            chat_template=_read_template(chat_template),
            seed=seed,
            **vmtc_cmai_flags(visual_tokens, cmai),
        )
    typer.echo("\n".join([*notes, f"Wrote {out}."]))


def _read_template(path: Path | None) -> str | None:
    return None if path is None else _read_text(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {path}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}.") from error


_Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override", help="key=value of the recipe, e.g. training_arguments.learning_rate=1e-4. Repeatable."
    ),
]
_CacheFolder = Annotated[
    Path | None,
    typer.Option(help="Compute the features of the frozen vision tower once, into this folder, and reuse them."),
]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file, such as those in recipes/.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub repo to start from, instead of the recipe's.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Where to write, instead of the recipe's.")] = None,
    override: _Overrides = None,
    cache_vision_features: _CacheFolder = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train the language model by LoRA; saves an adapter.")] = False,
    on_bad_sample: Annotated[str | None, typer.Option(help="error, or skip and write down.")] = None,
) -> None:
    """Train a model by a recipe. Started again, it goes on where it was interrupted."""
    with _errors_as_messages():
        from .training.recipe import load_recipe
        from .training.run import train as run

        loaded = load_recipe(recipe, override or ())
        _set_options(loaded, cache_vision_features, lora, on_bad_sample)
        loaded.model = model or loaded.model
        loaded.output_dir = str(output_dir or loaded.output_dir)
        folder = run(loaded)
    _say_what_came_out(folder, loaded.lora is not None)


@app.command()
def curriculum(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipes, in the order of the phases.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub repo that the first phase starts from.")] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Write each phase to the folder of its recipe's name in this one.")
    ] = None,
    override: _Overrides = None,
    cache_vision_features: _CacheFolder = None,
    lora: Annotated[bool, typer.Option("--lora", help="LoRA in the last phase.")] = False,
    on_bad_sample: Annotated[str | None, typer.Option(help="error, or skip and write down.")] = None,
) -> None:
    """Train by several recipes in turn, each from what came out of the one before."""
    with _errors_as_messages():
        from .training.recipe import load_recipe
        from .training.run import run_curriculum

        phases = [load_recipe(path, override or ()) for path in recipes]
        phases[0].model = model or phases[0].model
        for path, phase in zip(recipes, phases):
            _set_options(phase, cache_vision_features, lora and phase is phases[-1], on_bad_sample)
            if output_dir is not None:
                phase.output_dir = str(output_dir / path.stem)
        folder = run_curriculum(phases)
    _say_what_came_out(folder, phases[-1].lora is not None)


def _set_options(recipe: Any, cache_vision_features: Path | None, lora: bool, on_bad_sample: str | None) -> None:
    if cache_vision_features is not None:
        recipe.cache_vision_features = str(cache_vision_features)
    if lora and recipe.lora is None:
        recipe.lora = {}
    if on_bad_sample is not None:
        for data in filter(None, (recipe.data, recipe.evaluation_data)):
            data.on_bad_sample = on_bad_sample


def _say_what_came_out(folder: Path, is_adapter: bool) -> None:
    """Of several processes that train together, the first speaks."""
    if os.environ.get("RANK", "0") != "0":
        return
    if is_adapter:
        typer.echo(
            f"The LoRA adapter is in {folder}; it needs the model that it was trained on. Ask both with `ta-llava ask IMAGE "
            f"QUESTION --model {folder}`, merge them into one model with `ta-llava merge {folder} OUT`."
        )
    else:
        typer.echo(f"The model is in {folder}.")


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub repo of a PEFT adapter, as `train --lora` writes it.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub repo of its model. Default: the one it names.")
    ] = None,
) -> None:
    """Merge a LoRA adapter into its model."""
    with _errors_as_messages():
        from .publishing.merge import merge_adapter

        merge_adapter(adapter, out, model)
    typer.echo(f"Wrote {out}.")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub repo.")],
    output_dir: Annotated[
        Path,
        typer.Option(
            "--output-dir", "-o", help="For predictions and results; also to go on from.", show_default=False
        ),
    ],
    task: Annotated[str, typer.Option(help="easy-vqa, json, folder, pope or if16.")] = "easy-vqa",
    data: Annotated[
        Path | None,
        typer.Option(
            help="File of samples in LLaVA's format (json, if16), of images with objects (pope), or folder of a dataset "
            "(folder, if16)."
        ),
    ] = None,
    image_folder: Annotated[
        Path | None, typer.Option(help="What paths of images start from. Default: where the data is.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a folder with several.")] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Evenly spaced sample of so many, instead of all.", show_default=False)
    ] = None,
    visual_tokens: _VisualTokens = None,
    cmai: _Cmai = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions asked at a time; does not change an answer.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    strategy: Annotated[
        str, typer.Option(help="pope: which absent objects are asked for: random, popular or adversarial.")
    ] = "random",
    objects_per_image: Annotated[int, typer.Option(min=1, help="pope: present ones, and as many absent ones.")] = 3,
    seed: Annotated[int, typer.Option(help="Of pope and if16.")] = 0,
    describe_first: Annotated[
        bool,
        typer.Option(
            "--describe-first",
            help="if16: its upper limit. The model describes each image, and answers about its description alone.",
        ),
    ] = False,
    benchmark: Annotated[
        str | None,
        typer.Option(
            metavar="USER/DATASET[:TASK]",
            help="What the data are called as a benchmark on the Hub; `export` and `push` then write the score for its "
            "leaderboard.",
        ),
    ] = None,
) -> None:
    """Ask a model questions whose answers are known, and score it. Started again, it goes on where it was interrupted."""
    with _errors_as_messages("evaluate"):
        from transformers.utils import logging

        from .evaluation.evaluate import evaluate as run
        from .evaluation.results import TABLE

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        run(
            model,
            task,
            output_dir,
            data=data,
            image_folder=image_folder,
            split=split,
            num_questions=questions,
            num_visual_tokens=visual_tokens,
            cmai_max_ratio=cmai,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            strategy=strategy,
            objects_per_image=objects_per_image,
            seed=seed,
            describe_first=describe_first,
            benchmark=benchmark,
        )
    typer.echo((output_dir / TABLE).read_text(encoding="utf-8"))
    typer.echo(f"Results and predictions are in {output_dir}.")


@app.command()
def cost(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG|MODEL]...",
            help="config.json, folder or Hub repo of a TA-LLaVA or LLaVA; its weights are not read. Default: the paper's "
            "TA-LLaVA; with --visual-tokens or --cmai LLaVA-1.5-7B.",
        ),
    ] = None,
    visual_tokens: _VisualTokens = None,
    cmai: _Cmai = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Of the prompt.")] = 40,
    images: Annotated[int, typer.Option(min=1, help="Of the prompt.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Numbers as JSON.")] = False,
) -> None:
    """Count parameters, operations and cache of models, beside LLaVA-1.5-7B and 13B."""
    with _errors_as_messages():
        from dataclasses import asdict

        from transformers.utils import logging

        from .analysis.cost import FULL_SIZE, count_cost, format_cost, read_config
        from .building.compress import with_vmtc_and_cmai

        logging.set_verbosity_error()
        settings = [f"{visual_tokens} visual tokens"] if visual_tokens is not None else []
        settings += [f"CMAI {cmai or 'off'}"] if cmai is not None else []
        configs = {}  # what cannot be read is found before anything is counted
        for name in models or (FULL_SIZE[1:2] if settings else FULL_SIZE[:1]):
            config, size = configs[name] = read_config(name)
            if settings:
                configs[", ".join([name, *settings])] = with_vmtc_and_cmai(config, visual_tokens, cmai), size
        configs |= {name: read_config(name) for name in FULL_SIZE[1:]}
        costs = {name: count_cost(config, text_tokens, images, size) for name, (config, size) in configs.items()}
        if as_json:
            typer.echo(json.dumps({name: asdict(value) for name, value in costs.items()}, indent=1))
        else:
            typer.echo(format_cost(costs, FULL_SIZE[1:]))


@app.command()
def convert_original(
    folder: Annotated[Path, typer.Argument(help="Checkpoint as the authors' code saves it.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    vision_tower: Annotated[str, typer.Option(help="Folder or Hub repo of its vision tower.")],
) -> None:
    """Convert a checkpoint of the authors' code. Writes a processor too, if the folder has a tokenizer."""
    with _errors_as_messages():
        from .building.convert_original import build_processor
        from .building.convert_original import convert_original as convert
        from .common.files import atomic_folder, check_new_folder

        check_new_folder(out)
        model = convert(folder, vision_tower)
        has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        processor = build_processor(folder, vision_tower, model.config) if has_tokenizer else None
        with atomic_folder(out) as unfinished:
            model.save_pretrained(unfinished)
            if processor is not None:
                processor.save_pretrained(unfinished)
    typer.echo(f"Wrote {out}.")
    if not has_tokenizer:
        typer.echo(f"{folder} has no tokenizer, so {out} has no processor.", err=True)


if __name__ == "__main__":
    sys.exit(app())
