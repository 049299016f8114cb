"""Every tensor of a small model, plain and quantized by us, is left out, renamed, reshaped or stored as another type,
one at a time. Each such folder is refused in one line that names the tensor, wherever it is opened.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qquant.checkpoint import load_model
from qquant.config import QuantizeConfig
from qquant.errors import BadModelError
from qquant.inspect import examine
from qquant.quantizing import quantize_checkpoint
from qquant.shards import SINGLE_NAME
from tests.conftest import make_checkpoint

ROW = "strict keys and shapes"
Count = Callable[..., None]

BLOCK = [
    *(f"self_attn.{part}_proj.{leaf}" for part in "qkv" for leaf in ("weight", "bias")),
    "self_attn.o_proj.weight",
    *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
]
OUTSIDE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
PLAIN = [*OUTSIDE, *(f"model.layers.{number}.{name}" for number in range(2) for name in BLOCK)]
LINEARS = [f"model.layers.{n}.{name[:-7]}" for n in range(2) for name in BLOCK if name.endswith("_proj.weight")]
PACKED = [name for name in PLAIN if name[:-7] not in LINEARS or name.endswith(".bias")] + [
    f"{name}.{part}" for name in LINEARS for part in ("qweight", "qzeros", "scales")
]


def gone(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def renamed(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name.replace(".", ".x", 1)] = tensors.pop(name)


def reshaped(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].reshape(1, *tensors[name].shape).contiguous()


def shortened(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].contiguous()


def retyped(tensors: dict[str, Tensor], name: str) -> None:
    kind = torch.float32 if tensors[name].dtype == torch.int32 else torch.int32
    tensors[name] = tensors[name].to(kind)


def some_quick(names: list[str]) -> list[Any]:
    """All of them, of which the first six belong to the quick part."""
    return [*names[:6], *(pytest.param(name, marks=pytest.mark.reliability) for name in names[6:])]


CHANGES = [gone, renamed, reshaped, shortened, retyped]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "m", hidden_size=32, intermediate_size=64)


@pytest.fixture(scope="module")
def packed(plain: Path) -> Path:
    out = plain.parent / "packed"
    quantize_checkpoint(plain, None, QuantizeConfig(method="rtn", group_size=32), out)
    (out / "manifest.json").unlink()  # it knows the sha256 of what is damaged here
    return out


def test_the_names_are_those_of_the_files(plain: Path, packed: Path) -> None:
    assert sorted(load_file(plain / SINGLE_NAME)) == sorted(PLAIN)
    stored = sorted(load_file(packed / SINGLE_NAME))
    assert [name for name in stored if not name.endswith(".g_idx")] == sorted(PACKED)


def damaged(source: Path, to: Path, name: str, change: Callable[[dict[str, Tensor], str], None]) -> Path:
    shutil.copytree(source, to)
    tensors = load_file(to / SINGLE_NAME)
    change(tensors, name)
    save_file(tensors, to / SINGLE_NAME, {"format": "pt"})
    return to


def refused(folder: Path, name: str, out: Path | None) -> None:
    """Whoever opens it: all say which tensor it is."""
    if out is not None:
        with pytest.raises(BadModelError) as raised:
            quantize_checkpoint(folder, None, QuantizeConfig(method="rtn", group_size=32), out)
        assert name in str(raised.value)
        assert raised.value.exit_code == 4
        assert sorted(path.name for path in out.parent.iterdir()) == [folder.name]
    with pytest.raises(BadModelError) as raised:
        load_model(folder, device=torch.device("cpu"))
    assert name in str(raised.value)
    assert any(name in problem for problem in examine(folder)["problems"])


@pytest.mark.parametrize("name", some_quick(PLAIN))
def test_a_tensor_of_a_plain_model_is_exactly_what_it_should_be(
    plain: Path, tmp_path: Path, name: str, outcome: Count
) -> None:
    for change in CHANGES:
        refused(
            damaged(plain, tmp_path / change.__name__ / "m", name, change), name, tmp_path / change.__name__ / "out"
        )
        outcome(f"refused, {change.__name__}")


@pytest.mark.parametrize("name", some_quick(PACKED))
def test_a_tensor_of_a_quantized_model_is_exactly_what_it_should_be(
    packed: Path, tmp_path: Path, name: str, outcome: Count
) -> None:
    for change in CHANGES:
        refused(damaged(packed, tmp_path / change.__name__, name, change), name, None)
        outcome(f"refused, {change.__name__}")


@pytest.mark.parametrize("linear", some_quick(LINEARS))
def test_order_of_columns_is_stored_where_the_keys_need_it(
    packed: Path, tmp_path: Path, linear: str, outcome: Count
) -> None:
    """Without act-order it follows from the group size, and other tools leave it out."""
    folder = damaged(packed, tmp_path / "m", f"{linear}.g_idx", gone)
    load_model(folder, device=torch.device("cpu"))
    for name in ("config.json", "quantize_config.json"):
        content = json.loads((folder / name).read_text())
        content.get("quantization_config", content)["desc_act"] = True
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(BadModelError, match=f"{linear}.g_idx"):
        load_model(folder, device=torch.device("cpu"))
    outcome("refused, gone though it is needed")
