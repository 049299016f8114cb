"""What plans say, joined: what fits a card, what quantizing takes, over how many devices a model can be cut.

How it is predicted is plan_report.py's to say; nothing here knows HTML.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qquant.charts.scales import number_text
from qquant.page.joined import Fact, Verdict
from qquant.page.tables import NOT_KNOWN, PRECISIONS, Table, make_table, size_text, unit_of
from qquant.plan_report import Plan, PlanLimit, PlanQuantizing, PlanTensorParallel
from qquant.results import Result

_GIB = 2**30


def tables(results: Sequence[Result]) -> list[Table]:
    """What fits by plan; what plans of one model say alike, whatever their card, once."""
    return list(_plans(results))


def verdicts(results: Sequence[Result]) -> tuple[Verdict, ...]:
    """Per plan for a card: what fits in each precision, with the KV cache that was asked for first."""
    found = []
    for plan in (result.plan for result in results if result.plan):
        if plan.device_bytes is not None and plan.limits:
            first = {limit.precision: limit for limit in reversed(plan.limits)}
            facts = [_fitting(limit) for limit in plan.limits if first[limit.precision] is limit]
            card = f"a card of {number_text(plan.device_bytes / _GIB)} GiB"
            caches = ", ".join(dict.fromkeys(limit.kv_cache for limit in first.values()))
            found.append(Verdict(plan.model, f"predicted, {plan.runtime}, KV {caches}", card, tuple(facts)))
    return tuple(found)


def _fitting(limit: PlanLimit) -> Fact:
    if not limit.largest_tokens:
        return Fact(PRECISIONS[limit.precision], "does not fit")
    batch = f"batch to {limit.largest_batch:,}" if limit.largest_batch else "not the longest text"
    context = "its whole context" if limit.beyond_model else f"context to {limit.largest_tokens:,}"
    return Fact(PRECISIONS[limit.precision], "fits", f"{batch}, {context}")


def _plans(results: Sequence[Result]) -> Iterator[Table]:
    quantizing: dict[tuple[str, tuple[PlanQuantizing, ...]], list[int]] = {}
    parallel: dict[tuple[str, int, tuple[PlanTensorParallel, ...]], list[int]] = {}
    for place, result in enumerate(results, 1):
        plan = result.plan
        if plan is None:
            continue
        yield from _limits(place, plan)
        quantizing.setdefault((plan.model, plan.quantizing), []).append(place)
        parallel.setdefault((plan.model, plan.group_size, plan.tensor_parallel), []).append(place)
    for (model, needed), places in quantizing.items():
        yield from _quantizing(model, needed, places)
    for (model, group_size, cuts), places in parallel.items():
        yield from _tensor_parallel(model, group_size, cuts, places)


def _quantizing(model: str, needed: Sequence[PlanQuantizing], places: Sequence[int]) -> Iterator[Table]:
    if needed:
        sizes = [(found.device_bytes, found.ram_bytes, found.disk_bytes) for found in needed]
        unit, scale = unit_of([float(size) for found in sizes for size in found])
        head = ("bits", "group size", "samples", f"device ({unit})", f"RAM ({unit})", f"disk ({unit})")
        body = [
            [
                str(found.bits), str(found.group_size), f"{found.samples} x {found.seq_len_tokens}",
                *[size_text(size, scale) for size in own],
            ]
            for found, own in zip(needed, sizes, strict=True)
        ]  # fmt: skip
        intro = f"Predicted, {_numbered(places)}. On a CPU the device's bytes come on top of RAM."
        yield make_table("plan", f"What quantizing {model} takes", head, body, labels=3, intro=intro)


def _tensor_parallel(
    model: str, group_size: int, cuts: Sequence[PlanTensorParallel], places: Sequence[int]
) -> Iterator[Table]:
    if cuts:
        devices = sorted({found.ranks for found in cuts})
        fits = {(found.precision, found.ranks): "yes" if found.fits else "no" for found in cuts}
        body = [
            [PRECISIONS[precision], *[fits.get((precision, count), NOT_KNOWN) for count in devices]]
            for precision in dict.fromkeys(found.precision for found in cuts)
        ]
        reasons: dict[str, list[str]] = {}
        for found in cuts:
            if found.reason:
                reasons.setdefault(found.reason, []).append(PRECISIONS[found.precision])
        notes = [f"Does not divide ({', '.join(precisions)}): {reason}." for reason, precisions in reasons.items()]
        head = ("precision", *[f"{count} device{'s' if count > 1 else ''}" for count in devices])
        intro = f"Whether the model can be cut for so many devices, {_numbered(places)}."
        title = f"Tensor parallelism of {model}, groups of {group_size}"
        yield make_table("plan", title, head, body, labels=1, intro=intro, notes=notes)


def _numbered(places: Sequence[int]) -> str:
    return f"result{'s' if len(places) > 1 else ''} {', '.join(map(str, places))}"


def _limits(place: int, plan: Plan) -> Iterator[Table]:
    if not plan.limits:
        return
    card = f" of {number_text(plan.device_bytes / _GIB)} GiB" if plan.device_bytes is not None else ""
    body = [
        [
            PRECISIONS[limit.precision], limit.kv_cache, f"{limit.largest_batch:,}",
            f"{limit.largest_tokens:,}", "no" if limit.beyond_model else "yes",
        ]
        for limit in plan.limits
    ]  # fmt: skip
    head = ("precision", "KV cache", "largest batch", "largest context (tokens)", "within the model's positions")
    intro = (
        f"Predicted, result {place}. The batch is at the plan's largest length, the context at its smallest batch; 0 "
        "means that not even one fits."
    )
    yield make_table("plan", f"Largest {plan.model} on a card{card}", head, body, labels=2, intro=intro)
