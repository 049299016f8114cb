"""The packed linears' operators on a GPU: against float64, on streams, in graphs, compiled, and on memory used before.

Skipped without a GPU; tests/test_cuda_linear.py runs the same kernels on a CPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qquant import _native, linear_ops
from tests.test_cuda_linear import BITS, CASES, DTYPES, Case, Operands, assert_close_to_float64, operands_of

pytestmark = pytest.mark.gpu

MORE_CASES = CASES | {
    "qwen_7b_attention": Case(1, (4096, 4096, 4096), 4096, 128, bias=True),
    "qwen_7b_down": Case(3, (4096,), 11008, 128, zeros=True),
    "qwen2.5_0.5b_gate_up": Case(8, (4864, 4864), 896, 128, zeros=True),
    "qwen2.5_0.5b_down": Case(12, (896,), 4864, 128, zeros=True, absent=0),
    "qwen_7b_signed": Case(2, (4096,), 4096, 128, negative=True),
    "qwen_72b_rows": Case(64, (8192,), 24576, 128, half_scales=False),
    "nine_outputs": Case(2, (16, 24, 32, 7, 16, 16, 40, 16, 65), 256, 128, zeros=True, bias=True),
}


@pytest.fixture(autouse=True)
def _kernels() -> None:
    """Fail, and not pass by way of the reference, where the module is missing."""
    _native.load_torch_ops()
    [state] = [state for state in _native.status() if state.name == "qquant._C_cuda"]
    assert state.live, f"qquant._C_cuda is not here: {state.why}"


def multiply(given: Operands) -> list[Tensor]:
    found: list[Tensor] = linear_ops.panel_linear(*given, 0)
    return found


def given_on_gpu(case: Case, bits: int = 4, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Operands:
    return operands_of(case, bits, dtype, seed).on_gpu()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
@pytest.mark.parametrize("case", MORE_CASES.values(), ids=MORE_CASES)
def test_products_are_exact_to_float32(case: Case, bits: int, dtype: torch.dtype) -> None:
    given = given_on_gpu(case, bits, dtype)
    assert_close_to_float64(multiply(given), given)


@pytest.mark.parametrize("tokens", range(1, 65))
def test_any_number_of_tokens(tokens: int) -> None:
    given = given_on_gpu(Case(tokens, (112,), 512, 64, zeros=True), seed=tokens)
    assert_close_to_float64(multiply(given), given)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
@pytest.mark.parametrize("columns", [72, 1024, 11008, 2060], ids=str)
def test_unpacked_weights_have_the_bits_of_the_cpu(columns: int, bits: int, dtype: torch.dtype) -> None:
    columns -= columns % (32 // bits)
    given = operands_of(Case(1, (64,), columns, 72, zeros=True, negative=columns > 1024), bits, dtype)
    want = linear_ops.weights_reference(given.words, given.scales, given.zeros, bits, 72, given.zero, dtype)
    moved = given.on_gpu()
    got = linear_ops.panel_weights(moved.words, moved.scales, moved.zeros, bits, 72, moved.zero, dtype)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("name", ["qwen_7b_attention", "qwen_7b_down", "16_tokens", "64_tokens", "act_order"])
def test_the_same_call_gives_the_same_bits(name: str) -> None:
    """A result that moves between runs is a race."""
    given = given_on_gpu(MORE_CASES[name])
    first = multiply(given)
    for _ in range(50):
        for one, other in zip(multiply(given), first, strict=True):
            assert torch.equal(one, other)


def test_a_token_s_result_does_not_depend_on_the_others_of_its_kind() -> None:
    """Tokens 1 to 4 share a plan: the same columns are summed in the same order."""
    given = given_on_gpu(Case(4, (256,), 1024, 128, zeros=True))
    [together] = multiply(given)
    for token in range(4):
        [alone] = multiply(given._replace(x=given.x[token : token + 1]))
        assert torch.equal(alone, together[token : token + 1])


def test_work_runs_on_the_current_stream() -> None:
    given = given_on_gpu(MORE_CASES["qwen_7b_attention"])
    want = multiply(given)
    late = torch.zeros_like(given.x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on any other stream would read the zeros
        late.copy_(given.x)
        got = multiply(given._replace(x=late))
    stream.synchronize()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["qwen_7b_down", "act_order_padded", "33_tokens"])
def test_a_graph_can_be_captured_and_replayed(name: str) -> None:
    given = given_on_gpu(MORE_CASES[name])
    multiply(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = multiply(given)
    for seed in (1, 2):
        given.x.copy_(operands_of(MORE_CASES[name], 4, torch.bfloat16, seed).x)
        graph.replay()
        torch.cuda.synchronize()
        for one, other in zip(held, multiply(given), strict=True):
            assert torch.equal(one, other)
        assert_close_to_float64(held, given)


def test_a_compiled_caller_gives_the_same_bits() -> None:
    given = given_on_gpu(MORE_CASES["qwen2.5_0.5b_gate_up"])

    def gated(x: Tensor) -> Tensor:
        gate, up = multiply(given._replace(x=x * 0.5))
        return torch.nn.functional.silu(gate) * up

    compiled = torch.compile(gated, fullgraph=True)
    # The compiler may fuse silu and the product, which then round once less than 3 times.
    torch.testing.assert_close(compiled(given.x), gated(given.x), rtol=3 * torch.finfo(torch.bfloat16).eps, atol=1e-6)


def test_memory_that_was_used_before_does_not_show() -> None:
    given = given_on_gpu(MORE_CASES["qwen2.5_0.5b_down"])
    [want] = multiply(given)
    for _ in range(3):
        garbage = [torch.full((size,), torch.nan, device="cuda") for size in (1 << 12, 1 << 16, 1 << 20)]
        torch.cuda.synchronize()
        del garbage  # the allocator hands it out again for the workspace and the result
        [got] = multiply(given)
        assert torch.equal(got, want)


def test_inputs_may_be_views() -> None:
    given = given_on_gpu(Case(6, (48,), 256, 128, zeros=True))
    [want] = multiply(given)
    apart = torch.nn.functional.pad(given.x, (1, 2), value=torch.nan)[:, 1:-2]
    [odd] = multiply(given._replace(x=apart))
    [folded] = multiply(given._replace(x=given.x.view(2, 3, 256).transpose(0, 1)))
    assert torch.equal(odd, want)
    assert torch.equal(folded.transpose(0, 1).reshape(6, 48), want)


def test_no_tokens_give_empty_results() -> None:
    given = given_on_gpu(CASES["siblings"])
    assert [part.shape for part in multiply(given._replace(x=given.x[:0]))] == [(0, 40), (0, 16), (0, 7)]


def test_operators_are_well_formed() -> None:
    given = given_on_gpu(CASES["act_order_padded"])
    torch.library.opcheck(linear_ops.panel_linear, (*given, 0))
    arguments = (given.words, given.scales, given.zeros, 4, given.group_size, given.zero, torch.bfloat16)
    torch.library.opcheck(linear_ops.panel_weights, arguments)


@pytest.mark.parametrize("activation_bits", [-1, 8])
def test_kinds_of_activations_that_only_a_cpu_has_are_refused(activation_bits: int) -> None:
    with pytest.raises(RuntimeError, match=f"activation_bits must be 0 on a GPU, got {activation_bits}"):
        linear_ops.panel_linear(*given_on_gpu(CASES["one_token"]), activation_bits)


def test_too_many_tokens_are_refused_with_the_way_out() -> None:
    given = given_on_gpu(Case(65, (16,), 128, 128))
    with pytest.raises(RuntimeError, match="at most 64 tokens on a GPU, got 65; multiply by panel_weights instead"):
        multiply(given)


def test_tensors_on_two_devices_are_refused() -> None:
    given = given_on_gpu(CASES["one_token"])
    with pytest.raises(RuntimeError, match="scales must be on the device of the others"):
        multiply(given._replace(scales=given.scales.cpu()))
