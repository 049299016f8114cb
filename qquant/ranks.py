"""Several processes that quantize one model: who takes which samples, and sums that come out the same for any number.

Samples lie in 16 lanes. A lane is summed by one rank, and lanes are added in their order: the additions, and so the
bits of every sum, are those of one process. Nothing here knows models, or what a run keeps on disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from qquant import errors
from qquant.errors import QquantError, RankLostError, UsageError

LANES = 16
"""Lanes that samples are summed in: sample i is in lane i % 16. Part of what makes the bytes of a result."""

Kind = Literal["moments", "solutions", "other"]
"""What bytes are sent for."""

_MEETING = timedelta(minutes=10)  # how long ranks wait for one another at the start
_PATIENCE = timedelta(days=1)  # and later, while one of them is busy
_PIECE_BYTES = 64 << 20  # of a matrix in exchange, so that no second copy of it is needed
_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip
_MOST_AXES = 8


class Ranks:
    """The processes of this run, seen from one of them.

    ``owner``, ``mine`` and ``steps`` are a rank's own. Every other method is called by all ranks, in the same order,
    and raises ``RankLostError`` when it finds one of them gone.

    Args:
        rank: of this process.
        size: how many there are.
        device: where tensors that come on a GPU are to be.
        neighbours: how many of them are on this machine.
    """

    def __init__(self, rank: int, size: int, device: str = "cpu", *, neighbours: int = 1) -> None:
        """Know the numbers; ``joined`` makes the connections."""
        self.rank, self.size, self.writer, self.neighbours = rank, size, rank == 0, neighbours
        self.sent: dict[str, int] = {"moments": 0, "solutions": 0, "other": 0}
        """Payload bytes that this rank sent to others, as if to each of them by itself."""
        self._device = device

    def owner(self, sample: int) -> int:
        """The rank that runs a sample."""
        return sample % LANES % self.size

    def mine(self, samples: Sequence[int]) -> list[int]:
        """Those that this rank runs, ascending."""
        return sorted(i for i in samples if self.owner(i) == self.rank)

    def steps(self, samples: Sequence[int]) -> list[list[int]]:
        """This rank's samples lane by lane: in step s, those of lane s * size + rank, ascending.

        A list for every step in which any rank has samples, the same number for every rank; empty where this one has
        none.
        """
        lanes: list[list[int]] = [[] for _ in range(-(-LANES // self.size) * self.size)]
        for i in sorted(samples):
            lanes[i % LANES].append(i)
        steps = (lanes[start : start + self.size] for start in range(0, len(lanes), self.size))
        return [step[self.rank] for step in steps if any(step)]

    def counts(self, number: int) -> list[int]:
        """The number that each rank gives, in rank order."""
        if self.size == 1:
            return [number]
        numbers = torch.zeros(self.size, dtype=torch.int64)
        numbers[self.rank] = number
        with _peers():
            dist.all_reduce(numbers)
        self.sent["other"] += numbers.itemsize * (self.size - 1)
        return numbers.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return sum(self.counts(int(flag))) > 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.counts(0)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Work of which every rank does its part, without calls to others: a ``QquantError`` of one is raised by all.

        Of several the one of the lowest rank. An error of another kind is a rank's own, and ends it.
        """
        failure: QquantError | None = None
        try:
            yield
        except RankLostError:
            raise
        except QquantError as error:
            failure = error
        failed = self.counts(int(failure is not None))
        if not any(failed):
            return
        first = failed.index(1)
        told = self.json([type(failure).__name__, str(failure)] if first == self.rank else None, owner=first)
        if failure is not None and first == self.rank:
            raise failure
        raise getattr(errors, told[0], QquantError)(told[1])

    def json(self, value: Any, owner: int = 0) -> Any:
        """A value of ``owner``, the writer if none is named, as its JSON reads; what others give is not looked at."""
        text = json.dumps(value, ensure_ascii=False).encode("utf-8") if self.rank == owner else b""
        if self.size > 1:
            length = self._broadcast(torch.tensor([len(text)]), owner, "other")
            buffer = torch.frombuffer(bytearray(text or bytes(int(length))), dtype=torch.uint8)
            text = bytes(self._broadcast(buffer, owner, "other").numpy())
        return json.loads(text)

    def gathered(self, value: Any) -> list[Any]:
        """What each rank gives, in rank order, as its JSON reads."""
        return [self.json(value, rank) for rank in range(self.size)]

    def share(self, tensor: Tensor | None, owner: int, *, kind: Kind = "other") -> Tensor:
        """A tensor of ``owner``, whatever its shape and dtype, on every rank's device of the same type.

        Args:
            tensor: the owner's; read, never written. What others give is not looked at.
            owner: the rank that has it.
            kind: what its bytes are counted as.

        Returns:
            The owner's own tensor there, a copy on the others.
        """
        if self.size == 1:
            assert tensor is not None
            return tensor
        header = torch.zeros(3 + _MOST_AXES, dtype=torch.int64)
        if self.rank == owner:
            assert tensor is not None
            shape = tensor.shape
            header[: 3 + len(shape)] = torch.tensor([tensor.is_cuda, _DTYPES.index(tensor.dtype), len(shape), *shape])
        on_gpu, dtype, axes, *sizes = self._broadcast(header, owner, "other").tolist()
        if self.rank != owner or tensor is None:
            tensor = torch.empty(sizes[:axes], dtype=_DTYPES[dtype], device=self._device if on_gpu else "cpu")
        if tensor.numel():
            self._broadcast(tensor.contiguous().reshape(-1).view(torch.uint8), owner, kind)
        return tensor

    def add_in_order(self, total: Tensor | None, part: Tensor, counts: Sequence[int]) -> Tensor:
        """Add every rank's ``part`` to a sum whose rows are divided among the ranks, the parts in rank order.

        Args:
            total: this rank's rows [rows of it, ...] of the sum so far, added to in place; None: nothing so far.
            part: [rows, ...] contiguous, of the same shape on every rank. One process's is kept as its total.
            counts: of every rank; a part that counts 0 is neither sent nor added.

        Returns:
            This rank's rows of the sum: with one process, all of them.
        """
        if self.size == 1:
            return part if total is None else total.add_(part)
        begins = self._begins(part.shape[0])
        height = begins[self.rank + 1] - begins[self.rank]
        if total is None:
            total = part.new_full((height, *part.shape[1:]), -0.0)  # to which any part adds up to itself
        tallest = max(end - begin for begin, end in pairwise(begins))
        row_bytes = part[0].numel() * part.itemsize
        step = max(1, _PIECE_BYTES // (self.size * row_bytes))
        for start in range(0, tallest, step):
            pieces = [part[min(begin + start, end) : min(begin + start + step, end)] for begin, end in pairwise(begins)]
            own = total[start : start + step]
            for arrived in self._exchanged(pieces, own, counts):
                own.add_(arrived)
        return total

    def whole(self, total: Tensor, rows: int) -> Tensor:
        """The sum of ``rows`` rows that ``add_in_order`` left divided among the ranks, on every rank."""
        if self.size == 1:
            return total
        begins, full = self._begins(rows), total.new_empty(rows, *total.shape[1:])
        full[begins[self.rank] : begins[self.rank + 1]] = total
        for owner in range(self.size):
            slab = full[begins[owner] : begins[owner + 1]]
            if slab.numel():
                self._broadcast(slab, owner, "moments")
        return full

    def _begins(self, rows: int) -> list[int]:
        """Where each rank's rows of a sum begin, and where the last one's end."""
        return [rows * rank // self.size for rank in range(self.size + 1)]

    def _exchanged(self, pieces: list[Tensor], like: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Send piece r to rank r; what came from the ranks that count, in rank order, each as large as ``like``."""
        counted = bool(counts[self.rank])
        outgoing = torch.cat(pieces) if counted else like.new_empty(0, *like.shape[1:])
        leaving = [len(piece) if counted else 0 for piece in pieces]
        coming = [len(like) if count else 0 for count in counts]
        arrived = like.new_empty(sum(coming), *like.shape[1:])
        with _peers():
            dist.all_to_all_single(arrived, outgoing, coming, leaving)
        self.sent["moments"] += (outgoing.nbytes - pieces[self.rank].nbytes) if counted else 0
        return [piece for piece, count in zip(arrived.split(coming), counts, strict=True) if count]

    def _broadcast(self, tensor: Tensor, owner: int, kind: Kind) -> Tensor:
        with _peers():
            dist.broadcast(tensor, owner)
        if self.rank == owner:
            self.sent[kind] += tensor.nbytes * (self.size - 1)
        return tensor


ALONE = Ranks(0, 1)
"""One process: nothing is sent, and nothing is copied."""


@contextmanager
def joined(device_name: str, *, patience: timedelta = _PATIENCE) -> Iterator[tuple[Ranks, str]]:
    """Meet the other processes that torchrun started, and part from them at the end.

    Args:
        device_name: ``auto``, ``cpu`` or ``cuda``; with one process any name.
        patience: how long a rank waits for another that neither comes nor ends.

    Yields:
        The ranks, ``ALONE`` where torchrun started one process or none, and the name of this rank's device: as given,
        or with several ranks ``cpu`` or ``cuda:LOCAL_RANK``.

    Raises:
        UsageError: more ranks than lanes, not torchrun's environment, or a GPU named by number or not there.
        RankLostError: another rank did not come, or ended.
    """
    size = _variable("WORLD_SIZE", 1)
    if size == 1:
        yield ALONE, device_name
        return
    if size > LANES:
        raise UsageError(f"at most {LANES} ranks can share the work, got {size}; use --nproc-per-node {LANES} or fewer")
    rank, device, _ = _variable("RANK", most=size - 1), _device(device_name), _variable("MASTER_PORT")
    if not os.environ.get("MASTER_ADDR"):
        raise _not_torchruns("MASTER_ADDR")
    with _peers():
        store, _, _ = next(rendezvous("env://", timeout=_MEETING))
        # A rank that never comes is waited for no longer than this; connecting would take the patience below for it.
        store.set(f"rank {rank}", "here")
        store.wait([f"rank {other}" for other in range(size)], _MEETING)
        # What is said between ranks lies in CPU tensors and goes by gloo on GPUs too.
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    try:
        yield Ranks(rank, size, device, neighbours=_variable("LOCAL_WORLD_SIZE", size)), device
    finally:
        dist.destroy_process_group()


def _device(name: str) -> str:
    """The device of this rank among several."""
    if name.startswith("cuda:"):
        raise UsageError(f"with several ranks each takes its own GPU, got --device {name}; use --device cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    local, there = _variable("LOCAL_RANK"), torch.cuda.device_count()
    if local >= there:
        raise UsageError(
            f"every rank needs a GPU of its own, rank {local} of this machine has none: this torch sees {there}; "
            f"use --nproc-per-node {max(1, there)} or --device cpu"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _variable(name: str, default: int | None = None, *, most: int | None = None) -> int:
    """A whole number of torchrun's environment."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal() or (name == "WORLD_SIZE" and int(text) < 1) or (most is not None and int(text) > most):
        raise _not_torchruns(name)
    return int(text)


def _not_torchruns(name: str) -> UsageError:
    return UsageError(
        f"the environment must be torchrun's, or say nothing of ranks: {name} is {os.environ.get(name, '')[:40]!r}; "
        "start with `torchrun --nproc-per-node N -m qquant.gptq ...`, or unset WORLD_SIZE"
    )


@contextmanager
def _peers() -> Iterator[None]:
    """Calls to other ranks: what goes wrong in them is that one is not there any more."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankLostError(
            "another rank ended, or did not come, and its own message says why; unless that says otherwise, what was "
            "finished is saved, and the same command goes on with any number of ranks"
        ) from error
