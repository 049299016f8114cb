"""Recipes of an evaluation: what quantizing cost on one text, and what a model makes of long contexts.

``evaluate_checkpoints``: resolve the folders, read and tokenize the text, load the models, score them in one pass, time
them in turns, measure their KV caches. ``evaluate_long_context``: the same beginning, then one model after the other at
all lengths. Every step's own room does the work; the command line is eval.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant.errors import UsageError
from qquant.telling import OnProgress, unheard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qquant.accuracy import Accuracy
    from qquant.journal import Journal
    from qquant.measure import Memory, Speed
    from qquant.results import Result


KV_CACHES = ("int8",)
"""What ``kv_cache`` may name."""
_PROMPT_TOKENS = 64
"""Of a sample answer's prompt: enough to know what it is about, and short beside the answer."""


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
    answers: int = 0,
    answer_tokens: int = 64,
    bitsandbytes: Sequence[str] = (),
    activation_bits: int | None = None,
    head_bits: int | None = None,
    journal: Path | None = None,
    resume: bool = False,
    command: str = "evaluate_checkpoints() from Python",
    on_progress: OnProgress = unheard,
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
        answers: prompts from the text that every model goes on with, greedily, for a look at the difference.
        answer_tokens: tokens of each such answer.
        bitsandbytes: "nf4", "llm-int8": the baseline once more as bitsandbytes loads it.
        activation_bits: 8: every quantized candidate once more, with the inputs of its packed linears in 8 bits.
        head_bits: 8: every quantized candidate once more, with its output projection in 8 bits.
        journal: file that keeps the scores of every finished window, see ``journal.Journal``; the caller removes it.
        resume: go on with that file. What else is measured is measured again.
        command: what the report says it was made by.
        on_progress: told what is being done.

    Raises:
        QquantError: bad options, model, data or numbers, or not enough GPU memory.
    """
    from qquant.accuracy import windows
    from qquant.answers import cut_prompts, sample_answers
    from qquant.baselines import unlisted_bytes_of, weights_bytes_of
    from qquant.checkpoint import LOG_NAME
    from qquant.eval_inputs import prompt_length, read_inputs, refuse_below_one, stored_dtype
    from qquant.eval_models import (
        bitsandbytes_labels,
        fits,
        identities,
        loaders,
        rows,
        tokenizers,
        with_rounded,
    )
    from qquant.eval_record import finished_result, layer_errors
    from qquant.journal import kept
    from qquant.kv_accuracy import measure_kv_cache
    from qquant.kv_schemes import check_cacheable
    from qquant.model_folder import load_tokenizer, read_config
    from qquant.results import Data
    from qquant.seen_text import seen_shares

    stride = max(1, seq_len // 2) if stride is None else stride
    list(windows(2, seq_len=seq_len, stride=stride))  # refuses a bad pair now and not after the models are loaded
    if kv_cache not in (None, *KV_CACHES):
        raise UsageError(f"kv_cache must be one of {', '.join(KV_CACHES)}, got {kv_cache!r}")
    if not candidates and kv_cache is None and not bitsandbytes:
        raise UsageError("an evaluation needs at least one candidate, got none; give --candidate or --kv-cache int8")
    refuse_below_one(max_tokens=max_tokens, threads=threads, kv_tokens=kv_tokens, answer_tokens=answer_tokens)
    prompt_tokens = min(_PROMPT_TOKENS, seq_len)

    def check(folders: Iterable[Path]) -> None:
        prompt_length(folders, seq_len)
        for folder in folders if kv_cache else ():
            check_cacheable(read_config(folder))
        if answers:
            _refuse_long_answers(map(read_config, folders), prompt_tokens + answer_tokens, answer_tokens)

    names = (baseline, *candidates)
    folders, compute, where, ids, digest = read_inputs(
        names, data, seq_len, max_tokens=max_tokens, device=device, dtype=dtype, seed=seed, threads=threads, check=check
    )
    prompts = cut_prompts(ids, count=answers, prompt_tokens=prompt_tokens) if answers else ()
    kinds = bitsandbytes_labels(folders, bitsandbytes)
    wishes = {"activation_bits": activation_bits, "head_bits": head_bits}
    folders, rounded = with_rounded(folders, compute, where, **wishes)
    seen = seen_shares(folders, ids)
    loading, hashes = loaders(folders, kinds, compute, where, rounded), identities(folders, on_progress)
    run = {"measure": "accuracy", "models": [*loading], "sha256": hashes, "text": digest, "tokens": len(ids)}
    run |= {"seq_len": seq_len, "stride": stride, "dtype": str(compute), "device": where.type, "threads": threads}
    run |= {"tokenizers": tokenizers(folders)}
    prompt_len = prompt_length(folders.values(), seq_len) if speed else 0
    stored = stored_dtype(next(iter(folders.values())))
    cost = shown = None
    with (
        kept(journal, run, resume=resume, pieces="windows of the text") as finished,
        fits("the models do not fit the device together; try --device cpu"),
    ):
        models, memory = _load(loading, ids[:seq_len], where, on_progress)
        sizes = {label: weights_bytes_of(models[label], stored_dtype=stored) for label in kinds}
        for label in kinds:
            held = (memory[label].tensor_bytes or 0) + unlisted_bytes_of(models[label])
            memory[label] = replace(memory[label], tensor_bytes=held)
        found = _score(models, ids, where, seq_len, stride, on_progress, finished)
        timed = _time(models, ids[:prompt_len], where, on_progress) if prompt_len else {}
        if prompts:
            tokenizer = load_tokenizer(folders[next(iter(folders))])
            shown = sample_answers(
                models, tokenizer, prompts, new_tokens=answer_tokens, device=where, on_progress=on_progress
            )
        if kv_cache:
            options: dict[str, Any] = {"window": seq_len, "max_tokens": kv_tokens, "seed": seed}
            cost = measure_kv_cache(models, ids, where, **options, tell=on_progress)
    errors = {label: layer_errors(folder / LOG_NAME) for label, folder in folders.items() if label not in rounded}
    measured: dict[str, Any] = {"accuracy": found, "memory": memory, "speeds": timed, "layer_errors": errors}
    measured |= {"rounded": rounded, "seen": seen}
    table = rows(folders, identities=hashes, in_memory=kinds, sizes=sizes, **measured)
    text = Data(name=Path(data).name, sha256=digest, tokens=len(ids), window_tokens=seq_len, stride_tokens=stride)
    facts: dict[str, Any] = {"data": text, "seed": seed, "command": command}
    return finished_result(dtype=compute, device=where, rows=table, kv_cache=cost, answers=shown, **facts)


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
    journal: Path | None = None,
    resume: bool = False,
    command: str = "evaluate_long_context() from Python",
    on_progress: OnProgress = unheard,
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
        journal: file that keeps every finished setting and length, see ``journal.Journal``; the caller removes it.
        resume: go on with that file.
        command: what the report says it was made by.
        on_progress: told what is being done.

    Raises:
        QquantError: bad options, model, data or numbers, or not enough GPU memory.
    """
    from qquant.eval_inputs import read_inputs, refuse_below_one
    from qquant.eval_models import fits, identities, loaders, rows, tokenizers
    from qquant.eval_record import finished_result
    from qquant.journal import kept
    from qquant.long_context import check_lengths, measure_long_context
    from qquant.results import Data
    from qquant.seen_text import seen_shares

    longest = check_lengths(lengths)[-1]
    refuse_below_one(max_tokens=max_tokens, threads=threads)
    names = (baseline, *candidates)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "seed": seed, "threads": threads}
    folders, compute, where, ids, digest = read_inputs(
        names, data, longest, option="lengths", max_tokens=max_tokens, **options
    )
    hashes = identities(folders, on_progress)
    table = rows(folders, identities=hashes, seen=seen_shares(folders, ids))
    run = {"measure": "long-context", "models": [*folders], "sha256": hashes, "text": digest, "tokens": len(ids)}
    run |= {"lengths": sorted(set(lengths)), "dtype": str(compute), "device": where.type, "threads": threads}
    run |= {"tokenizers": tokenizers(folders)}
    with (
        kept(journal, run, resume=resume, pieces="lengths") as finished,
        fits("windows this long do not fit the device; shorten --lengths"),
    ):
        found = measure_long_context(
            loaders(folders, {}, compute, where), ids, where, lengths=lengths, tell=on_progress, finished=finished
        )
    used = found.windows * longest + 1
    text = Data(name=Path(data).name, sha256=digest, tokens=used, window_tokens=longest, stride_tokens=longest)
    return finished_result(
        dtype=compute, device=where, rows=table, long_context=found, data=text, seed=seed, command=command
    )


