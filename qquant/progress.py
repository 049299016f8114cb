"""Progress of long commands on stderr, and silence for the bars of libraries underneath."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from qquant.config import ModuleRecord


@contextmanager
def module_progress() -> Iterator[Callable[[ModuleRecord], None]]:
    """One live line while linears are quantized: the newest module, its error, the time so far."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading the model")
        done = 0

        def on_module(record: ModuleRecord) -> None:
            nonlocal done
            done += 1
            error = f"relative error {record.relative_error:.1e}"
            progress.update(task, description=f"{done:4d}  {record.name}  {record.bits} bits  {error}")

        yield on_module


def quiet_transformers() -> None:
    """No loading bars from transformers: they interleave with ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
