"""Makes checkpoints of the original Qwen (v1) in the layout of the official folders, small and without remote code.

``make_qwen_v1`` writes random weights; ``as_qwen_v1`` re-expresses a Qwen2 checkpoint, so that one mathematical model
exists in both formats. As a script: ``python -m tests.make_qwen_v1 FOLDER [qwen.tiktoken]``. Fields and file names are
those of the published folders (2023). What the numbers must be is qwen_reference.py.
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.make_small_vocabulary import small_vocabulary
from tests.weight_files import write_shards

SPECIALS = 208
"""Special tokens after the ranks: <|endoftext|>, <|im_start|>, <|im_end|> and 205 extras."""
FULL_ROWS = 151936
"""Rows of wte and lm_head in the 1.8B and 7B files."""
SIZES: dict[str, dict[str, Any]] = {
    "1.8B": {
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 11008,
        "max_position_embeddings": 8192,
    },
    "7B": {},
    "14B": {
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "intermediate_size": 27392,
        "max_position_embeddings": 8192,
        "seq_length": 2048,
        "vocab_size": 152064,
    },
    "72B": {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "intermediate_size": 49152,
        "rotary_emb_base": 1000000,
        "seq_length": 32768,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
        "vocab_size": 152064,
    },
}
"""What the sizes change in ``PUBLISHED``."""
PUBLISHED: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "initializer_range": 0.02,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 32768,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "softmax_in_fp32": False,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_cache_kernel": False,
    "use_cache_quantization": False,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": FULL_ROWS,
}
"""config.json of the 7B."""
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "kv_channels": 16,
    "max_position_embeddings": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "seq_length": 16,
    "vocab_size": 512,
}
"""What ``make_qwen_v1`` changes in it: a sequence of a few dozen tokens is four times the length of training."""
REMOTE_CODE = ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py")
"""The code files of an official folder; those written here raise if anything imports them."""


def make_qwen_v1(
    folder: Path,
    *,
    chat: bool = True,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocabulary: Path | None = None,
    **config: Any,
) -> Path:
    """Write a random checkpoint into ``folder`` as the official ones are laid out; returns the folder.

    Args:
        folder: created if absent.
        chat: whether generation_config.json is that of a Chat model or that of a base model.
        shards: 1 writes model.safetensors; more write that many files and an index.
        dtype: of every weight on disk.
        seed: of the weights.
        vocabulary: a rank file to copy, and then the 151936 rows of the published models are written; None makes one of
            all bytes and a few pairs, and 512 rows.
        **config: fields of config.json that replace the tiny defaults.
    """
    full = {"vocab_size": FULL_ROWS} if vocabulary is not None else {}
    settings = PUBLISHED | TINY | full | config
    _write_folder(folder, settings, _random_weights(settings, seed, dtype), shards)
    if vocabulary is None:
        _write_ranks(folder / "qwen.tiktoken", _small_vocabulary())
    else:
        shutil.copyfile(vocabulary, folder / "qwen.tiktoken")
    _write_generation_config(folder, chat)
    return folder


def as_qwen_v1(source: Path, folder: Path, *, shards: int = 1) -> Path:
    """Write the Qwen2 checkpoint ``source``, one file and a byte-level tokenizer.json, as v1 into ``folder``.

    Key and value heads are repeated for the queries they serve; q, k and v become the rows of c_attn; gate is w2 and up
    is w1; a tied head is written out. No number changes. Dynamic NTK and LogN stay off: Qwen2 has neither.
    """
    old = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    heads, groups = old["num_attention_heads"], old["num_attention_heads"] // old["num_key_value_heads"]
    size = old["hidden_size"] // heads
    new = {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.ln_f.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).clone(),
    }

    def repeated(part: Tensor) -> Tensor:
        return part.reshape(-1, size, *part.shape[1:]).repeat_interleave(groups, 0).reshape(-1, *part.shape[1:])

    for index in range(old["num_hidden_layers"]):
        theirs, ours = f"model.layers.{index}.", f"transformer.h.{index}."
        for kind in ("weight", "bias"):
            query, key, value = (tensors[f"{theirs}self_attn.{name}_proj.{kind}"] for name in "qkv")
            new[f"{ours}attn.c_attn.{kind}"] = torch.cat((query, repeated(key), repeated(value)))
        for mine, other in {
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
            "attn.c_proj": "self_attn.o_proj",
            "mlp.w1": "mlp.up_proj",
            "mlp.w2": "mlp.gate_proj",
            "mlp.c_proj": "mlp.down_proj",
        }.items():
            new[f"{ours}{mine}.weight"] = tensors[f"{theirs}{other}.weight"]
    settings = PUBLISHED | {
        "hidden_size": old["hidden_size"],
        "intermediate_size": 2 * old["intermediate_size"],
        "kv_channels": size,
        "layer_norm_epsilon": old["rms_norm_eps"],
        "max_position_embeddings": old["max_position_embeddings"],
        "num_attention_heads": heads,
        "num_hidden_layers": old["num_hidden_layers"],
        "rotary_emb_base": int(old["rope_parameters"]["rope_theta"]),
        "seq_length": old["max_position_embeddings"],
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
        "vocab_size": old["vocab_size"],
    }
    _write_folder(folder, settings, new, shards)
    (folder / "qwen.tiktoken").write_bytes(small_vocabulary(source / "tokenizer.json"))
    _write_generation_config(folder, chat=True)
    return folder


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published file and its shape."""
    hidden, width, rows = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (rows, hidden),
        "transformer.ln_f.weight": (hidden,),
        "lm_head.weight": (rows, hidden),
    }
    for index in range(config["num_hidden_layers"]):
        block = {
            "ln_1.weight": (hidden,),
            "ln_2.weight": (hidden,),
            "attn.c_attn.weight": (3 * hidden, hidden),
            "attn.c_attn.bias": (3 * hidden,),
            "attn.c_proj.weight": (hidden, hidden),
            "mlp.w1.weight": (width, hidden),
            "mlp.w2.weight": (width, hidden),
            "mlp.c_proj.weight": (hidden, width),
        }
        if not config["no_bias"]:
            block |= {"attn.c_proj.bias": (hidden,), "mlp.c_proj.bias": (hidden,)}
            block |= {"mlp.w1.bias": (width,), "mlp.w2.bias": (width,)}
        shapes |= {f"transformer.h.{index}.{name}": shape for name, shape in block.items()}
    return shapes


