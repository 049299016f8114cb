"""``qquant inspect``: what a checkpoint folder is, what it costs per weight, and whether anything in it is amiss.

It reads headers, side files and hashes, and builds the model without its weights. Nothing is computed or changed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qquant.code_keys import ignoring_code
from qquant.console import user_errors
from qquant.errors import BadModelError
from qquant.telling import OnProgress, unheard

if TYPE_CHECKING:
    from qquant.hf_plugin import GptqFileConfig
    from qquant.shards import CheckpointReader

SCHEMA_VERSION = 1
_EXTREMES = 3
"""Modules listed at either end of the errors."""


def inspect_command(
    folder: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, quantized or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
    ignore_code: Annotated[
        bool, typer.Option("--ignore-code", help="Open a folder whose files name code, without it.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show what a checkpoint holds. Exit code 4 if it would not load, or is not what its manifest says."""
    with user_errors(debug=debug), ignoring_code(ignore_code):
        from qquant.model_folder import resolve_folder
        from qquant.progress import quiet_transformers, step_progress

        quiet_transformers()
        with step_progress() as on_progress:
            facts = examine(resolve_folder(folder), on_progress)
        if as_json:
            typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        else:
            _print(facts)
        if facts["problems"]:
            raise BadModelError("; ".join(facts["problems"]))


def examine(folder: Path, on_progress: OnProgress = unheard) -> dict[str, Any]:
    """Every fact about a checkpoint folder, ready for JSON; sizes are in bytes.

    Args:
        folder: local model folder.
        on_progress: told which file is compared with the manifest.

    Returns:
        ``problems`` lists what is amiss; it is empty for a folder that loads and is what its manifest says.

    Raises:
        BadModelError: no config.json, no safetensors, or files too damaged to list.
    """
    from qquant.checks.manifest import unchanged_files
    from qquant.json_files import read_json
    from qquant.packing import PARTS
    from qquant.shards import CheckpointReader

    config = read_json(folder / "config.json")
    reader = CheckpointReader(folder)
    settings, problems = _look_inside(folder, config)
    packed = _packed(reader, settings) if settings else []
    packed_names = {f"{layer['name']}.{part}" for layer in packed for part in PARTS}
    rest = [entry.spec for name, entry in reader.entries.items() if name not in packed_names]
    stored = sum(entry.spec.nbytes for entry in reader.entries.values())
    parameters = sum(layer["weights"] for layer in packed) + sum(math.prod(spec.shape) for spec in rest)
    manifest = unchanged_files(folder, on_progress)
    problems += [f"{name} is not as the manifest says" for name, same in (manifest or {}).items() if not same]
    return {
        "schema_version": SCHEMA_VERSION,
        "folder": folder.resolve().name,
        "model_type": config.get("model_type"),
        "parameters": parameters,
        "bits_per_parameter": 8 * stored / parameters if parameters else None,
        "tensor_bytes": stored,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
        "quantization": None if settings is None else _quantization(settings, packed),
        "full_precision": {
            "tensors": len(rest),
            "parameters": sum(math.prod(spec.shape) for spec in rest),
            "bytes": sum(spec.nbytes for spec in rest),
            "dtypes": sorted({spec.dtype for spec in rest}),
        },
        "relative_errors": _relative_errors(folder),
        "manifest": manifest,
        "problems": problems,
    }


def _look_inside(folder: Path, config: dict[str, Any]) -> tuple[GptqFileConfig | None, list[str]]:
    """What the quantization keys mean (None: a plain checkpoint), and what keeps the folder from being loaded."""
    import torch

    from qquant.checkpoint import quantization_config, reopen
    from qquant.hf_plugin import GptqFileConfig
    from qquant.sources import StreamedModel

    settings = None
    try:
        if config.get("quantization_config") is None and not (folder / "quantize_config.json").is_file():
            StreamedModel(folder)
        else:
            settings = GptqFileConfig.from_dict(quantization_config(folder))
            reopen(folder, dtype=torch.float32, device="cpu")
    except BadModelError as error:
        return settings, [str(error)]
    return settings, []


