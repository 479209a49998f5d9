"""
The command line: `ta-llava --help`. Each module has the commands of one folder of the package.

`--help`, a mistyped option, a missing file and shell completion answer at once: a command checks what it can, and only then
imports torch and transformers.
"""

from typing import Annotated

import typer

from .. import __version__
from .analysis import cost, visualize
from .building import compress, convert_original, init, init_llava
from .evaluation import evaluate
from .inference import ask
from .publishing import export, merge, push
from .training import curriculum, train


app = typer.Typer(
    help="TA-LLaVA, and VMTC and CMAI for LLaVA: ask questions about images; compress, train, export and convert models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


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


for _command in (  # in the order of the help
    *(ask, visualize, cost, evaluate),
    *(compress, init, init_llava, convert_original),
    *(train, curriculum, merge),
    *(export, push),
):
    app.command()(_command)
