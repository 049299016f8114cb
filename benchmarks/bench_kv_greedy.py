"""How many greedy continuations an Int8 cache changes, beside how many the choice of bfloat16 or float32 changes.

Prompts are windows of a text. A continuation counts as equal if all its tokens are. Prints one Markdown row per pair.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qquant


def compare(left: Tensor, right: Tensor) -> dict[str, float]:
    """Share of equal continuations and of equal tokens before the first that differs."""
    equal = left == right
    return {
        "equal_share": equal.all(1).float().mean().item(),
        "tokens_before_first_difference_mean": equal.cumprod(1).sum(1).float().mean().item(),
    }


def main() -> None:
    """Generate with every kind of cache and arithmetic, compare, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    stride = len(ids) // args.prompts
    prompts = torch.stack([ids[i * stride : i * stride + args.prompt_tokens] for i in range(args.prompts)])

    def run(dtype: torch.dtype, switch: Callable[[Any], Any] | None = None) -> Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        if switch is not None:
            switch(model)
        options = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens, "do_sample": False}
        found: Tensor = model.generate(prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, **options)
        return found[:, args.prompt_tokens :]

    def published(model: Any) -> None:
        qquant.enable_kv_quant(model, scheme="qwen", key_transform="none", use_cache_kernel=False)

    exact, half = run(torch.float32), run(torch.bfloat16)
    int8 = run(torch.float32, qquant.enable_kv_quant)
    pairs = {
        "bfloat16 against float32, no quantization": compare(half, exact),
        "int8 cache against full cache, float32": compare(int8, exact),
        "int8 cache against full cache, bfloat16": compare(run(torch.bfloat16, qquant.enable_kv_quant), half),
        "int8 cache in bfloat16 against float32": compare(run(torch.bfloat16, qquant.enable_kv_quant), exact),
        "published scheme against full cache, float32": compare(run(torch.float32, published), exact),
    }
    print("| pair | equal continuations | tokens before the first difference |\n|---|---|---|")
    for name, found in pairs.items():
        share, tokens = found["equal_share"], found["tokens_before_first_difference_mean"]
        print(f"| {name} | {share:.1%} | {tokens:.0f} of {args.new_tokens} |")
    if args.out:
        settings = {"prompts": args.prompts, "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens}
        args.out.write_text(json.dumps({**settings, "pairs": pairs}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
