"""Qwen v1 folders in and out: files, names, config fields old and new, sizes, dtypes, Auto classes without remote code.

What the weights compute is test_qwen_model.py, generation is test_qwen_cache.py.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from qquant.errors import BadModelError
from qquant.kv_cache_quant import Int8KVCache
from qquant.models.qwen.configuration import QWenConfig
from qquant.models.qwen.modeling import QWenLMHeadModel, QWenModel, register_qwen
from qquant.models.qwen.tokenization import QWenTokenizer
from tests.make_qwen_v1 import PUBLISHED, SIZES, TINY, as_qwen_v1, make_qwen_v1, tensor_shapes
from tests.qwen_cases import CLOSE, Case, Differences, collect, difference, small, tokens
from tests.qwen_v1 import real_vocabulary_or_skip

EMBEDDED = Path(__file__).parent.parent / "examples" / "reference-model"
PARAMETERS = {"1.8B": 1_836_828_672, "7B": 7_721_324_544, "14B": 14_167_290_880, "72B": 72_287_920_128}
BF16_BYTES = {"1.8B": 3_673_657_344, "7B": 15_442_649_088, "14B": 28_334_581_760, "72B": 144_575_840_256}
"""Sum of the tensors; for 7B and 72B also ``total_size`` in the published index."""
AUGUST_2023: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "embd_pdrop": 0.1,
    "ffn_hidden_size": 96,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-06,
    "model_type": "qwen",
    "n_embd": 32,
    "n_head": 2,
    "n_layer": 3,
    "n_positions": 128,
    "no_bias": True,
    "padded_vocab_size": 512,
    "resid_pdrop": 0.1,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 16,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": 496,
}
"""The fields that the first release named otherwise, in a tiny config.json of its kind."""


@pytest.fixture(scope="module")
def differences(request: pytest.FixtureRequest) -> Iterator[Differences]:
    """Prints what the tests of this file saw."""
    yield from collect(request, "Qwen v1, checkpoints")


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """The Auto classes know the type."""
    register_qwen()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny folder, never written to."""
    return make_qwen_v1(tmp_path_factory.mktemp("qwen"))


