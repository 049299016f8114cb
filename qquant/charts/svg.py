"""SVG written by hand: shapes, text and tooltips in one drawing, everything escaped, colours by name only.

Nothing here knows data, scales or axes. A drawing holds no script, no style sheet, no ``style`` attribute and no
reference to anything outside; its colours are custom properties that the page around it defines, so that light, dark
and print are the page's affair.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

INK, MUTED, LINE, PAPER, PANEL = "var(--ink)", "var(--muted)", "var(--line)", "var(--paper)", "var(--panel)"
GOOD, BAD = "var(--good)", "var(--bad)"
CATEGORIES = tuple(f"var(--c{number})" for number in range(1, 9))
"""Told apart without normal colour vision; never the only difference between two marks."""
STEPS = tuple(f"var(--s{number})" for number in range(9))
"""From little to much, of a heat map."""

Shape = Literal["circle", "square", "triangle", "diamond", "cross", "plus", "wedge", "hexagon"]
SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "diamond", "wedge", "hexagon", "plus", "cross")
DASHES = (None, "6 3", "2 3", "8 3 2 3")
Side = Literal["start", "middle", "end"]

WIDTH = 360.0
"""Of every drawing, in user units: on a phone of 360 px, of which a page leaves 300, text is still 10 px high."""
TEXT_SIZE = 12.5
_THIN, _BROAD = frozenset(" .,:;'|!()[]{}ijlft/-·"), frozenset("mwMW%@—…")
"""Letters that are narrower and broader than others."""
_THIN_WIDTH, _WIDTH = 0.4, 0.61
"""Width of the thin ones and of all others by their height, in a wide font."""
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Chart:
    """One picture of a page."""

    title: str
    """Plain text, not yet escaped."""
    caption: str
    """What is drawn and how to read it; plain text, not yet escaped."""
    svg: str
    """Complete ``<svg>`` element, to be put into the page as it is."""
    anchor: str
    """Unique on the page; every id within ``svg`` begins with it."""


@dataclass(frozen=True)
class Look:
    """What a series is recognised by: never its colour alone."""

    colour: str
    shape: Shape
    dash: str | None = None


def look_of(names: Sequence[str], name: str) -> Look:
    """The colour and mark of the n-th of some names, so that a name looks alike in all charts of them."""
    number = names.index(name) if name in names else len(names)
    return Look(CATEGORIES[number % len(CATEGORIES)], SHAPES[number % len(SHAPES)])


def escaped(text: str) -> str:
    """Text as it may stand in an element or an attribute; control and direction characters become U+FFFD."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", text), quote=True)


def text_width(text: str, size: float = TEXT_SIZE) -> float:
    """About how wide a text is, in the unit of ``size``."""
    return size * sum(map(_letter_width, text))


