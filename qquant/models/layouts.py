"""Where a decoder's blocks are, which linear layers a block holds, and which of them share an input.

Families that we know are described by a table; any other model is described by its structure: the longest ModuleList
whose members hold linear layers. Nothing here knows of quantization or checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qquant.errors import BadModelError


@dataclass(frozen=True)
class Unit:
    """A part of a block that adds to the residual stream: ``x <- x + module(norm(x))``.

    ``stages`` are the linears of ``module`` in the order in which data reaches them; those of one stage share an
    input. The last stage is one linear whose output is the output of ``module``.
    """

    norm: str
    module: str
    stages: tuple[tuple[str, ...], ...]
    sees_positions: bool
    """Whether ``module`` takes the block's keyword arguments (mask, positions) as attention does."""

    @property
    def tail(self) -> str:
        """The linear whose output is the unit's contribution to the residual stream."""
        return self.stages[-1][0]


@dataclass(frozen=True)
class Layout:
    """A model's blocks, and the units of each; ``units`` is None where a block is only known by its structure."""

    blocks: str
    units: tuple[Unit, ...] | None
    turns_in_float32: bool = False
    """Whether blocks get cosines and sines of half a head in float32, and LogN's factors, as the original Qwen's do."""


_PRE_NORM_DECODER = Layout(
    blocks="model.layers",
    units=(
        Unit(
            norm="input_layernorm",
            module="self_attn",
            stages=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)),
            sees_positions=True,
        ),
        Unit(
            norm="post_attention_layernorm",
            module="mlp",
            stages=(("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
            sees_positions=False,
        ),
    ),
)

_QWEN_V1 = Layout(
    blocks="transformer.h",
    units=(
        Unit(norm="ln_1", module="attn", stages=(("attn.c_attn",), ("attn.c_proj",)), sees_positions=True),
        Unit(norm="ln_2", module="mlp", stages=(("mlp.w1", "mlp.w2"), ("mlp.c_proj",)), sees_positions=False),
    ),
    turns_in_float32=True,
)

_KNOWN = {**dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _PRE_NORM_DECODER), "qwen": _QWEN_V1}


def known_layout(model_type: str) -> Layout | None:
    """The table's description of a family, None of any other."""
    return _KNOWN.get(model_type)


def find_layout(model: nn.Module, model_type: str) -> Layout:
    """Describe where a model's blocks are.

    Args:
        model: a causal language model; parameters may be on the meta device.
        model_type: ``config.model_type``.

    Raises:
        BadModelError: no list of blocks with linear layers, or blocks that keep weights in a form that is neither a
            linear layer nor a vector (fused mixture-of-experts weights, convolutions).
    """
    layout = _KNOWN.get(model_type) or Layout(_longest_block_list(model, model_type), None)
    if not len(block_list(model, layout)):
        raise BadModelError(f"a model must have at least one block, this one of type {model_type!r} has none")
    for index, block in enumerate(block_list(model, layout)):
        _refuse_foreign_weights(block, f"{layout.blocks}.{index}", model_type)
        if layout.units is not None:
            listed = {name for unit in layout.units for stage in unit.stages for name in stage}
            found = set(linears(block))
            if listed != found:
                raise BadModelError(
                    f"a {model_type} block must hold the linears {sorted(listed)}, "
                    f"{layout.blocks}.{index} holds {sorted(found)}; this variant is not supported"
                )
    return layout


def find_attentions(model: nn.Module, model_type: str) -> dict[str, str]:
    """Attention modules whose queries and keys are the rows of linears, turned by a half-rotation RoPE.

    Returns:
        Full name of each -> full name of the norm whose output it reads. Only for families known to do so; for any
        other, nothing.
    """
    layout = _KNOWN.get(model_type)
    if layout is None or layout.units is None:
        return {}
    try:
        blocks = block_list(model, layout)
    except AttributeError:  # a part of a larger model, whose names are others
        return {}
    unit = next(unit for unit in layout.units if unit.sees_positions)
    names = [f"{layout.blocks}.{index}" for index in range(len(blocks))]
    return {f"{name}.{unit.module}": f"{name}.{unit.norm}" for name in names}


def siblings(model: nn.Module, model_type: str) -> list[tuple[str, ...]]:
    """Full names of the linears that share an input, in model order; only of families known to have such.

    Args:
        model: a causal language model; its linears may be of any class by now.
        model_type: ``config.model_type``.
    """
    layout = _KNOWN.get(model_type)
    if layout is None or layout.units is None:
        return []
    try:
        blocks = block_list(model, layout)
    except AttributeError:  # a part of a larger model, whose names are others
        return []
    stages = [stage for unit in layout.units for stage in unit.stages if len(stage) > 1]
    return [tuple(f"{layout.blocks}.{i}.{name}" for name in stage) for i in range(len(blocks)) for stage in stages]


def block_list(model: nn.Module, layout: Layout) -> nn.ModuleList:
    """The ModuleList of decoder blocks."""
    blocks = model.get_submodule(layout.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of a block by its name inside the block, in definition order."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def _longest_block_list(model: nn.Module, model_type: str) -> str:
    candidates: list[tuple[int, str]] = [
        (len(module), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(linears(child) for child in module)
    ]
    if not candidates:
        raise BadModelError(
            f"no list of blocks with linear layers was found in a model of type {model_type!r}; "
            "known families: " + ", ".join(sorted(_KNOWN))
        )
    longest = max(length for length, _ in candidates)
    # The outermost of the longest: a list of experts inside a block has a longer name.
    return min((name for length, name in candidates if length == longest), key=len)


def _refuse_foreign_weights(block: nn.Module, name: str, model_type: str) -> None:
    known = {id(linear.weight) for linear in linears(block).values()}
    foreign = {
        parameter_name: tuple(parameter.shape)
        for parameter_name, parameter in block.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in known
    }
    if foreign:
        # Of a router and its fused experts, the experts say more clearly what the matter is.
        worst = max(foreign, key=lambda parameter_name: len(foreign[parameter_name]))
        raise BadModelError(
            f"every matrix of a block must belong to a linear layer; {name}.{worst} {foreign[worst]} of model type "
            f"{model_type!r} does not (fused mixture-of-experts weights and convolutions are not supported)"
        )
