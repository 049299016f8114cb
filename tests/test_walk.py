"""The walk must give every linear the inputs that the quantized model will give it, and nothing else may matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qquant
from qquant.calibrate import Sample, samples_from_ids
from qquant.capture import capture, head
from qquant.config import QuantizeConfig, QuantizeLog
from qquant.errors import NumericError
from qquant.linear import QuantLinear
from qquant.models.layouts import linears
from qquant.solver import solve
from qquant.sources import LoadedModel
from qquant.stage_records import log_of
from qquant.walk import Walk
from tests.conftest import VOCAB, Factory

FAMILIES = ["qwen2", "qwen3", "llama", "mistral"]
CONFIG = QuantizeConfig(method="gptq", bits=4, group_size=32)


def some_samples(count: int = 6, length: int = 24) -> list[Sample]:
    ids = torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(3))
    return samples_from_ids(ids)


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def inputs_of(model: Any, name: str, samples: list[Sample]) -> Tensor:
    """What reaches one linear over all samples in the whole model as it is now: [tokens, in]."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.inference_mode():
        for sample in samples:
            model(input_ids=sample.input_ids[None], use_cache=False)
    hook.remove()
    return torch.cat(seen)


def slow_walk(model: Any, samples: list[Sample], config: QuantizeConfig) -> dict[str, Tensor]:
    """The definition: linear by linear, each Hessian from a full forward of the model as quantized so far."""
    codes = {}
    stages = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    for index in range(len(model.model.layers)):
        names = [name for name, _ in model.model.layers[index].named_modules()]
        for stage in stages:
            full = [f"model.layers.{index}.{n}" for leaf in stage for n in names if n.endswith(leaf)]
            x = inputs_of(model, full[0], samples)
            hessian = (x.T.double() @ x.double() / len(x)).to(torch.float32)
            for name in full:
                layer = model.get_submodule(name)
                solution = solve(layer.weight, hessian, config)
                codes[name] = solution.codes
                layer.weight = nn.Parameter(solution.weight().to(layer.weight.dtype), requires_grad=False)
    return codes


def walk_codes(model: Any, samples: list[Sample], config: QuantizeConfig) -> tuple[dict[str, Tensor], Walk]:
    codes: dict[str, Tensor] = {}
    source = LoadedModel(model)
    walk = Walk(source, config, lambda name, layer, solution, settings: codes.__setitem__(name, solution.codes))
    walk.run(capture(source, samples, "cpu"))
    return codes, walk


