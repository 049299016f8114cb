"""What a check of a checkpoint has to say: findings, the checks that made them, and all of them together.

What is looked at, and what counts as a fault, is for the other rooms of this folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal

Level = Literal["problem", "warning"]

_MOST = 8
"""Findings of one level that a check lists; a folder that is wrong throughout would give thousands."""


@dataclass(frozen=True)
class Finding:
    """One thing that is amiss."""

    level: Level
    """"problem": it would load wrongly, run code, leak or lie. "warning": some readers may stumble over it."""
    check: str
    """Name of the check that found it."""
    subject: str
    """The tensor, file or key."""
    text: str
    """The rule, what came, and the remedy."""


@dataclass(frozen=True)
class Check:
    """One check, made or not."""

    name: str
    about: str
    """What it looks at."""
    findings: tuple[Finding, ...] = ()
    left_out: str = ""
    """Why it could not be made; empty if it was."""

    @property
    def outcome(self) -> str:
        """One word: ok, warning, problem, or not checked."""
        levels = {finding.level for finding in self.findings}
        found = next((level for level in ("problem", "warning") if level in levels), "ok")
        return "not checked" if self.left_out and not levels else found


@dataclass(frozen=True)
class Verification:
    """What was found in one folder."""

    folder: str
    """Its name, without the path."""
    checks: tuple[Check, ...]
    tensor_parallel: dict[int, str | None] = field(default_factory=dict)
    """Cards -> the first thing that cannot be cut over so many, None: all can."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Of all checks, in their order."""
        return tuple(finding for check in self.checks for finding in check.findings)

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What keeps the checkpoint from being sound."""
        return tuple(finding for finding in self.findings if finding.level == "problem")

    @property
    def sound(self) -> bool:
        """Whether there is no problem; there may be warnings."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return {
            "schema_version": 1,
            "folder": self.folder,
            "sound": self.sound,
            "checks": [{"outcome": check.outcome, **asdict(check)} for check in self.checks],
            "tensor_parallel": {str(ranks): reason for ranks, reason in self.tensor_parallel.items()},
        }


def problem(check: str, subject: str, text: str) -> Finding:
    """A finding that makes a checkpoint unsound."""
    return Finding("problem", check, subject, text)


def warning(check: str, subject: str, text: str) -> Finding:
    """A finding that does not."""
    return Finding("warning", check, subject, text)


def shortened(findings: Iterable[Finding]) -> Iterator[Finding]:
    """The first few of each level, and one more that counts the rest."""
    found = list(findings)
    for level in ("problem", "warning"):
        same = [finding for finding in found if finding.level == level]
        yield from islice(same, _MOST)
        if len(same) > _MOST:
            yield Finding(level, same[0].check, "more", f"{len(same) - _MOST} more of this kind are not listed")
