"""The kernels of csrc/cuda on a CPU: compiles them with emu.h into one library and calls their launchers.

Tensors go into guarded memory and come back, with their strides; a launch that fails raises what emu.h says of it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KERNELS = sorted((ROOT / "qquant" / "csrc" / "cuda").glob("*.cu"))
FLAGS = [
    "-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error",
]  # fmt: skip
"""No fused operation that the kernels keep apart; misaligned vectors, overflows and bad indices trap."""

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_Stride3 = ctypes.c_int64 * 3
_Stride4 = ctypes.c_int64 * 4


class _Cache(ctypes.Structure):
    """QqCache of kv_launch.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("codes_stride", _Stride3),
        ("scale_stride", _Stride3),
        ("zero_stride", _Stride3),
    )


class _Append(ctypes.Structure):
    """QqAppend of kv_launch.h."""

    _fields_ = (
        ("cache", _Cache),
        ("states", ctypes.c_void_p),
        ("states_stride", _Stride3),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "length", "dim", "at")),
        ("dtype", ctypes.c_int32),
    )


class _Dequantize(ctypes.Structure):
    """QqDequantize of kv_launch.h."""

    _fields_ = (
        ("cache", _Cache),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "tokens", "dim")),
        ("dtype", ctypes.c_int32),
    )


