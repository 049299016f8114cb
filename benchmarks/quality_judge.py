"""How far a quantized model folder is from its original on held-out windows, in float32: one judge for all contestants.

A GPTQ folder is read by qquant's own loader and its linears replaced by plain ones of the dequantized values; a folder
of plain weights is taken as it is. Runs as a process of bench_quality.py and prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.bench_options import unpacked
from qquant.checkpoint import is_quantized, load_quantized

BATCH = 8
"""Windows that run through a model at once."""


def load_plain(folder: Path) -> Any:
    """A model that is not quantized, computing in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_result(folder: Path) -> Any:
    """What a contestant left, as a float32 model of plain linears."""
    if not is_quantized(folder):
        return load_plain(folder)
    return unpacked(load_quantized(folder, dtype=torch.float32, kernel="reference")).eval()


def changed_linears(original: nn.Module, result: nn.Module) -> int:
    """How many linears have other weights than in the original."""
    after = {name: layer.weight for name, layer in result.named_modules() if isinstance(layer, nn.Linear)}
    before = {name: layer.weight for name, layer in original.named_modules() if name in after}
    return sum(not torch.equal(weight, after[name]) for name, weight in before.items())


@torch.inference_mode()
def judge(original: Any, result: Any, windows: Tensor) -> dict[str, float]:
    """Mean KL(original || result) in nats, share of equal top tokens, and both perplexities, over all tokens [N, T].

    The standard error is that of the difference of the perplexities, with windows as what was drawn.
    """
    kl = agreement = 0.0
    surprise, surprise_before = [], []
    for batch in windows.split(BATCH):
        before = original(batch, use_cache=False).logits.log_softmax(-1)
        after = result(batch, use_cache=False).logits.log_softmax(-1)
        kl += float((before.exp() * (before - after)).sum(-1).double().sum())
        agreement += float((before.argmax(-1) == after.argmax(-1)).double().sum())
        following = batch[:, 1:, None]
        surprise.append(-after[:, :-1].gather(-1, following).double().mean((1, 2)))
        surprise_before.append(-before[:, :-1].gather(-1, following).double().mean((1, 2)))
    of_result, of_original = torch.cat(surprise), torch.cat(surprise_before)
    perplexity = math.exp(float(of_result.mean()))
    return {
        "mean_kl_nats": kl / windows.numel(),
        "agreement": agreement / windows.numel(),
        "perplexity": perplexity,
        "perplexity_of_original": math.exp(float(of_original.mean())),
        "perplexity_gap_error": perplexity * float((of_result - of_original).std()) / math.sqrt(len(windows)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("original", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("windows", type=Path, help="JSON list of lists of token ids")
    args = parser.parse_args()
    torch.set_num_threads(1)
    original, result = load_plain(args.original), load_result(args.result)
    windows = torch.tensor(json.loads(args.windows.read_text(encoding="utf-8")))
    figures: dict[str, float] = {"linears": changed_linears(original, result), **judge(original, result, windows)}
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
