"""The commands that write and upload models that load without this package."""

from pathlib import Path
from typing import Annotated

import typer

from ..common.files import check_new_folder
from .common import OutFolder, check_exists, check_sources, errors_as_messages


_Model = Annotated[str, typer.Argument(help="Folder or Hub repo of a TA-LLaVA or a compressed LLaVA.")]
_Results = Annotated[
    list[Path] | None,
    typer.Option(
        help="Add the results in this folder of `ta-llava evaluate` to the model card, besides those in MODEL. Repeatable."
    ),
]


def export(
    model: _Model,
    out: OutFolder,
    results: _Results = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Write a new model card even if MODEL has a README.md.")
    ] = False,
) -> None:
    """Write a folder that loads anywhere with trust_remote_code=True, without this package."""
    with errors_as_messages():
        check_new_folder(out)
        check_sources(model)
        check_exists(*(results or ()))

        from ..publishing.export import export_model

        export_model(model, out, results or (), overwrite_card)
    typer.echo(f"Wrote {out}.")


def push(
    model: _Model,
    repo: Annotated[
        str, typer.Argument(help="Repo on the Hub: NAME or USER/NAME. Created if missing.", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="Create a private repo.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to. Created if missing.", show_default="main")
    ] = None,
    results: _Results = None,
    overwrite_card: Annotated[
        bool,
        typer.Option("--overwrite-card", help="Write a new model card even if REPO or MODEL has an edited one."),
    ] = False,
) -> None:
    """Upload what `export` writes to the Hugging Face Hub."""
    with errors_as_messages():
        check_sources(model)
        check_exists(*(results or ()))

        from ..publishing.push import push_model

        pushed = push_model(
            model, repo, private=private, revision=revision, results=results or (), overwrite_card=overwrite_card
        )
    typer.echo(f"Pushed {pushed.url}\nThe revision to pin is {pushed.revision}.")
    if pushed.kept_card:
        typer.echo(
            "The README.md of the repo was kept, except for the revision in its example: it was edited, or it has training "
            "or results that a new one would lack. To replace it with a new one that has the results you pass with "
            "--results, add --overwrite-card. To replace it with yours, run `hf upload REPO FOLDER/README.md README.md`.",
            err=True,
        )


def merge(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub repo of a PEFT adapter, as `train --lora` writes it.")],
    out: OutFolder,
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub repo of the adapter's model. Default: the one it names.")
    ] = None,
) -> None:
    """Merge a LoRA adapter into its model."""
    with errors_as_messages():
        check_new_folder(out)
        check_sources(adapter, model)

        from ..publishing.merge import merge_adapter

        merge_adapter(adapter, out, model)
    typer.echo(f"Wrote {out}.")
