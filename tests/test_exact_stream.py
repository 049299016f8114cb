"""Methods that compare with the original: what the walk finds out must be what two whole models, side by side, show."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qquant
from qquant import stage_solver
from qquant import walk as walk_room
from qquant.calibrate import Sample, samples_from_ids
from qquant.capture import capture, head
from qquant.config import QuantizeConfig
from qquant.gradients import output_moments
from qquant.moments import Moments
from qquant.quantizing import quantize_checkpoint
from qquant.solver import Solution, solve
from qquant.sources import LoadedModel
from tests.conftest import VOCAB, Factory
from tests.make_qwen_v1 import make_qwen_v1

EPS = torch.finfo(torch.float32).eps
NORM_BEFORE = {
    "self_attn.o_proj": "input_layernorm",
    "mlp.down_proj": "post_attention_layernorm",
    "attn.c_proj": "ln_1",
    "mlp.c_proj": "ln_2",
}
"""Of the linears that write into the residual stream: the norm that reads it."""
RULES: dict[str, dict[str, Any]] = {
    "all": {},
    "skipped tails": {r"-:.*\.0\.self_attn\.o_proj": {}, r"-:.*\.0\.mlp\.down_proj": {}},
    "skipped first stages": {r"-:.*\.0\.self_attn\.[qkv]_proj": {}, r"-:.*\.1\.mlp\.(gate|up)_proj": {}},
    "skipped units": {r"-:.*\.0\.self_attn": {}, r"-:.*\.1\.mlp": {}},
    "skipped block": {r"-:.*\.0\.": {}},
    "part of a stage": {r"-:.*\.q_proj": {}, r"-:.*\.up_proj": {}},
    "mixed bits": {r"+:.*\.v_proj": {"bits": 8}, r"+:.*\.down_proj": {"bits": 8, "group_size": 64}},
}


def some_samples(*, padded: bool = False) -> list[Sample]:
    ids = torch.randint(0, VOCAB, (4, 20), generator=torch.Generator().manual_seed(3))
    samples = [*samples_from_ids(ids[:3]), *samples_from_ids(ids[3:, :11])]
    if padded:
        samples[1] = Sample(ids[1], torch.arange(20) < 13)
    return samples


@cache
def _loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def load(folder: Path) -> Any:
    """A copy in float64 of the folder's model."""
    return copy.deepcopy(_loaded(folder))


def inputs_of(model: Any, names: list[str], samples: list[Sample]) -> list[Tensor]:
    """What reaches modules over all tokens that count, in the whole model as it is now: [tokens, features] each."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0]))
        for name in names
    ]
    with torch.no_grad():
        for sample in samples:
            mask = None if bool(sample.mask.all()) else sample.mask.long()[None]
            model(input_ids=sample.input_ids[None], attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat([x[s.mask] for x, s in zip(seen[name], samples, strict=True)]) for name in names]


Call = tuple[Moments, list[tuple[str, Solution]]]


def watched_walk(
    model: Any,
    samples: list[Sample],
    config: QuantizeConfig,
    monkeypatch: pytest.MonkeyPatch,
    *,
    by_structure: bool = False,
) -> list[Call]:
    """Walk, and note for each call of the solver its moments and the solutions that came of it."""
    calls: list[Call] = []
    rows_left: list[int] = []

    def noted(weight: Tensor, moments: Moments, chosen: QuantizeConfig, **options: Any) -> Solution:
        calls.append((moments, []))
        rows_left.append(weight.shape[0])
        return solve(weight, moments, chosen, **options)

    def emit(name: str, layer: nn.Linear, solution: Solution, _: QuantizeConfig) -> None:
        """Linears come in the order in which the solver's matrices were stacked."""
        place = next(n for n, left in enumerate(rows_left) if left)
        rows_left[place] -= layer.out_features
        calls[place][1].append((name, solution))

    source = LoadedModel(model)
    if by_structure:
        source.layout = type(source.layout)(blocks=source.layout.blocks, units=None)
    stream = capture(source, samples, "cpu")
    outputs = output_moments(source, stream, "cpu") if config.recipe.output else {}
    with monkeypatch.context() as patch:
        patch.setattr(stage_solver, "solve", noted)
        walk = walk_room.Walk(source, config, emit, outputs=outputs)
        walk.run(stream)
    assert not walk._originals, "a second copy of the weights is held"
    for moments, solved in calls:
        if config.recipe.output:
            assert moments.outputs is not None
            assert torch.equal(moments.outputs, torch.cat([outputs[name] for name, _ in solved]))
    for i, sample in enumerate(samples):
        if bool(sample.mask.all()):
            with torch.no_grad():
                logits = model(input_ids=sample.input_ids[None], use_cache=False).logits
                torch.testing.assert_close(head(source, stream.hidden[i], "cpu"), logits, rtol=1e-9, atol=1e-9)
    return calls


def assert_mean_product(found: Tensor | None, ahead: Tensor, behind: Tensor, x: Tensor) -> None:
    """E[(ahead - behind) x^T], but for what float32 makes of both sides, of their difference and of the sum."""
    assert found is not None
    missing, tokens = ahead - behind, len(x)
    expected = missing.T @ x / tokens
    size = (ahead.abs() + behind.abs()).T @ x.abs() / tokens
    bound = EPS * size + (tokens + 4) * EPS * (missing.abs().T @ x.abs() / tokens)
    assert ((found.double() - expected).abs() <= bound + 1e-12).all()


