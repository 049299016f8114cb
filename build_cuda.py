"""Compiles the CUDA kernels of qquant/csrc/cuda with nvcc. What becomes of the objects is setup.py's business.

torch's own CUDA builder is not used: it needs a CUDA build of torch, while these kernels include no torch header, so a
machine with nvcc and any torch, or none, can compile them. ninja runs the compilers. An object's name holds a hash of
everything it depends on, so that what has been compiled once is never compiled again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "qquant" / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
HEADERS = sorted([CSRC / "qq_cuda.h", *(CSRC / "cuda").glob("*.h")])

MODES = ("0", "1", "auto")
DEFAULT_ARCHS = "80;86;89;90;100"
OLDEST_ARCH = 80
"""The 8-bit products of csrc/cuda/ptx.h and conversion to bfloat16 begin here."""

FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v")


class CudaUnavailable(Exception):
    """The kernels cannot be compiled here; the message says what is missing or wrong."""


class Toolkit(NamedTuple):
    """A CUDA toolkit on this machine."""

    nvcc: str
    include: Path
    runtime: Path
    """libcudart_static.a; linked in, so that the module loads where no CUDA is."""
    version: str
    """All that ``nvcc --version`` says."""


class Resources(NamedTuple):
    """What ptxas says of one kernel on one architecture."""

    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    """Static; what a launch adds is not in it."""


def mode() -> str:
    """QQUANT_CUDA: 0 never, 1 required, auto where nvcc is found."""
    value = os.environ.get("QQUANT_CUDA", "auto")
    if value not in MODES:
        raise SystemExit(f"error: QQUANT_CUDA must be one of {', '.join(MODES)}, got {value!r}")
    return value


def archs() -> list[int]:
    """QQUANT_CUDA_ARCHS: compute capabilities such as "80;90", rising. The last is also kept as PTX, for later GPUs."""
    text = os.environ.get("QQUANT_CUDA_ARCHS", DEFAULT_ARCHS)
    parts = [part.strip().replace(".", "") for part in re.split("[; ,]", text) if part.strip()]
    if not parts or not all(part.isdecimal() and OLDEST_ARCH <= int(part) < 1000 for part in parts):
        raise SystemExit(
            f"error: QQUANT_CUDA_ARCHS must list compute capabilities from {OLDEST_ARCH} on, "
            f'such as "{DEFAULT_ARCHS}", got {text!r}'
        )
    return sorted({int(part) for part in parts})


def find_toolkit() -> Toolkit:
    """The toolkit of CUDA_HOME, of CUDA_PATH, or of the nvcc on PATH."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            nvcc = Path(home) / "bin" / "nvcc"
            if not nvcc.is_file():
                raise CudaUnavailable(f"{name} is {home}, where there is no bin/nvcc")
            return _toolkit_at(str(nvcc), Path(home))
    found = shutil.which("nvcc")
    if found is None:
        raise CudaUnavailable("nvcc is not on PATH, and neither CUDA_HOME nor CUDA_PATH is set")
    # What is on PATH may be a script that calls the real one, so it is asked where its toolkit is.
    top = re.search(r"^#\$ TOP=(.+)$", _run([found, "--dryrun", "-x", "cu", os.devnull]), re.MULTILINE)
    if top is None:
        raise CudaUnavailable(f"{found} does not say where its toolkit is; set CUDA_HOME")
    return _toolkit_at(found, Path(top[1].strip()).resolve())


