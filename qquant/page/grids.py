"""Tables of grids joined: speed and memory by model and precision, memory by batch and by length.

In the form of Qwen's README, its own cells beside ours and marked with their hardware. How a cell is measured or
predicted is profile_report.py's and plan_report.py's to say, what fits a card plans.py's; nothing here knows HTML.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from qquant.page.joined import published_size
from qquant.page.tables import NOT_KNOWN, PRECISIONS, Cell, Origin, Table, make_table, number, size_text, unit_of
from qquant.plan_report import PlanCell
from qquant.profile_report import CellKey, CellSpeed, Profile, ProfileCell
from qquant.published import KV_CACHE, SPEED_MEMORY, PublishedCell
from qquant.records import KVKind, Precision
from qquant.results import ModelRow, Result

_GIB = 2**30
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
    """Hardware, or what predicted it."""
    place: int | None
    """Number of the result; None for what is published."""
    origin: Origin
    peak_bytes: float | None
    status: str
    """What a cell says that has no number."""


def tables(results: Sequence[Result]) -> list[Table]:
    """Every table that the results have cells for; results are numbered from 1 in their order."""
    points = [point for place, result in enumerate(results, 1) for point in _points(place, result)]
    return [*_speeds(results), *_by_batch(points), *_by_length(points), *_failures(results)]


def _points(place: int, result: Result) -> Iterator[_Point]:
    """Measured and predicted cells of a result, each followed by the published ones of the same model and caches."""
    env, rows = result.environment, {row.label: row for row in result.rows}
    for cell in result.profile.cells if result.profile else ():
        key, row = cell.key, rows.get(cell.key.label)
        where = (key.label, key.precision, key.kv_cache, *_run(key))
        status = _STATUS.get(cell.status, NOT_KNOWN)
        drawn = ", random weights" if row and row.random_weights else ""
        yield _Point(*where, f"measured on {env.device}{drawn}", place, "measured", cell.measured_peak_bytes, status)
        if cell.predicted:
            yield _Point(*where, "predicted", place, "predicted", cell.predicted.peak_bytes, NOT_KNOWN)
    keys = [cell.key for cell in result.profile.cells] if result.profile else []
    for label in dict.fromkeys(key.label for key in keys):
        yield from _published_beside(label, rows.get(label), [key for key in keys if key.label == label])
    if result.plan is None:
        return
    model = result.plan.model.replace("\\", "/").rstrip("/").rpartition("/")[2]
    row = result.rows[0] if result.rows else None
    for planned in result.plan.cells:
        where = (model, planned.precision, planned.kv_cache, *_run(planned))
        source = f"predicted, {result.plan.runtime}"
        yield _Point(*where, source, place, "predicted", planned.footprint.peak_bytes, NOT_KNOWN)
    yield from _published_beside(model, row, result.plan.cells)


def _published_beside(model: str, row: ModelRow | None, ours: Sequence[CellKey | PlanCell]) -> Iterator[_Point]:
    """Published cells of a model in every precision and cache that we have it in."""
    runs = [_run(cell) for cell in ours]
    for precision, kv_cache in dict.fromkeys((cell.precision, cell.kv_cache) for cell in ours):
        yield from _published_points(model, row, precision, kv_cache, runs)


def _run(cell: CellKey | PlanCell | PublishedCell) -> tuple[int, int, int]:
    return cell.batch, cell.prompt_tokens, cell.new_tokens


def _published(row: ModelRow | None, precision: Precision, kv_cache: str) -> list[PublishedCell]:
    """Cells of Qwen's README for the same shapes; memory and speed do not depend on what the weights are."""
    name = published_size(row) if row else None
    cells = (*SPEED_MEMORY, *KV_CACHE)
    return [cell for cell in cells if (cell.model, cell.precision, cell.kv_cache) == (name, precision, kv_cache)]


def _same_memory(ours: tuple[int, int, int], theirs: tuple[int, int, int]) -> bool:
    """As many tokens of prompt and answer at the end, the README's one more or less: the peak is that of the last."""
    return abs(sum(ours[1:]) - sum(theirs[1:])) <= 1


