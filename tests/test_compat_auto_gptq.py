"""Scripts written for AutoGPTQ run after one changed import, and what they save is what our own commands save.

What the engine computes is tested elsewhere, what options mean in test_compat_options.py.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import qquant
from qquant.compat.auto_gptq import AutoGPTQForCausalLM, BaseGPTQForCausalLM
from qquant.config import QuantizeConfig
from qquant.errors import BadModelError, NumericError, UsageError
from qquant.identity import sha256
from qquant.inspect import examine as inspect_folder
from qquant.linear import QuantLinear
from qquant.model_folder import load_tokenizer
from qquant.shard_writer import ShardWriter
from tests.compat import (
    assert_same_tensors,
    examples,
    its_checkpoint,  # noqa: F401 - the fixture saved
    load,
    quantized_model,  # noqa: F401 - the fixture quantized
    samples,
    tensors,
)
from tests.conftest import CORPUS, Factory
from tests.make_qwen_v1 import make_qwen_v1

# In the shape of the script that Qwen published: the same options, the same ids, the same calls.
SCRIPT = """
import argparse
import json
import logging

import torch
from transformers import AutoTokenizer

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig


def preprocess(items, tokenizer, max_len, system="You are a helpful assistant."):
    start, end = IM_START, IM_END
    newline = tokenizer("\\n").input_ids
    data = []
    for item in items:
        turns = item["conversations"]
        if turns[0]["from"] != "user":
            turns = turns[1:]
        ids = [start] + tokenizer("system").input_ids + newline + tokenizer(system).input_ids + [end] + newline
        for turn in turns:
            role = tokenizer("<|im_start|>" + turn["from"]).input_ids
            ids += role + newline + tokenizer(turn["value"]).input_ids + [end] + newline
        row = torch.tensor(ids[:max_len], dtype=torch.int)
        data.append(dict(input_ids=row, attention_mask=row.ne(tokenizer.pad_token_id)))
    return data


