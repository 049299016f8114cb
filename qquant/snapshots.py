"""All that a pass over a model's blocks holds, on a run's shelves from time to time.

For what changes as a whole from block to block, and in number; the walk's samples have activations.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qquant.run import Pace, Run
from qquant.shards import TensorSpec


class Snapshots:
    """One snapshot by name: the newest replaces the one before it, once it is whole.

    Every rank makes the same calls in the same order.
    """

    def __init__(self, run: Run, name: str) -> None:
        """Of ``run``, which has one pass of that name."""
        self._run, self._name, self._pace = run, name, Pace()

    def take(self, told: Any, tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> None:
        """Take one, if the last is long enough ago or a stop was asked for; then the run may stop.

        Args:
            told: JSON of what the tensors are.
            tensors: name -> tensor, of this rank.
            specs: of the tensors of all ranks.
        """
        run = self._run
        if not run.lasting or not run.ranks.any(self._pace.due or run.stop_asked):
            return
        with self._pace.saving():
            slot = 1 - (run.finished(self._name) or {"slot": 1})["slot"]
            run.drop(self._shelf(slot))  # begun by a process that ended over it
            shelf = run.shelf(self._shelf(slot), specs)
            for name, tensor in tensors.items():
                shelf.write(name, tensor)
            shelf.sync()
            run.ranks.barrier()
            run.keep(self._name, {"slot": slot, "told": told})
            run.drop(self._shelf(1 - slot))
        run.may_stop()

    def told(self) -> Any | None:
        """What the newest one says; None without any."""
        newest = self._run.finished(self._name)
        return None if newest is None else newest["told"]

    def tensors(self, specs: Mapping[str, TensorSpec], names: list[str]) -> dict[str, Tensor]:
        """Some tensors of the newest, on the CPU; DamagedWorkError if they are not what was written."""
        newest = self._run.finished(self._name)
        assert newest is not None
        shelf = self._run.shelf(self._shelf(newest["slot"]), specs)
        return {name: shelf.read(name) for name in names}

    def end(self) -> None:
        """The pass is over, and what came of it is kept: give up all tensors."""
        for slot in (0, 1):
            self._run.drop(self._shelf(slot))

    def _shelf(self, slot: int) -> str:
        return f"{self._name}-{slot}"
