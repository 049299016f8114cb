"""Tables of grids joined: speed and memory by model and precision, memory by batch and by length, and what fits.

In the form of Qwen's README, its own cells beside ours and marked with their hardware. How a cell is measured or
predicted is profile_report.py's and plan_report.py's to say; nothing here knows HTML.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from qquant.page.joined import published_size
from qquant.page.tables import NOT_KNOWN, PRECISIONS, Cell, Origin, Table, make_table, number
from qquant.plan_report import Plan, PlanCell
from qquant.profile_report import CellKey, CellSpeed, Profile, ProfileCell
from qquant.published import KV_CACHE, SPEED_MEMORY, PublishedCell
from qquant.records import KVKind, Precision
from qquant.results import ModelRow, Result

_GIB, _MIB = 2**30, 2**20
_MILLI = 1e3
_KINDS = get_args(KVKind)
_STATUS = {"out-of-memory": "OOM", "failed": "failed"}


@dataclass(frozen=True)
class _Point:
    """Memory of one run, measured, predicted or published."""

    model: str
    precision: Precision
    kv_cache: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    source: str
    """Hardware, or what predicted it, with the number of the result."""
    origin: Origin
    peak_bytes: float | None
    status: str
    """What a cell says that has no number."""


def tables(results: Sequence[Result]) -> list[Table]:
    """Every table that the results have cells for; results are numbered from 1 in their order."""
    points = [point for place, result in enumerate(results, 1) for point in _points(place, result)]
    return [*_speeds(results), *_by_batch(points), *_by_length(points), *_plans(results), *_failures(results)]


def _points(place: int, result: Result) -> Iterator[_Point]:
    """Measured and predicted cells of a result, each followed by the published ones of the same model and caches."""
    env, rows = result.environment, {row.label: row for row in result.rows}
    for cell in result.profile.cells if result.profile else ():
        key, row = cell.key, rows.get(cell.key.label)
        where = (key.label, key.precision, key.kv_cache, *_run(key))
        status = _STATUS.get(cell.status, NOT_KNOWN)
        drawn = ", random weights" if row and row.random_weights else ""
        yield _Point(*where, f"measured on {env.device}{drawn} [{place}]", "measured", cell.measured_peak_bytes, status)
        if cell.predicted:
            yield _Point(*where, f"predicted [{place}]", "predicted", cell.predicted.peak_bytes, NOT_KNOWN)
        yield from _published_points(key.label, row, key.precision, key.kv_cache)
    if result.plan is None:
        return
    model = result.plan.model.replace("\\", "/").rstrip("/").rpartition("/")[2]
    row = result.rows[0] if result.rows else None
    for planned in result.plan.cells:
        where = (model, planned.precision, planned.kv_cache, *_run(planned))
        source = f"predicted, {result.plan.runtime} [{place}]"
        yield _Point(*where, source, "predicted", planned.footprint.peak_bytes, NOT_KNOWN)
        yield from _published_points(model, row, planned.precision, planned.kv_cache)


def _run(cell: CellKey | PlanCell | PublishedCell) -> tuple[int, int, int]:
    return cell.batch, cell.prompt_tokens, cell.new_tokens


def _published(row: ModelRow | None, precision: Precision, kv_cache: str) -> list[PublishedCell]:
    """Cells of Qwen's README for the same shapes; memory and speed do not depend on what the weights are."""
    name = published_size(row) if row else None
    cells = (*SPEED_MEMORY, *KV_CACHE)
    return [cell for cell in cells if (cell.model, cell.precision, cell.kv_cache) == (name, precision, kv_cache)]


def _published_points(model: str, row: ModelRow | None, precision: Precision, kv_cache: str) -> Iterator[_Point]:
    for found in _published(row, precision, kv_cache):
        size = None if found.memory_gib is None else found.memory_gib * _GIB
        where = (model, precision, kv_cache, *_run(found))
        yield _Point(*where, f"Qwen's README, {found.hardware}", "published", size, "OOM")


