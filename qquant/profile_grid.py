"""A profile: which models in which cells, each cell measured by a process of its own, and the record of all of them.

What a cell's process does is profile_cell.py's. Finished cells are kept in a journal, so that a run can go on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PretrainedConfig

import qquant
from qquant.baselines import BitsAndBytesKind, check_bitsandbytes
from qquant.cell_process import measure_apart
from qquant.checkpoint import is_quantized, quantization_config
from qquant.code_keys import code_ignored
from qquant.errors import BadModelError, UsageError
from qquant.eval_inputs import labelled, refuse_below_one, stored_dtype
from qquant.eval_models import rows as folder_rows
from qquant.eval_record import finished_result
from qquant.footprint import ModelShapes, footprint
from qquant.identity import model_sha256
from qquant.journal import Journal, resumable
from qquant.measure import environment
from qquant.model_folder import read_config, resolve_folder, skeleton
from qquant.models.sizes import SIZES, size_config
from qquant.profile_report import CellKey, CellRequest, Profile, ProfileCell
from qquant.random_models import BITS, DTYPES, config_from_dict
from qquant.records import Footprint, KVKind, Precision
from qquant.results import ModelRow, Result
from qquant.shapes import model_shapes
from qquant.sources import compute_dtype, pick_device
from qquant.stored_bytes import refuse_beyond_counting, refuse_uneven_groups
from qquant.telling import OnProgress, unheard

_LOG = logging.getLogger("qquant.profile_grid")
PLAIN = "plain"
"""Names the cache that keeps keys and values in the dtype that a model computes in, whichever that is."""

_FLOAT: dict[torch.dtype, Literal["fp32", "bf16", "fp16"]] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The cells that each model is measured in: every combination of these, and how."""

    precisions: tuple[str, ...] | None = None
    """None: a folder's own; bf16 for random weights."""
    kv_caches: tuple[str, ...] = (PLAIN,)
    """Kinds, or "plain"."""
    batches: tuple[int, ...] = (1,)
    prompt_tokens: tuple[int, ...] = (128,)
    new_tokens: tuple[int, ...] = (32,)
    warmups: int = 1
    repeats: int = 5
    seed: int = 0
    threads: int | None = None
    group_size: int = 128
    """Of random int8 and int4 weights."""
    memory_limit_bytes: int | None = None
    """A cell may take no more, of the process on a CPU and of the device on a GPU; None: what is free."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model to measure, and in which precisions."""

    label: str
    folder: Path | None
    config: PretrainedConfig
    precisions: tuple[Precision, ...]
    dtypes: tuple[torch.dtype, ...]
    """What each precision computes in."""
    group_size: int
    sha256: str | None


def profile_models(
    folders: Sequence[str | Path],
    random_weights: Sequence[str],
    grid: Grid,
    *,
    journal: Path,
    resume: bool = False,
    device: str = "auto",
    command: str = "profile_models() from Python",
    on_progress: OnProgress = unheard,
) -> Result:
    """Measure memory and speed of models over a grid; a cell that has no memory, or fails, is labelled and passed by.

    Args:
        folders: model folders or hub ids, quantized or not.
        random_weights: names of sizes (``qwen-7b``), folders, or config.json files, whose shapes get random weights.
        grid: the cells.
        journal: where finished cells are kept until the caller has published the result; its to delete.
        resume: go on with the cells of an earlier run of the same kind.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        command: what the record says it was made by.
        on_progress: told what is being done.

    Returns:
        The record, its section ``profile`` with one cell for each combination.

    Raises:
        StoppedError: Ctrl-C or SIGTERM; finished cells are in the journal.
        QquantError: bad options or models.
    """
    place = pick_device(device)
    _check(grid)
    targets = _targets(folders, random_weights, grid, place, on_progress)
    requests = [request for target in targets for request in _requests(target, grid, place)]
    shapes = {target.label: _shapes(target) for target in targets}
    rows = _rows(targets, {label: parameters for label, (_, parameters) in shapes.items()})
    if grid.threads is not None:
        torch.set_num_threads(grid.threads)  # as in the cells, and as the record says
    kept = Journal(journal, _identity(targets, grid, place), resume=resume)
    cells = []
    with resumable(kept, "cells"):
        for number, (target, request) in enumerate(requests, 1):
            key = request.key
            if key.name in kept:
                found = ProfileCell.model_validate_json(json.dumps(kept[key.name]))
            else:
                found = measure_apart(request, partial(_tell, on_progress, key.name, number, len(requests)))
                if found.status != "failed":  # a resumed run tries those once more
                    kept.add(key.name, found.model_dump(mode="json"))
            predicted = _predicted(shapes[key.label][0], request, target)
            cells.append(found.model_copy(update={"predicted": predicted}))
    dtypes = {dtype for target in targets for dtype in target.dtypes}
    result = finished_result(dtype=targets[0].dtypes[0], device=place, rows=rows, seed=grid.seed, command=command)
    return result.model_copy(
        update={
            "profile": _profile(result, grid, cells),
            "compute_dtype": result.compute_dtype if len(dtypes) == 1 else "mixed",
        }
    )


