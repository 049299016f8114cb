"""Whole models on the kernels: one stretch of memory, siblings by one call, and saving as if nothing had happened."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qquant
from qquant import linear, linear_ops, model_kernels, telling
from qquant.errors import BadModelError, UsageError
from qquant.linear import QuantLinear
from qquant.linear_kernels import Kernel, Place
from qquant.measure import tensor_bytes
from qquant.model_kernels import attach_kernels
from tests.packed import IDS, logits_of, pack_by_hand
from tests.processor import TILES

Folders = Callable[..., Path]
QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the compiled module is built, on any processor: the operators have references."""
    place = Place("cpu", "avx512_bf16", "avx512", "")
    monkeypatch.setattr(linear, "place_of", lambda _: place)
    monkeypatch.setattr(model_kernels, "place_of", lambda _: place)


@pytest.fixture
def folder(tiny_qwen2: Path, tmp_path: Path) -> Path:
    """An int4 checkpoint."""
    pack_by_hand(tiny_qwen2, tmp_path / "packed")
    return tmp_path / "packed"


def load(folder: Path, kernel: str = "reference", dtype: torch.dtype = torch.float32) -> Any:
    """A model whose layers are as they are stored, with a wish for later."""
    model: Any = qquant.load_quantized(folder, kernel=Kernel.REFERENCE, dtype=dtype)
    for layer in packed_layers(model).values():
        layer.unpack()
        layer.kernel = kernel
    return model


def packed_layers(model: Any) -> dict[str, QuantLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}