class _Attention(ctypes.Structure):
    """QqAttention of kv_launch.h."""

    _fields_ = (
        ("keys", _Cache),
        ("values", _Cache),
        ("query", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("mask_stride", _Stride4),
        ("out", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "kv_heads", "length", "tokens", "key_dim", "value_dim")
        ),
        ("dtype", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("scaling", ctypes.c_float),
    )


class EmulatorError(Exception):
    """A kernel did what a GPU leaves undefined; the message says what and where."""


class Emulator:
    """The compiled library and the memory of one call."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emu_alloc.restype = ctypes.c_void_p
        self._library.emu_message.restype = ctypes.c_char_p
        self._library.qq_kv_attention_workspace.restype = ctypes.c_int64
        self.reverse(False)

    def reverse(self, reversed_order: bool) -> None:
        """Choose which way round the threads of a block are run; a right kernel does not care."""
        self._library.emu_reverse(int(reversed_order))

    def append(
        self, codes: Tensor, scale: Tensor, zero: Tensor, states: Tensor, at: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """kv_append on copies of the cache, which are returned."""
        batch, heads, length, dim = states.shape
        with ExitStack() as stack:
            copies = [stack.enter_context(self._guarded(tensor)) for tensor in (codes, scale, zero)]
            source = stack.enter_context(self._guarded(states))
            args = _Append(
                _cache(*copies), source.data_ptr(), _Stride3(*source.stride()[:3]), batch, heads, length, dim, at,
                DTYPES[states.dtype],
            )  # fmt: skip
            self._run("qq_kv_append", args)
            results = [copy.clone() for copy in copies]
        return results[0], results[1], results[2]

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
        """kv_dequantize."""
        with ExitStack() as stack:
            copies = [stack.enter_context(self._guarded(tensor)) for tensor in (codes, scale, zero)]
            out = stack.enter_context(self._poisoned(tuple(codes.shape), dtype))
            self._run("qq_kv_dequantize", _Dequantize(_cache(*copies), out.data_ptr(), *codes.shape, DTYPES[dtype]))
            return out.clone()

    def attention(
        self,
        query: Tensor,
        cache: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
        mask: Tensor | None,
        scaling: float,
        splits: int,
    ) -> Tensor:
        """kv_decode_attention; ``cache`` is codes, scale, zero of the keys, then of the values."""
        batch, heads, length, dim = query.shape
        kv_heads, tokens, value_dim = cache[3].shape[1:]
        with ExitStack() as stack:
            copies = [stack.enter_context(self._guarded(tensor)) for tensor in cache]
            rows = stack.enter_context(self._guarded(query.contiguous()))
            seen = None if mask is None else stack.enter_context(self._guarded(mask))
            strides = [0, 0, 0, 0] if seen is None else list(seen.stride())
            if seen is not None:
                strides[:2] = [0 if seen.shape[axis] == 1 else strides[axis] for axis in (0, 1)]
            out = stack.enter_context(self._poisoned((batch, heads, length, value_dim), query.dtype))
            args = _Attention(
                _cache(*copies[:3]), _cache(*copies[3:]), rows.data_ptr(), None if seen is None else seen.data_ptr(),
                _Stride4(*strides), out.data_ptr(), None, batch, heads, kv_heads, length, tokens, dim, value_dim,
                DTYPES[query.dtype], splits, scaling,
            )  # fmt: skip
            room = self._library.qq_kv_attention_workspace(ctypes.byref(args))
            workspace = stack.enter_context(self._poisoned((room,), torch.uint8))
            args.workspace = workspace.data_ptr()
            self._run("qq_kv_attention", args)
            return out.clone()

    def splits(
        self, multiprocessors: int, *, batch: int, heads: int, kv_heads: int, length: int, tokens: int, dim: int
    ) -> int:
        """qq_kv_attention_splits."""
        args = _Attention(
            batch=batch, heads=heads, kv_heads=kv_heads, length=length, tokens=tokens, key_dim=dim, value_dim=dim
        )
        return int(self._library.qq_kv_attention_splits(ctypes.byref(args), multiprocessors))

    def fault(self, which: int) -> Tensor:
        """Run kernel ``which`` of faults.h on the floats 0 to 63 and return the 64 that it makes of them."""
        with self._poisoned((64,), torch.float32) as out, self._guarded(torch.arange(64.0)) as source:
            pointers = ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(source.data_ptr())
            self._raise_for(self._library.emu_fault(which, *pointers))
            return out.clone()

    def _run(self, launcher: str, args: ctypes.Structure) -> None:
        self._raise_for(getattr(self._library, launcher)(ctypes.byref(args), None))

    def _raise_for(self, code: int) -> None:
        if code:
            raise EmulatorError(self._library.emu_message().decode())

    @contextmanager
    def _guarded(self, tensor: Tensor) -> Iterator[Tensor]:
        """A copy of a view with its strides, in memory that ends where the view's last element does."""
        reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        with self._poisoned((reach,), tensor.dtype) as flat:
            copy = flat.as_strided(tensor.shape, tensor.stride())
            copy.copy_(tensor)
            yield copy

    @contextmanager
    def _poisoned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
        size = torch.Size(shape).numel() * dtype.itemsize
        address = self._library.emu_alloc(ctypes.c_size_t(size))
        storage = (ctypes.c_uint8 * size).from_address(address)
        try:
            yield torch.frombuffer(storage, dtype=dtype).view(shape)
        finally:
            intact = self._library.emu_free(ctypes.c_void_p(address), ctypes.c_size_t(size))
        if not intact:
            raise EmulatorError("bytes just outside of a buffer were written")


def _cache(codes: Tensor, scale: Tensor, zero: Tensor) -> _Cache:
    return _Cache(
        codes.data_ptr(), scale.data_ptr(), zero.data_ptr(),
        _Stride3(*codes.stride()[:3]), _Stride3(*scale.stride()), _Stride3(*zero.stride()),
    )  # fmt: skip


def build(folder: Path) -> Path:
    """Compile the library into ``folder`` unless it is there; another process that wants the same waits for it."""
    import fcntl  # not everywhere, unlike this file's other imports, and nothing is compiled where it is not

    folder.mkdir(exist_ok=True)
    sources = [HERE / "harness.cpp", *KERNELS]
    headers = [*HERE.glob("*.h"), *(ROOT / "qquant" / "csrc").rglob("*.h")]
    content = b"".join(path.read_bytes() for path in sorted([*sources, *headers]))
    library = folder / f"emulated-{hashlib.sha256(content + ' '.join(FLAGS).encode()).hexdigest()[:16]}.so"
    with (folder / "compiling").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(sources, library)
    return library


def _compile(sources: list[Path], library: Path) -> None:
    """Compile the sources beside each other and link them."""
    part = library.with_suffix(f".{os.getpid()}")  # one that was ended here leaves nothing under the final name
    objects = [part.with_name(f"{part.name}.{source.stem}.o") for source in sources]
    running = [
        subprocess.Popen(
            ["g++", *FLAGS, f"-I{HERE}", "-c", "-o", str(target), "-x", "c++", str(source)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for source, target in zip(sources, objects, strict=True)
    ]
    said = "".join(compiler.communicate()[1] for compiler in running)
    if any(compiler.returncode for compiler in running):
        raise RuntimeError(f"the kernels do not compile as C++:\n{said[-4000:]}")
    subprocess.run(["g++", *FLAGS, "-o", str(part), *map(str, objects)], check=True)
    for target in objects:
        target.unlink()
    part.replace(library)