def _toolkit_at(nvcc: str, home: Path) -> Toolkit:
    folders = [home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib"))]
    runtime = [folder / "libcudart_static.a" for folder in folders if (folder / "libcudart_static.a").is_file()]
    include = [folder for folder in (home / "include", *sorted(home.glob("targets/*/include"))) if folder.is_dir()]
    if not runtime or not include:
        raise CudaUnavailable(f"the toolkit in {home} has no libcudart_static.a or no headers")
    return Toolkit(nvcc, include[0], runtime[0], _run([nvcc, "--version"]))


def _run(command: list[str]) -> str:
    """What a command prints on both streams."""
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise CudaUnavailable(f"{command[0]} does not run: {error}") from error
    return result.stdout


def compile_kernels(toolkit: Toolkit, targets: list[int], folder: Path) -> list[Path]:
    """Compile every kernel file for every target, and return the objects.

    Args:
        toolkit: of ``find_toolkit``.
        targets: of ``archs``.
        folder: gets the objects, what ptxas says of each (``.ptxas``), and ninja's file. Objects there are kept.

    Raises:
        CudaUnavailable: ninja is missing, or a compilation failed; the compiler's message has then been printed.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in targets]
    codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
    command = [toolkit.nvcc, *FLAGS, *codes]
    common = b"\0".join(
        [" ".join(command).encode(), toolkit.version.encode(), *(path.read_bytes() for path in HEADERS)]
    )
    objects = {
        kernel: folder / f"{kernel.stem}-{hashlib.sha256(common + kernel.read_bytes()).hexdigest()[:16]}.o"
        for kernel in KERNELS
    }
    if all(target.exists() for target in objects.values()):
        return list(objects.values())
    # No inputs are named, since an object's name already holds them: ninja makes what is not there.
    lines = [
        "rule nvcc",
        f"  command = {_shell(command)} -c $kernel -o $out.part > $log 2>&1 && mv $out.part $out || (cat $log; false)",
        "  description = nvcc $name",
    ]
    for kernel, target in objects.items():
        log = target.with_suffix(".ptxas")
        lines += [f"build {_escape(target)}: nvcc", f"  name = {kernel.name}"]
        lines += [f"  kernel = {_shell([str(kernel)])}", f"  log = {_shell([str(log)])}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    if subprocess.run([_ninja(), "-C", str(folder), "--quiet", *jobs], check=False).returncode:
        raise CudaUnavailable("nvcc failed, its message is above")
    return list(objects.values())


def _ninja() -> str:
    """The ninja of this Python's environment, which pip brings, or of PATH."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise CudaUnavailable("ninja is not installed; pip install ninja") from None
        return found
    return str(Path(ninja.BIN_DIR) / "ninja")


def _shell(words: list[str]) -> str:
    """Words quoted for the shell, dollars doubled for ninja."""
    return " ".join("'" + word.replace("'", "'\\''") + "'" for word in words).replace("$", "$$")


def _escape(path: Path) -> str:
    """A path as ninja's build line takes it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def read_resources(objects: list[Path]) -> list[Resources]:
    """What ptxas said when these objects were compiled, one entry per kernel and architecture."""
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>\S+)' for '(?P<arch>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?[^\n]*",
        re.DOTALL,
    )
    found = []
    for target in objects:
        text = target.with_suffix(".ptxas").read_text(encoding="utf-8")
        # Cut at each kernel first, so that an absent number is never taken from the next one.
        for part in re.split(r"(?=ptxas info\s+: Compiling entry function)", text)[1:]:
            match = pattern.search(part)
            if match is None:
                raise ValueError(f"ptxas's report has another form than expected: {part[:200]!r}")
            spilled = int(match["stores"]) + int(match["loads"])
            found.append(
                Resources(
                    readable(match["kernel"]), match["arch"], int(match["registers"]), int(match["stack"]), spilled,
                    int(match["shared"] or 0),
                )
            )  # fmt: skip
    return sorted(found, key=lambda r: (r.kernel, int(r.arch.removeprefix("sm_"))))


def readable(mangled: str) -> str:
    """A kernel's name with its template arguments, as far as these kernels have any: ``attend<2, true>``."""
    rest, name = mangled.removeprefix("_ZN").removeprefix("_Z"), ""
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    if not rest.startswith("I"):
        return name
    arguments = re.findall(r"Li(\d+)E|Lb([01])E|NS_\d+(Float32|Float16|Bfloat16)E|N2qq\d+(\w+?)E", rest)
    words = [
        number or {"0": "false", "1": "true"}.get(flag, "") or short or full for number, flag, short, full in arguments
    ]
    return f"{name}<{', '.join(words)}>"
