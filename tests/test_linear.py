"""QuantLinear against plain matrices: each way to multiply, both forms of its weight, and what its state dict keeps."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qquant import linear, telling
from qquant.errors import BadModelError, UsageError
from qquant.linear import QuantLinear, gptq_linear
from qquant.linear_kernels import Place
from qquant.linear_ops import rounded_activations
from qquant.linear_torch import INT4_GROUPS
from qquant.packing import pack_zeros
from tests.processor import TILES

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
    "int4 signed": {"bits": 4, "group_size": 32, "signed": True},
    "int3 signed desc_act": {"bits": 3, "group_size": 32, "signed": True, "scatter": True},
    "int2 signed": {"bits": 2, "group_size": 32, "signed": True},
    "int8 signed": {"bits": 8, "group_size": 64, "signed": True},
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
    kernel: str = "reference",
    signed: bool = False,
    seed: int = 0,
) -> tuple[QuantLinear, Tensor, Tensor | None]:
    """A random layer with the weight and bias it stands for, in float64; the weight is made without packing."""
    draw = torch.Generator().manual_seed(seed)
    size = columns if group_size == -1 else group_size
    groups = -(-columns // size)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=draw)
    scales = (torch.rand(rows, groups, generator=draw) * 0.01 + 0.002).half()
    if signed:
        scales *= 1 - 2 * torch.randint(0, 2, scales.shape, generator=draw)
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


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> None:
    """torch.compile gives up on a function that was compiled for too many layers."""
    torch.compiler.reset()


def served(layer: QuantLinear, tokens: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """What multiplies so many tokens."""
    return next(step.implementation for step in layer.steps(dtype) if tokens <= step.tokens)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the compiled module is not built."""
    monkeypatch.setattr(linear, "place_of", lambda _: Place("cpu", "avx512", "avx512", "qquant._C: not built"))


