"""``qquant verify``: whether a GPTQ checkpoint, ours or another tool's, is sound, may be published, and runs elsewhere.

What is checked is verification.py; nothing in the folder is run or changed.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from qquant.console import counts, printable, user_errors
from qquant.errors import BadModelError

if TYPE_CHECKING:
    from qquant.checks.findings import Verification


def verify_command(
    folder: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    tp: Annotated[str, typer.Option(help="Cards that it must be cut over, as 2,4,8; a problem if it cannot.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Check files, keys, every tensor, tokenizer, private text and manifest. Exit code 4 if there is a problem."""
    with user_errors(debug=debug):
        ranks = counts(tp, "--tp") if tp else ()
        from qquant.progress import quiet_transformers, step_progress
        from qquant.verification import verify_checkpoint

        quiet_transformers()
        with step_progress() as on_progress:
            found = verify_checkpoint(folder, tp=ranks, on_progress=on_progress)
        typer.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False) if as_json else _report(found))
        if not found.sound:
            count = len(found.problems)
            raise BadModelError(f"{found.folder} has {count} problem{'s' * (count > 1)}, first: {_line(found)}")


def _report(found: Verification) -> str:
    """One line for each check, and one for each finding below it."""
    lines = []
    for check in found.checks:
        state = {"problem": "PROBLEM", "warning": "WARNING"}.get(check.outcome, check.outcome)
        lines.append(f"{state:<12}{check.name:<16}{check.about}{f' ({check.left_out})' if check.left_out else ''}")
        lines += [f"{'':12}{finding.level}: {finding.subject}: {finding.text}" for finding in check.findings]
        if check.name == "tensor parallel":
            fits = (f"{ranks} cards: {reason or 'fits'}" for ranks, reason in found.tensor_parallel.items())
            lines += [f"{'':12}{line}" for line in fits]
    return printable("\n".join(line.replace("\n", " ") for line in lines))


def _line(found: Verification) -> str:
    first = found.problems[0]
    return f"{first.subject}: {first.text}"


if __name__ == "__main__":
    typer.run(verify_command)
