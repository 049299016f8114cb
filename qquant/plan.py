"""``python -m qquant.plan``: what a model takes in memory and what fits, without its weights and without a GPU.

Only the command line: the recipe is planning.py's, the arithmetic footprint.py's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qquant.code_keys import ignoring_code
from qquant.console import counts, size_in_bytes, user_errors, words
from qquant.errors import DoesNotFitError, UsageError


def plan_command(
    model: Annotated[str, typer.Argument(help="Folder, hub id (config.json is fetched), or a size such as qwen-72b.")],
    gpu: Annotated[str | None, typer.Option(help="Memory of the card (or machine), as 24GiB or 24GB.")] = None,
    precision: Annotated[str, typer.Option(help="Of the weights, as bf16,int8,int4.")] = "bf16,int8,int4",
    kv: Annotated[
        str, typer.Option(help="Of the KV cache: plain (what is computed in), int8, int4 (values in 4 bits).")
    ] = "plain,int8",
    batch: Annotated[str, typer.Option(help="Sequences at a time, as 1,4.")] = "1",
    prompt_tokens: Annotated[str, typer.Option("--prompt-tokens", help="Tokens of the prompt, as 512,2048.")] = "512",
    new_tokens: Annotated[str, typer.Option("--new-tokens", help="Tokens to generate, as 128,512.")] = "512",
    group_size: Annotated[int, typer.Option("--group-size", help="Columns that share a scale; -1: the row.")] = 128,
    method: Annotated[str, typer.Option(help="Of quantizing, as qquant quantize takes it.")] = "best",
    samples: Annotated[int, typer.Option(help="Of calibration, for what quantizing takes.")] = 128,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens of each.")] = 2048,
    runtime: Annotated[str, typer.Option(help="qquant, or qwen-2023: the original code.")] = "qquant",
    device: Annotated[str, typer.Option(help="Where it runs: cuda or cpu.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also make a report folder of it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
    ignore_code: Annotated[
        bool, typer.Option("--ignore-code", help="Open a folder whose files name code, without it.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Predict memory for loading, generating and quantizing. Exit code 3 if nothing fits the stated card."""
    with user_errors(debug=debug), ignoring_code(ignore_code):
        size = None if gpu is None else size_in_bytes(gpu, "--gpu")
        from qquant.plan_report import plan_sections
        from qquant.planning import Question, plan_model, what_would_fit
        from qquant.progress import step_progress
        from qquant.publish import REPORT_FOLDER, published, refuse_existing
        from qquant.result_files import write_result
        from qquant.results import shown_command

        if out is not None:
            refuse_existing(out, REPORT_FOLDER, overwrite=overwrite)
        if device not in ("cpu", "cuda"):
            raise UsageError(f"--device must be cuda or cpu, got {device!r}")
        # Checked when the question is made.
        options: dict[str, Any] = {"runtime": runtime, "device": device}
        options |= {"precisions": words(precision), "kv_caches": words(kv)}
        question = Question(
            batches=counts(batch, "--batch"),
            prompt_tokens=counts(prompt_tokens, "--prompt-tokens"),
            new_tokens=counts(new_tokens, "--new-tokens"),
            group_size=group_size,
            method=method,
            samples=samples,
            seq_len=seq_len,
            device_bytes=size,
            **options,
        )
        with step_progress() as on_progress:
            on_progress(f"planning {model}", 0, 1)
            result = plan_model(model, question, command=shown_command(sys.argv, module="qquant.plan"))
        assert result.plan is not None
        if out is not None:
            with published(out, REPORT_FOLDER, overwrite=overwrite) as staging:
                write_result(result, staging)
        shown = result.model_dump_json(indent=2) if as_json else "\n\n".join(plan_sections(result.plan))
        typer.echo(shown)
        if (reason := what_would_fit(result.plan)) is not None:
            raise DoesNotFitError(reason)


if __name__ == "__main__":
    typer.run(plan_command)
