"""What adapter_config.json of a peft LoRA adapter says: ranks, scales, and what must be in the file beside it.

Tensors and merging are adapter.py. A key that is not known to leave the merged weights alone is an error.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qquant.errors import BadModelError
from qquant.json_files import read_json

_log = logging.getLogger("qquant")

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

# Keys that say how an adapter was trained, or that the weights file says as well.
_HARMLESS = frozenset((
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_bias", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "task_type",
))  # fmt: skip
_READ = frozenset((
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "modules_to_save", "r", "rank_pattern",
    "target_modules", "use_dora", "use_rslora",
))  # fmt: skip
# Ways to begin that leave the base model's weights as they are; the others train on top of changed ones.
_SOUND_STARTS = ("eva", "gaussian", "orthogonal")
_BIASES = ("none", "all", "lora_only")
_Number = TypeVar("_Number", int, float)
_LARGEST_ALPHA = 10**300
_LARGEST_RANK = 1 << 20  # far above any matrix side that is adapted; past it the scale could leave the floats
# Patterns are regular expressions of whoever made the adapter, and a nested repeat may be tried for ever. So: names,
# one repeated character at a time, and few enough choices that trying all of them stays quick.
_PATTERN = re.compile(r"(?:(?:\\[.d\-]|\[[\w\-]+\]|[\w.\-])[*+]?|\((?:\?:)?|[)|^$])*", re.ASCII)
_CHOICE = re.compile(r"[*+(]")
_MOST_CHOICES = 2
_LONGEST_NAME = 256


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The parts of adapter_config.json that merging needs."""

    folder: Path
    r: int
    """Rank of the low-rank matrices where ``ranks`` says nothing else."""
    alpha: float
    """Numerator of the scale where ``alphas`` says nothing else."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Regular expression of module names -> rank."""
    alphas: Mapping[str, float] = field(default_factory=dict)
    """Regular expression of module names -> alpha."""
    rank_stabilized: bool = False
    """The scale is alpha / sqrt(rank), and not alpha / rank."""
    dora: bool = False
    bias: str = "none"
    """Which biases were trained: none, all, or those of adapted modules ("lora_only")."""
    saved: tuple[str, ...] = ()
    """Modules that were trained whole; any module whose name ends so."""
    targets: tuple[str, ...] = ()
    """Modules that were adapted; empty where the rule is not a plain list of endings."""
    narrowed: bool = False
    """Other keys say that not all modules of ``targets`` were adapted."""

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Read and check adapter_config.json.

        Raises:
            BadModelError: absent, of another kind than LoRA, or with keys that are not understood.
        """
        if not folder.is_dir():
            raise BadModelError(f"an adapter must be a local folder, and {folder} is none; download it first")
        if not (folder / CONFIG_NAME).is_file():
            raise BadModelError(f"an adapter folder must hold {CONFIG_NAME}, {folder} does not")
        content = read_json(folder / CONFIG_NAME)
        kind = content.get("peft_type")
        if str(kind).upper() != "LORA":
            raise BadModelError(f"only LoRA adapters can be merged, {CONFIG_NAME} of {folder} has peft_type {kind!r}")
        for key, value in content.items():
            if key not in _HARMLESS | _READ and value not in (None, False, [], {}, ""):
                raise BadModelError(
                    f"{CONFIG_NAME} of {folder} sets {key}, which is not understood here; merge the adapter with "
                    "peft's merge_and_unload, save the model, and start from that"
                )
        _check_start(folder, content.get("init_lora_weights", True))
        try:
            return cls._from(folder, content)
        except (TypeError, ValueError) as error:
            raise BadModelError(f"{CONFIG_NAME} of {folder} is no LoRA configuration: {error}") from error

    @classmethod
    def _from(cls, folder: Path, content: Mapping[str, Any]) -> Settings:
        ranks = {key: _rank(value) for key, value in _table(content.get("rank_pattern")).items()}
        alphas = {key: _alpha(value) for key, value in _table(content.get("alpha_pattern")).items()}
        for pattern in (*ranks, *alphas):
            _check_pattern(pattern)
        bias = content.get("bias") or "none"
        if bias not in _BIASES:
            raise ValueError(f"bias must be one of {_BIASES}, got {bias!r}")
        targets = content.get("target_modules")
        narrowed = any(content.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern"))
        return cls(
            folder=folder,
            r=_rank(content.get("r", 8)),
            alpha=_alpha(content.get("lora_alpha", 8)),
            ranks=ranks,
            alphas=alphas,
            rank_stabilized=_flag(content, "use_rslora"),
            dora=_flag(content, "use_dora"),
            bias=bias,
            saved=_names(content.get("modules_to_save")),
            targets=() if isinstance(targets, str) else _names(targets),
            narrowed=narrowed,
        )

    def rank(self, module: str) -> int:
        """Rank of a module's low-rank matrices."""
        return _first_match(self.ranks, module, self.r)

    def scale(self, module: str) -> float:
        """Factor of a module's low-rank product."""
        rank, alpha = self.rank(module), _first_match(self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank

    def check_names(self, tensors: Collection[str]) -> None:
        """Compare the modules that adapter_config.json names with those of the model.

        One that matches nothing is logged, since a list often serves several families. peft passes over it too.

        Args:
            tensors: names of the model's tensors, tied copies among them.

        Raises:
            BadModelError: ``target_modules`` names no module of the model at all, which peft refuses as well.
        """
        endings = {
            ".".join(parts[start:end])
            for parts in (name.split(".") for name in tensors)
            for end in range(1, len(parts))
            for start in range(end)
        }
        strays = {
            key: [name for name in names if name not in endings]
            for key, names in (("target_modules", self.targets), ("modules_to_save", self.saved))
        }
        if self.targets and len(strays["target_modules"]) == len(self.targets):
            raise BadModelError(
                f"target_modules in {CONFIG_NAME} of {self.folder} must name modules of the model, and it has none of "
                f"{', '.join(self.targets)[:200]}; it is the adapter of another model, or the list is mistyped"
            )
        for key, names in strays.items():
            if names:
                _log.warning(
                    "%s of %s names what the model does not have: %s", key, self.folder, ", ".join(names)[:200]
                )

    def check_complete(
        self, shapes: Mapping[str, tuple[int, ...]], *, adapted: Collection[str], whole: Collection[str]
    ) -> None:
        """Refuse a weights file that lacks what adapter_config.json says was trained.

        Args:
            shapes: of the model's tensors.
            adapted: modules with low-rank matrices in the file.
            whole: tensors of the model that the file replaces.

        Raises:
            BadModelError: names the first one that is missing.
        """
        missing = [
            name
            for name in shapes
            if name not in whole
            and (
                any(_under(name, ending) for ending in self.saved)
                or (name.endswith(".bias") and self.bias == "all")
                or (name.endswith(".bias") and self.bias == "lora_only" and name.removesuffix(".bias") in adapted)
            )
        ]
        missing += [
            name
            for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) == 2 and name not in whole
            for module in [name.removesuffix(".weight")]
            if not self.narrowed
            and module not in adapted
            and any(f".{module}".endswith(f".{ending}") for ending in self.targets)
        ]
        if missing:
            raise BadModelError(
                f"by its {CONFIG_NAME} the adapter in {self.folder} trained {missing[0]} ({len(missing)} such), and "
                "its weights file holds nothing for it; save the adapter again, or correct the configuration"
            )