def with_config(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a folder with other fields in config.json."""
    shutil.copytree(folder, target)
    settings = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(settings))
    return target


def config(**changes: Any) -> QWenConfig:
    return QWenConfig(**PUBLISHED | TINY | changes)


@pytest.mark.parametrize("shards", [1, 3], ids=["one_file", "three_shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_a_folder_loads_whole(shards: int, dtype: torch.dtype, tmp_path: Path, differences: Differences) -> None:
    made = make_qwen_v1(tmp_path / "qwen", shards=shards, dtype=dtype)
    model, info = QWenLMHeadModel.from_pretrained(made, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    ids = tokens(1, 33)
    expected = Case(made).expected(ids[0])
    differences.check(
        f"logits, {dtype} in {shards} file(s), float32 in memory", model(ids).logits[0].detach(), expected
    )


@pytest.mark.parametrize("no_bias", [True, False], ids=["published", "biases"])
def test_state_dict_has_the_published_names_and_no_others(no_bias: bool) -> None:
    settings = PUBLISHED | TINY | {"no_bias": no_bias}
    with torch.device("meta"):
        state = QWenLMHeadModel(QWenConfig(**settings)).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == tensor_shapes(settings)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_their_parameters_and_bytes(size: str) -> None:
    with torch.device("meta"):
        model: Any = QWenLMHeadModel(QWenConfig(**PUBLISHED | SIZES[size]))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[size]
    saved = model.to(torch.bfloat16).state_dict()
    assert sum(tensor.numel() * tensor.element_size() for tensor in saved.values()) == BF16_BYTES[size]


@pytest.mark.parametrize("trust", [False, True, None], ids=["off", "on", "unsaid"])
@pytest.mark.parametrize(
    ("auto", "native"),
    [
        (AutoConfig, QWenConfig),
        (AutoModelForCausalLM, QWenLMHeadModel),
        (AutoModel, QWenModel),
        (AutoTokenizer, QWenTokenizer),
    ],
    ids=["config", "causal_lm", "model", "tokenizer"],
)
def test_auto_classes_are_native_and_run_no_remote_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auto: Any, native: Any, trust: bool | None
) -> None:
    # The folder's code files raise when they are imported, and transformers would copy them here first.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = {} if trust is None else {"trust_remote_code": trust}
    assert type(auto.from_pretrained(folder, **options)) is native
    assert not list(tmp_path.rglob("*_qwen.py"))


def test_registering_again_changes_nothing(folder: Path) -> None:
    register_qwen()
    register_qwen()
    found: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert type(found) is QWenLMHeadModel


def test_saving_keeps_names_fields_and_logits(folder: Path, tmp_path: Path) -> None:
    model = QWenLMHeadModel.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path))
    free = ("transformers_version", "auto_map")  # the version is the writer's; native code needs no map
    lost = {name: value for name, value in before.items() if name not in free and after.get(name, None) != value}
    assert lost == {}
    old, new = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    ids = tokens(1, 33)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_generation_settings_survive(folder: Path, tmp_path: Path) -> None:
    QWenLMHeadModel.from_pretrained(folder).save_pretrained(tmp_path)
    before, after = (json.loads((place / "generation_config.json").read_text()) for place in (folder, tmp_path))
    assert {name: after.get(name) for name in before} | {"transformers_version": 0} == before | {
        "transformers_version": 0
    }


def test_a_tied_head_needs_no_tensor_of_its_own(folder: Path, tmp_path: Path) -> None:
    model: Any = QWenLMHeadModel(config(tie_word_embeddings=True))
    model.eval().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = QWenLMHeadModel.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert torch.equal(model(tokens(1, 5)).logits, again(tokens(1, 5)).logits)


def test_names_of_august_2023_are_taken(folder: Path, tmp_path: Path, differences: Differences) -> None:
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    (old / "config.json").write_text(json.dumps(AUGUST_2023))
    model = AutoModelForCausalLM.from_pretrained(old, dtype=torch.float32)
    settings = model.config
    assert (settings.hidden_size, settings.num_attention_heads, settings.num_hidden_layers) == (32, 2, 3)
    assert (settings.intermediate_size, settings.max_position_embeddings) == (96, 128)
    assert (settings.vocab_size, settings.emb_dropout_prob) == (512, 0.1)
    ids = tokens(1, 33)
    differences.check("logits, config of August 2023", model(ids).logits[0].detach(), Case(folder).expected(ids[0]))
    model.save_pretrained(tmp_path / "new")
    again = AutoConfig.from_pretrained(tmp_path / "new")
    assert again.to_diff_dict() == settings.to_diff_dict()


def test_seq_length_has_the_value_of_7b_where_it_is_missing(tmp_path: Path, folder: Path) -> None:
    made = with_config(folder, tmp_path / "qwen")
    settings = json.loads((made / "config.json").read_text())
    del settings["seq_length"]
    (made / "config.json").write_text(json.dumps(settings))
    assert AutoConfig.from_pretrained(made).seq_length == 8192


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_channels": 8}, r"kv_channels \* num_attention_heads must be hidden_size .* got 8 \* 2 and 32; take"),
        ({"intermediate_size": 97}, "intermediate_size must be even, twice the width .* got 97"),
        ({"rotary_pct": 0.0}, "rotary_pct must leave an even number .* got 0.0"),
        ({"rotary_pct": 1.5}, "rotary_pct must leave an even number .* got 1.5"),
        ({"rotary_pct": 0.2}, "rotary_pct must leave an even number .* got 0.2"),
        ({"seq_length": 1}, "seq_length must be .* got 1"),
        ({"bf16": True, "fp16": True}, "at most one of bf16, fp16 and fp32 may be true, got bf16 and fp16"),
    ],
    ids=["heads", "odd_mlp", "no_rotary", "too_much_rotary", "odd_rotary", "no_length", "two_precisions"],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadModelError, match=message):
        config(**changes)


FLAGS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OTHER = {"bf16": torch.float16, "fp16": torch.float32, "fp32": torch.bfloat16}


@pytest.mark.parametrize("loader", [QWenLMHeadModel, AutoModelForCausalLM], ids=["direct", "auto"])
@pytest.mark.parametrize("flag", FLAGS)
def test_a_precision_flag_at_loading_chooses_the_dtype(tmp_path: Path, flag: str, loader: Any) -> None:
    made = make_qwen_v1(tmp_path / "qwen", dtype=OTHER[flag])
    assert loader.from_pretrained(made, **{flag: True}).dtype == FLAGS[flag]
    assert loader.from_pretrained(made, **{flag: True}, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("loader", [QWenLMHeadModel, AutoModelForCausalLM], ids=["direct", "auto"])
@pytest.mark.parametrize("flag", FLAGS)
def test_a_precision_flag_in_the_file_chooses_the_dtype(tmp_path: Path, flag: str, loader: Any) -> None:
    settings: dict[str, Any] = {flag: True}
    made = make_qwen_v1(tmp_path / "qwen", dtype=OTHER[flag], **settings)
    assert loader.from_pretrained(made).dtype == FLAGS[flag]
    assert loader.from_pretrained(made, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("loader", [QWenLMHeadModel, AutoModelForCausalLM], ids=["direct", "auto"])
def test_a_precision_flag_at_loading_never_gives_another_dtype_than_it_names(tmp_path: Path, loader: Any) -> None:
    made = make_qwen_v1(tmp_path / "qwen", bf16=True)
    try:
        found = loader.from_pretrained(made, fp16=True).dtype
    except BadModelError:
        return  # two at once, said so
    assert found == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("loader", [QWenLMHeadModel, AutoModelForCausalLM], ids=["direct", "auto"])
def test_without_a_flag_the_dtype_is_the_files(tmp_path: Path, loader: Any, dtype: torch.dtype) -> None:
    assert loader.from_pretrained(make_qwen_v1(tmp_path / "qwen", dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("loader", [QWenLMHeadModel, AutoModelForCausalLM], ids=["direct", "auto"])
@pytest.mark.parametrize("place", ["file", "argument"])
def test_cache_flags_switch_the_int8_cache_on(folder: Path, tmp_path: Path, place: str, loader: Any) -> None:
    flags = {"use_cache_quantization": True, "use_cache_kernel": True}
    where = with_config(folder, tmp_path / "qwen", **flags) if place == "file" else folder
    model = loader.from_pretrained(where, **(flags if place == "argument" else {}))
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    assert isinstance(model.generate(tokens(1, 4), **options).past_key_values, Int8KVCache)
    kernel_alone = loader.from_pretrained(folder, use_cache_kernel=True)
    assert isinstance(kernel_alone.generate(tokens(1, 4), **options).past_key_values, DynamicCache)


def test_fresh_weights_have_the_published_spread() -> None:
    torch.manual_seed(0)
    model = QWenLMHeadModel(config(hidden_size=256, kv_channels=128, intermediate_size=1024, num_hidden_layers=2))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.dim() == 1:
            assert (parameter == 1).all()
        else:
            sigma = 0.02 / 2 if "c_proj" in name else 0.02  # divided by the root of twice the layers
            # The standard deviation of n samples is known to sigma / sqrt(2 n); six of those, n is at least 65536.
            assert abs(float(parameter.detach().std()) - sigma) < 6 * sigma / (2 * parameter.numel()) ** 0.5, name


def test_blocks_are_not_split_between_devices(folder: Path, tmp_path: Path) -> None:
    assert QWenLMHeadModel._no_split_modules == ["QWenBlock"]
    places = {"transformer.wte": "cpu", "transformer.h": "disk", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    places |= {"transformer.rotary_emb": "cpu", "transformer.drop": "cpu"}
    spread = QWenLMHeadModel.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    ids = tokens(1, 33)
    assert difference(spread(ids).logits, QWenLMHeadModel.from_pretrained(folder)(ids).logits) < CLOSE


def test_the_embedded_model_is_the_same_in_both_formats(tmp_path: Path, differences: Differences) -> None:
    made = as_qwen_v1(EMBEDDED, tmp_path / "v1", shards=2)
    case = Case(made)
    other: Any = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    ids = torch.randint(0, 4096, (1, 48), generator=torch.Generator().manual_seed(0))
    expected = case.expected(ids[0])
    with torch.no_grad():
        theirs = other(ids).logits[0]
    # Both round to float32 as they go, each in its own order: ours may be twice as far from exact as the other, which
    # puts them at most three times that apart.
    plain = difference(theirs, expected)
    differences.check("embedded model as Qwen2", theirs, expected)
    differences.check("embedded model as Qwen v1", case.logits(ids)[0], expected, 2 * plain)
    differences.check("embedded model, v1 against Qwen2", case.logits(ids)[0], theirs, 3 * plain)
    assert torch.equal(case.logits(ids)[0].argmax(-1), theirs.argmax(-1))


def test_the_embedded_models_text_has_the_same_ids_in_both_formats(tmp_path: Path) -> None:
    made = as_qwen_v1(EMBEDDED, tmp_path / "v1")
    ours, theirs = AutoTokenizer.from_pretrained(made), AutoTokenizer.from_pretrained(EMBEDDED)
    text = (EMBEDDED / "eval.txt").read_text()[:20000] + "<|im_start|>user\n你好, 12345!<|im_end|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_a_folder_of_the_full_vocabulary_reads_and_answers(tmp_path: Path) -> None:
    made = make_qwen_v1(tmp_path / "full", vocabulary=real_vocabulary_or_skip(), num_hidden_layers=1)
    model: Any = AutoModelForCausalLM.from_pretrained(made)
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert len(tokenizer) == model.used_ids == 151851
    assert model.generation_config.eos_token_id == 151643
    inputs = tokenizer("你好，世界！", return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False, repetition_penalty=1.0)
    assert str(tokenizer.decode(found[0])).startswith("你好，世界！")


def test_padded_rows_of_the_full_vocabulary_are_never_generated(tmp_path: Path) -> None:
    case = small(tmp_path / "full", vocab_size=151936, num_hidden_layers=1)
    assert case.model.used_ids == 151851
    case.model.lm_head.weight.data[151851:] *= 100
    ids = tokens(2, 8)
    assert (case.logits(ids)[:, -1].argmax(-1) >= 151851).all()
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 0}):
        found = case.model.generate(ids, attention_mask=torch.ones_like(ids), **options, max_new_tokens=6)
        assert int(found.max()) < 151851
