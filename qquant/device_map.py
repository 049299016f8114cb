"""Where the parts of a loaded model go: what a ``device_map`` may say, and what follows from it.

Making a map for "auto" and fetching what lies elsewhere is accelerate's; how packed tensors get there hf_plugin.py's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from qquant.errors import UsageError

SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
"""Names that leave it to accelerate."""
_DISK = "disk"


def check_places(device_map: Any) -> None:
    """Refuse places that are none, or not here.

    Args:
        device_map: as in transformers' ``from_pretrained``: None, a name of ``SPREAD``, a device, a GPU's number, or a
            map from names of modules to devices, numbers or "disk".

    Raises:
        UsageError: naming the place.
    """
    if device_map is None or device_map in SPREAD:
        return
    for place in _places(device_map):
        if place == _DISK and isinstance(device_map, Mapping):
            continue
        try:
            device = torch.device(f"cuda:{place}" if isinstance(place, int) else place)
        except (RuntimeError, TypeError):
            device = torch.device("meta")
        if device.type == "meta":
            raise UsageError(
                f"a device_map is cpu, cuda, cuda:N, one of {', '.join(SPREAD)}, or a dict of modules to such devices "
                f"and disk, got {place!r}"
            )
        count = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= count:
            raise UsageError(f"device_map names {place!r}, and this torch sees {count} GPUs; name another place")


def check_names(device_map: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuse entries that would be passed by.

    Args:
        device_map: a map that a user wrote.
        names: of all modules and tensors of the model.

    Raises:
        UsageError: an entry names nothing, or what is fetched at every use lies inside another entry: accelerate then
            fails when the model runs.
    """
    for name in device_map:
        if name and name not in names:
            raise UsageError(f"device_map names {name!r}, which the model does not have; correct or remove it")
        inside = next((other for other in device_map if other != name and _holds(name, other)), None)
        if inside is not None and offloads(device_map):
            raise UsageError(
                f"where parts are offloaded, entries of a device_map must not hold one another, {name!r} holds "
                f"{inside!r}; name the other parts of it one by one"
            )


def offloads(device_map: Any) -> bool:
    """Whether a map leaves weights where they are not used, to be fetched at every use."""
    places = {str(place) for place in _places(device_map)} if isinstance(device_map, Mapping) else set()
    return _DISK in places or ("cpu" in places and len(places) > 1)


def computes_on_cpu(device_map: Any) -> bool:
    """Whether no accelerator takes part."""
    if device_map in SPREAD:
        return not torch.cuda.is_available()
    return device_map is None or all(str(place) in ("cpu", _DISK) for place in _places(device_map))


def _places(device_map: Any) -> list[Any]:
    return list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]


def _holds(outer: str, inner: str) -> bool:
    return not outer or inner.startswith(f"{outer}.")
