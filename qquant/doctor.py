"""``qquant doctor``: what this machine and this environment offer qquant, and one fix per missing piece.

It looks and reports. It changes nothing, loads no model and fetches nothing.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qquant.console import user_errors

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 1

State = Literal["ok", "absent", "broken"]

# package -> what stops working without it. These are imported, because a package that is installed may still not load.
CORE = {
    "transformers": "reading models",
    "safetensors": "reading and writing weights",
    "accelerate": "building models without allocating them",
    "pydantic": "checking options",
    "tiktoken": "Qwen's first tokenizer",
    "psutil": "measuring memory",
}
# distribution -> (extra, what it adds). Only looked up: importing these takes seconds, and some rewrite global state.
EXTRAS = {
    "datasets": ("data", "parquet files and hub ids as calibration data"),
    "optimum": ("compat", "loading our checkpoints through plain transformers"),
    "gptqmodel": ("compat", "loading our checkpoints through plain transformers"),
    "lm-eval": ("eval", "the harness behind published benchmark scores"),
    "matplotlib": ("plots", "plots in reports"),
    "bitsandbytes": ("baselines", "NF4 and Int8 rows to compare with"),
}
# Packages of other tools that a user may come with, and which have a line here once they are installed or named:
# distribution -> (why it is not used, what to do).
RETIRED = {
    "auto-gptq": (
        "not used: archived in 2025, it cannot be imported beside transformers 5; qquant.compat.auto_gptq stands in",
        "from qquant.compat.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig  # in place of auto_gptq",
    ),
}
GIB = 1 << 30
PROBE_FLOOR_BYTES = 256 << 20
"""The probe's buffer on processors whose cache is small or unknown."""


