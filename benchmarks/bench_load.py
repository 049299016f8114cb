"""How long a quantized checkpoint takes to load, and how much memory at its peak, beside the bytes of its files.

A checkpoint of random words at the shapes of a known model is written tensor by tensor, so that writing it takes little
memory. Every load is a process of its own: its peak is the kernel's count for that process, interpreter and libraries
included, as ``qquant.measure.MemoryMeter`` reads it. What the model says means nothing and is not looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAKE, LOAD = "--make-into", "--load-from"
_PIECE_VALUES = 1 << 22


def write_checkpoint(args: argparse.Namespace) -> None:
    """Write the folder ``args.make_into``: config.json with the keys of a GPTQ checkpoint, and its shards."""
    import torch

    from qquant.checkpoint import quantization_keys
    from qquant.config import QuantizeConfig
    from qquant.model_folder import skeleton
    from qquant.models.layouts import block_list, find_layout, linears
    from qquant.models.sizes import size_config
    from qquant.random_models import config_from_dict
    from qquant.shard_writer import ShardWriter
    from qquant.shards import DTYPE_NAMES, TensorSpec

    content = size_config(args.size)
    for key, wanted in (("num_hidden_layers", args.layers), ("vocab_size", args.vocabulary)):
        content[key] = wanted or content[key]
    content["dtype"] = args.stored
    options = QuantizeConfig(method="gptq", bits=args.bits, group_size=args.group_size, act_group_aware=False)
    folder: Path = args.make_into
    model: Any = skeleton(config_from_dict(content), folder, getattr(torch, args.stored))
    layout = find_layout(model, content["model_type"])
    packed = {
        f"{layout.blocks}.{index}.{inner}": (layer.in_features, layer.out_features)
        for index, block in enumerate(block_list(model, layout))
        for inner, layer in linears(block).items()
    }
    plan: dict[str, TensorSpec] = {}
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if name in (getattr(model, "all_tied_weights_keys", None) or {}):
            continue
        if leaf != "weight" or path not in packed:
            plan[name] = TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            continue
        rows, columns = packed[path]
        groups = -(-rows // args.group_size)
        plan[f"{path}.qweight"] = TensorSpec("I32", (rows * args.bits // 32, columns))
        plan[f"{path}.qzeros"] = TensorSpec("I32", (groups, columns * args.bits // 32))
        plan[f"{path}.scales"] = TensorSpec("F16", (groups, columns))
        plan[f"{path}.g_idx"] = TensorSpec("I32", (rows,))
    writer = ShardWriter(folder, plan, max_shard_bytes=args.shard_bytes)
    generator = torch.Generator().manual_seed(args.seed)
    for name, spec in plan.items():
        writer.write_chunks(name, _chunks(name, spec, args, generator))
    writer.close()
    content["quantization_config"] = quantization_keys(options, list(packed), [])
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def _chunks(name: str, spec: Any, args: argparse.Namespace, generator: Any) -> Iterator[Any]:
    """Values of one tensor, a piece at a time: random codes and weights, symmetric zeros, groups in order."""
    import torch

    from qquant.packing import in_order
    from qquant.shards import DTYPES

    leaf, count = name.rpartition(".")[2], spec.nbytes // DTYPES[spec.dtype].itemsize
    middle = 2 ** (args.bits - 1) - 1  # as version 1 of the format stores it
    word = sum(middle << shift for shift in range(0, 32, args.bits))
    if leaf == "g_idx":
        yield in_order(count, args.group_size, "cpu").to(torch.int32)
        return
    while count:
        size = min(count, _PIECE_VALUES)
        count -= size
        if leaf == "qweight":
            words = torch.randint(-(2**63), 2**63 - 1, ((size + 1) // 2,), generator=generator)
            yield words.view(torch.int32)[:size]
        elif leaf == "qzeros":
            yield torch.full((size,), word, dtype=torch.int64).to(torch.int32)
        elif leaf == "scales":
            yield ((torch.rand(size, generator=generator) + 0.5) * 0.01).to(torch.float16)
        else:
            yield (torch.randn(size, generator=generator) * 0.02).to(DTYPES[spec.dtype])


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Load the folder in this process, which must be a fresh one, and say what it cost."""
    import torch

    import qquant
    from qquant.measure import MemoryMeter, weights_bytes
    from qquant.model_folder import read_config, skeleton

    file_bytes = weights_bytes(args.load_from)
    load_quantized = qquant.load_quantized
    skeleton(read_config(args.load_from), args.load_from)  # so that the model's code is imported before the loading
    meter = MemoryMeter(torch.device("cpu"))
    wall, cpu = time.perf_counter(), time.process_time()
    model = load_quantized(args.load_from, dtype=getattr(torch, args.dtype), kernel=args.kernels[0])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    loaded = meter.read(model)
    result = {
        "kernel": args.kernels[0],
        "dtype": args.dtype,
        "load_wall_s": round(wall, 2),
        "load_cpu_s": round(cpu, 2),
        "file_bytes": file_bytes,
        "tensor_bytes": loaded.tensor_bytes,
        "rss_before_bytes": loaded.rss_before_bytes,
        "peak_rss_bytes": loaded.peak_rss_bytes,
        "peak_source": loaded.peak_rss_source,
        "peak_to_file_ratio": round((loaded.peak_rss_bytes or 0) / file_bytes, 3),
        "added_to_file_ratio": round(((loaded.peak_rss_bytes or 0) - (loaded.rss_before_bytes or 0)) / file_bytes, 3),
    }
    if args.token:
        with torch.inference_mode():
            wall = time.perf_counter()
            model(input_ids=torch.tensor([[1]]))
        result["first_token_wall_s"] = round(time.perf_counter() - wall, 2)
        result["peak_rss_after_token_bytes"] = meter.read().peak_rss_bytes
    if args.save:
        result |= _saved(model, args.load_from)
    return result


