"""How the tensors of a packed checkpoint come into a model: layer by layer, whole or not at all, and out again.

Which checkpoints are read and which are refused is test_hf_plugin.py's, what loading takes is test_load_memory.py's.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import qquant
from qquant import hf_plugin
from qquant.errors import UsageError
from qquant.hf_plugin import GptqLoader
from qquant.linear import QuantLinear
from qquant.shards import SINGLE_NAME, CheckpointReader
from tests.conftest import Factory, assert_same_but_for_order
from tests.packed import dense_logits, logits_of, pack_by_hand
from tests.test_hf_plugin import VARIANTS

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def packed(tiny_qwen2: Path, tmp_path: Path) -> Path:
    """An int4 checkpoint of 14 packed linears."""
    pack_by_hand(tiny_qwen2, tmp_path / "packed")
    return tmp_path / "packed"


def layers_of(model: Any) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def failing_at(name: str) -> Callable[[CheckpointReader, str], Tensor]:
    plain = CheckpointReader.read

    def read(reader: CheckpointReader, wanted: str) -> Tensor:
        if wanted == name:
            raise OSError("no luck")
        return plain(reader, wanted)

    return read


@pytest.mark.parametrize("options", list(VARIANTS.values()), ids=list(VARIANTS))
def test_saving_what_was_loaded_gives_back_every_byte(
    tiny_qwen2: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    pack_by_hand(tiny_qwen2, tmp_path / "m", **options)
    qquant.load_quantized(tmp_path / "m", dtype=torch.float32).save_pretrained(tmp_path / "again")
    stored, again = load_file(tmp_path / "m" / SINGLE_NAME), load_file(tmp_path / "again" / SINGLE_NAME)
    assert again.keys() == stored.keys()
    for name, tensor in stored.items():
        assert again[name].dtype == tensor.dtype, name
        assert torch.equal(again[name], tensor), name


def test_packed_words_are_read_layer_by_layer_and_never_by_transformers(
    packed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    waiting: list[int] = []
    models: list[Any] = []
    check, fill = hf_plugin.check_values, GptqLoader._fill

    def see(model: Any) -> None:
        models.append(model)
        check(model)

    def spy(loader: GptqLoader, name: str, layer: QuantLinear) -> None:
        waiting.append(sum(one.qweight.is_meta for one in layers_of(models[0]) if not one.packed))
        fill(loader, name, layer)

    monkeypatch.setattr(hf_plugin, "check_values", see)
    monkeypatch.setattr(GptqLoader, "_fill", spy)
    qquant.load_quantized(packed)
    assert waiting == list(range(14, 0, -1))
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_a_loaded_model_does_not_depend_on_its_files(packed: Path) -> None:
    model = qquant.load_quantized(packed)
    expected = logits_of(model)
    with (packed / SINGLE_NAME).open("r+b") as stream:
        stream.write(bytes((packed / SINGLE_NAME).stat().st_size))
    assert torch.equal(logits_of(model), expected)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["as stored", "cast"])
def test_no_file_is_mapped_any_more_when_packed_words_are_read(
    checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    pack_by_hand(checkpoint("qwen2", dtype=torch.float16), tmp_path / "m")
    mapped: list[str] = []
    plain = GptqLoader._fill

    def spy(loader: GptqLoader, name: str, layer: QuantLinear) -> None:
        mapped.extend(line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "m") in line)
        plain(loader, name, layer)

    monkeypatch.setattr(GptqLoader, "_fill", spy)
    qquant.load_quantized(tmp_path / "m", dtype=dtype)
    assert mapped == []


def test_tied_weights_stay_one_tensor(checkpoint: Factory, tmp_path: Path) -> None:
    source = checkpoint("qwen2", tie=True)
    expected = pack_by_hand(source, tmp_path / "m")
    model: Any = qquant.load_quantized(tmp_path / "m")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_but_for_order(logits_of(model), expected)


OUTSIDE = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], "cpu")
PLACES: dict[str, dict[str, Any]] = {
    "auto": {"device_map": "auto"},
    "one device": {"device_map": {"": "cpu"}},
    "part on the disk": {"device_map": OUTSIDE | {"model.layers.0": "disk", "model.layers.1": "cpu"}},
    "packed part on the disk": {
        "device_map": OUTSIDE | {"model.layers.0": "cpu", "model.layers.1": "disk"},
        "offload_buffers": True,
    },
}


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("options", list(PLACES.values()), ids=list(PLACES))
def test_a_model_may_be_spread(tiny_qwen2: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    expected = pack_by_hand(tiny_qwen2, tmp_path / "m")
    if "disk" in str(options):
        options = options | {"offload_folder": str(tmp_path / "offload")}
    model = qquant.load_quantized(tmp_path / "m", dtype=torch.float32, **options)
    assert_same_but_for_order(logits_of(model), expected)
    model.save_pretrained(tmp_path / "again")
    stored, again = load_file(tmp_path / "m" / SINGLE_NAME), load_file(tmp_path / "again" / SINGLE_NAME)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)


def test_a_load_that_fails_midway_leaves_nothing_and_the_next_one_works(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    init = QuantLinear.__init__

    def remember(layer: QuantLinear, *sizes: Any, **options: Any) -> None:
        init(layer, *sizes, **options)
        built.append(weakref.ref(layer))

    monkeypatch.setattr(QuantLinear, "__init__", remember)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointReader, "read", failing_at(f"{UP}.qweight"))
        with pytest.raises(OSError, match="no luck"):
            qquant.load_quantized(packed)
    gc.collect()
    assert len(built) == 14
    assert not any(reference() for reference in built)
    assert_same_but_for_order(logits_of(qquant.load_quantized(packed)), dense_logits(packed))


def test_each_kernel_is_said_once(packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    qquant.load_quantized(packed, kernel="reference")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "qquant.kernels"]
    assert "14 linears" in line
    assert "reference" in line


def test_the_lines_reach_stderr_of_a_plain_script_unless_it_asks_for_less(packed: Path) -> None:
    code = (
        "import logging, sys, qquant\n"
        "qquant.load_quantized(sys.argv[1], kernel='reference')\n"
        "assert not logging.getLogger('qquant.kernels').handlers\n"
        "logging.getLogger('qquant.kernels').setLevel('WARNING')\n"
        "qquant.load_quantized(sys.argv[1], kernel='reference')\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(packed)], capture_output=True, text=True, check=True)
    assert run.stderr.count("14 linears") == 1
    assert run.stdout == ""


def test_the_wanted_kernel_reaches_every_layer_and_no_file(packed: Path, tmp_path: Path) -> None:
    model = qquant.load_quantized(packed, kernel="reference")
    assert {layer.kernel for layer in layers_of(model)} == {"reference"}
    assert not any(layer.packed for layer in layers_of(model))
    model.save_pretrained(tmp_path / "again")
    keys = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert not {"kernel", "activation_bits"} & keys.keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel": "fast"}, "kernel must be one of auto, reference, kernel, torch, got 'fast'"),
        ({"activation_bits": 4}, "activation_bits must be 8"),
        ({"activation_bits": 8, "kernel": "reference"}, "kernel 'reference' is not one"),
    ],
    ids=["no such kernel", "four bits", "the reference with eight bits"],
)
def test_kernels_that_are_not_there_are_refused(packed: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        qquant.load_quantized(packed, **options)


def test_contract_a_quantizer_sees_the_final_device_map_while_packed_tensors_still_have_sizes(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    plain = GptqLoader.validate_environment

    def spy(loader: GptqLoader, *words: Any, device_map: Any = None, **options: Any) -> None:
        if loader._model is not None:
            words_of = loader._model.get_submodule(UP).qweight
            seen.append((device_map, words_of.shape))
        plain(loader, *words, device_map=device_map, **options)

    monkeypatch.setattr(GptqLoader, "validate_environment", spy)
    qquant.load_quantized(packed, device_map="auto")
    assert seen == [({"": "cpu"}, (8, 128))]


def test_contract_which_keys_may_be_missing_or_too_many_is_asked_of_the_model(tiny_qwen2: Path) -> None:
    """We set both on the instance, for the time of the loading."""
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    for name in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
        assert not getattr(model, name)
        assert hasattr(type(model), name)


def test_contract_a_model_says_whether_its_tensors_are_the_files_own(tiny_qwen2: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(tiny_qwen2)._weight_conversions == []
