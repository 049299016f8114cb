"""Small random models with a trained tokenizer and calibration text, made on the spot from a seed.

Nothing is downloaded. Used by the interop check and by the makers of golden files; it needs torch, transformers and
tokenizers, of our environment or of the other tools'.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

END = "<|endoftext|>"


def make_text(*, lines: int, seed: int) -> str:
    """Write sentences of made-up words, skewed like a language so that a tokenizer and a Hessian have structure."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "ing")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(400)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    sentences = [" ".join(draw.choices(words, weights, k=draw.randint(6, 20))) for _ in range(lines)]
    return "\n".join(f"{sentence.capitalize()}." for sentence in sentences)


def make_tokenizer(text: str, folder: Path, *, vocab: int) -> int:
    """Train a byte-level BPE with Qwen2's own pre-tokenizer, which transformers puts into every qwen2 folder anyway.

    Returns:
        The id of the end token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.save_pretrained(folder)
    name = folder / "tokenizer_config.json"
    data = json.loads(name.read_text(encoding="utf-8"))
    data["tokenizer_class"] = "Qwen2Tokenizer"
    name.write_text(json.dumps(data, indent=2), encoding="utf-8")
    end: int = tokenizer.get_vocab()[END]
    return end


def make_model(
    folder: Path,
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    vocab: int,
    tied: bool,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> None:
    """Save a random Qwen2 whose every parameter, biases and norms too, is away from its default."""
    folder.mkdir(parents=True, exist_ok=True)
    text = make_text(lines=2000, seed=seed)
    end = make_tokenizer(text, folder, vocab=vocab)
    (folder.parent / f"{folder.name}-calibration.txt").write_text(text, encoding="utf-8")
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    torch.manual_seed(seed)
    model: torch.nn.Module = Qwen2ForCausalLM(config)
    model.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif name.endswith(".bias"):
                # Other readers hold biases in float16, whatever the file says. Those of bf16 models fit; so do these.
                parameter.copy_((0.1 * noise).bfloat16())
            else:
                parameter.copy_(noise if "embed" in name else noise / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)  # type: ignore[operator]


def windows(folder: Path, text: Path, *, count: int, length: int) -> list[list[int]]:
    """Cut the text's token ids into ``count`` windows of ``length`` tokens from its beginning."""
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"))["input_ids"]
    return [ids[i * length : (i + 1) * length] for i in range(count) if len(ids) >= (i + 1) * length]


def main() -> None:
    """Make one model from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--tied", action="store_true")
    a = parser.parse_args()
    make_model(a.folder, hidden=a.hidden, intermediate=a.intermediate, layers=a.layers, vocab=a.vocab, tied=a.tied)


if __name__ == "__main__":
    main()
