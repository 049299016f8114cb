"""Charts of memory: against batch and length, and by what it is for.

Cells come from the sections ``profile`` and ``plan`` of results; nothing is predicted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from qquant.charts.grid_cells import (
    PRECISIONS,
    Cell,
    by_series,
    families,
    names_of,
    plan_cells,
    profile_cells,
    series_look,
    series_name,
    slice_of,
)
from qquant.charts.plot import (
    SMALL,
    Bar,
    Curve,
    Part,
    Place,
    bars_height,
    curves_height,
    draw_axes,
    draw_bars,
    draw_curves,
    draw_legend,
    names_width,
    plot_frame,
    value_scale,
)
from qquant.charts.scales import ByteUnit, Scale, doubling_scale, memory_unit
from qquant.charts.svg import BAD, CATEGORIES, Chart, Drawing, Look
from qquant.results import Result

_PREDICTED = "5 3"
_STACKED = 3
"""So many crosses of one place are drawn one by one."""


def memory_charts(results: Sequence[Result]) -> list[Chart]:
    """Peak memory against batch and against length, a curve per precision and KV cache.

    Args:
        results: read, never written.

    Returns:
        Up to two charts per profile or plan; none where the grid has a single batch and a single length.
    """
    charts = []
    for number, result in enumerate(results, 1):
        for kind, cells, limit in _grids(result):
            for group, own in families(cells).items():
                for along, title in (("batch", "batch"), ("tokens", "length")):
                    anchor = f"memory-{title}-{kind}{group}-{number}"
                    chart = _grid_chart(anchor, own, limit, along=along, kind=kind)
                    charts += [chart] if chart else []
    return charts


def _grids(result: Result) -> Iterable[tuple[str, list[Cell], int | None]]:
    if result.profile is not None:
        yield "profile", profile_cells(result.profile), result.profile.device_memory_bytes
    if result.plan is not None:
        yield "plan", plan_cells(result.plan), result.plan.device_bytes


def _grid_chart(anchor: str, cells: Sequence[Cell], limit: int | None, *, along: str, kind: str) -> Chart | None:
    chosen = [cell for cell in slice_of(cells, along) if cell.peak_bytes or cell.out_of_memory] if cells else []
    values = sorted({getattr(cell, along) for cell in chosen})
    peaks = [peak for cell in chosen for peak in (_measured(cell), _predicted(cell)) if peak]
    if len(values) < 2 or not peaks:
        return None
    # A far-away limit would press all curves to the ground.
    stopped = any(cell.out_of_memory for cell in chosen)
    limit = limit if limit and (stopped or limit < 1.5 * max(peaks)) else None
    unit = memory_unit(peaks)
    curves = _curves(chosen, along, unit)
    what = "batch" if along == "batch" else "length"
    fixed = chosen[0].text if along == "batch" else f"batch {chosen[0].batch}"
    drawing = Drawing(
        anchor,
        f"{'Planned memory' if kind == 'plan' else 'Memory'} by {what}: {names_of(chosen)}",
        f"Peak memory for {what} {values[0]} to {values[-1]} at {fixed}, from {unit.text(min(peaks))} to "
        f"{unit.text(max(peaks))}" + (f"; the device has {unit.text(limit)}" if limit else ""),
        height=curves_height(curves, 258) + 72,
    )
    frame = plot_frame(28, drawing.height - 72, right=names_width(curves))
    x = doubling_scale(values, frame.left + 4, frame.right - 4)
    # Room above the limit for its name, and for crosses on top of one another.
    heights = [peak / unit.size for peak in peaks] + (
        [limit / unit.size * (1.25 if stopped else 1.12)] if limit else []
    )
    y = value_scale(heights, frame.bottom, frame.top)
    x_title = "batch (sequences at once)" if along == "batch" else "tokens of prompt and answer"
    draw_axes(drawing, frame, x, y, x_title=x_title, y_title=f"peak memory ({unit.name})", x_ticks=values)
    if limit:
        line = y.at(limit / unit.size)
        drawing.area(
            [(frame.left, frame.top), (frame.right, frame.top), (frame.right, line), (frame.left, line)],
            fill=BAD,
            opacity=0.07,
        )
        drawing.line([(frame.left, line), (frame.right, line)], stroke=BAD, width=1.3)
    draw_curves(drawing, frame, x, y, curves)
    if limit:
        # In the corner that rising curves leave free.
        beyond = f"beyond the device's {unit.text(limit)}"
        drawing.text(frame.left + 4, frame.top + 13, beyond, size=SMALL, fill=BAD, halo=True)
        _draw_stopped(drawing, chosen, along, x, y.at(limit / unit.size))
    return drawing.chart(_grid_caption(kind, fixed, stopped=stopped, drawn=curves))


def _grid_caption(kind: str, fixed: str, *, stopped: bool, drawn: Sequence[Curve]) -> str:
    if kind == "plan":
        said = "Predicted, nothing was run"
    elif not any(curve.look.dash is None for curve in drawn):
        said = "Predicted, nothing was measured"
    elif any(not curve.marked for curve in drawn):
        said = "Solid: measured; dashed: predicted by the planner"
    else:
        said = "Measured"
    crosses = " A cross: runs that were tried and ended out of memory, counted where they are many." if stopped else ""
    return f"{said}; at {fixed}. The colour is the precision of the weights, the mark that of the KV cache.{crosses}"


def _curves(cells: Sequence[Cell], along: str, unit: ByteUnit) -> list[Curve]:
    """The measured curve of every series with its name, and the predicted one below it."""
    curves = []
    for key, own in by_series(cells).items():
        look, name = series_look(key), series_name(key)
        own = sorted(own, key=lambda cell: cell.tokens if along == "tokens" else cell.batch)
        measured = _places(own, along, unit, _measured, "measured")
        predicted = _places(own, along, unit, _predicted, "predicted")
        dashed = Look(look.colour, look.shape, _PREDICTED)
        if predicted:
            curves.append(Curve("" if measured else name, dashed, predicted, marked=not measured))
        if measured:
            curves.append(Curve(name, look, measured))
    return sorted(curves, key=lambda curve: curve.marked)


def _measured(cell: Cell) -> int | None:
    return cell.measured_bytes


def _predicted(cell: Cell) -> int | None:
    return cell.predicted.peak_bytes if cell.predicted else None


def _places(
    cells: Sequence[Cell], along: str, unit: ByteUnit, peak: Callable[[Cell], int | None], word: str
) -> tuple[Place, ...]:
    found = ((cell, peak(cell)) for cell in cells)
    return tuple(
        Place(getattr(cell, along), count / unit.size, f"{cell.place}: {unit.text(count)} {word}")
        for cell, count in found
        if count
    )


def _draw_stopped(drawing: Drawing, cells: Sequence[Cell], along: str, x: Scale, line: float) -> None:
    """A cross on the device's limit for every run that ended out of memory; many at one place are counted."""
    at: dict[int, list[Cell]] = {}
    for cell in cells:
        if cell.out_of_memory:
            at.setdefault(getattr(cell, along), []).append(cell)
    for value, stopped in at.items():
        if len(stopped) > _STACKED:
            tip = "out of memory: " + "; ".join(cell.place for cell in stopped)
            drawing.marker(x.at(value), line, "cross", colour=BAD, radius=4.5, tip=tip)
            shown = f"{len(stopped)}"
            drawing.text(x.at(value), line - 9, shown, side="middle", size=SMALL, fill=BAD, halo=True, tip=tip)
            continue
        for number, cell in enumerate(stopped):
            colour, tip = PRECISIONS[cell.precision], f"{cell.place}: out of memory"
            drawing.marker(x.at(value), line - 11 * number, "cross", colour=colour, radius=4.5, tip=tip)


