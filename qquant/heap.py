"""What glibc's heap keeps of freed memory, and how it is made to give it back; nothing on other systems."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_M_MMAP_THRESHOLD = -3  # mallopt's number for it, from glibc's malloc.h


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


def return_unused_memory() -> None:
    """Hand freed heap pages back to Linux.

    Tensors that live long lie between those of one block; glibc keeps the freed pages, and after a few blocks a process
    that quantizes would hold half as much again as it uses, one that loads a tenth.
    """
    if (trim := _function("malloc_trim")) is not None:
        trim(0)
