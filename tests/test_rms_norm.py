"""The norm in one step: its bits are those of the model's own norm, and what it may take the place of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qquant import rms_norm as room
from qquant.rms_norm import KernelRMSNorm, norm_reference, rms_norm, use_norm_kernel
from tests.conftest import Factory
from tests.make_qwen_v1 import make_qwen_v1

SIZES = [1, 7, 16, 100, 896, 1000, 2048, 5120, 8199]
"""Less than a vector, no whole number of them, one and several levels of torch's sums, more than fits the stack."""


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernel were built; where it is not, the reference does its work."""
    monkeypatch.setattr(room, "kernel_is_live", lambda: True)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Rows of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=generator)
    return (rows * 10.0 ** torch.linspace(-4, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))).bfloat16()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 9, 1000])
def test_the_operator_gives_the_bits_of_the_reference(size: int, rows: int) -> None:
    # A sum that is wrong in its last bit tips one element in some ten thousand: hence the many rows.
    x, weight = drawn(min(rows, 1 + 2**20 // size), size), drawn(size, seed=1)
    assert torch.equal(rms_norm(x, weight, 1e-6), norm_reference(x, weight, 1e-6))


def test_many_rows_shared_by_threads_give_the_same_bits() -> None:
    x, weight = drawn(300, 896), drawn(896, seed=1)
    found = rms_norm(x, weight, 1e-6)
    assert torch.equal(found, torch.cat([rms_norm(row[None], weight, 1e-6) for row in x]))


@pytest.mark.parametrize("shape", [(896,), (0, 64), (2, 0, 64), (2, 3, 64)], ids=str)
def test_any_number_of_axes_is_taken(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).bfloat16(), torch.randn(shape[-1]).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-6), norm_reference(x, weight, 1e-6))


def test_strided_inputs_give_what_contiguous_ones_give() -> None:
    wide, weight = drawn(4, 6, 64), drawn(64, seed=1)
    for x in (wide[:, -1:, :], wide.transpose(0, 1)):
        assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x.contiguous(), weight, 1e-6))


def test_numbers_that_are_not_finite_come_out_as_of_the_reference() -> None:
    x, weight = drawn(3, 64), drawn(64, seed=1)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    found, expected = (norm(x, weight, 1e-6) for norm in (rms_norm, norm_reference))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[2], expected[2])


def test_the_operator_is_well_formed() -> None:
    x, weight = drawn(2, 3, 32), drawn(32, seed=1)
    torch.library.opcheck(rms_norm, (x, weight, 1e-6))
    torch.library.opcheck(rms_norm, (x[:, -1:], weight, 1e-6))


@pytest.mark.parametrize(
    ("x", "weight", "said"),
    [
        (torch.ones(2, 9).bfloat16(), torch.ones(8).bfloat16(), "as long as a row"),
        (torch.ones(2, 8).bfloat16(), torch.ones(8), "dtype|bfloat16"),
    ],
    ids=["size", "dtype"],
)
def test_what_does_not_belong_together_is_refused(x: Tensor, weight: Tensor, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        rms_norm(x, weight, 1e-6)


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


@pytest.mark.usefixtures("live")
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "qwen"])
def test_every_family_keeps_its_logits_and_its_state_dict(checkpoint: Factory, tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    import qquant

    qquant.register()
    dtype = {"dtype": torch.bfloat16}
    folder = make_qwen_v1(tmp_path / "v1") if family == "qwen" else checkpoint(family, **dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **dtype)
    ids = torch.arange(1, 13).view(2, 6)
    before, states = norms_of(model), model.state_dict()
    with torch.inference_mode():
        expected = model(ids).logits
        lines = use_norm_kernel(model)
        found = model(ids).logits
    assert lines == [f"{len(before)} {type(before[0]).__name__} (bfloat16): rms_norm, the same bits in one step"]
    assert all(type(norm) is KernelRMSNorm for norm in norms_of(model))
    assert torch.equal(found, expected)
    assert all(value is states[name] or torch.equal(value, states[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(states)
    assert use_norm_kernel(model) == lines  # a second time changes nothing


@pytest.mark.usefixtures("live")
def test_gradients_and_other_dtypes_take_the_reference() -> None:
    weight = nn.Parameter(drawn(64))
    norm = KernelRMSNorm(weight, 1e-6)
    norm(drawn(2, 64)).sum().backward()
    assert weight.grad is not None
    assert norm.float()(torch.ones(2, 64)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_a_cast_of_the_norm_or_of_its_input_alone_gives_the_wider_dtype(dtype: torch.dtype) -> None:
    # As after peft's preparation of a model for training, which casts norms and nothing else.
    x, weight = drawn(2, 64), drawn(64, seed=1)
    for rows, factor in ((x, weight.to(dtype)), (x.to(dtype), weight)):
        values = rows.float()
        inner = (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6)).to(rows.dtype)
        found = KernelRMSNorm(nn.Parameter(factor, requires_grad=False), 1e-6)(rows)
        assert torch.equal(found, factor * inner)


def test_a_copy_is_one_of_its_own() -> None:
    norm = KernelRMSNorm(nn.Parameter(drawn(64)), 1e-6)
    copied = copy.deepcopy(norm)
    assert copied.weight is not norm.weight
    assert torch.equal(copied(drawn(2, 64)), norm(drawn(2, 64)))


class OffsetRMSNorm(nn.Module):
    """A norm as another family has it: the weight counts from one."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.weight = nn.Parameter(drawn(64).to(dtype))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return norm_reference(x, 1 + self.weight, self.eps)


class PlainRMSNorm(OffsetRMSNorm):
    """One that computes as ours."""

    def forward(self, x: Tensor) -> Tensor:
        return norm_reference(x, self.weight, self.eps)


def hooked() -> nn.Module:
    norm = PlainRMSNorm()
    norm.register_forward_hook(lambda *_: None)
    return norm


@pytest.mark.usefixtures("live")
def test_a_norm_that_computes_otherwise_is_left_alone_and_said() -> None:
    model = nn.Sequential(OffsetRMSNorm(), PlainRMSNorm())
    assert use_norm_kernel(model) == [
        "1 PlainRMSNorm (bfloat16): rms_norm, the same bits in one step",
        "1 OffsetRMSNorm (bfloat16): as they are, rms_norm computes otherwise",
    ]
    assert type(model[0]) is OffsetRMSNorm


@pytest.mark.usefixtures("live")
@pytest.mark.parametrize(
    "make", [hooked, lambda: PlainRMSNorm(torch.float32), lambda: nn.LayerNorm(64)], ids=["hook", "float32", "other"]
)
def test_what_is_no_plain_bfloat16_norm_is_not_looked_at(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make())
    before = model[0]
    assert use_norm_kernel(model) == []
    assert model[0] is before


def test_without_the_kernel_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "kernel_is_live", lambda: False)
    model = nn.Sequential(PlainRMSNorm())
    assert use_norm_kernel(model) == []
    assert type(model[0]) is PlainRMSNorm
