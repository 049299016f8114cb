"""Loading packed checkpoints, ours and others': every variant equals its plain model, or is refused by name."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

import qquant
from qquant.errors import BadModelError
from qquant.hf_plugin import METHOD, GptqFileConfig, GptqLoader, check_keys
from qquant.linear import QuantLinear
from qquant.packing import pack_zeros
from qquant.shards import INDEX_NAME, SINGLE_NAME
from tests.conftest import Factory, assert_same_but_for_order
from tests.packed import dense_logits, edit_keys, edit_tensors, logits_of, pack_by_hand

UP = "model.layers.1.mlp.up_proj"
Q = "model.layers.0.self_attn.q_proj"

VARIANTS: dict[str, dict[str, Any]] = {
    "int4": {},
    "int4 asym": {"sym": False},
    "int8": {"bits": 8},
    "int3": {"bits": 3},
    "int3 asym v2": {"bits": 3, "sym": False, "version": 2},
    "int2 asym": {"bits": 2, "sym": False},
    "signed": {"signed": True},
    "int3 signed desc_act": {"bits": 3, "group_size": 16, "signed": True, "desc_act": True},
    "int8 signed": {"bits": 8, "signed": True},
    "v2": {"version": 2},
    "v2 asym": {"version": 2, "sym": False},
    "desc_act": {"desc_act": True},
    "int8 desc_act asym": {"bits": 8, "desc_act": True, "sym": False},
    "whole rows": {"group_size": -1},
    "ragged groups": {"group_size": 48},  # 64 = 48 + 16 columns, as GPTQModel writes 704 with 128
    "ragged groups desc_act": {"group_size": 48, "desc_act": True},
    "bfloat16 scales": {"scales_dtype": torch.bfloat16},
    "float32 scales": {"scales_dtype": torch.float32},
    "zero biases": {"zero_bias": True},
    "quantized head": {"head": True},
}


@pytest.fixture
def packed(tiny_qwen2: Path, tmp_path: Path) -> Path:
    """An int4 checkpoint to damage."""
    pack_by_hand(tiny_qwen2, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("options", list(VARIANTS.values()), ids=list(VARIANTS))
def test_every_variant_of_the_format_loads_right(tiny_qwen2: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    expected = pack_by_hand(tiny_qwen2, tmp_path / "m", **options)
    model = qquant.load_quantized(tmp_path / "m", dtype=torch.float32)
    assert_same_but_for_order(logits_of(model), expected)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14 + options.get("head", False)


@pytest.mark.parametrize("name", ["int4", "desc_act", "v2 asym", "quantized head"])
def test_plain_from_pretrained_reads_it_after_register(
    tiny_qwen2: Path, tmp_path: Path, registered: None, name: str
) -> None:
    expected = pack_by_hand(tiny_qwen2, tmp_path / "m", **VARIANTS[name])
    assert_same_but_for_order(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), expected)


def test_register_works_in_a_fresh_process_and_twice(packed: Path) -> None:
    code = (
        "import sys, qquant; qquant.register(); qquant.register()\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.get_submodule('model.layers.0.mlp.up_proj')).__name__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(packed)], capture_output=True, text=True, check=True)
    assert result.stdout == "QuantLinear\n"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_v2_zeros_that_are_tagged_v1_are_read_as_v2_with_a_warning(
    tiny_qwen2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, bits: int
) -> None:
    expected = pack_by_hand(tiny_qwen2, tmp_path / "m", bits=bits, version=2)
    edit_keys(tmp_path / "m", checkpoint_format="gptq")
    with caplog.at_level(logging.WARNING, "qquant"):
        assert_same_but_for_order(logits_of(qquant.load_quantized(tmp_path / "m")), expected)
    assert "reading them as v2" in caplog.text


def test_v1_zeros_that_are_tagged_v2_are_read_as_v1(tiny_qwen2: Path, tmp_path: Path) -> None:
    expected = pack_by_hand(tiny_qwen2, tmp_path / "m")
    edit_keys(tmp_path / "m", checkpoint_format="gptq_v2")
    assert_same_but_for_order(logits_of(qquant.load_quantized(tmp_path / "m")), expected)


def test_files_of_autogptqs_time_load(tiny_llama: Path, tmp_path: Path) -> None:
    """Keys in quantize_config.json alone, a file named after its settings, a zero bias for every linear."""
    folder = tmp_path / "m"
    expected = pack_by_hand(tiny_llama, folder, zero_bias=True)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    keys = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True}
    others = {"true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model"}
    (folder / "quantize_config.json").write_text(json.dumps(keys | others))
    (folder / SINGLE_NAME).rename(folder / "gptq_model-4bit-128g.safetensors")
    assert_same_but_for_order(logits_of(qquant.load_quantized(folder)), expected)


def test_left_out_keys_mean_what_autogptq_meant(tiny_qwen2: Path, tmp_path: Path) -> None:
    expected = pack_by_hand(tiny_qwen2, tmp_path / "m", group_size=128)  # rows of 64: one short group
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert_same_but_for_order(logits_of(qquant.load_quantized(tmp_path / "m")), expected)


def test_keys_that_only_record_provenance_are_let_pass(packed: Path) -> None:
    keys = {"dataset": ["text"], "tokenizer": None, "disable_exllama": True, "meta": {"x": 1}, "future": None}
    edit_keys(packed, **keys, format="gptq", damp_percent=0.1, autoround_version="0.16")
    assert_same_but_for_order(logits_of(qquant.load_quantized(packed)), dense_logits(packed))


def test_a_rule_without_a_sign_changes_settings(tiny_qwen2: Path, tmp_path: Path) -> None:
    pack_by_hand(tiny_qwen2, tmp_path / "m")
    pack_by_hand(tiny_qwen2, tmp_path / "eight", bits=8, group_size=64)

    def mix(tensors: dict[str, Tensor]) -> None:
        tensors.update({k: v for k, v in load_file(tmp_path / "eight" / SINGLE_NAME).items() if k.startswith(UP)})

    edit_tensors(tmp_path / "m", mix)
    edit_keys(tmp_path / "m", dynamic={r".*\.1\.mlp\.up_proj": {"bits": 8, "group_size": 64, "damp_percent": 0.1}})
    assert_same_but_for_order(logits_of(qquant.load_quantized(tmp_path / "m")), dense_logits(tmp_path / "m"))


@pytest.mark.parametrize("name", ["int4", "desc_act", "ragged groups"])
def test_saving_and_loading_again_gives_the_same_logits(tiny_qwen2: Path, tmp_path: Path, name: str) -> None:
    pack_by_hand(tiny_qwen2, tmp_path / "m", **VARIANTS[name])
    model = qquant.load_quantized(tmp_path / "m")
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / SINGLE_NAME).keys() == load_file(tmp_path / "m" / SINGLE_NAME).keys()
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert "transformers_weights" not in config
    assert torch.equal(logits_of(qquant.load_quantized(tmp_path / "again")), logits_of(model))


@pytest.mark.parametrize("group_size", [32, 48])
def test_a_missing_g_idx_is_computed_where_there_is_no_act_order(
    tiny_qwen2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], group_size: int
) -> None:
    expected = pack_by_hand(tiny_qwen2, tmp_path / "m", group_size=group_size)
    edit_tensors(tmp_path / "m", lambda tensors: [tensors.pop(k) for k in list(tensors) if k.endswith("g_idx")])
    assert_same_but_for_order(logits_of(qquant.load_quantized(tmp_path / "m")), expected)
    assert "MISSING" not in capfd.readouterr().err


def drop(*names: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


def spoil(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[0].fill_(value)


Fault = tuple[Callable[[dict[str, Tensor]], object], dict[str, Any], str]
FAULTS: dict[str, Fault] = {
    "no g_idx with act-order": (drop(f"{UP}.g_idx"), {"desc_act": True}, rf"tensor {UP}.g_idx is missing.*desc_act"),
    "no qzeros": (drop(f"{UP}.qzeros"), {}, rf"tensor {UP}.qzeros is missing"),
    "no scales": (drop(f"{UP}.scales"), {}, rf"tensor {UP}.scales is missing"),
    "no bias": (drop(f"{Q}.bias"), {}, rf"tensor {Q}.bias is missing from .*; get the checkpoint again"),
    "no qweight": (drop(f"{UP}.qweight"), {}, rf"tensor {UP}.qweight is missing"),
    "no norm": (drop("model.norm.weight"), {}, "model.norm.weight is missing"),
    "nothing packed": (lambda tensors: [tensors.pop(k) for k in list(tensors) if "_proj" in k], {}, r"no tensor \*"),
    "a stray tensor": (put("model.stray", torch.ones(2)), {}, "model.stray"),
    "a packed norm": (put("model.norm.qweight", torch.ones(1, 1, dtype=torch.int32)), {}, "model.norm"),
    "a packed nothing": (put("model.nosuch.qweight", torch.ones(1, 1, dtype=torch.int32)), {}, "no such layer"),
    "a short norm": (put("model.norm.weight", torch.ones(32)), {}, "model.norm.weight must have shape"),
    "wrong bits": (dict, {"bits": 8}, "do not belong together"),
    "wrong group size": (dict, {"group_size": 16}, "do not belong together"),
    "scales without groups": (put(f"{UP}.scales", torch.ones(())), {}, rf"{UP}.scales must be"),
    "integer scales": (put(f"{UP}.scales", torch.ones(2, 128).int()), {}, rf"{UP}.scales must be floating, got I32"),
    "an integer bias": (put(f"{Q}.bias", torch.ones(64).int()), {}, rf"{Q}.bias must be floating, got I32; get the"),
    "wide words": (put(f"{UP}.g_idx", torch.zeros(64, dtype=torch.int64)), {}, rf"{UP}.g_idx must be I32"),
    "a short bias": (put(f"{Q}.bias", torch.ones(3)), {}, rf"{Q}.bias must be"),
    "a scale of NaN": (spoil(f"{UP}.scales", float("nan")), {}, rf"{UP}.scales holds NaN or Inf"),
    "an infinite embedding": (spoil("model.embed_tokens.weight", float("inf")), {}, "embed_tokens.weight holds"),
    "a group that is not there": (spoil(f"{UP}.g_idx", 2), {}, rf"{UP}.g_idx must name groups 0..1"),
    "a negative group": (spoil(f"{UP}.g_idx", -1), {}, rf"{UP}.g_idx must name groups"),
    "another method": (dict, {"quant_method": "awq"}, "quant_method must be gptq"),
    "marlin": (dict, {"is_marlin_format": True}, "is_marlin_format"),
    "planar format": (dict, {"checkpoint_format": "gptq_p"}, "gptq_p"),
    "two formats": (dict, {"format": "gptq_v2"}, "gptq and gptq_v2"),
    "wide packing": (dict, {"pack_dtype": "int64"}, "pack_dtype"),
    "five bits": (dict, {"bits": 5}, "bits"),
    "bits as text": (dict, {"bits": "four"}, "bits"),
    "no group": (dict, {"group_size": 0}, "group_size"),
    "unknown key": (dict, {"rotation": "hadamard"}, "'rotation'"),
    "unknown rule key": (dict, {"dynamic": {"+:.*": {"rotation": 1}}}, "'rotation'"),
    "a rule that is no regex": (dict, {"dynamic": {"+:(": {"bits": 8}}}, "not a regular expression"),
    "rules in a list": (dict, {"dynamic": ["-:x"]}, "dynamic"),
    "a rule that is no object": (dict, {"dynamic": {"+:x": 8}}, "dynamic"),
}


@pytest.mark.parametrize(("change", "keys", "words"), list(FAULTS.values()), ids=list(FAULTS))
def test_what_would_change_the_numbers_is_refused_by_name(
    packed: Path, change: Callable[[dict[str, Tensor]], object], keys: dict[str, Any], words: str
) -> None:
    edit_tensors(packed, change)
    edit_keys(packed, **keys)
    with pytest.raises(BadModelError, match=words):
        qquant.load_quantized(packed)


def test_a_packed_head_of_a_tied_model_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    pack_by_hand(tiny_qwen2, tmp_path / "m", head=True)
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadModelError, match=r"lm_head is stored packed, but tie_word_embeddings"):
        qquant.load_quantized(tmp_path / "m")


@pytest.mark.parametrize("key", ["bits", "group_size", "sym", "desc_act", "checkpoint_format"])
def test_two_config_files_that_disagree_are_refused(packed: Path, key: str) -> None:
    keys = json.loads((packed / "config.json").read_text())["quantization_config"]
    (packed / "quantize_config.json").write_text(json.dumps(keys | {"damp_percent": 0.5}))
    qquant.load_quantized(packed)
    (packed / "quantize_config.json").write_text(json.dumps(keys | {key: "another"}))
    with pytest.raises(BadModelError, match=f"disagree on {key}"):
        qquant.load_quantized(packed)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_quantize_config_is_refused(packed: Path, text: str) -> None:
    (packed / "quantize_config.json").write_text(text)
    with pytest.raises(BadModelError, match=r"quantize_config\.json"):
        qquant.load_quantized(packed)


def test_a_plain_checkpoint_is_refused(tiny_qwen2: Path) -> None:
    with pytest.raises(BadModelError, match="must have quantization_config"):
        qquant.load_quantized(tiny_qwen2)


def outside_index(folder: Path) -> None:
    """Move the weights out of the folder and let an index point at them."""
    outside = folder.parent / "outside"
    outside.mkdir()
    names = list(load_file(folder / SINGLE_NAME))
    (folder / SINGLE_NAME).rename(outside / "x.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside/x.safetensors")}
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_the_users_own_path_may_go_up(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (packed.parent / "elsewhere").mkdir()
    monkeypatch.chdir(packed.parent / "elsewhere")
    assert qquant.load_quantized(Path("..") / packed.name) is not None


def test_weights_outside_the_folder_are_refused_on_both_ways_in(packed: Path, registered: None) -> None:
    outside_index(packed)
    with pytest.raises(BadModelError, match="inside the model folder"):
        qquant.load_quantized(packed)
    with pytest.raises(BadModelError, match="must lie in the model folder"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_a_pickle_is_refused_and_not_opened(packed: Path, registered: None) -> None:
    (packed / SINGLE_NAME).rename(packed / "pytorch_model.bin")
    with pytest.raises(BadModelError, match="can run code"):
        qquant.load_quantized(packed)
    with pytest.raises(BadModelError, match="can run code"):
        AutoModelForCausalLM.from_pretrained(packed)


# What we lean on in transformers; these fail on the day it moves.


def test_contract_quant_methods_are_looked_up_in_two_tables() -> None:
    assert AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] is GptqFileConfig
    assert AUTO_QUANTIZER_MAPPING[METHOD] is GptqLoader
    assert "gptq" in AUTO_QUANTIZATION_CONFIG_MAPPING


def test_contract_the_abstract_methods_of_a_quantizer_are_these() -> None:
    assert HfQuantizer.__abstractmethods__ == {"is_serializable", "is_trainable"}
    assert callable(HfQuantizer.is_serializable)
    assert not callable(HfQuantizer.is_trainable)


def test_contract_a_quantizer_sees_the_meta_skeleton_and_the_files_about_to_be_read(
    packed: Path, registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    plain = GptqLoader._process_model_before_weight_loading

    def spy(loader: GptqLoader, model: Any, checkpoint_files: Any = None, **options: Any) -> None:
        seen.update(files=checkpoint_files, meta=all(p.is_meta for p in model.parameters()), name=model.name_or_path)
        plain(loader, model, checkpoint_files, **options)

    monkeypatch.setattr(GptqLoader, "_process_model_before_weight_loading", spy)
    AutoModelForCausalLM.from_pretrained(packed)
    assert seen == {"files": [str(packed / SINGLE_NAME)], "meta": True, "name": str(packed)}


def test_contract_stored_scales_keep_their_dtype_whatever_the_compute_dtype(packed: Path) -> None:
    model = qquant.load_quantized(packed, dtype=torch.bfloat16)
    assert model.get_submodule(UP).scales.dtype == torch.float16
    assert model.get_parameter("model.norm.weight").dtype == torch.bfloat16


def test_contract_config_may_name_the_weights_file(packed: Path) -> None:
    (packed / SINGLE_NAME).rename(packed / "mine.safetensors")
    assert_same_but_for_order(logits_of(qquant.load_quantized(packed)), logits_of(qquant.load_quantized(packed)))


def test_contract_tied_names_map_copy_to_original(checkpoint: Factory) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen2", tie=True))
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_contract_transformers_itself_still_follows_an_index_out_of_the_folder(
    tiny_qwen2: Path, tmp_path: Path
) -> None:
    """If this fails, transformers checks names itself, and our own check may become simpler."""
    folder = tmp_path / "m"
    shutil.copytree(tiny_qwen2, folder)
    outside_index(folder)
    assert torch.equal(
        logits_of(AutoModelForCausalLM.from_pretrained(folder)),
        logits_of(AutoModelForCausalLM.from_pretrained(tiny_qwen2)),
    )


def test_file_config_writes_back_the_keys_it_was_given() -> None:
    keys = {"bits": 4, "group_size": 32, "future": None, "meta": {"quantizer": ["x"]}}
    config = GptqFileConfig.from_dict({**keys, "quant_method": "gptq"})
    assert config.to_dict() == config.to_diff_dict() == {**keys, "quant_method": "gptq"}
    assert json.loads(config.to_json_string()) == config.to_dict()
    check_keys(config.to_dict())


def test_zeros_of_one_layer_decide_only_where_it_is_symmetric(tiny_qwen2: Path, tmp_path: Path) -> None:
    """A rule makes the first packed module asymmetric with zeros that look like v2's mid-range."""
    pack_by_hand(tiny_qwen2, tmp_path / "m")
    first = "model.layers.0.mlp.down_proj"
    edit_tensors(tmp_path / "m", put(f"{first}.qzeros", pack_zeros(torch.full((4, 64), 9), 4)))
    edit_keys(tmp_path / "m", dynamic={r"+:.*\.0\.mlp\.down_proj": {"sym": False}})
    model = qquant.load_quantized(tmp_path / "m")
    assert model.get_submodule(first).version == 1
    assert_same_but_for_order(logits_of(model), dense_logits(tmp_path / "m"))


def test_a_sharded_packed_checkpoint_loads(packed: Path) -> None:
    expected = logits_of(qquant.load_quantized(packed))
    tensors = load_file(packed / SINGLE_NAME)
    weight_map: dict[str, str] = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, packed / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (packed / SINGLE_NAME).unlink()
    (packed / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(logits_of(qquant.load_quantized(packed)), expected)
