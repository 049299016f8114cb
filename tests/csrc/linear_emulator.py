"""The CUDA kernels of packed linears on a CPU, called as their operators are. emulator.py compiles and runs them."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from tests.csrc.emulator import DTYPES, Emulator

MAX_SLICES = 8


class _Panels(ctypes.Structure):
    """QqPanels of linear_launch.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("words", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("panels", "steps", "groups", "group")),
        *((name, ctypes.c_int32) for name in ("zero", "bits", "half_scales")),
    )


class _Slice(ctypes.Structure):
    """QqSlice of linear_launch.h."""

    _fields_ = (("out", ctypes.c_void_p), ("panel", ctypes.c_int64), ("width", ctypes.c_int64))


class _Linear(ctypes.Structure):
    """QqLinear of linear_launch.h."""

    _fields_ = (
        ("weight", _Panels),
        *((name, ctypes.c_void_p) for name in ("x", "order", "bias", "workspace")),
        *((name, ctypes.c_int64) for name in ("tokens", "stride", "features")),
        ("slices", _Slice * MAX_SLICES),
        *((name, ctypes.c_int32) for name in ("slice_count", "dtype", "splits")),
    )


class _Weights(ctypes.Structure):
    """QqWeights of linear_launch.h."""

    _fields_ = (("weight", _Panels), ("out", ctypes.c_void_p), ("dtype", ctypes.c_int32))


class LinearEmulator(Emulator):
    """The compiled library and the memory of one call."""

    def __init__(self, library: Path) -> None:
        super().__init__(library)
        self._library.qq_panel_linear_workspace.restype = ctypes.c_int64

    def linear(
        self,
        x: Tensor,
        words: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        order: Tensor | None,
        bias: Tensor | None,
        widths: list[int],
        bits: int,
        group_size: int,
        zero: int,
        splits: int,
    ) -> list[Tensor]:
        """panel_linear; x is [tokens, K] with neighbouring features side by side."""
        with ExitStack() as stack:
            args = _Linear(weight=self._panels(stack, words, scales, zeros, bits, group_size, zero), splits=splits)
            rows = stack.enter_context(self._guarded(x))
            args.x, args.tokens, args.stride, args.features = rows.data_ptr(), x.shape[0], x.stride(0), x.shape[1]
            args.order = None if order is None else stack.enter_context(self._guarded(order)).data_ptr()
            args.bias = None if bias is None else stack.enter_context(self._guarded(bias)).data_ptr()
            args.dtype, args.slice_count = DTYPES[x.dtype], len(widths)
            outs, panel = [], 0
            for i, width in enumerate(widths):
                outs.append(stack.enter_context(self._poisoned((x.shape[0], width), x.dtype)))
                args.slices[i] = _Slice(outs[-1].data_ptr(), panel, width)
                panel += -(-width // 16)
            room = self._library.qq_panel_linear_workspace(ctypes.byref(args))
            args.workspace = stack.enter_context(self._poisoned((room,), torch.uint8)).data_ptr() if room else None
            self._run("qq_panel_linear", args)
            return [out.clone() for out in outs]

    def weights(
        self,
        words: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bits: int,
        group_size: int,
        zero: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """panel_weights."""
        panels, steps, rows = words.shape
        with ExitStack() as stack:
            weight = self._panels(stack, words, scales, zeros, bits, group_size, zero)
            out = stack.enter_context(self._poisoned((panels * rows, steps * 32 // bits), dtype))
            self._run("qq_panel_weights", _Weights(weight, out.data_ptr(), DTYPES[dtype]))
            return out.clone()

    def linear_splits(
        self, multiprocessors: int, *, tokens: int, features: int, outputs: int, bits: int, dtype: torch.dtype
    ) -> int:
        """qq_panel_linear_splits for groups of 128."""
        weight = _Panels(
            panels=outputs // 16, steps=features * bits // 32, groups=features // 128, group=128, bits=bits
        )
        args = _Linear(weight=weight, tokens=tokens, stride=features, dtype=DTYPES[dtype])
        return int(self._library.qq_panel_linear_splits(ctypes.byref(args), multiprocessors))

    def _panels(
        self,
        stack: ExitStack,
        words: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bits: int,
        group_size: int,
        zero: int,
    ) -> _Panels:
        held = [stack.enter_context(self._guarded(part)) for part in (words, scales)]
        offsets = None if zeros is None else stack.enter_context(self._guarded(zeros)).data_ptr()
        return _Panels(
            held[0].data_ptr(), held[1].data_ptr(), offsets, *words.shape[:2], scales.shape[1], group_size, zero, bits,
            int(scales.dtype == torch.float16),
        )  # fmt: skip
