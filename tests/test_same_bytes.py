"""A quantized checkpoint is the same, byte for byte, however many threads made it, from disk as from memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qquant
from qquant.calibrate import Sample, samples_from_ids
from qquant.config import QuantizeConfig
from qquant.identity import sha256
from qquant.quantizing import quantize_checkpoint
from qquant.shards import SINGLE_NAME
from tests.conftest import VOCAB, Factory

METHODS = {
    "best": "best",
    "the other parts": "rotate+gptaq:0.5+residual+pivot+clip-loop+output+refine:1+tune:2",
}
ONE_BLOCK = {"num_hidden_layers": 1, "intermediate_size": 64}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def some_samples() -> list[Sample]:
    return samples_from_ids(torch.randint(0, VOCAB, (2, 64), generator=torch.Generator().manual_seed(3)))


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads may be changed."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_every_file_is_the_same_for_one_thread_two_and_three(
    checkpoint: Factory, tmp_path: Path, dtype: torch.dtype, threads: None
) -> None:
    """Samples of 64 tokens, widths of 64: nothing that torch cuts among threads by elements.

    From 32768 elements on it does. In float32 its silu gives other last bits where a part ends between two vectors, so
    with three threads larger models get inputs of their own, before anything of ours has been computed.
    """
    source, config = checkpoint("qwen2", dtype=dtype, **ONE_BLOCK), QuantizeConfig(method="best", group_size=32)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        folder = tmp_path / f"{count}"
        quantize_checkpoint(source, some_samples(), config, folder)
        found.append({path.name: sha256(path) for path in folder.iterdir()})
    assert SINGLE_NAME in found[0]
    assert found[1] == found[0]
    assert found[2] == found[0]


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
@pytest.mark.parametrize("method", list(METHODS.values()), ids=list(METHODS))
def test_a_model_in_memory_gets_the_tensors_of_the_checkpoint(
    checkpoint: Factory, tmp_path: Path, method: str, dtype: torch.dtype
) -> None:
    """Norms and biases that a fold changed among them."""
    source, config = checkpoint("qwen2", dtype=dtype, **ONE_BLOCK), QuantizeConfig(method=method, group_size=32)
    quantize_checkpoint(source, some_samples(), config, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    qquant.quantize_model(model, some_samples(), config)
    stored, held = load_file(tmp_path / "out" / SINGLE_NAME), model.state_dict()
    assert stored.keys() == held.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in stored.items())
