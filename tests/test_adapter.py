"""A LoRA adapter merged on the way: the same weights and codes as peft's own merge, one command from end to end.

What is refused is test_bad_adapter.py.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qquant
from qquant.adapter import Adapter
from qquant.adapter_settings import CONFIG_NAME, WEIGHTS_NAME
from qquant.calibrate import samples_from_ids
from qquant.config import QuantizeConfig
from qquant.identity import sha256
from qquant.quantizing import quantize_checkpoint
from qquant.sources import StreamedModel
from tests.adapters import RANK, edited, merged, run, saved, streamed, trained
from tests.conftest import VOCAB, Factory
from tests.make_qwen_v1 import make_qwen_v1

IDS = torch.randint(0, VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))
QWENS_WTE = "base_model.model.transformer.wte.weight"


def rounding(tensor: Tensor) -> dict[str, Any]:
    """Tolerance for the same operations on the same values, whose sums of ``RANK`` products may run in another order.

    One rounding to the tensor's dtype, and before it in float32 one for each term of the sum, on either side.
    """
    step = torch.finfo(tensor.dtype).eps
    largest = float(tensor.abs().max())
    return {"rtol": step, "atol": 2 * (RANK + 1) * torch.finfo(torch.float32).eps * largest}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank stabilized": {"use_rslora": True},
    "ranks and alphas": {
        "rank_pattern": {"q_proj": 2, "layers.0.mlp.down_proj": 8},
        "alpha_pattern": {r"layers\.1\..*v_proj": 3, "q_proj": 5},
    },
    "rank stabilized with patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "all linears": {"target_modules": "all-linear"},
    "one layer": {"layers_to_transform": [1]},
    "dora": {"use_dora": True},
    "dora of an embedding": {"use_dora": True, "target_modules": ["embed_tokens", "o_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    "trained whole": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "a linear trained whole": {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
    "all biases": {"bias": "all"},
    "biases of adapted modules": {"bias": "lora_only"},
    "bias of the update": {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
}


@pytest.mark.parametrize("options", list(CASES.values()), ids=list(CASES))
def test_merged_weights_are_those_of_peft(tiny_qwen2: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = saved(trained(tiny_qwen2, **options), tmp_path / "a")
    expected = merged(tiny_qwen2, adapter).state_dict()
    source, got = streamed(tiny_qwen2, adapter)
    assert got.keys() == expected.keys()
    stored = load_file(tiny_qwen2 / "model.safetensors")
    assert any(not torch.equal(got[name], stored[name]) for name in got)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], **rounding(tensor))
    assert source.config_changes == {}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "olmo2"])  # olmo2: known by structure only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_are_those_of_the_model_that_peft_merged(
    checkpoint: Factory, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    base = checkpoint(family, dtype=dtype)
    adapter = saved(trained(base, target_modules="all-linear", modules_to_save=["lm_head"]), tmp_path / "a")
    merged(base, adapter).save_pretrained(tmp_path / "merged")
    samples, config = samples_from_ids(IDS.reshape(2, -1)), QuantizeConfig(group_size=32)
    quantize_checkpoint(base, samples, config, tmp_path / "ours", adapter=adapter)
    quantize_checkpoint(tmp_path / "merged", samples, config, tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


QWEN: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "kv_channels": 32}
QWENS_TARGETS = ["c_attn", "c_proj", "w1", "w2"]
"""As Qwen's own finetune.py names them: c_proj is both the attention's and the MLP's."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_qwens_own_recipe_gives_the_codes_of_the_merged_model(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_qwen_v1(tmp_path / "base", chat=False, dtype=dtype, **QWEN)
    tuned = trained(base, r=8, lora_alpha=16, target_modules=QWENS_TARGETS, modules_to_save=["wte", "lm_head"])
    adapter = saved(tuned, tmp_path / "a")
    adapted = {name.rpartition(".")[0] for name, update in Adapter(adapter).updates.items() if update.low_rank}
    inner = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    assert adapted == {f"transformer.h.{index}.{name}" for index in range(2) for name in inner}
    shutil.copytree(base, tmp_path / "merged")
    (tmp_path / "merged" / "model.safetensors").unlink()
    save_file(dict(merged(base, adapter).state_dict()), tmp_path / "merged" / "model.safetensors")
    samples, config = samples_from_ids(IDS.reshape(2, -1) % 288), QuantizeConfig(group_size=32)
    quantize_checkpoint(base, samples, config, tmp_path / "ours", adapter=adapter)
    quantize_checkpoint(tmp_path / "merged", samples, config, tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(ours["transformer.wte.weight"], load_file(adapter / WEIGHTS_NAME)[QWENS_WTE].to(dtype))


def test_the_fine_tuned_model_is_what_the_quantized_one_stays_close_to(tiny_llama: Path, tmp_path: Path) -> None:
    tuned = trained(tiny_llama)
    adapter = saved(tuned, tmp_path / "a")
    config = QuantizeConfig(bits=8, group_size=32)
    quantize_checkpoint(tiny_llama, samples_from_ids(IDS), config, tmp_path / "q", adapter=adapter)
    with torch.inference_mode():
        exact, plain = tuned(IDS).logits, AutoModelForCausalLM.from_pretrained(tiny_llama)(IDS).logits
        got = qquant.load_quantized(tmp_path / "q")(IDS).logits
    # 8 bits leave an error of some 2^-8 of the norm; what the adapter changes is many times that.
    assert (got - exact).norm() < 2**-6 * exact.norm() < (got - plain).norm()


@pytest.mark.parametrize("name", [".default", ""], ids=["with the adapter's name", "as peft saves"])
def test_both_spellings_of_names_are_read(tiny_qwen2: Path, tmp_path: Path, name: str) -> None:
    folder = saved(trained(tiny_qwen2, modules_to_save=["lm_head"]), tmp_path / "a")
    _, expected = streamed(tiny_qwen2, folder)

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        spelled = {}
        for key, tensor in tensors.items():
            key = key.replace(".lora_A.", f".lora_A{name}.").replace(".lora_B.", f".lora_B{name}.")
            spelled[key.replace("lm_head.weight", f"lm_head.modules_to_save{name}.weight")] = tensor
        return spelled

    _, got = streamed(tiny_qwen2, edited(folder, tmp_path / "b", rename))
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_a_merged_matrix_does_not_depend_on_how_it_is_cut(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"use_dora": True, "target_modules": ["embed_tokens", "lm_head", "down_proj"]}
    folder = saved(trained(tiny_qwen2, modules_to_save=["up_proj"], **options), tmp_path / "a")
    _, expected = streamed(tiny_qwen2, folder)
    monkeypatch.setattr("qquant.merging.PIECE", 700)
    monkeypatch.setattr("qquant.shards._CHUNK", 2800)  # as many values in float32: what is taken whole
    _, got = streamed(tiny_qwen2, folder)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], **rounding(tensor))


TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "neither side": ({}, True),
    "head trained whole": ({"modules_to_save": ["lm_head"]}, False),
    "embedding trained whole": ({"modules_to_save": ["embed_tokens"]}, False),
    "both trained apart": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "both trained as one": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "both named, trained as one": (
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        True,
    ),
    "head adapted": ({"target_modules": ["lm_head"]}, False),
    "embedding adapted": ({"target_modules": ["embed_tokens", "q_proj"]}, False),
    "both adapted apart": ({"target_modules": ["embed_tokens", "lm_head"]}, False),
    "both adapted as one": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "both named, adapted as one": ({"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, True),
    "longer": ({"resize": VOCAB + 16}, True),
    "longer, head trained whole": ({"resize": VOCAB + 16, "modules_to_save": ["lm_head"]}, False),
    "longer, embedding adapted": ({"resize": VOCAB + 16, "target_modules": ["embed_tokens"]}, False),
}


@pytest.mark.parametrize(("options", "stays"), list(TIED.values()), ids=list(TIED))
def test_tied_embeddings_become_what_was_trained(
    checkpoint: Factory, tmp_path: Path, options: dict[str, Any], stays: bool
) -> None:
    """Against the model as it was trained: peft's merge adds an update of one side to the weight that both share."""
    base = checkpoint("qwen2", tie=True)
    tuned = trained(base, **options)
    with torch.inference_mode():
        expected = tuned(IDS).logits
    adapter, out = saved(tuned, tmp_path / "a"), tmp_path / "q"
    source, tensors = streamed(base, adapter)
    assert source.config_changes.get("tie_word_embeddings", True) == stays
    assert ("lm_head.weight" in tensors) != stays
    model = AutoModelForCausalLM.from_config(source.config).eval()
    model.load_state_dict(tensors, strict=not stays)
    with torch.inference_mode():
        # Sums of 128 float32 products at most, in another order, through two layers.
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-4)
    quantize_checkpoint(base, None, QuantizeConfig(method="rtn", group_size=32), out, adapter=adapter)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] == stays
    assert config["vocab_size"] == options.get("resize", VOCAB)
    assert qquant.load_quantized(out)(IDS).logits.shape[-1] == options.get("resize", VOCAB)


