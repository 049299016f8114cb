"""The CUDA kernels of packed linears, run thread by thread on a CPU by csrc/emu.h, against float64 and linear_ops.

Proves indexing, tails, groups, orders of columns, barriers, waits for copies and arithmetic. Says nothing of speed, of
races that need true concurrency, and of PTX: see docs/native.md.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from qquant import linear_ops
from tests.csrc.emulator import build
from tests.csrc.linear_emulator import LinearEmulator

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which("g++") is None, reason="compiles the kernels with g++ on Linux"
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BITS = {"int4": 4, "int8": 8}


class Case(NamedTuple):
    """One call: outputs of ``widths`` features from ``columns``, of which ``absent`` are no column of x."""

    tokens: int
    widths: tuple[int, ...]
    columns: int
    group: int
    zeros: bool = False
    absent: int | None = None
    """None: x's columns are in order."""
    bias: bool = False
    half_scales: bool = True
    splits: int = 1
    negative: bool = False
    """Half of the scales are."""


CASES = {
    "one_token": Case(1, (32,), 256, 128),
    "one_panel": Case(1, (16,), 128, 128, zeros=True),
    "three_panels_not_full": Case(2, (41,), 128, 128, bias=True),
    "siblings": Case(3, (40, 16, 7), 256, 64, zeros=True, bias=True),
    "columns_not_of_32": Case(4, (32,), 328, 328, zeros=True),
    "last_group_short": Case(1, (32,), 416, 128, zeros=True, half_scales=False),
    "groups_of_32": Case(5, (48,), 512, 32, zeros=True, splits=2),
    "groups_of_72": Case(2, (32,), 320, 72, zeros=True, bias=True),
    "groups_of_8": Case(1, (32,), 64, 8, zeros=True),
    "act_order": Case(7, (32,), 384, 128, zeros=True, absent=0),
    "act_order_padded": Case(2, (33,), 264, 64, zeros=True, absent=5, bias=True),
    "five_splits_some_empty": Case(1, (32,), 352, 32, splits=5, bias=True),
    "16_tokens": Case(16, (80,), 256, 128, zeros=True, splits=2),
    "17_tokens": Case(17, (48,), 256, 128, zeros=True, bias=True, half_scales=False),
    "33_tokens": Case(33, (32,), 256, 64, absent=3, splits=3),
    "negative_scales": Case(3, (48, 7), 256, 64, zeros=True, bias=True, negative=True),
    "negative_scales_of_16_tokens": Case(16, (32,), 256, 128, splits=2, negative=True),
    "64_tokens": Case(64, (16, 17), 128, 128, zeros=True, bias=True),
}


class Operands(NamedTuple):
    """The tensors of one call of panel_linear, as the operator takes them."""

    x: Tensor
    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bias: Tensor | None
    widths: list[int]
    bits: int
    group_size: int
    zero: int

    def on_gpu(self) -> Operands:
        zeros, order, bias = (None if part is None else part.cuda() for part in (self.zeros, self.order, self.bias))
        held = self._replace(x=self.x.cuda(), words=self.words.cuda(), scales=self.scales.cuda())
        return held._replace(zeros=zeros, order=order, bias=bias)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> LinearEmulator:
    # The base folder is shared by the workers of one run, and the file in it is named by its content.
    return LinearEmulator(build(tmp_path_factory.getbasetemp().parent / "qquant-emulator"))


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def either_order(request: pytest.FixtureRequest, emulator: LinearEmulator) -> Iterator[LinearEmulator]:
    """Threads of a block run from the first to the last, or from the last to the first."""
    emulator.reverse(request.param)
    yield emulator
    emulator.reverse(False)


