"""GPTQ on the original Qwen: what we write for it, and official Int4 and Int8 folders as they were published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qquant
from qquant.calibrate import samples_from_ids
from qquant.capture import capture
from qquant.errors import BadModelError
from qquant.linear import QuantLinear
from qquant.models.qwen import positions
from qquant.models.qwen.modeling import QWenLMHeadModel
from qquant.moments import Hessian
from qquant.quantizing import quantize_checkpoint
from qquant.shards import SINGLE_NAME
from qquant.solver import solve
from qquant.sources import StreamedModel
from tests.conftest import assert_same_but_for_order
from tests.packed import edit_keys, edit_tensors
from tests.qwen_folders import (
    GROUP,
    KEPT,
    LAYERS,
    LONG,
    PACKED,
    SEQ_LENGTH,
    SHAPES,
    VOCAB,
    WIDTH,
    logits,
    make_qwen,
    publish,
    unpacked,
    with_weights,
)  # fmt: skip

Bits = Literal[4, 8]
STAGES = (("attn.c_attn",), ("attn.c_proj",), ("mlp.w1", "mlp.w2"), ("mlp.c_proj",))
TEXTS = [
    torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(length)) for length in (LONG, 9, 30, LONG)
]
"""Calibration samples on both sides of the length of training, 16 tokens."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny v1 folder in float32. Never write to it."""
    return make_qwen(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module", params=[4, 8], ids=["int4", "int8"])
def bits(request: pytest.FixtureRequest) -> Bits:
    found: Bits = request.param
    return found


@pytest.fixture(scope="module")
def settings(bits: Bits) -> qquant.QuantizeConfig:
    return qquant.QuantizeConfig(method="gptq", bits=bits, group_size=GROUP)


@pytest.fixture(scope="module")
def written(plain: Path, settings: qquant.QuantizeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, quantized from disk. Never write to it."""
    out = tmp_path_factory.mktemp("written") / "out"
    log = quantize_checkpoint(plain, samples_from_ids(TEXTS), settings, out)
    assert [record.name for record in log.modules] == PACKED
    return out


# -- what we write --------------------------------------------------------------------------------------------------


def test_tensors_have_the_published_names_shapes_and_dtypes(written: Path, plain: Path, bits: Bits) -> None:
    tensors, original = load_file(written / SINGLE_NAME), load_file(plain / SINGLE_NAME)
    for name in PACKED:
        columns, rows = SHAPES[name.split(".", 3)[3]]
        assert original[f"{name}.weight"].shape == (columns, rows)
        parts = {part: tensors.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        found = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()}
        assert found == {
            "qweight": (torch.int32, (rows * bits // 32, columns)),
            "qzeros": (torch.int32, (rows // GROUP, columns * bits // 32)),
            "scales": (torch.float16, (rows // GROUP, columns)),
            "g_idx": (torch.int32, (rows,)),
        }
        # Zero 8 or 128 in the middle, minus one, in every place of a word.
        assert (parts["qzeros"] == {4: 0x77777777, 8: 0x7F7F7F7F}[bits]).all()
        assert torch.equal(parts["g_idx"], (torch.arange(rows) // GROUP).int())
    assert sorted(tensors) == sorted(KEPT)
    assert all(torch.equal(tensor, original[name]) for name, tensor in tensors.items())


def test_the_keys_are_those_of_the_published_folders(written: Path, bits: Bits) -> None:
    keys = json.loads((written / "quantize_config.json").read_text())
    config = json.loads((written / "config.json").read_text())
    assert config["quantization_config"] == keys
    assert config["model_type"] == "qwen"
    assert config["architectures"] == ["QWenLMHeadModel"]
    wanted = {"bits": bits, "group_size": GROUP, "sym": True, "desc_act": False, "quant_method": "gptq"}
    assert wanted.items() <= keys.items()
    assert keys["model_file_base_name"] == "model"


def test_a_loaded_checkpoint_is_the_model_that_its_tensors_describe(written: Path, plain: Path, bits: Bits) -> None:
    tensors = load_file(written / SINGLE_NAME)
    dense = {name: tensors[name] for name in KEPT} | {
        f"{name}.weight": unpacked(tensors, name, bits) for name in PACKED
    }
    model = qquant.load_quantized(written)
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert packed == PACKED
    assert_same_but_for_order(logits(model), logits(with_weights(plain, dense)))


def test_a_model_in_memory_gives_the_same_tensors_and_logits(
    written: Path, plain: Path, settings: qquant.QuantizeConfig, tmp_path: Path
) -> None:
    model = QWenLMHeadModel.from_pretrained(plain)
    log = qquant.quantize_model(model, samples_from_ids(TEXTS), settings)
    assert [record.name for record in log.modules] == PACKED
    model.save_pretrained(tmp_path / "m")
    ours, theirs = load_file(tmp_path / "m" / SINGLE_NAME), load_file(written / SINGLE_NAME)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    expected = logits(model)
    assert torch.equal(logits(qquant.load_quantized(tmp_path / "m")), expected)
    assert torch.equal(logits(qquant.load_quantized(written)), expected)


def test_every_stage_sees_the_ones_before_it_quantized(
    written: Path, plain: Path, settings: qquant.QuantizeConfig, bits: Bits
) -> None:
    """Stage by stage through the whole model: the inputs of each as its own forward makes them, NTK and LogN too."""
    model = QWenLMHeadModel.from_pretrained(plain)
    tensors = load_file(written / SINGLE_NAME)
    for stage in [[f"transformer.h.{index}.{name}" for name in stage] for index in range(LAYERS) for stage in STAGES]:
        hessian = Hessian(model.get_submodule(stage[0]).in_features)
        hook = model.get_submodule(stage[0]).register_forward_pre_hook(lambda _, args, h=hessian: h.add(args[0][0]))
        for text in TEXTS:
            logits(model, text[None])
        hook.remove()
        moment = hessian.finish()
        for name in stage:
            layer = model.get_submodule(name)
            wanted = solve(layer.weight.detach(), moment, settings).weight()
            found = unpacked(tensors, name, bits)
            # The same sums in the same order. Inputs that have not passed the quantized stages before, as with
            # --one-pass, move 3 to 70 % of the weights.
            assert torch.equal(found, wanted), name
            layer.weight = torch.nn.Parameter(found)


def test_blocks_are_calibrated_with_the_positions_of_each_samples_length(plain: Path) -> None:
    source = StreamedModel(plain)
    source.load_outside(with_head=False)
    stream = capture(source, samples_from_ids(TEXTS[:2]), "cpu")
    for calls, text, alpha in zip(stream.calls, TEXTS, (7.0, 1.0), strict=False):
        inv_freq = positions.inverse_frequencies(10000, 16, torch.tensor([alpha], dtype=torch.float64))
        expected = positions.angles(torch.arange(len(text))[None], inv_freq)
        for call in calls:
            cos, sin, sharpness = call["position_embeddings"]
            torch.testing.assert_close((cos, sin), expected)
            assert (sharpness is not None) == (len(text) > SEQ_LENGTH)
            if sharpness is not None:
                torch.testing.assert_close(
                    sharpness[0, -1, 0, 0], torch.tensor(np.log(LONG) / np.log(SEQ_LENGTH)).float()
                )


def test_codes_depend_on_ntk_and_logn(plain: Path, settings: qquant.QuantizeConfig) -> None:
    """The check above would pass on a model that has neither; this one shows that they reach the Hessians."""
    models = [
        QWenLMHeadModel.from_pretrained(plain, use_dynamic_ntk=flag, use_logn_attn=flag, dtype=torch.float32)
        for flag in (True, False)
    ]
    for model in models:
        qquant.quantize_model(model, samples_from_ids(TEXTS), settings)
    first, second = (model.get_submodule("transformer.h.0.attn.c_proj").dequantized() for model in models)
    assert not torch.equal(first, second)


def test_half_precision_folders_stay_in_their_dtype(tmp_path: Path, bits: Bits) -> None:
    folder = make_qwen(tmp_path / "plain")
    edit_tensors(folder, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    quantize_checkpoint(
        folder, samples_from_ids(TEXTS), qquant.QuantizeConfig(bits=bits, group_size=GROUP), tmp_path / "q"
    )
    tensors = load_file(tmp_path / "q" / SINGLE_NAME)
    assert {tensors[name].dtype for name in KEPT} == {torch.float16}


# -- what others wrote ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys_in", ["config", "beside", "both"])
@pytest.mark.parametrize("shards", [1, 3])
def test_an_official_folder_is_the_model_it_describes(
    plain: Path, tmp_path: Path, bits: Bits, keys_in: str, shards: int
) -> None:
    expected = publish(tmp_path / "m", plain, bits, keys_in=keys_in, shards=shards)
    model = qquant.load_quantized(tmp_path / "m")
    assert isinstance(model, QWenLMHeadModel)
    # torch_dtype float16 is computed in float32 on a CPU, as ever.
    assert_same_but_for_order(logits(model), expected)
    assert [name for name, module in model.named_modules() if isinstance(module, QuantLinear)] == PACKED


@pytest.mark.parametrize("shards", [1, 3])
def test_the_auto_class_reads_an_official_folder(
    plain: Path, tmp_path: Path, registered: None, bits: Bits, shards: int
) -> None:
    expected = publish(tmp_path / "m", plain, bits, shards=shards)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32, trust_remote_code=False)
    assert isinstance(model, QWenLMHeadModel)
    assert_same_but_for_order(logits(model), expected)


def test_fp16_in_config_json_chooses_the_dtype(plain: Path, tmp_path: Path, registered: None, bits: Bits) -> None:
    expected = publish(tmp_path / "m", plain, bits)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.dtype == torch.float16
    # Some 15 results of each of two blocks and three outside are rounded, by at most 2^-11 of themselves; here as if
    # each moved the logits by its whole share, and in one direction. A wrong zero is off by the logits themselves.
    assert (logits(model).float() - expected).square().mean().sqrt() < 33 * 2.0**-11 * expected.std()


def test_saving_an_official_folder_again_keeps_what_it_holds(plain: Path, tmp_path: Path, bits: Bits) -> None:
    publish(tmp_path / "m", plain, bits)
    model = qquant.load_quantized(tmp_path / "m")
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(tmp_path / "m" / SINGLE_NAME), load_file(tmp_path / "again" / SINGLE_NAME)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.endswith((".weight", ".bias")))
    assert torch.equal(logits(qquant.load_quantized(tmp_path / "again")), logits(model))


def test_keys_that_change_no_number_are_let_pass(plain: Path, tmp_path: Path) -> None:
    expected = publish(tmp_path / "m", plain, 4)
    passed = {"disable_exllama": False, "use_exllama": False, "exllama_config": {"version": 2}, "dataset": None}
    edit_keys(tmp_path / "m", **passed, model_name_or_path="somewhere", tokenizer=None, batch_size=1, pad_token_id=None)
    assert_same_but_for_order(logits(qquant.load_quantized(tmp_path / "m")), expected)


def test_a_key_that_might_change_numbers_is_refused_by_name(plain: Path, tmp_path: Path) -> None:
    publish(tmp_path / "m", plain, 4)
    edit_keys(tmp_path / "m", rotation="hadamard")
    with pytest.raises(BadModelError, match="'rotation'"):
        qquant.load_quantized(tmp_path / "m")


def test_buffers_that_the_first_release_stored_are_left_out(plain: Path, tmp_path: Path) -> None:
    expected = publish(tmp_path / "m", plain, 4)
    stored = {"transformer.rotary_emb.inv_freq": torch.zeros(8), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    edit_tensors(tmp_path / "m", lambda tensors: tensors.update(stored))
    assert_same_but_for_order(logits(qquant.load_quantized(tmp_path / "m")), expected)


# A config.json of another model put over it, as the recipe of 2023 asks for: option -> (value, what is named).
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "extended vocabulary": (
        {"vocab_size": VOCAB + 64},
        r"(wte|lm_head)\.weight must have shape \[384, 64\].*\[320, 64\]",
    ),
    "larger model": (
        {"hidden_size": 128, "num_attention_heads": 8},
        r"transformer\.h\.\d\.\w+\.\w+\.\w+ must be .*\[\d+, \d+\].*got",
    ),
    "MLP not doubled": ({"intermediate_size": WIDTH}, r"mlp\.\w+\.\w+ must be .*got"),
    "fewer layers": ({"num_hidden_layers": 1}, r"transformer\.h\.1\.\S+ is stored packed.*no such layer"),
    "more layers": ({"num_hidden_layers": 3}, r"transformer\.h\.2\.\S+ is missing"),
    "other bits": ({"quantization_config": {"bits": 8}}, r"qweight must be I32 .*8 bits.*do not belong together"),
}


@pytest.mark.parametrize(("changes", "named"), list(MISFITS.values()), ids=list(MISFITS))
@pytest.mark.parametrize("auto", [False, True], ids=["load_quantized", "auto_class"])
def test_a_config_of_another_size_is_refused_with_names(
    plain: Path, tmp_path: Path, registered: None, changes: dict[str, Any], named: str, auto: bool
) -> None:
    publish(tmp_path / "m", plain, 4)
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    merged = {key: {**config[key], **value} if isinstance(value, dict) else value for key, value in changes.items()}
    path.write_text(json.dumps({**config, **merged}))

    opened: Any = AutoModelForCausalLM.from_pretrained if auto else qquant.load_quantized
    with pytest.raises(BadModelError, match=named):
        opened(tmp_path / "m", dtype=torch.float32)


def test_zero_biases_fit_a_model_with_biases_too(plain: Path, tmp_path: Path) -> None:
    expected = publish(tmp_path / "m", plain, 4)
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"no_bias": False}))
    assert_same_but_for_order(logits(qquant.load_quantized(tmp_path / "m")), expected)


def test_a_quantized_folder_is_not_quantized_again(plain: Path, tmp_path: Path) -> None:
    publish(tmp_path / "m", plain, 4)
    with pytest.raises(BadModelError, match="quantized already"):
        quantize_checkpoint(
            tmp_path / "m", samples_from_ids(TEXTS), qquant.QuantizeConfig(group_size=GROUP), tmp_path / "q"
        )
