"""``python -m qquant.eval``: what quantizing cost on one text, and what a model makes of long contexts.

Two recipes. ``accuracy``: resolve the folders, read and tokenize the text, load the models, score them in one pass,
time them in turns, measure their KV caches. ``long-context``: the same beginning, then one model after the other at all
lengths. Then the report is written. Every step's own room does the work; torch is imported inside.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qquant.console import user_errors
from qquant.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qquant.measure import Speed
    from qquant.report import EvalReport, ModelRow

OnProgress = Callable[[str, int, int], None]
"""(what is being done, how far, of how much)."""

KV_CACHES = ("int8",)
"""What ``--kv-cache`` may name."""

MEASURES = {
    "accuracy": ("kv_cache", "kv_tokens", "seq_len", "stride", "speed"),
    "long-context": ("lengths",),
}
"""What ``--measure`` may name, and the options that no other measure takes."""


def evaluate_checkpoints(
    baseline: str | Path,
    candidates: Sequence[str | Path],
    data: str | Path,
    *,
    seq_len: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    speed: bool = True,
    threads: int | None = None,
    kv_cache: str | None = None,
    kv_tokens: int = 16384,
    command: str = "evaluate_checkpoints() from Python",
    on_progress: OnProgress = lambda what, done, total: None,
) -> EvalReport:
    """Compare candidates with their baseline on one text, and return the record that ``write_report`` makes files of.

    All models are in memory at the same time, because every window runs through all of them.

    Args:
        baseline: folder or hub id of the original; its tokenizer cuts the text.
        candidates: folders or hub ids, quantized or not; none only where a KV cache is measured.
        data: UTF-8 text, or the same gzipped under a name that ends in ``.gz``.
        seq_len: tokens per window.
        stride: tokens scored per window, 1 to ``seq_len``; None: half of it.
        max_tokens: use only this many tokens from the start of the text.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        dtype: compute dtype of all models; "auto": the baseline's, but float32 for float16 on a CPU.
        seed: of torch's generators, and of the needles of ``kv_cache``. Nothing else is drawn at random today.
        speed: also time prefill and decode.
        threads: CPU threads for torch, set for the whole process; None leaves them alone.
        kv_cache: "int8": also measure what keys and values in 8 bits cost; None: leave that out.
        kv_tokens: tokens of the text that this is measured on, in whole windows.
        command: what the report says it was made by.
        on_progress: told what is being done.

    Raises:
        QquantError: bad options, model, data or numbers, or not enough GPU memory.
    """
    from qquant.accuracy import windows
    from qquant.eval_inputs import prompt_length, read_inputs, refuse_below_one
    from qquant.eval_record import eval_report
    from qquant.kv_accuracy import measure_kv_cache
    from qquant.kv_schemes import check_cacheable
    from qquant.report import Data
    from qquant.sources import read_config

    stride = max(1, seq_len // 2) if stride is None else stride
    list(windows(2, seq_len=seq_len, stride=stride))  # refuses a bad pair now and not after the models are loaded
    if kv_cache not in (None, *KV_CACHES):
        raise UsageError(f"kv_cache must be one of {', '.join(KV_CACHES)}, got {kv_cache!r}")
    if not candidates and kv_cache is None:
        raise UsageError("an evaluation needs at least one candidate, got none; give --candidate or --kv-cache int8")
    refuse_below_one(max_tokens=max_tokens, threads=threads, kv_tokens=kv_tokens)

    def check(folders: Iterable[Path]) -> None:
        prompt_length(folders, seq_len)
        for folder in folders if kv_cache else ():
            check_cacheable(read_config(folder))

    names = (baseline, *candidates)
    folders, compute, where, ids, digest = read_inputs(
        names, data, seq_len, max_tokens=max_tokens, device=device, dtype=dtype, seed=seed, threads=threads, check=check
    )
    prompt_len = prompt_length(folders.values(), seq_len) if speed else 0
    cost = None
    with _fits("the models do not fit the device together; try --device cpu"):
        timed = ids[:prompt_len] if prompt_len else None
        models, rows = _run(folders, ids, compute, where, seq_len, stride, prompt=timed, tell=on_progress)
        if kv_cache:
            options: dict[str, Any] = {"window": seq_len, "max_tokens": kv_tokens, "seed": seed}
            cost = measure_kv_cache(models, ids, where, **options, tell=on_progress)
    text = Data(name=Path(data).name, sha256=digest, tokens=len(ids), seq_len=seq_len, stride=stride)
    return eval_report(dtype=compute, device=where, rows=rows, kv_cache=cost, data=text, seed=seed, command=command)


def evaluate_long_context(
    baseline: str | Path,
    candidates: Sequence[str | Path],
    data: str | Path,
    *,
    lengths: Sequence[int],
    max_tokens: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    threads: int | None = None,
    command: str = "evaluate_long_context() from Python",
    on_progress: OnProgress = lambda what, done, total: None,
) -> EvalReport:
    """Perplexity by sequence length, with and without NTK and LogN where a model has them, and return the record.

    One model is in memory at a time.

    Args:
        baseline: folder or hub id; its tokenizer cuts the text.
        candidates: folders or hub ids, quantized or not; there need be none.
        data: UTF-8 text, or the same gzipped under a name that ends in ``.gz``.
        lengths: tokens per window; each divides the longest. A model may have been made for fewer.
        max_tokens: use only this many tokens from the start of the text.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        dtype: compute dtype of all models; "auto": the baseline's, but float32 for float16 on a CPU.
        seed: of torch's generators. Nothing is drawn at random today.
        threads: CPU threads for torch, set for the whole process; None leaves them alone.
        command: what the report says it was made by.
        on_progress: told what is being done.

    Raises:
        QquantError: bad options, model, data or numbers, or not enough GPU memory.
    """
    from qquant.checkpoint import load_model
    from qquant.eval_inputs import read_inputs, refuse_below_one
    from qquant.eval_record import eval_report
    from qquant.long_context import check_lengths, measure_long_context
    from qquant.report import Data

    longest = check_lengths(lengths)[-1]
    refuse_below_one(max_tokens=max_tokens, threads=threads)
    names = (baseline, *candidates)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "seed": seed, "threads": threads}
    folders, compute, where, ids, digest = read_inputs(
        names, data, longest, option="lengths", max_tokens=max_tokens, **options
    )
    rows = _rows(folders)
    loaders = {label: partial(load_model, folder, dtype=compute, device=where) for label, folder in folders.items()}
    with _fits("windows this long do not fit the device; shorten --lengths"):
        found = measure_long_context(loaders, ids, where, lengths=lengths, tell=on_progress)
    used = found.windows * longest + 1
    text = Data(name=Path(data).name, sha256=digest, tokens=used, seq_len=longest, stride=longest)
    return eval_report(
        dtype=compute, device=where, rows=rows, long_context=found, data=text, seed=seed, command=command
    )


@contextmanager
def _fits(otherwise: str) -> Iterator[None]:
    """Torch's out-of-memory error as ours, which says ``otherwise``."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(f"{otherwise}: {error}") from error


