"""The original Qwen's arithmetic, slow and in float64 numpy, written from its formulas; imported by tests only.

One function per formula, and one sequence at a time: no batch, no cache, no padding, no mask but the triangle. What a
batched, cached or chunked run must give is therefore what its row gives here alone, with the NTK alpha of its prefill.
Nothing of qquant, torch or transformers is imported: weights come as arrays under their published names, settings as
the plain dict of config.json.

Where the published system differs by defect, this does not follow it: positions count from a row's first token, alpha
belongs to the row, and no token sees a later one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Cast = Callable[[Array], Array]


def exact(values: Array) -> Array:
    """Keep every bit: the reference itself."""
    return values


def bfloat16(values: Array) -> Array:
    """Round to the nearest bfloat16, ties to even: the upper 16 bits of a float32."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def rms_norm(x: Array, weight: Array, eps: float, cast: Cast = exact) -> Array:
    """x / sqrt(mean(x^2) + eps), rounded to the dtype of x, and only then times the weight. x: [..., H]."""
    normed: Array = cast(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps))
    return cast(np.asarray(normed * weight))


def ntk_alpha(length: int, seq_length: int) -> float:
    """max(2^ceil(log2(n / S) + 1) - 1, 1): 1 up to S, 3 up to 2S, 7 up to 4S, 15 up to 8S."""
    return float(max(2 ** math.ceil(math.log2(length / seq_length) + 1) - 1, 1))