def keep_ids_below(rows: int, source: Path, target: Path) -> None:
    content = json.loads(source.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
    target.write_text(json.dumps(content))


@pytest.mark.parametrize("rows", [VOCAB + 24, VOCAB - 2])
@pytest.mark.parametrize("whole", [["embed_tokens", "lm_head"], None], ids=["trained", "only resized"])
def test_another_vocabulary_is_followed_by_the_config(
    tiny_qwen2: Path, tmp_path: Path, rows: int, whole: list[str] | None
) -> None:
    tuned = trained(tiny_qwen2, resize=rows, modules_to_save=whole)
    adapter, out = saved(tuned, tmp_path / "a"), tmp_path / "q"
    if rows < VOCAB:  # then its tokenizer must have fewer ids as well
        keep_ids_below(rows, tiny_qwen2 / "tokenizer.json", adapter / "tokenizer.json")
    ids = torch.tensor([[1, 2, rows - 1]])
    config = QuantizeConfig(bits=8, group_size=32)
    quantize_checkpoint(tiny_qwen2, samples_from_ids(ids), config, out, adapter=adapter)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == rows
    stored = load_file(out / "model.safetensors")
    assert stored["lm_head.weight"].shape[0] == stored["model.embed_tokens.weight"].shape[0] == rows
    with torch.inference_mode():
        exact, got = tuned(ids).logits, qquant.load_quantized(out)(ids).logits
    assert (got - exact).norm() < 2**-6 * exact.norm()


def test_qwens_longer_vocabulary_needs_no_other_config(tmp_path: Path) -> None:
    """Where the official config.json is put over such weights, as Qwen's README has it, they no longer fit."""
    base = make_qwen_v1(tmp_path / "base", **QWEN)
    options: dict[str, Any] = {"target_modules": QWENS_TARGETS, "modules_to_save": ["wte", "lm_head"]}
    adapter = saved(trained(base, resize=544, **options), tmp_path / "a")
    for name in ("qwen.tiktoken", "tokenizer_config.json", "tokenization_qwen.py"):
        shutil.copy(base / name, adapter)  # as a tokenizer of 2023 saves itself
    data, out = tmp_path / "chats.json", tmp_path / "q"
    turns = [{"from": "user", "value": "set eat"}, {"from": "assistant", "value": "state of the art" * 9}]
    data.write_text(json.dumps([{"id": str(index), "conversations": turns} for index in range(4)]))
    paths = ("--model", base, "--adapter", adapter, "--data", data, "--out", out)
    code, _, stderr = run(*paths, "--group-size", 32, "--seq-len", 48, "--n-samples", 4)
    assert code == 0, stderr
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("qwen", 544)
    assert qquant.load_quantized(out)(torch.tensor([[1, 2, 543]])).logits.shape[-1] == 544
    assert AutoTokenizer.from_pretrained(out)("state")["input_ids"]


@pytest.fixture(scope="module")
def sound(checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter. Never write to it."""
    tuned = trained(checkpoint("qwen2"), modules_to_save=["lm_head"])
    return saved(tuned, tmp_path_factory.mktemp("adapter") / "sound")


def test_names_that_match_nothing_are_said_and_passed_over(
    tiny_qwen2: Path, sound: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A list often serves several families; peft passes over such names too."""
    targets, whole = ["q_proj", "v_proj", "down_proj", "c_attn"], ["lm_head", "wte"]
    with caplog.at_level(logging.WARNING, "qquant"):
        streamed(tiny_qwen2, edited(sound, tmp_path / "a", target_modules=targets, modules_to_save=whole))
    lines = [record.message for record in caplog.records]
    assert [line.rpartition(": ")[2] for line in lines] == ["c_attn", "wte"]
    assert [line.split()[0] for line in lines] == ["target_modules", "modules_to_save"]


def test_names_of_tied_copies_are_names_of_the_model(
    checkpoint: Factory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = checkpoint("qwen2", tie=True)
    options: dict[str, Any] = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    adapter = saved(trained(base, **options), tmp_path / "a")
    with caplog.at_level(logging.WARNING, "qquant"):
        streamed(base, adapter)
    assert caplog.records == []


PATTERNS = [
    r"layers\.\d+\..*v_proj",
    "(q|k)_proj",
    "(?:q|k)_proj",
    "^model.layers.0.mlp.down_proj",
    "layers.[01].*q_proj",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_what_they_mean_to_peft(sound: Path, tmp_path: Path, pattern: str) -> None:
    settings = Adapter(edited(sound, tmp_path / "a", alpha_pattern={pattern: 40})).settings
    modules = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "self_attn.v_proj")]
    modules.append("model.layers.0.mlp.down_proj")
    scales = {module: get_pattern_key([pattern], module) == pattern for module in modules}
    assert {module: settings.scale(module) == 10.0 for module in modules} == scales
    assert True in scales.values()


def test_only_the_current_block_is_merged_and_held(tiny_qwen2: Path, sound: Path) -> None:
    source = StreamedModel(tiny_qwen2, adapter=sound)
    assert all(parameter.is_meta for parameter in source.model.parameters())
    source.load(1)
    held = {name for name, parameter in source.model.named_parameters() if not parameter.is_meta}
    assert held
    assert all(name.startswith("model.layers.1.") for name in held)


def test_the_manifest_names_the_adapters_files(tiny_qwen2: Path, sound: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_qwen2, None, QuantizeConfig(method="rtn", group_size=32), tmp_path / "q", adapter=sound)
    manifest = json.loads((tmp_path / "q" / "manifest.json").read_text())
    files = {name: sha256(sound / name) for name in (CONFIG_NAME, WEIGHTS_NAME)}
    assert manifest["adapter"] == {"name": "sound", "files": files}
    assert all(sha256(tmp_path / "q" / name) == digest for name, digest in manifest["files"].items())


@pytest.fixture
def extended(tiny_qwen2: Path, tmp_path: Path) -> Path:
    """An adapter whose training added a token: longer embeddings, and the tokenizer beside them."""
    adapter = saved(
        trained(tiny_qwen2, resize=VOCAB + 1, modules_to_save=["embed_tokens", "lm_head"]), tmp_path / "tuned"
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    assert tokenizer.add_tokens(["zzyzx"]) == 1
    tokenizer.save_pretrained(adapter)
    return adapter


def test_one_command_quantizes_a_fine_tuned_model(tiny_qwen2: Path, extended: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data.txt", tmp_path / "q"
    data.write_text("a zzyzx is not a zzyzx unless it is a zzyzx\n" * 40)
    options = ["--model", tiny_qwen2, "--adapter", extended, "--data", data, "--seq-len", 32, "--group-size", 32]
    code, plan, stderr = run(*options, "--n-samples", 4, "--out", out, "--dry-run")
    assert code == 0, stderr
    assert "14 to 4 bits" in plan
    assert not out.exists()
    code, _, stderr = run(*options, "--n-samples", 4, "--out", out)
    assert code == 0, stderr
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("zzyzx")["input_ids"] == [VOCAB]
    logits = qquant.load_quantized(out)(torch.tensor([tokenizer("a zzyzx")["input_ids"]])).logits
    assert logits.shape[-1] == VOCAB + 1
