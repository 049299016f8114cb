"""The shapes of a model, and the bytes that its weights and KV cache are stored in.

Plain arithmetic, exact to the byte: it must give what packed_weight.py, kv_store.py and a checkpoint really hold. What
a run takes beyond that is footprint.py's; shapes.py reads shapes off a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from qquant.errors import UsageError
from qquant.records import KVKind, Precision

ELEMENT_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
BITS: dict[Precision, int] = {"int8": 8, "int4": 4}

RESERVE_AHEAD = 1024
# Of kv_store.TokenStore and kv_ops; tests hold them against the cache itself.
_STEP, _GROWTH = 64, 32
_INT4_GROUP = 32
_MOST_ASKED = 1 << 40
_RANGE_BYTES = 4
"""Scale and zero of one stored vector, float16 each."""
_PANEL_ROWS = 16
"""Of panels.py; a test holds it against that."""


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """One linear layer of a block, by its full name."""

    name: str
    inputs: int
    outputs: int
    bias: bool
    tail: bool
    """Whether it adds to the residual stream: such a one is cut by inputs over several cards, any other by outputs."""

    @property
    def weights(self) -> int:
        """Elements of the matrix."""
        return self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What one attention layer keeps of every token."""

    heads: int
    """Of keys and values."""
    key_dim: int
    value_dim: int
    window: int | None
    """Tokens that a sliding layer sees; None: all."""


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """All of a model that its memory depends on."""

    model_type: str
    parameters: int
    """Elements of all parameters, tied ones once."""
    linears: tuple[LinearShape, ...]
    """Those of the blocks, which a quantizer packs, in model order."""
    caches: tuple[CacheShape, ...]
    """One per layer with keys and values."""
    stages: tuple[tuple[int, int], ...]
    """Of one block: inputs, and outputs together, of the linears that share an input and are solved as one."""
    largest_tensor: int
    """Elements of the largest parameter."""
    hidden: int
    query_heads: int
    query_width: int
    """Query heads times head size."""
    query_norms: bool
    """Whether each head of the queries is normalised in float32, as in Qwen3."""
    vocabulary: int
    """Rows of the output projection, padding included."""
    tied: bool
    """Whether it shares the embedding's memory."""
    embedding_parameters: int
    """Elements of the embedding and of the output projection, tied ones once."""
    positions: int | None
    """Tokens that the model was made for, as its configuration says."""