def assert_calls_are_those_of_two_models(
    calls: list[Call], original: Any, quantized: Any, samples: list[Sample], *, residual: bool
) -> None:
    """Go through the solver's calls again: run both models whole, form each moment, put the solutions in place."""
    for moments, solved in calls:
        name = solved[0][0]
        leaf = name.split(".", 3)[3]  # behind model.layers.0 or transformer.h.0
        norm = [name.removesuffix(leaf) + NORM_BEFORE[leaf]] if residual and leaf in NORM_BEFORE else []
        x, *behind = inputs_of(quantized, [name, *norm], samples)
        x_original, *ahead = inputs_of(original, [name, *norm], samples)
        assert_mean_product(moments.inputs, x, torch.zeros_like(x), x)
        assert_mean_product(moments.mismatch, x_original, x, x)
        assert (moments.residual is None) == (not norm)
        if norm:
            assert_mean_product(moments.residual, ahead[0], behind[0], x)
        for full, solution in solved:
            layer = quantized.get_submodule(full)
            layer.weight = nn.Parameter(solution.weight().to(layer.weight.dtype), requires_grad=False)


@pytest.mark.parametrize("rules", list(RULES.values()), ids=list(RULES))
@pytest.mark.parametrize("by_structure", [False, True], ids=["units", "structure"])
def test_the_walks_moments_are_those_of_two_whole_models(
    tiny_qwen2: Path, rules: dict[str, Any], by_structure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = some_samples()
    config = QuantizeConfig.from_dict({"method": "qep+residual", "group_size": 32, "dynamic": rules})
    calls = watched_walk(load(tiny_qwen2), samples, config, monkeypatch, by_structure=by_structure)
    assert calls
    assert_calls_are_those_of_two_models(calls, load(tiny_qwen2), load(tiny_qwen2), samples, residual=not by_structure)


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])  # olmo2: known by structure only
@pytest.mark.parametrize("method", ["gptaq", "qep+residual+output"])
def test_other_families_and_methods_get_the_same_moments(
    checkpoint: Factory, family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, config = some_samples(padded=True), QuantizeConfig(method=method, group_size=32)
    calls = watched_walk(load(checkpoint(family)), samples, config, monkeypatch)
    models = load(checkpoint(family)), load(checkpoint(family))
    assert_calls_are_those_of_two_models(calls, *models, samples, residual="residual" in method and family == "qwen3")


def test_the_original_qwen_gets_the_same_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_qwen_v1(tmp_path / "qwen")
    samples, config = some_samples(), QuantizeConfig(method="qep+residual", group_size=16)
    calls = watched_walk(load(folder), samples, config, monkeypatch)
    assert_calls_are_those_of_two_models(calls, load(folder), load(folder), samples, residual=True)


@pytest.mark.parametrize("kept_bytes", [0, 20_000])
@pytest.mark.parametrize("method", ["gptq", "qep+residual"])
def test_tails_too_large_to_keep_change_nothing(
    tiny_qwen2: Path, method: str, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, config = some_samples(), QuantizeConfig(method=method, group_size=32)
    expected = watched_walk(load(tiny_qwen2), samples, config, monkeypatch)
    monkeypatch.setattr(walk_room, "_KEPT_TAIL_BYTES", kept_bytes)
    found = watched_walk(load(tiny_qwen2), samples, config, monkeypatch)
    pairs = [zip(a[1], b[1], strict=True) for a, b in zip(expected, found, strict=True)]
    assert all(torch.equal(a.codes, b.codes) for calls in pairs for (_, a), (_, b) in calls)


def test_table_and_structure_give_the_same_codes(tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, config = some_samples(), QuantizeConfig(method="qep+output", group_size=32)
    by_table, by_structure = (
        watched_walk(load(tiny_qwen2), samples, config, monkeypatch, by_structure=known) for known in (False, True)
    )
    codes = [{name: s.codes for _, solved in calls for name, s in solved} for calls in (by_table, by_structure)]
    assert codes[0].keys() == codes[1].keys()
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])


@pytest.mark.parametrize(("method", "family"), [
    ("fast", "qwen2"),
    ("best", "qwen2"),
    ("best", "olmo2"),
    ("gptaq+pivot+clip-loop+refine:1", "olmo2"),
])  # fmt: skip
def test_from_memory_and_from_disk_a_method_gives_the_same_bits(
    checkpoint: Factory, tmp_path: Path, method: str, family: str
) -> None:
    folder, samples = checkpoint(family), some_samples()
    config = QuantizeConfig(method=method, group_size=32)
    log = quantize_checkpoint(folder, samples, config, tmp_path / "out")
    model = load(folder).float()
    assert len(qquant.quantize_model(model, samples, config).modules) == len(log.modules) == 14
    stored = load_file(tmp_path / "out" / "model.safetensors")
    mine = model.state_dict()
    assert {name for name in stored if name.endswith("qweight")} == {name for name in mine if name.endswith("qweight")}
    for name, tensor in stored.items():
        assert torch.equal(mine[name].to(tensor.dtype), tensor), name
