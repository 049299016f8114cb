"""The operators of packed linears: kernels against float64 and against the references of linear_ops.py.

What linears they are asked is drawn by linear_cases.py; the same kernels without torch are in csrc/linear_harness.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qquant import _native, linear_ops
from tests import linear_cases
from tests.isa_runs import Outcome, run_for_each
from tests.linear_cases import Call, Case, expected, make

LIVE = any(module.live for module in _native.status() if module.name == "qquant._C")
TILES = LIVE and "avx512_bf16" in torch.ops.qquant.cpu_kernel_info()
needs_kernels = pytest.mark.skipif(not LIVE, reason="the CPU kernels (qquant._C) are not built")
needs_tiles = pytest.mark.skipif(not TILES, reason="no bfloat16 tile kernel here")

ARITHMETICS = [
    pytest.param(0, id="exact"),
    pytest.param(8, id="int8_activations"),
    pytest.param(-1, id="tiles", marks=needs_tiles),
]
bounded = settings(deadline=None, derandomize=True, max_examples=60, database=None)

CASES = {
    "decode": Case(tokens=1, columns=512, widths=(64,)),
    "int8": Case(tokens=1, columns=512, widths=(64,), bits=8),
    "float16": Case(dtype=torch.float16, with_zeros=True),
    "float32": Case(dtype=torch.float32, half_scales=False),
    "float32_many": Case(tokens=40, dtype=torch.float32, bits=8, with_bias=True),
    "three_linears": Case(tokens=5, widths=(48, 17, 1), with_bias=True),
    "small_groups": Case(group_size=8, columns=264, with_zeros=True),
    "a_group_of_the_whole_row": Case(tokens=9, group_size=400, columns=400, bits=8),
    "a_ragged_last_group": Case(group_size=160, columns=392, with_zeros=True, with_bias=True),
    "act_order": Case(tokens=2, columns=320, with_order=True, with_zeros=True),
    "one_word": Case(columns=8, group_size=8, widths=(1,)),
    "prefill": Case(tokens=70, columns=384, widths=(80, 80)),
    "more_than_tiles_hold_at_once": Case(tokens=530, columns=1024, widths=(40,), with_zeros=True),
    "prefill_of_int8": Case(tokens=33, columns=260, group_size=128, bits=8, with_order=True, with_zeros=True),
    "negative_scales": Case(tokens=1, columns=512, widths=(64,), negative_scales=True),
    "negative_scales_of_int8": Case(tokens=12, bits=8, negative_scales=True, with_zeros=True, with_order=True),
    "negative_scales_int8_activations": Case(tokens=9, group_size=32, negative_scales=True, activation_bits=8),
    "negative_scales_int8_both": Case(tokens=1, bits=8, negative_scales=True, activation_bits=8),
    "int8_activations": Case(tokens=7, activation_bits=8, with_bias=True),
    "int8_activations_of_many": Case(tokens=65, bits=8, with_zeros=True, activation_bits=8),
}


def run(call: Call, **changes: Any) -> Tensor:
    """The operator's results side by side, each checked for what every result is."""
    given_call = Call(*call.arguments(**changes))
    found = linear_ops.panel_linear(*given_call.arguments())
    for width, part in zip(given_call.widths, found, strict=True):
        assert part.shape == (*given_call.x.shape[:-1], width)
        assert part.dtype == given_call.x.dtype
        assert part.is_contiguous()
    return torch.cat(found, -1)


def check_product(case: Case) -> None:
    """A kernel, or the reference, within the derived bound of float64."""
    call = make(case)
    got = run(call).double()
    product, bound = expected(call)
    assert ((got - product).abs() <= bound).all(), float(((got - product).abs() / bound).max())
    if case.activation_bits == 8:
        product, bound = expected(call, rounded=True)
        assert ((got - product).abs() <= bound).all(), float(((got - product).abs() / bound).max())


def check_weights(case: Case, dtype: torch.dtype) -> None:
    call = make(case)
    given_weights = (call.words, call.scales, call.zeros, call.bits, call.group_size, call.zero, dtype)
    assert torch.equal(linear_ops.panel_weights(*given_weights), linear_ops.weights_reference(*given_weights))


def check_kernels() -> None:
    """Every check of this file that an instruction set could break."""
    tiles = "avx512_bf16" in torch.ops.qquant.cpu_kernel_info()
    for case in CASES.values():
        check_product(case)
        for dtype in linear_cases.UNIT:
            check_weights(case, dtype)
        if tiles and case.dtype == torch.bfloat16 and case.activation_bits == 0:
            check_product(Case(**{**vars(case), "activation_bits": -1}))


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def test_results_are_within_the_derived_bound(case: Case) -> None:
    check_product(case)


@pytest.mark.parametrize("activation_bits", ARITHMETICS)
def test_any_linear_is_within_the_derived_bound(activation_bits: int) -> None:
    @bounded
    @given(linear_cases.drawn(activation_bits))
    def holds(drawn: Case) -> None:
        check_product(drawn)

    holds()


