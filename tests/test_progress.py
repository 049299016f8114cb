"""Progress names the step and the time left, begins anew with every step, and is a plain line now and then in a log."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from qquant import progress
from qquant.config import ModuleRecord


class Clock:
    """Seconds that a test turns on by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], io.StringIO]:
    """A stand-in for stderr that is a terminal, or is none."""

    def make(terminal: bool) -> io.StringIO:
        file = io.StringIO()
        made = Console(file=file, force_terminal=terminal, width=100, color_system=None)
        monkeypatch.setattr(progress, "Console", lambda **options: made)
        return file

    return make


def record(name: str) -> ModuleRecord:
    return ModuleRecord.model_construct(name=name, bits=4, relative_error=0.01)


def test_a_terminal_is_shown_the_newest_step(stderr: Callable[[bool], io.StringIO]) -> None:
    file = stderr(True)
    with progress.step_progress() as tell:
        tell("loading", 3, 4)
        tell("scoring", 1, 100)
    assert "scoring" in file.getvalue()


def test_a_log_of_a_short_command_stays_empty(stderr: Callable[[bool], io.StringIO], clock: Clock) -> None:
    file = stderr(False)
    with progress.step_progress() as tell:
        for done in range(10):
            clock.seconds += 2
            tell("scoring", done, 10)
    assert file.getvalue() == ""


def test_a_log_gets_a_line_now_and_then_with_the_time_left(stderr: Callable[[bool], io.StringIO], clock: Clock) -> None:
    file = stderr(False)
    with progress.step_progress() as tell:
        tell("loading", 0, 1)
        for done in range(7):
            tell("scoring", done, 10)
            clock.seconds += 20
    assert file.getvalue().splitlines() == [
        "scoring: 2 of 10, 0:02:40 left",
        "scoring: 4 of 10, 0:02:00 left",
        "scoring: 6 of 10, 0:01:20 left",
    ]


def test_details_behind_a_colon_do_not_begin_a_new_step(stderr: Callable[[bool], io.StringIO], clock: Clock) -> None:
    file = stderr(False)
    with progress.step_progress() as tell:
        for done in range(3):
            tell(f"profiling: cell {done}", done, 4)
            clock.seconds += 20
    assert file.getvalue() == "profiling: cell 2: 2 of 4, 0:00:40 left\n"


def test_blocks_are_what_the_time_left_of_a_quantization_is_reckoned_by(
    stderr: Callable[[bool], io.StringIO], clock: Clock
) -> None:
    file = stderr(False)
    with progress.module_progress(4) as (tell, _):
        for block in range(3):
            for name in ("up_proj", "down_proj"):
                tell(record(f"model.layers.{block}.mlp.{name}"))
                clock.seconds += 20
    assert file.getvalue().splitlines() == [
        "quantizing blocks: 1 of 4, 0:02:00 left",
        "quantizing blocks: 2 of 4, 0:01:20 left",
    ]


def test_a_terminal_is_shown_the_newest_linear(stderr: Callable[[bool], io.StringIO]) -> None:
    file = stderr(True)
    with progress.module_progress(None) as (tell, _):
        tell(record("transformer.h.1.attn.c_attn"))
    assert "transformer.h.1.attn.c_attn  4 bits" in file.getvalue()


def test_a_terminal_is_shown_what_comes_before_the_first_linear(stderr: Callable[[bool], io.StringIO]) -> None:
    file = stderr(True)
    with progress.module_progress(4) as (_, on_progress):
        on_progress("gradients of the outputs", 3, 8)
    assert "gradients of the outputs" in file.getvalue()