def _tell(on_progress: OnProgress, name: str, number: int, cells: int, done: int, steps: int) -> None:
    """Say how far the whole grid is, in steps; all cells have as many."""
    on_progress(f"profiling: cell {number} of {cells}, {name}", (number - 1) * steps + done, cells * steps)


def _profile(result: Result, grid: Grid, cells: Sequence[ProfileCell]) -> Profile:
    return Profile(
        device_memory_bytes=result.environment.device_memory_bytes,
        memory_limit_bytes=grid.memory_limit_bytes,
        random_weights=tuple(row.label for row in result.rows if row.random_weights),
        warmups=grid.warmups,
        repeats=grid.repeats,
        cells=tuple(cells),
    )


def _check(grid: Grid) -> None:
    """Refuse what no model could be measured with."""
    for option, values, known in (
        ("precision", grid.precisions or (), get_args(Precision)),
        ("kv", grid.kv_caches, (PLAIN, *get_args(KVKind))),
    ):
        if unknown := [value for value in values if value not in known]:
            raise UsageError(f"--{option} must be of {', '.join(known)}, got {unknown[0]!r}")
    lists = {"batch": grid.batches, "prompt_tokens": grid.prompt_tokens, "new_tokens": grid.new_tokens}
    asked = (PLAIN,) if grid.precisions is None else grid.precisions
    for name, numbers in {**lists, "kv": grid.kv_caches, "precision": asked}.items():
        if not numbers or len(set(numbers)) < len(numbers):
            raise UsageError(f"--{name.replace('_', '-')} must be a list without repetitions, got {list(numbers)}")
    least: dict[str, int | None] = {name: min(numbers) for name, numbers in lists.items()}
    refuse_below_one(**least, repeats=grid.repeats, threads=grid.threads, memory_limit=grid.memory_limit_bytes)
    refuse_beyond_counting(*grid.batches, *grid.prompt_tokens, *grid.new_tokens, grid.repeats, grid.warmups)
    if not -(2**63) <= grid.seed < 2**63:
        raise UsageError(f"--seed must fit 64 bits, got {grid.seed}")
    if grid.warmups < 0:
        raise UsageError(f"--warmups must be at least 0, got {grid.warmups}")


def _targets(
    folders: Sequence[str | Path],
    random_weights: Sequence[str],
    grid: Grid,
    device: torch.device,
    on_progress: OnProgress,
) -> list[Target]:
    """All models, in the order they were named, folders first, under labels that are theirs alone."""
    if not folders and not random_weights:
        raise UsageError("a profile needs a model; name a folder, or a size by --random-weights qwen-7b")
    targets = [*_stored(folders, grid, device, on_progress)]
    stored = [target.label for target in targets]
    for target in _random(random_weights, grid):
        label = f"{target.label} (random)" if target.label in stored else target.label
        if any(other.label == label for other in targets):
            raise UsageError(f"every model is measured once, --random-weights names {target.label} twice")
        targets.append(replace(target, label=label))
    return targets


