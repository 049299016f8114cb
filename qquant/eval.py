"""``python -m qquant.eval``: what quantizing cost, of weights against their baseline and of the KV cache, on one text.

The recipe, top to bottom: resolve the folders, read and tokenize the text, load the models, score them in one pass,
time them in turns, measure their KV caches, write the report. Every step's own room does the work; torch is imported
inside.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qquant.console import user_errors
from qquant.errors import BadModelError, DoesNotFitError, QquantError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qquant.accuracy import Accuracy
    from qquant.kv_report import KVCacheCost
    from qquant.measure import Memory, Speed
    from qquant.report import Data, EvalReport, LayerError, ModelRow

OnProgress = Callable[[str, int, int], None]
"""(what is being done, how far, of how much)."""

KV_CACHES = ("int8",)
"""What ``--kv-cache`` may name."""

_SAFE: Any = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
# What transformers and torch raise when a folder makes no sense.
_BUILD_ERRORS = (ValueError, KeyError, OSError, TypeError, AttributeError, RuntimeError, ArithmeticError, ImportError)


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
    import torch

    from qquant.accuracy import windows
    from qquant.calibrate import check_tokenizer
    from qquant.eval_inputs import common_dtype, labelled, prompt_length, read_ids
    from qquant.kv_schemes import check_cacheable
    from qquant.report import Data
    from qquant.sources import load_tokenizer, pick_device, read_config, resolve_folder

    stride = max(1, seq_len // 2) if stride is None else stride
    list(windows(2, seq_len=seq_len, stride=stride))  # refuses a bad pair now and not after the models are loaded
    if kv_cache not in (None, *KV_CACHES):
        raise UsageError(f"kv_cache must be one of {', '.join(KV_CACHES)}, got {kv_cache!r}")
    if not candidates and kv_cache is None:
        raise UsageError("an evaluation needs at least one candidate, got none; give --candidate or --kv-cache int8")
    if any(count is not None and count < 1 for count in (max_tokens, threads, kv_tokens)):
        raise UsageError(
            f"max_tokens, threads and kv_tokens must be at least 1, got {max_tokens}, {threads} and {kv_tokens}"
        )
    where = pick_device(device)
    folders = labelled([resolve_folder(str(name)) for name in (baseline, *candidates)])
    first = next(iter(folders))
    compute, prompt_len = common_dtype(folders[first], dtype, where), prompt_length(folders.values(), seq_len)
    for folder in folders.values() if kv_cache else ():
        check_cacheable(read_config(folder))
    tokenizer = load_tokenizer(folders[first])
    if warning := check_tokenizer(tokenizer, folders[first]):
        logging.getLogger("qquant").warning("%s", warning)
    ids, digest = read_ids(Path(data), tokenizer, seq_len, max_tokens)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    try:
        timed = ids[:prompt_len] if speed and prompt_len else None
        models, rows = _run(folders, ids, compute, where, seq_len, stride, prompt=timed, tell=on_progress)
        cost = _kv_cost(models, ids, where, seq_len, kv_tokens, seed, on_progress) if kv_cache else None
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(f"the models do not fit the device together; try --device cpu: {error}") from error
    text = Data(name=Path(data).name, sha256=digest, tokens=len(ids), seq_len=seq_len, stride=stride)
    return _report(rows, cost, compute, where, data=text, seed=seed, command=command)


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
) -> tuple[dict[str, Any], list[ModelRow]]:
    """Load every model, score them in one pass and time them in turns; ``prompt`` None: do not time."""
    import torch

    from qquant.accuracy import evaluate, logits_fn
    from qquant.measure import MemoryMeter, measure_speed, step_fn

    models, scorers, memory = {}, {}, {}
    for number, (label, folder) in enumerate(folders.items()):
        tell(f"loading {label}", number, len(folders))
        meter = MemoryMeter(device)
        models[label] = _load(folder, dtype, device)
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
    return models, _rows(folders, {first: base, **rest}, memory, speeds)


def _kv_cost(
    models: dict[str, Any], ids: Tensor, device: torch.device, window: int, max_tokens: int, seed: int, tell: OnProgress
) -> KVCacheCost:
    from qquant.kv_accuracy import measure_kv_cache

    return measure_kv_cache(models, ids, device, window=window, max_tokens=max_tokens, seed=seed, tell=tell)


def evaluate_command(
    baseline: Annotated[str, typer.Option(help="Folder or hub id of the original model.")],
    out: Annotated[Path, typer.Option(help="Folder to make for the report.")],
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="Folder or hub id to compare with it; repeatable, optional with --kv-cache."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Text to evaluate on: UTF-8, .gz allowed; default: the baseline's eval.txt.")
    ] = None,
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
    """Compare quantized models with their original. The report's path goes to stdout, all else to stderr."""
    with user_errors(debug=debug):
        logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
        from qquant.eval_inputs import own_text
        from qquant.progress import quiet_transformers
        from qquant.publish import Kind, published, refuse_existing
        from qquant.report import shown_command, write_report

        kind = Kind("a report folder", lambda folder: (folder / "report.json").exists())
        refuse_existing(out, kind, overwrite=overwrite)

        quiet_transformers()
        typed = ["python", "-m", "qquant.eval"] if sys.argv[0].endswith("eval.py") else [Path(sys.argv[0]).name]
        with _shown_progress() as on_progress:
            report = evaluate_checkpoints(
                baseline,
                candidate or [],
                own_text(baseline) if data is None else data,
                seq_len=seq_len,
                stride=stride,
                max_tokens=max_tokens,
                device=device,
                dtype=dtype,
                seed=seed,
                speed=speed,
                threads=threads,
                kv_cache=kv_cache,
                kv_tokens=kv_tokens,
                command=shown_command([*typed, *sys.argv[1:]]),
                on_progress=on_progress,
            )
        with published(out, kind, overwrite=overwrite) as staging:
            write_report(report, staging)
        typer.echo(out / "report.md")