_PARTS = (
    ("weights_bytes", "weights", 4),
    ("cache_bytes", "KV cache", 5),
    ("activations_bytes", "activations", 6),
    ("overhead_bytes", "overhead", 7),
)
"""Field, word, colour: none that a precision has."""


def parts_charts(results: Sequence[Result]) -> list[Chart]:
    """What a planned run's memory is for: a stacked bar per precision and KV cache, for the longest text."""
    charts = []
    for number, result in enumerate(results, 1):
        cells = plan_cells(result.plan) if result.plan else []
        if not cells:
            continue
        largest = max((cell.tokens, -cell.batch) for cell in cells)
        chosen = [cell for cell in cells if (cell.tokens, -cell.batch) == largest]
        unit = memory_unit(cell.peak_bytes or 0 for cell in chosen)
        bars = [_parts_bar(cell, unit) for cell in chosen if cell.predicted]
        drawing = Drawing(
            f"memory-parts-{number}",
            f"What the memory is for: {chosen[0].model}",
            "; ".join(f"{bar.name}: {bar.text}" for bar in bars),
            height=bars_height(bars) + 32,
        )
        entries = [(name, Look(CATEGORIES[step], "square"), "block") for _, name, step in _PARTS]
        draw_bars(drawing, bars, top=draw_legend(drawing, entries, top=2) + 4)
        charts.append(
            drawing.chart(
                f"Predicted for batch {chosen[0].batch} and {chosen[0].text}, the longest of the plan. The number is "
                "the peak at one moment, which need not be the sum."
            )
        )
    return charts


def _parts_bar(cell: Cell, unit: ByteUnit) -> Bar:
    name = f"{cell.precision}, KV {cell.kv_cache}"
    parts = [
        Part(
            getattr(cell.predicted, path) / unit.size,
            CATEGORIES[step],
            f"{name}: {word} {unit.text(getattr(cell.predicted, path))}",
        )
        for path, word, step in _PARTS
    ]
    return Bar(name, unit.text(cell.peak_bytes or 0), tuple(parts))
