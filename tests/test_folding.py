"""Folds must leave a model's function alone, do nothing where nothing is to gain, and reach the written checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qquant
from qquant.calibrate import Sample, samples_from_ids
from qquant.capture import capture
from qquant.config import QuantizeConfig
from qquant.folding import Folded, Passing, fold_block, foldable, orthogonal, rounding_error
from qquant.hooks import first_output
from qquant.models.layouts import block_list
from qquant.quantizing import quantize_checkpoint
from qquant.shards import SINGLE_NAME
from qquant.sources import LoadedModel
from tests.conftest import VOCAB, Factory, make_checkpoint
from tests.qwen_folders import make_qwen

OUTLIER = 64.0
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "qwen": {},
}


def some_samples(count: int = 4, length: int = 24) -> list[Sample]:
    ids = torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(3))
    return samples_from_ids(ids)


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, checkpoint: Factory, tmp_path: Path) -> Path:
    if request.param == "qwen":
        return make_qwen(tmp_path / "qwen")
    return checkpoint(request.param, **FAMILIES[request.param])


@torch.no_grad()
def plant(model: Any) -> None:
    """Make channels of every seam strong, and the weights that read them weak: the function stays."""
    for block in block_list(model, LoadedModel(model).layout):
        layers = dict(block.named_modules())
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            ("ln_1", ("attn.c_attn",)),
            ("ln_2", ("mlp.w1", "mlp.w2")),
        ):
            if norm in layers:
                layers[norm].weight[3] *= OUTLIER
                for name in readers:
                    layers[name].weight[:, 3] /= OUTLIER
        maker, reader = (
            layers.get(n) or layers[o] for n, o in (("mlp.up_proj", "mlp.w1"), ("mlp.down_proj", "mlp.c_proj"))
        )
        for parameter in maker.parameters():
            parameter[5] *= OUTLIER
        reader.weight[:, 5] /= OUTLIER


@torch.no_grad()
def folded(model: Any, config: QuantizeConfig, samples: list[Sample]) -> dict[str, Tensor]:
    """Fold all blocks of a model in memory; returns what has to be stored."""
    source = LoadedModel(model)
    changed: dict[str, Tensor] = {}
    stream = capture(source, samples, "cpu")
    for index, block in enumerate(block_list(model, source.layout)):
        prefix = f"{source.layout.blocks}.{index}"
        calls = [call[index] for call in stream.calls]
        passing = [Passing(hidden, call, None) for hidden, call in zip(stream.hidden, calls, strict=True)]
        changed |= fold_block(block, source.layout, prefix, config, passing, {}, lambda name: None).changed
        stream.hidden = [first_output(block(one.hidden, **one.call)) for one in passing]
    return changed


@torch.no_grad()
def logits(model: Any, samples: list[Sample]) -> Tensor:
    return torch.stack([model(input_ids=one.input_ids[None], use_cache=False).logits[0] for one in samples])


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def config(method: str, **options: Any) -> QuantizeConfig:
    return QuantizeConfig.from_dict({"method": method, "group_size": 32, **options})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_scaling_changes_weights_but_not_one_bit_of_the_logits(folder: Path, dtype: torch.dtype) -> None:
    model, samples = load(folder, dtype), some_samples()
    plant(model)
    before, expected = weights(model), logits(model, samples)
    changed = folded(model, config("gptq+awq", group_size=16), samples)
    after = weights(model)
    assert torch.equal(logits(model, samples), expected)
    different = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(different) >= 4
    assert {name for name in different if not is_linear_weight(model, name)} <= set(changed)


def test_a_norm_is_divided_by_what_its_readers_are_multiplied_by(checkpoint: Factory) -> None:
    """And stored as it is computed with."""
    model = load(checkpoint("qwen2", dtype=torch.bfloat16), torch.float64)
    plant(model)
    before = weights(model)
    source, samples = LoadedModel(model), some_samples()
    stream = capture(source, samples, "cpu")
    passing = [Passing(hidden, call[0], None) for hidden, call in zip(stream.hidden, stream.calls, strict=True)]
    settings = config("gptq+awq")
    block: Any = block_list(model, source.layout)[0]
    with torch.no_grad():
        changed = fold_block(block, source.layout, "b", settings, passing, {}, lambda _: torch.bfloat16).changed
    assert changed["b.input_layernorm.weight"].dtype == torch.bfloat16
    assert torch.equal(changed["b.input_layernorm.weight"].double(), block.input_layernorm.weight)
    was = before["model.layers.0.input_layernorm.weight"] * before["model.layers.0.self_attn.k_proj.weight"]
    now = block.input_layernorm.weight * block.self_attn.k_proj.weight
    torch.testing.assert_close(now, was, rtol=1e-14, atol=0)


def is_linear_weight(model: Any, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(module), nn.Linear)


def test_planted_channels_are_found_again(checkpoint: Factory) -> None:
    model, samples = load(checkpoint("qwen2")), some_samples()
    plant(model)
    before = weights(model)
    folded(model, config("gptq+awq"), samples)
    after = weights(model)
    norm, column = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight"
    # Not all the way: other strengths than 1 may round better.
    assert float(before[norm][3] / after[norm][3]) >= OUTLIER**0.5
    assert float(after[column][0, 5] / before[column][0, 5]) >= OUTLIER**0.5


def test_rotation_turns_values_but_not_the_logits(folder: Path) -> None:
    model, samples = load(folder), some_samples()
    before, expected = weights(model), logits(model, samples)
    changed = folded(model, config("gptq+rotate"), samples)
    after = weights(model)
    # float64: the products are the same sums in another basis.
    torch.testing.assert_close(logits(model, samples), expected, rtol=1e-9, atol=1e-11)
    turned = {name for name in before if not torch.equal(before[name], after[name])}
    leaves = {name.rpartition(".")[0].rpartition(".")[2] for name in turned}
    assert leaves in ({"v_proj", "o_proj"}, {"c_attn", "c_proj"})
    assert not any("mlp" in name for name in turned)
    assert set(changed) == {name for name in turned if name.endswith("v_proj.bias") or name.endswith("c_attn.bias")}


@pytest.mark.parametrize("size", [8, 24], ids=["power of two", "other"])
def test_rotations_are_orthogonal_and_always_the_same(size: int) -> None:
    torch.testing.assert_close(orthogonal(size) @ orthogonal(size).T, torch.eye(size, dtype=torch.float64))
    assert torch.equal(orthogonal(size), orthogonal(size))


def test_a_model_without_outliers_is_left_alone(folder: Path) -> None:
    model = load(folder)
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):  # random ones, larger than what the weights give, make channels strong
            tensor.zero_()
    before = weights(model)
    assert folded(model, config("gptq+awq"), some_samples()) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_is_folded_across_linears_that_are_left_alone(checkpoint: Factory) -> None:
    model, samples = load(checkpoint("qwen2")), some_samples()
    plant(model)
    before = weights(model)
    rules: dict[str, Any] = {r"-:.*k_proj": {}, r"-:.*up_proj": {}, r"-:.*o_proj": {}}
    assert folded(model, config("gptq+awq+rotate", dynamic=rules), samples) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("part", "leaf"), [("awq", "mlp.up_proj"), ("rotate", "self_attn.v_proj")])
def test_gradients_follow_the_outputs_they_belong_to(checkpoint: Factory, part: str, leaf: str) -> None:
    """E[g g^T] goes with the outputs: an error that follows them costs the same before and after."""
    model, name = load(checkpoint("qwen2")), f"model.layers.0.{leaf}"
    plant(model)
    source = LoadedModel(model)
    stream = capture(source, some_samples(), "cpu")
    passing = [Passing(hidden, call[0], None) for hidden, call in zip(stream.hidden, stream.calls, strict=True)]
    block, layer = block_list(model, source.layout)[0], model.get_submodule(name)
    random = torch.Generator().manual_seed(0)
    slopes = torch.randn(9, layer.out_features, generator=random, dtype=torch.float64)
    moments = {name: (slopes.T @ slopes)[None]}

    def cost() -> float:
        return float((layer.weight.detach().T @ moments[name][0] @ layer.weight.detach()).trace())

    before, weight = cost(), layer.weight.detach().clone()
    # Columns stay: the linears beside these are left alone, so that no norm is folded into them.
    settings = config(f"gptq+{part}", dynamic={r"-:.*gate_proj": {}, r"-:.*q_proj": {}})
    with torch.no_grad():
        fold_block(block, source.layout, "model.layers.0", settings, passing, moments, lambda _: None)
    assert not torch.equal(layer.weight, weight)
    assert cost() == pytest.approx(before, rel=1e-9)


def test_rounding_error_is_that_of_the_outputs_with_independent_inputs() -> None:
    random = torch.Generator().manual_seed(0)
    weight, power = torch.randn(6, 32, generator=random), torch.rand(32, generator=random)
    found = rounding_error(weight, torch.ones(32), power, config("gptq", group_size=16, bits=8))
    # Uniform errors of a step of 2 max / 255.
    steps = 2 * weight.reshape(6, 2, 16).abs().amax(-1) / 255
    expected = float((steps.square()[..., None] / 12 * power.reshape(2, 16)).sum())
    assert found == pytest.approx(expected, rel=0.3)


def test_an_unknown_family_says_once_that_nothing_was_folded(
    tiny_qwen2: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qquant.telling.said", set())
    model = load(tiny_qwen2, torch.float32)
    layout = LoadedModel(model).layout
    unknown = type(layout)(blocks=layout.blocks, units=None)
    for _ in range(2):
        block = block_list(model, layout)[0]
        assert fold_block(block, unknown, "model.layers.0", config("gptq+awq"), [], {}, lambda name: None) == Folded(
            {}, {}
        )
    assert caplog.text.count("not folded") == 1


def planted_folder(make: Callable[[Path], Path], folder: Path) -> Path:
    """A folder with outliers, in bfloat16 as downloaded ones are."""
    model = load(make(folder), torch.bfloat16)
    plant(model)
    stored = load_file(folder / SINGLE_NAME)
    state = model.state_dict()
    save_file({name: state[name].contiguous() for name in stored}, folder / SINGLE_NAME, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["stored dtype", "float32"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen"])
def test_what_a_fold_changed_is_in_the_written_checkpoint(
    tmp_path: Path, family: str, dtype: torch.dtype | None
) -> None:
    """quantize_checkpoint itself compares the reopened folder's logits with the walk's."""

    def make(folder: Path) -> Path:
        if family == "qwen":
            return make_qwen(folder)
        return make_checkpoint(folder, family, dtype=torch.bfloat16, **FAMILIES[family])

    folder = planted_folder(make, tmp_path / "plain")
    original, samples = load_file(folder / SINGLE_NAME), some_samples()
    quantize_checkpoint(folder, samples, config("gptq+awq+rotate", bits=8), tmp_path / "out", dtype=dtype)
    written = load_file(tmp_path / "out" / SINGLE_NAME)
    kept = original.keys() & written.keys()
    different = {name for name in kept if not torch.equal(original[name], written[name])}
    model = load(folder, torch.float32)
    layout = LoadedModel(model).layout
    assert different
    assert different <= foldable(layout, len(block_list(model, layout)))
    assert all(written[name].dtype == original[name].dtype for name in kept)
    expected = logits(model, samples)
    reopened = logits(qquant.load_quantized(tmp_path / "out", dtype=torch.float32), samples)
    assert (reopened - expected).norm() / expected.norm() < 0.03


def test_folding_pays_where_channels_are_strong(checkpoint: Factory) -> None:
    samples, errors = some_samples(8), {}
    for method in ("gptq", "gptq+awq"):
        model = load(checkpoint("qwen2"), torch.float32)
        plant(model)
        expected = logits(model, samples)
        qquant.quantize_model(model, samples, config(method))
        errors[method] = float((logits(model, samples) - expected).norm())
    assert errors["gptq+awq"] < 0.9 * errors["gptq"]