def _run(
    folders: dict[str, Path],
    ids: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    seq_len: int,
    stride: int,
    *,
    prompt: Tensor | None,
    tell: OnProgress,
) -> tuple[dict[str, Any], tuple[ModelRow, ...]]:
    """Load every model, score them in one pass and time them in turns; ``prompt`` None: do not time."""
    import torch

    from qquant.accuracy import evaluate, logits_fn
    from qquant.checkpoint import LOG_NAME, load_model
    from qquant.eval_record import layer_errors
    from qquant.measure import MemoryMeter, measure_speed, step_fn

    models, scorers, memory = {}, {}, {}
    for number, (label, folder) in enumerate(folders.items()):
        tell(f"loading {label}", number, len(folders))
        meter = MemoryMeter(device)
        models[label] = load_model(folder, dtype=dtype, device=device)
        scorers[label] = logits_fn(models[label], device)
        with torch.inference_mode():
            scorers[label](ids[:seq_len], 1)  # what the meter reads includes one window's activations
        memory[label] = meter.read(models[label])
    first = next(iter(folders))
    base, rest = evaluate(
        scorers[first],
        {label: scorer for label, scorer in scorers.items() if label != first},
        ids,
        seq_len=seq_len,
        stride=stride,
        progress=lambda done, total: tell("scoring tokens", done, total),
    )
    assert base is not None
    speeds: dict[str, Speed] = {}
    if prompt is not None:
        tell("timing", 0, 1)
        speeds = measure_speed({label: step_fn(model) for label, model in models.items()}, prompt[None].to(device))
    return models, _rows(
        folders,
        accuracy={first: base, **rest},
        memory=memory,
        speeds=speeds,
        layer_errors={label: layer_errors(folder / LOG_NAME) for label, folder in folders.items()},
    )


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
        from qquant.progress import quiet_transformers
        from qquant.publish import Kind, published, refuse_existing
        from qquant.report import shown_command, write_report

        kind = Kind("a report folder", lambda folder: (folder / "report.json").exists())
        refuse_existing(out, kind, overwrite=overwrite)

        quiet_transformers()
        text = own_text(baseline) if data is None else data
        recipe: Callable[..., EvalReport]
        if measure == "long-context":
            recipe = partial(evaluate_long_context, lengths=parse_lengths(lengths or ""))
        else:
            options: dict[str, Any] = {"seq_len": seq_len, "stride": stride, "speed": speed}
            recipe = partial(evaluate_checkpoints, **options, kv_cache=kv_cache, kv_tokens=kv_tokens)
        typed = ["python", "-m", "qquant.eval"] if sys.argv[0].endswith("eval.py") else [Path(sys.argv[0]).name]
        shared = {"max_tokens": max_tokens, "device": device, "dtype": dtype, "seed": seed, "threads": threads}
        with _shown_progress() as on_progress:
            command = shown_command([*typed, *sys.argv[1:]])
            report = recipe(baseline, candidate or [], text, **shared, command=command, on_progress=on_progress)
        with published(out, kind, overwrite=overwrite) as staging:
            write_report(report, staging)
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


@contextmanager
def _shown_progress() -> Iterator[OnProgress]:
    """One live line on stderr that names the step and how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading")
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def _quantization_keys(folder: Path) -> dict[str, Any]:
    """What a folder says about its quantization, checked; empty for a plain model."""
    from qquant.checkpoint import quantization_config
    from qquant.sources import read_config

    quantized = getattr(read_config(folder), "quantization_config", None) or (folder / "quantize_config.json").exists()
    return quantization_config(folder) if quantized else {}


def _rows(folders: dict[str, Path], **measured: Any) -> tuple[ModelRow, ...]:
    """The report's rows: what the folders are, and what ``model_rows`` takes besides."""
    from qquant.eval_inputs import stored_dtype
    from qquant.eval_record import model_rows

    keys = {label: _quantization_keys(folder) for label, folder in folders.items()}
    dtypes = {label: stored_dtype(folder) for label, folder in folders.items()}
    return model_rows(folders, keys, dtypes, **measured)


if __name__ == "__main__":
    typer.run(evaluate_command)