def _speeds(results: Sequence[Result]) -> Iterator[Table]:
    """Per result with a profile: the README's two columns with ours, then the speed in detail."""
    for place, result in enumerate(results, 1):
        if result.profile is not None and result.profile.cells:
            where = f"{result.environment.device}, {result.compute_dtype}, torch {result.environment.torch}"
            yield _readme_table(place, result, result.profile, where)
            yield from _detail_table(place, result, result.profile, where)


def _name_and_run(cell: ProfileCell) -> list[str | Cell]:
    key = cell.key
    run = f"{key.batch} x {key.prompt_tokens}+{key.new_tokens}"
    return [key.label, PRECISIONS[key.precision], key.kv_cache, run]


def _readme_table(place: int, result: Result, profile: Profile, where: str) -> Table:
    rows = {row.label: row for row in result.rows}
    unit, scale = _unit([cell.measured_peak_bytes for cell in profile.cells if cell.measured_peak_bytes is not None])
    body, beside = [], []
    for cell in profile.cells:
        key, stopped = cell.key, _STATUS.get(cell.status)
        own = _published(rows.get(key.label), key.precision, key.kv_cache)
        theirs = next((found for found in own if _run(found) == _run(key)), None)
        beside += [theirs] if theirs else []
        predicted = None if cell.predicted is None else cell.predicted.peak_bytes
        body.append([
            *_name_and_run(cell), stopped or number(_generated(cell), ",.2f"),
            stopped or _size(cell.measured_peak_bytes, scale), Cell(_size(predicted, scale), "predicted"),
            *_beside(theirs, scale),
        ])  # fmt: skip
    peak = "of torch's allocator" if result.environment.driver else "the resident memory that the model added"
    intro = (
        f"Result {place}, {where}; warm-ups: {profile.warmups}, medians of runs: {profile.repeats}. A run is batch x "
        "prompt+new tokens; speed is all new tokens by the time of the whole generation, as the README has it. "
        f"Memory is the peak, {peak}."
    )
    drawn = [row.label for row in result.rows if row.random_weights]
    intro += f" Random weights at the model's shapes: {', '.join(drawn)}." if drawn else ""
    head = (
        "model", "precision", "KV cache", "run", "speed (tokens/s)", f"memory ({unit})", f"predicted ({unit})",
        "published speed (tokens/s)", f"published memory ({unit})", "published on",
    )  # fmt: skip
    title = f"Speed and memory on {result.environment.device}"
    return make_table("speed", title, head, body, labels=4, intro=intro, notes=_hardware(beside))


def _hardware(cells: Sequence[PublishedCell]) -> list[str]:
    """What the published cells beside ours were taken on, each once, and what is doubtful about them."""
    full = [f"Published on {hardware}." for hardware in dict.fromkeys(cell.hardware for cell in cells)]
    encoded = sorted({cell.encoded_tokens for cell in cells if cell.encoded_tokens is not None})
    doubt = (
        f"Other wordings of the README say that memory was taken while encoding {encoded[0]} tokens." if encoded else ""
    )
    return [" ".join([*full, doubt]).strip()] if full else []


def _detail_table(place: int, result: Result, profile: Profile, where: str) -> Iterator[Table]:
    body = [[*_name_and_run(cell), *_speed(cell.speed)] for cell in profile.cells if cell.speed]
    if body:
        head = (
            "model", "precision", "KV cache", "run", "prefill (tokens/s)", "decode (tokens/s)", "fastest .. slowest",
            "first token (ms)", "token p50 (ms)", "token p95 (ms)",
        )  # fmt: skip
        intro = f"Result {place}, {where}. Decoding leaves the first token out; all sequences of a batch count."
        title = f"Prefill and decoding on {result.environment.device}"
        yield make_table("speed", title, head, body, labels=4, intro=intro)


