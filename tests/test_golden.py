"""Our packing against tensors that gptqmodel and AutoGPTQ packed; how they were made: golden/README.md."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qquant.packing import dequantize, pack_codes, pack_zeros, unpack_codes, unpack_zeros

GOLDEN = Path(__file__).parent / "golden"
FILES = ("gptqmodel-7.6.0.safetensors", "auto_gptq-0.7.1.safetensors")
VERSIONS = {"gptq": 1, "gptq_v2": 2}


@dataclass(frozen=True)
class Golden:
    """One packed linear layer of another tool, in one of the two ways to store zeros."""

    file: str
    name: str
    bits: int
    version: int
    columns: int
    zero_at_0: bool

    def __str__(self) -> str:
        return f"{self.file.split('-')[0]}-{self.name}-v{self.version}"

    def tensor(self, name: str) -> Tensor:
        with safe_open(GOLDEN / self.file, "pt") as file:
            found: Tensor = file.get_tensor(f"{self.name}/{name}")
        return found

    @property
    def qzeros(self) -> Tensor:
        return self.tensor(f"qzeros_v{self.version}")


def all_golden() -> list[Golden]:
    found = []
    for name in FILES:
        with safe_open(GOLDEN / name, "pt") as file:
            cases = json.loads(file.metadata()["cases"])
        for case, facts in cases.items():
            found += [
                Golden(name, case, facts["bits"], VERSIONS[version], facts["columns"], facts["zero_at_0"])
                for version in facts["formats"]
            ]
    return found


ALL = all_golden()
# What v1 cannot store portably, each tool stores in its own way; reading gptqmodel's way is tested below by itself.
PORTABLE = [golden for golden in ALL if golden.version == 2 or not golden.zero_at_0]
BORROWED = [golden for golden in ALL if golden.version == 1 and golden.zero_at_0]


@pytest.mark.parametrize("golden", ALL, ids=str)
def test_codes_pack_to_the_same_words(golden: Golden) -> None:
    assert torch.equal(pack_codes(golden.tensor("codes"), golden.bits), golden.tensor("qweight"))


@pytest.mark.parametrize("golden", ALL, ids=str)
def test_codes_unpack_to_what_was_packed(golden: Golden) -> None:
    codes = golden.tensor("codes")
    assert torch.equal(unpack_codes(golden.tensor("qweight"), golden.bits, rows=codes.shape[0]), codes)


@pytest.mark.parametrize("golden", PORTABLE, ids=str)
def test_zeros_pack_to_the_same_words(golden: Golden) -> None:
    assert torch.equal(pack_zeros(golden.tensor("zeros"), golden.bits, version=golden.version), golden.qzeros)


@pytest.mark.parametrize("golden", ALL, ids=str)
def test_zeros_unpack_to_what_was_packed(golden: Golden) -> None:
    zeros = unpack_zeros(golden.qzeros, golden.bits, columns=golden.columns, version=golden.version)
    assert torch.equal(zeros.int(), golden.tensor("zeros").int())


@pytest.mark.parametrize("golden", ALL, ids=str)
def test_weights_are_exactly_what_the_other_tool_multiplies_by(golden: Golden) -> None:
    weight = dequantize(
        golden.tensor("qweight"),
        golden.qzeros,
        golden.tensor("scales"),
        golden.tensor("g_idx"),
        bits=golden.bits,
        version=golden.version,
    )
    # Exact: a float16 scale times an integer of at most nine bits fits float32 without rounding.
    assert weight.dtype == torch.float32
    assert torch.equal(weight, golden.tensor("expected"))


@pytest.mark.parametrize("golden", BORROWED, ids=str)
def test_a_zero_that_v1_cannot_store_is_refused(golden: Golden) -> None:
    with pytest.raises(ValueError, match="zero"):
        pack_zeros(golden.tensor("zeros"), golden.bits, version=1)


def test_the_golden_cases_cover_the_format() -> None:
    assert {golden.bits for golden in ALL} == {2, 3, 4, 8}
    assert {golden.version for golden in ALL} == {1, 2}
    assert len(BORROWED) == 4
    for golden in ALL:
        if "shuffled" in golden.name:
            g_idx = golden.tensor("g_idx")
            assert not torch.equal(g_idx, g_idx.sort().values)


def test_a_whole_checkpoint_of_gptqmodel_gives_its_logits() -> None:
    """gptqmodel's own logits, in float32; only the order of sums may differ."""
    import qquant

    model = qquant.load_quantized(GOLDEN / "gptqmodel-tiny", dtype=torch.float32)
    golden = load_file(GOLDEN / "gptqmodel-tiny-expected_logits.safetensors")
    expected = golden["logits"]
    with torch.no_grad():
        logits = model(input_ids=golden["input_ids"]).logits
    # Two float32 paths with the same weights end 2 to 3 units of the last place of the largest logit apart (measured
    # between gptqmodel and plain matrices); one wrong zero code moves logits by more than 1e-4 of the range.
    limit = 64 * torch.finfo(torch.float32).eps * float(expected.max() - expected.min())
    assert float((logits - expected).abs().max()) <= limit
