"""The kernel that moves words into panels and back, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.test_linear_sanitized import FLAGS, KERNELS, ROOT, compiler

SOURCES = [ROOT / "tests" / "csrc" / "pack_harness.cpp", *(KERNELS / f"{name}.cpp" for name in ("isa", "pack_panels"))]
CASES = 300

pytestmark = pytest.mark.slow  # compiles


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of tests/csrc, compiled with both sanitizers."""
    made = tmp_path_factory.mktemp("sanitized") / "pack"
    command = [compiler(), *FLAGS, "-O0", *map(str, SOURCES), "-o", str(made)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return made


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_code_is_where_it_belongs_and_nothing_else_is_touched(program: Path, isa: str) -> None:
    environment = {**os.environ, "QQUANT_CPU_ISA": isa}
    environment.pop("LD_PRELOAD", None)  # another allocator must not come before the sanitizer's
    command = [str(program), str(CASES)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-8000:]
    if not result.stdout.startswith(f"{isa}: "):
        pytest.skip(f"this processor has no {isa}")
    assert f"{CASES} cases, all right" in result.stdout
