"""What block by block is measured of a stage must be what running the whole model with that stage replaced gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qquant
import qquant.sensitivity
from qquant.accuracy import kl_divergence
from qquant.checkpoint import reopen
from qquant.config import QuantizeConfig
from qquant.divergence import divergence
from qquant.errors import NumericError
from qquant.models.layouts import Layout
from qquant.moments import Hessian
from qquant.samples import Sample, samples_from_ids
from qquant.sensitivity import measure_stages
from qquant.solver import solve
from qquant.sources import StreamedModel
from qquant.stage_costs import StageCost, StageShape
from tests.conftest import VOCAB, Factory

FAMILIES = ["qwen2", "qwen3", "llama"]
COARSE, FINE, WIDE = (QuantizeConfig(method="gptq", bits=4, group_size=size) for size in (64, 32, -1))
EIGHT = QuantizeConfig(method="gptq", bits=8, group_size=64)
STAGES = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def some_samples(count: int, *, seed: int = 0, length: int = 24) -> list[Sample]:
    return samples_from_ids(torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed)))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@torch.inference_mode()
def log_probabilities(model: Any, samples: list[Sample]) -> Tensor:
    return torch.cat([model(input_ids=one.input_ids[None]).logits[0][one.mask] for one in samples]).log_softmax(-1)


@torch.inference_mode()
def inputs_of(model: Any, name: str, samples: list[Sample]) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    for one in samples:
        model(input_ids=one.input_ids[None])
    hook.remove()
    return torch.cat(seen)


def slow_costs(
    folder: Path, probes: list[Sample], samples: list[Sample], settings: list[QuantizeConfig]
) -> dict[tuple[str, ...], tuple[float, list[float]]]:
    """The definition: the whole model in memory, with one stage's weights replaced; then what each setting's error
    leaves in the stage's output, over all rows."""
    model = load(folder)
    plain = log_probabilities(model, probes)
    found = {}
    for index in range(len(model.model.layers)):
        names = [name for name, part in model.model.layers[index].named_modules() if isinstance(part, nn.Linear)]
        for stage in STAGES:
            full = tuple(f"model.layers.{index}.{name}" for leaf in stage for name in names if name.endswith(leaf))
            x = inputs_of(model, full[0], samples)
            hessian = x.T @ x / len(x)
            layers = [model.get_submodule(name) for name in full]
            originals = [layer.weight for layer in layers]
            energies = []
            for config in settings:
                errors = [solve(weight, hessian, config).weight() - weight for weight in originals]
                energies.append(float(sum((error @ hessian * error).sum() for error in errors)))
            for layer, weight in zip(layers, originals, strict=True):
                layer.weight = nn.Parameter(solve(weight, hessian, settings[0]).weight(), requires_grad=False)
            kl = float(kl_divergence(plain, log_probabilities(model, probes)).mean())
            for layer, weight in zip(layers, originals, strict=True):
                layer.weight = weight
            found[full] = kl, [energy / energies[0] for energy in energies]
    return found


