"""The linear that stays bfloat16: which calls take the kernel, that its parameters are the model's own, its numbers."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qquant import _native
from qquant import dense_linear as room
from qquant.dense_linear import DenseLinear, dense_linear, dense_reference, use_dense_kernel
from tests.conftest import Factory
from tests.make_qwen_v1 import make_qwen_v1

SHAPES = {
    "decode": (1, 896, 512),
    "one_row": (1, 64, 1),
    "few_tokens": (5, 128, 48),
    "most_tokens": (8, 256, 33),
    "odd_columns": (3, 77, 40),
    "many_tokens": (20, 96, 64),
    "empty": (0, 64, 16),
}

needs_kernel = pytest.mark.skipif(not room.kernel_is_live(), reason="qquant._C is not built or has no such kernel")


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def problem(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias in bfloat16."""
    tokens, columns, rows = request.param
    generator = torch.Generator().manual_seed(0)
    sizes = (tokens, columns), (rows, columns), (rows,)
    x, weight, bias = (torch.randn(size, generator=generator).bfloat16() for size in sizes)
    return x, weight, bias


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that came to the operator, which runs as its reference and counts as live."""
    seen: list[tuple[int, ...]] = []

    def record(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(x.shape))
        return dense_reference(x, weight, bias)

    monkeypatch.setattr(room, "dense_linear", record)
    monkeypatch.setattr(room, "kernel_is_live", lambda: True)
    monkeypatch.setattr(room, "MIN_WEIGHTS", 1)
    return seen


def linear(columns: int = 64, rows: int = 48, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(columns, rows, bias=bias, dtype=dtype)


def assert_close_to_float32(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within one rounding to bfloat16 (2**-8 of the value) and those of K sums in float32 in any order."""
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    bound = 2.0**-8 * exact.abs() + (x.shape[-1] + 1) * 2.0**-24 * magnitude
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_the_operator_rounds_once(problem: tuple[Tensor, Tensor, Tensor], with_bias: bool) -> None:
    x, weight, bias = problem
    used = bias if with_bias else None
    found = dense_linear(x, weight, used)
    assert found.shape == (*x.shape[:-1], weight.shape[0])
    assert found.is_contiguous()
    assert_close_to_float32(found, x, weight, used)


@needs_kernel
def test_the_kernel_computes_a_token_alike_alone_and_among_others() -> None:
    x, weight = torch.randn(8, 256).bfloat16(), torch.randn(80, 256).bfloat16()
    together = dense_linear(x, weight, None)
    assert torch.equal(together, torch.cat([dense_linear(row[None], weight, None) for row in x]))


def test_strided_inputs_give_what_contiguous_ones_give() -> None:
    weight = torch.randn(48, 64).bfloat16()
    wide = torch.randn(4, 6, 64).bfloat16()
    for x in (wide[:, -1:, :], wide.transpose(0, 1)[1], wide[..., :1].expand(4, 6, 64)[0]):
        assert torch.equal(dense_linear(x, weight, None), dense_linear(x.contiguous(), weight, None))


def test_numbers_that_are_not_finite_come_out_as_they_would_of_torch() -> None:
    x, weight = torch.ones(2, 64).bfloat16(), torch.ones(16, 64).bfloat16()
    x[0, 3], weight[5, 7] = float("nan"), float("inf")
    assert torch.equal(dense_linear(x, weight, None).isfinite(), F.linear(x, weight).isfinite())


def test_the_operator_is_well_formed() -> None:
    x, weight, bias = (torch.randn(size).bfloat16() for size in ((2, 3, 32), (24, 32), (24,)))
    torch.library.opcheck(dense_linear, (x, weight, bias))
    torch.library.opcheck(dense_linear, (x, weight, bias.float()))
    torch.library.opcheck(dense_linear, (x[:, -1:], weight, None))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": torch.ones(2, 9).bfloat16()}, "8 features"),
        ({"weight": torch.ones(4, 8)}, "bfloat16"),
        ({"weight": torch.ones(8).bfloat16()}, "N, K"),
        ({"bias": torch.ones(5).bfloat16()}, "bias"),
    ],
    ids=["columns", "dtype", "axes", "bias"],
)
def test_tensors_that_do_not_belong_together_are_refused(changes: dict[str, Tensor], said: str) -> None:
    given = {"x": torch.ones(2, 8).bfloat16(), "weight": torch.ones(4, 8).bfloat16(), "bias": None, **changes}
    with pytest.raises(RuntimeError, match=said):
        dense_linear(given["x"], given["weight"], given["bias"])


