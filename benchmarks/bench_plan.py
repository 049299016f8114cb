"""Predicted against measured peak memory of generations on a CPU, each cell in a process of its own.

A random model at a stated shape, in bfloat16 or with packed linears, generates once. What counts is the largest
resident set of the process less what it held before the model was made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    # 0.25 billion parameters, keys and values of every query head, a large vocabulary
    "mha": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 48000,
    },
    # 0.3 billion parameters, grouped-query attention
    "gqa": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    # Qwen2.5-0.5B: half a billion parameters, of them a quarter in a tied embedding
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
GRID = [
    # shape, precision, KV cache, batch, prompt tokens, new tokens
    ("mha", "bf16", "bf16", 1, 16, 16),
    ("mha", "bf16", "bf16", 4, 512, 16),
    ("mha", "bf16", "bf16", 16, 256, 16),
    ("mha", "bf16", "int8", 4, 512, 16),
    ("mha", "bf16", "int8", 16, 256, 16),
    ("mha", "bf16", "int4", 4, 512, 16),
    ("mha", "int8", "bf16", 1, 16, 4),
    ("mha", "int8", "bf16", 4, 512, 4),
    ("mha", "int8", "int8", 4, 512, 4),
    ("mha", "int4", "bf16", 1, 16, 8),
    ("mha", "int4", "bf16", 4, 512, 8),
    ("mha", "int4", "int8", 4, 512, 8),
    ("mha", "int4", "int8", 1, 2048, 8),
    ("gqa", "bf16", "bf16", 1, 1024, 16),
    ("gqa", "bf16", "int8", 1, 1024, 16),
    ("gqa", "bf16", "bf16", 8, 64, 16),
    ("gqa", "int8", "int8", 2, 512, 4),
    ("gqa", "int4", "int8", 4, 256, 4),
    ("gqa", "int4", "bf16", 16, 64, 4),
    ("0.5b", "bf16", "bf16", 1, 128, 8),
    ("0.5b", "int8", "bf16", 1, 128, 8),
    ("0.5b", "int8", "int8", 4, 256, 8),
    ("0.5b", "int4", "bf16", 1, 128, 8),
    ("0.5b", "int4", "int8", 4, 256, 8),
    ("0.5b", "int4", "bf16", 1, 2048, 4),
]
GROUP_SIZE = 128


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(shape: str, precision: Any, kv: Any, batch: int, prompt: int, new: int) -> dict[str, Any]:
    """Generate once in this process and read the meters."""
    import torch
    from transformers import Qwen2Config

    import qquant
    from qquant import kv_cache_quant  # noqa: F401
    from qquant.footprint import footprint
    from qquant.model_folder import skeleton
    from qquant.random_models import random_model
    from qquant.shapes import model_shapes

    options: dict[str, Any] = {"max_position_embeddings": 8192, "tie_word_embeddings": False, **SHAPES[shape]}
    config = Qwen2Config(**options)
    shapes = model_shapes(config)
    skeleton(config, Path(shape))  # modules of the family are libraries and not the model
    place = torch.device("cpu")
    before = resident("VmRSS")
    model: Any = random_model(config, precision=precision, dtype=torch.bfloat16, device=place, group_size=GROUP_SIZE)
    loaded = resident("VmRSS")
    if kv != "bf16":
        qquant.enable_kv_quant(model, value_bits=8 if kv == "int8" else 4)
    ids = torch.randint(0, 1024, (batch, prompt))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)
    after, peak = resident("VmRSS"), resident("VmHWM")
    tensors = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    predicted = footprint(
        shapes, precision=precision, kv_cache=kv, batch=batch, prompt_tokens=prompt, new_tokens=new, device="cpu",
        group_size=GROUP_SIZE,
    )  # fmt: skip
    return {
        "cell": [shape, precision, kv, batch, prompt, new],
        "before": before,
        "tensors": tensors,
        "loaded": loaded - before,
        "after": after - before,
        "measured": peak - before,
        "predicted": predicted.model_dump(),
    }


def main() -> None:
    """Run every cell in a process of its own and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", help="measure one cell in this process and print JSON")
    parser.add_argument("--only", help="only cells whose text contains this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.cell:
        shape, precision, kv, *numbers = args.cell.split(",")
        print(json.dumps(measure(shape, precision, kv, *map(int, numbers))))
        return
    # Large tensors outside the heap, so that memory given back is seen to be given back.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    rows = []
    print("| model | weights | KV | batch | prompt + new | predicted MB | measured MB | deviation |")
    print("|---|---|---|---|---|---|---|---|")
    for cell in GRID:
        name = ",".join(map(str, cell))
        if args.only and args.only not in name:
            continue
        command = [sys.executable, __file__, "--cell", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        predicted, measured = row["predicted"]["peak_bytes"], row["measured"]
        shape, precision, kv, batch, prompt, new = cell
        print(
            f"| {shape} | {precision} | {kv} | {batch} | {prompt} + {new} | {predicted / 1e6:.1f} | "
            f"{measured / 1e6:.1f} | {100 * (predicted / measured - 1):+.1f} % |",
            flush=True,
        )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
