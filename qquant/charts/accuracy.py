"""Charts of what quantizing costs in accuracy: against size and speed, and by task.

Only results that hold such numbers are drawn; what a chart looks like in its details is plot.py's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from qquant.charts.label_places import Box, place_labels
from qquant.charts.plot import LEFT, SMALL, draw_axes, plot_frame
from qquant.charts.scales import ByteUnit, Scale, disk_unit, linear_scale, log_scale, number_text, signed_text
from qquant.charts.svg import (
    INK,
    LINE,
    MUTED,
    WIDTH,
    Chart,
    Drawing,
    Look,
    Side,
    clipped,
    look_of,
    short_names,
    text_width,
)
from qquant.results import Result
from qquant.task_report import SHOWN as TASKS
from qquant.task_report import TaskComparison

_ZERO_BAND = 30.0
"""Height of the strip below a logarithmic axis in which zero has its place."""
_DOTTED = "2 4"
_FIGURES = 126.0
"""Room for the numbers beside the differences, user units."""
_ROOMY = 7
"""So many models have room for two lines each."""
_CROWD = 14
"""Of more models than these only those on the front are named."""
_BOLD = 1.15
"""Bold letters by ordinary ones, in width."""


@dataclass(frozen=True)
class _Model:
    """A point of the chart of sizes."""

    label: str
    name: str
    """What of the label stands beside the mark."""
    size_bytes: int
    worth: float
    look: Look
    tokens_per_second: float | None

    @property
    def note(self) -> str:
        """Second line of the label."""
        return f"{number_text(self.tokens_per_second)} tokens/s" if self.tokens_per_second else ""

    def told(self, unit: ByteUnit) -> str:
        """Everything but what the result is."""
        return f"{self.label}: {unit.text(self.size_bytes)}" + (f", {self.note}" if self.note else "")


def pareto_charts(results: Sequence[Result]) -> list[Chart]:
    """Accuracy against size with the speed beside each point: by KL divergence, and by task scores where there are any.

    Args:
        results: read, never written.

    Returns:
        Up to two charts per result; none for a result without a candidate that was scored.
    """
    charts = []
    for number, result in enumerate(results, 1):
        divergences = {
            row.label: 0.0 if row.role == "baseline" else row.accuracy.kl_mean_nats
            for row in result.rows
            if row.accuracy and (row.role == "baseline" or row.accuracy.kl_mean_nats is not None)
        }
        models = _models(result, {label: kl for label, kl in divergences.items() if kl is not None})
        if any(model.worth > 0 for model in models):
            charts.append(_pareto_kl(f"pareto-kl-{number}", result, models))
        models = _models(result, _mean_scores(result))
        if len(models) > 1:
            charts.append(_pareto_score(f"pareto-score-{number}", result, models))
    return charts


def _models(result: Result, worth: dict[str, float]) -> list[_Model]:
    names = short_names([row.label for row in result.rows])
    return [
        _Model(
            label=row.label,
            name=names[row.label],
            size_bytes=row.weights_bytes,
            worth=worth[row.label],
            look=look_of([one.label for one in result.rows], row.label),
            tokens_per_second=row.speed.decode_tokens_per_second if row.speed else None,
        )
        for row in result.rows
        if row.weights_bytes is not None and row.label in worth
    ]


def _mean_scores(result: Result) -> dict[str, float]:
    """Mean over the tasks, in percent, of every model that was scored on all of them."""
    if result.tasks is None:
        return {}
    scores: dict[str, dict[str, float]] = {}
    for score in result.tasks.scores:
        scores.setdefault(score.label, {})[score.task] = 100 * score.score
    tasks = {task for found in scores.values() for task in found}
    return {label: statistics.fmean(found.values()) for label, found in scores.items() if found.keys() == tasks}


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (size, loss) that no other beats in one without losing in the other, by ascending size."""
    kept: list[tuple[float, float]] = []
    for size, loss in sorted(points):
        if not kept or loss < kept[-1][1]:
            kept.append((size, loss))
    return kept