@bounded
@given(linear_cases.drawn(0), st.sampled_from(list(linear_cases.UNIT)))
def test_weights_have_the_bits_of_the_reference(drawn: Case, dtype: torch.dtype) -> None:
    check_weights(drawn, dtype)


@bounded
@given(st.integers(1, 9), st.integers(1, 50), st.integers(0, 2**16))
def test_panels_give_the_words_back(steps: int, rows: int, seed: int) -> None:
    words = torch.randint(-(2**31), 2**31, (steps, rows), generator=torch.Generator().manual_seed(seed)).int()
    panels = torch.empty(-(-rows // 16), steps, 16, dtype=torch.int32)
    linear_ops.fill_panels(panels, words)
    assert torch.equal(linear_ops.from_panels(panels, rows), words)


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_error_is_no_worse_than_that_of_bfloat16_on_the_unpacked_weight(tokens: int, bits: int) -> None:
    """Root mean square against float64; plain bfloat16 rounds the weight as well, as tiles do.

    Measured with AVX-512 VNNI: 0.67 to 0.79 times the error of ``F.linear`` on the weight unpacked to bfloat16.
    """
    call = make(Case(tokens=tokens, columns=2048, widths=(512,), bits=bits, with_zeros=True))
    product = call.x.double() @ linear_cases.exact_weights(call).T
    weight = linear_ops.panel_weights(
        call.words, call.scales, call.zeros, call.bits, call.group_size, call.zero, torch.bfloat16
    )
    plain = torch.nn.functional.linear(call.x, weight)
    plain_error = (plain.double() - product).square().mean().sqrt()
    assert (run(call).double() - product).square().mean().sqrt() <= plain_error


@needs_kernels
@pytest.mark.parametrize("activation_bits", ARITHMETICS)
def test_a_row_does_not_depend_on_the_others(activation_bits: int) -> None:
    for bits in (4, 8):
        call = make(Case(tokens=70, columns=384, bits=bits, widths=(40, 16), activation_bits=activation_bits))
        together = run(call)
        for first, last in ((0, 1), (1, 3), (3, 8), (8, 24), (24, 70), (69, 70)):
            assert torch.equal(run(call, x=call.x[first:last]), together[first:last])


@needs_kernels
@pytest.mark.parametrize("activation_bits", ARITHMETICS)
@pytest.mark.parametrize("tokens", [1, 6, 150])
def test_results_are_the_same_for_one_thread_and_two(tokens: int, activation_bits: int, two_threads: None) -> None:
    # Large enough to be split: see kGrainBytes and kGrainValues of csrc/linear_ops.cpp.
    call = make(Case(tokens=tokens, columns=1024, widths=(600, 40), activation_bits=activation_bits))
    both = run(call)
    torch.set_num_threads(1)
    assert torch.equal(both, run(call))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "part_of_wider_rows": lambda x: torch.nn.functional.pad(x, (3, 5))[:, 3:-5],
    "every_second_row": lambda x: torch.stack([x, torch.zeros_like(x)], 1).flatten(0, 1)[::2],
    "columns_first": lambda x: x.T.contiguous().T,
    "every_second_column": lambda x: torch.stack([x, x], -1).flatten(1)[:, ::2],
    "three_axes": lambda x: x.view(2, 3, -1),
    "three_axes_transposed": lambda x: x.view(2, 3, -1).transpose(0, 1).contiguous().transpose(0, 1),
    "four_axes": lambda x: x.view(1, 6, 1, -1),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_x_may_lie_in_memory_in_any_way(layout: str) -> None:
    for activation_bits in (0, -1) if TILES else (0,):
        call = make(Case(tokens=6, columns=136, group_size=32, activation_bits=activation_bits))
        view = LAYOUTS[layout](call.x)
        assert torch.equal(run(call, x=view).flatten(0, -2), run(call))


def test_x_may_be_one_row_repeated() -> None:
    call = make(Case(tokens=1))
    assert torch.equal(run(call, x=call.x.expand(5, -1)), run(call).expand(5, -1))


def test_x_may_have_no_leading_axis() -> None:
    call = make(Case(tokens=1, widths=(20, 3)))
    assert torch.equal(run(call, x=call.x[0]), run(call)[0])


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_an_empty_batch_gives_empty_results(shape: tuple[int, ...]) -> None:
    call = make(Case(widths=(20, 3)))
    assert run(call, x=call.x.new_zeros(*shape, call.x.shape[-1])).shape == (*shape, 23)


@pytest.mark.parametrize("activation_bits", ARITHMETICS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_harms_only_its_own_row(bad: float, activation_bits: int) -> None:
    call = make(Case(tokens=20, activation_bits=activation_bits))
    x = call.x.clone()
    x[3, 130] = bad
    spoiled, clean = run(call, x=x), run(call)
    assert not spoiled[3].isfinite().any()
    others = torch.arange(20) != 3
    assert torch.equal(spoiled[others], clean[others])


@pytest.mark.parametrize("activation_bits", ARITHMETICS)
def test_zeros_give_the_bias(activation_bits: int) -> None:
    call = make(Case(with_bias=True, with_zeros=True, activation_bits=activation_bits))
    assert call.bias is not None
    assert torch.equal(run(call, x=torch.zeros_like(call.x)), call.bias.to(call.x.dtype).expand(3, -1))


@pytest.mark.parametrize("activation_bits", ARITHMETICS)
def test_operators_are_well_formed(activation_bits: int) -> None:
    call = make(Case(widths=(20, 16), with_zeros=True, with_order=True, with_bias=True))
    torch.library.opcheck(linear_ops.panel_linear, call.arguments(activation_bits=activation_bits))
    plain = make(Case(tokens=2, columns=64))
    torch.library.opcheck(linear_ops.panel_linear, plain.arguments(activation_bits=activation_bits))
    for zeros in (None, call.zeros):
        weights = (call.words, call.scales, zeros, 4, 128, 8, torch.bfloat16)
        torch.library.opcheck(linear_ops.panel_weights, weights)


PLAIN = Case(columns=256, widths=(20, 16))  # 3 panels of 32 words, 2 groups
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "bits_of_3": ({"bits": 3}, "bits must be 4 or 8, got 3"),
    "words_of_two_axes": ({"words": torch.zeros(3, 512).int()}, r"words must be \[P, S, 16\] int32, got \[3, 512\]"),
    "words_of_int64": ({"words": torch.zeros(3, 32, 16).long()}, "words must be"),
    "a_group_within_a_word": ({"group_size": 12}, "group_size must be a multiple of 8 for 4 bits, got 12"),
    "no_group": ({"group_size": 0}, "group_size must be a multiple of 8 for 4 bits, got 0"),
    "scales_of_other_groups": ({"scales": torch.zeros(3, 1, 16)}, r"scales must be \[3, 2, 16\] float16 or float32"),
    "scales_of_bfloat16": ({"scales": torch.zeros(3, 2, 16).bfloat16()}, "scales must be"),
    "zeros_of_float": ({"zeros": torch.zeros(3, 2, 16)}, r"zeros must be \[3, 2, 16\] uint8"),
    "x_of_other_features": ({"x": torch.zeros(3, 248)}, "x must end in 256 features, got 248"),
    "x_without_axes": ({"x": torch.tensor(0.0)}, "x must end in 256 features, got 0"),
    "order_of_int64": ({"order": torch.arange(256)}, r"order must be \[256\] int32"),
    "order_of_other_columns": ({"order": torch.arange(8).int()}, r"order must be \[256\] int32, got \[8\]"),
    "bias_of_bfloat16": ({"bias": torch.zeros(48).bfloat16()}, r"bias must be \[48\] float32"),
    "bias_of_the_widths": ({"bias": torch.zeros(36)}, r"bias must be \[48\] float32, got \[36\]"),
    "too_few_panels": ({"widths": [20, 20]}, "panels"),
    "no_widths": ({"widths": []}, "panels"),
    "a_width_of_nothing": ({"widths": [48, 0]}, "panels"),
    "activations_of_4_bits": ({"activation_bits": 4}, "activation_bits must be -1, 0 or 8, got 4"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_does_not_belong_together_is_refused(name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(RuntimeError, match=message):
        linear_ops.panel_linear(*make(PLAIN).arguments(**change))


@needs_kernels
@pytest.mark.parametrize("name", [name for name in BAD if "x" not in BAD[name][0]])
def test_tracing_refuses_the_same(name: str) -> None:
    change, message = BAD[name]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=message):
        linear_ops.panel_linear(*make(PLAIN).arguments(**change))


@needs_kernels
def test_kernels_refuse_what_they_could_not_read() -> None:
    call = make(PLAIN)
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16"):
        run(call, x=call.x.double())
    with pytest.raises(RuntimeError, match="order must name columns of x, which has 256, got 256"):
        run(call, order=torch.arange(1, 257).int())
    with pytest.raises(RuntimeError, match="zero must be 0 to 256, got -1"):
        run(call, zero=-1)


@needs_tiles
def test_tiles_take_bfloat16_only() -> None:
    with pytest.raises(RuntimeError, match="activation_bits -1 takes bfloat16 activations; use 0 for others"):
        run(make(Case(dtype=torch.float16)), activation_bits=-1)


@pytest.fixture(scope="module")
def runs() -> dict[str, Outcome]:
    """The checks of this file under every instruction set."""
    code = "from tests import test_linear_ops as t; print(t.torch.ops.qquant.cpu_kernel_info()); t.check_kernels()"
    return run_for_each(["portable", "avx2", "avx512", "avx512_vnni"], code)


@needs_kernels
@pytest.mark.slow  # starts an interpreter and imports torch
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_vnni"])
def test_every_instruction_set_passes_the_same_checks(runs: dict[str, Outcome], isa: str) -> None:
    assert runs[isa].returncode == 0, runs[isa].said
    if f"panel_linear: {isa}," not in runs[isa].said:
        pytest.skip(f"this processor has no {isa}")
