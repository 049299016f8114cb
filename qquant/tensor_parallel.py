"""Over how many cards a model's matrices can be cut, each card with whole heads, whole groups and whole packed words.

Servers cut the linears of a block by their outputs, and those that add to the residual stream by their inputs. Plain
arithmetic on the shapes of stored_bytes.py: shapes.py reads them off a model, padding.py makes its MLP wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from qquant.packing import period
from qquant.stored_bytes import LinearShape, ModelShapes


class Packing(NamedTuple):
    """How a linear is packed."""

    bits: int
    group_size: int
    """-1: its whole row; every card then holds the scales of all its outputs."""


PackingOf = Callable[[str], Packing | None]
"""Full name of a linear -> how it is packed, None: it is not."""


def uncut(shapes: ModelShapes, packing_of: PackingOf, ranks: int) -> str | None:
    """The first thing of a model that cannot be cut over so many cards; None if all can.

    Key and value heads that are fewer than the cards may lie on several of them, a whole number of times. Rows of the
    vocabulary are not looked at, servers fill them up themselves.

    Args:
        shapes: of the model.
        packing_of: of each of its linears.
        ranks: cards, at least 1.

    Returns:
        A phrase such as ``28 query heads by 8``.
    """
    if shapes.query_heads % ranks:
        return f"{shapes.query_heads} query heads by {ranks}"
    for heads in sorted({layer.heads for layer in shapes.caches}):
        if heads % ranks and ranks % heads:
            return f"{heads} key and value heads by {ranks}"
    fewest = min((layer.heads for layer in shapes.caches), default=ranks)
    for linear in shapes.linears:
        # Of heads that lie on several cards each of these has a whole one.
        cards = min(ranks, fewest) if linear.name.endswith((".k_proj", ".v_proj")) else ranks
        if found := _uncut_linear(linear, packing_of(linear.name), cards):
            return found
    return None


def step(linear: LinearShape, packing: Packing | None) -> int:
    """How many inputs of a tail, or outputs of any other linear, cannot be told apart: a card gets a multiple of it."""
    if packing is None:
        return 1
    # Codes are packed along the inputs, zeros along the outputs.
    whole_words = period(packing.bits)[0]
    return math.lcm(whole_words, packing.group_size) if linear.tail and packing.group_size != -1 else whole_words


def padded_width(width: int, linears: Iterable[LinearShape], packing_of: PackingOf, ranks: int) -> int:
    """The least width, not below the present one, at which all of an MLP's linears can be cut over so many cards.

    Args:
        width: outputs of the linears that lead into the MLP, inputs of its tail.
        linears: all of these, of every block.
        packing_of: of each.
        ranks: cards.
    """
    unit = ranks * math.lcm(*(step(linear, packing_of(linear.name)) for linear in linears))
    return -(-width // unit) * unit


def _uncut_linear(linear: LinearShape, packing: Packing | None, ranks: int) -> str | None:
    """Why a matrix cannot be cut: tails along their inputs, in whole groups; others along their outputs."""
    if ranks == 1:
        return None
    side, what = (linear.inputs, "inputs") if linear.tail else (linear.outputs, "outputs")
    if side % (ranks * step(linear, packing)) == 0:
        return None
    if packing is None:
        return f"{linear.name}: {side} {what} by {ranks}"
    size = packing.group_size
    if linear.tail and size != -1 and side % (ranks * size):
        return f"{linear.name}: {side} / {size} = {side / size:g} groups by {ranks}"
    return f"{linear.name}: {side} {what} in whole words by {ranks}"
