"""What the result of quantizing depends on, as JSON: a run that was cut off goes on only with all of it the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

import qquant
from qquant import _native
from qquant.adapter_settings import CONFIG_NAME, WEIGHTS_NAME
from qquant.config import QuantizeConfig
from qquant.errors import UsageError
from qquant.identity import files_sha256, package_sha256
from qquant.ranks import Ranks
from qquant.samples import Sample
from qquant.shards import weight_files
from qquant.telling import OnProgress

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


def model_hashes(folder: Path, adapter: Path | None, on_progress: OnProgress) -> dict[str, dict[str, str]]:
    """File name -> sha256 of all that a model is made of: "source" and, with an adapter, "adapter"."""

    def told(done: int, total: int) -> None:
        on_progress("comparing and noting the model's files: MB", done // 10**6, total // 10**6)

    found = {"source": files_sha256([*sorted(weight_files(folder)), folder / "config.json"], told)}
    if adapter is not None:
        found["adapter"] = files_sha256([adapter / CONFIG_NAME, adapter / WEIGHTS_NAME])
    return found


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
        "device": _device_name(torch.device(device)),
        "processor": _processor(),
        "native modules": ", ".join(name for name, live, _ in _native.status() if live),
        "Hessians": "torch" if _native.gram() is None else "compiled",
        **{f"version of {name}": number for name, number in versions().items()},
        "code of qquant": package_sha256(),
    }


class IdentityOf(Protocol):
    """Makes a run's identity, with the hashes of files that all ranks read or without."""

    def __call__(self, *, with_files: bool) -> dict[str, Any]:
        """By ``run_identity``."""


def agreed_identity(identity_of: IdentityOf, ranks: Ranks) -> dict[str, Any]:
    """A rank's identity, compared with the first one's, which alone has read the files; every rank calls this.

    Raises:
        UsageError: on every rank, if one was told something else.
    """
    with ranks.agreed():
        identity = identity_of(with_files=ranks.writer)
    first = ranks.json(identity)
    with ranks.agreed():
        refuse_another_run(identity, first, ranks.rank)
    return identity


def refuse_another_run(mine: Mapping[str, Any], first: Mapping[str, Any], rank: int) -> None:
    """Raise UsageError if a rank was told something else than the first one was.

    Args:
        mine: of this rank, by ``run_identity``.
        first: of the first rank; may say more.
        rank: this one.
    """
    differing = [key for key, value in mine.items() if value != first.get(key)]
    if differing:
        key = differing[0]
        raise UsageError(
            f"all ranks must do the same, but {key} is {str(mine[key])[:100]!r} of rank {rank} and "
            f"{str(first.get(key))[:100]!r} of the first; start them with one command, on machines that are alike"
        )


def refuse_ranks(ranks: Ranks, config: QuantizeConfig, samples: int) -> None:
    """Raise UsageError for what several processes cannot share: ``config`` with so many calibration samples."""
    if ranks.size == 1:
        return
    if config.recipe.tune:
        raise UsageError(
            f'tune trains a block on all samples in one process, got method "{config.method}" and {ranks.size} ranks; '
            "use one rank, or a method without tune"
        )
    if samples < ranks.size:
        raise UsageError(f"every rank needs a sample, got {samples} samples for {ranks.size} ranks; use fewer ranks")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _processor() -> str:
    host = _native.host()
    features = [] if host is None else sorted(name for name, there in host.cpu_features().items() if there)
    return " ".join([torch.backends.cpu.get_cpu_capability(), *features])
