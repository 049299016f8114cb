"""Builds the native extension. Everything else about the package is in pyproject.toml.

QQUANT_NATIVE decides: ``auto`` (default) builds what this machine can build and says in one line what it cannot,
``1`` makes a failed build an error, ``0`` builds nothing. The package works without any compiled module.

Each extension is described by one function that returns it, or raises ``Unavailable`` with the reason. A module
that needs torch headers or nvcc joins ``EXTENSIONS`` with a function of its own, and nothing else changes.
"""

import os
import sys
from collections.abc import Callable
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

MODES = ("0", "1", "auto")
MODE = os.environ.get("QQUANT_NATIVE", "auto")
if MODE not in MODES:
    sys.exit(f"QQUANT_NATIVE must be one of {', '.join(MODES)}, got {MODE!r}")

# -g0: Python's own -g triples the object and slows the compiler. No -march=native: a binary must run on any machine of
# its architecture, and csrc/ chooses instructions at run time.
UNIX_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden"]
MSVC_FLAGS = ["/O2", "/std:c++17", "/EHsc"]


class Unavailable(Exception):
    """Something an extension needs is not on this machine; the message says what."""


def plain_extension(name: str, source: str) -> Extension:
    """A module of one C++ file that needs pybind11 and no torch."""
    try:
        import pybind11
    except ImportError as error:
        raise Unavailable("pybind11 is not installed; pip install pybind11") from error
    return Extension(name, [source], include_dirs=[pybind11.get_include()], language="c++")


# libtorch symbols newer than this release are left out, so that one binary serves it and every later torch.
TORCH_TARGET = "0x020b000000000000"  # 2.11


def torch_extension(name: str, sources: list[str]) -> Extension:
    """A module that adds kernels to torch's operators through libtorch's stable ABI; one binary for Python 3.11 on."""
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise Unavailable("torch is not installed where this builds; pip install --no-build-isolation") from error
    return Extension(
        name,
        sources,
        include_dirs=["qquant/csrc", *include_paths()],
        library_dirs=library_paths(),
        libraries=["torch", "torch_cpu", "c10"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", "0x030b0000")],
        py_limited_api=True,
        language="c++",
    )


EXTENSIONS: dict[str, Callable[[], Extension]] = {
    "qquant._host": lambda: plain_extension("qquant._host", "qquant/csrc/host.cpp"),  # what the processor can do
    "qquant._gram": lambda: plain_extension("qquant._gram", "qquant/csrc/gram.cpp"),  # Hessians of bfloat16 inputs
    "qquant._C": lambda: torch_extension("qquant._C", ["qquant/csrc/ops.cpp", *glob("qquant/csrc/cpu/*.cpp")]),
}


def give_up(name: str, reason: object) -> None:
    """Say once that a module will be missing and how to insist; under QQUANT_NATIVE=1 end the build instead."""
    if MODE == "1":
        raise SystemExit(f"error: {name} could not be built and QQUANT_NATIVE=1 asks for it: {reason}")
    print(f"qquant: {name} is not built ({reason}). The package works without it; QQUANT_NATIVE=1 insists.", flush=True)


def wanted_extensions() -> list[Extension]:
    """Every extension that this machine has the ingredients for."""
    found: list[Extension] = []
    if MODE == "0":
        return found
    for name, describe in EXTENSIONS.items():
        try:
            found.append(describe())
        except Unavailable as error:
            give_up(name, error)
    for extension in found:
        # Lets setuptools skip the copy step of a module whose compilation gave up.
        extension.optional = MODE == "auto"
    return found


class Build(build_ext):
    """Adds the compiler's flags and turns a failed compilation into one line."""

    def build_extension(self, ext: Extension) -> None:
        """Compile one module; under QQUANT_NATIVE=auto a failure leaves it out."""
        flags = MSVC_FLAGS if self.compiler.compiler_type == "msvc" else UNIX_FLAGS
        ext.extra_compile_args = [*(ext.extra_compile_args or []), *flags]
        ext.define_macros = [*(ext.define_macros or []), ("QQUANT_FLAGS", '"' + " ".join(flags) + '"')]
        if self.compiler.compiler_type != "msvc":
            ext.extra_link_args = [*(ext.extra_link_args or []), *([] if sys.platform == "darwin" else ["-s"])]
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):
            give_up(ext.name, "the C++ compiler failed, its message is above")
        except Exception as error:  # no compiler at all: distutils, setuptools and the system each raise their own kind
            give_up(ext.name, f"the C++ compiler did not run: {error}")


setup(ext_modules=wanted_extensions(), cmdclass={"build_ext": Build})
