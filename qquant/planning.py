"""The recipe of ``qquant plan``: what a model will take, what fits, and how it can be cut, before anything is loaded.

The arithmetic is footprint.py's, a model's shapes are shapes.py's, the command line is plan.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch

from qquant.errors import UsageError
from qquant.eval_record import finished_result
from qquant.footprint import (
    BITS,
    CUDA_CONTEXT_BYTES,
    ELEMENT_BYTES,
    KV_TABLES_REST_BYTES,
    ModelShapes,
    footprint,
    weights_bytes,
)
from qquant.methods import recipe_of
from qquant.models.sizes import SIZES, size_config
from qquant.needs import IMPORTED_BYTES, quantizing_needs
from qquant.packing import packable
from qquant.plan_report import Plan, PlanCell, PlanLimit, PlanQuantizing, PlanTensorParallel, Runtime
from qquant.published import PublishedCell
from qquant.random_models import config_from_dict
from qquant.records import KVKind, Precision
from qquant.results import ModelRow, Result
from qquant.shapes import find_config, model_shapes
from qquant.stored_bytes import held_bytes, refuse_beyond_counting, refuse_uneven_groups, stage_bytes
from qquant.tensor_parallel import Packing, uncut

RANKS = (1, 2, 4, 8)
"""Cards that a model is commonly cut over."""
_MOST = 1 << 24
"""Where the search for the largest batch or context ends."""
PLAIN: Final = "plain"
"""Names the cache in whatever a model computes in, as in ``qquant profile``."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a plan is asked for; every combination is a cell."""

    precisions: tuple[Precision, ...] = ("bf16", "int8", "int4")
    kv_caches: tuple[KVKind | Literal["plain"], ...] = (PLAIN, "int8")
    """Kinds, or "plain": what is computed in, bf16 for packed weights."""
    batches: tuple[int, ...] = (1,)
    prompt_tokens: tuple[int, ...] = (512,)
    new_tokens: tuple[int, ...] = (512,)
    group_size: int = 128
    method: str = "best"
    """Of quantizing, for what that takes."""
    samples: int = 128
    """Of calibration, likewise."""
    seq_len: int = 2048
    runtime: Runtime = "qquant"
    device: Literal["cpu", "cuda"] = "cuda"
    device_bytes: int | None = None
    """Of the card, or of the machine's memory; None: nothing is judged."""

    def __post_init__(self) -> None:
        """Refuse what cannot be predicted, before a model is looked at."""
        known = [*ELEMENT_BYTES, *BITS]
        for name, values, words in (("precision", self.precisions, known), ("kv", self.kv_caches, [PLAIN, *known])):
            if not values:
                raise UsageError(f"--{name} takes at least one of {', '.join(words)}, got none")
            if len(set(values)) < len(values):
                raise UsageError(f"--{name} takes each value once, got {', '.join(values)}")
            if bad := [value for value in values if value not in words]:
                raise UsageError(f"--{name} takes {', '.join(words)}, got {bad[0]!r}")
        for precision in self.precisions:
            for kv in self.kv_caches:
                if kv in ELEMENT_BYTES and precision in ELEMENT_BYTES and kv != precision:
                    raise UsageError(
                        f"a cache that is not quantized is kept in what the model computes in, {precision}, got --kv "
                        f"{kv}; write --kv {PLAIN}"
                    )
        recipe_of(self.method)
        if self.runtime not in get_args(Runtime):
            raise UsageError(f"--runtime must be one of {', '.join(get_args(Runtime))}, got {self.runtime!r}")
        if self.runtime == "qwen-2023" and self.device == "cpu":
            raise UsageError("the runtime qwen-2023 is predicted for a card; leave out --device cpu")
        for name in ("batches", "prompt_tokens", "new_tokens"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UsageError(f"{name} must each be named once, got {getattr(self, name)}")
        counts = (*self.batches, *self.prompt_tokens, *self.new_tokens, self.samples, self.seq_len)
        if not counts or min(counts) < 1:
            raise UsageError(f"batches, tokens and samples must be at least 1, got {min(counts, default=0)}")
        refuse_beyond_counting(*counts)
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
    _refuse_narrow_heads(shapes, question)
    for precision in packed:
        _refuse_unpackable(shapes, BITS[precision], question.group_size)
    cells = tuple(_cells(shapes, question))
    plan = Plan(
        model=label,
        parameters=shapes.parameters,
        positions=shapes.positions,
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


def what_would_fit(plan: Plan) -> str | None:
    """None if any cell fits or no card was stated; else one line: how large the smallest is, and what would fit."""
    if plan.device_bytes is None or any(cell.fits for cell in plan.cells):
        return None
    smallest = min(plan.cells, key=lambda cell: _needed(cell, plan.device))
    found = [limit for limit in plan.limits if limit.largest_batch or limit.largest_tokens]
    cards = _cards(plan, smallest)
    remedy = f"take a larger one{cards}; fewer bits, a shorter context and a smaller batch take less"
    if found:
        best = max(found, key=lambda limit: (limit.largest_batch, limit.largest_tokens))
        kind = f"{best.precision} with {_article(best.kv_cache)} cache"
        remedy = (
            f"{kind} fits at batch {best.largest_batch}"
            if best.largest_batch
            else f"{kind} fits up to {best.largest_tokens} tokens"
        )
    return (
        f"nothing fits {_size(plan.device_bytes)}: {plan.model} in {smallest.precision} with "
        f"{_article(smallest.kv_cache)} cache at batch {smallest.batch} and {smallest.prompt_tokens} + "
        f"{smallest.new_tokens} tokens needs {_size(_needed(smallest, plan.device))}; {remedy}"
    )


def _cards(plan: Plan, cell: PlanCell) -> str:
    """How many of the stated cards would hold a cell that one does not, if its matrices can be cut over so many."""
    if plan.device == "cpu" or plan.device_bytes is None:
        return ""
    whole, room = _needed(cell, plan.device) - CUDA_CONTEXT_BYTES, plan.device_bytes - CUDA_CONTEXT_BYTES
    divides = [row.ranks for row in plan.tensor_parallel if row.precision == cell.precision and row.fits]
    found = next((ranks for ranks in sorted(divides) if ranks * room >= whole), None)
    return "" if found is None else f", or {found} of them"


def _article(kv: KVKind) -> str:
    return f"an {kv}" if kv in BITS else f"a {kv}"


def _size(size: int) -> str:
    """In the largest unit that leaves a digit before the point."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


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
    beside = CUDA_CONTEXT_BYTES if device == "cuda" else IMPORTED_BYTES
    return max(cell.footprint.peak_bytes, cell.loading_peak_bytes) + beside


def _cells(shapes: ModelShapes, question: Question) -> list[PlanCell]:
    return [
        _cell(shapes, question, precision, kv, batch, prompt, new)
        for precision in question.precisions
        for kv in _kinds(precision, question)
        for batch in question.batches
        for prompt in question.prompt_tokens
        for new in question.new_tokens
    ]


def _kinds(precision: Precision, question: Question) -> list[KVKind]:
    """The caches of a precision by their own names; "plain" may stand for one that is named as well."""
    plain: dict[str, KVKind] = {"fp32": "fp32", "fp16": "fp16"}
    return list(dict.fromkeys(plain.get(precision, "bf16") if kv == PLAIN else kv for kv in question.kv_caches))


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
    """The tensors, and what is beside what it becomes; the original code: both embeddings twice.

    Packed linears are read and rearranged one set of siblings at a time, ``model_kernels.attach_kernels``, when all
    else is there; of a plain model it is the largest tensor.
    """
    sizes: dict[str, Any] = {"group_size": question.group_size}
    if question.runtime == "qwen-2023":
        weights = weights_bytes(shapes, precision, **sizes, element_bytes=element)
        return weights + (2 * shapes.embedding_parameters if precision in BITS else 0)
    beside = stage_bytes(shapes, precision, **sizes) if precision in BITS else shapes.largest_tensor * element
    return held_bytes(shapes, precision, **sizes, element_bytes=element) + beside


def _limits(shapes: ModelShapes, question: Question) -> list[PlanLimit]:
    prompt, new = max(question.prompt_tokens), max(question.new_tokens)
    least_batch, least_new = min(question.batches), min(question.new_tokens)
    found = []
    for precision in question.precisions:
        for kv in _kinds(precision, question):

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
    needs = quantizing_needs(
        shapes,
        recipe_of(question.method),
        samples=question.samples,
        seq_len=question.seq_len,
        device=question.device,
    )
    precision: Precision = "int8" if bits == 8 else "int4"
    return PlanQuantizing(
        bits=bits,
        group_size=question.group_size,
        samples=question.samples,
        seq_len_tokens=question.seq_len,
        method=question.method,
        device_bytes=needs.fixed_bytes + needs.activation_bytes,
        least_bytes=needs.fixed_bytes,
        ram_bytes=needs.host_bytes,
        disk_bytes=weights_bytes(shapes, precision, group_size=question.group_size) + needs.shelf_bytes,
    )


def _refuse_narrow_heads(shapes: ModelShapes, question: Question) -> None:
    widths = [layer.value_dim for layer in shapes.caches if layer.value_dim % 32]
    if "int4" in question.kv_caches and widths:
        raise UsageError(
            f"values in 4 bits share a range per 32 channels, and a head of {shapes.model_type} here has {widths[0]}; "
            "leave int4 out of --kv"
        )


def _refuse_unpackable(shapes: ModelShapes, bits: int, group_size: int) -> None:
    refuse_uneven_groups(shapes, group_size)
    for linear in shapes.linears:
        if not packable(linear.inputs, linear.outputs, bits):
            raise UsageError(
                f"{linear.name}: {linear.inputs} x {linear.outputs} does not fill whole words of {bits}-bit codes; "
                "plan it with --precision bf16"
            )


def _tensor_parallel(shapes: ModelShapes, precision: Precision, group_size: int, ranks: int) -> PlanTensorParallel:
    packing = Packing(BITS[precision], group_size) if precision in BITS else None
    reason = uncut(shapes, lambda name: packing, ranks)
    return PlanTensorParallel(ranks=ranks, precision=precision, fits=reason is None, reason=reason)


def _row(label: str, shapes: ModelShapes) -> ModelRow:
    return ModelRow(
        label=label,
        role="baseline",
        model_type=shapes.model_type,
        parameters=shapes.parameters,
        checkpoint_dtype="bfloat16",
        weights_bytes=weights_bytes(shapes, "bf16"),
    )