parser = argparse.ArgumentParser()
parser.add_argument("--model_name_or_path", required=True)
parser.add_argument("--data_path", required=True)
parser.add_argument("--out_path", required=True)
parser.add_argument("--max_len", type=int, default=8192)
parser.add_argument("--bits", type=int, choices=[4, 8], default=4)
parser.add_argument("--group-size", type=int, default=128)
args = parser.parse_args()
quantize_config = BaseQuantizeConfig(
    bits=args.bits,
    group_size=args.group_size,
    damp_percent=0.01,
    desc_act=False,
    static_groups=False,
    sym=True,
    true_sequential=True,
    model_name_or_path=None,
    model_file_base_name="model",
)
tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=True)
tokenizer.pad_token_id = PAD
data = preprocess(json.load(open(args.data_path, encoding="utf-8")), tokenizer, args.max_len)
model = AutoGPTQForCausalLM.from_pretrained(
    args.model_name_or_path, quantize_config, device_map="auto", trust_remote_code=True
)
logging.basicConfig(format="%(levelname)s [%(name)s] %(message)s", level=logging.INFO)
model.quantize(data, cache_examples_on_gpu=False)
model.save_quantized(args.out_path, use_safetensors=True)
tokenizer.save_pretrained(args.out_path)
"""
QWEN2_NAMES = {
    "IM_START": 'tokenizer.convert_tokens_to_ids("<|im_start|>")',
    "IM_END": 'tokenizer.convert_tokens_to_ids("<|im_end|>")',
    "PAD": "tokenizer.eos_token_id",
}
QWEN1_NAMES = {"IM_START": "tokenizer.im_start_id", "IM_END": "tokenizer.im_end_id", "PAD": "tokenizer.eod_id"}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "data.json"
    turns = [{"from": "user", "value": CORPUS[0]}, {"from": "assistant", "value": CORPUS[2]}]
    items = [{"id": str(i), "conversations": turns[: 1 + i % 2] + turns} for i in range(4)]
    file.write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")
    return file


def run_script(names: dict[str, str], model: Path, chats: Path, out: Path, where: Path, *, group_size: int = 32) -> str:
    """Run the published script with only its import changed; returns what it logged."""
    text = SCRIPT.replace("from auto_gptq import", "from qquant.compat.auto_gptq import")
    for name, expression in names.items():
        text = text.replace(name, expression)
    (where / "run_gptq.py").write_text(text, encoding="utf-8")
    words = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(where / "run_gptq.py")]
    words += ["--model_name_or_path", str(model), "--data_path", str(chats), "--out_path", str(out)]
    words += ["--bits", "4", "--group-size", str(group_size), "--max_len", "64"]
    root = Path(__file__).parent.parent
    result = subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def with_remote_code(folder: Path, to: Path, classes: dict[str, str]) -> Path:
    """A copy of a model folder that names code of its own; running it leaves a file behind."""
    shutil.copytree(folder, to)
    (to / "theirs.py").write_text(f"open({str(to / 'ran')!r}, 'w')\n", encoding="utf-8")
    config = json.loads((to / "config.json").read_text())
    config["auto_map"] = {name: f"theirs.{kind}" for name, kind in classes.items()}
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.slow  # starts an interpreter and imports torch
def test_the_published_script_runs_after_one_changed_import(tiny_qwen2: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "int4"
    logged = run_script(QWEN2_NAMES, tiny_qwen2, chats, out, tmp_path)
    assert "cache_examples_on_gpu" in logged
    assert {"config.json", "quantize_config.json", "model.safetensors", "generation_config.json"} <= {
        path.name for path in out.iterdir()
    }
    assert inspect_folder(out)["problems"] == []
    # The script's ids are the ones that our reader makes of the same file, so the command line gives the same tensors.
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    ours = qquant.load_samples(chats, tokenizer, n_samples=4, seq_len=64)
    qquant.quantize_checkpoint(tiny_qwen2, ours, QuantizeConfig(bits=4, group_size=32), tmp_path / "ours")
    assert_same_tensors(out, tmp_path / "ours")
    ids = torch.tensor([tokenizer.encode(CORPUS[0])])
    theirs = AutoGPTQForCausalLM.from_quantized(out, device="cpu", use_safetensors=True)
    assert torch.equal(theirs(ids).logits, qquant.load_quantized(tmp_path / "ours")(ids).logits)


@pytest.mark.slow  # starts an interpreter and imports torch
def test_the_published_script_runs_on_an_original_qwen(chats: Path, tmp_path: Path) -> None:
    """The folder names code of 2023, which raises if anything runs it; the script trusts it, and none is run."""
    model = make_qwen_v1(tmp_path / "model")
    out = tmp_path / "int4"
    logged = run_script(QWEN1_NAMES, model, chats, out, tmp_path, group_size=16)
    assert "no code of its folder is run" in logged
    assert inspect_folder(out)["problems"] == []
    tokenizer = load_tokenizer(model)
    ours = qquant.load_samples(chats, tokenizer, n_samples=4, seq_len=64)
    qquant.quantize_checkpoint(model, ours, QuantizeConfig(bits=4, group_size=16), tmp_path / "ours")
    assert_same_tensors(out, tmp_path / "ours")
    assert load_tokenizer(out).encode(CORPUS[2]) == tokenizer.encode(CORPUS[2])


def test_no_code_of_a_folder_is_run_though_it_is_trusted(
    tiny_qwen2: Path, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classes = {"AutoConfig": "Config", "AutoModelForCausalLM": "Model"}
    original = with_remote_code(tiny_qwen2, tmp_path / "original", classes)
    packed = with_remote_code(saved, tmp_path / "packed", classes)
    with caplog.at_level(logging.WARNING, "qquant"):
        load(original, trust_remote_code=True)
        AutoGPTQForCausalLM.from_quantized(packed, trust_remote_code=True)
    assert not (original / "ran").exists()
    assert not (packed / "ran").exists()
    said = [record.message for record in caplog.records]
    lines = [line for line in said if "names code (auto_map), which was left out" not in line]
    assert [line.partition(":")[0] for line in lines] == ["trust_remote_code is not needed"] * 2


def test_the_checkpoint_is_that_of_quantize_checkpoint(tiny_qwen2: Path, saved: Path, tmp_path: Path) -> None:
    qquant.quantize_checkpoint(tiny_qwen2, samples(), QuantizeConfig(bits=4, group_size=32), tmp_path / "disk")
    assert {path.name for path in saved.iterdir()} == {path.name for path in (tmp_path / "disk").iterdir()}
    for file in (tmp_path / "disk").iterdir():
        if file.name != "manifest.json":  # which names fewer files here: scripts save their tokenizer afterwards
            assert (saved / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_manifest_vouches_for_what_no_script_saves_again(saved: Path) -> None:
    files = json.loads((saved / "manifest.json").read_text())["files"]
    assert list(files) == ["config.json", "model.safetensors", "quant_log.json", "quantize_config.json"]
    assert all(sha256(saved / name) == digest for name, digest in files.items())


def test_the_checkpoint_is_that_of_quantize_model(tiny_qwen2: Path, saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    qquant.quantize_model(model, samples(), QuantizeConfig(bits=4, group_size=32))
    model.save_pretrained(tmp_path / "memory")
    assert_same_tensors(saved, tmp_path / "memory")


def test_channels_that_were_rescaled_are_saved_as_quantize_checkpoint_stores_them(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """The default method scales a strong channel of a norm down and the columns that read it up."""
    folder, norm = tmp_path / "m", "model.layers.0.input_layernorm.weight"
    shutil.copytree(tiny_llama, folder)
    strong = load_file(folder / "model.safetensors")
    strong[norm][3] *= 64
    for leaf in "qkv":
        strong[f"model.layers.0.self_attn.{leaf}_proj.weight"][:, 3] /= 64
    save_file(strong, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    model.quantize(examples())
    model.save_quantized(tmp_path / "ours")
    qquant.quantize_checkpoint(folder, samples(), QuantizeConfig(bits=4, group_size=32), tmp_path / "disk")
    assert_same_tensors(tmp_path / "ours", tmp_path / "disk")
    assert not torch.equal(tensors(tmp_path / "ours")[norm], strong[norm])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_other_families_and_tied_heads_are_saved_and_loaded(checkpoint: Factory, tmp_path: Path, family: str) -> None:
    model = load(checkpoint(family, tie=True, dtype=torch.bfloat16))
    model.quantize(examples())
    model.save_quantized(tmp_path / "q")
    assert "lm_head.weight" not in tensors(tmp_path / "q")
    again = AutoGPTQForCausalLM.from_quantized(tmp_path / "q")
    ids = examples()[0]["input_ids"][None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_model_is_usable_and_saved_again_after_it_was_quantized(
    quantized: BaseGPTQForCausalLM, saved: Path, tmp_path: Path
) -> None:
    ids = examples()[0]["input_ids"][None]
    assert isinstance(quantized, nn.Module)
    assert quantized.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 27)
    quantized.save_pretrained(tmp_path / "again")
    quantized.save_quantized(tmp_path / "again")
    assert_same_tensors(saved, tmp_path / "again")


def test_the_wrapper_offers_what_scripts_ask_of_it(quantized: BaseGPTQForCausalLM, tiny_qwen2: Path) -> None:
    assert quantized.quantized
    assert quantized.hf_device_map is None
    assert quantized.device == torch.device("cpu")
    assert quantized.config is quantized.model.config
    assert quantized.eval() is quantized
    assert quantized.to("cpu") is quantized
    assert quantized.generation_config is quantized.model.generation_config
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = quantized.no_such_thing
    assert not load(tiny_qwen2).quantized


def test_an_impossible_group_size_is_refused_and_can_be_changed(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    model.quantize_config.group_size = 48
    with pytest.raises(UsageError, match="group_size must"):
        model.quantize(examples(2))
    model.quantize_config.group_size = 64
    model.quantize(examples(2))


def test_a_model_left_half_quantized_is_not_quantized_again(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise NumericError("activations must be finite")

    model = load(tiny_llama)
    with monkeypatch.context() as patch:
        patch.setattr("qquant.compat.auto_gptq.quantize_model", fails)
        with pytest.raises(NumericError):
            model.quantize(examples(2))
    with pytest.raises(UsageError, match="call from_pretrained again"):
        model.quantize(examples(2))
    with pytest.raises(UsageError, match="call quantize"):
        model.save_quantized(tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_a_quantized_model_is_not_quantized_again(quantized: BaseGPTQForCausalLM, saved: Path) -> None:
    with pytest.raises(UsageError, match="is quantized already"):
        quantized.quantize(examples())
    with pytest.raises(BadModelError, match="quantized already"):
        load(saved)


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_dtype_that_is_asked_for_is_the_one_that_is_saved(tiny_qwen2: Path, tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    model = load(tiny_qwen2, torch_dtype=dtype)
    assert model.model.dtype == (torch.float32 if name == "float16" else dtype)  # float16 is slow on a CPU
    model.quantize(examples(2))
    model.save_quantized(tmp_path / "q")
    found = tensors(tmp_path / "q")
    assert found["model.embed_tokens.weight"].dtype == dtype
    assert found["model.layers.0.self_attn.q_proj.bias"].dtype == dtype
    assert found["model.layers.0.self_attn.q_proj.scales"].dtype == torch.float16
    assert AutoGPTQForCausalLM.from_quantized(tmp_path / "q").config.dtype in (dtype, torch.float32)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == name


def test_a_weight_too_large_for_the_dtype_is_refused(checkpoint: Factory, tmp_path: Path) -> None:
    model = load(checkpoint("llama"), torch_dtype="float16")
    model.quantize(examples(2))
    model.model.lm_head.weight.data[0, 0] = 1e6
    with pytest.raises(NumericError, match=r"lm_head\.weight is not in torch\.float16"):
        model.save_quantized(tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_written_wrongly_is_never_published(
    quantized: BaseGPTQForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ShardWriter.write

    def broken(writer: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        plain(writer, name, tensor.flip(-1) if name.endswith("1.mlp.up_proj.qweight") else tensor)

    monkeypatch.setattr(ShardWriter, "write", broken)
    with pytest.raises(NumericError, match=r"up_proj\.qweight is not the one in memory"):
        quantized.save_quantized(tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


def test_an_original_is_never_replaced(quantized: BaseGPTQForCausalLM, tiny_qwen2: Path, tmp_path: Path) -> None:
    original = tmp_path / "original"
    shutil.copytree(tiny_qwen2, original)
    (tmp_path / "file").write_text("x")
    (tmp_path / "nest" / "inner").mkdir(parents=True)
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "pytorch_model.bin").write_text("x")
    for taken in ("original", "file", "nest", "loose"):
        with pytest.raises(UsageError, match="save it elsewhere"):
            quantized.save_quantized(tmp_path / taken)
    for file in tiny_qwen2.iterdir():
        assert (original / file.name).read_bytes() == file.read_bytes()


def test_a_tokenizer_that_the_script_saved_first_stays(
    quantized: BaseGPTQForCausalLM, saved: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q"
    out.mkdir()
    (out / "tokenizer_config.json").write_text('{"mine": true}')
    (out / "notes.txt").write_text("mine")
    quantized.save_quantized(out)
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"mine": True}
    assert (out / "notes.txt").read_text() == "mine"
    assert_same_tensors(out, saved)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("kind", ["link", "link inside", "pipe"])
def test_what_is_no_file_of_its_own_is_never_carried_over(
    quantized: BaseGPTQForCausalLM, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "q"
    out.mkdir()
    (tmp_path / "secret").write_text("secret")
    (out / "mine").write_text("mine")
    if kind == "pipe":
        os.mkfifo(out / "odd")
    else:
        (out / "odd").symlink_to(tmp_path / "secret" if kind == "link" else out / "mine")
    with pytest.raises(UsageError, match=r"odd is a link or no file.*save elsewhere"):
        quantized.save_quantized(out)
    assert {path.name for path in out.iterdir()} == {"mine", "odd"}
    assert {path.name for path in tmp_path.iterdir()} == {"q", "secret"}


def test_a_broken_tokenizer_is_not_saved_and_the_model_stays(tiny_qwen2: Path, tmp_path: Path) -> None:
    original = tmp_path / "original"
    shutil.copytree(tiny_qwen2, original)
    (original / "added_tokens.json").write_text("{% broken %}")
    model = load(original)
    model.quantize(examples(2))
    with pytest.raises(BadModelError, match="every file of the tokenizer"):
        model.save_quantized(tmp_path / "q")
    assert not (tmp_path / "q").exists()
    (original / "added_tokens.json").unlink()
    model.save_quantized(tmp_path / "q")


def test_a_loaded_checkpoint_is_saved_as_it_was(saved: Path, tmp_path: Path) -> None:
    AutoGPTQForCausalLM.from_quantized(saved).save_quantized(tmp_path / "copy")
    assert_same_tensors(saved, tmp_path / "copy")
    for name in ("config.json", "quantize_config.json", "tokenizer.json", "generation_config.json"):
        assert (saved / name).read_bytes() == (tmp_path / "copy" / name).read_bytes()


def test_linears_are_packed_in_memory_and_on_disk(quantized: BaseGPTQForCausalLM) -> None:
    packed = [name for name, layer in quantized.model.named_modules() if isinstance(layer, QuantLinear)]
    assert len(packed) == 14
