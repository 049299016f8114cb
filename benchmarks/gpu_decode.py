"""Tokens per second of whole models that decode one sequence under a CUDA graph: ours, torch's packed Int4, and BF16.

Random weights at real shapes. A step takes a token, writes its keys and values to a static cache and chooses the next
token; all of it is one captured graph, which is replayed token after token. The roofline is what the bytes of a token
(blocks, scales, output projection, the cache's whole room) take at the copy rate measured in the same run. The Int8
cache is not here: it counts its tokens in Python, so that a replay would write all of them to one place; gpu_profile.py
measures it step by step. What does not fit is a labelled result.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StaticCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_decode import GROUP, bytes_per_token
from benchmarks.on_gpu import ceilings, flush_buffer, graphed, new_record, require_kernels, write_record
from qquant.errors import QquantError
from qquant.linear import QuantLinear
from qquant.models.sizes import SIZES, size_config
from qquant.profile_cell import memory_reason
from qquant.published import SPEED_MEMORY
from qquant.random_models import config_from_dict, random_model
from qquant.records import Precision
from qquant.shapes import model_shapes
from qquant.text_sources import one_line

MODELS = ("qwen-1.8b", "qwen-7b")
TINY = {
    "model_type": "qwen", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_channels": 128,
    "intermediate_size": 1024, "vocab_size": 512, "seq_length": 512, "tie_word_embeddings": False,
}  # fmt: skip
"""A model to try the script with on a CPU."""
PROMPT_TOKENS, ROUND_TOKENS, ROUNDS = 64, 64, 7
ROOM = 192
"""Tokens of the cache: those of a prompt and a round, one for a graph's warm-up, and up to what attention likes."""


class Contestant(NamedTuple):
    """A model and what multiplies in it."""

    name: str
    precision: Precision
    kernel: str
    """As ``QuantLinear`` takes it; "" for a model that is not packed."""
    compiled: bool = False
    """Whether torch.compile joins the small operators between the linears; torch's Int4 it would not trace."""


CONTESTANTS = (
    Contestant("bf16", "bf16", ""),
    Contestant("int8", "int8", "auto"),
    Contestant("int4", "int4", "auto"),
    Contestant("torch_int4", "int4", "torch"),
)
COMPILED = tuple(Contestant(f"{one.name}_compiled", *one[1:3], True) for one in CONTESTANTS if one.kernel != "torch")