def measured(
    folder: Path, probes: list[Sample], samples: list[Sample], settings: list[QuantizeConfig], **changes: Any
) -> list[StageCost]:
    source = StreamedModel(folder, dtype=torch.float32)
    for name, value in changes.items():
        setattr(source, name, value)
    return measure_stages(source, probes, samples, lambda shape: settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_those_of_the_whole_model_with_one_stage_replaced(
    checkpoint: Factory, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(qquant.sensitivity, "_ROWS", VOCAB)  # more than any of the rows
    folder, probes, samples = checkpoint(family), some_samples(3, seed=1), some_samples(8)
    settings = [COARSE, FINE, EIGHT]
    expected = slow_costs(folder, probes, samples, settings)
    got = measured(folder, probes, samples, settings)
    assert [stage.shape.names for stage in got] == list(expected)
    for stage in got:
        kl, errors = expected[stage.shape.names]
        # The changes are rounded to bfloat16 after each of two blocks, by at most 2**-8 of themselves if all roundings
        # went one way; KL is quadratic in them. A code on a tie may fall either way.
        assert stage.kl[0] == pytest.approx(kl, rel=4 * 2**-8)
        assert stage.errors == pytest.approx(errors, rel=5e-3)
        assert stage.kl == pytest.approx([stage.kl[0] * error for error in stage.errors])
        assert stage.kl[2] < stage.kl[0] / 50  # Int8 against Int4: a step 17 times as small


def test_some_rows_of_each_linear_tell_of_all(tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes, samples = some_samples(2, seed=1), some_samples(6)
    monkeypatch.setattr(qquant.sensitivity, "_ROWS", VOCAB)
    exact = measured(tiny_qwen2, probes, samples, [COARSE, EIGHT])
    monkeypatch.setattr(qquant.sensitivity, "_ROWS", 16)
    for whole, part in zip(exact, measured(tiny_qwen2, probes, samples, [COARSE, EIGHT]), strict=True):
        assert part.kl[0] == whole.kl[0]
        assert part.errors[1] == pytest.approx(whole.errors[1], rel=0.5)


def test_table_and_structure_find_the_same_stages_and_costs(tiny_qwen2: Path) -> None:
    probes, samples = some_samples(2, seed=1), some_samples(4)
    by_table = measured(tiny_qwen2, probes, samples, [COARSE, EIGHT])
    by_structure = measured(
        tiny_qwen2, probes, samples, [COARSE, EIGHT], layout=Layout(blocks="model.layers", units=None)
    )
    assert by_structure == by_table


def test_round_to_nearest_reads_no_samples(tiny_qwen2: Path) -> None:
    nearest = [QuantizeConfig(method="rtn", bits=bits, group_size=64) for bits in (4, 8)]
    got = measured(tiny_qwen2, some_samples(2, seed=1), [], nearest)
    assert len(got) == 8
    assert all(0 < stage.kl[1] < stage.kl[0] for stage in got)


def test_only_stages_with_settings_are_measured(tiny_qwen2: Path) -> None:
    def only_down(shape: StageShape) -> list[QuantizeConfig]:
        return [COARSE] if shape.names[0].endswith("down_proj") else []

    source = StreamedModel(tiny_qwen2, dtype=torch.float32)
    got = measure_stages(source, some_samples(1, seed=1), some_samples(2), only_down)
    assert [stage.shape.names for stage in got] == [(f"model.layers.{i}.mlp.down_proj",) for i in range(2)]
    assert [(stage.shape.inputs, stage.shape.outputs) for stage in got] == [(128, (64,))] * 2


def test_a_token_that_is_masked_counts_nowhere(tiny_llama: Path) -> None:
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[:, 16:] = 0
    masked = measured(tiny_llama, samples_from_ids(ids, mask), samples_from_ids(ids, mask), [WIDE])
    cut = measured(tiny_llama, samples_from_ids(ids[:, :16]), samples_from_ids(ids[:, :16]), [WIDE])
    for one, other in zip(masked, cut, strict=True):
        assert one.kl[0] == pytest.approx(other.kl[0], rel=1e-3)


def test_divergence_is_that_of_the_two_models_in_memory(tiny_qwen2: Path, tmp_path: Path) -> None:
    samples = some_samples(4, seed=2)
    qquant.quantize_checkpoint(tiny_qwen2, some_samples(6), COARSE, tmp_path / "q")
    plain = log_probabilities(load(tiny_qwen2), samples)
    quantized = qquant.load_quantized(tmp_path / "q", dtype=torch.float32, kernel="reference")
    expected = float(kl_divergence(plain, log_probabilities(quantized, samples)).mean())
    original, other = (
        StreamedModel(tiny_qwen2, dtype=torch.float32),
        reopen(tmp_path / "q", dtype=torch.float32, device="cpu"),
    )
    assert divergence(original, other, samples).kl == pytest.approx(expected, rel=1e-3)
    assert divergence(original, original, samples).kl == 0


def test_numbers_that_are_not_finite_name_the_stage(tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Hessian):
        def add(self, inputs: Tensor) -> None:
            super().add(inputs * torch.inf)

    monkeypatch.setattr(qquant.sensitivity, "Hessian", Broken)
    with pytest.raises(NumericError, match=r"model\.layers\.0\.self_attn\.q_proj: activations must be finite"):
        measured(tiny_qwen2, some_samples(1), some_samples(2), [COARSE])
