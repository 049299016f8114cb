"""The one place that knows which compiled modules exist here, and why one is missing.

It imports them on first use and never raises for a missing one. What a module computes lives in csrc/; what the
package does without it lives with each caller.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from qquant.errors import UsageError

TORCH_MODULES = ("qquant._C", "qquant._C_cuda")
"""Those that add kernels to torch's operators."""

MODULES = ("qquant._host", "qquant._gram", "qquant._descent", *TORCH_MODULES)
"""Every compiled module that setup.py may build."""

REBUILD = "QQUANT_NATIVE=1 python -m pip install --no-build-isolation --no-deps -e ."
"""Builds all modules from a source tree and ends with the compiler's own message if one cannot be built."""


class NativeStatus(NamedTuple):
    """Whether one compiled module is usable, and the reason if it is not."""

    name: str
    live: bool
    why: str
    """Empty when live."""


@cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """Import one compiled module: (module, "") or (None, the reason)."""
    if os.environ.get("QQUANT_NATIVE") == "0":
        return None, "switched off by QQUANT_NATIVE=0"
    try:
        if name in TORCH_MODULES:
            import_module("torch")  # its libraries are what these link to
        return import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name != name:
            return None, f"built, but it needs {error.name}"
        return None, "not built"
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"built, but does not load here: {error}"


def host() -> ModuleType | None:
    """The module of csrc/host.cpp (processor features, read bandwidth), or None where it is not built."""
    return _load("qquant._host")[0]


def gram() -> ModuleType | None:
    """The module of csrc/gram.cpp (X^T X of bfloat16 rows), or None where it is not built or cannot run."""
    module = _load("qquant._gram")[0]
    return module if module is not None and module.available() else None


def descent() -> ModuleType | None:
    """The module of csrc/descent.cpp (codes moved one by one), or None where it is not built."""
    return _load("qquant._descent")[0]


def describe(name: str) -> str:
    """What a live module says of itself: instruction sets chosen, GPU architectures, devices; empty if nothing.

    Raises:
        UsageError: as ``answer``.
    """
    operator = {"qquant._C": "cpu_kernel_info", "qquant._C_cuda": "cuda_build_info"}.get(name)
    return str(answer(operator)) if operator else ""


def answer(operator: str) -> Any:
    """What a live module's operator without arguments says.

    Raises:
        UsageError: QQUANT_CPU_ISA names no instruction set; each module reads it when it is first asked something.
    """
    import torch

    try:
        return getattr(torch.ops.qquant, operator)()
    except RuntimeError as error:
        if "QQUANT_CPU_ISA" not in str(error):
            raise
        raise UsageError(str(error).splitlines()[0]) from error


def load_torch_ops() -> None:
    """Load the kernels of csrc/ that add themselves to torch's operators; those not built leave the references."""
    for name in TORCH_MODULES:
        _load(name)


def status() -> list[NativeStatus]:
    """Each compiled module with its state here."""
    return [NativeStatus(name, module is not None, why) for name in MODULES for module, why in [_load(name)]]