@contextmanager
def _shown_progress() -> Iterator[OnProgress]:
    """One live line on stderr that names the step and how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading")
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a quantized folder with its packed linears and any other plainly; never with code of its own."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from qquant.checkpoint import load_quantized
    from qquant.shards import CheckpointReader

    CheckpointReader(folder)  # refuses damaged files, and names that lead outside the folder, before they are opened
    options: Any = {"dtype": dtype, "device_map": None if device.type == "cpu" else {"": str(device)}}
    try:
        if _quantization_keys(folder):
            # Its cache must be off whatever its config says: a folded model is no starting point for --kv-cache.
            return load_quantized(folder, use_cache_quantization=False, **options).eval()
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **_SAFE, **options)
    except (QquantError, torch.OutOfMemoryError):
        raise
    except (*_BUILD_ERRORS, SafetensorError) as error:
        reason = str(error).split("\n")[0][:300]
        raise BadModelError(f"the model in {folder} cannot be loaded: {reason}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise BadModelError(f"tensor {missing[0]} is missing from {folder} ({len(missing)} missing in all)")
    return model.eval()


def _quantization_keys(folder: Path) -> dict[str, Any]:
    """What a folder says about its quantization, checked; empty for a plain model."""
    from qquant.checkpoint import quantization_config
    from qquant.sources import read_config

    quantized = getattr(read_config(folder), "quantization_config", None) or (folder / "quantize_config.json").exists()
    return quantization_config(folder) if quantized else {}


def _rows(
    folders: dict[str, Path], accuracy: dict[str, Accuracy], memory: dict[str, Memory], speeds: dict[str, Speed]
) -> list[ModelRow]:
    """The report's rows, baseline first."""
    from qquant import report as record
    from qquant.measure import folder_bytes, weights_bytes
    from qquant.shards import CheckpointReader
    from qquant.sources import read_config

    original = CheckpointReader(next(iter(folders.values())))
    parameters = sum(math.prod(entry.spec.shape) for entry in original.entries.values())
    rows: list[ModelRow] = []
    for label, folder in folders.items():
        keys, size = _quantization_keys(folder), weights_bytes(folder)
        row = record.ModelRow(
            label=label,
            role="candidate" if rows else "baseline",
            method=(keys.get("meta") or {}).get("method") or keys.get("quant_method"),
            bits=keys.get("bits"),
            group_size=keys.get("group_size"),
            checkpoint_dtype=str(getattr(read_config(folder), "dtype", None)).removeprefix("torch."),
            weights_bytes=size,
            folder_bytes=folder_bytes(folder),
            bits_per_weight=8 * size / parameters,
            accuracy=record.Accuracy(**asdict(accuracy[label])),
            speed=record.Speed(**asdict(speeds[label])) if label in speeds else None,
            memory=record.Memory(**asdict(memory[label])),
            ratios=None,
            layer_errors=_layer_errors(folder),
        )
        rows.append(row.model_copy(update={"ratios": record.ratios_to_baseline(row, rows[0])}) if rows else row)
    return rows


def _layer_errors(folder: Path) -> tuple[LayerError, ...]:
    """What a folder of ours says about its own layers; nothing for any other."""
    from qquant.checkpoint import LOG_NAME
    from qquant.report import LayerError

    log = folder / LOG_NAME
    if not log.exists():
        return ()
    try:
        modules = json.loads(log.read_text(encoding="utf-8"))["modules"]
        return tuple(LayerError(name=item["name"], relative_error=item["relative_error"]) for item in modules)
    except (ValueError, KeyError, TypeError) as error:
        raise BadModelError(f"{log} is not the log of a quantization; delete it or get it again: {error!r}") from error


def _report(
    rows: Sequence[ModelRow],
    kv_cache: KVCacheCost | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    data: Data,
    seed: int,
    command: str,
) -> EvalReport:
    """The record, with this moment and this machine."""
    import qquant
    from qquant.measure import environment
    from qquant.report import Environment, EvalReport

    return EvalReport(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        seed=seed,
        compute_dtype=str(dtype).removeprefix("torch."),
        environment=Environment(**asdict(environment(device, qquant_version=qquant.__version__))),
        data=data,
        rows=tuple(rows),
        kv_cache=kv_cache,
    )


if __name__ == "__main__":
    typer.run(evaluate_command)