def _check_start(folder: Path, start: Any) -> None:
    if isinstance(start, str) and start.lower() not in _SOUND_STARTS:
        raise BadModelError(
            f"an adapter must stand on the base model's own weights, and one begun by init_lora_weights {start!r} "
            f"({folder}) may stand on changed ones; convert it when saving (peft: "
            "path_initial_model_for_weight_conversion), or merge it with peft"
        )


def _first_match(patterns: Mapping[str, _Number], module: str, otherwise: _Number) -> _Number:
    """The value of the first pattern that a name ends with, as peft finds it."""
    if patterns and len(module) > _LONGEST_NAME:
        raise BadModelError(
            f"a module that patterns apply to must have a name of at most {_LONGEST_NAME}, got {module}"
        )
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _under(tensor: str, ending: str) -> bool:
    """Whether a tensor belongs to a module whose name ends so, or to a part of one (``.`` separates names)."""
    return f".{ending}." in f".{tensor}"


def _rank(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _LARGEST_RANK:
        raise ValueError(f"a rank must be a positive whole number, got {repr(value)[:40]}")
    return value


def _alpha(value: Any) -> float:
    # A whole number of JSON may be larger than any float, which isfinite() cannot take.
    too_large = isinstance(value, int) and abs(value) > _LARGEST_ALPHA
    if isinstance(value, bool) or not isinstance(value, int | float) or too_large or not math.isfinite(value):
        raise ValueError(f"an alpha must be a finite number, got {repr(value)[:40]}")
    return float(value)


def _flag(content: Mapping[str, Any], key: str) -> bool:
    value = content.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"{key} must be true or false, got {repr(value)[:40]}")
    return bool(value)


def _check_pattern(pattern: str) -> None:
    choices = len(_CHOICE.findall(pattern))
    if len(pattern) > _LONGEST_NAME or choices > _MOST_CHOICES or not _PATTERN.fullmatch(pattern):
        raise ValueError(
            f"a pattern must be a module's name with at most {_MOST_CHOICES} of .*, \\d+ or (a|b), "
            f"got {repr(pattern)[:80]}; name the modules one by one, or merge the adapter with peft"
        )
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from error


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise ValueError(f"a pattern must be an object of names and numbers, got {value!r}")
    return value or {}


def _names(value: Any) -> tuple[str, ...]:
    names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"modules must be given as a list of names, got {value!r}")
    return tuple(names)