@pytest.mark.parametrize("family", FAMILIES)
def test_walk_equals_the_linear_by_linear_definition(checkpoint: Factory, family: str) -> None:
    folder, samples = checkpoint(family), some_samples()
    expected = slow_walk(load(folder), samples, CONFIG)
    got, _ = walk_codes(load(folder), samples, CONFIG)
    assert got.keys() == expected.keys()
    differing = sum(int((got[name] != expected[name]).sum()) for name in got)
    # Both Hessians are float32 sums in another order; a code on a rounding tie may fall either way.
    assert differing <= 0.002 * sum(codes.numel() for codes in got.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_stream_after_the_walk_is_the_quantized_models_own_output(checkpoint: Factory, family: str) -> None:
    model, samples = load(checkpoint(family), torch.float32), some_samples()
    source = LoadedModel(model)
    stream = capture(source, samples, "cpu")
    Walk(source, CONFIG, lambda *_: None).run(stream)
    with torch.inference_mode():
        for i, sample in enumerate(samples):
            expected = model(input_ids=sample.input_ids[None], use_cache=False).logits
            torch.testing.assert_close(head(source, stream.hidden[i], "cpu"), expected, rtol=1e-4, atol=1e-4)


def test_table_and_structure_describe_the_same_walk(tiny_qwen2: Path) -> None:
    samples = some_samples()
    by_table, _ = walk_codes(load(tiny_qwen2), samples, CONFIG)
    model = load(tiny_qwen2)
    source = LoadedModel(model)
    source.layout = type(source.layout)(blocks=source.layout.blocks, units=None)
    codes: dict[str, Tensor] = {}
    walk = Walk(source, CONFIG, lambda name, layer, solution, settings: codes.__setitem__(name, solution.codes))
    walk.run(capture(source, samples, "cpu"))
    assert codes.keys() == by_table.keys()
    assert all(torch.equal(codes[name], by_table[name]) for name in codes)


def test_one_pass_takes_every_hessian_from_the_original_block(tiny_qwen2: Path) -> None:
    samples, config = some_samples(), QuantizeConfig(method="gptq", bits=4, group_size=32, true_sequential=False)
    original = load(tiny_qwen2)
    name = "model.layers.0.mlp.down_proj"
    x = inputs_of(original, name, samples)
    expected = solve(original.get_submodule(name).weight, (x.T @ x / len(x)).float(), config).codes
    got, _ = walk_codes(load(tiny_qwen2), samples, config)
    assert (got[name] != expected).float().mean() < 0.002


def test_masked_tokens_do_not_count(tiny_qwen2: Path) -> None:
    """Right padding that is masked must leave the result of the unpadded samples."""
    samples = some_samples(4, 20)
    padded = [
        Sample(torch.cat([s.input_ids, torch.zeros(7, dtype=torch.long)]), torch.arange(27) < 20) for s in samples
    ]
    plain, _ = walk_codes(load(tiny_qwen2), samples, CONFIG)
    masked, _ = walk_codes(load(tiny_qwen2), padded, CONFIG)
    differing = sum(int((plain[name] != masked[name]).sum()) for name in plain)
    assert differing <= 0.002 * sum(codes.numel() for codes in plain.values())


def test_samples_of_several_lengths_are_walked(tiny_qwen2: Path) -> None:
    samples = some_samples(2, 12) + some_samples(2, 30) + some_samples(1, 5)
    codes, walk = walk_codes(load(tiny_qwen2), samples, CONFIG)
    assert len(codes) == len(log_of(walk.unfinished).modules) == 14


def test_skipped_modules_keep_their_weights_and_are_reported(tiny_qwen2: Path) -> None:
    config = QuantizeConfig.from_dict({"group_size": 32, "dynamic": {r"-:.*\.0\.mlp": {}, r"-:.*o_proj": {}}})
    model = load(tiny_qwen2, torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    codes, walk = walk_codes(model, some_samples(), config)
    kept = [f"model.layers.0.mlp.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
    kept += [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    assert sorted(log_of(walk.unfinished).skipped) == sorted(kept)
    assert not set(kept) & codes.keys()
    for name in kept:
        assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])


def test_overrides_change_single_modules(tiny_qwen2: Path) -> None:
    config = QuantizeConfig.from_dict({"group_size": 32, "dynamic": {r"+:.*v_proj": {"bits": 8, "group_size": 64}}})
    _, walk = walk_codes(load(tiny_qwen2), some_samples(), config)
    for record in log_of(walk.unfinished).modules:
        assert (record.bits, record.group_size) == ((8, 64) if "v_proj" in record.name else (4, 32))


def test_activations_that_overflow_name_the_module(tiny_qwen2: Path) -> None:
    model = load(tiny_qwen2, torch.float32)
    model.model.layers[1].post_attention_layernorm.weight.data.fill_(1e38)
    with pytest.raises(NumericError, match=r"model\.layers\.1"):
        walk_codes(model, some_samples(), CONFIG)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_model_leaves_packed_linears_that_compute_the_same(checkpoint: Factory, family: str) -> None:
    model, samples = load(checkpoint(family), torch.float32), some_samples()
    before = model(input_ids=samples[0].input_ids[None]).logits
    log = qquant.quantize_model(model, samples, QuantizeConfig(bits=8, group_size=32))
    assert isinstance(log, QuantizeLog)
    assert not any(linears(block) for block in model.model.layers)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == len(log.modules) == 14
    after = model(input_ids=samples[0].input_ids[None]).logits
    assert (after - before).norm() / before.norm() < 0.02


def test_round_to_nearest_needs_no_samples(tiny_qwen2: Path) -> None:
    model = load(tiny_qwen2, torch.float32)
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    qquant.quantize_model(model, None, QuantizeConfig(method="rtn", bits=4, group_size=32))
    expected = solve(weight, None, QuantizeConfig(method="rtn", bits=4, group_size=32)).weight()
    assert torch.equal(model.model.layers[0].self_attn.q_proj.dequantized(), expected)