@pytest.fixture(params=["avx512_vnni", "avx512_bf16", "amx_bf16", "portable"])
def with_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As where it is, whatever this processor is: the operators have references."""
    monkeypatch.setattr(linear, "place_of", lambda _: Place("cpu", request.param, "avx512", ""))
    level: str = request.param
    return level


PACKED = {name: options for name, options in LAYERS.items() if options["bits"] in (4, 8)} | {
    "int4 groups of 12": {"bits": 4, "group_size": 12, "columns": 120},
    "int8 groups of 6": {"bits": 8, "group_size": 6, "columns": 128, "sym": False, "version": 2},
    "int4 72 rows, desc_act": {"bits": 4, "group_size": 32, "rows": 72, "sym": False, "scatter": True},
    "int8 row": {"bits": 8, "group_size": -1},
}
"""Layers that panels can hold."""


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
def test_any_batch_shape_is_the_flat_result_reshaped(batch: tuple[int, ...], kernel: str) -> None:
    layer, _, _ = make_layer(kernel=kernel)
    x = inputs(*batch, dtype=torch.bfloat16)
    result = layer(x)
    assert result.shape == (*batch, 64)
    torch.testing.assert_close(result, layer(x.reshape(-1, 128)).reshape(result.shape), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_the_input_do_not_matter(kernel: str, dtype: torch.dtype) -> None:
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
    packed = (fake.qweight, fake.qzeros, fake.scales, fake.g_idx, fake.bias, fake.bits, fake.version)
    with pytest.raises(RuntimeError, match="128 features"):
        gptq_linear(torch.empty(2, 100, device="meta"), *packed)
    assert fake(torch.empty(2, 128, device="meta")).shape == (2, 64)


@pytest.mark.parametrize("scatter", [False, True], ids=["in order", "desc_act"])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_an_input_of_another_width_or_kind_is_refused(kernel: str, scatter: bool, with_kernels: str) -> None:
    layer, _, _ = make_layer(kernel=kernel, scatter=scatter)
    for columns in (136, 256, 64):
        with pytest.raises(UsageError, match=rf"x must end in 128 features, got \[2, {columns}\]"):
            layer(torch.ones(2, columns))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(UsageError, match=f"x must be floating, got {dtype}"):
            layer(torch.ones(2, 128).to(dtype))


@needs_kernel
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("grid", [{}, {"sym": False}, {"signed": True}], ids=["sym", "asym", "signed"])
@pytest.mark.parametrize("group_size", INT4_GROUPS)
def test_int4_kernel_errs_at_most_a_tenth_more_than_plain_bfloat16(
    group_size: int, grid: dict[str, bool], bias: bool
) -> None:
    """Both against float64; the plain path is what nobody objects to: a bfloat16 matmul with rounded weights.

    The kernel takes no bias, so adding it afterwards costs one more rounding of the result, independent of the rest.
    """
    layer, weight, offset = make_layer(
        group_size=group_size, rows=256, columns=512, version=2, kernel="torch", bias=bias, **grid
    )
    assert served(layer, 64) == "torch int4pack"
    x = inputs(64, columns=512, dtype=torch.bfloat16)
    truth = F.linear(x.double(), weight, offset)

    def error(result: Tensor) -> float:
        return float((result.double() - truth).norm() / truth.norm())

    plain = error(F.linear(x, weight.to(torch.bfloat16), None if offset is None else offset.to(torch.bfloat16)))
    rounding = error(truth.to(torch.bfloat16)) if bias else 0.0
    assert error(layer(x)) <= math.hypot(1.1 * plain, rounding)


@needs_kernel
@pytest.mark.parametrize("signed", [False, True], ids=["", "signed"])
def test_torchs_int8_kernel_serves_rows_of_one_scale(signed: bool) -> None:
    layer, weight, bias = make_layer(bits=8, group_size=-1, kernel="torch", signed=signed)
    assert bias is not None
    assert served(layer, 3) == "torch int8pack"
    x = inputs(3, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x).double(), F.linear(x.double(), weight, bias), rtol=0.02, atol=0.05)


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
    "many rows": ({}, {"rows": 129}),
}


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize(("options", "given"), list(NOT_SERVED.values()), ids=list(NOT_SERVED))
def test_int4_kernel_is_left_out_where_it_was_not_measured_to_win(
    options: dict[str, Any], given: dict[str, Any]
) -> None:
    layer, weight, bias = make_layer(**{"kernel": "auto", **options})
    x = inputs(given.get("rows", 3), columns=layer.in_features, dtype=given.get("dtype", torch.bfloat16))
    assert bias is not None
    torch.testing.assert_close(layer(x).double(), F.linear(x.double(), weight, bias), rtol=0.02, atol=0.05)
    if given.get("rows", 3):
        assert served(layer, given.get("rows", 3), x.dtype) == "reference"


@needs_kernel
@pytest.mark.usefixtures("without_kernels")
def test_int4_kernel_serves_plain_groups_in_bfloat16_where_ours_is_not_built() -> None:
    layer, _, _ = make_layer(kernel="auto")
    assert served(layer, 128) == "torch int4pack"
    layer(inputs(128, dtype=torch.bfloat16))
    assert not layer.packed


@pytest.mark.usefixtures("without_kernels")
def test_a_slower_path_is_explained_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "said", set())
    for seed in range(2):
        layer, _, _ = make_layer(kernel="auto", seed=seed)
        layer(inputs(2))
    assert [record.message for record in caplog.records] == [
        "packed linears are dequantized for every call of many tokens: qquant._C: not built"
    ]


@pytest.mark.usefixtures("without_kernels")
def test_kernels_that_were_asked_for_and_are_not_there_are_an_error() -> None:
    layer, _, _ = make_layer(kernel="kernel")
    with pytest.raises(UsageError, match=r"qquant\._C: not built; choose 'auto'"):
        layer(inputs(2))


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
        kernel="reference",
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


@pytest.mark.parametrize("options", list(PACKED.values()), ids=list(PACKED))
def test_panels_give_back_the_checkpoints_tensors_bit_for_bit(options: dict[str, Any]) -> None:
    layer, weight, _ = make_layer(**options)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.pack()
    assert layer.packed
    assert not {"qweight", "qzeros", "g_idx"} & dict(layer.named_buffers()).keys()  # nothing is held twice
    assert torch.equal(layer.dequantized().double(), weight)
    in_panels = layer.state_dict()
    layer.unpack()
    for state in (in_panels, layer.state_dict()):
        assert list(state) == list(before)
        for name, tensor in before.items():
            assert torch.equal(state[name], tensor)
            assert state[name].dtype == tensor.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", list(PACKED.values()), ids=list(PACKED))
def test_every_step_of_the_table_is_the_plain_linear(
    options: dict[str, Any], dtype: torch.dtype, with_kernels: str
) -> None:
    layer, weight, bias = make_layer(**{**options, "kernel": "kernel"})
    for tokens in (1, 15, 16):
        x = inputs(tokens, columns=layer.in_features, dtype=dtype)
        expected = F.linear(x.double(), weight, bias)
        # A product of rounded weights, as the dense step computes it, errs by half a step of each.
        limit = summing_limit(x, weight) + torch.finfo(dtype).eps * float(expected.abs().max())
        assert layer(x).dtype == dtype
        assert float((layer(x).double() - expected).abs().max()) <= limit
    assert layer.packed


def test_a_layer_packs_itself_at_its_first_call_and_not_for_another_dtype(with_kernels: str) -> None:
    layer, _, _ = make_layer(kernel="auto")
    layer(inputs(2, dtype=torch.float64))
    assert not layer.packed
    layer(inputs(2))
    assert layer.packed
    expected = layer(inputs(2))
    torch.testing.assert_close(layer(inputs(2).double()).float(), expected)


@pytest.mark.parametrize("bits", [2, 3])
def test_other_widths_stay_as_they_are_stored(bits: int, with_kernels: str) -> None:
    layer, _, _ = make_layer(bits=bits, rows=96, kernel="auto")
    layer(inputs(2))
    assert not layer.packed
    with pytest.raises(UsageError, match="4 or 8"):
        layer.pack()


def test_groups_of_very_unequal_size_stay_as_they_are_stored(with_kernels: str) -> None:
    layer, _, _ = make_layer(kernel="auto")
    layer.g_idx.zero_()
    layer.g_idx[-1] = 3
    expected = F.linear(inputs(2), layer.dequantized(), layer.bias.float())
    torch.testing.assert_close(layer(inputs(2)), expected)
    assert not layer.packed
    layer.kernel = "kernel"
    with pytest.raises(UsageError, match="about one size"):
        layer(inputs(2))


def test_a_group_that_is_not_there_is_refused(with_kernels: str) -> None:
    layer, _, _ = make_layer(kernel="auto")
    layer.g_idx[5] = 4
    with pytest.raises(BadModelError, match=r"groups 0\.\.3, got 0\.\.4"):
        layer(inputs(2))


def test_a_write_to_a_stored_tensor_of_a_packed_layer_counts(with_kernels: str) -> None:
    layer, _, bias = make_layer(kernel="auto")
    layer(inputs(2))
    assert layer.packed
    layer.scales.mul_(2)
    assert not layer.packed
    twice = layer(inputs(2))
    layer.scales = layer.scales / 2
    assert bias is not None
    torch.testing.assert_close((twice - bias.float()) / 2, layer(inputs(2)) - bias.float())


def test_the_wish_may_change_between_calls(with_kernels: str) -> None:
    layer, _, _ = make_layer(kernel="auto")
    x = inputs(2)
    first = layer(x)
    layer.kernel = "reference"
    torch.testing.assert_close(layer(x), first)
    assert not layer.packed
    with pytest.raises(UsageError, match="kernel must be one of auto, reference, kernel, torch, got 'fast'"):
        layer.kernel = "fast"


def test_eight_bit_activations_are_as_their_reference_rounds_them(with_kernels: str) -> None:
    layer, weight, bias = make_layer(kernel="auto")
    layer.activation_bits = 8
    x = inputs(40)
    expected = F.linear(rounded_activations(x, 32), weight.float(), None if bias is None else bias.float())
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(layer(x), F.linear(x, weight.float(), bias.float() if bias is not None else None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_casting_a_packed_layer_rounds_its_bias_as_casting_a_stored_one(dtype: torch.dtype, with_kernels: str) -> None:
    layer, _, _ = make_layer(kernel="auto")
    twin = copy.deepcopy(layer).to(dtype)
    layer(inputs(2))
    layer.to(dtype)
    assert layer.packed
    for name, tensor in twin.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor)
        assert layer.state_dict()[name].dtype == tensor.dtype
    assert torch.equal(layer(inputs(2)), twin(inputs(2)))


def test_copies_and_pickles_of_a_packed_layer_compute_the_same(with_kernels: str) -> None:
    layer, _, _ = make_layer(kernel="auto")
    x = inputs(3)
    before = layer(x)
    assert layer.packed
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), before)
    assert layer.packed


def test_packing_in_inference_mode_leaves_tensors_that_can_be_changed(with_kernels: str) -> None:
    layer, _, _ = make_layer(kernel="auto")
    with torch.inference_mode():
        layer(inputs(2))
    assert not layer.panels.words.is_inference()
    layer.unpack()
    assert not layer.qweight.is_inference()


def test_a_layer_that_accelerate_offloads_is_left_as_it_is_stored(with_kernels: str) -> None:
    layer, _, _ = make_layer(kernel="auto")
    layer.__dict__["_hf_hook"] = SimpleNamespace(offload=True)
    layer(inputs(2))
    assert not layer.packed


@pytest.mark.parametrize("order", ["in order", "desc_act"])
def test_a_packed_layer_compiles_whole_for_any_number_of_tokens(order: str, with_kernels: str) -> None:
    layer, _, _ = make_layer(kernel="auto", scatter=order == "desc_act")
    layer(inputs(2, dtype=torch.bfloat16))
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (2, 3, 20, 40):
        if with_kernels == "avx512_bf16" and tokens > 3 and not TILES:
            pytest.skip("no bfloat16 tile kernel here")
        x = inputs(tokens, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), layer(x))


def test_a_packed_layer_exports_for_any_number_of_tokens(with_kernels: str) -> None:
    layer, weight, bias = make_layer(kernel="auto")
    layer(inputs(2))
    shape = {"x": {0: torch.export.Dim("tokens", min=1, max=4096)}}
    program = torch.export.export(layer, (inputs(4),), dynamic_shapes=shape).module()
    for tokens in (1, 100):
        x = inputs(tokens)
        expected = F.linear(x.double(), weight, bias)
        assert float((program(x).double() - expected).abs().max()) <= summing_limit(x, weight)


def test_a_compiled_packed_layer_passes_a_gradient_to_its_input(with_kernels: str) -> None:
    layer, weight, _ = make_layer(kernel="auto")
    x = inputs(3).requires_grad_()
    layer(x.detach())
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum().backward()
    expected = weight.sum(0).float().expand(3, -1)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=summing_limit(torch.ones(1, 64), weight.T))


@pytest.mark.parametrize("options", list(PACKED.values()), ids=list(PACKED))
def test_a_packed_layer_goes_over_the_meta_device_and_is_filled_again(
    options: dict[str, Any], with_kernels: str
) -> None:
    layer, _, _ = make_layer(**options)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.pack()
    layer.to("meta")
    held = layer.state_dict()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in held.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in before.items()
    }
    layer.to_empty(device="cpu").load_state_dict(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    layer.pack()
    layer.to("meta").load_state_dict(before, assign=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_state_that_does_not_fit_leaves_a_packed_layer_as_it_was(with_kernels: str) -> None:
    layer, _, _ = make_layer()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.pack()
    with pytest.raises(RuntimeError, match="size mismatch for scales"):
        layer.load_state_dict(before | {"scales": torch.zeros(3, 3)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_layer_that_is_traced_before_its_first_call_says_so_once(
    with_kernels: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "said", set())
    layer, _, _ = make_layer(kernel="auto")
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for tokens in (2, 3):
        x = inputs(tokens)
        assert torch.equal(compiled(x), copy.deepcopy(layer)._reference(x))
    assert [record.message for record in caplog.records if "traced" in record.message] == [
        "packed linears were traced before their first call, and the trace runs the reference; "
        "call the model once, or qquant.model_kernels.attach_kernels, and trace again"
    ]


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_a_gradient_passes_through_to_the_input(kernel: str, with_kernels: str) -> None:
    """Adapters around a packed layer learn; the weight itself has no gradient."""
    layer, weight, _ = make_layer(kernel=kernel)
    x = inputs(3).requires_grad_()
    sensitivity = inputs(3, columns=64, seed=2)
    layer(x).backward(sensitivity)
    torch.testing.assert_close(x.grad, sensitivity @ weight.float())
