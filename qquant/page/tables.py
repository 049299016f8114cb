"""Tables of a joined report as data: cells that know where their number comes from, and the Markdown of a table.

Which tables there are is joined.py's and grids.py's; how they look on a page is html.py's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qquant.console import printable
from qquant.records import Precision, table

Origin = Literal["measured", "predicted", "published"]
Section = Literal["accuracy", "speed", "memory", "kv-cache", "long-context", "layers", "plan"]
"""Where a table belongs on the page and in the Markdown, in this order."""

SECTIONS: dict[Section, str] = {
    "accuracy": "Accuracy",
    "speed": "Size and speed",
    "memory": "Memory",
    "kv-cache": "KV cache",
    "long-context": "Long context",
    "layers": "Error by layer",
    "plan": "What fits",
}
PRECISIONS: dict[Precision, str] = {
    "fp32": "FP32", "bf16": "BF16", "fp16": "FP16", "int8": "Int8", "int4": "Int4", "nf4": "NF4",
    "llm-int8": "LLM.int8",
}  # fmt: skip
"""As Qwen's README and bitsandbytes name them."""
DASH = "-"
"""A cell that has no meaning here, such as the baseline compared with itself."""
NOT_KNOWN = "n/a"
"""A number that this row does not have, in a table whose other rows have it."""

# What Markdown or the HTML inside it would take for an instruction; the bar is escaped by the table itself.
_MARKDOWN = re.compile(r"([\\`*<>\[\]])")

_GIB, _MIB = 2**30, 2**20


@dataclass(frozen=True)
class Cell:
    """One cell: text as shown, and where it comes from."""

    text: str
    origin: Origin = "measured"
    unlike: bool = False
    """Taken under other conditions than the cells around it; a note says which."""


@dataclass(frozen=True)
class Table:
    """A table with everything that a reader needs to read it."""

    section: Section
    title: str
    head: tuple[str, ...]
    body: tuple[tuple[Cell, ...], ...]
    labels: int
    """Leading columns that name the row; the others hold its numbers."""
    intro: str = ""
    """One paragraph above: what was measured, on what, in which unit."""
    notes: tuple[str, ...] = ()
    """Paragraphs below: what must not be compared, and why."""

    def to_markdown(self) -> str:
        """Title, intro, table and notes; a published number is italic, text from files is made harmless."""
        head = [markdown_text(name) for name in self.head]
        body = [[_markdown_cell(cell) for cell in row] for row in self.body]
        parts = [f"### {markdown_text(self.title)}", markdown_text(self.intro), table(head, body)]
        return "\n\n".join([*(part for part in parts if part), *map(markdown_text, self.notes)])


def make_table(
    section: Section,
    title: str,
    head: Sequence[str],
    body: Sequence[Sequence[str | Cell]],
    *,
    labels: int,
    intro: str = "",
    notes: Sequence[str] = (),
) -> Table:
    """A table from plain texts, which are measured, and cells; columns in which nothing was measured are left out.

    Args:
        section: where it belongs.
        title: without Markdown.
        head: [columns].
        body: [rows][columns].
        labels: leading columns that name a row; these are never left out.
        intro: see ``Table``.
        notes: see ``Table``.
    """
    rows = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in body]
    kept = [
        column
        for column in range(len(head))
        if column < labels or any(row[column].text not in ("", DASH, NOT_KNOWN) for row in rows)
    ]
    return Table(
        section=section,
        title=title,
        head=tuple(head[column] for column in kept),
        body=tuple(tuple(row[column] for column in kept) for row in rows),
        labels=labels,
        intro=intro,
        notes=tuple(notes),
    )


def number(value: float | None, spec: str) -> str:
    """A number by a format of Python's; None is "n/a"."""
    return NOT_KNOWN if value is None else format(value, spec)


def percent(share: float | None, spec: str = ".1f") -> str:
    """A share as a percentage."""
    return number(None if share is None else 100 * share, spec)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _MARKDOWN.sub(r"\\\1", printable(text).replace("\n", " ").replace("\t", " "))


def _markdown_cell(cell: Cell) -> str:
    shown = markdown_text(cell.text)
    return f"*{shown}*" if cell.origin == "published" and shown.strip(" -") else shown


def unit_of(sizes: Sequence[float]) -> tuple[str, int]:
    """A unit and its bytes: GiB as the README counts, MiB where that would leave mostly zeros."""
    small = bool(sizes) and (max(sizes) < _GIB or min(sizes) < _GIB / 10)
    return ("MiB", _MIB) if small else ("GiB", _GIB)


def size_text(value: float | None, scale: int) -> str:
    """Bytes in that unit, as a cell shows them."""
    return number(None if value is None else value / scale, ",.2f")
