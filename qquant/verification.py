"""Verifying a GPTQ checkpoint, ours or another tool's: every check in turn, and what each found.

The checks are the rooms of ``checks/``. Nothing in the folder is run, and nothing outside it is read.
"""

from __future__ import annotations

import getpass
import platform
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from qquant.checkpoint import MANIFEST_NAME
from qquant.checks.files import check_shards, look_around
from qquant.checks.findings import Check, Finding, Verification, problem, shortened, warning
from qquant.checks.keys import check_code_keys, check_keys
from qquant.checks.manifest import check_manifest
from qquant.checks.names import Stored, compare, left_alone
from qquant.checks.packed import PackedLinear, mean_step, packed_values
from qquant.checks.plain import plain_values, tied_values
from qquant.checks.side_text import check_json, check_text
from qquant.checks.tokenizer import check_templates, check_tokenizer
from qquant.code_keys import ignoring_code
from qquant.errors import BadModelError, QquantError, UsageError
from qquant.gptq_keys import GptqFileConfig
from qquant.json_files import read_json
from qquant.model_folder import read_config, resolve_folder, skeleton
from qquant.models.layouts import find_layout
from qquant.shapes import model_shapes
from qquant.shards import CheckpointReader
from qquant.telling import OnProgress, unheard
from qquant.tensor_parallel import Packing, uncut
from qquant.text_sources import one_line

_ABOUT = {
    "files": "files are files of this folder, and none is a pickle",
    "json": "JSON files say the same to every reader",
    "code": "no code, and no key that names some",
    "keys": "quantization keys are known, agree and describe the tensors",
    "shards": "weight files are whole, and the index names every tensor",
    "tensors": "every tensor of the model is there, of the right dtype and shape, and no other",
    "groups": "g_idx names each group as often as it has rows",
    "zeros": "zeros are where the keys say",
    "scales": "scales are finite, and reach what float16 holds",
    "codes": "codes were written",
    "values": "every other number is finite and meant",
    "tokenizer": "the tokenizer loads, and every id has a row",
    "templates": "chat templates are Jinja that only writes text",
    "private": "no path of a machine, no secret, none of anybody's text",
    "tensor parallel": "matrices can be cut over several cards",
    "manifest": "files are what the manifest vouches for",
}
_OF_PACKED = ("groups", "zeros", "scales", "codes")
_OF_WEIGHTS = ("tensors", *_OF_PACKED, "values")
CARDS = (2, 4, 8)
"""Over how many cards a fit is told where nobody asks."""
_MOST_CARDS = 1024
_OFF_BY_ONE, _FEW_BITS = (0.5, 1.5), 4
_COMMON_NAMES = frozenset(
    ("root", "user", "admin", "ubuntu", "localhost", "runner", "jovyan", "vscode", "builder", "docker")
)
_LEAST_NAME = 5
"""Letters from which on the name of a machine or user is not likely to be a word by chance."""


def verify_checkpoint(path: str | Path, *, tp: Collection[int] = (), on_progress: OnProgress = unheard) -> Verification:
    """Check a quantized model's folder: files, keys, every tensor, tokenizer, private text, manifest.

    Every tensor is read once, in pieces, so memory does not grow with the model. Nothing in the folder is run.

    Args:
        path: folder, or a hub id.
        tp: numbers of cards that the matrices must be cut over; it is a problem if they cannot be. Empty: 2, 4 and 8
            are told, and are no problem.
        on_progress: told which tensor is read.

    Returns:
        What each check found. ``sound`` is True where nothing is a problem; ``findings`` has everything.

    Raises:
        BadModelError: no such folder, or none that holds config.json.
        UsageError: a number of cards below 1.
    """
    if any(not 1 <= ranks <= _MOST_CARDS for ranks in tp):
        raise UsageError(f"tp must be numbers of cards from 1 to {_MOST_CARDS}, got {sorted(tp)}")
    folder = resolve_folder(str(path))
    if not (folder / "config.json").exists():
        raise BadModelError(f"a model folder must hold config.json, {folder} does not")
    with ignoring_code():  # what names code is a finding of its own; the rest can be looked at without it
        return _Inspection(folder, tp, on_progress).verification()


