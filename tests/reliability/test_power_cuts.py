"""A power cut loses what was not forced to the disk. Before every line of a journal, and before the last rename, all
that it stands for is: every write and every fsync of a run is watched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.conftest import JOBS, Jobs
from tests.reliability.runs import Launcher

ROW = "power cuts"
STANDS_FOR = {"activations": ("hidden", "exact"), "gradients": ("gradients",), "shelf": ("none",)}
"""The folders of what a line stands for, by its beginning; else the result's. A shelf that was made is empty."""


def watched(source: Path, method: str, spilled: bool, room: Path, found: Path) -> None:
    """In a process of its own: quantize, and write down each line of the journal with the files that were behind."""
    import torch

    from qquant import publish, unfinished
    from qquant.calibrate import samples_from_ids
    from qquant.config import QuantizeConfig
    from qquant.journal import Journal
    from qquant.needs import Needs
    from qquant.quantizing import quantize_checkpoint
    from tests.reliability import faulty

    behind: set[str] = set()
    plain, add, put = faulty.Meddler.meet, Journal.add, publish.put_in_place

    def meet(meddler: Any, operation: str, paths: Sequence[Any], *how: Any) -> Any:
        done = plain(meddler, operation, paths, *how)
        path = os.path.abspath(os.fsdecode(paths[0]))
        if operation in ("write", "pwrite", "posix_fallocate", "truncate") and path.startswith(str(room)):
            behind.add(path)
        elif operation == "fsync":
            behind.discard(path)
        return done

    def tell(moment: str) -> None:
        parts = next((parts for kind, parts in STANDS_FOR.items() if moment.startswith(kind)), ("result",))
        late = sorted(path for path in behind if Path(path).parent.name.startswith(parts))
        with found.open("a") as stream:
            stream.write(f"{moment}\t{','.join(late)}\n")

    def told(journal: Journal, key: str, piece: Any) -> None:
        tell(key)
        add(journal, key, piece)

    def published(new: Path, out: Path, *, aside: Path) -> None:
        tell("the last rename")
        put(new, out, aside=aside)

    setattr(faulty.Meddler, "meet", meet)  # noqa: B010  mypy forbids these assignments
    setattr(Journal, "add", told)  # noqa: B010
    setattr(unfinished, "put_in_place", published)  # noqa: B010
    setattr(Needs, "spills", lambda *_, **__: spilled)  # noqa: B010
    faulty.install(room)
    torch.set_num_threads(1)
    ids = torch.randint(0, 320, (4, 32), generator=torch.Generator().manual_seed(0))
    quantize_checkpoint(source, samples_from_ids(ids), QuantizeConfig(method=method, group_size=32), room / "out")


@pytest.mark.parametrize("name", [pytest.param("qwen2-best", marks=pytest.mark.reliability), "qwen2-tuned-spilled"])
def test_nothing_is_said_to_be_finished_that_a_power_cut_would_take(
    name: str, launcher: Launcher, job: Jobs, tmp_path: Path, room: Path, outcome: Callable[..., Any]
) -> None:
    whole, found = job(*JOBS[name]), tmp_path / "found.txt"
    launcher.call(watched, whole.source, whole.method, whole.spilled, room, found)
    moments = [line.split("\t") for line in found.read_text().splitlines()]
    assert moments[-1][0] in ("sealed", "the last rename")
    assert {"copied", "activations", "the last rename"} - {moment for moment, _ in moments} <= {"activations"}
    assert [line for line in moments if line[1]] == []
    outcome("all on the disk before it is counted", len(moments))
