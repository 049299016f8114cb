"""The operators of a decoder layer: kernels against the references of layer_ops.py, bit for bit.

Panels are drawn by linear_cases.py. Whole models with these operators are in test_decoder_step.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qquant import layer_ops, plain_attention
from tests import linear_cases

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not layer_ops.kernels_are_live(), reason="qquant._C is not built")
ATTENDS = plain_attention.kernel_is_live()

bounded = settings(deadline=None, derandomize=True, max_examples=40, database=None)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """How the panels of one stage are made."""

    bits: int = 4
    group_size: int = 32
    negative_scales: bool = False
    with_zeros: bool = False
    with_order: bool = False
    with_bias: bool = False
    activation_bits: int = 0

    def arguments(self, columns: int, widths: tuple[int, ...], seed: int) -> tuple[Any, ...]:
        """Nine arguments: a linear of so many columns."""
        case = linear_cases.Case(**vars(self), columns=columns, widths=widths, seed=seed)
        call = linear_cases.make(case)
        found = (call.words, call.scales, call.zeros, call.order, call.bias)
        return (*found, call.bits, call.group_size, call.zero, call.activation_bits)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A decoder layer by its sizes; tensors are drawn from ``seed``."""

    batch: int = 2
    features: int = 64
    kv_heads: int = 2
    queries_per_head: int = 2
    size: int = 16
    width: int = 48
    stages: tuple[Linear, Linear, Linear, Linear] = (Linear(), Linear(), Linear(), Linear())
    query_norm: bool = False
    key_norm: bool = False
    gate_first: bool = True
    tokens: int = 5
    """Of the cache, the new one included."""
    mask_batch: int | None = None
    """Rows of the mask; None: there is none."""
    one_angle: bool = False
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.queries_per_head


