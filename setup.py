"""Builds the native extension. Everything else about the package is in pyproject.toml.

QQUANT_NATIVE decides: ``auto`` (default) builds what this machine can build and says in one line what it cannot,
``1`` makes a failed build an error, ``0`` builds nothing. The package works without any compiled module.
QQUANT_CUDA decides likewise about the one module that needs nvcc, and QQUANT_CUDA_ARCHS which GPUs it is built for; see
docs/native.md.

Each extension is described by one function that returns it, or raises ``Unavailable`` with the reason. A module
that needs torch headers or nvcc joins ``EXTENSIONS`` with a function of its own, and nothing else changes.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # pip runs this file from elsewhere
import build_cuda

MODES = ("0", "1", "auto")
MODE = os.environ.get("QQUANT_NATIVE", "auto")
if MODE not in MODES:
    sys.exit(f"QQUANT_NATIVE must be one of {', '.join(MODES)}, got {MODE!r}")
CUDA_MODE, CUDA_ARCHS = build_cuda.mode(), build_cuda.archs()
if MODE == "0" and CUDA_MODE == "1":
    sys.exit("QQUANT_CUDA=1 asks for a module and QQUANT_NATIVE=0 for none; drop one of them")

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
        depends=["setup.py", *glob("qquant/csrc/*.h"), *glob("qquant/csrc/*/*.h")],
        py_limited_api=True,
        language="c++",
    )


class CudaExtension(Extension):
    """A torch extension with kernels, which nvcc compiles just before the C++ compiler does its part."""

    def __init__(self, plain: Extension, toolkit: build_cuda.Toolkit) -> None:
        super().__init__(
            plain.name,
            plain.sources,
            include_dirs=[*plain.include_dirs, str(toolkit.include)],
            library_dirs=plain.library_dirs,
            libraries=[*plain.libraries, "dl", "rt", "pthread"],
            define_macros=[
                *plain.define_macros,
                (
                    "QQUANT_CUDA_BUILT_FOR",
                    f'"{" ".join(f"sm_{arch}" for arch in CUDA_ARCHS)} compute_{CUDA_ARCHS[-1]}"',
                ),
            ],
            # The runtime's names stay inside: torch brings a runtime of its own.
            extra_link_args=["-Wl,--exclude-libs,ALL"],
            py_limited_api=True,
            language="c++",
        )
        self.toolkit = toolkit

    def compile_kernels(self) -> None:
        """Make the objects that the C++ compiler's will be linked with."""
        objects = build_cuda.compile_kernels(self.toolkit, CUDA_ARCHS, build_cuda.ROOT / "build" / "cuda")
        self.extra_objects = [str(path) for path in [*objects, self.toolkit.runtime]]


def cuda_extension(name: str, sources: list[str]) -> Extension:
    """The kernels for NVIDIA GPUs, where QQUANT_CUDA and this machine allow them."""
    if CUDA_MODE == "0":
        raise Unavailable("QQUANT_CUDA=0")
    try:
        return CudaExtension(torch_extension(name, sources), build_cuda.find_toolkit())
    except build_cuda.CudaUnavailable as error:
        raise Unavailable(str(error)) from error


EXTENSIONS: dict[str, Callable[[], Extension]] = {
    "qquant._host": lambda: plain_extension("qquant._host", "qquant/csrc/host.cpp"),  # what the processor can do
    "qquant._gram": lambda: plain_extension("qquant._gram", "qquant/csrc/gram.cpp"),  # Hessians of bfloat16 inputs
    "qquant._descent": lambda: plain_extension("qquant._descent", "qquant/csrc/descent.cpp"),  # codes one by one
    "qquant._C": lambda: torch_extension(
        "qquant._C", sorted(glob("qquant/csrc/*ops.cpp") + glob("qquant/csrc/cpu/*.cpp"))
    ),
    "qquant._C_cuda": lambda: cuda_extension("qquant._C_cuda", sorted(glob("qquant/csrc/cuda/*.cpp"))),
}


def give_up(name: str, reason: object, *, absent: bool = False) -> None:
    """Say once that a module will be missing and how to insist; where that was insisted on, end the build instead.

    Args:
        name: of the module.
        reason: why it will be missing.
        absent: something it needs is not here. A machine without nvcc is no failure unless QQUANT_CUDA=1 says so.
    """
    cuda = name == "qquant._C_cuda"
    if cuda and CUDA_MODE == "1":
        raise SystemExit(f"error: {name} could not be built and QQUANT_CUDA=1 asks for it: {reason}")
    if MODE == "1" and not (cuda and absent):
        raise SystemExit(f"error: {name} could not be built and QQUANT_NATIVE=1 asks for it: {reason}")
    insist = "QQUANT_CUDA=1" if cuda else "QQUANT_NATIVE=1"
    print(f"qquant: {name} is not built ({reason}). The package works without it; {insist} insists.", flush=True)


def wanted_extensions() -> list[Extension]:
    """Every extension that this machine has the ingredients for."""
    found: list[Extension] = []
    if MODE == "0":
        return found
    for name, describe in EXTENSIONS.items():
        try:
            found.append(describe())
        except Unavailable as error:
            give_up(name, error, absent=True)
    for extension in found:
        # Lets setuptools skip the copy step of a module whose compilation gave up; give_up knows when it may not.
        extension.optional = True
    return found


def compile_on_all_cores() -> None:
    """Have setuptools compile a module's files side by side, on MAX_JOBS cores or all; by itself it takes turns."""
    with suppress(ImportError):  # without pybind11 there is little to compile
        from pybind11.setup_helpers import ParallelCompile

        jobs = os.environ.get("MAX_JOBS", "")
        if jobs and not jobs.isdecimal():
            sys.exit(f"error: MAX_JOBS must be a number of compilers at a time, got {jobs!r}")
        if not jobs:
            os.environ.pop("MAX_JOBS", None)
        ParallelCompile("MAX_JOBS").install()


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
            if isinstance(ext, CudaExtension):
                ext.compile_kernels()  # which knows by itself what is up to date; setuptools does not
                self.force = True
            super().build_extension(ext)
        except build_cuda.CudaUnavailable as error:
            give_up(ext.name, error)
        except (CompileError, LinkError):
            give_up(ext.name, "the C++ compiler failed, its message is above")
        except Exception as error:  # no compiler at all: distutils, setuptools and the system each raise their own kind
            give_up(ext.name, f"the C++ compiler did not run: {error}")


compile_on_all_cores()
setup(ext_modules=wanted_extensions(), cmdclass={"build_ext": Build})
