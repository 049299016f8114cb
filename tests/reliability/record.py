"""docs/reliability.md as a run of the battery writes it: one row per module of tests, with cases and outcomes."""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version

import pytest

COMMAND = "make reliability"
_HEAD = f"""# Reliability: what was broken, and what came of it

`{COMMAND}` runs everything in `tests/reliability/` and writes this page; nobody edits it. A part of it, two minutes of
one process, belongs to `make test`. A *case* is one run that was killed, one call that failed, one damaged file and
the like; a test counts as many cases as it made. *Failed* counts tests, and must be 0. *Seconds* are summed over
processes.
"""
_FOOT = """## How things are broken

Every run of `python -m qquant.gptq` is a process of its own. The calls by which Python writes are wrapped from outside
(`tests/reliability/faulty.py`), nothing in `qquant` knows of it: the n-th of them kills the process (before it is
performed, in the middle of a write, after it), stops it, signals it, or fails with an error of the system. A named
point is the first call of its kind: an operation on one file of the output or of what is kept beside it. Torch's
allocations are refused by a dispatch mode. Limits of the kernel (`RLIMIT_FSIZE`, `RLIMIT_AS`) come on top, so that the
errors of compiled code are real. After each case the same command is given again, and the finished folder is compared
with that of an undisturbed run, file by file, by sha256.

Not covered: power that fails under a disk which lies about `fsync`, and network file systems.
"""


@dataclass
class _Row:
    does: str = ""
    tests: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


class Record:
    """Collects what tests report.

    Args:
        part: whether less was asked for than everything.
    """

    def __init__(self, part: bool = False) -> None:
        self._rows: dict[str, _Row] = {}
        self.part = part

    def add(self, report: pytest.TestReport) -> None:
        """One phase of one test; what a test has to say is known in its last."""
        found = dict(report.user_properties)
        row = self._rows.setdefault(str(found.get("row", report.nodeid.partition("::")[0])), _Row())
        row.does = str(found.get("does", row.does))
        row.seconds += report.duration
        if report.failed and report.nodeid not in row.failed:
            row.failed.append(report.nodeid)
        if report.skipped:
            row.skipped += 1
        if report.when == "teardown":
            row.tests += 1
            if report.nodeid not in row.failed:
                row.outcomes.update(found.get("outcomes", {}))  # type: ignore[call-overload]

    def page(self) -> str:
        """The page, in Markdown."""
        lines = [
            _HEAD,
            *(["**Only a part ran.**", ""] if self.part else []),
            f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in _PACKAGES) + ".",
            "",
            "| row | tests | cases | outcomes | failed | seconds |",
            "|---|---|---|---|---|---|",
        ]
        rows = sorted(self._rows.items())
        for name, row in rows:
            outcomes = "; ".join(f"{count} × {word}" for word, count in sorted(row.outcomes.items()))
            skipped = f", {row.skipped} tests skipped" if row.skipped else ""
            cells = (name, row.tests, row.outcomes.total(), outcomes + skipped, len(row.failed), round(row.seconds))
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        cases, failed = sum(row.outcomes.total() for _, row in rows), [test for _, row in rows for test in row.failed]
        tests, seconds = sum(row.tests for _, row in rows), round(sum(row.seconds for _, row in rows))
        lines += [f"| all | {tests} | {cases} | | {len(failed)} | {seconds} |", "", "## What each row does", ""]
        lines += [f"- **{name}**: {row.does}" for name, row in rows]
        if failed:
            lines += ["", "## What failed", "", *(f"- `{test}`" for test in sorted(failed))]
        return "\n".join([*lines, "", _FOOT])


_PACKAGES = ("torch", "transformers", "safetensors")
