"""Cut texts into the token windows that every contestant of bench_quality.py is given, and write them as JSON.

Each text gives the same share of the windows, drawn without replacement with a fixed seed; then all are shuffled. Runs
as a process of bench_quality.py, so that a tokenizer's memory and time are nobody's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

MOST_TOKENS = 400_000
"""Of each text; what lies behind is not used."""
MOST_CHARACTERS_A_TOKEN = 12


def text_of(path: Path) -> str:
    """A text file as it is, or the strings of each object of a JSONL file, one object after the other."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return text
    items = [json.loads(line) for line in text.splitlines() if line.strip()]
    return "\n\n".join("\n".join(value for value in item.values() if isinstance(value, str)) for item in items)


def draw(windows: Tensor, count: int, *, seed: int) -> Tensor:
    """``count`` of the windows [N, T], in random order."""
    generator = torch.Generator().manual_seed(seed)
    return windows[torch.randperm(len(windows), generator=generator)[:count]]


def cut(tokenizer: object, paths: list[Path], *, count: int, length: int) -> Tensor:
    """Windows [count, length] of int64 token ids, the same number from each text."""
    share, parts = -(-count // len(paths)), []
    for path in paths:
        text = text_of(path)[: MOST_TOKENS * MOST_CHARACTERS_A_TOKEN]
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False))[:MOST_TOKENS]  # type: ignore[attr-defined]
        windows = ids[: len(ids) // length * length].view(-1, length)
        if len(windows) < share:
            raise SystemExit(f"{path.name} holds {len(windows)} windows of {length} tokens, {share} are needed")
        parts.append(draw(windows, share, seed=0))
    return draw(torch.cat(parts), count, seed=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    args = parser.parse_args()
    windows = cut(AutoTokenizer.from_pretrained(args.model), args.texts, count=args.count, length=args.length)
    args.out.write_text(json.dumps(windows.tolist()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
