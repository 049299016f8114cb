"""The parts of a Qwen v1 block alone, against the slow reference: RMSNorm, MLP, RoPE, NTK's alpha, LogN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qquant.models.qwen import positions
from qquant.models.qwen.configuration import QWenConfig
from qquant.models.qwen.layers import QWenMLP, QWenRMSNorm, QWenRotaryEmbedding
from tests import qwen_reference as reference
from tests.make_qwen_v1 import PUBLISHED, TINY
from tests.qwen_cases import CLOSE, Differences, collect

BF16_STEP = 2.0**-8
"""Largest relative error of one rounding to bfloat16: half a step of 2**-7."""


@pytest.fixture(scope="module")
def differences(request: pytest.FixtureRequest) -> Iterator[Differences]:
    """Prints what the tests of this file saw."""
    yield from collect(request, "Qwen v1, parts")


def config(**changes: Any) -> QWenConfig:
    return QWenConfig(**PUBLISHED | TINY | changes)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm_of(weight: Tensor, dtype: torch.dtype) -> QWenRMSNorm:
    norm = QWenRMSNorm(len(weight), 1e-6)
    norm.weight.data = weight.to(dtype)
    return norm.to(dtype)


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e4], ids=["ordinary", "near_epsilon", "large"])
def test_norm_is_the_formula(differences: Differences, size: float) -> None:
    x, weight = size * normal(5, 64), 1 + normal(64, seed=1)
    expected = reference.rms_norm(x.double().numpy(), weight.double().numpy(), 1e-6)
    with torch.no_grad():
        differences.check(f"RMSNorm, values of size {size:g}", norm_of(weight, torch.float32)(x), expected, 1e-5)


def test_norm_in_bfloat16_rounds_before_it_multiplies(differences: Differences) -> None:
    x, weight = (3 * normal(40, 64)).bfloat16(), (1 + normal(64, seed=1)).bfloat16()
    wide, scales = x.double().numpy(), weight.double().numpy()
    with torch.no_grad():
        found = norm_of(weight, torch.bfloat16)(x).double().numpy()
    expected = reference.rms_norm(wide, scales, 1e-6, reference.bfloat16)
    other_order = reference.bfloat16(reference.rms_norm(wide, scales, 1e-6))
    # A value within float32's error (2**-22 relative) of a tie of bfloat16 may round either way: one in 2**13.
    assert (found != expected).mean() <= 1e-3
    assert (other_order != expected).mean() > 0.1
    differences.check("RMSNorm, bfloat16", found, expected, 2 * BF16_STEP * float(np.abs(expected).max()))


@pytest.mark.parametrize("bias", [False, True], ids=["without_bias", "with_bias"])
def test_mlp_is_the_formula(differences: Differences, bias: bool) -> None:
    mlp = QWenMLP(config(no_bias=not bias))
    tensors = {name: normal(*value.shape, seed=i) / 4 for i, (name, value) in enumerate(mlp.state_dict().items())}
    assert len(tensors) == (6 if bias else 3)
    mlp.load_state_dict(tensors)
    x = normal(7, 32, seed=9)
    arrays = {name: value.double().numpy() for name, value in tensors.items()}
    expected = reference.mlp(x.double().numpy(), arrays)
    with torch.no_grad():
        differences.check(f"MLP, bias {bias}", mlp(x), expected, CLOSE)
    swapped = arrays | {"w1.weight": arrays["w2.weight"], "w2.weight": arrays["w1.weight"]}
    assert np.abs(reference.mlp(x.double().numpy(), swapped) - expected).max() > 0.1  # SiLU's place shows


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["whole_head", "half_of_it"])
@pytest.mark.parametrize("length", [8, 40], ids=["alpha_1", "alpha_7"])
def test_rope_is_the_formula(differences: Differences, share: float, length: int) -> None:
    settings = config(rotary_pct=share)
    rotary, x = QWenRotaryEmbedding(settings), normal(1, 70, 3, 16)
    where = list(range(70))
    cos, sin, factors = rotary(torch.tensor([where]), rotary.stretched(torch.tensor([length])), False)
    assert factors is None
    turned = reference.rope_angles(where, int(16 * share), 10000.0, reference.ntk_alpha(length, 16))
    expected = reference.rope(x[0].double().numpy(), turned)
    # An angle of p radians is off by up to p * 2**-24 for the frequency and as much for the product, |x| is below 5.
    within = 5 * 2 * 70 * 2.0**-24 + 1e-5
    differences.check(
        f"RoPE, {share:g} of the head, length {length}", positions.rotate(x, cos, sin)[0], expected, within
    )
    assert torch.equal(positions.rotate(x, cos, sin)[..., int(16 * share) :], x[..., int(16 * share) :])


def test_rope_at_the_last_position_of_32k_keeps_float32s_precision(differences: Differences) -> None:
    settings = QWenConfig(**PUBLISHED)
    rotary, x = QWenRotaryEmbedding(settings), normal(1, 1, 2, 128)
    cos, sin, _ = rotary(torch.tensor([[32767]]), None, False)
    expected = reference.rope(x[0].double().numpy(), reference.rope_angles([32767], 128, 10000.0, 1.0))
    # As above: the frequency and the product each round once.
    differences.check("RoPE, position 32767", positions.rotate(x, cos, sin)[0], expected, 5 * 2 * 32768 * 2.0**-24)


def test_rope_in_bfloat16_rounds_once(differences: Differences) -> None:
    rotary, x = QWenRotaryEmbedding(config()), normal(1, 70, 3, 16).bfloat16()
    cos, sin, _ = rotary(torch.arange(70)[None], None, False)
    found = positions.rotate(x, cos, sin)
    expected = reference.rope(x[0].double().numpy(), reference.rope_angles(range(70), 16, 10000.0, 1.0))
    assert found.dtype == torch.bfloat16
    within = BF16_STEP * float(np.abs(expected).max()) + 5 * 2 * 70 * 2.0**-24
    differences.check("RoPE, bfloat16", found[0], expected, within)


@pytest.mark.parametrize("seq_length", [16, 2048, 8192, 100], ids=str)
def test_alpha_steps_where_the_formula_does(seq_length: int) -> None:
    around = [k * seq_length + step for k in (1, 2, 4, 8, 16) for step in (-1, 0, 1)]
    lengths = [1, 2, seq_length // 2, *around, 3 * seq_length, 1000 * seq_length]
    found = positions.ntk_alpha(torch.tensor(lengths), seq_length)
    assert found.tolist() == [reference.ntk_alpha(length, seq_length) for length in lengths]


def test_alpha_has_the_published_values() -> None:
    found = positions.ntk_alpha(torch.tensor([[1, 8192, 8193], [16384, 16385, 32768]]), 8192)
    assert found.tolist() == [[1, 1, 3], [3, 7, 7]]


def test_logn_is_the_formula(differences: Differences) -> None:
    where = [0, 1, 14, 15, 16, 17, 31, 32, 69, 32766, 32767, 40000]  # the published table ended at 32767 entries
    found = positions.logn_factors(torch.tensor([where]), 16)[0, :, 0, 0]
    expected = np.array([reference.logn(position, 16) for position in where])
    assert found[:4].tolist() == [1] * 4
    differences.check("LogN", found, expected, 4 * 2.0**-24 * float(expected.max()))
