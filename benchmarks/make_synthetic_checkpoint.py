"""Write a random bf16 checkpoint of any size, shard by shard, with a small tokenizer and text that fits it.

The weights mean nothing; shapes, names, dtypes, sharding and the tokenizer are those of a real Qwen2 or Llama folder.
Memory stays at one shard whatever the size. Seeded: the same arguments give the same bytes. Normal numbers are drawn
once, 16.8 million of them, and every matrix is put together from stretches of these that begin anywhere: that is as
fast as the disk, where drawing each number takes minutes for a 7B.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

END = "<|endoftext|>"
TEXT_VOCAB = 1500
"""Distinct made-up words of the calibration text."""
DRAWN = 1 << 24
"""Normal numbers that are drawn. Stretches of up to a fourth of them begin at random, so that hardly two rows of a
matrix, and no two blocks, are alike."""


def make_text(seed: int, words: int) -> str:
    """Write ``words`` made-up words as lines of fifteen."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bcdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "il", "os")]
    vocabulary = sorted({"".join(draw.choices(syllables, k=draw.randint(2, 3))) for _ in range(TEXT_VOCAB)})
    chosen = draw.choices(vocabulary, k=words)
    return "\n".join(" ".join(chosen[i : i + 15]) for i in range(0, words, 15)) + "\n"


def write_tokenizer(folder: Path, text: str, *, vocab: int, family: str) -> None:
    """Train a byte-level BPE on the text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX  # forced on every qwen2 folder anyway

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab, 2048),
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer" if family == "qwen2" else "TokenizersBackend",
        "backend": "tokenizers",
        "eos_token": END,
        "pad_token": END,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def tensors(args: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Every tensor's name, shape and standard deviation; 0 stands for ones (a norm)."""
    hidden, inner, heads = args.hidden, args.intermediate, args.heads
    kv = args.kv_heads * (hidden // heads)
    yield "model.embed_tokens.weight", (args.vocab, hidden), 1.0
    for layer in range(args.layers):
        base = f"model.layers.{layer}"
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            yield f"{base}.{name}.weight", (rows, columns), columns**-0.5
            if args.family == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                yield f"{base}.{name}.bias", (rows,), 0.1
        yield f"{base}.input_layernorm.weight", (hidden,), 0
        yield f"{base}.post_attention_layernorm.weight", (hidden,), 0
    yield "model.norm.weight", (hidden,), 0
    if not args.tied:
        yield "lm_head.weight", (args.vocab, hidden), hidden**-0.5


def write_config(args: argparse.Namespace) -> None:
    """Write config.json, with the keys that both this and older transformers need."""
    config = {
        "architectures": ["Qwen2ForCausalLM" if args.family == "qwen2" else "LlamaForCausalLM"],
        "model_type": args.family,
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": args.tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


class Normal:
    """Normal numbers in bfloat16, in any number."""

    def __init__(self, seed: int) -> None:
        """Draw those that all others are taken from."""
        import torch

        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = torch.randn(DRAWN, generator=self.generator).to(torch.bfloat16)

    def matrix(self, shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        """A tensor of a shape; a deviation of 0 stands for ones."""
        import torch

        flat = torch.ones(shape, dtype=torch.bfloat16).flatten()
        if deviation:
            longest = DRAWN // 4
            for piece in flat.split(longest):
                begin = int(torch.randint(DRAWN - longest, (), generator=self.generator))
                torch.mul(self.drawn[begin : begin + piece.numel()], deviation, out=piece)
        return flat.reshape(shape)


def write_weights(args: argparse.Namespace) -> int:
    """Write the shards and their index; return the number of bytes."""
    import torch
    from safetensors.torch import save_file

    element = 2  # bf16
    shards: list[list[tuple[str, tuple[int, ...], float]]] = [[]]
    filled = 0
    for name, shape, deviation in tensors(args):
        size = element * int(torch.Size(shape).numel())
        if filled and filled + size > args.shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape, deviation))
        filled += size

    normal = Normal(args.seed)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        held = {}
        for name, shape, deviation in shard:
            held[name] = normal.matrix(shape, deviation)
            total += held[name].nbytes
            weight_map[name] = file
        save_file(held, args.out / file, metadata={"format": "pt"})
        (args.out / file).chmod(0o644)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (args.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return total


def parse() -> argparse.Namespace:
    """Read the arguments; the defaults make the 2.7 GB model of the memory benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write; OUT-calibration.txt is written beside it")
    parser.add_argument("--family", choices=("qwen2", "llama"), default="qwen2")
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--untied", dest="tied", action="store_false", help="write an lm_head of its own")
    parser.add_argument("--shard-bytes", type=int, default=500_000_000)
    parser.add_argument(
        "--text-words", type=int, default=30_000, help="words of calibration text, one or two tokens each"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=False)
    text = make_text(args.seed, args.text_words)
    args.out.with_name(f"{args.out.name}-calibration.txt").write_text(text, encoding="utf-8")
    write_tokenizer(args.out, text, vocab=args.vocab, family=args.family)
    total = write_weights(args)
    write_config(args)  # last, so that a folder with a config is a finished one
    print(f"{args.out.name}: {args.layers} blocks, {total / 1e9:.3f} GB of bf16 weights")


if __name__ == "__main__":
    main()