class Decoding:
    """A model after a prompt: every step takes the token that the last one chose."""

    def __init__(self, model: Any, *, compiled: bool = False) -> None:
        """Run a random prompt into a static cache; the steps after it may be compiled, at the first of them."""
        drawn = torch.Generator().manual_seed(0)
        prompt = torch.randint(model.config.vocab_size, (1, PROMPT_TOKENS), generator=drawn).to(model.device)
        self.model = model
        self.cache: Any = StaticCache(config=model.config, max_cache_len=ROOM)
        self._forward = model
        self.token = self._chosen(prompt)
        self._first = self.token.clone()
        self._forward = torch.compile(model, dynamic=False) if compiled else model

    def _chosen(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._forward(input_ids=ids, past_key_values=self.cache, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def step(self) -> None:
        """One token; in place, as a graph needs it."""
        self.token.copy_(self._chosen(self.token))

    def rewind(self) -> None:
        """Back to the end of the prompt; what the cache holds beyond it is masked and written again."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(PROMPT_TOKENS)
        self.token.copy_(self._first)

    @property
    def cache_bytes(self) -> int:
        """Of the whole room, all of which a step reads."""
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in self.cache.layers)

    def answer(self, step: Callable[[], object]) -> list[int]:
        """The tokens of one round."""
        self.rewind()
        tokens = []
        for _ in range(ROUND_TOKENS):
            step()
            tokens.append(int(self.token))
        return tokens

    def seconds_per_token(self, step: Callable[[], object]) -> list[float]:
        """Of every round, by the host's clock around all of its work."""
        found = []
        for _ in range(ROUNDS):
            self.rewind()
            int(self.token)  # waits for the device
            began = time.perf_counter()
            for _ in range(ROUND_TOKENS):
                step()
            int(self.token)
            found.append((time.perf_counter() - began) / ROUND_TOKENS)
        return found


def make_model(content: dict[str, Any], contestant: Contestant, device: torch.device) -> Any:
    """A random model whose packed linears run the contestant's kernel; raises UsageError where that is not there."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device, "group_size": GROUP}
    model: Any = random_model(config_from_dict(content), precision=contestant.precision, **options)
    if contestant.kernel == "torch":
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.kernel = "torch"
                module.prepare(torch.bfloat16)
    return model


def measure_contestant(content: Any, contestant: Contestant, copy_gb_s: float | None, device: torch.device) -> Any:
    """One cell: its speed in a graph and without, or a label that says why there is none."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            model = make_model(content, contestant, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            decoding = Decoding(model, compiled=contestant.compiled)
            return measured(decoding, content, contestant.precision, copy_gb_s)
    except (RuntimeError, QquantError) as error:
        reason = memory_reason(error)
        return {"status": "not measured" if reason is None else "out of memory", "reason": reason or one_line(error)}


def measured(decoding: Decoding, content: Any, precision: Precision, copy_gb_s: float | None) -> dict[str, Any]:
    """The figures of a model that has read its prompt."""
    device = decoding.model.device
    plain = decoding.answer(decoding.step)
    step = graphed(decoding.step) if device.type == "cuda" else decoding.step
    replayed = decoding.answer(step)
    rounds = decoding.seconds_per_token(step)
    seconds = statistics.median(rounds)
    needed = bytes_per_token(model_shapes(config_from_dict(content)), precision) + decoding.cache_bytes
    cell: dict[str, Any] = {
        "status": "ok",
        "tokens_per_second": 1 / seconds,
        "tokens_per_second_range": [1 / max(rounds), 1 / min(rounds)],
        "tokens_per_second_no_graph": 1 / statistics.median(decoding.seconds_per_token(decoding.step)),
        "bytes_per_token": needed,
        "gb_s": needed / seconds / 1e9,
        "share_of_roofline": None if copy_gb_s is None else needed / seconds / 1e9 / copy_gb_s,
        # A graph that lost a step, or kept an address that is used for something else, answers otherwise.
        "same_answer_as_without_graph": plain == replayed,
    }
    if device.type == "cuda":
        cell["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return cell


def measure_model(
    name: str, content: Any, copy_gb_s: float | None, device: torch.device, contestants: Sequence[Contestant]
) -> dict[str, Any]:
    """All contestants at one model's shapes, one at a time, with what Qwen's README gives beside them."""
    cells: dict[str, Any] = {}
    for contestant in contestants:
        cells[contestant.name] = cell = measure_contestant(content, contestant, copy_gb_s, device)
        gc.collect()  # what an error's traceback held
        if device.type == "cuda":
            torch.cuda.empty_cache()
        theirs = [one for one in SPEED_MEMORY if (one.model, one.precision) == (name, contestant.precision)]
        if theirs and contestant.kernel != "torch":
            published = {"tokens_per_second": theirs[0].tokens_per_second, "memory_gib": theirs[0].memory_gib}
            cell["published"] = published | {"hardware": theirs[0].hardware}
        print(f"| {name} | {contestant.name} | {' | '.join(shown(cell))} |", flush=True)
    return {"model": name, "contestants": cells, "goals": goals(cells)}


def shown(cell: dict[str, Any]) -> list[str]:
    """A cell as columns of the table."""
    published = f"{cell['published']['tokens_per_second']:.2f}" if "published" in cell else "-"
    if cell["status"] != "ok":
        return [cell["status"], "-", "-", "-", "-", published]
    peak = f"{cell['peak_gib']:.2f}" if "peak_gib" in cell else "not measured"
    share = "-" if cell["share_of_roofline"] is None else f"{cell['share_of_roofline']:.0%}"
    sizes = [f"{1e-6 * cell['bytes_per_token']:.0f}", share, peak]
    return [f"{cell['tokens_per_second']:.1f}", f"{cell['tokens_per_second_no_graph']:.1f}", *sizes, published]


def goals(cells: dict[str, Any]) -> dict[str, Any]:
    """What is to be reached: a share of the roofline, and more tokens than the others; None where one is missing."""

    def ratio(ours: str, other: str) -> float | None:
        pair = [cells[name].get("tokens_per_second") for name in (ours, other)]
        return None if None in pair else pair[0] / pair[1]

    shares = {name: cell.get("share_of_roofline") for name, cell in cells.items()}
    return {
        "share_of_roofline": shares,
        "int4_times_torch_int4": ratio("int4", "torch_int4"),
        "int4_times_bf16": ratio("int4", "bf16"),
        "int8_times_bf16": ratio("int8", "bf16"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the result here as JSON, model by model")
    parser.add_argument("--model", nargs="+", choices=sorted(SIZES), default=MODELS, help="shapes to measure")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile: minutes for each model")
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU and no graph, to try the script")
    args = parser.parse_args()
    contestants = CONTESTANTS + (COMPILED if args.compile else ())
    head = "| model | contestant | tokens/s | without graph | MB / token | of roofline | peak GiB | published |"
    if args.tiny:
        print(f"{head}\n|{'---|' * 8}")
        measure_model("tiny", TINY, None, torch.device("cpu"), contestants)
        return
    require_kernels()
    record = {**new_record("gpu_decode.py", ceilings(flush_buffer())), "runs": ROUNDS}
    record |= {"prompt_tokens": PROMPT_TOKENS, "round_tokens": ROUND_TOKENS, "room_tokens": ROOM, "group_size": GROUP}
    torch.cuda.empty_cache()
    copy_gb_s, device = record["ceilings"]["copy"]["gb_s"], torch.device("cuda", torch.cuda.current_device())
    print(f"{head}\n|{'---|' * 8}")
    for name in args.model:
        found = measure_model(name, size_config(name), copy_gb_s, device, contestants)
        record["models"] = [*record.get("models", []), found]
        write_record(args.out, record)


if __name__ == "__main__":
    main()
