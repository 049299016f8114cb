"""Trains the small Qwen2-architecture model that the repository ships as its default example.

What lives here: tokenizer training, the training loop, resuming, and writing the finished model folder. What
does not: evaluation (`python -m qquant.eval`) and the model card, which is written by hand from measured figures.

    python examples/train_reference_model.py --train books.txt.gz --train code.txt.gz --out reference-model

Every batch is drawn from (seed, step) alone, so an interrupted run continues exactly where its last saved state
was: the same command picks up ``OUT.state/`` and goes on. The state is safetensors and JSON, never pickle.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, gzipped when its name ends in .gz."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8")


def train_tokenizer(texts: list[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE with Qwen2's own normalizer and pre-tokenizer and save it into ``folder``.

    transformers replaces the pre-tokenizer of a qwen2 folder by Qwen2's; training with any other one would give a
    model that sees other tokens than it was trained on.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Paragraphs, not whole files: the trainer then works on short strings and in parallel.
    tokenizer.train_from_iterator((part for text in texts for part in text.split("\n\n")), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )
    fast.save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    settings = json.loads(config_file.read_text())
    settings["tokenizer_class"] = "Qwen2Tokenizer"
    config_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    probe = texts[0][:20_000]
    if AutoTokenizer.from_pretrained(folder)(probe)["input_ids"] != plain.encode(probe).ids:
        raise SystemExit("the saved tokenizer does not give the ids of its own tokenizer.json through AutoTokenizer")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 2% of the run, then a cosine down to 2% of the peak."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def batch_at(step: int, tokens: Tensor, batch: int, seq_len: int, seed: int) -> Tensor:
    """The batch of one step, a pure function of (seed, step): [batch, seq_len + 1] int64."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(0, tokens.numel() - seq_len - 1, (batch,), generator=generator)
    return torch.stack([tokens[s : s + seq_len + 1] for s in starts.tolist()]).long()


def save_state(folder: Path, step: int, model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    """Write weights and optimizer moments for a resume; the pointer last, so a half-written state is ignored."""
    folder.mkdir(parents=True, exist_ok=True)
    named = dict(model.named_parameters())
    tensors = {f"weight.{name}": p.detach() for name, p in named.items()}
    for name, parameter in named.items():
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{name}"] = optimizer.state[parameter][key]
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, folder / f"step-{step}.safetensors")
    pointer = folder / "latest.json.part"
    pointer.write_text(json.dumps({"step": step}))
    pointer.replace(folder / "latest.json")
    for old in folder.glob("step-*.safetensors"):
        if old.name != f"step-{step}.safetensors":
            old.unlink()


def load_state(folder: Path, model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    """Restore the last saved state into ``model`` and ``optimizer``; returns the step to go on from (0: none)."""
    pointer = folder / "latest.json"
    if not pointer.exists():
        return 0
    step = int(json.loads(pointer.read_text())["step"])
    tensors = load_file(folder / f"step-{step}.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
            }
    return step


def main() -> None:
    """Train, or go on training, and write the model folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--train", type=Path, action="append", required=True, help="text file, .gz allowed; repeatable")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (needs a C++ compiler)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    texts = [read_text(path) for path in args.train]
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.json").exists():
        train_tokenizer(texts, args.vocab_size, args.out)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    ids = [i for text in texts for e in tokenizer.encode_batch(text.split("\n\n\n\n")) for i in [*e.ids, end]]
    tokens = torch.tensor(ids, dtype=torch.int32)
    print(f"{tokens.numel():,} training tokens", flush=True)

    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    config._attn_implementation = "sdpa"
    model = Qwen2ForCausalLM(config).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    state = args.out.with_name(args.out.name + ".state")
    first = load_state(state, model, optimizer)
    forward = torch.compile(model) if args.compile else model

    model.train()
    began = time.monotonic()
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        batch = batch_at(step, tokens, args.batch, args.seq_len, args.seed).to(args.device)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0:
            pace = (time.monotonic() - began) / (step + 1 - first)
            print(f"step {step + 1}/{args.steps} loss {loss.item():.3f} {pace:.2f} s/step", flush=True)
        if (step + 1) % args.save_every == 0:
            save_state(state, step + 1, model, optimizer)

    model.eval().to(torch.bfloat16).save_pretrained(args.out)
    GenerationConfig(eos_token_id=end, pad_token_id=end, do_sample=False).save_pretrained(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
