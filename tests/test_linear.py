"""QuantLinear against plain matrices: its reference, torch's int4 kernel behind it, and what its state dict keeps."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qquant import linear
from qquant.linear import QuantLinear, gptq_linear
from qquant.packing import pack_zeros

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
needs_kernel = pytest.mark.skipif(not AVX512, reason="torch's int4 kernel is chosen on AVX-512 only")

LAYERS: dict[str, dict[str, Any]] = {
    "int4 g32": {"bits": 4, "group_size": 32},
    "int4 row": {"bits": 4, "group_size": -1},
    "int4 asym g64": {"bits": 4, "group_size": 64, "sym": False},
    "int4 desc_act": {"bits": 4, "group_size": 32, "scatter": True},
    "int4 ragged": {"bits": 4, "group_size": 128, "columns": 160},  # the last group is short
    "int8 g32": {"bits": 8, "group_size": 32},
    "int8 asym desc_act": {"bits": 8, "group_size": 16, "sym": False, "scatter": True},
    "int3 g32": {"bits": 3, "group_size": 32, "rows": 96},
    "int2 asym row": {"bits": 2, "group_size": -1, "sym": False},
    "int4 v2": {"bits": 4, "group_size": 32, "sym": False, "version": 2},
    "int4 no bias": {"bits": 4, "group_size": 32, "bias": False},
}
BATCHES: dict[str, tuple[int, ...]] = {
    "one token": (1, 1),
    "flat": (7,),
    "vector": (),
    "deep": (2, 3, 5),
    "none": (0, 4),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_layer(
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    scatter: bool = False,
    rows: int = 64,
    columns: int = 128,
    version: int = 1,
    bias: bool = True,
    kernel: linear.Kernel = "reference",
    seed: int = 0,
) -> tuple[QuantLinear, Tensor, Tensor | None]:
    """A random layer with the weight and bias it stands for, in float64; the weight is made without packing."""
    draw = torch.Generator().manual_seed(seed)
    size = columns if group_size == -1 else group_size
    groups = -(-columns // size)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=draw)
    scales = (torch.rand(rows, groups, generator=draw) * 0.01 + 0.002).half()
    zeros = torch.full((rows, groups), 2 ** (bits - 1))
    if not sym:
        zeros = torch.randint(2 - version, 2**bits, (rows, groups), generator=draw)
    g_idx = torch.arange(columns) // size
    if scatter:
        g_idx = g_idx[torch.randperm(columns, generator=draw)]
    offset = torch.randn(rows, generator=draw).half() if bias else None
    layer = QuantLinear.from_codes(
        codes, scales.float(), zeros.clamp(min=1), g_idx.int(), bits=bits, group_size=group_size, bias=offset
    )
    layer.kernel, layer.version = kernel, version
    layer.qzeros = pack_zeros(zeros.T, bits, version)
    weight = scales.double()[:, g_idx] * (codes - zeros[:, g_idx])
    return layer, weight, None if offset is None else offset.double()


def inputs(*batch: int, columns: int = 128, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*batch, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def summing_limit(x: Tensor, weight: Tensor) -> float:
    """How far two sums of the same products in another order may lie apart: a few roundings of their magnitudes."""
    return 8 * torch.finfo(x.dtype).eps * float(F.linear(x.double().abs(), weight.abs()).max())


@pytest.mark.parametrize("options", list(LAYERS.values()), ids=list(LAYERS))
def test_dequantized_weight_is_exact(options: dict[str, Any]) -> None:
    layer, weight, _ = make_layer(**options)
    assert torch.equal(layer.dequantized().double(), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", list(LAYERS.values()), ids=list(LAYERS))
def test_forward_is_the_plain_linear_with_the_dequantized_weight(options: dict[str, Any], dtype: torch.dtype) -> None:
    layer, weight, bias = make_layer(**options)
    x = inputs(5, columns=layer.in_features, dtype=dtype)
    expected = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    assert layer(x).dtype == dtype
    assert float((layer(x) - expected).abs().max()) <= summing_limit(x, weight)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("batch", list(BATCHES.values()), ids=list(BATCHES))
def test_any_batch_shape_is_the_flat_result_reshaped(batch: tuple[int, ...], kernel: linear.Kernel) -> None:
    layer, _, _ = make_layer(kernel=kernel)
    x = inputs(*batch, dtype=torch.bfloat16)
    result = layer(x)
    assert result.shape == (*batch, 64)
    torch.testing.assert_close(result, layer(x.reshape(-1, 128)).reshape(result.shape), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_the_input_do_not_matter(kernel: linear.Kernel, dtype: torch.dtype) -> None:
    layer, weight, _ = make_layer(kernel=kernel)
    x = inputs(128, columns=6, dtype=dtype).T
    assert not x.is_contiguous()
    assert float((layer(x) - layer(x.contiguous())).abs().max()) <= summing_limit(x, weight)


@pytest.mark.parametrize("name", ["int4 g32", "int8 asym desc_act", "int3 g32", "int4 no bias"])
def test_operator_is_well_formed(name: str) -> None:
    layer, _, _ = make_layer(**LAYERS[name])
    for batch in ((2, 3), (0,)):
        x = inputs(*batch, columns=layer.in_features)
        packed = (layer.qweight, layer.qzeros, layer.scales, layer.g_idx, layer.bias, layer.bits, layer.version)
        torch.library.opcheck(gptq_linear, (x, *packed))


def test_operator_checks_the_width_of_its_input_before_it_runs() -> None:
    layer, _, _ = make_layer()
    fake = layer.to("meta")
    with pytest.raises(RuntimeError, match="128 features"):
        fake(torch.empty(2, 100, device="meta"))
    assert fake(torch.empty(2, 128, device="meta")).shape == (2, 64)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that the int4 kernel served."""
    seen: list[Tensor] = []
    plain = QuantLinear._int4pack_forward

    def spy(layer: QuantLinear, x: Tensor) -> Tensor:
        seen.append(x)
        return plain(layer, x)

    monkeypatch.setattr(QuantLinear, "_int4pack_forward", spy)
    return seen


