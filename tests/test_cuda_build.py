"""The CUDA module as the compilers make it, on a machine that has nvcc and need not have a GPU.

Objects of an earlier build are used where nothing they depend on has changed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import build_cuda
from build_cuda import Resources
from qquant import _native

ROOT = Path(__file__).parent.parent
ARCHS = [80, 86, 89, 90, 100]

REGISTERS = {
    r"append_\w+<.*>": 40,
    r"dequantize_\w+<.*>": 48,
    r"join_splits": 48,
    r"attend<1, .*>": 128,  # four blocks of 128 threads
    r"attend<2, .*>": 200,  # two blocks before compute capability 9.0
    r"attend<4, .*>": 255,  # two blocks of 64 threads
    r"multiply_tiles<.*, 1>": 80,  # three blocks of 256 threads
    r"multiply_tiles<.*, [24]>": 128,  # two blocks
    r"multiply_float32<.*>": 128,
    r"arrange_activations<.*>|join_linear_splits": 40,
    r"unpack_panels<.*>": 40,  # six blocks of 256 threads at least
}
"""Most registers of a thread, by kernel; more than these would cost blocks."""
THREE_BLOCKS = 168
"""Most registers of attend<2> from 9.0 on, where shared memory holds three blocks of 128 threads."""
STACK = {("attend<4, true>", "sm_80"): 8, ("attend<4, false>", "sm_80"): 8}
"""Bytes of local memory that are known and bearable: two words read once per tile of 32 tokens of heads above 128."""


def toolkit_or_skip() -> build_cuda.Toolkit:
    try:
        return build_cuda.find_toolkit()
    except build_cuda.CudaUnavailable as error:
        pytest.skip(f"compiles the kernels: {error}")


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    return build_cuda.compile_kernels(toolkit_or_skip(), ARCHS, ROOT / "build" / "cuda")


@pytest.fixture(scope="module")
def resources(objects: list[Path]) -> list[Resources]:
    return build_cuda.read_resources(objects)


def setup_with(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py, which only looks around and builds nothing, in an environment of its own."""
    env = {**os.environ, "QQUANT_NATIVE": "auto", **environment}
    command = [sys.executable, "setup.py", "-q", *(arguments or ["--version"])]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)


def path_without_nvcc() -> str:
    folders = os.environ.get("PATH", "").split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not (Path(folder) / "nvcc").exists())


WITHOUT_NVCC = {"PATH": path_without_nvcc(), "CUDA_HOME": "", "CUDA_PATH": ""}


def test_every_kernel_is_compiled_for_every_architecture(resources: list[Resources]) -> None:
    found = {(r.kernel, r.arch) for r in resources}
    kernels = {r.kernel for r in resources}
    assert {kernel.partition("<")[0] for kernel in kernels} == {
        "append_groups", "append_elements", "dequantize_groups", "dequantize_elements", "attend", "join_splits",
        "multiply_tiles", "multiply_float32", "arrange_activations", "join_linear_splits", "unpack_panels",
    }  # fmt: skip
    assert found == {(kernel, f"sm_{arch}") for kernel in kernels for arch in ARCHS}


def test_no_kernel_uses_local_memory(resources: list[Resources]) -> None:
    over = [r for r in resources if r.stack_bytes > STACK.get((r.kernel, r.arch), 0)]
    assert not over, "; ".join(f"{r.kernel} {r.arch}: {r.stack_bytes} bytes" for r in over)


def test_registers_leave_room_for_the_planned_blocks(resources: list[Resources]) -> None:
    for r in resources:
        [budget] = [most for pattern, most in REGISTERS.items() if re.fullmatch(pattern, r.kernel)]
        if r.kernel.startswith("attend<2") and r.arch in ("sm_90", "sm_100"):
            budget = THREE_BLOCKS
        assert r.registers <= budget, f"{r.kernel} on {r.arch} takes {r.registers} registers, more than {budget}"


