"""What the tests of the compatibility layer share: examples, a quantized model, and a comparison of two folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qquant.calibrate import Sample, samples_from_ids
from qquant.compat.auto_gptq import AutoGPTQForCausalLM, BaseGPTQForCausalLM, BaseQuantizeConfig
from qquant.shards import CheckpointReader
from tests.conftest import VOCAB

PLAIN: dict[str, Any] = {"bits": 4, "group_size": 32, "desc_act": False}


def examples(count: int = 4, length: int = 24, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def samples() -> list[Sample]:
    return samples_from_ids([example["input_ids"] for example in examples()])


def load(folder: Path, **options: Any) -> BaseGPTQForCausalLM:
    return AutoGPTQForCausalLM.from_pretrained(folder, BaseQuantizeConfig(**PLAIN), device_map="cpu", **options)


@pytest.fixture(name="quantized", scope="module")
def quantized_model(tiny_qwen2: Path) -> BaseGPTQForCausalLM:
    """A quantized model that tests may use and save, and do not change."""
    model = load(tiny_qwen2)
    model.quantize(examples())
    return model


@pytest.fixture(name="saved", scope="module")
def its_checkpoint(quantized: BaseGPTQForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint. Never write to it."""
    out = tmp_path_factory.mktemp("saved") / "int4"
    quantized.save_quantized(out)
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader.entries}


def assert_same_tensors(left: Path, right: Path) -> None:
    first, second = tensors(left), tensors(right)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
