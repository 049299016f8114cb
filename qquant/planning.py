"""The recipe of ``qquant plan``: what a model will take, what fits, and how it can be cut, before anything is loaded.

The arithmetic is footprint.py's, a model's shapes are shapes.py's, the command line is plan.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from huggingface_hub import hf_hub_download
from transformers import PretrainedConfig

from qquant.errors import BadModelError, UsageError
from qquant.eval_record import finished_result
from qquant.footprint import (
    BITS,
    CUDA_CONTEXT_BYTES,
    ELEMENT_BYTES,
    KV_TABLES_REST_BYTES,
    LinearShape,
    ModelShapes,
    footprint,
    quantizing_bytes,
    weights_bytes,
)
from qquant.models.sizes import SIZES, size_config
from qquant.packing import packable
from qquant.plan_report import Plan, PlanCell, PlanLimit, PlanQuantizing, PlanTensorParallel, Runtime
from qquant.published import PublishedCell
from qquant.random_models import config_from_dict
from qquant.records import KVKind, Precision
from qquant.results import ModelRow, Result
from qquant.shapes import model_shapes
from qquant.sources import BUILD_ERRORS, read_config
from qquant.text_sources import one_line

RANKS = (1, 2, 4, 8)
"""Cards that a model is commonly cut over."""
CPU_PROCESS_BYTES = 370_000_000
"""What a process holds once torch, transformers and this package are imported. Measured: 371 MB of resident memory
before the model, on the runs of docs/plan.md."""
_MOST = 1 << 24
"""Where the search for the largest batch or context ends."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a plan is asked for; every combination is a cell."""

    precisions: tuple[Precision, ...] = ("bf16", "int8", "int4")
    kv_caches: tuple[KVKind, ...] = ("bf16", "int8")
    batches: tuple[int, ...] = (1,)
    prompt_tokens: tuple[int, ...] = (512,)
    new_tokens: tuple[int, ...] = (512,)
    group_size: int = 128
    samples: int = 128
    """Of calibration, for what quantizing takes."""
    seq_len: int = 2048
    runtime: Runtime = "qquant"
    device: Literal["cpu", "cuda"] = "cuda"
    device_bytes: int | None = None
    """Of the card, or of the machine's memory; None: nothing is judged."""

    def __post_init__(self) -> None:
        """Refuse what cannot be predicted, before a model is looked at."""
        for name, values in (("precision", self.precisions), ("kv", self.kv_caches)):
            known = [*ELEMENT_BYTES, *BITS]
            if bad := [value for value in values if value not in known]:
                raise UsageError(f"--{name} takes {', '.join(known)}, got {bad[0]}")
        if self.runtime not in get_args(Runtime):
            raise UsageError(f"--runtime must be one of {', '.join(get_args(Runtime))}, got {self.runtime!r}")
        if self.runtime == "qwen-2023" and self.device == "cpu":
            raise UsageError("the runtime qwen-2023 is predicted for a card; leave out --device cpu")
        counts = (*self.batches, *self.prompt_tokens, *self.new_tokens, self.samples, self.seq_len)
        if not counts or min(counts) < 1:
            raise UsageError(f"batches, tokens and samples must be at least 1, got {min(counts, default=0)}")
        if self.group_size != -1 and self.group_size < 1:
            raise UsageError(f"--group-size must be -1 (the whole row) or at least 1, got {self.group_size}")


def plan_model(model: str, question: Question, *, command: str) -> Result:
    """Predict everything about one model.

    Args:
        model: folder, config.json, name of a size (``qwen-72b``), or hub id, of which only config.json is fetched.
        question: what to predict.
        command: as typed, for the record.

    Raises:
        BadModelError: no such model, or one that is not described by linears and keys and values.
        UsageError: a group size that does not divide its rows, or matrices that the format cannot hold.
    """
    label, shapes = _find_shapes(model)
    packed = [precision for precision in question.precisions if precision in BITS]
    for precision in packed:
        _refuse_unpackable(shapes, BITS[precision], question.group_size)
    cells = tuple(_cells(shapes, question))
    plan = Plan(
        model=label,
        parameters=shapes.parameters,
        runtime=question.runtime,
        group_size=question.group_size,
        device=question.device,
        device_bytes=question.device_bytes,
        cells=cells,
        limits=tuple(_limits(shapes, question)) if question.device_bytes is not None else (),
        quantizing=tuple(_quantizing(shapes, question, BITS[precision]) for precision in packed),
        tensor_parallel=tuple(
            _tensor_parallel(shapes, precision, question.group_size, ranks)
            for precision in question.precisions
            for ranks in RANKS
        ),
    )
    return finished_result(
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        command=command,
        seed=0,
        rows=(_row(label, shapes),),
        plan=plan,
    )


@cache
def _size_shapes(name: str) -> ModelShapes:
    """Of a named size; building a skeleton takes most of a plan's time."""
    return model_shapes(config_from_dict(size_config(name)))


def _find_shapes(model: str) -> tuple[str, ModelShapes]:
    if model.lower() in SIZES and not Path(model).exists():
        return model.lower(), _size_shapes(model.lower())
    label, config = find_config(model)
    return label, model_shapes(config)