def disassembly(target: Path, arch: int) -> dict[str, str]:
    """SASS of each kernel in an object, by the name that ptxas gives it."""
    tools = [shutil.which("cuobjdump")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        tools.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    tool = next((tool for tool in tools if tool and Path(tool).exists()), None)
    if tool is None:
        pytest.skip("reads machine code with cuobjdump, which is neither on PATH nor in a triton wheel")
    # cuobjdump calls nvdisasm from PATH.
    env = {**os.environ, "PATH": f"{Path(tool).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [tool, "-arch", f"sm_{arch}", "-sass", str(target)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    parts = re.split(r"Function : (\S+)", text)[1:]
    return {build_cuda.readable(name): code for name, code in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.parametrize("arch", ARCHS)
def test_attention_copies_16_bytes_at_a_time_and_multiplies_on_tensor_cores(arch: int, objects: list[Path]) -> None:
    [target] = [path for path in objects if path.name.startswith("kv_attention")]
    code = disassembly(target, arch)
    for segments in (1, 2, 4):
        kernel = code[f"attend<{segments}, true>"]
        assert len(re.findall(r"LDGSTS\.E\.BYPASS\.128", kernel)) >= 8
        assert len(re.findall(r"IMMA\.16832\.S8\.U8", kernel)) >= 16 * min(segments, 2)
        assert len(re.findall(r"IMMA\.16832\.U8\.U8", kernel)) == 12 * segments
    assert not re.findall(r"\b(?:LDL|STL)\b", code["attend<2, true>"])


@pytest.mark.parametrize("arch", ARCHS)
def test_linears_copy_16_bytes_at_a_time_and_multiply_on_tensor_cores(arch: int, objects: list[Path]) -> None:
    [target] = [path for path in objects if path.name.startswith("linear_tiles")]
    code = disassembly(target, arch)
    for dtype, name in (("Float16", r"HMMA\.16816\.F32 "), ("Bfloat16", r"HMMA\.16816\.F32\.BF16")):
        for bits in (4, 8):
            for tiles in (1, 2, 4):
                kernel = code[f"multiply_tiles<{dtype}, {bits}, {tiles}>"]
                assert len(re.findall(name, kernel)) == 4 * tiles  # of a chunk: 32 rows, 32 columns
                assert len(re.findall(r"LDGSTS\.E\.BYPASS\.128", kernel)) >= 4  # words
                assert len(re.findall(r"LDGSTS\.E\.128", kernel)) >= 4  # activations
                assert not re.findall(r"\b(?:LDL|STL)\b", kernel)


@pytest.mark.parametrize("arch", ARCHS)
def test_codes_of_4_bits_become_numbers_in_two_instructions(arch: int, objects: list[Path]) -> None:
    """A pair takes one LOP3 with mask and power of two, and one addition; a second LOP3 is what C++ alone gives."""
    [target] = [path for path in objects if path.name.startswith("linear_tiles")]
    kernel = disassembly(target, arch)["multiply_tiles<Float16, 4, 1>"]
    assert len(re.findall(r"LOP3\.LUT \S+ \S+ 0xf000f, \S+ 0xea", kernel)) == 16
    assert len(re.findall(r"\bHADD2 ", kernel)) == 16


@pytest.mark.parametrize("arch", ARCHS)
def test_unpacking_reads_and_writes_16_bytes_at_a_time(arch: int, objects: list[Path]) -> None:
    [target] = [path for path in objects if path.name.startswith("linear_weights")]
    kernel = disassembly(target, arch)["unpack_panels<Bfloat16, 4>"]
    assert re.findall(r"LDG\.E(?:\.NA)?\.128(?:\.CONSTANT)?", kernel)
    assert re.findall(r"STG\.E\.128", kernel)
    assert not re.findall(r"STG\.E\.U16", kernel)


@pytest.mark.parametrize("arch", ARCHS)
def test_append_and_dequantize_move_whole_groups(arch: int, objects: list[Path]) -> None:
    [append] = [path for path in objects if path.name.startswith("kv_append")]
    [dequantize] = [path for path in objects if path.name.startswith("kv_dequantize")]
    assert "LDG.E.128" in disassembly(append, arch)["append_groups<Bfloat16, 16>"]
    code = disassembly(dequantize, arch)["dequantize_groups<Bfloat16>"]
    assert len(re.findall(r"LDG\.E\.64", code)) == 4
    assert len(re.findall(r"STG\.E\.128", code)) == 4


def live_or_skip() -> None:
    _native.load_torch_ops()
    [state] = [state for state in _native.status() if state.name == "qquant._C_cuda"]
    if not state.live:
        pytest.skip(f"needs qquant._C_cuda: {state.why}")


def test_the_module_loads_and_says_what_it_was_built_for() -> None:
    live_or_skip()
    said = torch.ops.qquant.cuda_build_info()
    assert re.search(r"archs: sm_\d+", said)
    if not torch.cuda.is_available():
        assert re.search(r"devices: none \(error \d+: .+\)", said)


def test_every_operator_has_a_kernel_for_cuda() -> None:
    live_or_skip()
    for name in ("kv_append", "kv_dequantize", "kv_decode_attention", "panel_linear", "panel_weights"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qquant::{name}", "CUDA")


def test_0_leaves_the_module_out_and_says_so() -> None:
    result = setup_with({"QQUANT_CUDA": "0"})
    assert result.returncode == 0
    assert "qquant._C_cuda is not built (QQUANT_CUDA=0)" in result.stdout


def test_auto_without_nvcc_says_what_is_missing_and_goes_on() -> None:
    result = setup_with(WITHOUT_NVCC)
    assert result.returncode == 0
    assert "qquant._C_cuda is not built (nvcc is not on PATH" in result.stdout


def test_1_without_nvcc_ends_the_build_with_one_line() -> None:
    result = setup_with({**WITHOUT_NVCC, "QQUANT_CUDA": "1"})
    assert result.returncode != 0
    assert (
        result.stderr.strip().splitlines()[-1].startswith("error: qquant._C_cuda could not be built and QQUANT_CUDA=1")
    )
    assert "Traceback" not in result.stderr


def test_insisting_on_native_modules_does_not_insist_on_nvcc() -> None:
    assert setup_with({**WITHOUT_NVCC, "QQUANT_NATIVE": "1"}).returncode == 0


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("QQUANT_CUDA", "yes", "QQUANT_CUDA must be one of 0, 1, auto, got 'yes'"),
        ("QQUANT_CUDA_ARCHS", "hopper", "QQUANT_CUDA_ARCHS must list compute capabilities from 80 on"),
        ("QQUANT_CUDA_ARCHS", "70;90", "QQUANT_CUDA_ARCHS must list compute capabilities from 80 on"),
        ("QQUANT_CUDA_ARCHS", ";", "QQUANT_CUDA_ARCHS must list compute capabilities from 80 on"),
    ],
    ids=["unknown_mode", "no_number", "too_old", "empty"],
)
def test_a_wrong_setting_is_one_clear_line(name: str, value: str, rule: str) -> None:
    result = setup_with({name: value})
    assert result.returncode != 0
    assert rule in result.stderr
    assert "Traceback" not in result.stderr


def test_a_toolkit_that_is_not_there_is_named() -> None:
    result = setup_with({"CUDA_HOME": "/nowhere", "QQUANT_CUDA": "1"})
    assert "CUDA_HOME is /nowhere, where there is no bin/nvcc" in result.stderr


@pytest.mark.parametrize(
    ("written", "read"),
    [("80;90", [80, 90]), ("9.0, 8.0", [80, 90]), ("90 90", [90])],
    ids=["semicolon", "comma", "twice"],
)
def test_architectures_are_read_in_any_common_form(
    written: str, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QQUANT_CUDA_ARCHS", written)
    assert build_cuda.archs() == read


def test_a_second_compilation_runs_no_compiler(objects: list[Path]) -> None:
    toolkit = build_cuda.find_toolkit()
    before = [path.stat().st_mtime_ns for path in objects]
    again = build_cuda.compile_kernels(toolkit, ARCHS, ROOT / "build" / "cuda")
    assert again == objects
    assert [path.stat().st_mtime_ns for path in again] == before