def rope_angles(positions: Sequence[int], width: int, base: float, alpha: float) -> Array:
    """angle(p, i) = p * b^(-2i/d) with b = base * alpha^(d/(d-2)). Returns [T, d/2] radians."""
    stretched = base * alpha ** (width / (width - 2))
    frequencies = np.array([stretched ** (-2 * i / width) for i in range(width // 2)])
    angles: Array = np.array(positions, dtype=np.float64)[:, None] * frequencies[None, :]
    return angles


def rope(x: Array, angles: Array) -> Array:
    """Turn the pairs (x_i, x_{i + d/2}) of the first d channels; the others pass through. x: [T, heads, D]."""
    half = angles.shape[-1]
    turned = x.copy()
    for i in range(half):
        cos, sin = np.cos(angles[:, i])[:, None], np.sin(angles[:, i])[:, None]
        first, second = x[:, :, i], x[:, :, i + half]
        turned[:, :, i] = first * cos - second * sin
        turned[:, :, i + half] = second * cos + first * sin
    return turned


def logn(position: int, seq_length: int) -> float:
    """ln(p + 1) / ln(S) for a query whose 0-based position p has p + 1 > S, else 1."""
    return math.log(position + 1) / math.log(seq_length) if position + 1 > seq_length else 1.0


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    found: Array = x / (1 + np.exp(-x))
    return found


def linear(x: Array, tensors: Mapping[str, Array], name: str, cast: Cast = exact) -> Array:
    """x W^T + b, with b where the file has one."""
    return cast(x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", np.zeros(())))


def mlp(x: Array, tensors: Mapping[str, Array], cast: Cast = exact) -> Array:
    """c_proj(w1(x) * silu(w2(x))). x: [T, H]; tensors are those below ``mlp.``."""
    up, gate = linear(x, tensors, "w1", cast), linear(x, tensors, "w2", cast)
    return linear(cast(up * cast(silu(gate))), tensors, "c_proj", cast)


def softmax(scores: Array) -> Array:
    """Over the last axis."""
    raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


def attend(q: Array, k: Array, v: Array, cast: Cast = exact) -> Array:
    """Causal attention of one sequence: token t sees tokens 0 .. t. All [T, heads, D]."""
    tokens, heads, channels = q.shape
    out = np.zeros_like(q)
    for head in range(heads):
        for t in range(tokens):
            scores = cast(q[t, head] @ k[: t + 1, head].T / math.sqrt(channels))
            out[t, head] = cast(softmax(scores)) @ v[: t + 1, head]
    return cast(out)


class Settings:
    """What the formulas need of a config.json, under the names of section 1.2."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read the dict; fields of no effect are not looked at."""
        self.layers = int(config["num_hidden_layers"])
        self.heads = int(config["num_attention_heads"])
        self.channels = int(config["kv_channels"])
        self.rotated = int(self.channels * config["rotary_pct"])
        self.base = float(config["rotary_emb_base"])
        self.eps = float(config["layer_norm_epsilon"])
        self.seq_length = int(config["seq_length"])
        self.ntk = bool(config["use_dynamic_ntk"])
        self.logn = bool(config["use_logn_attn"])


def attention(
    x: Array,
    settings: Settings,
    tensors: Mapping[str, Array],
    positions: Sequence[int],
    alpha: float,
    scale_queries: bool,
    cast: Cast = exact,
) -> Array:
    """c_proj(attend(RoPE(q) * LogN, RoPE(k), v)) of one block. x: [T, H]; tensors are those below ``attn.``.

    Rows of c_attn are q, then k, then v. Keys are never scaled.
    """
    tokens = x.shape[0]
    packed = linear(x, tensors, "c_attn", cast)
    q, k, v = (part.reshape(tokens, settings.heads, settings.channels) for part in np.split(packed, 3, axis=-1))
    angles = rope_angles(positions, settings.rotated, settings.base, alpha)
    q, k = cast(rope(q, angles)), cast(rope(k, angles))
    if scale_queries:
        factors = np.array([logn(p, settings.seq_length) for p in positions])
        q = cast(q * cast(factors)[:, None, None])
    return linear(attend(q, k, v, cast).reshape(tokens, -1), tensors, "c_proj", cast)


def below(tensors: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """Those whose name starts with ``prefix``, without it."""
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


def forward(
    tensors: Mapping[str, Array],
    config: Mapping[str, Any],
    ids: Sequence[int],
    *,
    prefill: int | None = None,
    training: bool = False,
    positions: Sequence[int] | None = None,
    embeddings: Array | None = None,
    cast: Cast = exact,
) -> tuple[Array, list[Array]]:
    """Logits and hidden states of one sequence.

    Args:
        tensors: float64 arrays under the published names.
        config: the fields of config.json.
        ids: token ids of the sequence, without padding.
        prefill: tokens of the sequence that were there when alpha was fixed; all of them if None.
        training: neither NTK nor LogN.
        positions: of the tokens, where they are not 0, 1, 2, ...
        embeddings: [T, H] in place of the rows of wte.
        cast: rounding after every operation; ``exact`` for the reference, ``bfloat16`` for what a plain computation in
            that dtype loses.

    Returns:
        logits: [T, V].
        hidden states: L + 1 arrays [T, H]: the embedding, then each block's output, the last one after ln_f.
    """
    settings = Settings(config)
    x = tensors["transformer.wte.weight"][np.array(ids)] if embeddings is None else embeddings
    tokens = x.shape[0]
    where = list(range(tokens)) if positions is None else positions
    length = tokens if prefill is None else prefill
    alpha = ntk_alpha(length, settings.seq_length) if settings.ntk and not training else 1.0
    scale_queries = settings.logn and not training and tokens > settings.seq_length
    states = [x]
    for layer in range(settings.layers):
        block = below(tensors, f"transformer.h.{layer}.")
        normed = rms_norm(x, block["ln_1.weight"], settings.eps, cast)
        x = cast(x + attention(normed, settings, below(block, "attn."), where, alpha, scale_queries, cast))
        normed = rms_norm(x, block["ln_2.weight"], settings.eps, cast)
        x = cast(x + mlp(normed, below(block, "mlp."), cast))
        states.append(x)
    states[-1] = rms_norm(x, tensors["transformer.ln_f.weight"], settings.eps, cast)
    return linear(states[-1], tensors, "lm_head", cast), states
