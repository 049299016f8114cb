"""The console script ``qquant``: one table of subcommands, each of which lives in its own door.

No command is implemented here, and nothing heavy is imported: the doors import torch inside their commands.
"""

from __future__ import annotations

from typing import Annotated

import typer

import qquant
from qquant.chat import chat_command
from qquant.doctor import doctor_command
from qquant.eval import evaluate_command
from qquant.gptq import quantize_command
from qquant.inspect import inspect_command
from qquant.plan import plan_command
from qquant.profile import profile_command
from qquant.report import report_command
from qquant.verify import verify_command

app = typer.Typer(
    name="qquant",
    help="Quantize Qwen- and Llama-like models to Int4/Int8 with GPTQ, and prove what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("quantize")(quantize_command)
app.command("plan")(plan_command)
app.command("eval")(evaluate_command)
app.command("profile")(profile_command)
app.command("report")(report_command)
app.command("chat")(chat_command)
app.command("inspect")(inspect_command)
app.command("verify")(verify_command)
app.command("doctor")(doctor_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qquant {qquant.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Quantize Qwen- and Llama-like models to Int4/Int8 with GPTQ, and prove what it cost."""


def main() -> None:
    """Run the command line; the entry point of the console script."""
    app()
