"""Progress of long commands on stderr, and silence for the bars of libraries underneath."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qquant.config import ModuleRecord

OnProgress = Callable[[str, int, int], None]
"""(what is being done, how far, of how much)."""


@contextmanager
def step_progress() -> Iterator[OnProgress]:
    """One live line that names the step, how far it is, the time it took and the time it has left."""
    with _line("reading") as progress:
        task, step = progress.task_ids[0], ""

        def on_progress(what: str, done: int, total: int) -> None:
            nonlocal step
            if what != step:  # the time left of one step says nothing about the next
                progress.reset(task, total=total, description=what)
                step = what
            progress.update(task, completed=done, total=total)

        yield on_progress


@contextmanager
def module_progress(blocks: int | None) -> Iterator[Callable[[ModuleRecord], None]]:
    """One live line while linears are quantized: the newest module, its error, the time so far and left.

    Args:
        blocks: of the model; None where that is not known, and then no time left is shown.
    """
    with _line("reading the model", total=blocks) as progress:
        task, done, begun = progress.task_ids[0], 0, 0

        def on_module(record: ModuleRecord) -> None:
            nonlocal done, begun
            done += 1
            # Blocks come in order and each counts once it is left: linears of one block differ too much in cost.
            begun = max([begun, *(int(part) for part in record.name.split(".") if part.isdecimal())])
            error = f"relative error {record.relative_error:.1e}"
            text = f"{done:4d}  {record.name}  {record.bits} bits  {error}"
            progress.update(task, description=text, completed=begun)

        yield on_module


@contextmanager
def _line(description: str, total: int | None = None) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        progress.add_task(description, total=total)
        yield progress


def quiet_transformers() -> None:
    """No loading bars from transformers: they interleave with ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