@needs_kernel
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", linear._INT4PACK_GROUPS)
def test_int4_kernel_errs_at_most_a_tenth_more_than_plain_bfloat16(
    monkeypatch: pytest.MonkeyPatch, group_size: int, sym: bool, bias: bool
) -> None:
    """Both against float64; the plain path is what nobody objects to: a bfloat16 matmul with rounded weights.

    The kernel takes no bias, so adding it afterwards costs one more rounding of the result, independent of the rest.
    """
    seen = spied(monkeypatch)
    layer, weight, offset = make_layer(
        group_size=group_size, sym=sym, rows=256, columns=512, version=2, kernel="auto", bias=bias
    )
    x = inputs(64, columns=512, dtype=torch.bfloat16)
    truth = F.linear(x.double(), weight, offset)

    def error(result: Tensor) -> float:
        return float((result.double() - truth).norm() / truth.norm())

    plain = error(F.linear(x, weight.to(torch.bfloat16), None if offset is None else offset.to(torch.bfloat16)))
    rounding = error(truth.to(torch.bfloat16)) if bias else 0.0
    assert error(layer(x)) <= math.hypot(1.1 * plain, rounding)
    assert len(seen) == 1


NOT_SERVED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "scattered groups": ({"scatter": True}, {}),
    "float32": ({}, {"dtype": torch.float32}),
    "float16": ({}, {"dtype": torch.float16}),
    "8 bits": ({"bits": 8}, {}),
    "groups of 16": ({"group_size": 16}, {}),
    "a group per row of 160": ({"group_size": -1, "columns": 160}, {"columns": 160}),
    "a short last group": ({"group_size": 128, "columns": 160}, {"columns": 160}),
    "rows that are no multiple of 16": ({"rows": 72}, {}),
    "the reference asked for": ({"kernel": "reference"}, {}),
    "no rows": ({}, {"rows": 0}),
    "many rows": ({}, {"rows": linear._INT4PACK_ROWS + 1}),
}


@pytest.mark.parametrize(("options", "given"), list(NOT_SERVED.values()), ids=list(NOT_SERVED))
def test_int4_kernel_is_left_out_where_it_was_not_measured_to_win(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], given: dict[str, Any]
) -> None:
    seen = spied(monkeypatch)
    layer, weight, bias = make_layer(**{"kernel": "auto", **options})
    x = inputs(given.get("rows", 3), columns=layer.in_features, dtype=given.get("dtype", torch.bfloat16))
    assert bias is not None
    torch.testing.assert_close(layer(x).double(), F.linear(x.double(), weight, bias), rtol=0.02, atol=0.05)
    assert seen == []


@needs_kernel
def test_int4_kernel_serves_plain_groups_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spied(monkeypatch)
    layer, _, _ = make_layer(kernel="auto")
    layer(inputs(linear._INT4PACK_ROWS, dtype=torch.bfloat16))
    assert len(seen) == 1


@pytest.mark.parametrize("options", list(LAYERS.values()), ids=list(LAYERS))
def test_state_dict_is_the_file_and_comes_back(options: dict[str, Any]) -> None:
    layer, weight, _ = make_layer(**options)
    state = layer.state_dict()
    names = ["qweight", "qzeros", "scales", "g_idx"] + (["bias"] if options.get("bias", True) else [])
    assert list(state) == names
    again = QuantLinear(
        layer.in_features,
        layer.out_features,
        bits=layer.bits,
        group_size=options["group_size"],
        bias=None if layer.bias is None else layer.bias.dtype,
        version=layer.version,
    )
    again.load_state_dict(state)
    assert torch.equal(again.dequantized().double(), weight)
    x = inputs(3, columns=layer.in_features)
    assert torch.equal(again(x), layer(x))


def test_new_weights_replace_the_kernels_copy_of_the_old_ones() -> None:
    layer, _, _ = make_layer(kernel="auto")
    other, _, _ = make_layer(kernel="auto", seed=5)
    x = inputs(2, dtype=torch.bfloat16)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_casting_a_model_leaves_the_stored_scales_alone(dtype: torch.dtype) -> None:
    layer, weight, _ = make_layer()
    layer.to(dtype)
    assert layer.scales.dtype == torch.float16
    assert torch.equal(layer.dequantized().double(), weight)


def test_a_copy_computes_the_same_and_shares_nothing() -> None:
    layer, _, _ = make_layer(kernel="auto")
    x = inputs(2, dtype=torch.bfloat16)
    before = layer(x)
    twin = copy.deepcopy(layer)
    layer.qweight.zero_()
    assert torch.equal(twin(x), before)


def test_compiled_forward_is_the_eager_reference() -> None:
    layer, _, _ = make_layer()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = inputs(3)
    assert torch.equal(compiled(x), layer(x))


def test_printing_shows_what_is_inside() -> None:
    layer, _, _ = make_layer()
    assert repr(layer) == "QuantLinear(128, 64, bits=4, group_size=32, bias=True)"