def packed_bytes(linear: LinearShape, bits: int, group_size: int) -> int:
    """Bytes of a packed matrix in a file: qweight, qzeros, float16 scales, g_idx; see docs/checkpoint-format.md."""
    groups = 1 if group_size == -1 else -(-linear.inputs // group_size)
    zeros_and_scales = groups * linear.outputs * bits // 8 + 2 * groups * linear.outputs
    return linear.weights * bits // 8 + zeros_and_scales + 4 * linear.inputs


def panel_bytes(linear: LinearShape, bits: int, group_size: int) -> int:
    """Bytes of a packed linear in memory, ``packed_weight.PackedWeight`` once packed: words, float16 scales, the bias.

    Zeros are one number and columns in order, as this package's quantizer leaves them: asymmetric zeros would add a
    byte per group and row, act-order 4 bytes per column. Only groups that do not fill words have an order here, each
    linear its own; siblings would share it.
    """
    step = 32 // bits
    size = linear.inputs if group_size == -1 else group_size
    groups = -(-linear.inputs // size)
    gathered = size % step != 0
    columns = groups * -(-size // step) * step if gathered else linear.inputs
    rows = -(-linear.outputs // _PANEL_ROWS) * _PANEL_ROWS
    # The bias is float32 whatever a file holds.
    return rows * (columns * bits // 8 + 2 * groups + 4 * linear.bias) + 4 * columns * gathered


def weights_bytes(shapes: ModelShapes, precision: Precision, *, group_size: int = 128, element_bytes: int = 2) -> int:
    """Bytes of a model's tensors as files hold them; of one that is not packed also in memory.

    Args:
        shapes: of the model.
        precision: of the blocks' linears; for a plain one of the whole model.
        group_size: of packed linears.
        element_bytes: of what is not packed: embeddings, norms, biases.

    Raises:
        UsageError: a precision that there is no formula for.
    """
    if precision in ELEMENT_BYTES:
        return shapes.parameters * ELEMENT_BYTES[precision]
    if precision not in BITS:
        raise UsageError(f"memory is predicted for {', '.join([*ELEMENT_BYTES, *BITS])}, got {precision}")
    unpacked = shapes.parameters - sum(linear.weights for linear in shapes.linears)
    return unpacked * element_bytes + sum(packed_bytes(x, BITS[precision], group_size) for x in shapes.linears)


def held_bytes(shapes: ModelShapes, precision: Precision, *, group_size: int = 128, element_bytes: int = 2) -> int:
    """The same once the model is loaded: packed linears are in panels, and in nothing else."""
    if precision not in BITS:
        return weights_bytes(shapes, precision, group_size=group_size, element_bytes=element_bytes)
    unpacked = shapes.parameters - sum(x.weights + x.bias * x.outputs for x in shapes.linears)
    return unpacked * element_bytes + sum(panel_bytes(x, BITS[precision], group_size) for x in shapes.linears)


def stage_bytes(shapes: ModelShapes, precision: Precision, *, group_size: int = 128) -> int:
    """Bytes in a file of the largest set of packed linears that share an input, without biases; 0 if none is packed."""
    if precision not in BITS:
        return 0
    together = (
        LinearShape(name="", inputs=inputs, outputs=outputs, bias=False, tail=False)
        for inputs, outputs in shapes.stages
    )
    return max(packed_bytes(linear, BITS[precision], group_size) for linear in together)


def layer_bytes(
    layer: CacheShape, kv_cache: KVKind, batch: int, prompt_tokens: int, new_tokens: int, reserve: int | None = None
) -> tuple[int, int]:
    """Bytes of the keys and of the values of one layer after ``new_tokens``; the newest token is never stored.

    ``int8`` is our cache, ``int4`` ours with values in 4 bits (keys stay at 8), room ahead included; any other is
    transformers' own, which holds what it needs and not a byte more. ``reserve`` is what our cache was told that it
    will hold; None: what it holds in the end.
    """
    tokens = prompt_tokens + new_tokens - 1
    if kv_cache in ELEMENT_BYTES:
        # transformers keeps window - 1 tokens of a sliding layer.
        kept = tokens if layer.window is None else min(tokens, layer.window - 1)
        per_token = batch * layer.heads * kept * ELEMENT_BYTES[kv_cache]
        return per_token * layer.key_dim, per_token * layer.value_dim
    room = _room(layer, prompt_tokens, tokens, tokens if reserve is None else reserve)
    vectors = batch * layer.heads * room
    values = layer.value_dim + _RANGE_BYTES
    if kv_cache == "int4":
        values = layer.value_dim // 2 + layer.value_dim // _INT4_GROUP * _RANGE_BYTES
    # Int8Layer.key_offset: the keys' mean in float32.
    offset = 4 * batch * layer.heads * layer.key_dim
    return vectors * (layer.key_dim + _RANGE_BYTES) + offset, vectors * values


def refuse_uneven_groups(shapes: ModelShapes, group_size: int) -> None:
    """Raise UsageError at the first linear whose rows are no whole number of groups."""
    if group_size != -1 and group_size < 1:
        raise UsageError(f"--group-size must be -1 (the whole row) or at least 1, got {group_size}")
    for linear in shapes.linears:
        if group_size != -1 and linear.inputs % group_size:
            usable = [size for size in (32, 64, 128, 256) if linear.inputs % size == 0]
            raise UsageError(
                f"{linear.name}: group_size must divide the row length, {group_size} does not divide {linear.inputs}; "
                f"usable: {', '.join(map(str, [-1, *usable]))}"
            )


def refuse_beyond_counting(*counts: int) -> None:
    """Raise UsageError at a batch or number of tokens that no machine has and whose bytes no report could show."""
    if max(counts) > _MOST_ASKED:
        text = str(max(counts))
        shown = text if len(text) <= 24 else f"a number of {len(text)} digits"
        raise UsageError(f"counts of sequences, tokens and repetitions must be at most 2^40, got {shown}")


def _room(layer: CacheShape, prompt_tokens: int, tokens: int, reserve: int) -> int:
    """Tokens that a ``TokenStore`` has room for once it holds ``tokens``."""
    if layer.window is not None:
        reserve = min(reserve, layer.window + _STEP)
    room = max(_whole_steps(prompt_tokens), min(reserve, prompt_tokens + RESERVE_AHEAD))
    while room < tokens:
        room = _whole_steps(max(room + 1, room + room // _GROWTH))
    return room


def _whole_steps(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP
