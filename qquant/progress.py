"""Progress of long commands on stderr, and silence for the bars of libraries underneath.

On a terminal it is one live line; elsewhere, in a log file, a plain line every half minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qquant.config import ModuleRecord
from qquant.telling import OnProgress, unheard

PLAIN_SECONDS = 30.0
"""Between two lines where stderr is no terminal."""


@contextmanager
def step_progress(*, shown: bool = True) -> Iterator[OnProgress]:
    """Show the step, how far it is, the time it took and the time it has left; nothing unless ``shown``."""
    console = Console(stderr=True)
    if not shown:
        yield unheard
        return
    if not console.is_terminal:
        yield _plain(console)
        return
    with _line(console, "reading", None) as (progress, task):
        yield _live(progress, task)


class Listeners(NamedTuple):
    """Who hears of a model being quantized."""

    on_module: Callable[[ModuleRecord], None]
    """Of every finished linear."""
    on_progress: OnProgress
    """Of the steps before the first."""


@contextmanager
def module_progress(blocks: int | None, *, shown: bool = True) -> Iterator[Listeners]:
    """Show the newest linear and its error while a model is quantized, the time so far and left.

    Args:
        blocks: of the model; None where that is not known, and then no time left is shown.
        shown: False shows nothing.
    """
    console = Console(stderr=True)
    if not shown:
        yield Listeners(lambda record: None, unheard)
        return
    if console.is_terminal:
        with _line(console, "reading the model", blocks) as (progress, task):
            show = _live(progress, task)
            # What stands before the colon is the step, by whose pace the time left is reckoned.
            yield Listeners(_modules(lambda what, done: show(f"linear: {what}", done, blocks)), show)
    else:
        tell = _plain(console)
        yield Listeners(_modules(lambda what, done: tell("quantizing blocks", done, blocks or 0)), tell)


def quiet_transformers() -> None:
    """No loading bars from transformers: they interleave with ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _modules(tell: Callable[[str, int], None]) -> Callable[[ModuleRecord], None]:
    """A listener to finished linears that tells of the newest one and of the block it is in."""
    done = begun = 0

    def on_module(record: ModuleRecord) -> None:
        nonlocal done, begun
        done += 1
        # Blocks come in order and each counts once it is left: linears of one block differ too much in cost.
        begun = max([begun, *(int(part) for part in record.name.split(".") if part.isdecimal())])
        tell(f"{done:4d}  {record.name}  {record.bits} bits  relative error {record.relative_error:.1e}", begun)

    return on_module


def _live(progress: Progress, task: TaskID) -> Callable[[str, int, int | None], None]:
    """A listener that keeps one line up to date."""
    step = ""

    def on_progress(what: str, done: int, total: int | None) -> None:
        nonlocal step
        if _step(what) != step:  # the time left of one step says nothing about the next
            progress.reset(task, total=total)
            step = _step(what)
        progress.update(task, completed=done, total=total, description=what)

    return on_progress


@contextmanager
def _line(console: Console, description: str, total: int | None) -> Iterator[tuple[Progress, TaskID]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        yield progress, progress.add_task(description, total=total)


def _step(what: str) -> str:
    """The step that a text names: all of it, or what comes before a colon, behind which details may change."""
    return what.partition(":")[0]


def _plain(console: Console) -> OnProgress:
    """A listener that prints a line now and then; short commands print none."""
    shown = began = time.monotonic()
    step, first = "", 0

    def on_progress(what: str, done: int, total: int) -> None:
        nonlocal shown, began, step, first
        now = time.monotonic()
        if _step(what) != step:
            step, began, first = _step(what), now, done
        if now - shown < PLAIN_SECONDS:
            return
        shown = now
        left = (now - began) / (done - first) * (total - done) if total > done > first else None
        ending = "" if left is None else f", {timedelta(seconds=round(left))} left"
        console.print(f"{what}: {done} of {total or 'an unknown number'}{ending}", markup=False, highlight=False)

    return on_progress
