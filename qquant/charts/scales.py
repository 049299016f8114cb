"""Scales of charts: where a value lies, which values get a tick, and how a number is written beside it.

Pure arithmetic; nothing is drawn here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_GIB, _MIB = 2**30, 2**20
_GB, _MB = 10**9, 10**6
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_STEPS = (1.0, 2.0, 5.0)
_THOUSANDS = "kMGTP"
"""Thousand, million and so on, as written behind a number."""


@dataclass(frozen=True)
class Scale:
    """A line of values laid along a line of the drawing."""

    low: float
    """Value at ``start``."""
    high: float
    """Value at ``end``, above ``low``."""
    start: float
    """User units; may be more than ``end``, as it is for heights."""
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, in user units; beyond the ends for values beyond them."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the scale, ascending; about ``count`` of them on a linear one."""
        if not self.log:
            step = nice_step((self.high - self.low) / count)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [number * step for number in range(first, last + 1)]
        found = [value for value in _round_values(self.low, self.high) if self.low <= value <= self.high]
        decades = [value for value in found if _is_decade(value)]
        if len(decades) < 3:
            return found
        return decades[:: 1 + (len(decades) - 1) // 6]


def linear_scale(values: Iterable[float], start: float, end: float, *, from_zero: bool = True) -> Scale:
    """A linear scale with round ends that holds all values and zero; without zero, the ends are a little outside."""
    given = [*values, *([0.0] if from_zero else [])]
    low, high = min(given), max(given)
    if low == high:
        low, high = (low - 1, high + 1) if low or not from_zero else (0.0, 1.0)
    if not from_zero:
        room = 0.08 * (high - low)
        return Scale(low - room, high + room, start, end)
    step = nice_step((high - low) / 5)
    return Scale(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, start, end)


def log_scale(values: Iterable[float], start: float, end: float) -> Scale:
    """A logarithmic scale whose ends are 1, 2 or 5 times a power of ten, a little outside all values (above zero)."""
    given = list(values)
    low, high = min(given) / 1.08, max(given) * 1.08
    rounds = _round_values(low / 10, high * 10)
    return Scale(max(v for v in rounds if v <= low), min(v for v in rounds if v >= high), start, end, log=True)


def doubling_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """A logarithmic scale from the least to the largest value (above zero), with some room at both ends."""
    low, high = min(values), max(values)
    room = (high / low) ** 0.04 if high > low else 2.0
    return Scale(low / room, high * room, start, end, log=True)


def nice_step(rough: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is not below a step (above zero)."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (*_STEPS, 10.0) if factor * power >= rough * (1 - 1e-9))


def _round_values(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    # float() of a literal, because 5 * 10.0**-5 is not the nearest double to 5e-5
    return [float(f"{factor:.0f}e{power}") for power in range(first, last + 1) for factor in _STEPS]


def _is_decade(value: float) -> bool:
    return abs(math.log10(value) - round(math.log10(value))) < 1e-9


def number_text(value: float) -> str:
    """A number as people write it: three digits, thousands apart, small ones as a power of ten, a real minus."""
    size = abs(value)
    if size == 0:
        return "0"
    sign = "−" if value < 0 else ""
    if size < 0.0001:
        power = math.floor(math.log10(size) + 1e-9)
        factor = f"{size / 10.0**power:.2g}"
        return sign + ("" if factor == "1" else f"{factor}×") + "10" + str(power).translate(_RAISED)
    return sign + (f"{size:,.0f}" if size >= 1000 else f"{size:.3g}" if size < 999.5 else "1,000")


def tick_text(value: float) -> str:
    """A number beside an axis, where room is short: from 100,000 on in thousands, millions and so on."""
    size = abs(value)
    if size < 99_999.5:
        return number_text(value)
    power = min(int(math.log10(size) / 3 + 1e-9), len(_THOUSANDS))
    return f"{number_text(value / 1000.0**power)}{_THOUSANDS[power - 1]}"


def signed_text(value: float, digits: int = 1) -> str:
    """A difference with its sign and a fixed number of decimals."""
    shown = f"{abs(value):.{digits}f}"
    return shown if float(shown) == 0 else ("−" if value < 0 else "+") + shown


@dataclass(frozen=True)
class ByteUnit:
    """The unit that all bytes of one chart are given in."""

    name: str
    size: int
    """Bytes."""

    def text(self, count: float) -> str:
        """So many bytes, with the unit."""
        return f"{number_text(count / self.size)} {self.name}"


def memory_unit(counts: Iterable[float]) -> ByteUnit:
    """GiB from one GiB on, as the tables of Qwen count, else MiB."""
    return ByteUnit("GiB", _GIB) if max(counts, default=0) >= _GIB else ByteUnit("MiB", _MIB)


def disk_unit(counts: Iterable[float]) -> ByteUnit:
    """GB from one GB on, else MB, as disks count and the table of sizes does."""
    return ByteUnit("GB", _GB) if max(counts, default=0) >= _GB else ByteUnit("MB", _MB)