class _Inspection:
    """One folder being looked at; what one check learns, later ones use."""

    def __init__(self, folder: Path, tp: Collection[int], on_progress: OnProgress) -> None:
        self.folder, self.tp, self.on_progress = folder, tp, on_progress
        self.found: list[Finding] = []
        self.left_out: dict[str, str] = {}
        self.config: Any = None
        self.model: Any = None
        self.reader: CheckpointReader | None = None
        self.settings: GptqFileConfig | None = None
        self.stored = Stored()
        self.fits: dict[int, str | None] = {}

    def verification(self) -> Verification:
        """Make every check."""
        folder = self.folder
        config = self._guarded("json", read_json, folder / "config.json") or {}
        model_type = config.get("model_type")
        around = self._guarded("files", look_around, folder, model_type)
        self.found += around[0] if around else []
        if around is None or not around[1]:
            self.left_out = dict.fromkeys(_ABOUT.keys() - {"files"}, "a file of the folder cannot be opened")
            return self._result()
        self._collect("json", check_json, folder)
        self._collect("code", check_code_keys, folder, model_type)
        self._weights()
        self._collect("tokenizer", check_tokenizer, folder, self._rows())
        self._collect("templates", check_templates, folder)
        metadata = self.reader.metadata if self.reader is not None else {}
        self._collect("private", check_text, folder, metadata, _names_here())
        self._collect("tensor parallel", self._parallel)
        self._collect("manifest", check_manifest, folder, self.settings, self.on_progress)
        if not (folder / MANIFEST_NAME).exists():
            self.left_out["manifest"] = "there is none of ours"
        return self._result()

    def _weights(self) -> None:
        """Keys, headers, names and every number."""
        self.reader = reader = self._guarded("shards", CheckpointReader, self.folder)
        names = reader.entries if reader is not None else {}
        packed = [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]
        keys = self._guarded("keys", check_keys, self.folder, packed)
        if keys is not None:
            self.settings = keys[0]
            self.found += keys[1]
        self.config = self._guarded("tensors", read_config, self.folder)
        self.model = self._guarded("tensors", self._skeleton) if self.config is not None else None
        if reader is None:
            self.left_out |= dict.fromkeys(_OF_WEIGHTS, "the weight files are not whole")
            return
        self._collect("shards", check_shards, self.folder, reader)
        self.stored = self._guarded("tensors", compare, reader, self.model, self.settings) or self.stored
        self.found += self.stored.findings
        if self.model is not None and self.settings is not None:
            self._collect("keys", self._left_alone)
        if missed := len(packed) - len(self.stored.packed):
            self.left_out |= dict.fromkeys(_OF_PACKED, f"{missed} linears do not fit the model and the keys")
        self._numbers(reader)

    def _numbers(self, reader: CheckpointReader) -> None:
        packed, plain = self.stored.packed, self.stored.plain
        for done, linear in enumerate(packed):
            self.on_progress(f"reading: {linear.name}", done, len(packed) + len(plain))
            self._collect("codes", packed_values, reader, linear)
        self._collect("zeros", _off_by_one, reader, packed)
        for done, name in enumerate(plain, len(packed)):
            self.on_progress(f"reading: {name}", done, len(packed) + len(plain))
            filled, zero = name in self.stored.filled, name in self.stored.odd_biases
            self._collect("values", plain_values, reader, name, filled=filled, zero=zero)
        for name, original in self.stored.tied.items():
            self._collect("values", tied_values, reader, name, original)

    def _skeleton(self) -> Any:
        """The model without weights, and without what packed tensors would make of it."""
        if hasattr(self.config, "quantization_config"):
            del self.config.quantization_config
        return skeleton(self.config, self.folder)

    def _left_alone(self) -> Iterator[Finding]:
        assert self.settings is not None
        layout = find_layout(self.model, self.config.model_type)
        return left_alone(self.model, layout, self.stored, self.settings)

    def _rows(self) -> int | None:
        embeddings = self.model.get_input_embeddings() if self.model is not None else None
        return None if embeddings is None else int(embeddings.weight.shape[0])

    def _parallel(self) -> Iterator[Finding]:
        if self.model is None:
            self.left_out["tensor parallel"] = "no model can be built from config.json"
            return
        shapes = model_shapes(self.config)
        packed = {x.name: Packing(x.bits, -1 if x.groups == 1 else x.group_size) for x in self.stored.packed}
        for ranks in sorted(set(self.tp)) or CARDS:
            self.fits[ranks] = uncut(shapes, packed.get, ranks)
            if self.fits[ranks] and self.tp:
                text = f"matrices must be cut in whole heads, groups and words, and cannot: {self.fits[ranks]}"
                yield problem("tensor parallel", f"{ranks} cards", f"{text}; quantize with --tp {ranks}")

    def _collect(self, check: str, findings: Callable[..., Iterable[Finding]], *given: Any, **options: Any) -> None:
        """Keep what a check finds, what it finds before it ends in an error as well."""

        def gather() -> None:
            for finding in findings(*given, **options):
                self.found.append(finding)

        self._guarded(check, gather)

    def _guarded(self, check: str, work: Callable[..., Any], *given: Any) -> Any:
        """What the work gives; None where it ends in an error, which then is the check's finding.

        Any error counts: a folder made by somebody hostile must not end the whole verification.
        """
        try:
            return work(*given)
        except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
            raise
        except QquantError as error:
            self.found.append(problem(check, self.folder.name, str(error).replace(str(self.folder), self.folder.name)))
        except BaseException as error:  # libraries written in Rust raise none that derives from Exception
            text = f"could not be read: {type(error).__name__}: {one_line(error)}"
            self.found.append(problem(check, self.folder.name, text))
        return None

    def _result(self) -> Verification:
        unique = dict.fromkeys(self.found)
        checks = [
            Check(name, about, tuple(shortened(f for f in unique if f.check == name)), self.left_out.get(name, ""))
            for name, about in _ABOUT.items()
        ]
        return Verification(self.folder.resolve().name, tuple(checks), self.fits)


def _off_by_one(reader: CheckpointReader, packed: list[PackedLinear]) -> Iterator[Finding]:
    """Asymmetric zeros do not show their version; but weights are about zero in the mean, so codes are about zeros."""
    # With 8 bits the weights' own mean may be half a step; with 4 it would have to be a fifth of their spread.
    means = [mean_step(reader, linear) for linear in packed if not linear.sym and linear.bits <= _FEW_BITS]
    middle = statistics.median(means) if means else 0.0
    low, high = _OFF_BY_ONE
    if low < abs(middle) < high:
        text = f"codes lie {middle:+.2f} steps from their zeros in the mean: is checkpoint_format the right one?"
        yield warning("zeros", "checkpoint_format", text)


def _names_here() -> list[str]:
    """Of this machine and its user, where they are no common words."""
    names = [platform.node().partition(".")[0]]
    with suppress(OSError, KeyError, ImportError):
        names.append(getpass.getuser())
    return [name for name in names if len(name) >= _LEAST_NAME and name.lower() not in _COMMON_NAMES]
