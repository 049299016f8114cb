"""A tiny Qwen v1 checkpoint twice, as the native model and as arrays for the slow reference, and how they are compared.

The formulas are qwen_reference.py, the files are make_qwen_v1.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qquant.models.qwen.modeling import QWenLMHeadModel
from tests.make_qwen_v1 import make_qwen_v1
from tests.qwen_reference import Array, forward

SEQ_LENGTH = 16
"""Length of training of the tiny checkpoints."""
LENGTHS = (8, 16, 17, 32, 33, 70)
"""On both sides of it, and of every step of NTK: alpha 1, 1, 3, 3, 7, 15."""
CLOSE = 1e-4
"""What float32 logits may differ from the float64 reference: the bound that was asked for, not a derived one. Logits
here are below 10, and most comparisons see 2e-6, 40 to 60 times less; ``Differences`` prints what each saw."""
DIFFERENT = 1e-2
"""What a wrong alpha, mask or factor changes in the logits of these checkpoints, at the least: a hundred times that."""
INT8 = 0.02
"""What 8 bits of keys and values may move logits by: root mean square, as a share of the logits' own spread.

The range of 16 normal channels is 3.53 standard deviations (32: 4.09), in 255 steps; rounding moves a channel by a step
by the root of 12, which is r = 0.40 % (0.46 %). The scores of a query have a standard deviation S over the tokens that
it sees, 1.1 to 1.7 in these checkpoints; a rounded key moves a score by r S, and its weight by that share of it. With
the rounded values, attention is off by r (1 + S^2)^0.5 in a layer, at most 0.8 %, two or three layers by 1.1 or 1.2 %,
and logits by no more than that, as the rest of the residual is exact. Two such caches are 2^0.5 times that apart, or
1.7 %; what is left is for the second order and for the chance of a few hundred logits. A wrong alpha moves logits by
8 % of their spread and more, a wrong mask, position or head by about as much as they are.
"""


class Case:
    """One checkpoint folder, its native model in float32, and its weights for the reference."""

    def __init__(self, folder: Path, **options: Any) -> None:
        """Load ``folder``; options go to ``from_pretrained``."""
        self.folder = folder
        self.settings: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.model: Any = QWenLMHeadModel.from_pretrained(folder, **{"dtype": torch.float32} | options)
        self.tensors: dict[str, Array] = {
            name: tensor.double().numpy()
            for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }

    def expected(self, row: Tensor | Sequence[int], **options: Any) -> Tensor:
        """The reference's logits [T, V] of one row without padding."""
        return torch.from_numpy(forward(self.tensors, self.settings, [int(token) for token in row], **options)[0])

    def logits(self, ids: Tensor, **options: Any) -> Tensor:
        """The model's logits [B, L, V]."""
        with torch.no_grad():
            found: Tensor = self.model(ids, **options).logits
        return found


def small(folder: Path, **config: Any) -> Case:
    """A random checkpoint with fields of config.json in place of the tiny ones."""
    return Case(make_qwen_v1(folder, **config))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random ids of the tiny vocabulary."""
    return torch.randint(0, 512, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(*rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch, and its mask."""
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat((torch.full((longest - len(row),), 7), row)) for row in rows])
    mask = torch.stack([torch.cat((torch.zeros(longest - len(row)), torch.ones(len(row)))) for row in rows]).long()
    return ids, mask


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest one."""
    assert found.shape == expected.shape
    return float((found.detach().double() - expected.detach().double()).abs().max())


def int8_error(found: Tensor, exact: Tensor) -> float:
    """Root mean square difference by the spread of the exact logits, to be compared with ``INT8``."""
    return float((found.double() - exact.double()).square().mean().sqrt() / exact.double().std())


class Differences:
    """Collects the largest differences that the tests of a file saw."""

    def __init__(self) -> None:
        """Nothing seen."""
        self.rows: dict[str, tuple[float, float]] = {}

    def check(self, name: str, found: Tensor | Array, expected: Tensor | Array, within: float = CLOSE) -> None:
        """Note the largest difference under ``name``, and fail where it is more than ``within``."""
        seen = difference(torch.as_tensor(found), torch.as_tensor(expected))
        self.rows[name] = max((seen, within), self.rows.get(name, (0.0, within)))
        assert seen <= within, f"{name}: differs by {seen:.3g}, at most {within:.3g} is right"


def collect(request: pytest.FixtureRequest, title: str) -> Iterator[Differences]:
    """Body of a module's fixture that prints, past pytest's capture, what its tests saw."""
    found = Differences()
    yield found
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{title}: largest difference from the float64 reference (allowed)")
        for name, (seen, within) in found.rows.items():
            print(f"  {name:<52} {seen:9.2e}  ({within:.1e})")
