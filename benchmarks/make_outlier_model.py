"""Write a copy of a Qwen2 model whose keys have outliers like those of Qwen2 and Qwen2.5, and which predicts the same.

Real models of that family have key biases of a hundred and more in a few channels. Here, per KV head: two random
rotary pairs of channels are scaled up in k_proj and down in q_proj, which changes no score, and a large constant is
added to the bias of the pair that rotates slowest, which adds nearly the same to every score of a query and is lost in
softmax.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PAIRS = 2


def plant(model: Any, *, seed: int, factor: float, bias: float) -> None:
    """Give every layer's keys outlier channels. Weights are modified in place."""
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        keys, queries = block.self_attn.k_proj, block.self_attn.q_proj
        for head in range(heads):
            chosen = torch.randperm(dim // 2 - 1, generator=generator)[:PAIRS]
            for linear, by in ((keys, factor), (queries, 1 / factor)):
                # [KV head, query heads of it, half, pair, ...]
                weight = linear.weight.view(heads, -1, 2, dim // 2, linear.in_features)
                weight[head][:, :, chosen] *= by
                linear.bias.view(heads, -1, 2, dim // 2)[head][:, :, chosen] *= by
            keys.bias.view(heads, 2, dim // 2)[head, :, -1] += torch.tensor([bias, -bias / 2])


def main() -> None:
    """Read a model, plant outliers, write it with its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--factor", type=float, default=30.0)
    parser.add_argument("--bias", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"--out must not exist yet, {args.out} does")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if model.config.model_type != "qwen2":
        sys.exit(f"--model must be a Qwen2 model, whose keys have biases, got {model.config.model_type}")
    with torch.no_grad():
        plant(model, seed=args.seed, factor=args.factor, bias=args.bias)
    model.bfloat16().save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
