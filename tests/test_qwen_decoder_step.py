"""The original Qwen's layers by ``layer_step``: rotation in float32, q, k and v in one linear; the layer's own bits.

What the step does for any family is test_decoder_step.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from qquant.decoder_step import DecoderStep, step_of
from qquant.layer_ops import attention_inputs, inputs_reference, kernels_are_live
from qquant.models.qwen.configuration import QWenConfig
from qquant.random_models import random_model

pytestmark = pytest.mark.skipif(not kernels_are_live(), reason="qquant._C is not built")

SEQ_LENGTH = 24
VARIANTS: dict[str, dict[str, Any]] = {
    "ntk_and_logn": {},
    "neither": {"use_dynamic_ntk": False, "use_logn_attn": False},
    "ntk": {"use_logn_attn": False},
    "half_rotary": {"rotary_pct": 0.5},
    "biases": {"no_bias": False},
}


def make(**options: Any) -> Any:
    config = QWenConfig(
        vocab_size=300,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        kv_channels=32,
        intermediate_size=256,
        seq_length=SEQ_LENGTH,
        **options,
    )
    return random_model(config, precision="int4", dtype=torch.bfloat16, device=torch.device("cpu"))


def plain(model: Any) -> Any:
    """The same weights without the step."""
    other = copy.deepcopy(model)
    for layer in other.transformer.h:
        assert step_of(layer) is not None
        del layer.forward
    return other


def first_step(model: Any) -> DecoderStep:
    step = step_of(model.transformer.h[0])
    assert step is not None
    return step


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def generated(model: Any, batch: int, length: int, mask: Tensor | None = None) -> list[Tensor]:
    """Logits of four single tokens after a prompt."""
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens(batch, length), past_key_values=cache, attention_mask=mask, use_cache=True)
    found = []
    for i in range(4):
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        found.append(
            model(input_ids=tokens(batch, 1) + i, past_key_values=cache, attention_mask=mask, use_cache=True).logits
        )
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of a step, whether the operators computed it."""
    found: list[bool] = []
    ready = DecoderStep._ready

    def seen(step: DecoderStep, x: Tensor, positions: Any) -> Any:
        result = ready(step, x, positions)
        if x.shape[1] == 1:
            found.append(result is not None)
        return result

    monkeypatch.setattr(DecoderStep, "_ready", seen)
    return found


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("batch", [1, 3])
def test_the_step_gives_the_bits_of_the_block(name: str, batch: int, calls: list[bool]) -> None:
    model = make(**VARIANTS[name])
    other = plain(model)
    calls.clear()  # of trials
    ours, theirs = (generated(one, batch, 5) for one in (model, other))
    assert all(map(torch.equal, ours, theirs))
    assert calls == [True] * (4 * 2)


def test_frequencies_that_ntk_stretched_for_each_row_are_the_steps_too(calls: list[bool]) -> None:
    model = make(use_logn_attn=False)
    mask = torch.ones(2, 3 * SEQ_LENGTH, dtype=torch.long)
    mask[0, : SEQ_LENGTH // 2] = 0
    other = plain(model)
    calls.clear()  # of trials
    ours, theirs = (generated(one, 2, 3 * SEQ_LENGTH, mask) for one in (model, other))
    assert all(map(torch.equal, ours, theirs))
    assert calls == [True] * (4 * 2)


def test_sharpened_queries_are_the_blocks_own(calls: list[bool]) -> None:
    model = make()
    other = plain(model)
    calls.clear()  # of trials
    ours, theirs = (generated(one, 1, 2 * SEQ_LENGTH) for one in (model, other))
    assert all(map(torch.equal, ours, theirs))
    assert calls == [False] * (4 * 2)


@pytest.mark.parametrize(("size", "half"), [(32, 16), (32, 5), (128, 64)])
def test_rotation_in_float32_is_the_references(size: int, half: int) -> None:
    generator = torch.Generator().manual_seed(size + half)
    step = first_step(make())
    heads, features = 128 // size if size <= 128 else 1, 128
    weight, eps, *before = step.prepare().before
    before[-3:] = [heads, heads, size]
    for batch in (1, 4):
        x = torch.randn(batch, 1, features, generator=generator).bfloat16()
        angles = 10 * torch.randn(batch, 1, 1, half, generator=generator)
        arguments = (x, weight, eps, angles.cos(), angles.sin(), *before)
        ours, theirs = attention_inputs(*arguments), inputs_reference(*arguments)
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    ("cos", "sin"),
    [
        pytest.param(torch.ones(1, 1, 1, 17), torch.ones(1, 1, 1, 17), id="longer-than-half-a-head"),
        pytest.param(torch.ones(1, 1, 16), torch.ones(1, 1, 16), id="three-axes"),
        pytest.param(torch.ones(1, 1, 1, 16), torch.ones(1, 1, 1, 15), id="unlike"),
        pytest.param(torch.ones(1, 1, 1, 16), torch.ones(1, 1, 32).bfloat16(), id="two-dtypes"),
        pytest.param(torch.ones(2, 1, 1, 16), torch.ones(2, 1, 1, 16), id="another-batch"),
    ],
)
def test_tables_that_fit_no_head_are_refused(cos: Tensor, sin: Tensor) -> None:
    step = first_step(make())
    weight, eps, *rest = step.prepare().before
    with pytest.raises(RuntimeError, match="cos"):
        attention_inputs(torch.zeros(1, 1, 128).bfloat16(), weight, eps, cos, sin, *rest)


def test_the_linear_of_q_k_and_v_is_the_operators_argument() -> None:
    model = make()
    block = model.transformer.h[0]
    step, x = first_step(model), torch.randn(2, 1, 128).bfloat16()
    still = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 1, 16)
    weight, eps, *rest = step.prepare().before
    query, key, value = attention_inputs(x, weight, eps, *still, *rest)
    normed = block.ln_1(x)
    wanted = block.attn.c_attn(normed).view(2, 3, 4, 1, 32)
    assert all(map(torch.equal, (query, key, value), wanted.unbind(1)))
