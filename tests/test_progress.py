"""Progress lines name the step and the time left, and begin anew with every step."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from rich.progress import Progress

from qquant import progress
from qquant.config import ModuleRecord


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[Progress]:
    """Every live line that is made, so that a test can ask what it shows."""
    made: list[Progress] = []
    original = progress._line

    @contextmanager
    def kept(*arguments: object, **options: object):  # type: ignore[no-untyped-def]  # noqa: ANN202
        with original(*arguments, **options) as line:  # type: ignore[arg-type]
            made.append(line)
            yield line

    monkeypatch.setattr(progress, "_line", kept)
    return made


def record(name: str) -> ModuleRecord:
    return ModuleRecord.model_construct(name=name, bits=4, relative_error=0.01)


def test_a_step_begins_at_nothing_and_forgets_the_pace_of_the_last(lines: list[Progress]) -> None:
    with progress.step_progress() as tell:
        tell("loading", 3, 4)
        tell("scoring", 1, 100)
        (task,) = lines[0].tasks
        assert (task.description, task.completed, task.total) == ("scoring", 1, 100)
        assert task.time_remaining is None or task.completed == 1


def test_blocks_are_what_the_time_left_is_reckoned_by(lines: list[Progress]) -> None:
    with progress.module_progress(4) as tell:
        for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"):
            tell(record(name))
        (task,) = lines[0].tasks
        assert (task.completed, task.total) == (2, 4)
        assert task.description.startswith("   3  model.layers.2.mlp.up_proj")


def test_an_unknown_number_of_blocks_shows_no_time_left(lines: list[Progress]) -> None:
    with progress.module_progress(None) as tell:
        tell(record("transformer.h.1.attn.c_attn"))
        assert lines[0].tasks[0].time_remaining is None
