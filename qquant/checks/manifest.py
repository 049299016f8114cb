"""What a manifest of ours says, held against the folder: hashes of files, settings, and what went otherwise than asked.

How a manifest is written is checkpoint.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qquant.checkpoint import LOG_NAME, MANIFEST_NAME
from qquant.checks.findings import Finding, problem, warning
from qquant.gptq_keys import GptqFileConfig
from qquant.identity import sha256
from qquant.json_files import read_json
from qquant.telling import OnProgress, unheard

_SCHEMA = 1
_ADDED_LATER = ("README.md", ".gitattributes", ".gitignore")
"""Files that a hub or a publisher adds."""
_SETTINGS = ("bits", "group_size", "sym")


def unchanged_files(folder: Path, on_progress: OnProgress = unheard) -> dict[str, bool] | None:
    """Whether each file that the manifest names is there unchanged; None without a manifest of ours."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    named = read_json(folder / MANIFEST_NAME).get("files")
    if not isinstance(named, dict):
        return {MANIFEST_NAME: False}
    # Only the last part of a name: a manifest, like an index, has no business outside its folder.
    files = {name: folder / Path(name).name for name in named}
    unchanged: dict[str, bool] = {}
    for name, file in files.items():
        on_progress("comparing files with the manifest", len(unchanged), len(files))
        unchanged[name] = file.is_file() and sha256(file) == named[name]
    return unchanged


def check_manifest(
    folder: Path, settings: GptqFileConfig | None, on_progress: OnProgress = unheard
) -> Iterator[Finding]:
    """The findings about a folder's manifest, and about the log of its making."""
    unchanged = unchanged_files(folder, on_progress)
    if unchanged is None:
        if (folder / LOG_NAME).is_file():
            text = f"{LOG_NAME} is there and the manifest that vouches for it is not; make the checkpoint again"
            yield warning("manifest", MANIFEST_NAME, text)
    else:
        yield from _manifest(folder, read_json(folder / MANIFEST_NAME), unchanged, settings)
    if (folder / LOG_NAME).is_file():
        yield from _log(read_json(folder / LOG_NAME))


def _manifest(
    folder: Path, content: dict[str, Any], unchanged: dict[str, bool], settings: GptqFileConfig | None
) -> Iterator[Finding]:
    if content.get("schema_version") != _SCHEMA:
        got = str(content.get("schema_version"))[:20]
        yield problem(
            "manifest",
            MANIFEST_NAME,
            f"schema_version must be {_SCHEMA}, got {got}; use the qquant of its time",
        )
    for name, same in unchanged.items():
        if not same:
            there = (folder / Path(name).name).is_file()
            state = "is not what the manifest vouches for" if there else "is named by the manifest and is not there"
            yield problem("manifest", name, f"{state}; get the checkpoint again")
    known = {*unchanged, MANIFEST_NAME, *_ADDED_LATER}
    for path in sorted(folder.iterdir()):
        if path.name not in known and path.is_file():
            yield warning("manifest", path.name, "is not named by the manifest, so nobody vouches for it")
    done = content.get("config")
    general = settings.for_module("") if settings is not None else None
    if isinstance(done, dict) and general is not None:
        for key in _SETTINGS:
            if (named := done.get(key)) != (meant := getattr(general, key)):
                text = f"the manifest says {str(named)[:20]}, and the quantization keys say {meant}"
                yield problem("manifest", key, f"{text}; one of the files is of another checkpoint")
    fallbacks = content.get("fallbacks")
    for name, said in fallbacks.items() if isinstance(fallbacks, dict) else ():
        yield warning("manifest", name, f"was not quantized as asked: {str(said)[:200]}")


def _log(content: dict[str, Any]) -> Iterator[Finding]:
    modules = content.get("modules")
    for record in modules if isinstance(modules, list) else ():
        if not isinstance(record, dict):
            yield problem("manifest", LOG_NAME, "must list what was done to each module; make the checkpoint again")
            return
        raised, error = record.get("damp_escalations"), record.get("relative_error")
        name = str(record.get("name"))[:200]
        if isinstance(raised, int) and raised > 0 and not record.get("fallback"):
            yield warning("manifest", name, f"damping had to be raised {raised} times: calibration hardly reached it")
        if isinstance(error, int | float) and error >= 1:
            yield warning("manifest", name, f"its relative error is {error:.2g}: as much was lost as was there")
