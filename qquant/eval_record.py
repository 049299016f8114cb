"""The record of an evaluation, put together: a row per model, and the report around them with this moment and machine.

Nothing here loads a model or measures one; what a record is made of is results.py's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import qquant
from qquant import records
from qquant import results as record
from qquant.accuracy import Accuracy
from qquant.errors import BadModelError
from qquant.json_files import read_json
from qquant.measure import Memory, Speed, environment, folder_bytes, git_commit, weights_bytes
from qquant.results import LayerError, ModelRow, Result
from qquant.shards import CheckpointReader

_NUMBERS = (
    "quant_method", "bits", "group_size", "sym", "desc_act", "static_groups", "true_sequential", "damp_percent",
    "checkpoint_format", "lm_head", "dynamic", "load",
)  # fmt: skip
"""Keys of a quantization_config that the record keeps; other writers put paths and texts of their own beside them."""

_BITSANDBYTES = {
    kind: {"quant_method": "bitsandbytes", "bits": bits, "load": kind} for kind, bits in (("nf4", 4), ("llm-int8", 8))
}
"""What a row says of a baseline that bitsandbytes quantized while loading it."""


def model_rows(
    folders: Mapping[str, Path],
    keys: Mapping[str, Mapping[str, Any]],
    dtypes: Mapping[str, torch.dtype],
    *,
    accuracy: Mapping[str, Accuracy] | None = None,
    memory: Mapping[str, Memory] | None = None,
    speeds: Mapping[str, Speed] | None = None,
    layer_errors: Mapping[str, tuple[LayerError, ...]] | None = None,
    identities: Mapping[str, str],
    in_memory: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
    rounded: Mapping[str, Mapping[str, int]] | None = None,
    seen: Mapping[str, float] | None = None,
) -> tuple[ModelRow, ...]:
    """One row per model, the baseline first.

    Args:
        folders: label -> folder.
        keys: label -> what the folder says about its quantization; empty for a plain model.
        dtypes: label -> dtype that the weights are said to be of.
        accuracy: by label; a label that is missing here or below was not measured.
        memory: the same.
        speeds: the same.
        layer_errors: the same.
        identities: label -> ``identity.model_sha256``.
        in_memory: label -> how the baseline was quantized while it was loaded, for rows that have no folder.
        sizes: label -> bytes that the weights of such a row would take in a file.
        rounded: label -> ``activation_bits`` or ``head_bits``, where something was rounded in memory.
        seen: label -> share of the text that calibration had seen, where that is known.
    """
    first = next(iter(folders.values()))
    parameters = sum(math.prod(entry.spec.shape) for entry in CheckpointReader(first).entries.values())
    kinds = in_memory or {}
    rows: list[ModelRow] = []
    for label, folder in {**folders, **dict.fromkeys(kinds, first)}.items():
        stored = label in folders
        own: Mapping[str, Any] = keys[label] if stored else _BITSANDBYTES[kinds[label]]
        in_memory_bits = (rounded or {}).get(label, {})
        size = weights_bytes(folder) if stored else (sizes or {}).get(label)
        scored, used, timed = (found.get(label) if found else None for found in (accuracy, memory, speeds))
        row = ModelRow(
            label=label,
            role="candidate" if rows else "baseline",
            model_type=read_json(folder / "config.json").get("model_type"),
            parameters=parameters,
            sha256=identities[label] if stored else rows[0].sha256,
            quantization={key: own[key] for key in _NUMBERS if key in own} or None,
            method=kinds.get(label) or (own.get("meta") or {}).get("method") or own.get("quant_method"),
            bits=own.get("bits"),
            group_size=own.get("group_size"),
            activation_bits=in_memory_bits.get("activation_bits"),
            head_bits=in_memory_bits.get("head_bits"),
            calibration_overlap=(seen or {}).get(label),
            checkpoint_dtype=str(dtypes[label]).removeprefix("torch.") if stored else rows[0].checkpoint_dtype,
            weights_bytes=size,
            folder_bytes=folder_bytes(folder) if stored else None,
            bits_per_weight=None if size is None else 8 * size / parameters,
            accuracy=records.Accuracy(**asdict(scored)) if scored else None,
            speed=records.Speed(**asdict(timed)) if timed else None,
            memory=records.Memory(**asdict(used)) if used else None,
            ratios=None,
            layer_errors=layer_errors.get(label, ()) if layer_errors else (),
        )
        rows.append(row.model_copy(update={"ratios": record.ratios_to_baseline(row, rows[0])}) if rows else row)
    return tuple(rows)


def layer_errors(log: Path) -> tuple[LayerError, ...]:
    """What the log of a quantization says about its layers; nothing where there is none."""
    if not log.exists():
        return ()
    try:
        modules = json.loads(log.read_text(encoding="utf-8"))["modules"]
        return tuple(LayerError(name=item["name"], relative_error=item["relative_error"]) for item in modules)
    except (ValueError, KeyError, TypeError) as error:
        raise BadModelError(f"{log} is not the log of a quantization; delete it or get it again: {error!r}") from error


def finished_result(*, dtype: torch.dtype, device: torch.device, **fields: Any) -> Result:
    """The record, with this moment, this checkout and this machine; ``fields`` are the rest of ``Result``'s."""
    return Result(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        compute_dtype=str(dtype).removeprefix("torch."),
        git_commit=git_commit(),
        environment=records.Environment(**asdict(environment(device, qquant_version=qquant.__version__))),
        **fields,
    )