def block(model: Any, names: tuple[str, ...], index: int = 0) -> list[Any]:
    return [model.model.layers[index].get_submodule(name) for name in names]


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(state) == list(other) and all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def inputs(layer: Any, tokens: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(1, tokens, layer.in_features, generator=torch.Generator().manual_seed(seed))


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The widths of every call of the operator."""
    seen: list[list[int]] = []
    plain = linear_ops.panel_linear

    def spy(x: Tensor, *arguments: Any) -> Any:
        seen.append(arguments[5])
        return plain(x, *arguments)

    monkeypatch.setattr(linear, "panel_linear", spy)
    monkeypatch.setattr(model_kernels, "panel_linear", spy)
    return seen


def test_every_layer_is_packed_and_every_kernel_gets_a_line(folder: Path) -> None:
    model = load(folder, "auto")
    expected = logits_of(load(folder))
    lines = attach_kernels(model)
    assert all(layer.packed for layer in packed_layers(model).values())
    assert lines == ["int4 g32, 14 linears: AVX-512 VNNI kernel (16 or 24 bits of activations by 8-bit products)"]
    # The same weights in another order of sums, and 24-bit activations: a few float32 roundings of logits of order 1.
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_packed_linears_is_left_alone() -> None:
    assert attach_kernels(nn.Sequential(nn.Linear(4, 4))) == []


@pytest.mark.parametrize("options", [{}, {"sym": False}, {"signed": True}, {"desc_act": True}, {"bits": 8}], ids=str)
def test_the_state_dict_stays_what_it_was_and_saving_gives_the_same_files(
    tiny_qwen2: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    pack_by_hand(tiny_qwen2, tmp_path / "packed", **options)
    plain, model = load(tmp_path / "packed"), load(tmp_path / "packed", "auto")
    attach_kernels(model)
    assert all(layer.packed for layer in packed_layers(model).values())
    assert same(state_of(model), state_of(plain))
    for one, name in ((plain, "before"), (model, "after")):
        one.save_pretrained(tmp_path / name)
    for path in sorted((tmp_path / "before").iterdir()):
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes(), path.name
    assert all(layer.packed for layer in packed_layers(model).values())


def test_a_saved_model_loads_again(folder: Path, tmp_path: Path) -> None:
    model = load(folder, "auto")
    attach_kernels(model)
    model.save_pretrained(tmp_path / "again")
    assert same(state_of(load(tmp_path / "again")), state_of(model))


def test_the_weights_are_held_once_and_side_by_side(folder: Path) -> None:
    model = load(folder, "auto")
    before = tensor_bytes(model)
    attach_kernels(model)
    gc.collect()
    assert tensor_bytes(model) < before  # neither g_idx nor zeros, which all are one number
    words = sorted((layer.panels.words.data_ptr(), layer) for layer in packed_layers(model).values())
    ends = [start + layer.panels.words.nbytes for start, layer in words]
    gaps = [start - end for (start, _), end in zip(words[1:], ends, strict=False)]
    # Only scales and biases lie between the words of one layer and the next.
    assert max(gaps) < max(4 * layer.panels.scales.nbytes + 4096 for _, layer in words)
    assert all(start % 64 == 0 for start, _ in words)


def test_layers_are_filled_one_set_of_siblings_at_a_time_right_before_they_are_packed(folder: Path) -> None:
    source, model = load(folder), load(folder, "auto")
    for layer in packed_layers(model).values():
        layer.to("meta")
    seen: list[str] = []
    most = 0

    def fill(name: str, layer: QuantLinear) -> None:
        nonlocal most
        seen.append(name.removeprefix("model.layers."))
        for part, tensor in source.get_submodule(name).stored().items():
            setattr(layer, part, tensor.clone())
        stored = [one for one in packed_layers(model).values() if not one.packed and not one.qweight.is_meta]
        most = max(most, len(stored))

    attach_kernels(model, fill)
    per_block = [*QKV, "self_attn.o_proj", *GATE_UP, "mlp.down_proj"]
    assert seen == [f"{index}.{name}" for index in range(2) for name in per_block]
    assert most == 3
    assert same(state_of(model), state_of(source))


@pytest.mark.parametrize("names", [QKV, GATE_UP], ids=["q, k, v", "gate, up"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_siblings_are_computed_by_one_call_with_the_same_bits(
    folder: Path, names: tuple[str, ...], dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tokens > 3 and dtype == torch.bfloat16 and not TILES:
        pytest.skip("no bfloat16 tile kernel here")
    model = load(folder, "auto")
    alone = [copy.deepcopy(layer) for layer in block(model, names)]
    attach_kernels(model)
    x = inputs(alone[0], tokens).to(dtype)
    expected = [layer(x) for layer in alone]
    calls = calls_of(monkeypatch)
    for layer in block(model, names):
        layer.forget()  # what was prepared holds the operator itself
    for inference in (False, True):
        with torch.inference_mode(inference):
            found = [layer(x) for layer in block(model, names)]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert calls == [[layer.out_features for layer in alone]] * 2


@pytest.mark.parametrize("options", [{"sym": False}, {"desc_act": True}, {"bits": 8}], ids=str)
def test_siblings_are_alike_or_computed_alone(
    tiny_qwen2: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of act-order, the orders of columns that are drawn differ between siblings, so they share no panels."""
    pack_by_hand(tiny_qwen2, tmp_path / "packed", **options)
    model = load(tmp_path / "packed", "auto")
    expected = [copy.deepcopy(layer)(inputs(layer)) for layer in block(model, QKV)]
    calls = calls_of(monkeypatch)
    attach_kernels(model)
    x = inputs(block(model, QKV)[0])
    found = [layer(x) for layer in block(model, QKV)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(calls) == (3 if options.get("desc_act") else 1)


def test_siblings_with_one_order_of_columns_share_it(folder: Path) -> None:
    model = load(folder, "auto")
    order = block(model, QKV)[0].g_idx[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    for layer in block(model, QKV):
        layer.g_idx = order.clone()
    expected = [copy.deepcopy(layer)(inputs(layer)) for layer in block(model, QKV)]
    attach_kernels(model)
    assert len({layer.panels.order.data_ptr() for layer in block(model, QKV)}) == 1
    assert all(layer.shares for layer in block(model, QKV))
    x = inputs(block(model, QKV)[0])
    assert all(torch.equal(layer(x), one) for layer, one in zip(block(model, QKV), expected, strict=True))


def attached(folder: Path) -> tuple[list[Any], list[Any]]:
    """q, k and v of the first block, and each of them alone."""
    model = load(folder, "auto")
    alone = [copy.deepcopy(layer) for layer in block(model, QKV)]
    attach_kernels(model)
    return block(model, QKV), alone


def test_an_input_that_is_changed_in_place_is_computed_anew(folder: Path) -> None:
    (query, key, value), (_, key_alone, value_alone) = attached(folder)
    x = inputs(query)
    query(x)
    x.mul_(2)
    assert torch.equal(key(x), key_alone(x))
    x.add_(1)
    assert torch.equal(value(x), value_alone(x))


def test_a_hook_that_changes_its_input_changes_what_its_siblings_see(folder: Path) -> None:
    layers, alone = attached(folder)
    layers[1].register_forward_pre_hook(lambda _, given: given[0].mul_(2))
    alone[1].register_forward_pre_hook(lambda _, given: given[0].mul_(2))
    for inference in (False, True):
        with torch.inference_mode(inference):
            x, y = inputs(layers[0]), inputs(layers[0])
            assert all(torch.equal(one(x), other(y)) for one, other in zip(layers, alone, strict=True))


def test_siblings_may_be_called_in_any_order_again_and_not_at_all(folder: Path) -> None:
    (query, key, value), alone = attached(folder)
    expected = {id(layer): one for layer, one in zip((query, key, value), alone, strict=True)}
    x, y = inputs(query), inputs(query, seed=1)
    for layer, given in ((value, x), (value, x), (query, y), (key, x), (key, y), (query, x), (query, x), (value, y)):
        assert torch.equal(layer(given), expected[id(layer)](given))


def test_nothing_is_kept_when_all_siblings_have_theirs(folder: Path) -> None:
    layers, _ = attached(folder)
    x = inputs(layers[0])
    kept = weakref.ref(x)
    for layer in layers:
        layer(x)
    del x
    gc.collect()
    assert kept() is None


def test_a_result_that_was_handed_out_is_the_callers_own(folder: Path) -> None:
    (query, key, _), (_, key_alone, _) = attached(folder)
    x = inputs(query)
    query(x).zero_()
    assert torch.equal(key(x), key_alone(x))


def test_new_weights_for_one_sibling_leave_the_others_alone(folder: Path) -> None:
    layers, alone = attached(folder)
    state = {name: tensor.clone() for name, tensor in alone[1].state_dict().items()}
    state["scales"] *= 2
    for key in (layers[1], alone[1]):
        key.load_state_dict(state)
    x = inputs(layers[0])
    assert all(torch.equal(one(x), other(x)) for one, other in zip(layers, alone, strict=True))
    assert not layers[0].shares


def test_layers_that_were_packed_alone_may_be_put_together_later(folder: Path) -> None:
    model = load(folder, "auto")
    logits_of(model)
    query = block(model, QKV)[0]
    assert query.packed
    assert not query.shares
    attach_kernels(model)
    assert query.shares
    arena = query.panels.words.data_ptr()
    attach_kernels(model)
    assert query.panels.words.data_ptr() == arena  # a second time changes nothing


def test_siblings_of_a_layer_that_was_replaced_are_computed_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder, "auto")
    attach_kernels(model)
    attention = model.model.layers[0].self_attn
    x = inputs(attention.q_proj)
    expected = [attention.k_proj(x), attention.v_proj(x)]
    attention.q_proj(x.clone())  # its siblings' results wait
    attention.q_proj = nn.Linear(x.shape[-1], attention.q_proj.out_features)
    gc.collect()
    seen = calls_of(monkeypatch)
    assert not attention.k_proj.shares
    assert torch.equal(attention.k_proj(x), expected[0])
    attach_kernels(model)
    assert torch.equal(attention.v_proj(x), expected[1])
    assert [len(widths) for widths in seen] == [1, 1]


def test_siblings_part_when_one_is_gone_from_the_model(folder: Path) -> None:
    model = load(folder, "auto")
    attach_kernels(model)
    attention = model.model.layers[0].self_attn
    kept = attention.q_proj  # as what merges an adapter keeps it
    attention.q_proj = nn.Linear(kept.in_features, kept.out_features)
    attach_kernels(model)
    assert not any(layer.shares for layer in (kept, attention.k_proj, attention.v_proj))


def test_layers_that_changed_places_find_their_new_siblings(folder: Path) -> None:
    model = load(folder, "auto")
    attach_kernels(model)
    first, second = (layer.self_attn for layer in model.model.layers)
    first.q_proj, second.q_proj = second.q_proj, first.q_proj
    expected = logits_of(model)
    attach_kernels(model)
    assert all(layer.siblings is first.q_proj.siblings is not None for layer in block(model, QKV))
    assert torch.equal(logits_of(model), expected)


def test_a_second_call_says_what_the_first_said(folder: Path) -> None:
    model = load(folder, "auto", torch.bfloat16)
    assert attach_kernels(model) == attach_kernels(model)


def test_a_move_keeps_siblings_together(folder: Path) -> None:
    model = load(folder, "auto")
    attach_kernels(model)
    moved: list[QuantLinear] = [layer.to("meta") for layer in block(model, QKV)]
    assert all(layer.shares for layer in moved)
    assert len({layer.panels.words.untyped_storage()._cdata for layer in moved}) == 1


def test_a_copy_of_a_model_or_of_a_layer_takes_no_panels_along(folder: Path) -> None:
    model = load(folder, "auto")
    attach_kernels(model)
    twin = copy.deepcopy(model)
    assert not any(layer.packed for layer in packed_layers(twin).values())
    assert torch.equal(logits_of(twin), logits_of(model))


def test_a_compiled_model_computes_each_sibling_itself(folder: Path) -> None:
    torch.compiler.reset()
    model = load(folder, "auto")
    attach_kernels(model)
    mlp = model.model.layers[0].mlp
    x = inputs(mlp.gate_proj)
    compiled: Any = torch.compile(mlp, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), mlp(x))


def test_a_wish_that_cannot_be_met_is_an_error_and_others_are_lines(folder: Path) -> None:
    with pytest.raises(UsageError, match="it has none for 4 bits and float32"):
        attach_kernels(load(folder, "torch"))
    assert attach_kernels(load(folder, "reference")) == [
        "int4 g32, 14 linears: reference (dequantize, multiply) (asked for)"
    ]


def test_the_reason_for_the_reference_is_in_its_line_and_not_said_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place("cpu", "avx2", "avx2", "qquant._C: not built")
    monkeypatch.setattr(linear, "place_of", lambda _: place)
    monkeypatch.setattr(model_kernels, "place_of", lambda _: place)
    monkeypatch.setattr(telling, "said", set())
    model = load(folder, "auto")
    assert attach_kernels(model) == ["int4 g32, 14 linears: reference (dequantize, multiply) (qquant._C: not built)"]
    logits_of(model)
    assert not [record for record in caplog.records if "dequantized" in record.message]


def test_a_group_that_is_not_there_is_refused_by_name(folder: Path) -> None:
    model = load(folder, "auto")
    model.model.layers[1].mlp.down_proj.g_idx[0] = -1
    with pytest.raises(BadModelError, match=r"model\.layers\.1\.mlp\.down_proj\.g_idx must name groups 0\.\."):
        attach_kernels(model)


def test_eight_bit_activations_have_a_line_of_their_own(folder: Path) -> None:
    model = load(folder, "auto")
    for layer in packed_layers(model).values():
        layer.activation_bits = 8
    (line,) = attach_kernels(model)
    assert line == (
        "int4 g32, 8-bit activations, 14 linears: "
        "AVX-512 VNNI kernel on 8-bit activations (8-bit activations were asked for)"
    )
    assert bool(torch.isfinite(model(IDS).logits).all())