def _beside(theirs: PublishedCell | None, scale: int) -> list[Cell]:
    if theirs is None:
        return [Cell(NOT_KNOWN, "published")] * 3
    memory = "OOM" if theirs.memory_gib is None else _size(theirs.memory_gib * _GIB, scale)
    texts = (number(theirs.tokens_per_second, ",.2f"), memory, theirs.hardware.partition(",")[0])
    return [Cell(text, "published") for text in texts]


def _generated(cell: ProfileCell) -> float | None:
    """New tokens of the whole batch per second of the whole generation; None where it was not timed."""
    speed = cell.speed
    if speed is None:
        return None
    decode = speed.decode_seconds or (0.0,) * len(speed.first_token_seconds)
    seconds = [first + rest for first, rest in zip(speed.first_token_seconds, decode, strict=False)]
    return cell.key.batch * cell.key.new_tokens / statistics.median(seconds) if seconds else None


def _speed(speed: CellSpeed) -> list[str | Cell]:
    rate = speed.decode_tokens_per_second
    spread = NOT_KNOWN
    if rate and speed.decode_seconds:
        middle = statistics.median(speed.decode_seconds)
        spread = " .. ".join(
            f"{rate * middle / edge:,.1f}" for edge in (min(speed.decode_seconds), max(speed.decode_seconds))
        )
    first = statistics.median(speed.first_token_seconds) if speed.first_token_seconds else None
    times = (first, speed.token_p50_seconds, speed.token_p95_seconds)
    return [
        f"{speed.prefill_tokens_per_second:,.1f}",
        number(rate, ",.1f"),
        spread,
        *[number(None if value is None else _MILLI * value, ",.2f") for value in times],
    ]


def _unit(sizes: Sequence[float]) -> tuple[str, int]:
    """GiB as the README counts, MiB where that would be mostly zeros."""
    return ("MiB", _MIB) if sizes and max(sizes) < _GIB / 2 else ("GiB", _GIB)


def _size(value: float | None, scale: int) -> str:
    return number(None if value is None else value / scale, ",.2f")


def _by_batch(points: Sequence[_Point]) -> Iterator[Table]:
    groups: dict[tuple[str, Precision, int, int], list[_Point]] = {}
    for point in points:
        groups.setdefault((point.model, point.precision, point.prompt_tokens, point.new_tokens), []).append(point)
    for (model, precision, prompt, new), own in groups.items():
        batches: dict[tuple[int, ...], str] = {
            (point.batch,): f"bs={point.batch}" for point in sorted(own, key=lambda point: point.batch)
        }
        title = f"Memory by batch: {model}, {PRECISIONS[precision]}, {prompt}+{new} tokens"
        yield from _grid(title, own, batches, [(point.batch,) for point in own])


def _by_length(points: Sequence[_Point]) -> Iterator[Table]:
    groups: dict[tuple[str, Precision, int], list[_Point]] = {}
    for point in points:
        groups.setdefault((point.model, point.precision, point.batch), []).append(point)
    for (model, precision, batch), own in groups.items():
        ordered = sorted(own, key=lambda point: (point.prompt_tokens + point.new_tokens, point.prompt_tokens))
        keys = [(point.prompt_tokens, point.new_tokens) for point in own]
        lengths: dict[tuple[int, ...], str] = {
            (point.prompt_tokens, point.new_tokens): f"{point.prompt_tokens}+{point.new_tokens}" for point in ordered
        }
        title = f"Memory by length: {model}, {PRECISIONS[precision]}, batch {batch}"
        yield from _grid(title, own, lengths, keys)


