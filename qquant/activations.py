"""The activations of calibration samples as the walk goes on: in memory, or on a run's shelves where they do not fit.

Either way they come to the disk between two blocks, where a run that was cut off finds them again. What they are is
capture.py's, when they change is walk.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from qquant.run import Pace, Run, Shelf
from qquant.shards import DTYPE_NAMES, TensorSpec

_KEY = "activations"
_BLOCK = "block"
"""On a shelf, beside the samples: in front of which block they stand; -1 from the first of them on that is replaced."""


class Activations(Sequence[Tensor]):
    """One tensor [1, T, hidden] for each sample; those of other ranks are never asked for."""

    def __init__(
        self, count: int, device: torch.device | str, slots: tuple[Shelf, Shelf] | None, *, spilled: bool
    ) -> None:
        """Without any sample yet; see ``Streams``."""
        self.spilled = spilled
        """Whether samples lie on the shelves and not in memory."""
        self._device, self._slots = device, slots
        self._held: list[Tensor | None] = [None] * count
        self._at = [0] * count  # the slot of the newest version, of a spilled sample
        self._next = 0  # the slot that takes new versions; the other one holds what was committed last
        self._begun = False  # whether it has taken one

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, i: int) -> Tensor:  # type: ignore[override]
        held = self._held[i]
        if held is not None:
            return held
        assert self._slots is not None, f"sample {i} is another rank's"
        return self._slots[self._at[i]].read(str(i)).to(self._device)

    def __setitem__(self, i: int, hidden: Tensor) -> None:
        if not self.spilled:
            self._held[i] = hidden
            return
        self._replace(i, hidden)
        self._at[i] = self._next

    def _replace(self, i: int, hidden: Tensor) -> None:
        """Write a sample over an older version, which the journal says nothing of any more."""
        assert self._slots is not None
        if not self._begun:
            self._slots[self._next].write(_BLOCK, torch.tensor(-1))
            self._begun = True
        self._slots[self._next].write(str(i), hidden)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def spill(self, mine: Sequence[int]) -> None:
        """Move the samples from memory onto the shelves, if there are any."""
        if self._slots is not None and not self.spilled:
            self.spilled = True
            for i in mine:
                held, self._held[i] = self._held[i], None
                if held is not None:
                    self[i] = held

    def commit(self, mine: Sequence[int], block: int) -> int:
        """Wait until all samples lie on one shelf, on the disk; returns which, and keeps it as it is.

        Args:
            mine: the samples of this rank.
            block: in front of which they stand.
        """
        assert self._slots is not None
        slot = self._next
        for i in mine:
            held = self._held[i]
            if held is not None:
                self._replace(i, held)
            assert self.spilled <= (self._at[i] == slot), f"sample {i} was left behind"
        self._slots[slot].write(_BLOCK, torch.tensor(block))
        self._slots[slot].sync()
        self._next, self._begun = 1 - slot, False
        return slot

    def committed(self, i: int) -> Tensor:
        """A sample as it was committed last, whatever has become of it since."""
        assert self._slots is not None
        return self._slots[1 - self._next].read(str(i)).to(self._device)

    def restore(self, slot: int, mine: Sequence[int], block: int) -> None:
        """Take what was committed to ``slot``; DamagedWorkError if that stands in front of another block."""
        assert self._slots is not None
        self._next, self._begun = 1 - slot, False
        self._slots[slot].expect(_BLOCK, torch.tensor(block))
        for i in mine:
            self._at[i] = slot
            if not self.spilled:
                self._held[i] = self._slots[slot].read(str(i)).to(self._device)


class Streams:
    """The samples as the quantized model has them, and beside them, where asked for, as the original has them."""

    def __init__(
        self,
        run: Run,
        lengths: Sequence[int],
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        with_exact: bool,
        spilled: bool = False,
    ) -> None:
        """Take the disk space of a lasting run: two slots for each stream.

        Args:
            run: where they are kept.
            lengths: tokens of each sample.
            width: of the hidden states.
            dtype: they are computed in.
            device: where they are computed.
            with_exact: keep the original's as well.
            spilled: keep them on the disk only.
        """
        self._run, self._mine = run, run.ranks.mine(range(len(lengths)))
        specs = {str(i): TensorSpec(DTYPE_NAMES[dtype], (1, length, width)) for i, length in enumerate(lengths)}
        specs[_BLOCK] = TensorSpec("I64", ())

        def made(name: str) -> Activations:
            slots = (run.shelf(f"{name}-0", specs), run.shelf(f"{name}-1", specs)) if run.lasting else None
            return Activations(len(lengths), device, slots, spilled=spilled and slots is not None)

        self.hidden = made("hidden")
        self.exact = made("exact") if with_exact else None
        self.restored, self.block = False, 0
        """Whether samples were found that an earlier process committed, and in front of which block they stand."""
        self._pace = Pace()

    def restore(self) -> None:
        """Take the samples that were committed last, if there are any."""
        piece = self._run.finished(_KEY)
        if piece is not None:
            with self._run.ranks.agreed():
                for stream in self._all():
                    stream.restore(piece["slot"], self._mine, piece["block"])
            self.restored, self.block = True, int(piece["block"])

    def commit(self, block: int, *, always: bool = False) -> None:
        """The samples stand in front of ``block``: bring them to the disk, if the last time is long enough ago.

        Args:
            block: its number.
            always: whatever the time; spilled samples are always committed, since that is cheap.
        """
        if not self._run.lasting:
            return
        if not self._run.ranks.any(always or self.hidden.spilled or self._pace.due):
            return
        with self._pace.saving():
            (slot,) = {stream.commit(self._mine, block) for stream in self._all()}
            self._run.ranks.barrier()
            self._run.finish(_KEY, {"block": block, "slot": slot})

    def entering(self) -> Callable[[int], Tensor]:
        """Sample -> as the quantized model has it now, also when it has gone on; kept in memory by no lasting run.

        What a lasting run has now must have been committed.
        """
        return self.hidden.committed if self._run.lasting else list(self.hidden).__getitem__

    def spill(self) -> bool:
        """Give memory back by moving the samples to the disk; returns whether there were any to move."""
        moved = self._run.lasting and not self.hidden.spilled
        for stream in self._all():
            stream.spill(self._mine)
        return moved

    def begin_exact(self) -> None:
        """Let the original's samples begin as the quantized model's stand now."""
        if self.exact is not None:
            for i in self._mine:
                self.exact[i] = self.hidden[i]

    def _all(self) -> list[Activations]:
        return [self.hidden] if self.exact is None else [self.hidden, self.exact]


def in_memory(hidden: Sequence[Tensor], *, with_exact: bool) -> Streams:
    """The streams of a run that keeps nothing, all samples in front of the first block."""
    first = hidden[0]
    lengths = [sample.shape[1] for sample in hidden]
    streams = Streams(Run(), lengths, first.shape[2], first.dtype, first.device, with_exact=with_exact)
    for i, sample in enumerate(hidden):
        streams.hidden[i] = sample
    streams.begin_exact()
    return streams
