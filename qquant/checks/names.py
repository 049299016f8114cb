"""Whether a checkpoint holds the tensors of its model, each once, of the right dtype and shape, and no others.

Every fault is listed, where loading ends at the first. What the numbers are is packed.py's and plain.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qquant.checks.findings import Finding, problem, warning
from qquant.checks.packed import PackedLinear
from qquant.gptq_keys import GptqFileConfig
from qquant.models.layouts import Layout, block_list, linears
from qquant.packing import PARTS, packable
from qquant.shards import DTYPES, CheckpointReader, TensorSpec
from qquant.sources import computed_by_model

_FLOATS = ("F16", "BF16", "F32")
_AGAIN = "get the checkpoint again, or quantize the model again"
_NORMS_ADD_ONE = ("gemma", "nemotron", "qwen3_next", "qwen3_5")
"""Families whose norms multiply by one more than what is stored, so that zeros are sound."""


@dataclass
class Stored:
    """What the names and headers of a checkpoint say about its tensors."""

    findings: list[Finding] = field(default_factory=list)
    packed: list[PackedLinear] = field(default_factory=list)
    """Those whose tensors fit together."""
    plain: list[str] = field(default_factory=list)
    """Every other stored tensor."""
    filled: set[str] = field(default_factory=set)
    """Plain tensors that must not be all zeros."""
    odd_biases: set[str] = field(default_factory=set)
    """Biases that are stored and that the model has not."""
    tied: dict[str, str] = field(default_factory=dict)
    """Copies that are stored beside their originals."""


def compare(reader: CheckpointReader, model: Any, settings: GptqFileConfig | None) -> Stored:
    """Hold what is stored against the model.

    Args:
        reader: the checkpoint's tensors.
        model: its skeleton on the meta device; None if there is none, and then nothing is known but names.
        settings: the quantization keys; None: there are none that make sense, and packed tensors cannot be judged.
    """
    stored = Stored()
    bases = [name.removesuffix(".qweight") for name in reader.entries if name.endswith(".qweight")]
    parts = {f"{base}.{part}" for base in bases for part in PARTS}
    stored.plain = [name for name in reader.entries if name not in parts]
    if model is None:
        return stored
    modules, wanted = dict(model.named_modules()), model.state_dict()
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for base in bases:
        faults = list(_packed(reader, base, modules.get(base), settings, f"{base}.weight" in tied))
        stored.findings += faults
        if settings is not None and not any(finding.level == "problem" for finding in faults):
            stored.packed.append(_linear(base, modules[base], settings))
    covered = {f"{base}.weight" for base in bases}
    for name in wanted.keys() - reader.entries.keys() - tied.keys() - covered:
        base = name.removesuffix(".weight")
        part = f"{base}.qweight" if f"{base}.qzeros" in reader.entries else name
        stored.findings.append(problem("tensors", part, f"the model needs it and it is not stored; {_AGAIN}"))
    for name in stored.plain:
        stored.findings += _plain(reader, name, wanted, covered, modules)
    stored.odd_biases = {f"{base}.bias" for base in bases} & (reader.entries.keys() - wanted.keys())
    zeros_are_sound = str(getattr(model.config, "model_type", "")).startswith(_NORMS_ADD_ONE)
    for name in stored.plain:
        if len(reader.spec(name).shape) >= 2 or (name.endswith("norm.weight") and not zeros_are_sound):
            stored.filled.add(name)
    stored.tied = {name: original for name, original in tied.items() if {name, original} <= reader.entries.keys()}
    stored.findings.sort(key=lambda finding: finding.subject)
    return stored


def left_alone(model: Any, layout: Layout, stored: Stored, settings: GptqFileConfig) -> Iterator[Finding]:
    """Whether the keys say of each linear of the blocks what is stored of it: packed, or left alone.

    Two notations exist and readers know one each: rules of ``dynamic``, and ``modules_in_block_to_quantize``.
    """
    packed = {linear.name for linear in stored.packed}
    listed = settings.keys.get("modules_in_block_to_quantize")
    endings = tuple(name for row in listed for name in ([row] if isinstance(row, str) else row)) if listed else ()
    for index, block in enumerate(block_list(model, layout)):
        for inner in linears(block):
            name = f"{layout.blocks}.{index}.{inner}"
            by_rule, by_list = settings.skips(name), bool(endings) and not name.endswith(endings)
            if name in packed and (by_rule or by_list):
                key = "dynamic" if by_rule else "modules_in_block_to_quantize"
                yield problem("keys", key, f"leaves {name} alone, and it is stored packed; correct the key")
            elif name not in packed and f"{name}.weight" in stored.plain:
                if not by_rule and not by_list:
                    text = f"{name} is not packed and no key says so, so that others make random weights; add a rule"
                    yield problem("keys", "dynamic", text)
                elif not (by_rule and by_list):
                    missing = "modules_in_block_to_quantize" if by_rule else "dynamic"
                    readers = "transformers with optimum" if by_rule else "GPTQModel"
                    yield warning(
                        "keys",
                        missing,
                        f"does not say that {name} is left alone, and {readers} reads only that; add it",
                    )


def _packed(
    reader: CheckpointReader, base: str, module: Any, settings: GptqFileConfig | None, tied: bool
) -> Iterator[Finding]:
    """Faults of the names, dtypes and shapes of one packed linear."""
    if not isinstance(module, nn.Linear):
        what = "the model has no such layer" if module is None else f"in the model it is a {type(module).__name__}"
        yield problem("tensors", f"{base}.qweight", f"is stored packed, but {what}; get config.json again")
        return
    if tied:
        text = "is packed, and tie_word_embeddings says it shares the embedding's weight; set that to false"
        yield problem("tensors", f"{base}.qweight", text)
    if settings is None:
        return
    chosen, rows, columns = settings.for_module(base), module.in_features, module.out_features
    if not packable(rows, columns, chosen.bits):
        text = f"[{columns}, {rows}] does not fill whole words of {chosen.bits}-bit codes; correct bits in the keys"
        yield problem("tensors", f"{base}.qweight", text)
        return
    linear = _linear(base, module, settings)
    for part, spec in _specs(linear).items():
        yield from _part(reader, f"{base}.{part}", spec, chosen.desc_act)
    bias = reader.entries.get(f"{base}.bias")
    if bias is None and module.bias is not None:
        yield problem("tensors", f"{base}.bias", f"the model needs it and it is not stored; {_AGAIN}")
    if bias is not None and (bias.spec.dtype not in _FLOATS or bias.spec.shape != (columns,)):
        text = f"must be floating [{columns}], got {bias.spec.dtype} {list(bias.spec.shape)}; {_AGAIN}"
        yield problem("tensors", f"{base}.bias", text)
    if rows % linear.group_size:
        text = f"the last group has {rows % linear.group_size} of {linear.group_size} rows, which few kernels take"
        yield warning("tensors", f"{base}.scales", text)


def _part(reader: CheckpointReader, name: str, spec: TensorSpec, desc_act: bool) -> Iterator[Finding]:
    found = reader.entries.get(name)
    if found is None:
        if name.endswith(".g_idx") and not desc_act:
            yield warning("tensors", name, "is not stored, and transformers with gptqmodel takes what memory holds")
        else:
            yield problem("tensors", name, f"a packed linear needs it and it is not stored; {_AGAIN}")
        return
    dtypes = _FLOATS if spec.dtype == "F16" else (spec.dtype,)
    if found.spec.dtype not in dtypes or found.spec.shape != spec.shape:
        yield problem(
            "tensors", name, f"must be {' or '.join(dtypes)} {list(spec.shape)} by config.json, got {found.spec.dtype} "
            f"{list(found.spec.shape)}; keys and tensors do not belong together",
        )  # fmt: skip


def _specs(linear: PackedLinear) -> dict[str, TensorSpec]:
    """What the format says of each part, see docs/checkpoint-format.md; scales may be of other floating dtypes."""
    return {
        "qweight": TensorSpec("I32", (linear.rows * linear.bits // 32, linear.columns)),
        "qzeros": TensorSpec("I32", (linear.groups, linear.columns * linear.bits // 32)),
        "scales": TensorSpec("F16", (linear.groups, linear.columns)),
        "g_idx": TensorSpec("I32", (linear.rows,)),
    }


def _linear(name: str, module: nn.Linear, settings: GptqFileConfig) -> PackedLinear:
    chosen, rows = settings.for_module(name), module.in_features
    return PackedLinear(
        name=name,
        rows=rows,
        columns=module.out_features,
        bits=chosen.bits,
        group_size=rows if chosen.group_size == -1 else min(chosen.group_size, rows),
        sym=chosen.sym,
        desc_act=chosen.desc_act,
        version=settings.version,
    )


def _plain(
    reader: CheckpointReader, name: str, wanted: dict[str, Any], covered: set[str], modules: dict[str, Any]
) -> Iterator[Finding]:
    """Faults of the name, dtype and shape of a tensor that is not packed."""
    base, _, leaf = name.rpartition(".")
    if f"{base}.weight" in covered and leaf == "bias":
        return  # its linear's
    spec = reader.spec(name)
    if name in covered:
        yield problem("tensors", name, f"is stored plain and packed, and readers differ on which counts; {_AGAIN}")
    elif leaf in PARTS and base in modules:
        yield problem("tensors", name, f"belongs to a packed linear whose qweight is not stored; {_AGAIN}")
    elif name not in wanted:
        if not computed_by_model(name):
            yield problem("tensors", name, "the model has no place for it; remove it, or get config.json again")
    elif spec.shape != tuple(wanted[name].shape):
        got = list(spec.shape)
        yield problem(
            "tensors", name, f"must have shape {list(wanted[name].shape)} by config.json, got {got}; {_AGAIN}"
        )
    elif DTYPES[spec.dtype].is_floating_point != wanted[name].is_floating_point():
        yield problem("tensors", name, f"must not be stored as {spec.dtype}; {_AGAIN}")
