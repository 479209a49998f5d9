"""The command that scores a model."""

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    BatchSize,
    Cmai,
    Compile,
    MaxNewTokens,
    VisualTokens,
    check_exists,
    check_sources,
    errors_as_messages,
)


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub repo.")],
    output_dir: Annotated[
        Path,
        typer.Option(
            "--output-dir", "-o", help="Folder for predictions and results, and to resume from.", show_default=False
        ),
    ],
    task: Annotated[str, typer.Option(help="easy-vqa, json, folder, pope or if16.")] = "easy-vqa",
    data: Annotated[
        Path | None,
        typer.Option(
            help="File of samples in LLaVA's format (json, if16), file of images with objects (pope), or dataset folder "
            "(folder, if16)."
        ),
    ] = None,
    image_folder: Annotated[
        Path | None, typer.Option(help="Folder that image paths start from. Default: the folder of the data.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split to use, for a folder with several.")] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            min=1, help="Ask an evenly spaced sample of this many questions. Default: all.", show_default=False
        ),
    ] = None,
    visual_tokens: VisualTokens = None,
    cmai: Cmai = None,
    batch_size: BatchSize = 16,
    max_new_tokens: MaxNewTokens = 64,
    compile: Compile = False,
    strategy: Annotated[
        str, typer.Option(help="Absent objects to ask about (pope): random, popular or adversarial.")
    ] = "random",
    objects_per_image: Annotated[
        int, typer.Option(min=1, help="Number of present objects, and of absent ones, to ask about per image (pope).")
    ] = 3,
    seed: Annotated[int, typer.Option(help="Random seed (pope, if16).")] = 0,
    describe_first: Annotated[
        bool,
        typer.Option(
            "--describe-first",
            help="Measure the upper limit (if16): the model describes each image, then answers from its description alone.",
        ),
    ] = False,
    benchmark: Annotated[
        str | None,
        typer.Option(
            metavar="USER/DATASET[:TASK]",
            help="Name of the data as a benchmark on the Hub. `export` and `push` then write the score for its leaderboard.",
        ),
    ] = None,
) -> None:
    """Score a model on questions with known answers. Rerun the same command to resume after an interruption."""
    with errors_as_messages("evaluate"):
        check_sources(model)
        check_exists(data, image_folder)

        from transformers.utils import logging

        from ..evaluation.evaluate import evaluate as run
        from ..evaluation.results import TABLE

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
            compiled=compile,
            strategy=strategy,
            objects_per_image=objects_per_image,
            seed=seed,
            describe_first=describe_first,
            benchmark=benchmark,
        )
    typer.echo((output_dir / TABLE).read_text(encoding="utf-8"))
    typer.echo(f"Results and predictions are in {output_dir}.")
