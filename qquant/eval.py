"""``python -m qquant.eval``: what quantizing cost on one text, and what a model makes of long contexts.

Only the command line: the recipes are evaluation.py's, the files result_files.py's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qquant.console import user_errors
from qquant.errors import UsageError
from qquant.evaluation import evaluate_checkpoints as evaluate_checkpoints
from qquant.evaluation import evaluate_long_context as evaluate_long_context

if TYPE_CHECKING:
    from qquant.results import Result

MEASURES = {
    "accuracy": ("kv_cache", "kv_tokens", "seq_len", "stride", "speed"),
    "long-context": ("lengths",),
}
"""What ``--measure`` may name, and the options that no other measure takes."""


def evaluate_command(
    ctx: typer.Context,
    baseline: Annotated[str, typer.Option(help="Folder or hub id of the original model.")],
    out: Annotated[Path, typer.Option(help="Folder to make for the report.")],
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="Folder or hub id to compare with it; repeatable; optional with --kv-cache, long-context."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Text to evaluate on: UTF-8, .gz allowed; default: the baseline's eval.txt.")
    ] = None,
    measure: Annotated[
        str, typer.Option(help="accuracy, or long-context: perplexity by length with and without NTK and LogN.")
    ] = "accuracy",
    lengths: Annotated[str | None, typer.Option(help="Of long-context: tokens per window, as 1024,2048,4096.")] = None,
    kv_cache: Annotated[
        str | None, typer.Option("--kv-cache", help="Also measure what this KV cache costs: int8.")
    ] = None,
    kv_tokens: Annotated[int, typer.Option("--kv-tokens", min=1, help="Tokens to measure that on.")] = 16384,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens per window.")] = 512,
    stride: Annotated[int | None, typer.Option(help="Tokens scored per window; default: half of --seq-len.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Use only the first tokens.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Compute dtype: auto, float32, bfloat16, float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of torch's generators and the needles.")] = 0,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Also time prefill and decode.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compare quantized models with their original, or lengths of context. Only the report's path goes to stdout."""
    with user_errors(debug=debug):
        logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
        _refuse_others_options(ctx, measure)
        from qquant.eval_inputs import own_text
        from qquant.long_context import parse_lengths
        from qquant.progress import quiet_transformers, step_progress
        from qquant.publish import Kind, published, refuse_existing
        from qquant.result_files import write_result
        from qquant.results import shown_command

        kind = Kind("a report folder", lambda folder: (folder / "report.json").exists())
        refuse_existing(out, kind, overwrite=overwrite)

        quiet_transformers()
        text = own_text(baseline) if data is None else data
        recipe: Callable[..., Result]
        if measure == "long-context":
            recipe = partial(evaluate_long_context, lengths=parse_lengths(lengths or ""))
        else:
            options: dict[str, Any] = {"seq_len": seq_len, "stride": stride, "speed": speed}
            recipe = partial(evaluate_checkpoints, **options, kv_cache=kv_cache, kv_tokens=kv_tokens)
        typed = ["python", "-m", "qquant.eval"] if sys.argv[0].endswith("eval.py") else [Path(sys.argv[0]).name]
        shared = {"max_tokens": max_tokens, "device": device, "dtype": dtype, "seed": seed, "threads": threads}
        with step_progress() as on_progress:
            command = shown_command([*typed, *sys.argv[1:]])
            report = recipe(baseline, candidate or [], text, **shared, command=command, on_progress=on_progress)
        with published(out, kind, overwrite=overwrite) as staging:
            write_result(report, staging)
        typer.echo(out / "report.md")


def _refuse_others_options(ctx: typer.Context, measure: str) -> None:
    """Refuse an unknown measure, and options that were typed and belong to another one."""
    if measure not in MEASURES:
        raise UsageError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    for other in MEASURES.keys() - {measure}:
        for name in MEASURES[other]:
            source = ctx.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise UsageError(
                    f"--{name.replace('_', '-')} belongs to --measure {other}, got --measure {measure}; leave one out"
                )
    if measure == "long-context" and ctx.params["lengths"] is None:
        raise UsageError("--measure long-context needs the lengths to measure; give --lengths 1024,2048,4096")


if __name__ == "__main__":
    typer.run(evaluate_command)