def _refuse_long_answers(configs: Iterable[Any], needed: int, answer_tokens: int) -> None:
    """Raise UsageError unless prompt and answer fit what every model was made for."""
    named = [getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs]
    room = min((int(positions) for positions in named if positions), default=needed)
    if needed > room:
        raise UsageError(
            f"answer_tokens must fit behind a prompt of {needed - answer_tokens} tokens into what the models were "
            f"made for, {room} tokens, got {answer_tokens}"
        )


def _load(
    loaders: dict[str, Callable[[], Any]], window: Tensor, device: torch.device, tell: OnProgress
) -> tuple[dict[str, Any], dict[str, Memory]]:
    """Load every model and run each once, with the memory that this took."""
    import torch

    from qquant.accuracy import logits_fn
    from qquant.measure import MemoryMeter

    models, memory = {}, {}
    for number, (label, load) in enumerate(loaders.items()):
        tell(f"loading {label}", number, len(loaders))
        meter = MemoryMeter(device)
        models[label] = load()
        with torch.inference_mode():
            logits_fn(models[label], device)(window, 1)  # what the meter reads includes one window's activations
        memory[label] = meter.read(models[label])
    return models, memory


def _score(
    models: dict[str, Any],
    ids: Tensor,
    device: torch.device,
    seq_len: int,
    stride: int,
    tell: OnProgress,
    finished: Journal | None,
) -> dict[str, Accuracy]:
    """Every model's accuracy, the baseline's first, from one pass over the text."""
    from qquant.accuracy import evaluate, logits_fn

    first, *others = models
    base, rest = evaluate(
        logits_fn(models[first], device),
        {label: logits_fn(models[label], device) for label in others},
        ids,
        seq_len=seq_len,
        stride=stride,
        progress=lambda done, total: tell("scoring tokens", done, total),
        finished=finished,
    )
    assert base is not None
    return {first: base, **rest}


def _time(models: dict[str, Any], prompt: Tensor, device: torch.device, tell: OnProgress) -> dict[str, Speed]:
    from qquant.measure import measure_speed, step_fn

    tell("timing", 0, 1)
    return measure_speed({label: step_fn(model) for label, model in models.items()}, prompt[None].to(device))
