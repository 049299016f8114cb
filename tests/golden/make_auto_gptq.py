"""Write auto_gptq-0.7.1.safetensors: GPTQ tensors packed, and dequantized, by AutoGPTQ's last release.

Runs in AutoGPTQ's old environment (README.md beside this file), never in ours, and imports nothing of qquant.
AutoGPTQ wrote the checkpoints of 2023 and 2024, Qwen's among them; it knows only v1 zeros.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path

import torch
from auto_gptq.nn_modules.qlinear import qlinear_cuda, qlinear_cuda_old
from safetensors.torch import save_file
from torch import Tensor, nn

ROWS, COLUMNS, GROUP = 64, 32, 32


def make(bits: int, *, sym: bool, shuffled: bool, generator: torch.Generator) -> dict[str, Tensor]:
    """Choose random codes, scales and zeros, let AutoGPTQ pack them and multiply an identity by the result."""
    levels = 2**bits
    groups = ROWS // GROUP
    codes = torch.randint(0, levels, (ROWS, COLUMNS), generator=generator)
    scales = (torch.rand(groups, COLUMNS, generator=generator) * 0.05 + 0.001).half()
    # A zero at level 0 would be stored as float -1 cast to an unsigned word: undefined, so not asked for here.
    zeros = (
        torch.full((groups, COLUMNS), levels // 2)
        if sym
        else torch.randint(1, levels, (groups, COLUMNS), generator=generator)
    )
    g_idx = torch.arange(ROWS, dtype=torch.int32) // GROUP
    if shuffled:
        g_idx = g_idx[torch.randperm(ROWS, generator=generator)]

    linear = nn.Linear(ROWS, COLUMNS, bias=False)
    weight = scales.float()[g_idx.long()] * (codes - zeros[g_idx.long()])  # [in, out]
    linear.weight.data = weight.T.contiguous()
    # The "old" class ignores g_idx, as most checkpoints need none; the other one follows it.
    kind = qlinear_cuda if shuffled else qlinear_cuda_old
    module = kind.QuantLinear(bits, GROUP, ROWS, COLUMNS, bias=False, weight_dtype=torch.float32)
    with torch.no_grad():
        module.pack(linear, scales.float().T, zeros.float().T, g_idx)
        expected = module(torch.eye(ROWS))
    assert expected.dtype == torch.float32
    assert torch.equal(expected, weight), "what AutoGPTQ multiplies by is not what it was given"
    return {
        "codes": codes.to(torch.uint8),
        "zeros": zeros.to(torch.uint8),
        "qweight": module.qweight,
        "qzeros_v1": module.qzeros,
        "scales": scales,
        "g_idx": module.g_idx,
        "expected": expected,
    }


def main() -> None:
    """Make every case, seeded, and write one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "auto_gptq-0.7.1.safetensors")
    out = parser.parse_args().out

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    tensors, described = {}, {}
    for bits in (2, 3, 4, 8):
        for sym, shuffled in ((True, False), (False, False), (False, True)):
            name = f"b{bits}-g{GROUP}-{'sym' if sym else 'asym'}{'-shuffled' if shuffled else ''}-k{ROWS}"
            found = make(bits, sym=sym, shuffled=shuffled, generator=generator)
            tensors.update({f"{name}/{key}": tensor.contiguous() for key, tensor in found.items()})
            described[name] = {
                "bits": bits,
                "group_size": GROUP,
                "sym": sym,
                "desc_act": shuffled,
                "rows": ROWS,
                "columns": COLUMNS,
                "formats": ["gptq"],
                "zero_at_0": False,
            }
    packages = ("auto-gptq", "torch", "safetensors", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    save_file(tensors, out, metadata={"cases": json.dumps(described), "made_by": json.dumps(versions)})
    out.chmod(0o644)
    print(f"{out.name}: {len(described)} cases, {out.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
