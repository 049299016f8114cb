"""The Int8 cache switched on and off: in config.json, at loading, on a model, and through every kind of generation."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, T5Config, T5ForConditionalGeneration

import qquant
from qquant import kv_attention
from qquant.errors import BadModelError, UsageError
from qquant.kv_cache_quant import Int8KVCache

IDS = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0] * 4 + [1] * 8, [1] * 12])
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": MASK}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def generate(model: Any, ids: Tensor = IDS, **options: Any) -> Any:
    """Output with its cache."""
    mask = MASK[: len(ids)]
    return model.generate(ids, **GREEDY | {"attention_mask": mask, "return_dict_in_generate": True} | options)


def test_generation_uses_an_int8_cache_until_it_is_switched_off(tiny_qwen2: Path) -> None:
    model = load(tiny_qwen2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ordinary, config = generate(model).sequences, model.config.to_dict()
    assert qquant.enable_kv_quant(model) is model
    assert isinstance(generate(model).past_key_values, Int8KVCache)
    assert model.config.use_cache_quantization is True
    assert model.config.use_cache_kernel is True
    assert qquant.disable_kv_quant(model) is model
    after = generate(model)
    assert isinstance(after.past_key_values, DynamicCache)
    assert torch.equal(after.sequences, ordinary)
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_switching_off_what_is_not_on_does_nothing(tiny_qwen2: Path) -> None:
    model = load(tiny_qwen2)
    qquant.disable_kv_quant(model)
    assert isinstance(generate(model).past_key_values, DynamicCache)


def test_switching_on_twice_takes_the_last_options(tiny_qwen2: Path) -> None:
    model = load(tiny_qwen2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qquant.enable_kv_quant(model)
    qquant.enable_kv_quant(model, key_transform="hadamard", use_cache_kernel=False)
    layer = generate(model).past_key_values.layers[0]
    assert layer.key_rotation == "hadamard"
    assert layer.use_cache_kernel is False
    assert model.config.use_cache_kernel is False
    qquant.disable_kv_quant(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_copy_of_a_switched_model_makes_caches_of_its_own(tiny_qwen2: Path) -> None:
    model = qquant.enable_kv_quant(load(tiny_qwen2))
    twin: Any = copy.deepcopy(model)
    qquant.disable_kv_quant(model)
    assert isinstance(generate(twin).past_key_values, Int8KVCache)
    qquant.disable_kv_quant(twin)
    assert isinstance(generate(twin).past_key_values, DynamicCache)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 5},
    ],
    ids=["greedy", "beams", "beams_returned", "samples", "prompt_lookup", "chunked_prefill"],
)
def test_every_kind_of_generation_runs_on_it(tiny_qwen2: Path, options: dict[str, Any]) -> None:
    model = qquant.enable_kv_quant(load(tiny_qwen2))
    ids = IDS[1:] if "prompt_lookup_num_tokens" in options else IDS
    torch.manual_seed(0)
    found = generate(model, ids, attention_mask=MASK[-len(ids) :], **options)
    assert isinstance(found.past_key_values, Int8KVCache)
    assert found.sequences.shape[1] == 24


def test_a_drafting_assistant_changes_no_token(tiny_qwen2: Path) -> None:
    model, assistant = qquant.enable_kv_quant(load(tiny_qwen2)), qquant.enable_kv_quant(load(tiny_qwen2))
    alone = generate(model, IDS[1:], attention_mask=MASK[1:]).sequences
    # The assistant is the model itself, so every draft is taken and only roll-back and short calls are new.
    drafted = generate(model, IDS[1:], attention_mask=MASK[1:], assistant_model=assistant, use_cache=True).sequences
    assert torch.equal(drafted, alone)


def test_a_sliding_window_model_drafts_and_rolls_back(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("mistral", sliding_window=8)
    model, assistant = qquant.enable_kv_quant(load(folder)), qquant.enable_kv_quant(load(folder))
    alone = generate(model, IDS[1:], attention_mask=MASK[1:]).sequences
    drafted = generate(model, IDS[1:], attention_mask=MASK[1:], assistant_model=assistant).sequences
    assert torch.equal(drafted, alone)


def test_room_is_reserved_for_what_generate_may_produce(tiny_qwen2: Path) -> None:
    cache = generate(qquant.enable_kv_quant(load(tiny_qwen2)), max_new_tokens=200).past_key_values
    # The last token is never attended to, so it needs no room.
    assert cache.layers[0].key_store.room == cache.get_seq_length() == 12 + 200 - 1
    assert cache.nbytes_used == cache.nbytes


def test_a_cache_given_by_hand_is_kept(tiny_qwen2: Path) -> None:
    model = qquant.enable_kv_quant(load(tiny_qwen2))
    own = DynamicCache(config=model.config)
    assert generate(model, past_key_values=own).past_key_values is own


def test_a_static_cache_is_refused_by_name(tiny_qwen2: Path) -> None:
    model = qquant.enable_kv_quant(load(tiny_qwen2))
    with pytest.raises(UsageError, match=r"'static'.*disable_kv_quant"):
        generate(model, cache_implementation="static")


def test_use_cache_false_is_respected(tiny_qwen2: Path) -> None:
    model = qquant.enable_kv_quant(load(tiny_qwen2))
    assert generate(model, use_cache=False).past_key_values is None


def test_the_published_scheme_can_be_chosen(tiny_qwen2: Path) -> None:
    cache = generate(qquant.enable_kv_quant(load(tiny_qwen2), scheme="qwen")).past_key_values
    assert {layer.scheme for layer in cache.layers} == {"qwen"}


def test_an_unknown_transform_lists_the_known_ones(tiny_qwen2: Path) -> None:
    with pytest.raises(UsageError, match="auto, fold, hadamard, none, got 'rotate'"):
        qquant.enable_kv_quant(load(tiny_qwen2), key_transform="rotate")  # type: ignore[arg-type]


def test_a_family_not_known_to_fold_rotates_instead(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    model.config.model_type = "cohere"
    with pytest.raises(UsageError, match=r"this cohere model does not offer that; use 'hadamard'"):
        qquant.enable_kv_quant(model, key_transform="fold")
    qquant.enable_kv_quant(model)
    assert generate(model).past_key_values.layers[0].key_rotation == "hadamard"


def test_a_refused_model_stays_as_it_was(tiny_qwen2: Path) -> None:
    model = load(tiny_qwen2)
    model.config.layer_types = ["full_attention", "hybrid"]
    with pytest.raises(BadModelError, match="'hybrid'"):
        qquant.enable_kv_quant(model)
    assert not hasattr(model.config, "use_cache_quantization")
    assert "_prepare_cache_for_generation" not in vars(model)


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    with pytest.raises(BadModelError, match="t5 is an encoder-decoder"):
        qquant.enable_kv_quant(T5ForConditionalGeneration(config))


def test_a_plain_checkpoint_is_loaded_with_the_cache_switched_on(tiny_qwen2: Path) -> None:
    model = qquant.load_quantized(tiny_qwen2, use_cache_quantization=True, use_cache_kernel=False)
    layer = generate(model).past_key_values.layers[0]
    assert layer.use_cache_kernel is False
    with pytest.raises(BadModelError, match="quantization_config"):
        qquant.load_quantized(tiny_qwen2)


def quantized_copy(folder: Path, out: Path) -> Path:
    samples = [IDS[0].repeat(4), IDS[1].repeat(4)]
    model = load(folder)
    config = qquant.QuantizeConfig(method="gptq", bits=4, group_size=32)
    qquant.quantize_model(
        model, [qquant.Sample(one, torch.ones_like(one, dtype=torch.bool)) for one in samples], config
    )
    model.save_pretrained(out)
    return out


def switch_on(folder: Path, **flags: bool) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | flags))
    return folder


def test_config_json_switches_on_a_plain_checkpoint(tiny_qwen2: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_qwen2, tmp_path / "model")
    folder = switch_on(tmp_path / "model", use_cache_quantization=True)
    assert isinstance(generate(qquant.load_quantized(folder)).past_key_values, Int8KVCache)
    plain = qquant.load_quantized(folder, use_cache_quantization=False)
    assert isinstance(generate(plain).past_key_values, DynamicCache)


def test_a_switched_model_survives_being_pickled(tiny_qwen2: Path, tmp_path: Path) -> None:
    torch.save(qquant.enable_kv_quant(load(tiny_qwen2)), tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert isinstance(generate(twin).past_key_values, Int8KVCache)


def test_a_failing_change_of_options_leaves_the_model_switched_on(tiny_qwen2: Path) -> None:
    model = qquant.enable_kv_quant(load(tiny_qwen2))
    with pytest.raises(UsageError, match="value_bits"):
        qquant.enable_kv_quant(model, value_bits=3)  # type: ignore[arg-type]
    assert isinstance(generate(model).past_key_values, Int8KVCache)


def test_gptq_weights_and_int8_cache_work_at_once(tiny_qwen2: Path, tmp_path: Path) -> None:
    folder = quantized_copy(tiny_qwen2, tmp_path / "int4")
    plain = qquant.load_quantized(folder, dtype=torch.float32)
    assert isinstance(generate(plain).past_key_values, DynamicCache)
    switch_on(folder, use_cache_quantization=True, use_cache_kernel=True)
    model = qquant.load_quantized(folder, dtype=torch.float32)
    assert isinstance(generate(model).past_key_values, Int8KVCache)
    assert isinstance(
        generate(qquant.load_quantized(folder, use_cache_quantization=False)).past_key_values, DynamicCache
    )
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_the_kernel_flag_alone_does_nothing(tiny_qwen2: Path, tmp_path: Path) -> None:
    folder = switch_on(quantized_copy(tiny_qwen2, tmp_path / "int4"), use_cache_kernel=True)
    assert isinstance(generate(qquant.load_quantized(folder)).past_key_values, DynamicCache)


def test_transformers_still_prepares_caches_through_the_method_that_is_replaced() -> None:
    parameters = list(inspect.signature(GenerationMixin._prepare_cache_for_generation).parameters)
    assert parameters == [
        "self",
        "generation_config",
        "model_kwargs",
        "generation_mode",
        "batch_size",
        "max_cache_length",
    ]


def test_switching_off_keeps_the_attention_that_a_quantized_model_was_loaded_with(tiny_qwen2: Path) -> None:
    model = load(tiny_qwen2)
    assert kv_attention.adopt(model.config)  # as model_kernels.py does for bfloat16 models
    loaded_with = model.config._attn_implementation
    qquant.enable_kv_quant(model)
    qquant.enable_kv_quant(model, use_cache_kernel=False)  # once more, over the first
    qquant.disable_kv_quant(model)
    assert model.config._attn_implementation == loaded_with
    kv_attention.release(model.config)
    qquant.disable_kv_quant(qquant.enable_kv_quant(model))
    assert model.config._attn_implementation == "sdpa"
