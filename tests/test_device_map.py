"""Where a loaded model's parts go: maps that work on one machine without a GPU, and what is said of the others.

That such a model can be saved is test_packed_loading.py's. Maps over several GPUs are not run here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qquant
from qquant import telling
from qquant.device_map import check_places, computes_on_cpu, offloads
from qquant.errors import UsageError
from qquant.linear import QuantLinear
from tests.conftest import Factory, assert_same_but_for_order
from tests.packed import IDS, dense_logits, logits_of, pack_by_hand

OUTSIDE = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], "cpu")
BLOCK = "model.layers.0"
ON_DISK = OUTSIDE | {BLOCK: "disk", "model.layers.1": "cpu"}


@pytest.fixture
def packed(tiny_qwen2: Path, tmp_path: Path) -> Path:
    """An int4 checkpoint of two blocks."""
    pack_by_hand(tiny_qwen2, tmp_path / "packed")
    return tmp_path / "packed"


def packed_layers(model: Any, prefix: str = "") -> list[QuantLinear]:
    return [
        layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear) and name.startswith(prefix)
    ]


APART = {
    **OUTSIDE, "model.layers.1": "cpu", **{f"{BLOCK}.{name}": "cpu" for name in (
        "mlp", "input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "self_attn.o_proj",
        "self_attn.q_proj",
    )}, f"{BLOCK}.self_attn.k_proj": "disk",
}  # fmt: skip
MAPS: dict[str, dict[str, Any]] = {
    "a device": {"device_map": torch.device("cpu")},
    "balanced": {"device_map": "balanced"},
    "sequential": {"device_map": "sequential"},
    "a block on the disk": {"device_map": ON_DISK},
    "all on the disk": {"device_map": {"": "disk"}},
    "only one of three siblings": {"device_map": APART},
    "as much as fits": {"device_map": "auto", "max_memory": {"cpu": 200_000}},
    "nothing fits": {"device_map": "auto", "max_memory": {"cpu": 1000}},
}


@pytest.mark.parametrize("options", list(MAPS.values()), ids=list(MAPS))
def test_a_map_changes_no_logits_and_generates(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    model: Any = qquant.load_quantized(packed, dtype=torch.float32, **options)
    assert_same_but_for_order(logits_of(model), dense_logits(packed))
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape[1] == IDS.shape[1] + 3
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_what_is_offloaded_is_not_in_memory(packed: Path) -> None:
    model = qquant.load_quantized(packed, device_map=ON_DISK)
    logits_of(model)
    assert all(buffer.is_meta for layer in packed_layers(model, BLOCK) for buffer in layer.buffers())
    assert {layer.kernel for layer in packed_layers(model, BLOCK)} == {"reference"}
    assert {layer.kernel for layer in packed_layers(model, "model.layers.1")} == {"auto"}


def test_that_layers_are_fetched_is_said_once(packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    telling.said.clear()
    qquant.load_quantized(packed, device_map=ON_DISK)
    assert len([line for line in caplog.messages if "fetched at every use" in line]) == 1


@pytest.mark.parametrize(
    "device_map", [None, "cpu", {"": "cpu"}, "auto", ON_DISK], ids=["none", "cpu", "map", "auto", "disk"]
)
def test_float16_is_computed_in_float32_wherever_the_cpu_computes(
    checkpoint: Factory, tmp_path: Path, device_map: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pack_by_hand(checkpoint("qwen2", dtype=torch.float16), tmp_path / "m")
    assert qquant.load_quantized(tmp_path / "m", device_map=device_map).dtype == torch.float32


@pytest.mark.parametrize(
    "options", [{"kernel": "kernel"}, {"kernel": "torch"}, {"activation_bits": 8}], ids=["ours", "torch", "8 bits"]
)
def test_a_kernel_that_cannot_serve_offloaded_layers_is_refused(packed: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"only the reference serves .* puts {BLOCK}.self_attn.q_proj on the disk"):
        qquant.load_quantized(packed, device_map=ON_DISK, **options)


PLACES: dict[str, tuple[Any, str]] = {
    "a name": ("gpu", "cpu, cuda, cuda:N, one of auto, .* got 'gpu'"),
    "a name in a map": ({"": "gpu"}, "got 'gpu'"),
    "no place": ("meta", "got 'meta'"),
    "the disk by itself": ("disk", "got 'disk'"),
    "nothing": ({"": None}, "got None"),
    "a card that is not here": ("cuda:7", r"names 'cuda:7', and this torch sees 1 GPUs"),
    "its number": (7, "names 7, and this torch sees 1 GPUs"),
    "one of a map's": ({"model": 0, "lm_head": 1}, "names 1, and this torch sees 1 GPUs"),
}


@pytest.mark.parametrize(("device_map", "words"), list(PLACES.values()), ids=list(PLACES))
def test_places_that_are_not_here_are_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device_map: Any, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=words):
        qquant.load_quantized(tmp_path, device_map=device_map)


def test_a_card_that_is_here_may_be_named_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for place in (1, "cuda:1", "cuda", torch.device("cuda", 1), {"": 1}, {"model": 0, "lm_head": "disk"}):
        check_places(place)


NAMES: dict[str, tuple[dict[str, str], str]] = {
    "nothing there": (OUTSIDE | {"model.layerz": "cpu", "model.layers": "cpu"}, "'model.layerz', which the model does"),
    "one inside another": ({"": "cpu", BLOCK: "disk"}, f"'' holds '{BLOCK}'"),
    "one inside another's": (
        {"model": "cpu", "model.layers.0.mlp": "disk", "lm_head": "cpu"},
        "'model' holds 'model.layers.0.mlp'; name the other parts",
    ),
}


@pytest.mark.parametrize(("device_map", "words"), list(NAMES.values()), ids=list(NAMES))
def test_entries_that_would_be_passed_by_are_refused(packed: Path, device_map: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        qquant.load_quantized(packed, device_map=device_map)


FACTS: list[tuple[Any, bool, bool]] = [
    (None, False, True),
    ("cpu", False, True),
    ({"": "cpu"}, False, True),
    ({"": "disk"}, True, True),
    ({"a": "cpu", "b": "disk"}, True, True),
    ({"a": 0, "b": 1}, False, False),
    ({"a": 0, "b": "cpu"}, True, False),
    ({"a": "cuda:0", "b": "disk"}, True, False),
    ("cuda", False, False),
]


@pytest.mark.parametrize(("device_map", "fetched", "on_cpu"), FACTS, ids=[str(fact[0]) for fact in FACTS])
def test_what_lies_beside_an_accelerator_is_fetched(device_map: Any, fetched: bool, on_cpu: bool) -> None:
    facts: list[Callable[[Any], bool]] = [offloads, computes_on_cpu]
    assert [fact(device_map) for fact in facts] == [fetched, on_cpu]
