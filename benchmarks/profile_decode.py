"""Where the time of one decode step goes: thread CPU time by class of module, without what modules inside it take.

The model is as in bench_decode.py: random weights at real shapes, one thread. Hooks are global ones, because a packed
linear with a hook of its own is not computed together with its siblings; they cost some microseconds a module.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import DynamicCache

from benchmarks.bench_decode import GROUP, LAYERS, PRECISIONS, PROMPT_TOKENS
from qquant.kv_cache_quant import Int8KVCache
from qquant.measure import step_fn
from qquant.models.sizes import size_config
from qquant.random_models import config_from_dict, random_model


class Stopwatch:
    """Seconds and calls of each class of module, while it listens."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._inside: list[list[float]] = []  # begin, and what inner modules took

    def enter(self, module: Any, inputs: Any) -> None:
        """A module begins."""
        self._inside.append([time.thread_time(), 0.0])

    def leave(self, module: Any, inputs: Any, output: Any) -> None:
        """A module has ended."""
        began, inner = self._inside.pop()
        took = time.thread_time() - began
        name = type(module).__name__
        self.seconds[name] += took - inner
        self.calls[name] += 1
        if self._inside:
            self._inside[-1][1] += took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-0.5b", help="a name of qquant.models.sizes")
    parser.add_argument("--precision", choices=PRECISIONS, default="int4")
    parser.add_argument("--kv-cache", choices=("bf16", "int8"), default="bf16")
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = size_config(args.model)
    config["num_hidden_layers"] = LAYERS.get(args.model) or config["num_hidden_layers"]
    kind, device = config_from_dict(config), torch.device("cpu")
    model: Any = random_model(kind, precision=args.precision, dtype=torch.bfloat16, device=device, group_size=GROUP)
    step = step_fn(model)
    held: Any = Int8KVCache(model.config) if args.kv_cache == "int8" else DynamicCache(config=model.config)
    watch = Stopwatch()
    with torch.inference_mode():
        logits, held = step(torch.randint(model.config.vocab_size, (1, PROMPT_TOKENS)), held)
        for _ in range(2):
            logits, held = step(logits.argmax(-1, keepdim=True), held)
        began = time.thread_time()
        for _ in range(args.new_tokens):
            logits, held = step(logits.argmax(-1, keepdim=True), held)
        plain = (time.thread_time() - began) / args.new_tokens
        hooks = register_module_forward_pre_hook(watch.enter), register_module_forward_hook(watch.leave)
        for _ in range(args.new_tokens):
            logits, held = step(logits.argmax(-1, keepdim=True), held)
    for hook in hooks:
        hook.remove()
    total = sum(watch.seconds.values()) / args.new_tokens
    print(f"{args.model}, {args.precision}, {args.kv_cache} cache: {1e3 * plain:.1f} ms a token of thread CPU time,")
    print(f"{1e3 * total:.1f} with the hooks. Of that, by class of module, without the modules inside it:\n")
    print("| module | calls | ms | share |\n|---|---|---|---|")
    for name, seconds in sorted(watch.seconds.items(), key=lambda found: -found[1]):
        spent = seconds / args.new_tokens
        print(f"| {name} | {watch.calls[name] // args.new_tokens} | {1e3 * spent:.2f} | {spent / total:.0%} |")


if __name__ == "__main__":
    main()
