"""Recipes of an evaluation: what quantizing cost on one text, and what a model makes of long contexts.

``evaluate_checkpoints``: resolve the folders, read and tokenize the text, load the models, score them in one pass, time
them in turns, measure their KV caches. ``evaluate_long_context``: the same beginning, then one model after the other at
all lengths. Every step's own room does the work; the command line is eval.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qquant.measure import Speed
    from qquant.results import ModelRow, Result

OnProgress = Callable[[str, int, int], None]
"""(what is being done, how far, of how much)."""

KV_CACHES = ("int8",)
"""What ``kv_cache`` may name."""


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
) -> Result:
    """Compare candidates with their baseline on one text, and return the record that ``write_result`` makes files of.

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
    from qquant.eval_record import finished_result
    from qquant.kv_accuracy import measure_kv_cache
    from qquant.kv_schemes import check_cacheable
    from qquant.results import Data
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
    return finished_result(dtype=compute, device=where, rows=rows, kv_cache=cost, data=text, seed=seed, command=command)


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
) -> Result:
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
    from qquant.eval_record import finished_result
    from qquant.long_context import check_lengths, measure_long_context
    from qquant.results import Data

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
    return finished_result(
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
