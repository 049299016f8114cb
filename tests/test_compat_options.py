"""What a script for AutoGPTQ asks for is done, ignored by name, or refused: examples, fields of the config, options."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from qquant.compat.auto_gptq import AutoGPTQForCausalLM, BaseGPTQForCausalLM, BaseQuantizeConfig
from qquant.config import QuantizeConfig
from qquant.errors import BadDataError, BadModelError, UsageError
from tests.compat import (
    PLAIN,
    assert_same_tensors,
    examples,
    its_checkpoint,  # noqa: F401 - the fixture saved
    load,
    quantized_model,  # noqa: F401 - the fixture quantized
)
from tests.conftest import CORPUS

# --- examples --------------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[torch.Tensor], dict[str, Any]]] = {
    "row_tensor": lambda row: {"input_ids": row, "attention_mask": torch.ones_like(row)},
    "batch_of_one": lambda row: {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]},
    "int32_and_bool": lambda row: {"input_ids": row.int(), "attention_mask": row >= 0},
    "lists": lambda row: {"input_ids": row.tolist(), "attention_mask": [1] * len(row)},
    "nested_lists": lambda row: {"input_ids": [row.tolist()], "attention_mask": [[1] * len(row)]},
    "no_mask": lambda row: {"input_ids": row, "labels": row},
}


@pytest.mark.parametrize("form", list(FORMS.values()), ids=list(FORMS))
def test_every_form_of_example_means_the_same(
    tiny_qwen2: Path, saved: Path, tmp_path: Path, form: Callable[[torch.Tensor], dict[str, Any]]
) -> None:
    model = load(tiny_qwen2)
    model.quantize([form(example["input_ids"]) for example in examples()])
    model.save_quantized(tmp_path / "q")
    assert_same_tensors(saved, tmp_path / "q")


def test_a_tokenizers_own_answer_is_an_example(tiny_qwen2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    model = load(tiny_qwen2)
    model.quantize(tokenizer(text, return_tensors=form) for text, form in zip(CORPUS, (None, "pt"), strict=False))
    assert model.quantized


def test_masked_tokens_are_not_counted(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Whatever stands under the mask at the end of a row has no part in the Hessians."""
    outs = []
    for filler in (0, 7):
        rows = [example["input_ids"].clone() for example in examples()]
        mask = torch.arange(24) < 16
        model = load(tiny_qwen2)
        for row in rows:
            row[~mask] = filler
        model.quantize([{"input_ids": row, "attention_mask": mask} for row in rows])
        outs.append(tmp_path / str(filler))
        model.save_quantized(outs[-1])
    assert_same_tensors(*outs)


BAD_EXAMPLES: dict[str, tuple[Any, str]] = {
    "text": (["some text"], "example 0 must map input_ids"),
    "a_number": (7, "must be a list of mappings"),
    "one_mapping": ({"input_ids": [1, 2]}, "must be a list of mappings"),
    "no_ids": ([{"text": [1]}], "example 0 must map input_ids"),
    "fractions": ([{"input_ids": [0.5, 1.5]}], "example 0: "),
    "mask_too_short": ([{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}], "example 0: "),
    "none": ([], "at least one sample"),
    "one_id": ([{"input_ids": torch.tensor(3)}], "rows of integers"),
    "one_flag": ([{"input_ids": [1, 2], "attention_mask": torch.tensor(1)}], "rows of integers"),
    "no_values": ([{"input_ids": torch.ones(4, dtype=torch.int64, device="meta")}], "dense tensor.*meta"),
    "sparse": ([{"input_ids": torch.tensor([[1, 2, 3]]).to_sparse()}], "dense tensor.*sparse_coo"),
    "sparse_mask": ([{"input_ids": [1, 2], "attention_mask": torch.tensor([1, 1]).to_sparse()}], "dense tensor"),
    "half_flags": ([{"input_ids": [1, 2], "attention_mask": [0.5, 0.5]}], "must hold 0 and 1, got 0.5"),
    "twos": ([{"input_ids": [1, 2], "attention_mask": [1, 2]}], "must hold 0 and 1, got 2"),
    "all_masked": ([{"input_ids": [1, 2, 3], "attention_mask": [0, 0, 0]}], "masked"),
    "other_vocabulary": ([{"input_ids": [1, 999]}], "vocabulary"),
}


@pytest.mark.parametrize(("bad", "words"), list(BAD_EXAMPLES.values()), ids=list(BAD_EXAMPLES))
def test_bad_examples_are_refused_and_leave_the_model_whole(tiny_llama: Path, bad: Any, words: str) -> None:
    model = load(tiny_llama)
    with pytest.raises(BadDataError, match=words):
        model.quantize(bad)
    model.quantize(examples(2))


# --- options ---------------------------------------------------------------------------------------------------------

MEANINGS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "three_bits": {"bits": 3},
    "whole_row": {"group_size": -1},
    "act_order": {"desc_act": True},
    "static_groups": {"desc_act": True, "static_groups": True},
    "asymmetric": {"sym": False},
    "damping": {"damp_percent": 0.1},
}


