"""Weights as a checkpoint folder holds them: one safetensors file, or several and their index.

Imported by what makes tiny folders for tests; reading them is the package's own business.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_shards(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """Write ``tensors`` as model.safetensors, or dealt one by one to ``shards`` files with an index.

    Neighbours in order of name, such as the parts of one packed layer, thus lie in different files.
    """
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