def _stored(names: Sequence[str | Path], grid: Grid, device: torch.device, on_progress: OnProgress) -> Iterator[Target]:
    """Folders, each in the precision that its weights are in, a plain one also as bitsandbytes rounds it."""
    if sizes := [name for name in names if str(name).lower() in SIZES and not Path(name).exists()]:
        raise UsageError(f"{sizes[0]} is a size and no folder; measure it with --random-weights {sizes[0]}")
    for label, folder in labelled([resolve_folder(str(name)) for name in names]).items():
        config = read_config(folder)
        dtype = compute_dtype(stored_dtype(folder), device)
        own: Precision = _FLOAT[dtype]
        group_size, allowed = grid.group_size, [own, *get_args(BitsAndBytesKind)]
        if is_quantized(folder):
            keys = quantization_config(folder)
            found = next((name for name, bits in BITS.items() if bits == keys.get("bits")), None)
            if found is None:
                raise UsageError(f"a profile measures int8 and int4 weights, {folder} has {keys.get('bits')} bits")
            own, group_size = found, keys.get("group_size", grid.group_size)
            allowed = [own]
        precisions: tuple[Any, ...] = grid.precisions or (own,)
        others = [name for name in precisions if name not in allowed]
        if others:
            raise UsageError(
                f"a folder is measured as it is, {folder} is {own} and --precision asks for {', '.join(others)}; "
                "quantize it first (qquant quantize) and name that folder too, or measure its shapes with "
                f"--random-weights {folder}"
            )
        for name in {*precisions} & {*get_args(BitsAndBytesKind)}:
            check_bitsandbytes(folder, name)
        digest = model_sha256(folder, partial(on_progress, f"hashing {label}"))
        yield Target(
            label=label,
            folder=folder,
            config=config,
            precisions=precisions,
            dtypes=(dtype,) * len(precisions),
            group_size=group_size,
            sha256=digest,
        )


def _random(names: Sequence[str], grid: Grid) -> Iterator[Target]:
    """Shapes, each in every precision asked for; packed weights compute in the dtype that the configuration names."""
    for name in names:
        path = Path(name).expanduser()
        if path.exists():
            folder = path.parent if path.name == "config.json" else path
            config, label = read_config(folder), folder.resolve().name
        else:
            config, label = config_from_dict(size_config(name)), name.lower()
        named = getattr(config, "dtype", None)
        packed = named if named in _FLOAT else torch.bfloat16
        precisions: tuple[Any, ...] = grid.precisions or ("bf16",)
        if unmade := [precision for precision in precisions if precision not in (*DTYPES, *BITS)]:
            raise UsageError(f"random weights are made in {', '.join([*DTYPES, *BITS])}, got {unmade[0]}")
        yield Target(
            label=label,
            folder=None,
            config=config,
            precisions=precisions,
            dtypes=tuple(DTYPES.get(precision, packed) for precision in precisions),
            group_size=grid.group_size,
            sha256=None,
        )


def _requests(target: Target, grid: Grid, device: torch.device) -> Iterator[tuple[Target, CellRequest]]:
    """The cells of one model, small ones first within each precision and kind of cache."""
    config = None
    if target.folder is None:
        config = json.loads(target.config.to_json_string(use_diff=False))
    for precision, dtype in zip(target.precisions, target.dtypes, strict=True):
        plain = _FLOAT[dtype]
        # "plain" may stand for one that is named as well.
        kinds: list[Any] = list(dict.fromkeys(plain if kind == PLAIN else kind for kind in grid.kv_caches))
        for kv in kinds:
            if kv in DTYPES and kv != plain:
                raise UsageError(
                    f"a cache that is not quantized is kept in what the model computes in, {plain} for "
                    f"{target.label} {precision}, got --kv {kv}; write --kv {PLAIN}"
                )
            for batch in grid.batches:
                for prompt in grid.prompt_tokens:
                    for new in grid.new_tokens:
                        key = CellKey(
                            label=target.label,
                            precision=precision,
                            kv_cache=kv,
                            batch=batch,
                            prompt_tokens=prompt,
                            new_tokens=new,
                        )
                        yield target, _request(key, target, config, dtype, grid, device)


