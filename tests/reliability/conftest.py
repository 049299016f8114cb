"""What the tests of this folder share: tiny jobs for the command line, the launcher of runs, the record of a battery.

A test says what it did with ``outcome(word, count)``; a module says in ``ROW`` what its line of the record is called,
and the first paragraph of its docstring goes there too. ``QQUANT_RELIABILITY_RECORD=FILE`` writes the record.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_checkpoint
from tests.reliability.faulty import Call, Fault
from tests.reliability.record import Record
from tests.reliability.runs import EXIT_OK, Launcher, Order, tree

SHAPE: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {"qwen2": SHAPE, "llama": {**SHAPE, "vocab_size": 9000}}
"""Of the second one the output has several files and an index: its embedding alone fills one of 1 MB."""
OPTIONS = ("--group-size", "32", "--seq-len", "32", "--n-samples", "4", "--max-shard-size", "0.001")


@dataclass(frozen=True)
class Job:
    """A model to quantize in some way, and what comes of it when nothing goes wrong."""

    source: Path
    text: Path
    method: str
    whole: dict[str, str]
    """Tree of the output."""
    calls: tuple[Call, ...]
    seconds: float
    spilled: bool = False
    """Whether its activations are kept on the disk, and all else as often as can be."""
    more: tuple[str, ...] = ()
    """Further options."""

    def order(self, room: Path, faults: Sequence[Fault] = (), *more: str, **options: Any) -> Order:
        """A run of it into ``room / "out"``."""
        given = arguments(self.source, self.text, self.method, room, (*self.more, *more))
        return Order(given, room, tuple(faults), spilled=self.spilled, **options)


def arguments(source: Path, text: Path, method: str, room: Path, more: Sequence[str] = ()) -> tuple[str, ...]:
    """What the command line is given, with the output at ``room / "out"``."""
    places = ("--model", str(source), "--data", str(text), "--out", str(room / "out"))
    return (*places, "--method", method, *OPTIONS, *more)


MIXED = ("--target-size", "118KiB", "--sensitivity-tokens", "256", "--n-samples", "6")
JOBS = {
    "qwen2-best": ("qwen2", "best"),
    "llama-gptq": ("llama", "gptq"),
    "qwen2-tuned-spilled": ("qwen2", "best+tune:2", True),
    "qwen2-mixed-spilled": ("qwen2", "best", True, MIXED),
}
"""What ``job`` is given, where a run is broken in its own bookkeeping: the last two keep activations on the disk, and
the last one measures first which linears get 8 bits."""
Jobs = Callable[..., Job]


@pytest.fixture(scope="session")
def launcher() -> Launcher:
    """Starts runs in processes of their own."""
    return Launcher()


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory, launcher: Launcher) -> Callable[..., Job]:
    """``job(family, method, spilled, more)``: made and run once."""
    made: dict[tuple[str, str, bool, tuple[str, ...]], Job] = {}
    home = tmp_path_factory.mktemp("jobs")
    text = home / "calibration.txt"
    line = "The quick brown fox jumps over the lazy dog, and def add(left, right) returns {} while 你好世界.\n"
    text.write_text("".join(line.format(number) for number in range(12)), encoding="utf-8")

    def get(family: str = "qwen2", method: str = "best", spilled: bool = False, more: tuple[str, ...] = ()) -> Job:
        if (key := (family, method, spilled, more)) not in made:
            source = home / family
            if not source.exists():
                make_checkpoint(source, family, **FAMILIES[family])
            room = home / f"{family}-{method}{'-spilled' * spilled}{'-mixed' * bool(more)}"
            room.mkdir()
            ended = launcher.run(Order(arguments(source, text, method, room, more), room, spilled=spilled))
            assert ended.code == EXIT_OK, ended.said
            assert [path.name for path in room.iterdir()] == ["out"]
            made[key] = Job(source, text, method, tree(room / "out"), ended.calls, ended.seconds, spilled, more)
        return made[key]

    return get


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """An empty folder for one output and what lies beside it."""
    folder = tmp_path / "room"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def outcome(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[Any]:
    """``outcome("recovered")``, ``outcome("refused", 17)``: what came of so many cases; uncalled: one "passed"."""
    module = request.module
    paragraph = " ".join((module.__doc__ or "").strip().split("\n\n")[0].split())
    record_property("row", getattr(module, "ROW", module.__name__.rpartition("test_")[2].replace("_", " ")))
    record_property("does", paragraph)
    counted: dict[str, int] = {}

    def count(word: str, cases: int = 1) -> None:
        counted[word] = counted.get(word, 0) + cases

    yield count
    record_property("outcomes", counted or {"passed": 1})


def _mark_what_repeats(items: list[pytest.Item]) -> None:
    """Where a module names parameters ``BESIDES`` those that make a kind, the quick part has one case of each kind.

    These parameters take turns in it. All other cases belong to the long part.
    """
    groups: dict[tuple[Any, str], dict[str, list[pytest.Item]]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and hasattr(item.module, "BESIDES"):
            kind = repr([pair for pair in item.callspec.params.items() if pair[0] not in item.module.BESIDES])
            groups.setdefault((item.module, item.originalname), {}).setdefault(kind, []).append(item)
    for kinds in groups.values():
        for number, cases in enumerate(kinds.values()):
            for place, item in enumerate(cases):
                if place != number % len(cases):
                    item.add_marker(pytest.mark.reliability)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long part runs only where it is named: ``-m reliability`` alone, or ``make reliability`` all of it."""
    _mark_what_repeats(items)
    if "reliability" in str(config.getoption("-m") or ""):
        return
    long = [item for item in items if item.get_closest_marker("reliability")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


EVERYTHING, FOLDER = "reliability or not reliability", "tests/reliability"
_RECORD = Record()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a test to its row."""
    if "/reliability/" in report.nodeid.replace("\\", "/"):
        _RECORD.add(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the record where it was asked for; of many processes the first one does, to which the others report."""
    target = os.environ.get("QQUANT_RELIABILITY_RECORD")
    if target and "PYTEST_XDIST_WORKER" not in os.environ:
        config = session.config
        whole = config.getoption("-m") == EVERYTHING and not config.getoption("-k") and config.args == [FOLDER]
        _RECORD.part = not whole
        Path(target).write_text(_RECORD.page(), encoding="utf-8")
