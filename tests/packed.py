"""Packed checkpoints made by hand, and the plain model that one must equal; imported by tests only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qquant.packing import dequantize, pack_codes, pack_zeros
from qquant.shards import SINGLE_NAME, CheckpointReader

IDS = torch.tensor([[7, 1, 99, 250, 3, 3, 64, 12]])


@torch.inference_mode()
def logits_of(model: Any) -> Tensor:
    """Logits of eight fixed tokens."""
    logits: Tensor = model(input_ids=IDS).logits
    return logits


def dense_logits(folder: Path) -> Tensor:
    """Logits of the plain float32 model whose matrices are what the packed tensors stand for."""
    content = json.loads((folder / "config.json").read_text())
    keys = content.pop("quantization_config")
    version = 2 if keys["checkpoint_format"] == "gptq_v2" else 1
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    reader = CheckpointReader(folder)
    plain = {}
    for name in reader.entries:
        path, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            parts = {part: reader.read(f"{path}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
            bits = parts["qweight"].shape[0] * 32 // parts["g_idx"].numel()  # mixed files: by the shape itself
            plain[f"{path}.weight"] = dequantize(**parts, bits=bits, version=version).T.contiguous()
        elif leaf not in ("qzeros", "scales", "g_idx"):
            plain[name] = reader.read(name).float()
    missing, unexpected = model.load_state_dict(plain, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return logits_of(model)


def pack_by_hand(
    source: Path,
    folder: Path,
    *,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    signed: bool = False,
    desc_act: bool = False,
    version: int = 1,
    scales_dtype: torch.dtype = torch.float16,
    zero_bias: bool = False,
    head: bool = False,
    seed: int = 0,
) -> Tensor:
    """Write a checkpoint of random codes in the shape of ``source``; returns the logits of the plain model."""
    shutil.copytree(source, folder)
    draw = torch.Generator().manual_seed(seed)
    stored, plain = load_file(folder / SINGLE_NAME), {}
    for name in [name for name in stored if name.endswith("_proj.weight") or (head and name == "lm_head.weight")]:
        path = name.removesuffix(".weight")
        columns, rows = stored.pop(name).shape
        size = rows if group_size == -1 else group_size
        groups = -(-rows // size)
        codes = torch.randint(0, 2**bits, (rows, columns), generator=draw)
        scales = ((torch.rand(groups, columns, generator=draw) + 0.5) * 0.2 / 2**bits).to(scales_dtype)
        if signed:
            scales *= 1 - 2 * torch.randint(0, 2, scales.shape, generator=draw)
        zeros = torch.full((groups, columns), 2 ** (bits - 1))
        if not sym:
            zeros = torch.randint(2 - version, 2**bits, (groups, columns), generator=draw)
        g_idx = torch.arange(rows) // size
        if desc_act:
            g_idx = g_idx[torch.randperm(rows, generator=draw)]
        plain[name] = (scales.float()[g_idx] * (codes - zeros[g_idx])).T.contiguous()
        stored[f"{path}.qweight"] = pack_codes(codes, bits)
        stored[f"{path}.qzeros"] = pack_zeros(zeros, bits, version)
        stored[f"{path}.scales"] = scales
        stored[f"{path}.g_idx"] = g_idx.int()
        if zero_bias:
            stored.setdefault(f"{path}.bias", torch.zeros(columns, dtype=torch.float16))
    save_file(stored, folder / SINGLE_NAME, metadata={"format": "pt"})
    edit_keys(
        folder,
        quant_method="gptq",
        bits=bits,
        group_size=group_size,
        sym=sym,
        desc_act=desc_act,
        checkpoint_format="gptq_v2" if version == 2 else "gptq",
        lm_head=head,
    )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model.load_state_dict(plain, strict=False)
    return logits_of(model)


def edit_keys(folder: Path, **changes: Any) -> None:
    """Set keys of config.json's quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a single-file checkpoint."""
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})