def _request(
    key: CellKey, target: Target, config: Any, dtype: torch.dtype, grid: Grid, device: torch.device
) -> CellRequest:
    named: dict[torch.dtype, Literal["float32", "bfloat16", "float16"]] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    return CellRequest(
        key=key,
        folder=None if target.folder is None else str(target.folder.resolve()),
        config=config,
        compute_dtype=named[dtype],
        group_size=target.group_size,
        device=str(device),
        threads=grid.threads,
        seed=grid.seed,
        warmups=grid.warmups,
        repeats=grid.repeats,
        memory_limit_bytes=grid.memory_limit_bytes,
        ignore_code=code_ignored(),
    )


def _shapes(target: Target) -> tuple[ModelShapes | None, int]:
    """What predictions are made from (None, and said, where this kind of model has none), and the parameters."""
    try:
        shapes = model_shapes(target.config)
    except BadModelError as error:
        model: Any = skeleton(target.config, target.folder or Path(target.label))  # raises if there is no such model
        model.tie_weights()
        _LOG.warning("%s is measured without a prediction: %s", target.label, error)
        return None, sum(parameter.numel() for parameter in model.parameters())
    if target.folder is None and {*target.precisions} & {*BITS}:
        refuse_uneven_groups(shapes, target.group_size)
    return shapes, shapes.parameters


def _predicted(shapes: ModelShapes | None, request: CellRequest, target: Target) -> Footprint | None:
    """What the planner says; None for the kinds that it has no formula for."""
    key = request.key
    if shapes is None or key.precision not in (*DTYPES, *BITS):
        return None
    return footprint(
        shapes,
        precision=key.precision,
        kv_cache=key.kv_cache,
        batch=key.batch,
        prompt_tokens=key.prompt_tokens,
        new_tokens=key.new_tokens,
        device="cuda" if request.device.startswith("cuda") else "cpu",
        group_size=target.group_size,
        compute_dtype=_FLOAT[getattr(torch, request.compute_dtype)],
    )


def _rows(targets: Sequence[Target], parameters: Mapping[str, int]) -> tuple[ModelRow, ...]:
    """A row per model; their order is the order they were named in, and the first counts as the baseline."""
    rows: list[ModelRow] = []
    for target in targets:
        if target.folder is not None:
            row = _folder_row(target, target.folder, parameters[target.label])
        else:
            row = ModelRow(
                label=target.label,
                role="candidate",
                model_type=target.config.model_type,
                parameters=parameters[target.label],
                random_weights=True,
                checkpoint_dtype=str(target.dtypes[0]).removeprefix("torch."),
            )
        rows.append(row if rows else row.model_copy(update={"role": "baseline"}))
    return tuple(rows)


def _folder_row(target: Target, folder: Path, parameters: int) -> ModelRow:
    """A folder's row; an evaluation takes the first of its folders for the original, and here each stands alone."""
    (row,) = folder_rows({target.label: folder}, identities={target.label: target.sha256 or ""})
    cost = None if row.weights_bytes is None else 8 * row.weights_bytes / parameters
    return row.model_copy(update={"role": "candidate", "parameters": parameters, "bits_per_weight": cost})


def _identity(targets: Sequence[Target], grid: Grid, device: torch.device) -> dict[str, Any]:
    """All that the figures of a cell depend on, as JSON values."""
    found = asdict(environment(torch.device("cpu"), qquant_version=qquant.__version__))
    models = {}
    for target in targets:
        shapes = json.loads(target.config.to_json_string(use_diff=False))
        shapes.pop("_name_or_path", None)  # where it lies decides nothing
        models[target.label] = target.sha256 or shapes
    machine = ("python", "torch", "transformers", "qquant", "cpu", "libraries")
    own = {"profile": asdict(grid), "device": str(device), "models": models}
    return own | {name: found[name] for name in machine}
