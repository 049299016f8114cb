"""Peak memory of a generation with an Int8 and with a full cache, against weights plus one cache.

Each kind of cache runs in a process of its own on a random model. What counts is the process's peak resident memory
while it generates, beyond what it held before, which is weights and libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 16


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Generate once in this process and read the meters."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    import qquant
    from qquant.kv_cache_quant import Int8KVCache

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // args.head_dim,
        num_key_value_heads=args.kv_heads or args.hidden // args.head_dim,
        vocab_size=1024,
        max_position_embeddings=PROMPT_TOKENS + args.new_tokens,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if args.cache == "int8":
        qquant.enable_kv_quant(model)
    prompt = torch.randint(0, 1024, (args.batch, PROMPT_TOKENS))
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    # Libraries, thread pools and packed copies that the first steps bring in are not the cache's.
    model.generate(prompt, max_new_tokens=3, **options)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    found = model.generate(prompt, max_new_tokens=args.new_tokens, return_dict_in_generate=True, **options)
    peak = resident("VmHWM")
    cache = found.past_key_values
    full = sum(
        2 * layer.values.numel() // layer.values.shape[2] * cache.get_seq_length() * 2 for layer in cache.layers[:1]
    ) * len(cache.layers)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    size = cache.nbytes if isinstance(cache, Int8KVCache) else full
    return {
        "cache": args.cache,
        "tokens": cache.get_seq_length(),
        "weights_mb": weights / 1e6,
        "cache_mb": size / 1e6,
        "share_of_bf16_cache": size / full,
        "peak_beyond_start_mb": (peak - before) / 1e6,
        "peak_over_weights_and_one_cache": (weights + peak - before) / (weights + size),
    }


def main() -> None:
    """Run both kinds in processes of their own and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--kv-heads", type=int, help="default: as many as query heads")
    parser.add_argument("--cache", choices=["int8", "full"], help="measure one kind in this process and print JSON")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.cache:
        print(json.dumps(measure(args)))
        return
    rows = []
    for kind in ("full", "int8"):
        # Large tensors outside the heap, so that memory given back is seen to be given back.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, *sys.argv[1:], "--cache", kind]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    print("| cache | tokens | weights MB | cache MB | of bf16 | peak beyond start MB | peak / (weights + one cache) |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['cache']} | {row['tokens']} | {row['weights_mb']:.1f} | {row['cache_mb']:.1f} | "
            f"{row['share_of_bf16_cache']:.3f} | {row['peak_beyond_start_mb']:.1f} | "
            f"{row['peak_over_weights_and_one_cache']:.3f} |"
        )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
