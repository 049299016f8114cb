"""The settings that a stage may take in mixed precision, their bytes, and the rules that tell readers of a choice.

What a setting costs is sensitivity.py's, which one is taken mixed_precision.py's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qquant.config import ModuleOverride, QuantizeConfig
from qquant.errors import UsageError
from qquant.packing import packable
from qquant.stage_costs import StageShape
from qquant.stored_bytes import LinearShape, packed_bytes

_FINER = (64, 32)  # group sizes tried at 4 bits beside the general one
READERS = (
    "rules for single linears (`dynamic`) are followed by qquant, GPTQModel's own loader, vLLM and SGLang (these look "
    "fused linears up as qkv_proj and gate_up_proj); transformers without qquant.register(), optimum and AutoGPTQ do "
    "not know them and cannot load such files"
)
"""Tried: qquant, GPTQModel, transformers with optimum. The others by what their code says."""
# What vLLM and SGLang call linears that they fuse; rules that do not know these names would pass them by.
_FUSED = {
    frozenset({"q_proj", "k_proj", "v_proj"}): "qkv_proj",
    frozenset({"gate_proj", "up_proj"}): "gate_up_proj",
    frozenset({"w1", "w2"}): "gate_up_proj",
}


def settings_of(shape: StageShape, config: QuantizeConfig) -> tuple[QuantizeConfig, ...]:
    """What a stage may take, the coarsest first; a module that a rule of the user names takes what the rule says."""
    named = [any(re.match(rule[2:], name) for rule in config.dynamic) for name in shape.names]
    if any(named):
        only, *others = (config.for_module(name) for name in shape.names)
        if any(other != only for other in others):
            raise UsageError(
                f"linears that share an input must have the same settings in mixed precision, the rules give "
                f"{', '.join(shape.names)} different ones"
            )
        return () if only is None else (_measured_by(only),)
    general = config.group_size
    sizes = [general, *(size for size in _FINER if general == -1 or size < general)]
    found = [(4, size) for size in sizes if _fits(shape, 4, size)]
    # One setting of 8 bits: finer groups would take more bytes than they save in divergence.
    found += [(8, size) for size in (*sizes, -1) if _fits(shape, 8, size)][:1]
    if not found:
        raise UsageError(
            f"{shape.names[0]}: rows of {shape.inputs} columns fit neither 4 nor 8 bits in groups of {general}; choose "
            f"another group size, or leave it alone with --skip '.*{shape.names[0].rpartition('.')[2]}'"
        )
    base = _measured_by(config).model_dump()
    if base["act_group_aware"] and any(size == -1 for _, size in found):
        base["act_group_aware"] = None
    return tuple(QuantizeConfig.from_dict({**base, "bits": bits, "group_size": size}) for bits, size in found)


def _measured_by(config: QuantizeConfig) -> QuantizeConfig:
    """Sensitivity is measured with plain GPTQ whatever method will be used, and without data if that needs none."""
    method = "gptq" if config.needs_data else "rtn"
    return QuantizeConfig.from_dict({**config.model_dump(exclude={"dynamic"}), "method": method})


def _fits(shape: StageShape, bits: int, group_size: int) -> bool:
    whole = shape.inputs % group_size == 0 if group_size != -1 else True
    return whole and all(packable(shape.inputs, rows, bits) for rows in shape.outputs)


def stage_bytes(shape: StageShape, config: QuantizeConfig) -> int:
    """Of a stage's packed tensors in a file."""
    layers = (
        LinearShape(name=name, inputs=shape.inputs, outputs=rows, bias=False, tail=False)
        for name, rows in zip(shape.names, shape.outputs, strict=True)
    )
    return sum(packed_bytes(layer, config.bits, config.group_size) for layer in layers)


def rules_for(
    shapes: Sequence[StageShape], settings: Sequence[QuantizeConfig], config: QuantizeConfig, blocks: str
) -> dict[str, ModuleOverride]:
    """Rules for what differs from the general settings: one for each setting and place in a block."""
    together: dict[tuple[tuple[int, int], tuple[str, ...]], list[int]] = {}
    places: dict[tuple[str, ...], int] = {}
    for shape, chosen in zip(shapes, settings, strict=True):
        inner = []
        for name in shape.names:
            index, _, rest = name.removeprefix(f"{blocks}.").partition(".")
            inner.append(rest)
        places[tuple(inner)] = places.get(tuple(inner), 0) + 1
        named = any(re.match(rule[2:], name) for rule in config.dynamic for name in shape.names)
        if not named and (chosen.bits, chosen.group_size) != (config.bits, config.group_size):
            together.setdefault(((chosen.bits, chosen.group_size), tuple(inner)), []).append(int(index))
    rules = {}
    for ((bits, size), names), indices in sorted(together.items()):
        where = r"\d+" if len(indices) == places[names] else f"(?:{'|'.join(map(str, indices))})"
        where = str(indices[0]) if len(indices) == 1 else where
        change: dict[str, int] = {}
        if bits != config.bits:
            change["bits"] = bits
        if size != config.group_size:
            change["group_size"] = size
        rules[f"+:{re.escape(blocks)}\\.{where}\\.{_any_of(names)}$"] = ModuleOverride.model_validate(change)
    return rules


def _any_of(names: Sequence[str]) -> str:
    """A pattern for some linears of a block, with the name under which other readers fuse them."""
    parents = {name.rpartition(".")[0] for name in names}
    if len(parents) > 1:
        return f"(?:{'|'.join(map(re.escape, names))})"
    parent, leaves = parents.pop(), [name.rpartition(".")[2] for name in names]
    fused = _FUSED.get(frozenset(leaves))
    leaves += [fused] if fused else []
    some = re.escape(leaves[0]) if len(leaves) == 1 else f"(?:{'|'.join(map(re.escape, leaves))})"
    return f"{re.escape(parent)}\\.{some}" if parent else some


def label(config: QuantizeConfig) -> str:
    """What a report calls a setting: "Int4 g128"."""
    return f"Int{config.bits} {'rows' if config.group_size == -1 else f'g{config.group_size}'}"