def find_config(model: str) -> tuple[str, PretrainedConfig]:
    """A short name and the configuration of a folder or of a hub's model; no weights are looked at.

    Raises:
        BadModelError: none, or one that cannot be had without a network.
    """
    path = Path(model).expanduser()
    if model and path.exists():
        folder = path.parent if path.name == "config.json" else path
        return folder.resolve().name, read_config(folder)
    if model.count("/") != 1 or model.startswith(("/", ".", "~")):
        raise BadModelError(
            f"a model must be a folder, a hub id owner/name or a size, and {model!r} is none; sizes: {', '.join(SIZES)}"
        )
    try:
        file = Path(hf_hub_download(model, "config.json"))
    except BUILD_ERRORS as error:
        raise BadModelError(
            f"{model} is no local folder, and the hub did not give its config.json: {one_line(error).split('. ')[0]}; "
            "give a folder that holds one, or a size such as qwen-7b"
        ) from error
    return model, read_config(file.parent)


def what_would_fit(plan: Plan) -> str | None:
    """None if any cell fits or no card was stated; else one line: how large the smallest is, and what would fit."""
    if plan.device_bytes is None or any(cell.fits for cell in plan.cells):
        return None
    smallest = min(plan.cells, key=lambda cell: _needed(cell, plan.device))
    found = [limit for limit in plan.limits if limit.largest_batch or limit.largest_tokens]
    cards = -(-_needed(smallest, plan.device) // plan.device_bytes)
    remedy = f"take a larger one, or {cards} of them; fewer bits, a shorter context and a smaller batch take less"
    if found:
        best = max(found, key=lambda limit: (limit.largest_batch, limit.largest_tokens))
        kind = f"{best.precision} with a {best.kv_cache} cache"
        remedy = (
            f"{kind} fits at batch {best.largest_batch}"
            if best.largest_batch
            else f"{kind} fits up to {best.largest_tokens} tokens"
        )
    return (
        f"nothing fits {plan.device_bytes / 2**30:.2f} GiB: {plan.model} in {smallest.precision} with a "
        f"{smallest.kv_cache} cache at batch {smallest.batch} and {smallest.prompt_tokens} + {smallest.new_tokens} "
        f"tokens needs {_needed(smallest, plan.device) / 2**30:.2f} GiB; {remedy}"
    )


def published_peak_bytes(cell: PublishedCell) -> int:
    """What the runtime qwen-2023 predicts for a figure of Qwen's README; docs/plan.md tells where each term is from."""
    shapes = _size_shapes(cell.model)
    encoding = cell.encoded_tokens is not None
    found = footprint(
        shapes,
        precision=cell.precision,
        kv_cache=cell.kv_cache,
        batch=cell.batch,
        # An encoded prompt is followed by one step, which concatenates its cache while its logits are still held.
        prompt_tokens=cell.encoded_tokens or cell.prompt_tokens,
        new_tokens=1 if encoding else cell.new_tokens,
        device="cuda",
        runtime="qwen-2023",
    )
    return found.peak_bytes + (0 if cell.table == "speed-memory" else KV_TABLES_REST_BYTES)


def _needed(cell: PlanCell, device: str) -> int:
    beside = CUDA_CONTEXT_BYTES if device == "cuda" else CPU_PROCESS_BYTES
    return max(cell.footprint.peak_bytes, cell.loading_peak_bytes) + beside


def _cells(shapes: ModelShapes, question: Question) -> list[PlanCell]:
    return [
        _cell(shapes, question, precision, kv, batch, prompt, new)
        for precision in question.precisions
        for kv in question.kv_caches
        for batch in question.batches
        for prompt in question.prompt_tokens
        for new in question.new_tokens
    ]


def _cell(
    shapes: ModelShapes, question: Question, precision: Precision, kv: KVKind, batch: int, prompt: int, new: int
) -> PlanCell:
    # A plain model computes in its own dtype, a packed one in that of a plain cache, else in bfloat16.
    dtype: KVKind = "bf16"
    for kind in (precision, kv):
        if kind in ELEMENT_BYTES:
            dtype = "fp32" if kind == "fp32" else "fp16" if kind == "fp16" else "bf16"
            break
    found = footprint(
        shapes,
        precision=precision,
        kv_cache=kv,
        batch=batch,
        prompt_tokens=prompt,
        new_tokens=new,
        device=question.device,
        runtime=question.runtime,
        group_size=question.group_size,
        compute_dtype=dtype,
    )
    cell = PlanCell(
        precision=precision,
        kv_cache=kv,
        batch=batch,
        prompt_tokens=prompt,
        new_tokens=new,
        footprint=found,
        loading_peak_bytes=_loading(shapes, question, precision, ELEMENT_BYTES[dtype]),
        fits=None,
    )
    if question.device_bytes is None:
        return cell
    return cell.model_copy(update={"fits": _needed(cell, question.device) <= question.device_bytes})


def _loading(shapes: ModelShapes, question: Question, precision: Precision, element: int) -> int:
    """The tensors, and one as it was stored beside what it becomes; the original code: both embeddings twice."""
    weights = weights_bytes(shapes, precision, group_size=question.group_size, element_bytes=element)
    if question.runtime == "qwen-2023":
        return weights + (2 * shapes.embedding_parameters if precision in BITS else 0)
    return weights + shapes.largest_tensor * element


def _limits(shapes: ModelShapes, question: Question) -> list[PlanLimit]:
    prompt, new = max(question.prompt_tokens), max(question.new_tokens)
    least_batch, least_new = min(question.batches), min(question.new_tokens)
    found = []
    for precision in question.precisions:
        for kv in question.kv_caches:

            def fits(batch: int, prompt: int, new: int, precision: Precision = precision, kv: KVKind = kv) -> bool:
                return bool(_cell(shapes, question, precision, kv, batch, prompt, new).fits)

            def fits_length(tokens: int, fits: Callable[[int, int, int], bool] = fits) -> bool:
                answer = min(least_new, max(1, tokens - 1))
                return fits(least_batch, max(1, tokens - answer), answer)

            def fits_batch(batch: int, fits: Callable[[int, int, int], bool] = fits) -> bool:
                return fits(batch, prompt, new)

            tokens = _largest(fits_length)
            found.append(
                PlanLimit(
                    precision=precision,
                    kv_cache=kv,
                    largest_batch=_largest(fits_batch),
                    largest_tokens=tokens,
                    beyond_model=shapes.positions is not None and tokens > shapes.positions,
                )
            )
    return found


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest count that fits, 0 if none does; what fits at one count fits at every smaller one."""
    low, high = 0, 1
    while high <= _MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _quantizing(shapes: ModelShapes, question: Question, bits: int) -> PlanQuantizing:
    device, ram = quantizing_bytes(shapes, samples=question.samples, seq_len=question.seq_len)
    precision: Precision = "int8" if bits == 8 else "int4"
    return PlanQuantizing(
        bits=bits,
        group_size=question.group_size,
        samples=question.samples,
        seq_len=question.seq_len,
        device_bytes=device,
        ram_bytes=ram,
        disk_bytes=weights_bytes(shapes, precision, group_size=question.group_size),
    )


def _refuse_unpackable(shapes: ModelShapes, bits: int, group_size: int) -> None:
    for linear in shapes.linears:
        if group_size != -1 and linear.inputs % group_size:
            usable = [size for size in (32, 64, 128, 256) if linear.inputs % size == 0]
            raise UsageError(
                f"{linear.name}: group_size must divide the row length, {group_size} does not divide {linear.inputs}; "
                f"usable: {', '.join(map(str, [-1, *usable]))}"
            )
        if not packable(linear.inputs, linear.outputs, bits):
            raise UsageError(
                f"{linear.name}: {linear.inputs} x {linear.outputs} does not fill whole words of {bits}-bit codes; "
                "plan it with --precision bf16"
            )


def _tensor_parallel(shapes: ModelShapes, precision: Precision, group_size: int, ranks: int) -> PlanTensorParallel:
    reason = None
    if shapes.query_heads % ranks:
        reason = f"{shapes.query_heads} query heads by {ranks}"
    else:
        reasons = (_uncut(linear, precision, group_size, ranks) for linear in shapes.linears)
        reason = next((found for found in reasons if found), None)
    return PlanTensorParallel(ranks=ranks, precision=precision, fits=reason is None, reason=reason)


def _uncut(linear: LinearShape, precision: Precision, group_size: int, ranks: int) -> str | None:
    """Why a matrix cannot be cut: tails along their inputs, in whole groups; others along their outputs."""
    if ranks == 1:
        return None
    if precision not in BITS:
        side, what = (linear.inputs, "inputs") if linear.tail else (linear.outputs, "outputs")
        return f"{linear.name}: {side} {what} by {ranks}" if side % ranks else None
    if linear.tail:
        groups = 1 if group_size == -1 else linear.inputs // group_size
        size = linear.inputs if group_size == -1 else group_size
        if groups % ranks and groups > 1:
            return f"{linear.name}: {linear.inputs} / {size} = {groups} groups by {ranks}"
        if linear.inputs % ranks or linear.inputs // ranks * BITS[precision] % 32:
            return f"{linear.name}: {linear.inputs} inputs in whole words by {ranks}"
        return None
    # Zeros are packed along the outputs, so a cut must not divide a word.
    if linear.outputs % ranks or linear.outputs // ranks * BITS[precision] % 32:
        return f"{linear.name}: {linear.outputs} outputs in whole words by {ranks}"
    return None


def _row(label: str, shapes: ModelShapes) -> ModelRow:
    return ModelRow(
        label=label,
        role="baseline",
        model_type=shapes.model_type,
        parameters=shapes.parameters,
        method=None,
        bits=None,
        group_size=None,
        checkpoint_dtype="bfloat16",
        weights_bytes=weights_bytes(shapes, "bf16"),
        folder_bytes=None,
        bits_per_weight=None,
        accuracy=None,
        speed=None,
        memory=None,
        ratios=None,
        layer_errors=(),
    )
