"""Which linear of which layer a tensor's name means, in the words that every family of models shares.

Names only; where the linears of a model are is models/layouts.py's.
"""

from __future__ import annotations

from collections.abc import Iterable

KINDS = ("q", "k", "v", "qkv", "o", "gate", "up", "down")
"""Order in which the linears of a block are shown; names of other kinds follow in their own order."""
_KIND_OF = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up",
    "down_proj": "down", "c_attn": "qkv", "w2": "gate", "w1": "up",
}  # fmt: skip


def layer_of(name: str) -> tuple[str, int] | None:
    """Kind and layer of a linear, as ``model.layers.3.mlp.up_proj`` is ("up", 3); None for a name without a number."""
    *path, leaf = name.split(".")
    layer = next((int(part) for part in path if part.isdecimal()), None)
    if layer is None:
        return None
    if leaf == "c_proj":  # Qwen v1 calls the last linear of both parts of a block so
        return ("o" if "attn" in path else "down"), layer
    return _KIND_OF.get(leaf, leaf), layer


def error_grid(errors: Iterable[tuple[str, float]]) -> dict[tuple[str, int], float]:
    """(kind, layer) -> error, of (name, error); without zeros, for which a logarithmic scale has no place."""
    return {place: error for name, error in errors if error > 0 and (place := layer_of(name)) is not None}


def in_order(kinds: set[str]) -> list[str]:
    """Kinds from the block's first linear to its last."""
    return [kind for kind in KINDS if kind in kinds] + sorted(kinds.difference(KINDS))
