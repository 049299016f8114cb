"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, each in the program that csrc/ has for it.

The programs need neither torch nor Python, and their buffers end where the last element does. They check results too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "qquant" / "csrc" / "cpu"
PROGRAMS = {name: ROOT / "tests" / "csrc" / f"{name}_harness.cpp" for name in ("linear", "dense", "kv")}
SOURCES = [KERNELS / "isa.cpp", *(path for name in PROGRAMS for path in sorted(KERNELS.glob(f"{name}*.cpp")))]
FLAGS = [
    "-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    f"-I{KERNELS}", f"-I{ROOT / 'tests' / 'csrc'}",
]  # fmt: skip
CASES = {"linear": 160, "dense": 80, "kv": 20}
"""Ten for each number of tokens of the linear program, of the dense one; every tenth of the last has several splits."""

pytestmark = pytest.mark.slow  # compiles


def compiler() -> str:
    """g++ where it is there with both sanitizers' libraries; skips otherwise."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("g++ is not installed")
    for library in ("libasan.so", "libubsan.so"):
        answer = subprocess.run([found, f"-print-file-name={library}"], capture_output=True, text=True, check=True)
        if not Path(answer.stdout.strip()).is_absolute():
            pytest.skip(f"g++ lacks {library}")
    return found


def precompiled(gxx: str, folder: Path) -> Path:
    """The headers that kernels begin with in the compiler's own form; reading them takes as long as most kernels."""
    header = folder / "shared.h"
    header.write_text('#include <algorithm>\n\n#include "isa.h"\n')
    command = [gxx, *FLAGS, "-O0", "-x", "c++-header", str(header), "-o", f"{header}.gch"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return header


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs are, compiled file by file on all processors."""
    gxx, folder = compiler(), tmp_path_factory.mktemp("sanitized")
    shared = precompiled(gxx, folder)
    waiting, running = [*PROGRAMS.values(), *SOURCES], list[subprocess.Popen[str]]()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            source = waiting.pop(0)
            # Unrolled kernels take longer to optimize than to run as they are; what checks them does not.
            options = ["-O1"] if source in PROGRAMS.values() else ["-O0", "-Winvalid-pch", "-include", str(shared)]
            command = [gxx, *FLAGS, *options, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        first = running.pop(0)
        said = first.communicate()[1]
        assert first.returncode == 0, said
    for name, program in PROGRAMS.items():
        objects = [str(folder / f"{source.stem}.o") for source in (program, *SOURCES)]
        command = [gxx, *FLAGS, *objects, "-o", str(folder / name)]
        linked = subprocess.run(command, capture_output=True, text=True, check=False)
        assert linked.returncode == 0, linked.stderr
    return folder


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"])
@pytest.mark.parametrize("program", list(PROGRAMS))
def test_kernels_meet_double_precision_and_stay_within_their_buffers(folder: Path, program: str, isa: str) -> None:
    environment = {**os.environ, "QQUANT_CPU_ISA": isa}
    environment.pop("LD_PRELOAD", None)  # another allocator must not come before the sanitizer's
    command = [str(folder / program), str(CASES[program])]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-8000:]
    if not result.stdout.startswith(f"{isa}: "):
        pytest.skip(f"this processor has no {isa}")
    assert f"{CASES[program]} cases, all right" in result.stdout
