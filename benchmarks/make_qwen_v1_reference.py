"""Write the reference model as a checkpoint of the original Qwen (v1) whose seq_length is the length of its training.

The weights are those of examples/reference-model; only their format changes. It is what the report on long contexts was
measured on. Run from the repository's root as ``python -m benchmarks.make_qwen_v1_reference --out FOLDER``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from tests.make_qwen_v1 import as_qwen_v1

TRAINED_AT = 512
"""Tokens per sequence in the training of the reference model, see its README; its config names more."""


def main() -> None:
    """Convert, name the trained length, and put the evaluation text beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("examples/reference-model"), help="a Qwen2 folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--seq-length", type=int, default=TRAINED_AT, help="length that the model was trained at")
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"--out must not exist yet, {args.out} does")
    as_qwen_v1(args.model, args.out)
    file = args.out / "config.json"
    settings = json.loads(file.read_text()) | {"seq_length": args.seq_length, "bf16": True}
    file.write_text(json.dumps(settings, indent=2) + "\n")
    shutil.copyfile(args.model / "eval.txt", args.out / "eval.txt")
    print(args.out)


if __name__ == "__main__":
    main()