def operands_of(case: Case, bits: int, dtype: torch.dtype, seed: int = 0) -> Operands:
    """Random words; scales over two orders of magnitude; activations with a channel far off the others."""
    generator = torch.Generator().manual_seed(seed)
    panels = sum(-(-width // 16) for width in case.widths)
    steps, groups = case.columns * bits // 32, -(-case.columns // case.group)
    words = torch.randint(-(2**31), 2**31, (panels, steps, 16), generator=generator, dtype=torch.int64).int()
    scales = 0.01 * 10 ** torch.randn(panels, groups, 16, generator=generator).clamp(-1, 1)
    if case.negative:
        scales *= 1 - 2 * torch.randint(0, 2, scales.shape, generator=generator)
    zeros = torch.randint(0, 2**bits, (panels, groups, 16), generator=generator, dtype=torch.uint8)
    features = case.columns - (case.absent or 0)
    x = torch.randn(case.tokens, features, generator=generator)
    x[:, features // 3] += 20
    order = torch.randperm(case.columns, generator=generator).int()
    order[order >= features] = -1
    bias = torch.randn(16 * panels, generator=generator)
    return Operands(
        x.to(dtype), words, scales.half() if case.half_scales else scales, zeros if case.zeros else None,
        None if case.absent is None else order, bias if case.bias else None, list(case.widths), bits, case.group,
        2 ** (bits - 1),
    )  # fmt: skip


def assert_close_to_float64(got: list[Tensor], given: Operands) -> None:
    """Hold results against float64, element by element, within what sums in float32 can cost.

    With u = 2^-24 and A the sum of |scale * (code - zero) * x|: a product of a whole number of 9 bits and a float16 or
    bfloat16 is exact in float32, one of a float32 is added without being rounded. The longest chain of additions in a
    group is as long as the group; each is rounded by u of what has been summed, and by 4 u where a tensor core cuts
    off and aligns to its largest product first. Sums of groups, 8 warps and up to 16 splits are rounded once each, a
    scale's product and the bias once. The result's own type rounds once on top.
    """
    u = 2.0**-24
    codes = linear_ops.codes_of(given.words, given.bits).double()
    group = torch.arange(codes.shape[1], device=codes.device) // given.group_size
    zero = given.zero if given.zeros is None else given.zeros.double().transpose(1, 2).flatten(0, 1)[:, group]
    weight = given.scales.double().transpose(1, 2).flatten(0, 1)[:, group] * (codes - zero)
    x = given.x.double()
    if given.order is not None:
        place = given.order.long()
        x = x[:, place.clamp(min=0)].masked_fill(place < 0, 0.0)
    want, size = x @ weight.T, x.abs() @ weight.abs().T
    chain = 4 * min(given.group_size, codes.shape[1]) + given.scales.shape[1] + 8 + 16 + 2
    allowed = chain * u * size
    if given.bias is not None:
        want = want + given.bias.double()
        allowed += u * want.abs()
    row = 0
    for part, width in zip(got, given.widths, strict=True):
        expected, most = want[:, row : row + width], allowed[:, row : row + width]
        if part.dtype != torch.float32:
            rounding = torch.finfo(part.dtype)
            most = most + rounding.eps / 2 * (expected.abs() + most) + rounding.smallest_normal
        assert part.shape == expected.shape
        assert part.isfinite().all()
        assert ((part.double() - expected).abs() <= most).all()
        row += -(-width // 16) * 16


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_products_are_exact_to_float32(case: Case, bits: int, dtype: torch.dtype, emulator: LinearEmulator) -> None:
    given = operands_of(case, bits, dtype)
    assert_close_to_float64(emulator.linear(*given, splits=case.splits), given)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
def test_the_bound_notices_one_column_left_out(bits: int, dtype: torch.dtype, emulator: LinearEmulator) -> None:
    given = operands_of(CASES["siblings"], bits, dtype)
    without = given.x.clone()
    without[:, 100] = 0
    with pytest.raises(AssertionError):
        assert_close_to_float64(emulator.linear(*given._replace(x=without), splits=1), given)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8, 9, 15, 24, 31, 32, 40, 63])
def test_any_number_of_tokens(tokens: int, emulator: LinearEmulator) -> None:
    given = operands_of(Case(tokens, (17,), 64, 32, zeros=True), 4, torch.bfloat16, seed=tokens)
    assert_close_to_float64(emulator.linear(*given, splits=1), given)


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed: int, emulator: LinearEmulator) -> None:
    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    generator = torch.Generator().manual_seed(seed)
    bits = (4, 8)[seed % 2]
    step = 32 // bits
    columns = step * pick(1, 60)
    widths = tuple(pick(1, 40) for _ in range(pick(1, 4)))
    case = Case(
        pick(1, 20), widths, columns, step * pick(1, 20), bool(pick(0, 2)), (None, pick(0, step))[pick(0, 2)],
        bool(pick(0, 2)), bool(pick(0, 2)), pick(1, 4),
    )  # fmt: skip
    given = operands_of(case, bits, list(DTYPES.values())[pick(0, 3)], seed)
    assert_close_to_float64(emulator.linear(*given, splits=case.splits), given)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["siblings", "act_order_padded", "five_splits_some_empty", "33_tokens"])
