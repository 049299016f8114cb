"""What the result of quantizing depends on, as JSON: a run that was cut off goes on only with all of it the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

import qquant
from qquant import _native
from qquant.config import QuantizeConfig
from qquant.identity import package_sha256
from qquant.samples import Sample

PACKAGES = ("torch", "transformers", "safetensors")
"""Whose versions decide on bits of a result, beside our own."""


def versions() -> dict[str, str]:
    """The versions that a manifest names."""
    return {"qquant": qquant.__version__} | {package: version(package) for package in PACKAGES}


def samples_sha256(samples: Sequence[Sample]) -> str:
    """sha256 over the ids and masks of all samples, in their order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample.input_ids).to_bytes(8, "little"))
        for part, dtype in ((sample.input_ids, torch.int64), (sample.mask, torch.uint8)):
            digest.update(part.to("cpu", dtype).contiguous().numpy().tobytes())
    return digest.hexdigest()


def run_identity(
    *,
    files: Mapping[str, str],
    beside: Mapping[str, Any],
    config: QuantizeConfig,
    samples: Sequence[Sample],
    computed_in: torch.dtype,
    device: torch.device | str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that decides on a result's bytes, key by key, so that a message can name what differs.

    How many threads, ranks or bytes of memory there are is not in it.

    Args:
        files: name -> sha256 of the files that hold the model, and the adapter.
        beside: name -> what lies beside the weights, JSON or sha256.
        config: what is done.
        samples: that it is done with.
        computed_in: the compute dtype.
        device: where; only its kind counts.
        options: others of the recipe.
    """
    settings = config.model_dump(mode="json")
    return {
        **{f"sha256 of {name}": digest for name, digest in sorted(files.items())},
        "side files": hashlib.sha256(json.dumps(beside, sort_keys=True).encode()).hexdigest(),
        "calibration samples": samples_sha256(samples),
        **{key: value if not isinstance(value, dict) else json.dumps(value) for key, value in settings.items()},
        **options,
        "compute dtype": str(computed_in).removeprefix("torch."),
        "device": torch.device(device).type,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "native modules": ", ".join(name for name, live, _ in _native.status() if live),
        **{f"version of {name}": number for name, number in versions().items()},
        "code of qquant": package_sha256(),
    }
