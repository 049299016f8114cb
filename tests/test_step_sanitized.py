"""What one decoding step does beside its linears, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.test_linear_sanitized import FLAGS, KERNELS, ROOT, compiler

PROGRAM = ROOT / "tests" / "csrc" / "step_harness.cpp"
SOURCES = [PROGRAM, *(KERNELS / f"{name}.cpp" for name in ("isa", "rms_norm", "plain_attention", "layer_step"))]
CASES = 400
"""A hundred of each kind."""

pytestmark = pytest.mark.slow  # compiles


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of tests/csrc, compiled with both sanitizers."""
    made = tmp_path_factory.mktemp("sanitized") / "step"
    result = subprocess.run([compiler(), *FLAGS, "-O0", *map(str, SOURCES), "-o", made], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return made


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_kernels_meet_double_precision_and_stay_within_their_buffers(program: Path, isa: str) -> None:
    environment = {**os.environ, "QQUANT_CPU_ISA": isa}
    environment.pop("LD_PRELOAD", None)  # another allocator must not come before the sanitizer's
    result = subprocess.run([program, str(CASES)], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-8000:]
    if not result.stdout.startswith(f"{isa}: "):
        pytest.skip(f"this processor has no {isa}")
    assert f"{CASES} cases, all right" in result.stdout
