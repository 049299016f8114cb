"""The table of kernels for packed linears: its rows, each wish of the user, and places without compiled kernels."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
import torch

from qquant import doctor, linear_ops
from qquant.errors import UsageError
from qquant.linear_kernels import (
    ANY,
    CPU_LEVELS,
    OURS,
    TORCH,
    Kernel,
    Place,
    check_activation_bits,
    described,
    place_of,
    steps_of,
    wished,
)
from qquant.linear_torch import obstacle

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
HERE = place_of(torch.device("cpu"))
NOT_BUILT = "qquant._C: not built"


def cpu(level: str, missing: str = "", torch_set: str = "avx512") -> Place:
    return Place("cpu", level, torch_set, missing)


def cuda(level: str, missing: str = "") -> Place:
    return Place("cuda", level, level, missing)


def names(place: Place, dtype: torch.dtype = BF16, bits: int = 4, **wish: Any) -> list[tuple[int, str]]:
    return [(step.tokens, step.implementation.value) for step in steps_of(place, dtype=dtype, bits=bits, **wish)]


PANELS_FOR_ALL = [(ANY, "panels")]
EXPECTED: dict[str, tuple[Place, torch.dtype, list[tuple[int, str]]]] = {
    "bfloat16 instructions": (cpu("avx512_bf16"), BF16, [(32, "panels"), (ANY, "tile")]),
    "AMX": (cpu("amx_bf16"), BF16, [(15, "panels"), (ANY, "dense")]),
    "VNNI": (cpu("avx512_vnni"), BF16, PANELS_FOR_ALL),
    "AVX-512": (cpu("avx512"), BF16, PANELS_FOR_ALL),
    "AVX2": (cpu("avx2"), BF16, PANELS_FOR_ALL),
    "float32 beside bfloat16 instructions": (cpu("avx512_bf16"), FP32, PANELS_FOR_ALL),
    "float16 beside AMX": (cpu("amx_bf16"), FP16, PANELS_FOR_ALL),
    "portable": (cpu("portable"), FP32, [(15, "panels"), (ANY, "dense")]),
    "A100": (cuda("sm_80"), BF16, [(64, "panels"), (ANY, "dense")]),
    "B200, float16": (cuda("sm_100"), FP16, [(64, "panels"), (ANY, "dense")]),
    "H100, float32": (cuda("sm_90"), FP32, [(ANY, "dense")]),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("place", "dtype", "expected"), list(EXPECTED.values()), ids=list(EXPECTED))
def test_the_best_instruction_set_decides(
    place: Place, dtype: torch.dtype, expected: list[tuple[int, str]], bits: int
) -> None:
    assert names(place, dtype, bits) == expected
    assert names(place, dtype, bits, kernel="kernel") == expected


@pytest.mark.parametrize("table", [OURS, TORCH], ids=["ours", "torch's"])
def test_rows_of_one_case_rise_in_tokens_and_say_why(table: Any) -> None:
    cases: dict[tuple[Any, ...], int] = {}
    for row in table:
        assert row.why
        assert row.at_least in CPU_LEVELS or row.at_least.startswith("sm_")
        for dtype, bits in product(row.dtypes, row.bits):
            case = row.device, row.at_least, dtype, bits
            assert row.tokens > cases.get(case, 0)
            cases[case] = row.tokens
    if table is OURS:
        assert set(cases.values()) == {ANY}


@pytest.mark.parametrize("bits", [2, 3])
def test_widths_that_no_kernel_knows_run_the_reference(bits: int) -> None:
    assert names(cpu("avx512_bf16"), bits=bits) == [(ANY, "reference")]
    with pytest.raises(UsageError, match=f"no kernel serves {bits} bits with bfloat16"):
        steps_of(cpu("avx512_bf16"), dtype=BF16, bits=bits, kernel="kernel")


def test_a_dtype_that_no_kernel_knows_runs_the_reference() -> None:
    assert names(cpu("avx512_bf16"), torch.float64) == [(ANY, "reference")]


def test_a_device_that_no_kernel_knows_runs_the_reference() -> None:
    place = place_of(torch.device("meta"))
    assert names(place) == [(ANY, "reference")]
    assert "none for meta" in steps_of(place, dtype=BF16, bits=4)[0].why


WITHOUT: dict[str, tuple[Place, torch.dtype, int, str, list[tuple[int, str]]]] = {
    "int4 bf16": (cpu("avx512", NOT_BUILT), BF16, 4, "", [(128, "torch int4pack"), (ANY, "reference")]),
    "int4 bf16, AVX2": (cpu("avx2", NOT_BUILT, "avx2"), BF16, 4, "", [(ANY, "reference")]),
    "int4 fp32": (cpu("avx512", NOT_BUILT), FP32, 4, "", [(ANY, "reference")]),
    "int4 act-order": (cpu("avx512", NOT_BUILT), BF16, 4, "and it knows no act-order", [(ANY, "reference")]),
    "int8 row": (cpu("avx512", NOT_BUILT), BF16, 8, "", [(128, "torch int8pack"), (ANY, "reference")]),
    "int4 on a GPU": (cuda("sm_90", NOT_BUILT), BF16, 4, "", [(64, "torch int4pack"), (ANY, "reference")]),
    "int4 on an old GPU": (cuda("sm_75", NOT_BUILT), BF16, 4, "", [(ANY, "reference")]),
}


@pytest.mark.parametrize(("place", "dtype", "bits", "obstacle", "expected"), list(WITHOUT.values()), ids=list(WITHOUT))
def test_without_our_kernels_torchs_serve_what_they_can_and_the_reason_is_kept(
    place: Place, dtype: torch.dtype, bits: int, obstacle: str, expected: list[tuple[int, str]]
) -> None:
    assert names(place, dtype, bits, torch_obstacle=obstacle) == expected
    assert steps_of(place, dtype=dtype, bits=bits, torch_obstacle=obstacle)[-1].why == NOT_BUILT
    with pytest.raises(UsageError, match=r"needs our kernels for linears, qquant\._C: not built; choose 'auto'"):
        steps_of(place, dtype=dtype, bits=bits, kernel="kernel")


@pytest.mark.parametrize("place", [cpu("avx512_bf16"), cpu("avx512", NOT_BUILT), cuda("sm_90")], ids=str)
def test_the_reference_is_the_reference_everywhere(place: Place) -> None:
    for bits in (2, 3, 4, 8):
        assert names(place, bits=bits, kernel=Kernel.REFERENCE) == [(ANY, "reference")]


def test_torchs_kernel_serves_any_number_of_tokens_for_whoever_asks() -> None:
    assert names(cpu("avx512_bf16"), kernel="torch") == [(ANY, "torch int4pack")]
    assert names(cuda("sm_90"), kernel="torch") == [(ANY, "torch int4pack")]
    with pytest.raises(UsageError, match="and it knows no act-order; choose 'auto'"):
        steps_of(cpu("avx512"), dtype=BF16, bits=4, kernel="torch", torch_obstacle="and it knows no act-order")
    with pytest.raises(UsageError, match="it has none for 4 bits and float32 on CPU"):
        steps_of(cpu("avx512"), dtype=FP32, bits=4, kernel="torch")


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_eight_bit_activations_are_one_kernel_for_all_tokens(dtype: torch.dtype) -> None:
    for level in CPU_LEVELS:
        assert names(cpu(level), dtype, activation_bits=8) == [(ANY, "int8")]


REFUSED: dict[str, tuple[Place, dict[str, Any], str]] = {
    "a GPU": (cuda("sm_90"), {}, "and this layer is on cuda"),
    "not built": (cpu("avx512", NOT_BUILT), {}, "not built"),
    "3 bits": (cpu("avx512"), {"bits": 3}, "there is none for 3 bits"),
    "the reference": (cpu("avx512"), {"kernel": "reference"}, "kernel 'reference' is not one"),
    "torch's kernels": (cpu("avx512"), {"kernel": "torch"}, "kernel 'torch' is not one"),
    "4 bits of activations": (
        cpu("avx512"),
        {"activation_bits": 4},
        "activation_bits must be 8, or left out .*, got 4",
    ),
}


@pytest.mark.parametrize(("place", "wish", "message"), list(REFUSED.values()), ids=list(REFUSED))
def test_eight_bit_activations_elsewhere_are_an_error(place: Place, wish: dict[str, Any], message: str) -> None:
    options = {"dtype": BF16, "bits": 4, "activation_bits": 8, **wish}
    with pytest.raises(UsageError, match=message):
        steps_of(place, **options)


@pytest.mark.parametrize("kernel", ["auto", "reference", "kernel", "torch"])
def test_a_plain_string_names_a_kernel(kernel: str) -> None:
    assert wished(kernel) == kernel
    assert wished(wished(kernel)) is Kernel(kernel)


def test_a_word_that_names_no_kernel_is_refused() -> None:
    with pytest.raises(UsageError, match="must be one of auto, reference, kernel, torch, got 'fast'"):
        wished("fast")


def test_what_is_no_word_is_refused_as_it_came() -> None:
    with pytest.raises(UsageError, match=r"got None$"):
        wished(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", ["8", 5, 8.0, True, 0], ids=repr)
def test_bits_that_activations_cannot_be_rounded_to_are_refused_as_they_came(bits: Any) -> None:
    with pytest.raises(UsageError, match=f"activation_bits must be 8, or left out .*, got {re.escape(repr(bits))}$"):
        check_activation_bits(bits)


def test_what_keeps_torchs_int4_kernel_from_a_layer_is_named() -> None:
    layer: dict[str, Any] = {"bits": 4, "group_size": 32, "ordered": True, "one_zero": 8}
    assert not obstacle(**layer, rows=64, columns=96, device="cpu")
    assert "multiple of 16 outputs, this layer has 72" in obstacle(**layer, rows=72, columns=96, device="cpu")
    assert "multiple of 128 inputs, this layer has 96" in obstacle(**layer, rows=64, columns=96, device="cuda")


def test_what_is_chosen_is_said_in_one_line() -> None:
    place = cpu("avx512_bf16")
    assert described(steps_of(place, dtype=BF16, bits=4), place) == (
        "AVX-512 VNNI kernel to 32 tokens (each weight is read once and never dequantized), "
        "bf16 tiles from 33 (weights rounded to bfloat16 once, tile by tile in cache, at the rate of bfloat16 products)"
    )
    place = cpu("avx512", NOT_BUILT)
    assert described(steps_of(place, dtype=FP32, bits=4), place) == (
        "reference (dequantize, multiply) (qquant._C: not built)"
    )


def test_this_processor_has_an_instruction_set_of_the_table() -> None:
    assert HERE.instruction_set in CPU_LEVELS
    built = torch._C._dispatch_has_kernel_for_dispatch_key("qquant::panel_linear", "CPU")
    assert built == (HERE.missing == "")
    assert linear_ops.PANEL_ROWS == 16


def test_doctor_says_what_serves_each_width_and_dtype() -> None:
    rows = {row["name"]: row for row in doctor.examine() if row["area"] == "linear"}
    assert [name for name in rows if name.endswith("cpu")] == [
        f"int{bits} {dtype} cpu" for bits in (4, 8) for dtype in ("bfloat16", "float16", "float32")
    ]
    expected = described(steps_of(HERE, dtype=BF16, bits=4), HERE)
    assert rows["int4 bfloat16 cpu"]["found"] == expected
    assert rows["int4 bfloat16 cpu"]["state"] == ("absent" if HERE.missing else "ok")