def _pareto_kl(anchor: str, result: Result, models: Sequence[_Model]) -> Chart:
    base = result.rows[0].label
    unit = disk_unit(model.size_bytes for model in models)
    drawing = Drawing(
        anchor,
        f"Accuracy, size and speed of {base}",
        "; ".join(f"{model.told(unit)}, mean KL {number_text(model.worth)} nats" for model in models),
        height=_height(models),
    )
    frame = plot_frame(28, drawing.height - 70)
    y = log_scale([model.worth for model in models if model.worth > 0], frame.bottom - _ZERO_BAND, frame.top)
    zero = frame.bottom - _ZERO_BAND / 2

    def height(loss: float) -> float:
        return y.at(loss) if loss > 0 else zero

    x = linear_scale([model.size_bytes / unit.size for model in models], frame.left, frame.right - 6)
    title = "mean KL to the baseline (nats), lower is better"
    draw_axes(drawing, frame, x, y, x_title=f"weights on disk ({unit.name})", y_title=title)
    # The strip of zero is no part of the logarithmic scale, so its upper edge is broken.
    drawing.line([(frame.left, y.start), (frame.right, y.start)], stroke=MUTED, dash="1 4")
    drawing.text(frame.left - 5, zero + 4, "0", side="end", size=SMALL, fill=MUTED)
    _draw_models(drawing, [(x.at(m.size_bytes / unit.size), height(m.worth), m) for m in models], unit, sign=1)
    text = f" Text: {result.data.name}, {result.data.tokens:,} tokens." if result.data else ""
    return drawing.chart(
        f"Small and low is good. The dotted line joins the models that no other beats in both; {base}, unquantized, is "
        f"the reference with a divergence of zero.{_speed_note(models)}{text}"
    )


def _pareto_score(anchor: str, result: Result, models: Sequence[_Model]) -> Chart:
    base = result.rows[0].label
    unit = disk_unit(model.size_bytes for model in models)
    drawing = Drawing(
        anchor,
        f"Task scores, size and speed of {base}",
        "; ".join(f"{model.told(unit)}, mean score {model.worth:.2f} %" for model in models),
        height=_height(models),
    )
    frame = plot_frame(28, drawing.height - 70)
    y = linear_scale([model.worth for model in models], frame.bottom, frame.top, from_zero=False)
    x = linear_scale([model.size_bytes / unit.size for model in models], frame.left, frame.right - 6)
    tasks = list(dict.fromkeys(TASKS[score.task] for score in result.tasks.scores)) if result.tasks else []
    name = tasks[0] if len(tasks) == 1 else f"mean score of {len(tasks)} tasks"
    draw_axes(drawing, frame, x, y, x_title=f"weights on disk ({unit.name})", y_title=f"{name} (%), higher is better")
    _draw_models(drawing, [(x.at(m.size_bytes / unit.size), y.at(m.worth), m) for m in models], unit, sign=-1)
    return drawing.chart(
        f"Small and high is good; the scores are of {', '.join(tasks)}; the axis does not begin at zero. The "
        f"dotted line joins the models that no other beats in both.{_speed_note(models)}"
    )


def _height(models: Sequence[_Model]) -> float:
    return 320 + 14 * max(0, min(len(models), _CROWD) - _ROOMY)


def _speed_note(models: Sequence[_Model]) -> str:
    if len(models) > _CROWD:
        return " Only the models on that line are named; the table has all."
    if all(model.tokens_per_second is None for model in models) or len(models) > _ROOMY:
        return ""
    return " Below each name: tokens decoded per second, one sequence at a time."


def _draw_models(
    drawing: Drawing, points: Sequence[tuple[float, float, _Model]], unit: ByteUnit, *, sign: float
) -> None:
    """Marks, their labels and the front; ``sign`` is 1 where a smaller worth is better and -1 where a larger is."""
    best = front([(model.size_bytes, sign * model.worth) for _, _, model in points])
    corners = sorted((x, y) for x, y, model in points if (model.size_bytes, sign * model.worth) in best)
    if len(corners) > 1:
        drawing.line(corners, stroke=MUTED, width=1.5, dash=_DOTTED)
    room = Box(LEFT + 2, 24, WIDTH - LEFT - 10, drawing.height - 24 - 44)
    named = [point for point in points if len(points) <= _CROWD or (point[0], point[1]) in corners]
    # Where many models crowd, their speeds are left to the tooltips.
    names = [(clipped(model.name, 170), model.note if len(points) <= _ROOMY else "") for _, _, model in named]
    sizes = [(_BOLD * max(text_width(name), text_width(note, SMALL)), 27.0 if note else 14.0) for name, note in names]
    marks = [(x, y) for x, y, _ in named]
    others = [(x, y) for x, y, _ in points if (x, y) not in marks]
    boxes = place_labels(marks, sizes, room, radius=8, others=others, avoided=_along(corners))
    for mark, box in zip(marks, boxes, strict=True):
        if box.gap(mark) > 11:
            drawing.line([mark, box.nearest(mark)], stroke=MUTED, width=0.8)
    for x, y, model in points:
        tip = f"{model.told(unit)}, {number_text(model.worth)}"
        drawing.marker(x, y, model.look.shape, colour=model.look.colour, radius=6, tip=tip)
    for (x, _, model), (name, note), box in zip(named, names, boxes, strict=True):
        # Widths are estimates: letters begin, or end, at the side of their mark.
        side: Side = "end" if box.right < x else "start"
        edge = box.right - 2 if side == "end" else box.left + 2
        full = model.label if name != model.label else None
        drawing.text(edge, box.top + 11, name, side=side, bold=True, halo=True, tip=full)
        if note:
            drawing.text(edge, box.top + 24, note, side=side, size=SMALL, fill=MUTED, halo=True)