def _packed(reader: CheckpointReader, settings: GptqFileConfig) -> list[dict[str, Any]]:
    """Every packed linear: name, bits, group size, how many weights, how many bytes they take."""
    from qquant.packing import PARTS

    layers = []
    for name in [name.removesuffix(".qweight") for name in reader.entries if name.endswith(".qweight")]:
        chosen = settings.for_module(name)
        parts = [reader.spec(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in reader.entries]
        layers.append(
            {
                "name": name,
                "bits": chosen.bits,
                "group_size": chosen.group_size,
                "weights": math.prod(parts[0].shape) * 32 // chosen.bits,
                "bytes": sum(spec.nbytes for spec in parts),
            }
        )
    return layers


def _quantization(settings: GptqFileConfig, packed: list[dict[str, Any]]) -> dict[str, Any]:
    """The general settings, and the packed linears by bits and group size."""
    kinds: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for layer in packed:
        kinds.setdefault((layer["bits"], layer["group_size"]), []).append(layer)
    general = settings.for_module("")
    weights = sum(layer["weights"] for layer in packed)
    return {
        "bits": general.bits,
        "group_size": general.group_size,
        "sym": general.sym,
        "desc_act": general.desc_act,
        "checkpoint_format": "gptq" if settings.version == 1 else "gptq_v2",
        "packed": [
            {
                "bits": bits,
                "group_size": size,
                "linears": len(layers),
                "weights": sum(layer["weights"] for layer in layers),
                "bytes": sum(layer["bytes"] for layer in layers),
            }
            for (bits, size), layers in sorted(kinds.items())
        ],
        "bits_per_packed_weight": 8 * sum(layer["bytes"] for layer in packed) / weights if weights else None,
    }


def _relative_errors(folder: Path) -> dict[str, list[dict[str, Any]]] | None:
    """The modules that lost most and least, from our own log; None if there is none that can be read."""
    from qquant.checkpoint import LOG_NAME
    from qquant.json_files import read_json

    try:
        modules: list[dict[str, Any]] = [
            {"name": str(record["name"]), "relative_error": float(record["relative_error"])}
            for record in read_json(folder / LOG_NAME)["modules"]
        ]
    except (BadModelError, KeyError, TypeError, ValueError):
        return None
    modules.sort(key=lambda record: record["relative_error"])
    return {"highest": modules[: -_EXTREMES - 1 : -1], "lowest": modules[:_EXTREMES]}


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for title, text in _rows(facts):
        table.add_row(title, escape(text))
    console = Console()
    # A pipe has no width of its own, and a folded file name cannot be copied.
    (console if console.is_terminal else Console(width=200)).print(table)


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts as lines of text: what, value."""
    rows = [
        ("model", f"{facts['model_type']}, {facts['parameters']:,} parameters"),
        ("tensors", f"{_size(facts['tensor_bytes'])}, {facts['bits_per_parameter'] or 0:.2f} bits per parameter"),
    ]
    done = facts["quantization"]
    if done:
        order = "desc_act" if done["desc_act"] else "no desc_act"
        grid = "symmetric" if done["sym"] else "asymmetric"
        setting = f"{done['bits']} bits, group size {done['group_size']}"
        rows.append(("quantized", f"{setting}, {grid}, {order}, {done['checkpoint_format']}"))
        for kind in done["packed"]:
            cost = 8 * kind["bytes"] / kind["weights"]
            setting = f"{kind['linears']} linears at {kind['bits']} bits, group size {kind['group_size']}"
            rows.append(("", f"{setting}: {_size(kind['bytes'])}, {cost:.2f} bits per weight"))
    rest = facts["full_precision"]
    rows.append(("full precision", f"{rest['tensors']} tensors, {_size(rest['bytes'])}, {' '.join(rest['dtypes'])}"))
    for title, records in (facts["relative_errors"] or {}).items():
        text = ", ".join(f"{record['name']} {record['relative_error']:.2e}" for record in records)
        rows.append((f"{title} error", text))
    states = {True: "  as in the manifest", False: "  CHANGED since the manifest", None: ""}
    for number, (name, size) in enumerate(facts["files"].items()):
        state = states[(facts["manifest"] or {}).get(name)]
        rows.append(("" if number else "files", f"{name}  {_size(size)}{state}"))
    rows += [("problem", problem) for problem in facts["problems"]]
    return rows


def _size(count: int) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"
