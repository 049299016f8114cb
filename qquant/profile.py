"""``python -m qquant.profile``: measured memory and speed of models over a grid of precisions, caches and sizes.

Only the command line: the grid is profile_grid.py's, the files result_files.py's.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from qquant.code_keys import ignoring_code
from qquant.console import counts, size_in_bytes, user_errors, words
from qquant.journal import journal_of


def profile_command(
    out: Annotated[Path, typer.Option(help="Folder to make for the report.")],
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Folders or hub ids, quantized or not.")
    ] = None,
    random_weights: Annotated[
        list[str] | None,
        typer.Option(
            "--random-weights", help="Random weights at real shapes: qwen-7b ..., a folder, a config.json; repeatable."
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Of the weights, as bf16,int8,int4; default: a folder's own, bf16 for random weights."),
    ] = None,
    kv: Annotated[str, typer.Option(help="Of the KV cache, as bf16,int8,int4; plain: what is computed in.")] = "plain",
    batch: Annotated[str, typer.Option(help="Sequences at a time, as 1,4,16.")] = "1",
    prompt_tokens: Annotated[str, typer.Option("--prompt-tokens", help="As 128,2048.")] = "128",
    new_tokens: Annotated[str, typer.Option("--new-tokens", help="Tokens to generate, as 32,128.")] = "32",
    warmups: Annotated[int, typer.Option(min=0, help="Generations before those that are timed.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Generations that are timed.")] = 5,
    group_size: Annotated[int, typer.Option("--group-size", help="Of random int8 and int4 weights.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")] = None,
    memory_limit: Annotated[
        str | None, typer.Option("--memory-limit", help="What a cell may take, as 20GiB; default: what is free.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and random weights.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run ended.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
    ignore_code: Annotated[
        bool, typer.Option("--ignore-code", help="Open a folder whose files name code, without it.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure memory and speed over a grid; cells without memory say so. Only the report's path goes to stdout."""
    with user_errors(debug=debug), ignoring_code(ignore_code):
        logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
        limit = None if memory_limit is None else size_in_bytes(memory_limit, "--memory-limit")
        batches, prompts, news = (
            counts(text, f"--{name}")
            for name, text in (("batch", batch), ("prompt-tokens", prompt_tokens), ("new-tokens", new_tokens))
        )
        from qquant.profile_grid import Grid, profile_models
        from qquant.progress import quiet_transformers, step_progress
        from qquant.publish import REPORT_FOLDER, published, refuse_existing
        from qquant.result_files import write_result
        from qquant.results import shown_command

        refuse_existing(out, REPORT_FOLDER, overwrite=overwrite)
        quiet_transformers()
        grid = Grid(
            precisions=None if precision is None else words(precision),
            kv_caches=words(kv),
            batches=batches,
            prompt_tokens=prompts,
            new_tokens=news,
            warmups=warmups,
            repeats=repeats,
            seed=seed,
            threads=threads,
            group_size=group_size,
            memory_limit_bytes=limit,
        )
        journal = journal_of(out)  # now: the current folder, as an output, is another one at the end
        with step_progress() as on_progress:
            result = profile_models(
                models or [],
                [name for text in random_weights or [] for name in words(text)],
                grid,
                journal=journal,
                resume=resume,
                device=device,
                command=shown_command(sys.argv, module="qquant.profile"),
                on_progress=on_progress,
            )
        with published(out, REPORT_FOLDER, overwrite=overwrite) as staging:
            write_result(result, staging)
        journal.unlink(missing_ok=True)  # what it kept is published now
        typer.echo(out / "report.md")


if __name__ == "__main__":
    typer.run(profile_command)
