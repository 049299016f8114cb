"""Adapters that must be refused in one clear line, before anything is computed or written."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qquant.adapter import Adapter
from qquant.adapter_settings import CONFIG_NAME, WEIGHTS_NAME
from qquant.config import QuantizeConfig
from qquant.errors import BadModelError
from qquant.quantizing import quantize_checkpoint
from qquant.sources import StreamedModel
from tests.adapters import RANK, Change, edited, run, saved, trained
from tests.conftest import VOCAB, Factory

TREE = "model.layers.1.self_attn.q_proj"
A, B = f"base_model.model.{TREE}.lora_A.weight", f"base_model.model.{TREE}.lora_B.weight"


def drop(*names: str) -> Change:
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


def poison(name: str, value: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][1, 1] = value

    return change


EMBED, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
FAULTS: dict[str, tuple[Change, dict[str, Any], str]] = {
    "another kind": (dict, {"peft_type": "IA3"}, "peft_type 'IA3'"),
    "no kind": (dict, {"peft_type": None}, "peft_type None"),
    "conv1d layout": (dict, {"fan_in_fan_out": True}, "sets fan_in_fan_out"),
    "layers repeated": (dict, {"layer_replication": [[0, 1], [0, 2]]}, "sets layer_replication"),
    "parameters": (dict, {"target_parameters": ["mlp.w"]}, "sets target_parameters"),
    "tokens": (dict, {"trainable_token_indices": [1, 2]}, "sets trainable_token_indices"),
    "switched on by tokens": (dict, {"alora_invocation_tokens": [5]}, "sets alora_invocation_tokens"),
    "a key of tomorrow": (dict, {"use_nosuch": True}, "sets use_nosuch.*merge_and_unload"),
    "begun on changed weights": (dict, {"init_lora_weights": "pissa_niter_4"}, "may stand on changed"),
    "rank that is text": (dict, {"r": "4"}, "a rank must be"),
    "rank zero": (dict, {"r": 0}, "a rank must be"),
    "alpha not finite": (dict, {"lora_alpha": math.inf}, "'lora_alpha' must be a number that JSON has"),
    "alpha larger than any float": (dict, {"lora_alpha": 10**400}, "an alpha must be"),
    "rank larger than any float": (dict, {"r": 10**400}, "a rank must be"),
    "scale by a word": (dict, {"use_rslora": "no"}, "use_rslora must be true or false, got 'no'"),
    "dora by a number": (dict, {"use_dora": 0}, "use_dora must be true or false, got 0"),
    "pattern that is none": (dict, {"rank_pattern": {"(": 2}}, "no LoRA configuration"),
    "repeat in a repeat": (dict, {"rank_pattern": {"([a-z_.0-9]+)+!": 4}}, "a pattern must be.*one by one"),
    "choice after choice": (dict, {"alpha_pattern": {"(a|a)" * 30: 4}}, "a pattern must be"),
    "many that may be absent": (dict, {"alpha_pattern": {"a?" * 30: 4}}, "a pattern must be"),
    "three wildcards": (dict, {"alpha_pattern": {".*.*.*x": 4}}, "a pattern must be"),
    "endless pattern": (dict, {"alpha_pattern": {"x" * 300: 4}}, "a pattern must be"),
    "endless name for a pattern": (
        lambda tensors: tensors.update({n.replace("layers", "layers" * 60): tensors[n].clone() for n in (A, B)}),
        {"alpha_pattern": {"x": 4}},
        "at most 256",
    ),
    "pattern that is a list": (dict, {"alpha_pattern": [2]}, "no LoRA configuration"),
    "bias of no kind": (dict, {"bias": "some"}, "bias must be one of"),
    "modules that are text": (dict, {"modules_to_save": "lm_head"}, "list of names"),
    "another rank": (dict, {"r": 8}, "8.* for this model and the rank"),
    "another model's width": (put(A, torch.ones(RANK, 32)), {}, "adapter of another model"),
    "another model's height": (put(B, torch.ones(32, RANK)), {}, "adapter of another model"),
    "a vector": (put(A, torch.ones(RANK)), {}, "must have shape"),
    "no such module": (put(A.replace("q_proj", "c_attn"), torch.ones(RANK, 64)), {}, "come in pairs"),
    "pair without a module": (
        lambda tensors: tensors.update({n.replace("layers.1", "layers.7"): tensors[n].clone() for n in (A, B)}),
        {},
        r"layers\.7.*does not have",
    ),
    "no A": (drop(A), {}, "pairs.*only .*lora_B"),
    "no B": (drop(B), {}, "pairs.*only .*lora_A"),
    "neither": (drop(A, B), {}, f"trained {TREE}.weight.*1 such"),
    "NaN": (poison(A, math.nan), {}, "must be finite.*lora_A"),
    "infinite": (poison(B, math.inf), {}, "must be finite.*lora_B"),
    "integers": (put(A, torch.ones(RANK, 64, dtype=torch.int32)), {}, "real numbers.*I32"),
    "not peft's names": (put("model.norm.weight", torch.ones(64)), {}, "must begin with base_model"),
    "a foreign part": (put(A.replace("lora_A", "lora_E"), torch.ones(4)), {}, "lora_E.*not understood"),
    "twice": (put(A.replace("lora_A", "lora_A.default"), torch.ones(RANK, 64)), {}, "twice"),
    "two that differ": (put(HEAD.replace("weight", "modules_to_save.weight"), torch.ones(VOCAB, 64)), {}, "different"),
    "tokens in the file": (
        put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", torch.ones(2, 64)),
        {},
        "not understood",
    ),
    "dora without magnitudes": (dict, {"use_dora": True}, "use_dora is true.*not stored"),
    "magnitudes without dora": (
        put(A.replace("lora_A.weight", "lora_magnitude_vector"), torch.ones(64)),
        {},
        "use_dora is false",
    ),
    "trained whole, not there": (dict, {"modules_to_save": ["lm_head", "norm"]}, r"trained model\.norm\.weight"),
    "none of its targets is there": (dict, {"target_modules": ["c_attn", "w1"]}, "has none of c_attn, w1"),
    "narrowed targets, none there": (
        dict,
        {"target_modules": ["c_attn"], "layers_to_transform": [1]},
        "has none of c_attn",
    ),
    "biases not there": (dict, {"bias": "all"}, r"trained .*\.bias"),
    "whole, another shape": (put(EMBED, torch.ones(VOCAB, 32)), {}, "must have shape"),
    "no rows": (
        lambda tensors: tensors.update({EMBED: torch.ones(0, 64), HEAD: torch.ones(0, 64)}),
        {},
        "one row per token.* has 0",
    ),
    "fewer rows than ids": (
        lambda tensors: tensors.update({EMBED: torch.ones(VOCAB - 1, 64), HEAD: torch.ones(VOCAB - 1, 64)}),
        {},
        f"has {VOCAB - 1} rows and the tokenizer ids up to {VOCAB - 1}",
    ),
    "head longer than embedding": (put(HEAD, torch.ones(VOCAB + 8, 64)), {}, "one row per token.*328"),
    "nothing": (lambda tensors: {"base_model.model.lm_head.original_module.weight": tensors[HEAD]}, {}, "change some"),
}


@pytest.fixture(scope="module")
def sound(checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with nothing wrong, to be edited."""
    tuned = trained(checkpoint("qwen2"), modules_to_save=["lm_head"])
    return saved(tuned, tmp_path_factory.mktemp("adapter") / "sound")