def _along(corners: Sequence[tuple[float, float]], step: float = 5) -> list[tuple[float, float]]:
    """Places on a line through corners, about ``step`` units apart."""
    found = []
    for (x, y), (right, down) in pairwise(corners):
        count = max(1, int(math.dist((x, y), (right, down)) / step))
        found += [(x + (right - x) * part / count, y + (down - y) * part / count) for part in range(1, count)]
    return found


def task_charts(results: Sequence[Result]) -> list[Chart]:
    """Differences of task scores to the baseline with their 95 % intervals, a line per task and candidate."""
    return [
        _task_chart(f"tasks-{number}", result, result.tasks.comparisons)
        for number, result in enumerate(results, 1)
        if result.tasks and result.tasks.comparisons
    ]


def _task_chart(anchor: str, result: Result, found: Sequence[TaskComparison]) -> Chart:
    base = result.rows[0].label
    tasks = list(dict.fromkeys(one.task for one in found))
    drawing = Drawing(
        anchor,
        f"Task scores against {base}",
        "; ".join(
            f"{TASKS[one.task]}, {one.label}: {signed_text(100 * one.difference)} points, 95 % interval "
            f"{signed_text(100 * one.ci95_low)} to {signed_text(100 * one.ci95_high)}"
            for one in found
        ),
        height=34 + 24 * len(tasks) + 32 * len(found) + 42,
    )
    ends = [100 * end for one in found for end in (one.ci95_low, one.ci95_high)]
    x = linear_scale(ends, 18, WIDTH - _FIGURES)
    bottom = drawing.height - 42
    for value in x.ticks(4):
        zero = abs(value) < 1e-9
        drawing.line([(x.at(value), 24), (x.at(value), bottom)], stroke=INK if zero else LINE)
        shown = "0" if zero else number_text(value)
        drawing.text(x.at(value), bottom + 16, shown, side="middle", size=SMALL, fill=MUTED)
    title = f"points more (right) or less (left) than {base}"
    drawing.text(2, bottom + 33, clipped(title, WIDTH - 4, SMALL), size=SMALL, fill=MUTED)
    drawing.text(x.end + 8, 14, "difference, 95 %", size=SMALL, fill=MUTED)
    y = 28.0
    for task in tasks:
        drawing.text(2, y + 12, TASKS[task], bold=True, halo=True)
        y += 24
        for one in found:
            if one.task == task:
                _draw_comparison(drawing, result, one, x, y)
                y += 32
    return drawing.chart(
        "Difference in percentage points on the same items, with its 95 % interval. A hollow mark: the interval holds "
        "zero, so chance alone may explain the difference."
    )


def _draw_comparison(drawing: Drawing, result: Result, one: TaskComparison, x: Scale, y: float) -> None:
    """A candidate's name, its interval below, both as numbers beside."""
    labels = [row.label for row in result.rows]
    look, name = look_of(labels, one.label), short_names(labels).get(one.label, one.label)
    low, middle, high = (100 * value for value in (one.ci95_low, one.difference, one.ci95_high))
    tip = (
        f"{one.label} on {one.items:,} items of {TASKS[one.task]}: lost {one.only_baseline_items}, won "
        f"{one.only_candidate_items}, McNemar p = {number_text(one.mcnemar_p)}"
    )
    drawing.text(8, y + 8, clipped(name, x.end - 10, SMALL), size=SMALL, halo=True, tip=tip)
    drawing.line([(x.at(low), y + 17), (x.at(high), y + 17)], stroke=look.colour, width=2.2)
    drawing.marker(x.at(middle), y + 17, look.shape, colour=look.colour, hollow=low <= 0 <= high, tip=tip)
    drawing.text(x.end + 8, y + 15, signed_text(middle), size=SMALL, bold=low > 0 or high < 0)
    drawing.text(WIDTH, y + 15, f"[{signed_text(low)}, {signed_text(high)}]", side="end", size=SMALL, fill=MUTED)