def _saved(model: Any, folder: Path) -> dict[str, Any]:
    """Save the model beside its folder, measured likewise, and take the copy away again."""
    import torch

    from qquant.measure import MemoryMeter

    with tempfile.TemporaryDirectory(dir=folder.parent) as again:
        meter = MemoryMeter(torch.device("cpu"))
        wall = time.perf_counter()
        model.save_pretrained(again)
        wall = time.perf_counter() - wall
    cost = meter.read()
    before, peak = cost.rss_before_bytes, cost.peak_rss_bytes
    return {"save_wall_s": round(wall, 2), "rss_before_saving_bytes": before, "peak_rss_of_saving_bytes": peak}


def drop_cached(folder: Path) -> None:
    """Ask the kernel to forget the folder's files, so that the next load reads the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(args: argparse.Namespace, *words: str) -> str:
    """Run this file again in a fresh process with the same options; returns what it printed."""
    command = [sys.executable, __file__, *words]
    for name in ("size", "layers", "vocabulary", "bits", "group_size", "stored", "dtype", "shard_bytes", "seed"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--token"] * args.token + ["--save"] * args.save
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the arguments, those of the command line unless others are given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="qwen2.5-7b", help="a name of qquant/models/sizes.py")
    parser.add_argument("--layers", type=int, default=0, help="blocks; 0: as many as the size has")
    parser.add_argument("--vocabulary", type=int, default=0, help="rows of the embedding; 0: as many as the size has")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--stored", default="bfloat16", choices=("bfloat16", "float16"), help="of what is not packed")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="compute dtype")
    parser.add_argument("--kernels", nargs="+", default=["auto", "reference"])
    parser.add_argument(
        "--file-caches",
        nargs="+",
        default=["cold", "warm"],
        choices=("cold", "warm"),
        help="whether files are read anew",
    )
    parser.add_argument("--shard-bytes", type=int, default=4_000_000_000)
    parser.add_argument(
        "--token", action="store_true", help="also run one token: what was not read while loading is then"
    )
    parser.add_argument("--save", action="store_true", help="also save the loaded model and measure that")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint goes; it must not be there yet unless it is one"
    )
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(MAKE, type=Path, help=argparse.SUPPRESS)
    parser.add_argument(LOAD, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    args = parse()
    if args.make_into:
        write_checkpoint(args)
        return
    if args.load_from:
        print(json.dumps(load(args)))
        return
    folder: Path = args.folder or Path(tempfile.mkdtemp(prefix="qquant-load-"))
    try:
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            child(args, MAKE, str(folder))
        rows = []
        for cache in args.file_caches:
            for kernel in args.kernels:
                if cache == "cold":
                    drop_cached(folder)
                rows.append({"file_cache": cache, **json.loads(child(args, LOAD, str(folder), "--kernels", kernel))})
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    text = json.dumps({"size": args.size, "bits": args.bits, "group_size": args.group_size, "loads": rows}, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
