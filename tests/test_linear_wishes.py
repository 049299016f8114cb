"""What is asked of packed linears that they cannot do, or do not do as one may think: refused at the door, or said.

What they compute is test_linear.py's, whole models on the kernels are test_model_kernels.py's.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import qquant
from qquant import linear, linear_kernels, model_kernels, telling
from qquant.dense_linear import DenseLinear
from qquant.errors import UsageError
from qquant.linear import QuantLinear
from qquant.linear_kernels import Place
from qquant.model_kernels import attach_kernels
from qquant.rms_norm import KernelRMSNorm
from tests.packed import pack_by_hand


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the compiled module is built, on any processor: the operators have references."""
    place = Place("cpu", "avx512_bf16", "avx512", "")
    for room in (linear, model_kernels):
        monkeypatch.setattr(room, "place_of", lambda _: place)


def make_layer(columns: int = 64, rows: int = 32, kernel: str = "auto") -> QuantLinear:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (rows, columns), generator=draw)
    scales = (torch.rand(rows, columns // 32, generator=draw) * 0.01 + 0.002).half().float()
    layer = QuantLinear.from_codes(
        codes,
        scales,
        torch.full_like(scales, 8),
        (torch.arange(columns) // 32).int(),
        bits=4,
        group_size=32,
        bias=torch.randn(rows, generator=draw),
    )
    layer.kernel = kernel
    return layer


def looks(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "qquant.kernels"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8, got 5"),
        ({"group_size": 0}, "group_size must be 1 or more, or -1 for one group per row, got 0"),
        ({"group_size": -3}, "group_size must be 1 or more, or -1 for one group per row, got -3"),
        ({"activation_bits": 5}, "activation_bits must be 8, .*, got 5"),
        ({"activation_bits": "8"}, "activation_bits must be 8, .*, got '8'"),
    ],
    ids=["bits", "no columns", "fewer than none", "activations", "a word"],
)
def test_a_layer_that_cannot_be_is_not_made(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QuantLinear(64, 64, **{"bits": 4, "group_size": 32, **layout})


def test_activation_bits_are_looked_at_when_they_are_set() -> None:
    layer = make_layer()
    with pytest.raises(UsageError, match=r"got 8\.0"):
        layer.activation_bits = 8.0  # type: ignore[assignment]
    assert layer.activation_bits is None


@pytest.mark.parametrize("shape", [(), (63,), (2, 1)], ids=str)
def test_an_input_of_other_features_is_refused_with_its_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"x must end in 64 features, got \["):
        make_layer()(torch.zeros(shape))


@pytest.mark.usefixtures("with_kernels")
def test_a_look_at_a_packed_layer_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "said", set())
    for _ in range(2):
        layer = make_layer()
        layer.pack()
        assert hasattr(layer, "qweight")
        assert not layer.packed
    (line,) = looks(caplog)
    assert line.startswith("qweight of a packed linear was looked at")
    assert "stored()" in line
    assert "attach_kernels" in line


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize(
    "use",
    [
        lambda layer: layer.state_dict(),
        lambda layer: layer.load_state_dict(make_layer().state_dict()),
        copy.deepcopy,
        pickle.dumps,
        repr,
        lambda layer: layer(torch.ones(3, 64)),
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: layer.dequantized(),
        lambda layer: make_layer().qweight,
    ],
    ids=["state dict", "loading", "copy", "pickle", "repr", "call", "cast", "dequantized", "not packed"],
)
def test_what_leaves_a_layer_packed_or_fills_it_is_not_said(
    use: Callable[[QuantLinear], object], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "said", set())
    layer = make_layer()
    layer.pack()
    use(layer)
    assert looks(caplog) == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use of it
@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_forward_mode_has_the_tangent_of_the_plain_linear(kernel: str) -> None:
    layer = make_layer(kernel=kernel)
    draw = torch.Generator().manual_seed(1)
    x, direction = torch.randn(2, 3, 64, generator=draw)
    expected = direction @ layer.dequantized().T
    layer(x)  # packed, where it is to be

    # The same products in another order of sums: the default tolerance for float32.
    value, tangent = torch.func.jvp(layer, (x,), (direction,))[:2]
    torch.testing.assert_close(tangent, expected)
    torch.testing.assert_close(value, x @ layer.dequantized().T + layer.real_bias())
    with forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(x, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
        assert forward_ad.unpack_dual(layer(x)).tangent is None


def test_the_reference_leaves_a_whole_model_to_torch(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``kernel="reference"`` is what results are compared with: lm_head, norms, attention and layers run on torch."""
    pack_by_hand(checkpoint("qwen2"), tmp_path / "packed")
    called: list[str] = []

    def seen(name: str, _: Any) -> list[str]:
        called.append(name)
        return []

    for name in ("use_dense_kernel", "use_norm_kernel", "use_decode_kernel", "use_decoder_step"):
        monkeypatch.setattr(model_kernels, name, partial(seen, name))
    model: Any = qquant.load_quantized(tmp_path / "packed", kernel="reference", dtype=torch.bfloat16)
    assert called == []
    assert not [part for part in model.modules() if isinstance(part, (DenseLinear, KernelRMSNorm))]
    assert model.config._attn_implementation == "sdpa"
    next(part for part in model.modules() if isinstance(part, QuantLinear)).kernel = "auto"
    attach_kernels(model)
    assert called == ["use_dense_kernel", "use_norm_kernel", "use_decode_kernel", "use_decoder_step"]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"kernel": "torch"}, "kernel is about quantized models"),
        ({"activation_bits": 8}, "activation_bits is about quantized models"),
        ({"activation_bits": 3}, "activation_bits must be 8"),
        ({"head_bits": 8}, "head_bits is about quantized models"),
    ],
    ids=["kernel", "activations", "no such activations", "head"],
)
def test_a_model_that_is_not_quantized_refuses_what_only_packed_linears_can_do(
    tiny_qwen2: Path, wish: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        qquant.load_quantized(tiny_qwen2, use_cache_quantization=True, **wish)


def test_one_table_says_what_panel_linear_is_told() -> None:
    assert {one.value: bits for one, bits in linear_kernels.ACTIVATION_BITS.items()} == {
        "panels": 0, "tile": -1, "int8": 8
    }  # fmt: skip


@pytest.mark.usefixtures("with_kernels")
def test_autocast_does_not_reach_the_kernels() -> None:
    layer, x = make_layer(), torch.ones(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, layer(x))
