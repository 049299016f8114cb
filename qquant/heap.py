"""What glibc's heap keeps of freed memory, and how it is made to give it back; nothing on other systems."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt's numbers for them, from glibc's malloc.h
_ADAPTED_BYTES = 32 << 20
"""glibc's own mmap threshold once it has adapted to large blocks, and the largest it goes to."""


def _function(name: str) -> Any:
    """One of glibc's; None where the C library is another."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def keep_heap_small() -> None:
    """Let every large tensor of this process have pages of its own, which go back to Linux when it is freed.

    glibc raises the size from which it does so to 32 MB as a program runs; activations of a few MB then share the heap
    with everything else, and its peak creeps up from block to block. For a process that does nothing but quantize.
    """
    if (mallopt := _function("mallopt")) is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks again, as it does in a user's process.

    For a process started with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ so low that every large tensor is given
    back the moment it is freed: resident memory is then what is in use, and not also what the heap keeps for later. It
    costs page faults, up to a fifth of the speed on a CPU.
    """
    if (mallopt := _function("mallopt")) is not None:
        mallopt(_M_MMAP_THRESHOLD, _ADAPTED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _ADAPTED_BYTES)


def return_unused_memory() -> None:
    """Hand freed heap pages back to Linux.

    Tensors that live long lie between those of one block; glibc keeps the freed pages, and after a few blocks a process
    that quantizes would hold half as much again as it uses, one that loads a tenth.
    """
    if (trim := _function("malloc_trim")) is not None:
        trim(0)