@pytest.mark.parametrize(("change", "keys", "words"), list(FAULTS.values()), ids=list(FAULTS))
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tiny_qwen2: Path, sound: Path, tmp_path: Path, change: Change, keys: dict[str, Any], words: str
) -> None:
    adapter = edited(sound, tmp_path / "bad", change, **keys)
    with pytest.raises(BadModelError, match=words):
        quantize_checkpoint(tiny_qwen2, None, QuantizeConfig(method="rtn"), tmp_path / "q", adapter=adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_pickled_adapter_is_refused_with_the_remedy(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "a")
    (tmp_path / "a" / WEIGHTS_NAME).rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(BadModelError, match=r"pickle.*save_pretrained"):
        Adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (CONFIG_NAME, None, "must hold adapter_config.json"),
        (CONFIG_NAME, b"{", "not JSON"),
        (CONFIG_NAME, b"[]", "JSON object"),
        (WEIGHTS_NAME, None, "must hold adapter_model.safetensors"),
        (WEIGHTS_NAME, b"\xff" * 40, "not a whole safetensors file"),
        (WEIGHTS_NAME, b"", "not a whole safetensors file"),
    ],
)
def test_files_that_are_missing_or_damaged_are_refused(
    sound: Path, tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    shutil.copytree(sound, tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    if content is not None:
        (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(BadModelError, match=words):
        Adapter(tmp_path / "a")


def test_an_adapter_whose_file_ends_early_is_refused(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "a")
    whole = (sound / WEIGHTS_NAME).read_bytes()
    (tmp_path / "a" / WEIGHTS_NAME).write_bytes(whole[:-4])
    with pytest.raises(BadModelError, match="truncated or damaged"):
        Adapter(tmp_path / "a")


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModelError, match="local folder"):
        Adapter(tmp_path / "nosuch")


def test_a_merge_that_overflows_the_stored_dtype_is_refused(checkpoint: Factory, tmp_path: Path) -> None:
    base = checkpoint("qwen2", dtype=torch.float16)
    adapter = saved(trained(base), tmp_path / "a")
    loud = edited(adapter, tmp_path / "loud", lambda tensors: {n: t.float() * 1e3 for n, t in tensors.items()})
    with pytest.raises(BadModelError, match=r"makes NaN or Inf of .* in torch\.float16"):
        quantize_checkpoint(base, None, QuantizeConfig(method="rtn", group_size=32), tmp_path / "q", adapter=loud)
    assert not (tmp_path / "q").exists()


def test_an_adapter_of_another_model_is_refused(checkpoint: Factory, tmp_path: Path) -> None:
    adapter = saved(trained(checkpoint("qwen2", hidden_size=96)), tmp_path / "a")
    with pytest.raises(BadModelError, match="adapter of another model"):
        StreamedModel(checkpoint("qwen2"), adapter=adapter)


def test_a_bad_adapter_is_one_line_at_the_command(tiny_qwen2: Path, sound: Path, tmp_path: Path) -> None:
    adapter = edited(sound, tmp_path / "bad", peft_type="LOHA")
    code, stdout, stderr = run(
        "--model", tiny_qwen2, "--adapter", adapter, "--method", "rtn", "--out", tmp_path / "q", "--dry-run"
    )
    assert (code, stdout) == (4, "")
    assert "only LoRA adapters can be merged" in stderr


@pytest.mark.parametrize(
    "part", ["base_layer.weight", "modules_to_save.default.weight"], ids=["under an adapter", "trained whole"]
)
def test_a_whole_tensor_that_overflows_the_stored_dtype_is_refused(
    checkpoint: Factory, tmp_path: Path, part: str
) -> None:
    base = checkpoint("qwen2", dtype=torch.float16)
    huge = put(f"base_model.model.lm_head.{part}", torch.full((VOCAB, 64), 1e6))
    adapter = edited(saved(trained(base), tmp_path / "a"), tmp_path / "huge", huge)
    with pytest.raises(BadModelError, match=r"makes NaN or Inf of lm_head\.weight in torch\.float16"):
        quantize_checkpoint(base, None, QuantizeConfig(method="rtn", group_size=32), tmp_path / "q", adapter=adapter)
    assert not (tmp_path / "q").exists()