def _letter_width(letter: str) -> float:
    """By its height; sans-serif fonts differ, so this is rather too much than too little."""
    if unicodedata.east_asian_width(letter) in "WF":
        return 1.0
    return _THIN_WIDTH if letter in _THIN else 0.9 if letter in _BROAD else 0.68 if letter.isupper() else _WIDTH


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Name -> what is left of it without the first name, with which the others often begin; the first as it is."""
    first = names[0] if names else ""
    return {
        name: name.removeprefix(first).lstrip("-_ .") or name if name.startswith(first) and name != first else name
        for name in names
    }


def clipped(text: str, width: float, size: float = TEXT_SIZE) -> str:
    """The text, its middle left out where it is wider than ``width``: names tend to differ at their ends."""
    if text_width(text, size) <= width:
        return text
    # No letter is narrower than the thin ones; a text of 10,000 letters is not measured 10,000 times.
    kept = min(len(text) - 1, int(width / (_THIN_WIDTH * size)) + 1)
    while kept > 2 and text_width(text[: (kept + 1) // 2] + "…" + text[-(kept // 2) :], size) > width:
        kept -= 1
    return text[: (kept + 1) // 2] + "…" + text[-(kept // 2) :]


def coordinate(value: float) -> str:
    """A coordinate in as few letters as a tenth of a unit takes."""
    return (
        f"{value:.1f}".removesuffix(".0").replace("-0", "0") if abs(value) < 0.05 else f"{value:.1f}".removesuffix(".0")
    )


class Drawing:
    """An SVG that grows shape by shape; later shapes lie on earlier ones."""

    def __init__(self, anchor: str, title: str, description: str, *, height: float, width: float = WIDTH) -> None:
        """Begin an empty drawing.

        Args:
            anchor: prefix of every id; letters, digits and hyphens.
            title: name for those who do not see it.
            description: what it shows, for the same.
            height: user units.
            width: the same.
        """
        if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9-]*", anchor):
            raise ValueError(f"an anchor is a letter, then letters, digits and hyphens: {anchor!r}")
        self.anchor, self.title, self.description = anchor, title, description
        self.width, self.height = width, height
        self._parts: list[str] = []

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str,
        tip: str | None = None,
        opacity: float | None = None,
        stroke: str | None = None,
    ) -> None:
        """A rectangle; ``tip`` is shown where a pointer rests on it."""
        shown = {"x": x, "y": y, "width": width, "height": height}
        places = " ".join(f'{name}="{coordinate(value)}"' for name, value in shown.items())
        self._add(f'rect {places} fill="{fill}"{_paint(stroke, None, None, opacity)}', tip)

    def line(
        self, points: Sequence[tuple[float, float]], *, stroke: str, width: float = 1, dash: str | None = None
    ) -> None:
        """A line through points."""
        path = "M" + "L".join(f"{coordinate(x)} {coordinate(y)}" for x, y in points)
        self._add(f'path d="{path}" fill="none"{_paint(stroke, width, dash, None)}', None)

    def area(self, points: Sequence[tuple[float, float]], *, fill: str, opacity: float) -> None:
        """A closed polygon."""
        self._add(f'polygon points="{_corners(points)}" fill="{fill}"{_paint(None, None, None, opacity)}', None)

    def text(
        self,
        x: float,
        y: float,
        content: str,
        *,
        side: Side = "start",
        size: float = TEXT_SIZE,
        fill: str = INK,
        bold: bool = False,
        halo: bool = False,
        tip: str | None = None,
    ) -> None:
        """One line of text, ``y`` its base line; ``halo`` keeps it readable on lines."""
        weight = ' font-weight="600"' if bold else ""
        around = f' paint-order="stroke" stroke="{PANEL}" stroke-width="3" stroke-linejoin="round"' if halo else ""
        anchor = "" if side == "start" else f' text-anchor="{side}"'
        place = f'x="{coordinate(x)}" y="{coordinate(y)}" font-size="{coordinate(size)}" fill="{fill}"'
        tooltip = f"<title>{escaped(tip)}</title>" if tip else ""
        self._parts.append(f"<text {place}{anchor}{weight}{around}>{escaped(content)}{tooltip}</text>")

    def marker(
        self,
        x: float,
        y: float,
        shape: Shape,
        *,
        colour: str,
        radius: float = 4.5,
        hollow: bool = False,
        tip: str | None = None,
    ) -> None:
        """A mark of a point; all shapes look equally large."""
        fill = PANEL if hollow else colour
        paint = _paint(colour if hollow else PANEL, 1.8 if hollow else 1, None, None)
        if shape == "circle":
            self._add(
                f'circle cx="{coordinate(x)}" cy="{coordinate(y)}" r="{coordinate(radius)}" fill="{fill}"{paint}', tip
            )
        elif shape in ("cross", "plus"):
            turn = math.pi / 4 if shape == "cross" else 0.0
            ends = [_polar(x, y, radius * 1.1, turn + quarter * math.pi / 2) for quarter in range(4)]
            path = "".join(
                f"M{coordinate(a[0])} {coordinate(a[1])}L{coordinate(b[0])} {coordinate(b[1])}"
                for a, b in ((ends[0], ends[2]), (ends[1], ends[3]))
            )
            self._add(f'path d="{path}" fill="none"{_paint(colour, 2.4, None, None)}', tip)
        else:
            self._add(f'polygon points="{_corners(_shape_corners(shape, x, y, radius))}" fill="{fill}"{paint}', tip)

    def svg(self) -> str:
        """The complete element."""
        title, description = f"{self.anchor}-title", f"{self.anchor}-desc"
        return (
            f'<svg viewBox="0 0 {coordinate(self.width)} {coordinate(self.height)}" width="100%" role="img" '
            f'aria-labelledby="{title} {description}" font-size="{coordinate(TEXT_SIZE)}">'
            f'<title id="{title}">{escaped(self.title)}</title>'
            f'<desc id="{description}">{escaped(self.description)}</desc>' + "".join(self._parts) + "</svg>"
        )

    def chart(self, caption: str) -> Chart:
        """The finished chart."""
        return Chart(title=self.title, caption=caption, svg=self.svg(), anchor=self.anchor)

    def _add(self, start: str, tip: str | None) -> None:
        name = start.split(" ", 1)[0]
        self._parts.append(f"<{start}><title>{escaped(tip)}</title></{name}>" if tip else f"<{start}/>")


def _paint(stroke: str | None, width: float | None, dash: str | None, opacity: float | None) -> str:
    given = {"stroke": stroke, "stroke-width": width, "stroke-dasharray": dash, "opacity": opacity}
    return "".join(
        f' {name}="{value:g}"' if isinstance(value, float | int) else f' {name}="{value}"'
        for name, value in given.items()
        if value is not None
    )


def _corners(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{coordinate(x)},{coordinate(y)}" for x, y in points)


def _polar(x: float, y: float, radius: float, angle: float) -> tuple[float, float]:
    return x + radius * math.cos(angle), y + radius * math.sin(angle)


def _shape_corners(shape: Shape, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a regular polygon that covers about as much as a circle of this radius."""
    corners, turn, grow = {
        "square": (4, math.pi / 4, 1.25),
        "triangle": (3, -math.pi / 2, 1.45),
        "diamond": (4, 0.0, 1.35),
        "wedge": (3, math.pi / 2, 1.45),
        "hexagon": (6, 0.0, 1.12),
    }[shape]
    return [_polar(x, y, radius * grow, turn + number * 2 * math.pi / corners) for number in range(corners)]