def _published_points(
    model: str, row: ModelRow | None, precision: Precision, kv_cache: str, runs: Sequence[tuple[int, int, int]]
) -> Iterator[_Point]:
    """Published cells of a model, each at the place of our run that ends with as many tokens, where there is one."""
    for found in _published(row, precision, kv_cache):
        alike = [run for run in runs if _same_memory(run, _run(found))]
        size = None if found.memory_gib is None else found.memory_gib * _GIB
        run = (found.batch, *alike[0][1:]) if alike and _run(found) not in runs else _run(found)
        where = (model, precision, kv_cache, *run)
        yield _Point(*where, f"Qwen's README, {found.hardware}", None, "published", size, "OOM")


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
    unit, scale = unit_of([cell.measured_peak_bytes for cell in profile.cells if cell.measured_peak_bytes is not None])
    body, beside = [], []
    for cell in profile.cells:
        key, stopped = cell.key, _STATUS.get(cell.status)
        own = _published(rows.get(key.label), key.precision, key.kv_cache)
        same_batch = [found for found in own if found.batch == key.batch and _same_memory(_run(key), _run(found))]
        theirs = next((found for found in own if _run(found) == _run(key)), next(iter(same_batch), None))
        beside += [theirs] if theirs else []
        predicted = None if cell.predicted is None else cell.predicted.peak_bytes
        body.append([
            *_name_and_run(cell), stopped or number(_generated(cell), ",.2f"),
            stopped or size_text(cell.measured_peak_bytes, scale), Cell(size_text(predicted, scale), "predicted"),
            *_beside(theirs, scale, same_run=theirs is not None and _run(theirs) == _run(key)),
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


def _beside(theirs: PublishedCell | None, scale: int, *, same_run: bool) -> list[Cell]:
    """Their speed only for the very same run; their memory for one that ends with as many tokens."""
    if theirs is None:
        return [Cell(NOT_KNOWN, "published")] * 3
    memory = "OOM" if theirs.memory_gib is None else size_text(theirs.memory_gib * _GIB, scale)
    speed = number(theirs.tokens_per_second, ",.2f") if same_run else NOT_KNOWN
    texts = (speed, memory, theirs.hardware.partition(",")[0])
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


@dataclass
class _Row:
    """A line of a grid: one source of numbers for one KV cache, of all results that do not contradict each other."""

    kv_cache: str
    source: str
    origin: Origin
    places: list[int]
    texts: dict[tuple[int, ...], str]
    """Column -> what stands in it."""

    def takes(self, point: _Point, key: tuple[int, ...], text: str) -> bool:
        """Whether a point belongs into this row."""
        alike = (self.kv_cache, self.source, self.origin) == (point.kv_cache, point.source, point.origin)
        return alike and self.texts.get(key, text) == text

    @property
    def named(self) -> str:
        """The source with the numbers of its results."""
        return self.source + (f" [{', '.join(map(str, self.places))}]" if self.places else "")


def _grid(
    title: str, points: Sequence[_Point], columns: dict[tuple[int, ...], str], keys: Sequence[tuple[int, ...]]
) -> Iterator[Table]:
    """KV caches and sources downwards; nothing where ours has a single column."""
    own = {key for point, key in zip(points, keys, strict=True) if point.origin != "published"}
    if len(own) < 2:
        return
    unit, scale = unit_of([point.peak_bytes for point in points if point.peak_bytes is not None])
    rows: list[_Row] = []
    for point, key in zip(points, keys, strict=True):
        text = point.status if point.peak_bytes is None else f"{point.peak_bytes / scale:,.2f}"
        row = next((row for row in rows if row.takes(point, key, text)), None)
        if row is None:
            rows.append(row := _Row(point.kv_cache, point.source, point.origin, [], {}))
        row.texts[key] = text
        row.places += [point.place] if point.place and point.place not in row.places else []
    # By cache, and within it measured, predicted, published: the alphabet's order, too.
    ordered = sorted(rows, key=lambda row: (_KINDS.index(row.kv_cache), row.origin))
    body = [
        [
            Cell(text, row.origin)
            for text in (row.kv_cache, row.named, *[row.texts.get(key, NOT_KNOWN) for key in columns])
        ]
        for row in ordered
    ]
    stopped = any(point.peak_bytes is None and point.status == "OOM" for point in points)
    intro = f"Peak in {unit} of runs of prompt+new tokens." + (" OOM: it did not fit." if stopped else "")
    yield make_table("memory", title, ("KV cache", "source", *columns.values()), body, labels=2, intro=intro)


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
