"""The command that asks questions about images."""

import json
import os
import shlex
from collections.abc import Iterable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from tqdm.auto import tqdm

from .common import (
    BatchSize,
    Cmai,
    Compile,
    MaxNewTokens,
    VisualTokens,
    check_image,
    check_sources,
    errors_as_messages,
    read_text,
)


def ask(
    question: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE... QUESTION",
            help="One or more images, then the question about them. For a folder, ask about each of its images; those "
            "that cannot be read are named, and the exit code is 1.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub repo. Default: the shipped TA-LLaVA; with --visual-tokens or --cmai the shipped LLaVA."
        ),
    ] = None,
    visual_tokens: VisualTokens = None,
    cmai: Cmai = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            help='File with one JSON object per line: {"image": "a.png", "question": "..."}. "image" can also be a list. '
            "Paths are relative to the file."
        ),
    ] = None,
    batch_size: BatchSize = 16,
    max_new_tokens: MaxNewTokens = 64,
    compile: Compile = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer and line.")] = False,
) -> None:
    """Answer questions about images."""
    with errors_as_messages():
        items, is_many = _read_questions(question or [], batch)
        check_sources(model)

        from transformers.utils import logging

        from ..common.shipped_models import DEFAULT_LLAVA, DEFAULT_MODEL
        from ..image_loading import load_rgb_image
        from ..inference import answer, load

        # An unreadable image is found before the model is loaded.
        num_asked = len(items)
        if is_many:
            items = _readable(items, batch)
        sources: list[tuple[list[Any], str]] = list(items)
        if not is_many:
            sources = [([load_rgb_image(image) for image in images], asked) for images, asked in items]
        logging.disable_progress_bar()
        default = DEFAULT_MODEL if visual_tokens is None and cmai is None else DEFAULT_LLAVA
        loaded, processor = load(model or default, visual_tokens, cmai, compile)
        answers = answer(
            loaded,
            processor,
            sources,
            batch_size=min(batch_size, len(sources)),
            max_new_tokens=max_new_tokens,
            progress=is_many,
        )
        _print_answers(items, answers, with_question=is_many, as_json=as_json)
        if len(items) < num_asked:
            raise ValueError(f"{num_asked - len(items)} of {num_asked} pictures cannot be read; they are named above.")


def _print_answers(
    items: list[tuple[list[str], str]], answers: Iterable[str], with_question: bool, as_json: bool
) -> None:
    """Prints each answer as soon as it is there: alone, with its images and question, or as a line of JSON."""
    for (images, question), answer in zip(items, answers):
        line = f"{', '.join(images)}: {question} {answer}" if with_question else answer
        if as_json:
            image = images[0] if len(images) == 1 else images
            line = json.dumps({"image": image, "question": question, "answer": answer}, ensure_ascii=False)
        print(line, flush=True)


# --- questions -----------------------------------------------------------------------------------------------------


def _read_questions(arguments: list[str], batch: Path | None) -> tuple[list[tuple[list[str], str]], bool]:
    """
    Images and question of each item, from `IMAGE... QUESTION` or a batch file; and whether there can be many of them.

    Raises:
        `ValueError`: Neither or both are given, the question is empty, or an image is missing.
    """
    if batch is None and len(arguments) < 2:
        raise ValueError('Give an image and a question, e.g. `ta-llava ask image.png "what color is the shape?"`.')
    if batch is not None and arguments:
        raise ValueError("Give images and a question, or --batch, not both.")
    if batch is not None:
        return _read_batch(batch), True
    *images, question = arguments
    if not question.strip():
        raise ValueError("The question is empty.")
    if len(images) == 1 and os.path.isdir(images[0]):
        return [([picture], question) for picture in _pictures_of(images[0])], True
    _check_images(arguments)
    folders = [image for image in images if os.path.isdir(image)]
    if folders:
        alone = shlex.join(["ta-llava", "ask", folders[0], question])
        raise ValueError(
            f"{folders[0]!r} is a folder, and there are other images or folders beside it. Ask about one folder at a time: "
            f"{alone}; or name its images instead of the folder."
        )
    return [(images, question)], False


def _pictures_of(folder: str) -> list[str]:
    """
    Sorted paths of the pictures in a folder, recognised by their suffixes.

    Raises:
        `ValueError`: There are none.
    """
    formats = Image.registered_extensions()
    suffixes = {suffix for suffix, name in formats.items() if Image.MIME.get(name, "").startswith("image/")}
    pictures = sorted(
        path for path in Path(folder).glob("[!.]*") if path.suffix.lower() in suffixes and path.is_file()
    )
    if not pictures:
        raise ValueError(f"The folder {folder} has no pictures in it, such as a .png or .jpg file.")
    return [str(path) for path in pictures]


def _readable(items: list[tuple[list[str], str]], batch: Path | None) -> list[tuple[list[str], str]]:
    """
    The items whose image files can be read to their end; a line on stderr names each that cannot. URLs are not opened.

    Raises:
        `ValueError`: None can be read or, of a batch, not all.
    """
    from ..data.samples import find_damage

    paths = list(dict.fromkeys(image for images, _ in items for image in images if "://" not in image))
    with ThreadPool(os.cpu_count()) as pool:
        damages = pool.imap(find_damage, paths)
        bar = tqdm(damages, "check images", len(paths), leave=False, disable=None, unit="image")
        damaged = {path: damage for path, damage in zip(paths, bar) if damage}
    for damage in damaged.values():
        typer.echo(f"error: {damage}", err=True)
    readable = [(images, question) for images, question in items if damaged.keys().isdisjoint(images)]
    if damaged and (batch is not None or not readable):
        raise ValueError(f"{len(damaged)} of {len(paths)} images cannot be read, so nothing was asked.")
    return readable


def _check_images(arguments: list[str]) -> None:
    """
    Raises `ValueError` for a missing image in `IMAGE... QUESTION`. If the question is not quoted or not last, the message
    shows the right command.
    """
    for number, argument in enumerate(arguments[:-1]):
        try:
            check_image(argument)
        except ValueError as error:
            if os.path.exists(arguments[-1]) and not Path(argument).suffix:
                paths = [each for each in arguments if os.path.exists(each)]
                words = [each for each in arguments if not os.path.exists(each)]
                swapped = shlex.join(["ta-llava", "ask", *paths, " ".join(words)])
                raise ValueError(f"{error} Put the question last: {swapped}") from error
            if number == 0:
                raise
            quoted = shlex.join(["ta-llava", "ask", *arguments[:number], " ".join(arguments[number:])])
            raise ValueError(f"{error} Put the question in quotes: {quoted}") from error


def _read_batch(path: Path) -> list[tuple[list[str], str]]:
    """
    Images and question of every line of a batch file. Paths start from its folder.

    Raises:
        `ValueError`: The file is missing or has no questions; a line is not as it must be, or its image is missing.
    """
    items = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
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