@pytest.mark.parametrize("change", list(MEANINGS.values()), ids=list(MEANINGS))
def test_every_field_means_what_ours_means(change: dict[str, Any]) -> None:
    assert BaseQuantizeConfig(**PLAIN | change).to_qquant() == QuantizeConfig(**PLAIN | change)


def test_one_pass_is_done_by_what_it_allows_of_best_and_that_is_said(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = BaseQuantizeConfig(**PLAIN | {"true_sequential": False})
    method = "awq+gar+clip-weight+signed+output+refine:2"
    assert config.to_qquant() == QuantizeConfig(**PLAIN, method=method, true_sequential=False)
    model = AutoGPTQForCausalLM.from_pretrained(tiny_llama, config, device_map="cpu")
    assert caplog.text == ""
    model.quantize(examples(2))
    assert caplog.text.count("true_sequential=False leaves out what compares with the original") == 1


def test_a_script_under_inference_mode_gets_the_same_codes(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The default method takes gradients, which inference mode forbids; AutoGPTQ itself quantized under it."""
    model, plain = load(tiny_llama), load(tiny_llama)
    with torch.inference_mode():
        model.generate(input_ids=torch.arange(4)[None], max_new_tokens=2, min_new_tokens=2, do_sample=False)
        batch = examples(4)
        batch[0]["attention_mask"][:5] = 0
        model.quantize(batch)
    other = examples(4)
    other[0]["attention_mask"][:5] = 0
    plain.quantize(other)
    assert caplog.text == ""
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, model.model.state_dict()[name]), name


def test_weights_made_under_inference_mode_go_without_gradients_and_that_is_said(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.inference_mode():
        model = load(tiny_llama).to(torch.bfloat16)
    model.quantize(examples(2))
    assert caplog.text.count("forbids gradients") == 1
    model.save_quantized(tmp_path / "q")
    chosen = json.loads((tmp_path / "q" / "manifest.json").read_text())["config"]["method"]
    assert chosen == "awq+qep+residual:0.5+gar+clip-weight+signed+refine:2"


def test_defaults_are_auto_gptqs() -> None:
    assert BaseQuantizeConfig().to_qquant() == QuantizeConfig(bits=4, group_size=-1, desc_act=True)
    assert BaseQuantizeConfig(8, 128, 0.02, False) == BaseQuantizeConfig(
        bits=8, group_size=128, damp_percent=0.02, desc_act=False
    )


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    config = BaseQuantizeConfig(bits=8, group_size=64, desc_act=False, damp_percent=0.05, model_file_base_name="model")
    config.save_pretrained(tmp_path / "new")
    assert BaseQuantizeConfig.from_pretrained(tmp_path / "new") == config


def test_a_config_is_read_from_a_quantized_folder(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "q")
    beside = BaseQuantizeConfig.from_pretrained(tmp_path / "q")
    (tmp_path / "q" / "quantize_config.json").unlink()
    assert beside == BaseQuantizeConfig.from_pretrained(tmp_path / "q")
    assert beside.to_qquant() == QuantizeConfig(bits=4, group_size=32)


BAD_CONFIGS: dict[str, dict[str, Any]] = {
    "bits": {"bits": 5},
    "group_size": {"group_size": 0},
    "damp_percent": {"damp_percent": 1.0},
    "is_marlin_format": {"is_marlin_format": True},
    "awq_gemm_checkpoint": {"awq_gemm_checkpoint": True},
    "checkpoint_format": {"checkpoint_format": "marlin"},
}


@pytest.mark.parametrize(("name", "bad"), list(BAD_CONFIGS.items()), ids=list(BAD_CONFIGS))
def test_values_we_do_not_have_are_refused_by_name(name: str, bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=name):
        BaseQuantizeConfig(**bad)


def test_mistyped_names_are_refused(tiny_llama: Path, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="gruop_size"):
        BaseQuantizeConfig(gruop_size=32)  # type: ignore[call-arg]
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "gruop_size": 32}')
    with pytest.raises(BadModelError, match="gruop_size"):
        BaseQuantizeConfig.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="does not know device_mop"):
        load(tiny_llama, device_mop="auto")
    with pytest.raises(UsageError, match="does not know use_tritone"):
        AutoGPTQForCausalLM.from_quantized(saved, use_tritone=True)
    with pytest.raises(UsageError, match="does not know bacth_size"):
        load(tiny_llama).quantize(examples(), bacth_size=2)


def test_rules_per_module_do_not_fit_into_this_config(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "dynamic": {"-:.*down.*": {}}}')
    with pytest.raises(UsageError, match="rules per module"):
        BaseQuantizeConfig.from_pretrained(tmp_path)


def test_options_that_chose_kernels_are_named_once_and_ignored(
    saved: Path, quantized: BaseGPTQForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "qquant"):
        model = AutoGPTQForCausalLM.from_quantized(
            str(saved),
            device="cpu",
            use_triton=False,
            inject_fused_attention=True,
            inject_fused_mlp=True,
            disable_exllama=True,
            warmup_triton=False,
            low_cpu_mem_usage=True,
            use_cuda_fp16=True,
            local_files_only=True,
            trust_remote_code=True,
            model_basename="model",
        )
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2
    assert "no code of its folder is run" in lines[0]
    assert "disable_exllama, inject_fused_attention, inject_fused_mlp, low_cpu_mem_usage, use_cuda_fp16" in lines[1]
    ids = examples()[0]["input_ids"][None]
    assert torch.equal(model(ids).logits, quantized(ids).logits)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pickles": ({"use_safetensors": False}, "safetensors only"),
    "training": ({"trainable": True}, "no gradient"),
    "subfolder": ({"subfolder": "int4"}, "subfolder"),
    "other_bits": ({"quantize_config": BaseQuantizeConfig(**PLAIN | {"bits": 8})}, "bits 8, and .* 4"),
    "two_devices": ({"device": {"a": 0, "b": "cpu"}}, "one device"),
    "unknown_device": ({"device": "tpu"}, "device must be"),
}


@pytest.mark.parametrize(("options", "words"), list(REFUSED.values()), ids=list(REFUSED))
def test_what_would_give_other_numbers_is_refused(saved: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        AutoGPTQForCausalLM.from_quantized(saved, **options)


def test_a_folder_of_auto_gptqs_time_is_read_by_its_basename(saved: Path, tmp_path: Path) -> None:
    """One weight file with a name of its own, and the keys in quantize_config.json alone."""
    folder = tmp_path / "old"
    shutil.copytree(saved, folder)
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    said = BaseQuantizeConfig.from_pretrained(folder)
    model = AutoGPTQForCausalLM.from_quantized(folder, model_basename="gptq_model-4bit-32g", quantize_config=said)
    model.save_quantized(tmp_path / "new")
    assert_same_tensors(tmp_path / "new", saved)


def test_of_two_weight_files_the_named_one_must_be_the_one_that_is_read(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "qquant"):
        AutoGPTQForCausalLM.from_quantized(saved, model_basename="gptq_model-4bit-128g")
    assert "read from model.safetensors" in caplog.text
    shutil.copytree(saved, tmp_path / "q")
    shutil.copyfile(saved / "model.safetensors", tmp_path / "q" / "gptq_model-4bit-128g.safetensors")
    with pytest.raises(UsageError, match="remove one of the two"):
        AutoGPTQForCausalLM.from_quantized(tmp_path / "q", model_basename="gptq_model-4bit-128g")


def test_a_hub_revision_is_refused_before_anything_is_fetched() -> None:
    with pytest.raises(UsageError, match="takes no revision"):
        AutoGPTQForCausalLM.from_quantized("owner/name", revision="gptq-8bit")
    with pytest.raises(UsageError, match="takes no revision"):
        AutoGPTQForCausalLM.from_pretrained("owner/name", BaseQuantizeConfig(), revision="old")


BEFORE_LOADING: dict[str, tuple[tuple[Any, Any], dict[str, Any], str]] = {
    "no config": (("m", None), {}, "BaseQuantizeConfig, got NoneType"),
    "a dict": (("m", {"bits": 4}), {}, "BaseQuantizeConfig, got dict"),
    "no path": ((None, BaseQuantizeConfig()), {}, "folder or a hub id, got NoneType"),
    "whole numbers": (("m", BaseQuantizeConfig()), {"torch_dtype": torch.int8}, r"torch_dtype must be .*torch\.int8"),
    "no dtype": (("m", BaseQuantizeConfig()), {"dtype": 5}, "torch_dtype must be .*got 5"),
}


@pytest.mark.parametrize(("arguments", "options", "words"), list(BEFORE_LOADING.values()), ids=list(BEFORE_LOADING))
def test_arguments_of_another_kind_are_refused_before_the_folder_is_looked_at(
    arguments: tuple[Any, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        AutoGPTQForCausalLM.from_pretrained(*arguments, **options)


def test_from_quantized_refuses_arguments_of_another_kind(saved: Path) -> None:
    for path, options in ((None, {}), (saved, {"quantize_config": {}}), (saved, {"torch_dtype": torch.int8})):
        with pytest.raises(UsageError, match="got"):
            AutoGPTQForCausalLM.from_quantized(path, **options)  # type: ignore[arg-type]


def test_pickles_are_refused_when_saving(quantized: BaseGPTQForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="safetensors only"):
        quantized.save_quantized(tmp_path / "q", use_safetensors=False)
    assert list(tmp_path.iterdir()) == []


def test_the_class_itself_is_not_called() -> None:
    with pytest.raises(UsageError, match="from_pretrained"):
        AutoGPTQForCausalLM()


def test_options_of_the_models_config_reach_it(tiny_qwen2: Path) -> None:
    model = load(tiny_qwen2, attn_implementation="eager", use_cache=False)
    assert model.config._attn_implementation == "eager"
    assert model.config.use_cache is False