class Drawn:
    """The tensors of a layer, in the operators' order."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.random = layer, torch.Generator().manual_seed(layer.seed)
        inside, size = layer.heads * layer.size, layer.size
        widths = (inside, layer.kv_heads * size, layer.kv_heads * size)
        shapes: list[tuple[int, tuple[int, ...]]] = [(layer.features, widths), (inside, (layer.features,))]
        shapes += [(layer.features, (layer.width, layer.width)), (layer.width, (layer.features,))]
        made = [
            stage.arguments(columns, rows, layer.seed + i)
            for i, (stage, (columns, rows)) in enumerate(zip(layer.stages, shapes, strict=True))
        ]
        self.x, self.attended = self.real(layer.batch, 1, layer.features), self.real(layer.batch, 1, inside)
        angles = 1 if layer.one_angle else layer.batch
        self.turns = self.real(angles, 1, size), self.real(angles, 1, size)
        head_norms = (self.real(size) if norm else None for norm in (layer.query_norm, layer.key_norm))
        self.inputs: list[Any] = [self.real(layer.features), 1e-6, *self.turns, *head_norms, 1e-5, *made[0]]
        self.inputs += [layer.heads, layer.kv_heads, size]
        self.output: list[Any] = [
            *made[1],
            self.real(layer.features),
            1e-6,
            *made[2],
            *made[3],
            layer.width,
            layer.gate_first,
        ]
        self.keys, self.values = (self.real(layer.batch, layer.kv_heads, layer.tokens, size) for _ in range(2))
        self.mask = None
        if layer.mask_batch is not None:
            rows = 1 if layer.mask_batch == 1 else layer.batch
            self.mask = torch.rand(rows, 1, 1, layer.tokens, generator=self.random) < 0.7

    def real(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).bfloat16()

    def step(self, keys: Tensor, values: Tensor) -> tuple[Any, ...]:
        return (self.x, *self.inputs, keys, values, self.mask, self.layer.size**-0.5, *self.output)


def stages(columns: tuple[int, ...]) -> st.SearchStrategy[tuple[Linear, ...]]:
    def one(columns: int) -> st.SearchStrategy[Linear]:
        def sized(bits: int) -> st.SearchStrategy[Linear]:
            per = 32 // bits
            group = st.one_of(st.sampled_from([8, 32, 64, 128]), st.integers(1, columns // per).map(lambda n: n * per))
            flags = ("negative_scales", "with_zeros", "with_order", "with_bias")
            fields: dict[str, Any] = {**dict.fromkeys(flags, st.booleans()), "activation_bits": st.sampled_from([0, 8])}
            return st.builds(Linear, bits=st.just(bits), group_size=group, **fields)

        return st.sampled_from([4, 8]).flatmap(sized)

    return st.tuples(*map(one, columns))


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    size, kv_heads, queries = draw(st.sampled_from([8, 16, 40])), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    features, width = (8 * draw(st.integers(1, 20)) for _ in range(2))
    inside = size * kv_heads * queries
    return Layer(
        batch=draw(st.integers(0, 8)),
        features=features,
        kv_heads=kv_heads,
        queries_per_head=queries,
        size=size,
        width=width,
        stages=draw(stages((features, inside, features, width))),  # type: ignore[arg-type]
        query_norm=draw(st.booleans()),
        key_norm=draw(st.booleans()),
        gate_first=draw(st.booleans()),
        tokens=draw(st.integers(1, 40)),
        mask_batch=draw(st.sampled_from([None, 1, 2])),
        one_angle=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == torch.bfloat16
    assert found.is_contiguous()
    # NaN, of which processors make more than one kind, may come from a row without any key or from no numbers at all.
    different = (found.view(torch.int16) != expected.view(torch.int16)) & ~(found.isnan() & expected.isnan())
    assert not different.any(), int(different.sum())


@given(layers())
@bounded
def test_inputs_of_attention_are_those_of_the_reference(layer: Layer) -> None:
    drawn = Drawn(layer)
    found = layer_ops.attention_inputs(drawn.x, *drawn.inputs)
    for ours, theirs in zip(found, layer_ops.inputs_reference(drawn.x, *drawn.inputs), strict=True):
        assert_same_bits(ours, theirs.contiguous())


@given(layers())
@bounded
def test_the_output_of_a_layer_is_that_of_the_reference(layer: Layer) -> None:
    drawn = Drawn(layer)
    found = layer_ops.layer_output(drawn.attended, drawn.x, *drawn.output)
    assert_same_bits(found, layer_ops.output_reference(drawn.attended, drawn.x, *drawn.output))


@pytest.mark.skipif(not ATTENDS, reason="no attention kernel for this processor")
@given(layers())
@bounded
def test_a_whole_layer_is_that_of_the_reference(layer: Layer) -> None:
    drawn = Drawn(layer)
    ours, theirs = ((drawn.keys.clone(), drawn.values.clone()) for _ in range(2))
    found = layer_ops.layer_step(*drawn.step(*ours))
    assert_same_bits(found, layer_ops.step_reference(*drawn.step(*theirs)))
    for mine, other, before in zip(ours, theirs, (drawn.keys, drawn.values), strict=True):
        assert_same_bits(mine, other)
        assert torch.equal(mine[:, :, :-1], before[:, :, :-1])


def spread(tensor: Tensor) -> Tensor:
    """The same numbers with others between and around them."""
    wide = torch.full([2 * n + 1 for n in tensor.shape], 7.0, dtype=tensor.dtype)
    view = wide[tuple(slice(1, 2 * n + 1, 2) for n in tensor.shape)]
    return view.copy_(tensor)


def test_strides_change_nothing() -> None:
    drawn = Drawn(Layer(batch=3, query_norm=True))
    expected = layer_ops.attention_inputs(drawn.x, *drawn.inputs)
    strided = [drawn.inputs[0], 1e-6, *map(spread, drawn.turns), *drawn.inputs[4:]]
    for ours, theirs in zip(layer_ops.attention_inputs(spread(drawn.x), *strided), expected, strict=True):
        assert_same_bits(ours, theirs)
    found = layer_ops.layer_output(spread(drawn.attended), spread(drawn.x), *drawn.output)
    assert_same_bits(found, layer_ops.layer_output(drawn.attended, drawn.x, *drawn.output))
    by_heads = drawn.attended.view(3, 1, 4, 16)
    assert_same_bits(layer_ops.layer_output(by_heads, drawn.x, *drawn.output), found)


@pytest.mark.skipif(not ATTENDS, reason="no attention kernel for this processor")
def test_a_cache_with_room_around_it_is_written_at_its_last_token_only() -> None:
    drawn = Drawn(Layer(batch=2, mask_batch=2))
    plain, roomy = ([drawn.keys.clone(), drawn.values.clone()] for _ in range(2))
    wide = [torch.full((4, 4, 9, 16), 3.0).bfloat16() for _ in roomy]
    views = [one[1:3, 1:3, 2:7].copy_(other) for one, other in zip(wide, roomy, strict=True)]
    assert_same_bits(layer_ops.layer_step(*drawn.step(*views)), layer_ops.layer_step(*drawn.step(*plain)))
    for one, view, other in zip(wide, views, plain, strict=True):
        assert torch.equal(view, other)
        view.fill_(3.0)
        assert (one == 3.0).all()


def test_operators_are_well_formed() -> None:
    drawn = Drawn(Layer(stages=(Linear(with_bias=True), Linear(with_order=True), Linear(with_zeros=True), Linear())))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(layer_ops.attention_inputs, (drawn.x, *drawn.inputs), test_utils=tests)
    torch.library.opcheck(layer_ops.layer_output, (drawn.attended, drawn.x, *drawn.output), test_utils=tests)
    if ATTENDS:
        torch.library.opcheck(layer_ops.layer_step, drawn.step(drawn.keys, drawn.values), test_utils=tests)


Change = Callable[[Drawn], object]


def put(place: int, value: Any) -> Change:
    return lambda drawn: drawn.inputs.__setitem__(place, value)


def put_out(place: int, value: Any) -> Change:
    return lambda drawn: drawn.output.__setitem__(place, value)


def put_x(value: Tensor) -> Change:
    return lambda drawn: setattr(drawn, "x", value)


BAD_INPUTS: dict[str, tuple[Change, str]] = {
    "x_float32": (put_x(torch.zeros(2, 1, 64)), "x must be bfloat16, got Float"),
    "x_of_two_tokens": (put_x(torch.zeros(2, 2, 64).bfloat16()), r"x must be \[B, 1, N\], got \[2, 2, 64\]"),
    "x_of_other_width": (
        put_x(torch.zeros(2, 1, 32).bfloat16()),
        "the input of panels must end in 64 features, got 32",
    ),
    "norm_of_other_width": (put(0, torch.ones(32).bfloat16()), r"a norm's weight must be \[64\], got \[32\]"),
    "norm_float32": (put(0, torch.ones(64)), "a norm's weight must be bfloat16, got Float"),
    "cos_of_other_size": (put(2, torch.ones(2, 1, 8).bfloat16()), r"cos must be \[2 or 1, 1, 16\]"),
    "cos_of_other_batch": (put(2, torch.ones(3, 1, 16).bfloat16()), r"cos must be \[2 or 1, 1, 16\]"),
    "sin_float16": (put(3, torch.ones(2, 1, 16).half()), "sin must be bfloat16, got Half"),
    "sin_float32_for_a_whole_head": (
        put(3, torch.ones(2, 1, 16)),
        r"sin in float32 must be \[2 or 1, 1, 1, up to 8\]",
    ),
    "sin_of_another_dtype_than_cos": (put(3, torch.ones(2, 1, 1, 8)), "cos and sin must be alike"),
    "sin_of_two_tokens": (put(3, torch.ones(2, 2, 16).bfloat16()), r"sin must be \[2 or 1, 1, 16\]"),
    "query_norm_of_other_size": (put(4, torch.ones(8).bfloat16()), r"a norm's weight must be \[16\], got \[8\]"),
    "words_int64": (put(7, torch.zeros(8, 8, 16, dtype=torch.int64)), r"words must be \[P, S, 16\] int32"),
    "order_of_other_length": (put(10, torch.zeros(8, dtype=torch.int32)), r"order must be \[64\] int32"),
    "bias_of_other_length": (put(11, torch.zeros(8)), r"bias must be \[128\] float32, got \[8\]"),
    "bits": (put(12, 3), "bits must be 4 or 8, got 3"),
    "group_size": (put(13, 12), "group_size must be a multiple of 8"),
    "activation_bits": (put(15, 4), "activation_bits must be -1, 0 or 8, got 4"),
    "too_many_heads": (put(16, 6), "outputs need 10 panels, got 8"),
    "no_heads": (put(17, 0), "heads and their size must be positive"),
    "odd_size": (put(18, 15), "even"),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=list(BAD_INPUTS))
def test_inputs_of_attention_refuse(change: Change, message: str) -> None:
    drawn = Drawn(Layer())
    change(drawn)
    with pytest.raises(RuntimeError, match=message):
        layer_ops.attention_inputs(drawn.x, *drawn.inputs)


def put_attended(value: Tensor) -> Change:
    return lambda drawn: setattr(drawn, "attended", value)


BAD_OUTPUTS: dict[str, tuple[Change, str]] = {
    "attended_float32": (put_attended(torch.zeros(2, 1, 64)), "attended must be bfloat16, got Float"),
    "attended_of_other_batch": (put_attended(torch.zeros(3, 1, 43).bfloat16()), "attended must hold 2 rows"),
    "attended_of_other_width": (
        put_attended(torch.zeros(2, 1, 32).bfloat16()),
        "the input of panels must end in 64 features, got 32",
    ),
    "stream_float32": (put_x(torch.zeros(2, 1, 64)), "stream must be bfloat16, got Float"),
    "stream_of_two_tokens": (put_x(torch.zeros(2, 2, 64).bfloat16()), r"stream must be \[B, 1, N\], got \[2, 2, 64\]"),
    "norm_of_other_width": (put_out(9, torch.ones(32).bfloat16()), r"a norm's weight must be \[64\], got \[32\]"),
    "other_width": (put_out(29, 64), "the input of panels must end in 48 features, got 64"),
    "no_width": (put_out(29, 0), "width must be positive"),
    "scales_of_other_shape": (put_out(12, torch.ones(6, 3, 16)), r"scales must be \[6, 2, 16\] float16 or float32"),
}


@pytest.mark.parametrize(("change", "message"), BAD_OUTPUTS.values(), ids=list(BAD_OUTPUTS))
def test_the_output_of_a_layer_refuses(change: Change, message: str) -> None:
    drawn = Drawn(Layer())
    change(drawn)
    with pytest.raises(RuntimeError, match=message):
        layer_ops.layer_output(drawn.attended, drawn.x, *drawn.output)


BAD_CACHES: dict[str, tuple[dict[str, Tensor], str]] = {
    "keys_float32": ({"keys": torch.zeros(2, 2, 5, 16)}, "keys must be bfloat16, got Float"),
    "keys_of_other_batch": ({"keys": torch.zeros(3, 2, 5, 16).bfloat16()}, r"keys must be \[2, 2, T, 16\]"),
    "values_of_other_heads": ({"values": torch.zeros(2, 4, 5, 16).bfloat16()}, r"values must be \[2, 2, T, 16\]"),
    "values_without_room": ({"values": torch.zeros(2, 2, 0, 16).bfloat16()}, "values must be .* with room for the new"),
    "values_of_other_length": ({"values": torch.zeros(2, 2, 6, 16).bfloat16()}, "do not fit"),
    "mask_of_other_batch": ({"mask": torch.ones(3, 1, 1, 5, dtype=torch.bool)}, r"mask must be \[2 or 1"),
    "mask_of_other_length": ({"mask": torch.ones(2, 1, 1, 4, dtype=torch.bool)}, r"mask must be \[2 or 1"),
    "mask_of_numbers": ({"mask": torch.ones(2, 1, 1, 5)}, "mask must be bool"),
}


@pytest.mark.skipif(not ATTENDS, reason="no attention kernel for this processor")
@pytest.mark.parametrize(("change", "message"), BAD_CACHES.values(), ids=list(BAD_CACHES))
def test_a_whole_layer_refuses(change: dict[str, Tensor], message: str) -> None:
    drawn = Drawn(Layer())
    for name, value in change.items():
        setattr(drawn, name, value)
    with pytest.raises(RuntimeError, match=message):
        layer_ops.layer_step(*drawn.step(drawn.keys, drawn.values))


@pytest.mark.slow  # each starts an interpreter and imports torch
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_kernels_of_other_instruction_sets_meet_the_references(isa: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from tests import test_layer_ops as t; t.check_here()"],
        env={**os.environ, "QQUANT_CPU_ISA": isa},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    if f"panel_linear: {isa}," not in result.stdout:
        pytest.skip(f"this processor has no {isa}")


def check_here() -> None:
    """Both halves of layers by the kernels that this process may run."""
    print(torch.ops.qquant.cpu_kernel_info())
    test_inputs_of_attention_are_those_of_the_reference()
    test_the_output_of_a_layer_is_that_of_the_reference()


EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
"""All numbers that bfloat16 has."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies between linears, compiled as it is shipped and called without torch."""
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("g++ is not installed")
    made, kernels = tmp_path_factory.mktemp("between") / "between", ROOT / "qquant" / "csrc" / "cpu"
    sources = [ROOT / "tests" / "csrc" / "between_harness.cpp", kernels / "layer_step.cpp", kernels / "isa.cpp"]
    command = [gxx, "-std=c++17", "-O3", f"-I{kernels}", *map(str, sources), "-o", str(made)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return made


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_number_goes_between_linears_as_through_torch(program: Path, isa: str) -> None:
    heads, size = 1024, 64
    shuffled = EVERY[torch.randperm(len(EVERY), generator=torch.Generator().manual_seed(0))]
    for others in (torch.ones_like(EVERY), shuffled):
        given = torch.cat([EVERY, others]).view(torch.uint8).numpy().tobytes()
        environment = {**os.environ, "QQUANT_CPU_ISA": isa}
        result = subprocess.run([program, str(heads), str(size)], input=given, env=environment, capture_output=True)
        assert result.returncode == 0, result.stderr
        if result.stderr.decode() != isa:
            pytest.skip(f"this processor has no {isa}")
        found = torch.frombuffer(bytearray(result.stdout), dtype=torch.bfloat16).view(3, -1)
        low, high = EVERY.view(heads, size).chunk(2, -1)
        cos, sin = others[:size], others[size : 2 * size]
        rotated = EVERY.view(heads, size) * cos + torch.cat((-high, low), -1) * sin
        for ours, theirs in zip(found, (F.silu(EVERY) * others, EVERY + others, rotated.flatten()), strict=True):
            assert_same_bits(ours, theirs)
