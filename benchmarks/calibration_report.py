"""The record of bench_calibration.py as Markdown and as two pictures; nothing is measured here."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qquant
from qquant.charts.plot import SMALL, Curve, Frame, Place, draw_axes, draw_curves, names_width
from qquant.charts.scales import doubling_scale, linear_scale
from qquant.charts.svg import INK, MUTED, PANEL, STEPS, WIDTH, Drawing, look_of
from qquant.records import table

MIXTURE, SAMPLES = "mixture.svg", "samples.svg"
_ROW = 22.0
_LEFT = 122.0
_WIDTH = 408.0
"""Of the heat map, user units: its columns are as wide as their names."""
_RANGE = (0.9, 1.9)
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


def write_report(content: dict[str, Any], folder: Path) -> None:
    """Write calibration.md and the pictures beside the record that they are made of."""
    runs = [Run(**run) for run in content["runs"]]
    (folder / MIXTURE).write_text(_standing_alone(mixture_picture(runs)), encoding="utf-8")
    (folder / SAMPLES).write_text(_standing_alone(samples_picture(runs)), encoding="utf-8")
    (folder / "calibration.md").write_text(_markdown(content, runs), encoding="utf-8")


def mean_kl(runs: list[Run], group: str, name: str) -> dict[str, float]:
    """Mean over the seeds, by domain, nats."""
    found = [run.kl_mean_nats for run in runs if (run.group, run.name) == (group, name)]
    return {domain: statistics.fmean(one[domain] for one in found) for domain in found[0]}


def names(runs: list[Run], group: str) -> list[str]:
    """Names of a group's runs, each once, in their order."""
    return list(dict.fromkeys(run.name for run in runs if run.group == group))


def _markdown(content: dict[str, Any], runs: list[Run]) -> str:
    base = mean_kl(runs, "mixture", "all four")
    domains = list(base)
    seeds = [run for run in runs if (run.group, run.name) == ("mixture", "all four")]
    noise = {domain: statistics.stdev(run.kl_mean_nats[domain] for run in seeds) for domain in domains}
    estimated = ", ".join(f"{domain} {share:.1%}" for domain, share in content["overlap_share"].items())
    exact = ", ".join(f"{source} {share:.2%}" for source, share in content["shared_runs_share"].items())

    def rows(group: str, first: str | None = None) -> str:
        cells = []
        for name in ([first] if first else []) + names(runs, group):
            own = "mixture" if name == first else group
            name = "all four" if name == first else name
            kl = mean_kl(runs, own, name)
            of = [run for run in runs if (run.group, run.name) == (own, name)]
            label = first if name == "all four" and first else name
            figures = [f"{1e3 * kl[domain]:.2f}" for domain in domains]
            ratio = statistics.fmean(kl[domain] / base[domain] for domain in domains)
            cells.append([label, str(of[0].tokens), str(len(of)), *figures, f"{ratio:.3f}"])
        cells.sort(key=lambda row: int(row[1]))  # stable: rows of one size stay in their order
        return table(["calibrated on", "tokens", "draws", *domains, "mean ratio"], cells)

    facts = {
        "command": f"`{content['command']}`", "created": content["created"], "commit": content["git_commit"],
        "CPU seconds": content["cpu_seconds"],
        "processor": content["environment"]["device"], "torch": content["environment"]["torch"]
    }  # fmt: skip
    return (
        "\n\n".join(
            [
                "# What calibration data does to KL",
                f"Mean KL to the original x 1e-3 of `{content['model']}`, Int4, group 128, method `gptq`, computed in "
                f"float32, on {content['evaluated_tokens_per_domain']} held-out tokens per domain. Mean ratio: to the "
                "equal mixture of all four, averaged over the domains. Where several draws were made, their mean is "
                "shown; the standard deviation of one draw of the equal mixture is "
                + ", ".join(f"{1e3 * noise[domain]:.2f} ({domain})" for domain in domains)
                + ". Differences of that size are chance.",
                "## Mixture, 128 x 256 tokens",
                rows("mixture"),
                f"![KL by mixture]({MIXTURE})",
                "## Number of samples",
                rows("samples", "128 x 256"),
                f"![KL by number of samples]({SAMPLES})",
                "## Length of samples, 32,768 tokens in all",
                rows("length", "128 x 256"),
                "## Choice of samples, 128 x 256 tokens",
                rows("selection", "random"),
                "## Sources full of copies, 32 x 256 tokens",
                "Three quarters of every source are copies of one of its pages.",
                rows("copies"),
                "## How it was run",
                f"Of the runs of 16 tokens in the held-out text, 512 calibration samples had: {estimated} (estimated, "
                f"as by an evaluation). All of a source's calibration text has, counted: {exact}.",
                table(("what", "value"), [(name, str(value)) for name, value in facts.items() if value]),
            ]
        )
        + "\n"
    )


def mixture_picture(runs: list[Run]) -> Drawing:
    """A heat map: calibrated on what, evaluated on what, KL by that of the equal mixture."""
    base = mean_kl(runs, "mixture", "all four")
    lines = [name for name in names(runs, "mixture") if name != "all four"]
    ratios = {
        name: {domain: kl / base[domain] for domain, kl in mean_kl(runs, "mixture", name).items()} for name in lines
    }
    drawing = Drawing(
        "mixture",
        "KL by calibration mixture, by that of the equal mixture",
        "; ".join(f"{name}: " + ", ".join(f"{d} {r:.2f}" for d, r in row.items()) for name, row in ratios.items()),
        height=46 + _ROW * len(lines) + 28,
        width=_WIDTH,
    )
    wide = (_WIDTH - _LEFT - 2) / len(base)
    drawing.text(2, 14, "KL on held-out text, equal mixture = 1", bold=True)
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


def samples_picture(runs: list[Run]) -> Drawing:
    """Curves: KL by the number of calibration tokens, one per domain."""
    points = {run.tokens: run.kl_mean_nats for run in runs if run.group == "samples"}
    base = mean_kl(runs, "mixture", "all four")
    points[next(run.tokens for run in runs if run.name == "all four")] = base
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
        "KL by the number of calibration tokens",
        "; ".join(f"{curve.name}: " + ", ".join(place.tip for place in curve.places) for curve in curves),
        height=260,
    )
    frame = Frame(48, 28, WIDTH - names_width(curves) - 4, 214)
    x = doubling_scale([float(n) for n in tokens], frame.left, frame.right)
    y = linear_scale([place.y for curve in curves for place in curve.places], frame.bottom, frame.top)
    draw_axes(
        drawing, frame, x, y, x_title="calibration tokens, equal mixture", y_title="KL x 1e-3, lower is better",
        x_ticks=[float(n) for n in tokens],
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