def _grid(
    title: str, points: Sequence[_Point], columns: dict[tuple[int, ...], str], keys: Sequence[tuple[int, ...]]
) -> Iterator[Table]:
    """KV caches and sources downwards; nothing where ours has a single column."""
    own = {key for point, key in zip(points, keys, strict=True) if point.origin != "published"}
    if len(own) < 2:
        return
    unit, scale = _unit([point.peak_bytes for point in points if point.peak_bytes is not None])
    rows: dict[tuple[str, str, Origin], dict[tuple[int, ...], str]] = {}
    for point, key in zip(points, keys, strict=True):
        text = point.status if point.peak_bytes is None else f"{point.peak_bytes / scale:,.2f}"
        rows.setdefault((point.kv_cache, point.source, point.origin), {}).setdefault(key, text)
    # By cache, and within it measured, predicted, published: the alphabet's order, too.
    ordered = sorted(rows.items(), key=lambda item: (_KINDS.index(item[0][0]), item[0][2]))
    body = [
        [Cell(kind, origin), Cell(source, origin), *[Cell(found.get(key, NOT_KNOWN), origin) for key in columns]]
        for (kind, source, origin), found in ordered
    ]
    stopped = any(point.peak_bytes is None and point.status == "OOM" for point in points)
    intro = f"Peak in {unit} of runs of prompt+new tokens." + (" OOM: it did not fit." if stopped else "")
    yield make_table("memory", title, ("KV cache", "source", *columns.values()), body, labels=2, intro=intro)


def _plans(results: Sequence[Result]) -> Iterator[Table]:
    for place, result in enumerate(results, 1):
        if result.plan is not None:
            yield from _limits(place, result.plan)
            yield from _quantizing(place, result.plan)
            yield from _tensor_parallel(place, result.plan)


def _quantizing(place: int, plan: Plan) -> Iterator[Table]:
    if plan.quantizing:
        unit, scale = _unit([float(found.device_bytes) for found in plan.quantizing])
        head = ("bits", "group size", "samples", f"device ({unit})", f"RAM ({unit})", f"disk ({unit})")
        body = [
            [
                str(found.bits), str(found.group_size), f"{found.samples} x {found.seq_len}",
                *[_size(size, scale) for size in (found.device_bytes, found.ram_bytes, found.disk_bytes)],
            ]
            for found in plan.quantizing
        ]  # fmt: skip
        intro = f"Predicted, result {place}. On a CPU the device's bytes come on top of RAM."
        yield make_table("plan", f"What quantizing {plan.model} takes", head, body, labels=3, intro=intro)


def _tensor_parallel(place: int, plan: Plan) -> Iterator[Table]:
    if plan.tensor_parallel:
        head = ("precision", "devices", "can be cut", "what does not divide")
        body = [
            [PRECISIONS[found.precision], str(found.ranks), "yes" if found.fits else "no", found.reason or ""]
            for found in plan.tensor_parallel
        ]
        title = f"Tensor parallelism of {plan.model}, groups of {plan.group_size}"
        yield make_table("plan", title, head, body, labels=len(head), intro=f"Result {place}.")


def _limits(place: int, plan: Plan) -> Iterator[Table]:
    if not plan.limits:
        return
    card = f" of {plan.device_bytes / _GIB:,.1f} GiB" if plan.device_bytes is not None else ""
    body = [
        [
            PRECISIONS[limit.precision], limit.kv_cache, f"{limit.largest_batch:,}",
            f"{limit.largest_tokens:,}", "no" if limit.beyond_model else "yes",
        ]
        for limit in plan.limits
    ]  # fmt: skip
    head = ("precision", "KV cache", "largest batch", "largest context (tokens)", "within the model's positions")
    intro = (
        f"Predicted, result {place}. The batch is at the plan's largest length, the context at its smallest batch; 0 "
        "means that not even one fits."
    )
    yield make_table("plan", f"Largest {plan.model} on a card{card}", head, body, labels=2, intro=intro)


def _failures(results: Sequence[Result]) -> Iterator[Table]:
    body = [
        [cell.key.label, PRECISIONS[cell.key.precision], cell.key.kv_cache,
         f"{cell.key.batch} x {cell.key.prompt_tokens}+{cell.key.new_tokens}", str(place), cell.status,
         cell.reason or ""]
        for place, result in enumerate(results, 1)
        for cell in (result.profile.cells if result.profile else ())
        if cell.status != "ok"
    ]  # fmt: skip
    if body:
        head = ("model", "precision", "KV cache", "run", "result", "status", "reason")
        yield make_table("memory", "Cells that have no number", head, body, labels=len(head))
