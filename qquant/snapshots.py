"""All that a pass over a model's blocks holds, on a run's shelves from time to time.

For what changes as a whole from block to block, and in number; the walk's samples have activations.py.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qquant.run import Pace, Run
from qquant.shards import TensorSpec

_OF, _OF_SPEC = "state", TensorSpec("I64", ())
"""On the shelf, beside the tensors: the checksum of the state that they belong to."""


class Snapshots:
    """One snapshot by name: the newest replaces the one before it, once it is whole.

    Every rank makes the same calls in the same order.
    """

    def __init__(self, run: Run, name: str) -> None:
        """Of ``run``, which has one pass of that name."""
        self._run, self._name, self._pace = run, name, Pace()

    def take(self, state: Any, tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> None:
        """Take one, if the last is long enough ago or a stop was asked for; then the run may stop.

        Args:
            state: JSON, what the tensors are.
            tensors: name -> tensor, of this rank.
            specs: of the tensors of all ranks.
        """
        run = self._run
        if not run.lasting or not run.ranks.any(self._pace.due or run.stop_asked):
            return
        with self._pace.saving():
            slot = 1 - (run.finished(self._name) or {"slot": 1})["slot"]
            run.drop(self._shelf(slot))  # begun by a process that ended over it
            shelf = run.shelf(self._shelf(slot), {**specs, _OF: _OF_SPEC})
            for name, tensor in tensors.items():
                shelf.write(name, tensor)
            if run.ranks.writer:
                shelf.write(_OF, _of(state))
            shelf.sync()
            run.ranks.barrier()
            run.keep(self._name, {"slot": slot, "state": state})
            run.drop(self._shelf(1 - slot))
        run.may_stop()

    @property
    def state(self) -> Any | None:
        """Of the newest one; None without any."""
        newest = self._run.finished(self._name)
        return None if newest is None else newest["state"]

    @contextmanager
    def newest(self, specs: Mapping[str, TensorSpec]) -> Iterator[Callable[[str], Tensor]]:
        """Reads tensors of the newest one by name, on the CPU; each rank its own.

        Raises:
            DamagedWorkError: on every rank, if they are not what was written, or of another moment than ``state``.
        """
        kept = self._run.finished(self._name)
        assert kept is not None
        shelf = self._run.shelf(self._shelf(kept["slot"]), {**specs, _OF: _OF_SPEC})
        with self._run.ranks.agreed():
            shelf.expect(_OF, _of(kept["state"]))
            yield shelf.read

    def end(self) -> None:
        """The pass is over, and what came of it is kept: give up all tensors; then the run may stop."""
        for slot in (0, 1):
            self._run.drop(self._shelf(slot))
        self._run.may_stop()

    def _shelf(self, slot: int) -> str:
        return f"{self._name}-{slot}"


def _of(state: Any) -> Tensor:
    """What tells the moment of a snapshot, beside its tensors."""
    return torch.tensor(zlib.crc32(json.dumps(state).encode()))
