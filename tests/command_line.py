"""Run commands of `ta-llava` in the process of the tests."""

from typer.testing import CliRunner

from ta_llava.cli import app


def run(*arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `ta-llava` with these arguments."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr
