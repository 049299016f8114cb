"""The records of bench_calibration.py as Markdown and as two pictures; nothing is measured here."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import qquant
from qquant.charts.plot import SMALL, Curve, Frame, Place, draw_axes, draw_curves, names_width
from qquant.charts.scales import doubling_scale, linear_scale
from qquant.charts.svg import INK, MUTED, PANEL, STEPS, WIDTH, Drawing, look_of
from qquant.records import table

MIXTURE, SAMPLES = "mixture.svg", "samples.svg"
CHATS = "chats"
"""Name of the fifth text: held-out mathematics as questions and answers in the chat template."""
_SECTIONS = {
    "mixture": ("Mixture, 128 x 256 tokens", "", None),
    "template": (
        "Chat template, 128 x 256 tokens",
        "The same questions and answers as plain text and through a ChatML template, alone and as mathematics of the "
        "equal mixture, and the whole mixture with each sample as a user's message. `chats` are held-out questions and "
        "answers through the template. The model is untuned: it never saw a chat, and the marks that part turns stand "
        "nowhere in its training text. So this shows what calibrating on such tokens does, not a chat model's gain.",
        "all four, no template",
    ),
    "samples": ("Number of samples", "", "128 x 256"),
    "length": ("Length of samples, 32,768 tokens in all", "", "128 x 256"),
    "selection": ("Choice of samples, 128 x 256 tokens", "", "random"),
    "copies": (
        "Sources full of copies, 32 x 256 tokens",
        "Three quarters of every source are copies of one of its pages.",
        None,
    ),
}
"""Group of runs -> title, words above, and what the equal mixture is called if it stands in the group's table."""
_ROW = 22.0
_LEFT = 122.0
_WIDTH = 408.0
"""Of the heat map, user units: its columns are as wide as their names."""
_RANGE = (0.8, 3.2)
"""Ratios at the two ends of the colours."""


@dataclass(frozen=True)
class Run:
    """One quantization and what it cost on each domain."""

    group: str
    name: str
    samples: int
    tokens: int
    seed: int
    kl_mean_nats: dict[str, float]
    cpu_seconds: float


class Record:
    """All runs of one method."""

    def __init__(self, content: dict[str, Any]) -> None:
        """Take a record as it was read."""
        self.content = content
        self.method: str = content["method"]
        self.runs = [Run(**run) for run in content["runs"]]

    @cached_property
    def base(self) -> dict[str, float]:
        """KL of the equal mixture, nats, on each domain."""
        return self.on_domains("mixture", "all four")

    def named(self, group: str, name: str) -> list[Run]:
        """All draws."""
        return [run for run in self.runs if (run.group, run.name) == (group, name)]

    def mean_kl(self, group: str, name: str) -> dict[str, float]:
        """Mean over the draws, by text, nats."""
        found = [run.kl_mean_nats for run in self.named(group, name)]
        return {text: statistics.fmean(one[text] for one in found) for text in found[0]}

    def on_domains(self, group: str, name: str) -> dict[str, float]:
        """The same, on the four domains alone."""
        return {text: kl for text, kl in self.mean_kl(group, name).items() if text != CHATS}

    def names(self, group: str) -> list[str]:
        """Names of a group's runs, each once, in their order."""
        return list(dict.fromkeys(run.name for run in self.runs if run.group == group))

    def chance(self) -> str:
        """How far draws of the equal mixture lie apart, in words."""
        draws = [run.kl_mean_nats for run in self.named("mixture", "all four")]
        if len(draws) < 2:
            return f"`{self.method}`: not known"
        spread = {text: statistics.stdev(one[text] for one in draws) for text in draws[0]}
        return f"`{self.method}`: " + ", ".join(f"{1e3 * one:.2f} ({text})" for text, one in spread.items())

    def table(self, group: str, equal: str | None) -> str:
        """A row per name of a group; ``equal``: what the equal mixture is called if it has one too."""
        cells = []
        for label in ([equal] if equal else []) + self.names(group):
            own = ("mixture", "all four") if label == equal else (group, label)
            kl, of = self.mean_kl(*own), self.named(*own)
            ratio = statistics.fmean(kl[domain] / self.base[domain] for domain in self.base)
            figures = [f"{1e3 * kl[domain]:.2f}" for domain in self.base]
            cells.append([label, str(of[0].tokens), str(len(of)), *figures, f"{ratio:.3f}", f"{1e3 * kl[CHATS]:.2f}"])
        cells.sort(key=lambda row: int(row[1]))  # stable: rows of one size stay in their order
        return table(["calibrated on", "tokens", "draws", *self.base, "mean ratio", CHATS], cells)


def write_report(contents: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write calibration.md and the pictures beside the records that they are made of.

    Args:
        contents: a record per method, the one that pictures show first.
        folder: of the records.
    """
    records = [Record(content) for content in contents]
    pictures = {MIXTURE: mixture_picture(records[0])}
    counted = [record for record in records if record.names("samples")]
    if counted:
        pictures[SAMPLES] = samples_picture(counted[0])
    for name, drawing in pictures.items():
        (folder / name).write_text(_standing_alone(drawing), encoding="utf-8")
    (folder / "calibration.md").write_text(_markdown(records, list(pictures)), encoding="utf-8")


def _markdown(records: Sequence[Record], pictures: Sequence[str]) -> str:
    content = records[0].content
    estimated = ", ".join(f"{text} {share:.1%}" for text, share in content["overlap_share"].items())
    exact = ", ".join(f"{source} {share:.2%}" for source, share in content["shared_runs_share"].items())
    parts = [
        "# What calibration data does to KL",
        f"Mean KL to the original x 1e-3 of `{content['model']}`, Int4, group 128, computed in float32, on "
        f"{content['evaluated_tokens_per_text']} held-out tokens of each text. Mean ratio: to the equal mixture of all "
        "four by the same method, averaged over the four domains. Where several draws were made, their mean is shown. "
        "Standard deviation of one draw of the equal mixture, by "
        + "; by ".join(record.chance() for record in records)
        + ". Differences of that size are chance.",
    ]
    for group, (title, words, equal) in _SECTIONS.items():
        measured = [record for record in records if record.names(group)]
        if measured:
            parts += [f"## {title}", *filter(None, [words])]
        for record in measured:
            parts += [f"Method `{record.method}`:", record.table(group, equal)]
        picture = {"mixture": MIXTURE, "samples": SAMPLES}.get(group)
        if picture in pictures:
            parts.append(f"![KL by {group}]({picture})")
    parts += [
        "## How it was run",
        f"Of the runs of 16 tokens in the held-out text, 512 calibration samples had: {estimated} (estimated, as by an "
        f"evaluation). All of a source's calibration text has, counted: {exact}.",
        *(_origin(record.content) for record in records),
    ]
    return "\n\n".join(parts) + "\n"


def _origin(content: dict[str, Any]) -> str:
    facts = {
        "method": content["method"], "command": f"`{content['command']}`", "created": content["created"],
        "commit": content["git_commit"], "CPU seconds": content["cpu_seconds"],
        "processor": content["environment"]["device"], "torch": content["environment"]["torch"]
    }  # fmt: skip
    return table(("what", "value"), [(name, str(value)) for name, value in facts.items() if value])


def mixture_picture(record: Record) -> Drawing:
    """A heat map: calibrated on what, evaluated on what, KL by that of the equal mixture."""
    base = record.base
    lines = [name for name in record.names("mixture") if name != "all four"]
    ratios = {
        name: {domain: kl / base[domain] for domain, kl in record.on_domains("mixture", name).items()} for name in lines
    }
    drawing = Drawing(
        "mixture",
        f"KL by calibration mixture, by that of the equal mixture, method {record.method}",
        "; ".join(f"{name}: " + ", ".join(f"{d} {r:.2f}" for d, r in row.items()) for name, row in ratios.items()),
        height=46 + _ROW * len(lines) + 28,
        width=_WIDTH,
    )
    wide = (_WIDTH - _LEFT - 2) / len(base)
    drawing.text(2, 14, f"KL on held-out text, equal mixture = 1, method {record.method}", bold=True)
    for column, domain in enumerate(base):
        drawing.text(_LEFT + (column + 0.5) * wide, 38, domain, side="middle", size=SMALL, fill=MUTED)
    top = 46.0
    for number, name in enumerate(lines):
        y = top + number * _ROW
        drawing.text(_LEFT - 6, y + 15, name, side="end", size=SMALL)
        for column, (domain, ratio) in enumerate(ratios[name].items()):
            step = _step(ratio)
            tip = f"calibrated on {name}, evaluated on {domain}: {ratio:.2f}"
            drawing.rect(_LEFT + column * wide, y, wide - 1, _ROW - 1, fill=STEPS[step], tip=tip)
            fill = PANEL if step > len(STEPS) // 2 else INK
            drawing.text(_LEFT + (column + 0.5) * wide, y + 15, f"{ratio:.2f}", side="middle", size=SMALL, fill=fill)
    end = top + _ROW * len(lines)
    drawing.text(_LEFT + 2 * wide, end + 18, "evaluated on", side="middle", size=SMALL, fill=MUTED)
    drawing.text(2, end + 18, "calibrated on", size=SMALL, fill=MUTED)
    return drawing


def _step(ratio: float) -> int:
    low, high = _RANGE
    return max(0, min(len(STEPS) - 1, int(len(STEPS) * (ratio - low) / (high - low))))


def samples_picture(record: Record) -> Drawing:
    """Curves: KL by the number of calibration tokens, one per domain."""
    base = record.base
    points = {run.tokens: run.kl_mean_nats for run in record.runs if run.group == "samples"}
    points[record.named("mixture", "all four")[0].tokens] = base
    tokens = sorted(points)
    curves = [
        Curve(
            domain,
            look_of(list(base), domain),
            tuple(
                Place(n, 1e3 * points[n][domain], f"{domain}, {n} tokens: {1e3 * points[n][domain]:.2f}")
                for n in tokens
            ),
        )
        for domain in base
    ]
    drawing = Drawing(
        "samples",
        f"KL by the number of calibration tokens, method {record.method}",
        "; ".join(f"{curve.name}: " + ", ".join(place.tip for place in curve.places) for curve in curves),
        height=260,
    )
    frame = Frame(48, 28, WIDTH - names_width(curves) - 4, 214)
    x = doubling_scale([float(n) for n in tokens], frame.left, frame.right)
    y = linear_scale([place.y for curve in curves for place in curve.places], frame.bottom, frame.top)
    draw_axes(
        drawing, frame, x, y, x_title=f"calibration tokens, equal mixture, method {record.method}",
        y_title="KL x 1e-3, lower is better", x_ticks=[float(n) for n in tokens],
    )  # fmt: skip
    draw_curves(drawing, frame, x, y, curves)
    return drawing


def _standing_alone(drawing: Drawing) -> str:
    """The drawing as a file: with the colours of qquant's page, which a drawing knows by name only, and its paper."""
    page = (Path(qquant.__file__).parent / "page" / "report_page.html").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--(\w+): (#\w+);", page[: page.index("@media")]))
    svg = drawing.svg().replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" ', 1)
    svg = svg.replace(
        "</desc>", f'</desc><rect width="{drawing.width:g}" height="{drawing.height:g}" fill="var(--panel)"/>', 1
    )
    return re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], svg) + "\n"
