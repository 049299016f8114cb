"""The shapes of well-known models by name, as config.json has them, for whoever has no folder at hand.

Only what memory and speed depend on; no tokenizer, no generation settings. Sources: the published config.json files.
"""

from __future__ import annotations

from typing import Any

from qquant.errors import UsageError


def _qwen(hidden: int, layers: int, heads: int, inner: int, vocabulary: int, seq_length: int) -> dict[str, Any]:
    # intermediate_size is, in this family's files, twice the width of the MLP.
    return {
        "model_type": "qwen",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "kv_channels": 128,
        "intermediate_size": 2 * inner,
        "vocab_size": vocabulary,
        "seq_length": seq_length,
        "max_position_embeddings": 32768 if inner in (11008, 24576) else 8192,
        "rotary_emb_base": 1000000 if layers == 80 else 10000,
        "use_dynamic_ntk": layers != 80,
        "use_logn_attn": layers != 80,
        "tie_word_embeddings": False,
        "bf16": True,
    }


def _modern(
    family: str,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    inner: int,
    vocabulary: int,
    positions: int,
    tied: bool = False,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
        **more,
    }


_HEAD: dict[str, Any] = {"head_dim": 128}

SIZES: dict[str, dict[str, Any]] = {
    "qwen-1.8b": _qwen(2048, 24, 16, 5504, 151936, 8192),
    "qwen-7b": _qwen(4096, 32, 32, 11008, 151936, 8192),
    "qwen-14b": _qwen(5120, 40, 40, 13696, 152064, 2048),
    "qwen-72b": _qwen(8192, 80, 64, 24576, 152064, 32768),
    "qwen2-0.5b": _modern("qwen2", 896, 24, 14, 2, 4864, 151936, 131072, True),
    "qwen2-1.5b": _modern("qwen2", 1536, 28, 12, 2, 8960, 151936, 131072, True),
    "qwen2-7b": _modern("qwen2", 3584, 28, 28, 4, 18944, 152064, 131072),
    "qwen2-72b": _modern("qwen2", 8192, 80, 64, 8, 29568, 152064, 131072),
    "qwen2.5-0.5b": _modern("qwen2", 896, 24, 14, 2, 4864, 151936, 32768, True),
    "qwen2.5-1.5b": _modern("qwen2", 1536, 28, 12, 2, 8960, 151936, 131072, True),
    "qwen2.5-3b": _modern("qwen2", 2048, 36, 16, 2, 11008, 151936, 32768, True),
    "qwen2.5-7b": _modern("qwen2", 3584, 28, 28, 4, 18944, 152064, 131072),
    "qwen2.5-14b": _modern("qwen2", 5120, 48, 40, 8, 13824, 152064, 131072),
    "qwen2.5-32b": _modern("qwen2", 5120, 64, 40, 8, 27648, 152064, 131072),
    "qwen2.5-72b": _modern("qwen2", 8192, 80, 64, 8, 29568, 152064, 131072),
    "qwen3-0.6b": _modern("qwen3", 1024, 28, 16, 8, 3072, 151936, 40960, True, **_HEAD),
    "qwen3-1.7b": _modern("qwen3", 2048, 28, 16, 8, 6144, 151936, 40960, True, **_HEAD),
    "qwen3-4b": _modern("qwen3", 2560, 36, 32, 8, 9728, 151936, 40960, True, **_HEAD),
    "qwen3-8b": _modern("qwen3", 4096, 36, 32, 8, 12288, 151936, 40960, **_HEAD),
    "qwen3-14b": _modern("qwen3", 5120, 40, 40, 8, 17408, 151936, 40960, **_HEAD),
    "qwen3-32b": _modern("qwen3", 5120, 64, 64, 8, 25600, 151936, 40960, **_HEAD),
    "llama-2-7b": _modern("llama", 4096, 32, 32, 32, 11008, 32000, 4096),
    "llama-2-13b": _modern("llama", 5120, 40, 40, 40, 13824, 32000, 4096),
    "llama-2-70b": _modern("llama", 8192, 80, 64, 8, 28672, 32000, 4096),
    "llama-3-8b": _modern("llama", 4096, 32, 32, 8, 14336, 128256, 8192),
    "llama-3-70b": _modern("llama", 8192, 80, 64, 8, 28672, 128256, 8192),
    "llama-3.1-8b": _modern("llama", 4096, 32, 32, 8, 14336, 128256, 131072),
    "llama-3.1-70b": _modern("llama", 8192, 80, 64, 8, 28672, 128256, 131072),
    "llama-3.1-405b": _modern("llama", 16384, 126, 128, 8, 53248, 128256, 131072),
    "llama-3.2-1b": _modern("llama", 2048, 16, 32, 8, 8192, 128256, 131072, True, head_dim=64),
    "llama-3.2-3b": _modern("llama", 3072, 28, 24, 8, 8192, 128256, 131072, True, **_HEAD),
}
"""Name -> content of config.json. The sizes of one family differ only in these fields."""


def size_config(name: str) -> dict[str, Any]:
    """The content of config.json of a named size, a fresh copy.

    Raises:
        UsageError: no such name; the message lists those there are.
    """
    found = SIZES.get(name.lower())
    if found is None:
        raise UsageError(f"a size must be one of {', '.join(SIZES)}, got {name!r}")
    return dict(found)
