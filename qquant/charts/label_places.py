"""Where labels go, so that none lies on another, on a mark or outside the chart.

Pure geometry; nothing is drawn here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_AWAY = (0.0, 10.0, 22.0, 36.0, 52.0, 70.0)
"""How far beyond its nearest place a label may be moved, user units."""
_CROSSING = 40.0
"""What a place on a line costs, in units of moving away."""
_WRONG = 120.0
"""The same of a label that is nearer to another mark than to its own."""
_DIRECTIONS = ((1, 0), (-1, 0), (1, -1), (1, 1), (-1, -1), (-1, 1), (0, -1), (0, 1))


@dataclass(frozen=True)
class Box:
    """A rectangle, user units."""

    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """Largest x."""
        return self.left + self.width

    @property
    def bottom(self) -> float:
        """Largest y."""
        return self.top + self.height

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, across) * max(0.0, down)

    def nearest(self, point: tuple[float, float]) -> tuple[float, float]:
        """The place of the rectangle that is nearest to a point."""
        return max(self.left, min(point[0], self.right)), max(self.top, min(point[1], self.bottom))

    def gap(self, point: tuple[float, float]) -> float:
        """How far a point is from the rectangle; 0 inside."""
        return math.dist(point, self.nearest(point))


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places on a line apart until ``gap`` lies between any two, each as little as its neighbours allow.

    Args:
        wanted: where each label would like to be, in any order.
        gap: least distance; made smaller where not all fit between ``low`` and ``high``.
        low: least place.
        high: largest place.

    Returns:
        A place for each label, in the order they were given.
    """
    if not wanted:
        return []
    if len(wanted) > 1:
        gap = min(gap, (high - low) / (len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    # Neighbours that are too close become one run, which stands where its members are moved least on average.
    runs: list[list[int]] = []
    for number in order:
        runs.append([number])
        while len(runs) > 1 and _first(runs[-1], wanted, gap, low, high) < (
            _first(runs[-2], wanted, gap, low, high) + len(runs[-2]) * gap
        ):
            last = runs.pop()
            runs[-1] += last
    places = [0.0] * len(wanted)
    for run in runs:
        start = _first(run, wanted, gap, low, high)
        for position, number in enumerate(run):
            places[number] = start + position * gap
    return places


def _first(run: Sequence[int], wanted: Sequence[float], gap: float, low: float, high: float) -> float:
    """Where the first label of a run stands."""
    start = sum(wanted[number] - position * gap for position, number in enumerate(run)) / len(run)
    return max(low, min(start, high - (len(run) - 1) * gap))


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    inside: Box,
    *,
    radius: float = 7,
    others: Sequence[tuple[float, float]] = (),
    avoided: Sequence[tuple[float, float]] = (),
) -> list[Box]:
    """Give every point's label a box beside it.

    Args:
        points: [x, y] of every mark, user units.
        sizes: [width, height] of every mark's label.
        inside: where labels may be.
        radius: of the marks, with the room around them.
        others: [x, y] of marks without a label.
        avoided: [x, y] on lines, which a label may cover, but rather not.

    Returns:
        A box per label: free of marks and of other labels, as near as possible; where all places are taken, the one
        with the least overlap.
    """
    marks = [Box(x - radius, y - radius, 2 * radius, 2 * radius) for x, y in (*points, *others)]
    placed: list[Box] = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        best, least = None, math.inf
        for away in _AWAY:
            for rank, (right, down) in enumerate(_DIRECTIONS):
                distance = radius + away
                left = x + distance if right > 0 else x - distance - width if right < 0 else x - width / 2
                if not right:
                    left = max(inside.left, min(left, inside.right - width))
                # Beside a mark the label is centred on it; at its corners it lies wholly above or below.
                lift = 0.0 if right and not down else (radius * 0.4 if right else distance) + away
                top = y - height / 2 if not down else y + lift if down > 0 else y - lift - height
                box = Box(left, top, width, height)
                outside = width * height - box.overlap(inside)
                taken = sum(box.overlap(other) for other in (*placed, *marks))
                crossed = sum(box.gap(place) == 0 for place in avoided)
                # A label that is nearer to another mark than to its own says the wrong thing.
                wrong = any(box.gap(place) < box.gap((x, y)) for place in (*points, *others))
                cost = 100 * outside + 10 * taken + _CROSSING * crossed + _WRONG * wrong + away + rank * 0.1
                if cost < least:
                    best, least = box, cost
        assert best is not None
        placed.append(best)
    return placed