def test_the_order_threads_run_in_changes_nothing(name: str, dtype: torch.dtype, emulator: LinearEmulator) -> None:
    given = operands_of(CASES[name], 4, dtype)
    forwards = emulator.linear(*given, splits=CASES[name].splits)
    emulator.reverse(True)
    backwards = emulator.linear(*given, splits=CASES[name].splits)
    emulator.reverse(False)
    for one, other in zip(forwards, backwards, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("zero", [0, 1, "most"], ids=str)
@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
def test_zeros_at_either_end_are_exact(
    bits: int, zero: int | str, dtype: torch.dtype, emulator: LinearEmulator
) -> None:
    given = operands_of(Case(2, (16,), 128, 128), bits, dtype)
    given = given._replace(zero=2**bits if zero == "most" else int(zero))
    assert_close_to_float64(emulator.linear(*given, splits=1), given)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("room", [8, 3], ids=["still_aligned", "not_aligned"])
def test_rows_may_lie_apart(room: int, dtype: torch.dtype, emulator: LinearEmulator) -> None:
    given = operands_of(Case(5, (32,), 128, 64, zeros=True), 4, dtype)
    apart = torch.nn.functional.pad(given.x, (0, room), value=torch.nan)[:, :128]
    assert apart.stride(0) == 128 + room
    assert_close_to_float64(emulator.linear(*given._replace(x=apart), splits=1), given)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_token_that_is_not_finite_spoils_its_own_row_only(
    dtype: torch.dtype, bad: float, emulator: LinearEmulator
) -> None:
    given = operands_of(Case(6, (32,), 128, 64, zeros=True), 4, dtype)
    spoilt = given.x.clone()
    spoilt[2, 5] = bad
    [got] = emulator.linear(*given._replace(x=spoilt), splits=1)
    [want] = emulator.linear(*given, splits=1)
    assert not got[2].isfinite().any()
    got[2] = want[2]
    assert torch.equal(got, want)


def test_an_order_that_names_no_column_of_x_gives_nan_and_reads_nothing(emulator: LinearEmulator) -> None:
    given = operands_of(CASES["act_order"], 4, torch.bfloat16)
    assert given.order is not None
    order = given.order.clone()
    order[7] = given.x.shape[1]
    [got] = emulator.linear(*given._replace(order=order), splits=1)
    assert got.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
@pytest.mark.parametrize("half_scales", [True, False], ids=["float16_scales", "float32_scales"])
@pytest.mark.parametrize("columns", [8, 136, 1024, 1320])
def test_unpacked_weights_have_the_bits_of_the_reference(
    columns: int, half_scales: bool, bits: int, dtype: torch.dtype, either_order: LinearEmulator
) -> None:
    case = Case(1, (32,), columns, 72, zeros=bits == 4, half_scales=half_scales, negative=columns > 136)
    given = operands_of(case, bits, dtype)
    arguments = (given.words, given.scales, given.zeros, bits, given.group_size, given.zero, dtype)
    assert torch.equal(either_order.weights(*arguments), linear_ops.weights_reference(*arguments))


def test_unpacked_rows_that_begin_between_vectors(emulator: LinearEmulator) -> None:
    given = operands_of(Case(1, (16,), 2052, 36), 8, torch.float16)  # 513 steps of 4 columns
    arguments = (given.words, given.scales, given.zeros, 8, given.group_size, given.zero, torch.float16)
    assert torch.equal(emulator.weights(*arguments), linear_ops.weights_reference(*arguments))


@pytest.mark.parametrize("multiprocessors", [108, 132, 148])
def test_splits_fill_the_gpu_and_leave_none_empty(multiprocessors: int, emulator: LinearEmulator) -> None:
    for bits in (4, 8):
        for features, outputs in ((896, 896), (4096, 4096), (11008, 4096), (8192, 49152)):
            for tokens, along, pairs in ((1, 8, 1), (8, 4, 2), (16, 2, 4), (64, 1, 8)):
                splits = emulator.linear_splits(
                    multiprocessors, tokens=tokens, features=features, outputs=outputs, bits=bits, dtype=torch.bfloat16
                )
                chunks = features // 32
                stretch = -(-chunks // (splits * along))
                assert 1 <= splits <= 16
                assert splits == 1 or (splits - 1) * along * stretch < chunks
                blocks = -(-outputs // (32 * pairs)) * (2 if tokens > 32 else 1)
                if blocks >= 10 * multiprocessors:
                    assert splits == 1
                if splits == 1 and stretch > 32:  # long work on a grid that does not fill the GPU is cut
                    assert blocks > multiprocessors