def doctor_command(
    names: Annotated[
        list[str] | None, typer.Argument(help="Show these findings only; also explains auto-gptq.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same findings as JSON.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Also measure memory read bandwidth (a second).")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show what works here, what does not, and how to fix it. Exit code 0 if the core works."""
    with user_errors(debug=debug):
        rows = examine(probe=probe, named=names or ())
        healthy = all(row["state"] != "broken" for row in rows)
        rows = _only(rows, names) if names else rows
        if as_json:
            typer.echo(json.dumps({"schema_version": SCHEMA_VERSION, "ok": healthy, "findings": rows}, indent=2))
        else:
            _print(rows, healthy=healthy)
    if not healthy:
        raise typer.Exit(1)


def examine(*, probe: bool = False, named: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every finding as ``area, name, state, found, fix``; only a ``broken`` one keeps the core from working.

    Args:
        probe: also measure how fast one thread reads memory.
        named: packages that the user asks about; one that is not used here is explained even if it is not installed.
    """
    installed = [*_python(), *_torch(), *_core(), *_extras(), *_retired(named)]
    return [*installed, *_native(), *_linears(), *_machine(probe=probe)]


def _only(rows: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The findings with these names; raises UsageError for a name that there is none of."""
    from qquant.errors import UsageError

    found = {_canonical(row["name"]): row for row in rows}
    unknown = [name for name in names if _canonical(name) not in found]
    if unknown:
        raise UsageError(f"doctor has nothing named {unknown[0]!r}; it knows {', '.join(sorted({*found, *RETIRED}))}")
    return [found[name] for name in dict.fromkeys(map(_canonical, names))]


def _canonical(name: str) -> str:
    """As package indexes write a name: auto_gptq is auto-gptq."""
    return name.lower().replace("_", "-")


def _row(area: str, name: str, state: State, found: str, fix: str = "") -> dict[str, Any]:
    return {"area": area, "name": name, "state": state, "found": found, "fix": fix}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Iterator[dict[str, Any]]:
    import qquant

    yield _row("core", "qquant", "ok", qquant.__version__)
    yield _row("core", "python", "ok", f"{platform.python_version()} ({platform.machine()}, {sys.executable})")


def _torch() -> Iterator[dict[str, Any]]:
    """The torch package, the threads it uses, and each GPU it sees."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        yield _row("core", "torch", "broken", _short(error), "pip install torch")
        return
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield _row("core", "torch", "ok", f"{torch.__version__} ({cuda})")
    yield _row("machine", "threads", "ok", f"{torch.get_num_threads()} of {os.cpu_count()} logical cores")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            memory = f"{device.total_memory / GIB:.1f} GiB"
            yield _row("machine", f"gpu {i}", "ok", f"{device.name}, {memory}, sm_{device.major}{device.minor}")
    elif torch.version.cuda:
        yield _row("machine", "gpu", "absent", "torch sees no CUDA device", "nvidia-smi shows if the driver sees one")
    else:
        yield _row("machine", "gpu", "absent", "this torch is a CPU build; everything runs on the CPU")


def _core() -> Iterator[dict[str, Any]]:
    """Every package the core needs: does it load, and is it a version we asked for."""
    bounds = _required_versions()
    for name, use in CORE.items():
        bound = bounds.get(name, "")
        fix = f"pip install '{name}{bound}'  # for {use}"
        try:
            import_module(name)
        except Exception as error:  # a package that does not fit another raises whatever it trips over
            yield _row("core", name, "broken", _short(error), fix)
            continue
        version = _version(name)
        if version and bound and not _satisfies(version, bound):
            yield _row("core", name, "broken", f"{version}, but qquant needs {bound}", fix)
        else:
            yield _row("core", name, "ok", version or "present")


def _required_versions() -> dict[str, str]:
    """Package -> version bounds from our own metadata; empty when we run from a tree that is not installed."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires("qquant") or []]
    except metadata.PackageNotFoundError:
        return {}
    return {item.name: str(item.specifier) for item in requirements if item.marker is None}


def _satisfies(version: str, bound: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(bound).contains(version, prereleases=True)


def _extras() -> Iterator[dict[str, Any]]:
    for name, (extra, use) in EXTRAS.items():
        version = _version(name)
        if version:
            yield _row("optional", name, "ok", version)
        else:
            yield _row("optional", name, "absent", use, f"pip install 'qquant[{extra}]'")


def _retired(named: Sequence[str]) -> Iterator[dict[str, Any]]:
    asked = {_canonical(name) for name in named}
    for name, (why, instead) in RETIRED.items():
        version = _version(name)
        if version or name in asked:
            found = f"{version} is installed and {why}" if version else why
            yield _row("optional", name, "absent", found, instead)


def _native() -> Iterator[dict[str, Any]]:
    from qquant import _native
    from qquant.errors import UsageError

    for name, live, why in _native.status():
        if not live:
            yield _row("native", name, "absent", why, _native.REBUILD)
            continue
        try:
            about = _native.describe(name)
        except UsageError as error:
            yield _row("native", name, "broken", str(error), "unset QQUANT_CPU_ISA")
        else:
            yield _row("native", name, "ok", f"live; {about}" if about else "live")


def _linears() -> Iterator[dict[str, Any]]:
    """What multiplies a packed linear on each device, for common widths and compute dtypes, from the one table."""
    try:
        import torch
    except (ImportError, OSError):
        return  # _torch() has already reported it as broken
    from qquant import linear_ops  # noqa: F401 - declares the operators that kernels are asked for
    from qquant.errors import UsageError
    from qquant.linear_kernels import FLOATS, described, place_of, steps_of

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    for device in ("cpu", *gpus):
        try:
            place = place_of(torch.device(device))
        except UsageError:
            continue  # _native() has already reported what is wrong with our kernels
        for bits in (4, 8):
            # Of int8, torch's kernel reads layers with one scale per row only, which GPTQ files seldom are.
            obstacle = "" if bits == 4 else "and groups have scales of their own"
            for dtype in FLOATS:
                steps = steps_of(place, dtype=dtype, bits=bits, torch_obstacle=obstacle)
                name = f"int{bits} {str(dtype).removeprefix('torch.')} {device}"
                yield _row("linear", name, "absent" if place.missing else "ok", described(steps, place))


def _machine(*, probe: bool) -> Iterator[dict[str, Any]]:
    """Processor, memory and, on request, the measured read bandwidth of one thread."""
    from qquant import _native

    host = _native.host()
    if host is None:
        yield _row("machine", "cpu", "absent", "instruction sets unknown: qquant._host is not live")
    else:
        names = [name for name, present in host.cpu_features().items() if present]
        yield _row("machine", "cpu", "ok", ", ".join(names) or "no x86 vector extension")

    try:
        import psutil
    except ImportError:
        available = None  # _core() has already reported it as broken
    else:
        memory = psutil.virtual_memory()
        available = int(memory.available)
        yield _row("machine", "memory", "ok", f"{available / GIB:.1f} GiB free of {memory.total / GIB:.1f} GiB")

    if probe and host is None:
        yield _row("machine", "read bandwidth", "absent", "the probe is in qquant._host", _native.REBUILD)
    elif probe and host is not None:
        # Twice the cache, so that the next pass finds hardly a byte in it; at most a quarter of what is free.
        size = max(PROBE_FLOOR_BYTES, 2 * host.last_level_cache_bytes())
        size = min(size, (available or 4 * PROBE_FLOOR_BYTES) // 4)
        rate = host.read_bandwidth(size, 0.5)
        yield _row("machine", "read bandwidth", "ok", f"{rate:.1f} GB/s, one thread, {size / (1 << 20):.0f} MiB buffer")


def _short(error: BaseException) -> str:
    """The error's kind and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _print(rows: list[dict[str, Any]], *, healthy: bool) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    # A pipe has no width of its own, and wrapped commands cannot be copied.
    if not console.is_terminal:
        console = Console(width=200)
    console.print(_table(rows))
    fixes = [row for row in rows if row["fix"]]
    if fixes:
        console.print("To change that:")
    for row in fixes:
        console.print(f"  {escape(row['name'])}: {escape(row['fix'])}", highlight=False, soft_wrap=True)
    console.print("The core works." if healthy else "The core does not work; fix the lines marked broken.")


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "absent": "yellow", "broken": "red"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("area", "name", "state", "found"):
        table.add_column(title, overflow="fold")
    area = ""
    for row in sorted(rows, key=lambda row: ("core", "optional", "native", "linear", "machine").index(row["area"])):
        colour = colours[row["state"]]
        state = f"[{colour}]{row['state']}[/{colour}]"
        table.add_row(row["area"] if row["area"] != area else "", escape(row["name"]), state, escape(row["found"]))
        area = row["area"]
    return table