@pytest.mark.parametrize("shape", [(64,), (1, 64), (8, 64), (2, 4, 64), (8, 1, 64)], ids=str)
def test_up_to_eight_tokens_take_the_kernel(taken: list[tuple[int, ...]], shape: tuple[int, ...]) -> None:
    layer = DenseLinear.sharing(linear())
    with torch.inference_mode():
        assert layer(torch.ones(shape).bfloat16()).shape == (*shape[:-1], 48)
    assert taken == [shape]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((9, 64), torch.bfloat16), ((3, 3, 64), torch.bfloat16), ((0, 64), torch.bfloat16), ((1, 64), torch.float32)],
    ids=["nine_tokens", "nine_in_rows", "no_tokens", "float32"],
)
def test_other_inputs_go_to_torch(taken: list[tuple[int, ...]], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain = linear(dtype=dtype)
    x = torch.randn(shape).to(dtype)
    with torch.inference_mode():
        assert torch.equal(DenseLinear.sharing(plain)(x), plain(x))
    assert taken == []


def test_gradients_are_those_of_a_plain_linear(taken: list[tuple[int, ...]]) -> None:
    plain = linear()
    layer = DenseLinear.sharing(plain)
    x = torch.ones(2, 64).bfloat16()
    layer(x).sum().backward()
    assert plain.weight.grad is not None
    assert taken == []
    with torch.no_grad():
        layer(x)
    assert taken == [(2, 64)]
    layer.requires_grad_(False)
    layer(x)
    assert len(taken) == 2
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert len(taken) == 2


def test_the_layer_is_a_linear_with_the_same_parameters() -> None:
    plain = linear().eval()
    layer = DenseLinear.sharing(plain)
    assert isinstance(layer, nn.Linear)
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert not layer.training
    assert list(layer.state_dict()) == list(plain.state_dict())
    copied = copy.deepcopy(layer)
    assert type(copied) is DenseLinear
    assert torch.equal(copied.weight, plain.weight)


def test_a_strided_input_does_not_copy_the_weight() -> None:
    # With a copy per sequence this takes some 60 times as long; 8 leaves room for a busy machine.
    layer = DenseLinear.sharing(linear(512, 8192, bias=False)).requires_grad_(False)
    strided = torch.randn(12, 4, 512).bfloat16()[:, -1:, :]

    def seconds(x: Tensor) -> float:
        best = float("inf")
        for _ in range(3):
            begin = time.thread_time()
            layer(x)
            best = min(best, time.thread_time() - begin)
        return best

    with torch.inference_mode():
        assert seconds(strided) < 8 * seconds(strided.contiguous())


@pytest.fixture
def tied(checkpoint: Factory) -> Any:
    """A tiny bfloat16 model whose output projection is its embedding."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint("qwen2", tie=True, dtype=torch.bfloat16))


def test_a_model_keeps_its_tied_weights_and_its_state_dict(
    taken: list[tuple[int, ...]], tied: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MIN_WEIGHTS", tied.lm_head.weight.numel())
    before = tied.state_dict()
    lines = use_dense_kernel(tied)
    assert lines == ["lm_head (bfloat16): dense_linear for 1 to 8 tokens, torch for more"]
    assert type(tied.get_output_embeddings()) is DenseLinear
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    after = tied.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    tied.save_pretrained(tmp_path)
    tied.tie_weights()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    ids = torch.arange(6)[None]
    with torch.inference_mode():
        found = tied(ids, logits_to_keep=1).logits
    assert taken == [(1, 1, 64)]
    again = type(tied).from_pretrained(tmp_path)
    with torch.inference_mode():
        expected = again(ids, logits_to_keep=1).logits
    # Sums of 64 products in another order, and one rounding each.
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)


def hooked(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_pre_hook(lambda _, args: args)
    return layer


def overridden(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return layer


class Other(nn.Linear):
    """A linear of another class."""


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "hook": lambda: hooked(linear()),
    "forward_of_its_own": lambda: overridden(linear()),
    "float32": lambda: linear(dtype=torch.float32),
    "meta": lambda: nn.Linear(64, 48, dtype=torch.bfloat16, device="meta"),
    "subclass": lambda: Other(64, 48, dtype=torch.bfloat16),
    "small": lambda: linear(rows=2),
}


@pytest.mark.parametrize("make", list(OTHERS.values()), ids=list(OTHERS))
def test_what_is_not_a_plain_large_linear_is_left_alone(
    taken: list[tuple[int, ...]], make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MIN_WEIGHTS", 1000)
    model = nn.Sequential(make())
    before = model[0]
    assert use_dense_kernel(model) == []
    assert model[0] is before
    assert taken == []


@pytest.fixture
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "kernel_is_live", lambda: False)
    monkeypatch.setattr(room, "MIN_WEIGHTS", 1)


@pytest.mark.usefixtures("without_kernel")
def test_a_missing_kernel_is_said_and_changes_nothing() -> None:
    model = nn.Sequential(linear(), linear(48, 16))
    (line,) = use_dense_kernel(model)
    assert line.startswith("0 and 1 more (bfloat16): torch; the kernel for few tokens is not there")
    assert all(type(layer) is nn.Linear for layer in model)


def test_qwens_output_projection_is_given_a_contiguous_input(tmp_path: Path) -> None:
    from qquant.models.qwen.modeling import QWenLMHeadModel

    model = QWenLMHeadModel.from_pretrained(make_qwen_v1(tmp_path / "model"))
    seen: list[bool] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    with torch.inference_mode():
        model(torch.arange(12).view(2, 6), logits_to_keep=1)
    assert seen == [True]


def test_large_pages_hold_the_same_numbers() -> None:
    host = _native.host()
    if host is None:
        pytest.skip("qquant._host is not built")
    weight = torch.randn(3 << 20, generator=torch.Generator().manual_seed(0))
    wanted, address = weight.clone(), weight.data_ptr()
    assert isinstance(host.gather_large_pages(address, weight.nbytes), bool)
    assert weight.data_ptr() == address
    assert torch.equal(weight, wanted)
    assert host.gather_large_pages(address, 1 << 20) is False  # no whole page lies in it
