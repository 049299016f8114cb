"""The rows of bench_quality.py as Markdown: one table for each model and setting."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from benchmarks.quality_contestants import PEERS, SIDES

BASES = ("ours fast", "ours gptq,act_group_aware=false,clip_search=off", "gptqmodel plain")
"""Plain GPTQ: the first of these that is there is what ratios are taken against, in the row's dtype."""
HEAD = (
    "| method | KL x 1e-3 | to plain GPTQ | perplexity | gap | top-1 agreement | CPU s | to plain GPTQ |\n"
    "|---|---|---|---|---|---|---|---|"
)


def _setting(row: dict[str, Any]) -> tuple[str, int, int, str]:
    return row["model"], row["bits"], row["group_size"], row["skip"] or ""


def _rank(row: dict[str, Any]) -> tuple[int, int, str]:
    """Sides in the order of SIDES, a peer's settings in that of PEERS."""
    names = [peer.name for peer in PEERS]
    place = names.index(row["contestant"]) if row["contestant"] in names else -1
    return SIDES.index(row["side"]), place, ""


def _line(row: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> str:
    if "error" in row:
        return f"| {row['contestant']} | - | | | | | | |"
    relative = share = ""
    base = next((by_name[name] for name in BASES if name in by_name), None)
    if row["computed_in"] == "stored":  # time depends on the dtype
        base = by_name.get(f"{BASES[0]} (dtype stored)", base)
    if base is not None:
        relative = f"{row['mean_kl_nats'] / base['mean_kl_nats']:.2f}"
        share = f"{row['work_cpu_seconds'] / base['work_cpu_seconds']:.1f}" if base["side"] == "ours" else ""
    return (
        f"| {row['contestant']} | {row['mean_kl_nats'] * 1e3:.3f} | {relative} | {row['perplexity']:.3f} "
        f"| {row['perplexity'] - row['perplexity_of_original']:+.3f} ± {row['perplexity_gap_error']:.3f} "
        f"| {row['agreement']:.4f} "
        f"| {row['work_cpu_seconds']:.1f} | {share} |"
    )


def _table(rows: list[dict[str, Any]]) -> str:
    """One setting's table: lines in the contestants' order, and below what failed or differs."""
    model, bits, group_size, skip = _setting(rows[0])
    judged = [row for row in rows if "error" not in row]
    group = "whole rows" if group_size == -1 else f"groups of {group_size}"
    alone = f", all but `{skip}`" if skip else ""
    lines = [f"### {model}, {bits} bits, {group}{alone}", ""]
    if judged:
        counts = rows[-1]["window_counts"]
        lines += [
            f"Perplexity of the original {judged[0]['perplexity_of_original']:.3f}; {counts[0]} windows of {counts[2]} "
            f"tokens to calibrate, {counts[1]} held out; ± one standard error.",
            "",
        ]
    by_name = {row["contestant"]: row for row in judged}
    lines += [HEAD, *(_line(row, by_name) for row in rows)]
    if peers := [row for row in judged if row["side"] != "ours"]:
        best = min(peers, key=lambda row: row["mean_kl_nats"])
        lines += ["", f"Lowest of the peers: {best['contestant']}, {best['mean_kl_nats'] * 1e3:.3f}."]
    lines += ["", *(f"- {row['contestant']} failed: {row['error']}" for row in rows if "error" in row)]
    linears = {row["linears"] for row in judged}
    if len(linears) > 1:
        usual = max(linears)
        odd = [f"{row['contestant']} ({row['linears']:.0f})" for row in judged if row["linears"] != usual]
        lines.append(f"- {usual:.0f} linears are quantized, but by {', '.join(odd)}")
    return "\n".join(lines).rstrip() + "\n"


def tables(rows: list[dict[str, Any]]) -> str:
    """All tables, by model, bits and group size."""
    ordered = sorted(rows, key=lambda row: (_setting(row), _rank(row)))
    return "\n".join(_table(list(group)) for _, group in groupby(ordered, key=_setting))
