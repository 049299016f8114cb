"""Factors and rotations that are folded into a block must be those of slow references that try every choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qquant.capture import capture
from qquant.config import QuantizeConfig
from qquant.folding import Folder, Passing, fold_block, orthogonal, rounding_error
from qquant.models.layouts import block_list, linears
from qquant.sources import LoadedModel
from tests.block_reference import (
    best_factors_slowly,
    hadamard_or_gram_schmidt,
    rounding_cost,
    turned_reader,
    turned_values,
)
from tests.conftest import Factory
from tests.qwen_folders import DIM, make_qwen
from tests.test_folding import config, load, some_samples

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SEAMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
"""What makes channels, and what reads them."""


def first_block(folder: Path, masked: bool = False) -> tuple[nn.Module, LoadedModel, list[Passing]]:
    """The first block in float64 and what enters it."""
    model = load(folder)
    source = LoadedModel(model)
    stream = capture(source, some_samples(), "cpu")
    passing = []
    for i, hidden in enumerate(stream.hidden):
        mask = torch.arange(hidden.shape[1]) < 20 - i if masked else None
        if mask is not None:
            hidden[:, ~mask, 5] = 100  # what does not count would make a channel strong
        passing.append(Passing(hidden, stream.calls[i][0], mask))
    return block_list(model, source.layout)[0], source, passing


@torch.no_grad()
def strengthen(block: nn.Module, seed: int) -> None:
    """Make two channels of every seam strong by any factor, what reads them weak by about that, and one channel 0."""
    random = torch.Generator().manual_seed(seed)
    layers = dict(block.named_modules())
    for maker, readers in SEAMS.items():
        of_column = torch.tensor(channels_of(maker, layers[readers[0]].weight.shape[1]))
        for channel in torch.randperm(int(of_column.max()) + 1, generator=random)[:2]:
            made, read = 2 ** (torch.rand(2, generator=random) * 2 + 4 * torch.rand((), generator=random))
            for parameter in layers[maker].parameters():
                parameter[channel] *= made
            for name in readers:
                layers[name].weight[:, of_column == channel] /= read
    for parameter in layers["mlp.up_proj"].parameters():
        parameter[7] = 0


@torch.no_grad()
def inputs_of(block: nn.Module, name: str, passing: list[Passing]) -> Tensor:
    """What comes to a linear at the tokens that count: [T, in]."""
    seen: list[Tensor] = []
    hook = block.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    for one in passing:
        block(one.hidden, **one.call)
    hook.remove()
    masks = [torch.ones(len(rows)).bool() if p.mask is None else p.mask for rows, p in zip(seen, passing, strict=True)]
    return torch.cat([rows[mask] for rows, mask in zip(seen, masks, strict=True)])


def channels_of(maker: str, columns: int) -> list[int]:
    """The maker's channel that each column of its readers is; two query heads read each of SMALL's heads of values."""
    size = SMALL["head_dim"]
    return [k // (2 * size) * size + k % size for k in range(columns)] if "v_proj" in maker else list(range(columns))


CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "signed": {"method": "gptq+awq+signed", "group_size": 8},
    "int3 asym": {"bits": 3, "sym": False, "group_size": -1},
    "masked": {"group_size": -1, "masked": True, "seed": 3},
    "int8": {"bits": 8, "seed": 4},
    "rules": {"dynamic": {r"+:.*k_proj": {"bits": 8}, r"+:.*up_proj": {"sym": False}}, "seed": 5},
}


@pytest.mark.parametrize("options", list(CHOICES.values()), ids=list(CHOICES))
def test_channels_are_scaled_by_the_best_of_all_choices(checkpoint: Factory, options: dict[str, Any]) -> None:
    given = {"method": "gptq+awq", "group_size": 16, **options}
    masked, seed = given.pop("masked", False), given.pop("seed", 0)
    settings = QuantizeConfig.from_dict(given)
    block, source, passing = first_block(checkpoint("llama", **SMALL, attention_bias=True), masked)
    strengthen(block, seed)
    before = {name: layer.weight.detach().clone() for name, layer in linears(block).items()}
    expected: dict[str, Tensor] = {}
    for maker, readers in SEAMS.items():
        inputs = inputs_of(block, readers[0], passing)
        pairs = [(before[name], settings.for_module(f"b.{name}") or settings) for name in readers]
        channels = channels_of(maker, inputs.shape[1])
        factors = best_factors_slowly(pairs, inputs, channels)
        expected |= {name: torch.tensor([factors[c] for c in channels]).double() for name in readers}
    with torch.no_grad():
        fold_block(block, source.layout, "b", settings, passing, {}, lambda _: None)
    assert sum(bool((factors != 1).any()) for factors in expected.values()) >= 4
    # What a reader multiplies as a maker of other channels divides its rows.
    divided = {"self_attn.v_proj": "self_attn.o_proj", "mlp.up_proj": "mlp.down_proj"}
    for name, layer in linears(block).items():
        rows = torch.ones(layer.out_features).double()
        if name in divided:
            channels = channels_of(name, len(expected[divided[name]]))
            rows[channels] = expected[divided[name]]
        assert torch.equal(layer.weight, before[name] * expected[name] / rows[:, None])


@pytest.mark.parametrize("rows", [5, 300, 600], ids=["few rows", "all rows", "every second row"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "gptq+signed", "bits": 3},
        {"sym": False, "group_size": -1},
        {"bits": 8, "group_size": 8},
        {"bits": 2, "sym": False},
    ],
    ids=["int4", "int3 signed", "int4 asym row", "int8", "int2 asym"],
)
def test_the_error_of_rounding_is_that_of_the_slow_reference(options: dict[str, Any], rows: int) -> None:
    """A few hundred thousand positive terms in float64, each some roundings of 2^-53 off: far below 10^-12."""
    random = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, 16, generator=random, dtype=torch.float64)
    factors = 2.0 ** torch.randint(0, 4, (16,), generator=random).double()
    power = torch.rand(16, generator=random, dtype=torch.float64) * factors**2
    settings = QuantizeConfig.from_dict({"method": "gptq", "group_size": 8, **options})
    expected = rounding_cost(weight, factors.tolist(), power.tolist(), settings)
    assert rounding_error(weight, factors, power, settings) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128, 3, 24, 80])
def test_rotations_are_hadamards_or_the_seeded_one(size: int) -> None:
    """Both orthogonalize in float64; a random matrix of this size has a condition of some thousands."""
    torch.testing.assert_close(orthogonal(size), hadamard_or_gram_schmidt(size), rtol=0, atol=1e-11)


@pytest.mark.parametrize("head", [8, 12])
def test_each_head_of_values_is_turned_and_what_reads_it_turned_back(checkpoint: Factory, head: int) -> None:
    """Sums of up to 12 products in another order, in float64."""
    folder = checkpoint("llama", **{**SMALL, "head_dim": head}, attention_bias=True)
    block, source, passing = first_block(folder)
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    with torch.no_grad():
        fold_block(block, source.layout, "b", config("gptq+rotate", group_size=16), passing, {}, lambda _: None)
    for name in ("weight", "bias"):
        before[f"self_attn.v_proj.{name}"] = turned_values(before[f"self_attn.v_proj.{name}"], head)
    before["self_attn.o_proj.weight"] = turned_reader(before["self_attn.o_proj.weight"], head)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=1e-14)


def test_values_of_a_joint_projection_are_turned_and_queries_and_keys_are_not(tmp_path: Path) -> None:
    block, source, _ = first_block(make_qwen(tmp_path / "qwen"))
    joint = {name: p.detach().clone() for name, p in block.get_submodule("attn.c_attn").named_parameters()}
    reader = block.get_submodule("attn.c_proj").weight
    assert isinstance(reader, Tensor)
    expected = turned_reader(reader.detach().clone(), DIM)
    folder = Folder(
        block, source.layout.units or (), {n: config("gptq+rotate") for n in linears(block)}, lambda _: None, {}
    )
    with torch.no_grad():
        folder.rotate()
    torch.testing.assert_close(block.get_submodule("attn.c_proj").weight, expected, rtol=0, atol=1e-14)
    for name, parameter in block.get_submodule("attn.c_attn").named_parameters():
        third = len(joint[name]) // 3
        assert torch.equal(parameter[: 2 * third], joint[name][: 2 * third])
        values = turned_values(joint[name][2 * third :], DIM)
        torch.testing.assert_close(parameter[2 * third :].detach(), values, rtol=0, atol=1e-14)
