"""``python -m qquant.eval``: what quantizing cost on a text, on tasks, and what a model makes of long contexts.

Only the command line: the recipes are evaluation.py's and task_evaluation.py's, the files result_files.py's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qquant.code_keys import ignoring_code
from qquant.console import user_errors, words
from qquant.errors import UsageError
from qquant.evaluation import evaluate_checkpoints as evaluate_checkpoints
from qquant.evaluation import evaluate_long_context as evaluate_long_context
from qquant.journal import journal_of

if TYPE_CHECKING:
    from qquant.results import Result
    from qquant.task_report import TaskItem

MEASURES = {
    "accuracy": (
        "data", "max_tokens", "seq_len", "stride", "speed", "kv_cache", "kv_tokens", "answers", "answer_tokens",
        "bitsandbytes", "activation_bits", "head_bits",
    ),
    "long-context": ("data", "max_tokens", "lengths"),
    "tasks": (
        "tasks", "task_data", "style", "shots", "limit", "batch_size", "prompt_format", "backend",
        "allow_code_execution", "bitsandbytes",
    ),
}  # fmt: skip
"""What ``--measure`` may name, and the options that each takes beside those that all take."""


def evaluate_command(
    ctx: typer.Context,
    baseline: Annotated[str, typer.Option(help="Folder or hub id of the original model.")],
    out: Annotated[Path, typer.Option(help="Folder to make for the report.")],
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="Folder or hub id to compare with it; repeatable; optional with --kv-cache, long-context."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks instead of a text: mmlu, ceval, cmmlu, gsm8k, humaneval, as mmlu,gsm8k.")
    ] = None,
    task_data: Annotated[
        list[str] | None,
        typer.Option("--task-data", help="Folder with a folder or file per task, or TASK=PATH; repeatable."),
    ] = None,
    style: Annotated[str, typer.Option(help="Of tasks: base, chat, or auto: chat if there is a template.")] = "auto",
    shots: Annotated[int | None, typer.Option(min=0, help="Of tasks: worked examples; default: as published.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of tasks: only the first items of each subject.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Of tasks: prompts run together.")] = 8,
    prompt_format: Annotated[
        str, typer.Option("--prompt-format", help="Of tasks: qwen, or lm-eval's wording and rules.")
    ] = "qwen",
    backend: Annotated[str, typer.Option(help="Of tasks: qquant, or lm-eval, which must be installed.")] = "qquant",
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the code that a model writes for HumanEval, confined.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a stopped run of the same command ended.")
    ] = False,
    bitsandbytes: Annotated[
        str | None, typer.Option(help="Also the baseline as bitsandbytes loads it: nf4, llm-int8, or nf4,llm-int8.")
    ] = None,
    activation_bits: Annotated[
        int | None,
        typer.Option("--activation-bits", help="8: also each quantized candidate with int8 activations, on a CPU."),
    ] = None,
    head_bits: Annotated[
        int | None,
        typer.Option("--head-bits", help="8: also each quantized candidate with its output projection in int8."),
    ] = None,
    answers: Annotated[int, typer.Option(min=0, help="Also sample answers to this many prompts of the text.")] = 0,
    answer_tokens: Annotated[int, typer.Option("--answer-tokens", min=1, help="Tokens of each.")] = 64,
    data: Annotated[
        Path | None, typer.Option(help="Text to evaluate on: UTF-8, .gz allowed; default: the baseline's eval.txt.")
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(help="accuracy (default), tasks, or long-context: perplexity by length."),
    ] = None,
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
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of torch's generators and the needles.")] = 0,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Also time prefill and decode.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
    ignore_code: Annotated[
        bool, typer.Option("--ignore-code", help="Open a folder whose files name code, without it.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compare quantized models with their original, on a text or on tasks. Only the report's path goes to stdout."""
    with user_errors(debug=debug), ignoring_code(ignore_code):
        logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
        measure = measure or ("accuracy" if tasks is None else "tasks")
        _refuse_others_options(ctx, measure)
        from qquant.progress import quiet_transformers, step_progress
        from qquant.publish import REPORT_FOLDER, published, refuse_existing
        from qquant.result_files import write_items, write_result
        from qquant.results import shown_command

        refuse_existing(out, REPORT_FOLDER, overwrite=overwrite)

        quiet_transformers()
        chosen = dict(ctx.params)
        shared: dict[str, Any] = {"device": device, "dtype": dtype, "seed": seed, "threads": threads}
        command = shown_command(sys.argv, module="qquant.eval")
        journal = journal_of(out)  # now: the current folder, as an output, is another one at the end
        shared |= {"journal": journal, "resume": resume, "command": command}
        items: list[TaskItem] = []
        with step_progress() as on_progress:
            if measure == "tasks":
                report, items = _on_tasks(chosen, **shared, on_progress=on_progress)
            else:
                report = _on_text(measure, chosen)(baseline, candidate or [], **shared, on_progress=on_progress)
        with published(out, REPORT_FOLDER, overwrite=overwrite) as staging:
            write_result(report, staging)
            if items:
                write_items(items, staging)
        journal.unlink(missing_ok=True)  # what it kept is published now
        typer.echo(out / "report.md")


