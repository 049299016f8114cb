"""Write gptqmodel-7.6.0.safetensors: GPTQ tensors packed, and dequantized, by gptqmodel's own code.

Runs in the environment of gptqmodel (README.md beside this file), never in ours, and imports nothing of qquant: what
it writes is the other side's word on the format. The complete checkpoint is made by make_gptqmodel_tiny.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its kernel compiles itself on first use, for a minute

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT, QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file
from torch import Tensor, nn

COLUMNS = 32


@dataclass(frozen=True)
class Case:
    """One linear layer to pack."""

    bits: int
    group_size: int
    sym: bool
    shuffled: bool
    rows: int
    zero_at_0: bool = False

    @property
    def name(self) -> str:
        """The prefix of the case's tensors, saying what it is."""
        parts = [f"b{self.bits}", f"g{self.group_size}", "sym" if self.sym else "asym"]
        parts += ["shuffled"] * self.shuffled + [f"k{self.rows}"] + ["z0"] * self.zero_at_0
        return "-".join(parts)


def cases() -> list[Case]:
    """Every width with each way to group it, and the odd ones once."""
    found = []
    for bits in (2, 3, 4, 8):
        found += [
            Case(bits, 32, sym=False, shuffled=False, rows=64),
            Case(bits, 32, sym=False, shuffled=True, rows=64),
            Case(bits, -1, sym=True, shuffled=False, rows=32),
        ]
    found += [Case(bits, 32, sym=True, shuffled=True, rows=64) for bits in (4, 8)]
    found.append(Case(4, 128, sym=False, shuffled=True, rows=256))
    found.append(Case(4, 64, sym=False, shuffled=False, rows=96))  # the last group is short
    found += [Case(bits, 32, sym=False, shuffled=False, rows=32, zero_at_0=True) for bits in (2, 3, 4, 8)]
    return found


def make(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Choose random codes, scales and zeros, let gptqmodel pack and dequantize them, and return all of it."""
    levels = 2**case.bits
    size = case.rows if case.group_size == -1 else case.group_size
    groups = -(-case.rows // size)
    codes = torch.randint(0, levels, (case.rows, COLUMNS), generator=generator)
    scales = (torch.rand(groups, COLUMNS, generator=generator) * 0.05 + 0.001).half()
    if case.sym:
        zeros = torch.full((groups, COLUMNS), levels // 2)
    else:
        zeros = torch.randint(1, levels, (groups, COLUMNS), generator=generator)
    if case.zero_at_0:
        zeros[:, ::5] = 0  # alone in a word and beside others, in the first field and in the last
        zeros[:, 6] = 0
    g_idx = torch.arange(case.rows, dtype=torch.int32) // size
    if case.shuffled:
        g_idx = g_idx[torch.randperm(case.rows, generator=generator)]

    weight = scales.float()[g_idx.long()] * (codes - zeros[g_idx.long()])  # [in, out]
    linear = nn.Linear(case.rows, COLUMNS, bias=False)
    linear.weight.data = weight.T.contiguous()

    def packed(method: str) -> TorchLinear:
        module = TorchLinear(
            bits=case.bits,
            group_size=case.group_size,
            sym=case.sym,
            desc_act=case.shuffled,
            in_features=case.rows,
            out_features=COLUMNS,
            bias=False,
        )
        getattr(module, method)(linear=linear, scales=scales.float().T, zeros=zeros.float().T, g_idx=g_idx)
        return module.eval()

    module = packed("pack_block")
    twin = packed("pack_original")
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        assert torch.equal(getattr(module, name), getattr(twin, name)), f"gptqmodel's two packers differ in {name}"
    qzeros_v2 = module.qzeros.clone()

    config = QuantizeConfig(
        bits=case.bits,
        group_size=case.group_size,
        sym=case.sym,
        desc_act=case.shuffled,
        act_group_aware=False,
        format=FORMAT.GPTQ,
        offload_to_disk=False,
    )
    convert_gptq_v2_to_v1_format_module(module, config)
    qzeros_v1 = module.qzeros.clone()
    convert_gptq_v1_to_v2_format_module(module, bits=case.bits, pack_dtype=torch.int32)
    assert torch.equal(module.qzeros, qzeros_v2), "gptqmodel does not read back its own v1 zeros"

    stored_scales = module.scales.clone()
    module.scales = module.scales.float()  # so that their product is not rounded to float16
    module.post_init()
    expected = module.dequantize_weight()
    assert expected.dtype == torch.float32
    assert expected.shape == (case.rows, COLUMNS)
    assert torch.equal(expected, weight), "what gptqmodel unpacks is not what it was given"
    return {
        "codes": codes.to(torch.uint8),
        "zeros": zeros.to(torch.uint8),
        "qweight": module.qweight.clone(),
        "qzeros_v1": qzeros_v1,
        "qzeros_v2": qzeros_v2,
        "scales": stored_scales,
        "g_idx": module.g_idx.clone(),
        "expected": expected.clone(),
    }


def main() -> None:
    """Make every case, seeded, and write one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "gptqmodel-7.6.0.safetensors")
    out = parser.parse_args().out

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    tensors, described = {}, {}
    for case in cases():
        tensors.update({f"{case.name}/{name}": tensor.contiguous() for name, tensor in make(case, generator).items()})
        described[case.name] = {
            "bits": case.bits,
            "group_size": case.group_size,
            "sym": case.sym,
            "desc_act": case.shuffled,
            "rows": case.rows,
            "columns": COLUMNS,
            "formats": ["gptq", "gptq_v2"],
            "zero_at_0": case.zero_at_0,
        }
    versions = {name: importlib.metadata.version(name) for name in ("gptqmodel", "torch", "safetensors")}
    save_file(tensors, out, metadata={"cases": json.dumps(described), "made_by": json.dumps(versions)})
    out.chmod(0o644)
    print(f"{out.name}: {len(described)} cases, {out.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