def _random_weights(config: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights under which every part matters: norms off one, biases off zero, attention that looks at positions."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            values = 0.5 * values
        elif len(shape) == 1:
            values = 1 + 0.1 * values
        elif not name.startswith("transformer.wte"):
            values = values / shape[1] ** 0.5
        tensors[name] = values.to(dtype)
    return tensors


def _write_folder(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor], shards: int) -> None:
    """config.json, weights, tokenizer_config.json and the code files, which raise."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer = {
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        "model_max_length": settings["max_position_embeddings"],
        "tokenizer_class": "QWenTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    for file in REMOTE_CODE:
        (folder / file).write_text('raise AssertionError("remote code was run")\n')
    write_shards(folder, tensors, shards)


def _write_generation_config(folder: Path, chat: bool) -> None:
    """generation_config.json with the ids that the folder's rank file gives the end of a document."""
    end = len((folder / "qwen.tiktoken").read_bytes().splitlines())
    common = {"eos_token_id": end, "pad_token_id": end, "max_new_tokens": 512, "do_sample": True, "top_k": 0}
    kind: dict[str, Any] = {"chat_format": "raw", "top_p": 0.8}
    if chat:
        kind = {"chat_format": "chatml", "max_window_size": 6144, "top_p": 0.8, "repetition_penalty": 1.1}
    settings = common | kind | {"transformers_version": "4.31.0"}
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _small_vocabulary() -> list[bytes]:
    """Every byte, and pairs of letters: 288 tokens, so that the specials end below 512 rows."""
    pairs = [f"{first}{second}".encode() for first in "esta" for second in "aeinorst"]
    return [bytes([value]) for value in range(256)] + pairs


def _write_ranks(file: Path, tokens: list[bytes]) -> None:
    """``base64 rank`` per line."""
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    make_qwen_v1(Path(sys.argv[1]), vocabulary=Path(sys.argv[2]) if len(sys.argv) > 2 else None)