def _on_text(measure: str, chosen: dict[str, Any]) -> Callable[..., Result]:
    """The recipe of a measure that reads a text, with the options that it alone takes."""
    from qquant.eval_inputs import own_text
    from qquant.long_context import parse_lengths

    data = own_text(chosen["baseline"]) if chosen["data"] is None else chosen["data"]
    options: dict[str, Any] = {"data": data, "max_tokens": chosen["max_tokens"]}
    if measure == "long-context":
        return partial(evaluate_long_context, **options, lengths=parse_lengths(chosen["lengths"] or ""))
    options |= {name: chosen[name] for name in ("seq_len", "stride", "speed", "kv_cache", "kv_tokens")}
    options |= {name: chosen[name] for name in ("answers", "answer_tokens", "activation_bits", "head_bits")}
    return partial(evaluate_checkpoints, **options, bitsandbytes=words(chosen["bitsandbytes"] or ""))


def _on_tasks(chosen: dict[str, Any], **shared: Any) -> tuple[Result, list[TaskItem]]:
    """The tasks, with what was finished kept beside the report that is to come."""
    from qquant.task_evaluation import evaluate_tasks, task_sources

    names = ("style", "shots", "limit", "batch_size", "prompt_format", "backend", "allow_code_execution")
    tasks = words(chosen["tasks"] or "")
    return evaluate_tasks(
        chosen["baseline"],
        chosen["candidate"] or [],
        tasks=tasks,
        data=task_sources(tasks, chosen["task_data"] or []),
        bitsandbytes=words(chosen["bitsandbytes"] or ""),
        **{name: chosen[name] for name in names},
        **shared,
    )


def _refuse_others_options(ctx: typer.Context, measure: str) -> None:
    """Refuse an unknown measure, and options that were typed and belong to another one."""
    if measure not in MEASURES:
        raise UsageError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    typed = {
        name
        for name in ctx.params
        if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
    for other, names in MEASURES.items():
        for name in names:
            if name in typed and name not in MEASURES[measure]:
                raise UsageError(
                    f"--{name.replace('_', '-')} belongs to --measure {other}, got --measure {measure}; leave one out"
                )
    for name, needed in (("answer_tokens", "answers"), ("kv_tokens", "kv_cache")):
        if name in typed and not ctx.params[needed]:
            option, other = (f"--{word.replace('_', '-')}" for word in (name, needed))
            raise UsageError(
                f"{option} says how much {other} measures, and {other} was not asked for; leave {option} out"
            )
    if ctx.params["bitsandbytes"] is not None and not words(ctx.params["bitsandbytes"]):
        raise UsageError("--bitsandbytes must name nf4, llm-int8 or both, got nothing; name one, or leave it out")
    if measure == "tasks" and not words(ctx.params["tasks"] or ""):
        raise UsageError("--measure tasks needs the tasks to run; give --tasks mmlu,gsm8k")
    if measure == "tasks" and not ctx.params["task_data"]:
        raise UsageError("--tasks needs the files of the tasks; give --task-data DIR, or --task-data mmlu=DIR")
    if measure == "long-context" and ctx.params["lengths"] is None:
        raise UsageError("--measure long-context needs the lengths to measure; give --lengths 1024,2048,4096")


if __name__ == "__main__":
    typer.run(evaluate_command)
