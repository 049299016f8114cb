"""Cells of measured and of planned grids in one form, and how each series of them looks in every chart.

Read from the sections ``profile`` and ``plan`` of results; nothing is measured, predicted or drawn here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qquant.charts.svg import CATEGORIES, Look, Shape
from qquant.plan_report import Plan
from qquant.profile_report import CellSpeed, Profile
from qquant.records import Footprint, KVKind, Precision

PRECISIONS: dict[Precision, str] = dict(
    zip(("bf16", "int8", "int4", "nf4", "llm-int8", "fp16", "fp32"), CATEGORIES, strict=False)
)
"""The colour of each precision, the same in every chart."""
KV_SHAPES: dict[KVKind, Shape] = {
    "bf16": "circle", "int8": "square", "int4": "triangle", "fp16": "diamond", "fp32": "wedge",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One cell of a grid, measured, predicted or both."""

    model: str
    precision: Precision
    kv_cache: KVKind
    batch: int
    prompt_tokens: int
    new_tokens: int
    measured_bytes: int | None
    predicted: Footprint | None
    speed: CellSpeed | None
    out_of_memory: bool

    @property
    def tokens(self) -> int:
        """Of prompt and answer together."""
        return self.prompt_tokens + self.new_tokens

    @property
    def peak_bytes(self) -> int | None:
        """Measured, else predicted."""
        return self.measured_bytes or (self.predicted.peak_bytes if self.predicted else None)

    @property
    def text(self) -> str:
        """Its tokens, for a reader."""
        answer = f"+{self.new_tokens:,}" if self.new_tokens else ""
        return f"{self.prompt_tokens:,}{answer} tokens"

    @property
    def place(self) -> str:
        """Which cell this is, for a reader."""
        return f"{self.precision}, KV {self.kv_cache}, batch {self.batch}, {self.text}"


def profile_cells(profile: Profile) -> list[Cell]:
    """All cells of a measured grid."""
    return [
        Cell(
            model=cell.key.label,
            precision=cell.key.precision,
            kv_cache=cell.key.kv_cache,
            batch=cell.key.batch,
            prompt_tokens=cell.key.prompt_tokens,
            new_tokens=cell.key.new_tokens,
            measured_bytes=cell.measured_peak_bytes if cell.status == "ok" else None,
            predicted=cell.predicted,
            speed=cell.speed,
            out_of_memory=cell.status == "out-of-memory",
        )
        for cell in profile.cells
    ]


def plan_cells(plan: Plan) -> list[Cell]:
    """All cells of a plan."""
    return [
        Cell(
            model=plan.model,
            precision=cell.precision,
            kv_cache=cell.kv_cache,
            batch=cell.batch,
            prompt_tokens=cell.prompt_tokens,
            new_tokens=cell.new_tokens,
            measured_bytes=None,
            predicted=cell.footprint,
            speed=None,
            out_of_memory=False,
        )
        for cell in plan.cells
    ]


def names_of(cells: Sequence[Cell]) -> str:
    """All models of some cells, for a title."""
    return ", ".join(dict.fromkeys(cell.model for cell in cells))


def families(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells that can share a chart: within one of these groups the precision tells models apart.

    A model and what was quantized from it are mostly one group; models of several sizes are several.

    Returns:
        Groups by what their charts' anchors have after the first word or two: nothing, "2", "3" and so on.
    """
    precisions: dict[str, set[Precision]] = {}
    for cell in cells:
        precisions.setdefault(cell.model, set()).add(cell.precision)
    groups: list[tuple[set[Precision], set[str]]] = []
    for model, own in precisions.items():
        for taken, members in groups:
            if not taken & own:
                taken |= own
                members.add(model)
                break
        else:
            groups.append((set(own), {model}))
    return {
        str(number) if number > 1 else "": [cell for cell in cells if cell.model in members]
        for number, (_, members) in enumerate(groups, 1)
    }


def slice_of(cells: Sequence[Cell], along: str) -> list[Cell]:
    """The cells with one batch (along "tokens") or one prompt and answer (along "batch"): where most values lie.

    Among equals, the least batch and the middle text: the longest would press all else to the ground.
    """
    groups: dict[tuple[int, ...], list[Cell]] = {}
    for cell in cells:
        fixed = (cell.tokens, cell.prompt_tokens) if along == "batch" else (cell.batch,)
        groups.setdefault(fixed, []).append(cell)
    most = max(len({getattr(cell, along) for cell in group}) for group in groups.values())
    best = sorted(fixed for fixed, group in groups.items() if len({getattr(cell, along) for cell in group}) == most)
    return groups[best[(len(best) - 1) // 2] if along == "batch" else best[0]]


def by_series(cells: Sequence[Cell]) -> dict[tuple[str, Precision, KVKind], list[Cell]]:
    """Cells by model, precision and KV cache, in the order they came."""
    found: dict[tuple[str, Precision, KVKind], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.model, cell.precision, cell.kv_cache), []).append(cell)
    return found


def series_look(key: tuple[str, Precision, KVKind]) -> Look:
    """Colour by precision, mark by KV cache."""
    return Look(PRECISIONS[key[1]], KV_SHAPES[key[2]])


def series_name(key: tuple[str, Precision, KVKind]) -> str:
    """What stands at a curve's end."""
    return f"{key[1]}, KV {key[2]}"
