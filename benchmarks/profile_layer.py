"""Where the CPU seconds go when one wide Llama block is quantized: the profile of benchmarks/README.md.

The same block as the job ``layer`` of bench_vs_gptqmodel.py (hidden 2048, intermediate 5632, 64 x 256 tokens, one
thread), in memory, random weights and tokens.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qquant import moments, solver, walk
from qquant.calibrate import samples_from_ids
from qquant.capture import capture
from qquant.config import QuantizeConfig
from qquant.sources import LoadedModel

SPENT: dict[str, float] = {}


def timed(owner: Any, name: str, label: str) -> None:
    """Replace ``owner.name`` by itself with a stopwatch."""
    plain: Callable[..., Any] = getattr(owner, name)

    def watched(*args: Any, **options: Any) -> Any:
        began = time.process_time()
        try:
            return plain(*args, **options)
        finally:
            SPENT[label] = SPENT.get(label, 0.0) + time.process_time() - began

    setattr(owner, name, watched)


def main() -> None:
    """Quantize the block once and print a Markdown table."""
    torch.manual_seed(0)
    settings = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=1, num_attention_heads=16, vocab_size=2048
    )
    source = LoadedModel(LlamaForCausalLM._from_config(settings, dtype=torch.bfloat16).eval())
    ids = torch.randint(0, 2048, (64, 256), generator=torch.Generator().manual_seed(0))
    timed(walk, "input_of", "forward up to each linear (bfloat16)")
    timed(moments.Hessian, "add", "Hessians")
    timed(solver, "inverse_factor", "Cholesky factor and its inverse")
    timed(solver, "_quantize_columns", "column loop")
    timed(solver, "_fit", "of the column loop: fitting grids")
    timed(walk, "relative_error", "error for the log")
    began = time.process_time()
    stream = capture(source, samples_from_ids(ids), "cpu")
    walk.Walk(source, QuantizeConfig(method="gptq"), lambda *_: None).run(stream)
    whole = time.process_time() - began
    known = sum(seconds for label, seconds in SPENT.items() if not label.startswith("of "))
    print("| stage | CPU s |\n|---|---|")
    for label, seconds in SPENT.items():
        print(f"| {label} | {seconds:.1f} |")
    print(
        f"| rest: outputs of the last linears, putting weights in place | {whole - known:.1f} |\n| all | {whole:.1f} |"
    )
    print("\nMade by: `python benchmarks/profile_layer.py`")


if __name__ == "__main__":
    main()
