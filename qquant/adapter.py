"""A peft LoRA adapter on disk: which tensor of a model each of its tensors changes, and whether it fits the model.

adapter_config.json is read in adapter_settings.py; what the merged weights are is merging.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qquant.adapter_settings import WEIGHTS_NAME, Settings
from qquant.errors import BadModelError
from qquant.shards import DTYPES, CheckpointReader

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.(?P<leaf>weight|bias))?"
)
_PARTS = {
    ("lora_A", "weight"): "inner",
    ("lora_B", "weight"): "outer",
    ("lora_embedding_A", None): "outer",
    ("lora_embedding_B", None): "inner",
    ("lora_magnitude_vector", None): "magnitude",
    ("lora_magnitude_vector", "weight"): "magnitude",
    ("lora_B", "bias"): "bias",
}


@dataclass(frozen=True)
class LowRank:
    """What is added to a weight [out, in]: ``scale * outer @ inner``; all texts are names in the adapter's file."""

    outer: str = ""
    """[out, r]; for an embedding [r, out], as peft stores it."""
    inner: str = ""
    """[r, in]; for an embedding [in, r]."""
    embedding: bool = False
    scale: float = 0.0
    magnitude: str | None = None
    """DoRA: [out] lengths that the merged rows get; for an embedding [in], of the columns."""


@dataclass(frozen=True)
class Update:
    """What an adapter does to one tensor of the model, in this order."""

    whole: str | None = None
    """Tensor of the adapter that takes the stored one's place."""
    of_base: bool = False
    """``whole`` is the weight under a LoRA layer, which tied modules share, and not a module trained whole."""
    low_rank: LowRank | None = None
    bias: tuple[str, float] | None = None
    """Tensor that is added to a bias, and its factor."""


class Adapter:
    """A peft LoRA adapter on disk: headers are read and names are sorted here, tensors when they are asked for.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.

    Attributes:
        reader: of the adapter's tensors, by the names they have in its file.

    Raises:
        BadModelError: no such files, pickled weights, a kind of adapter that cannot be merged, or names that are
            not understood.
    """

    def __init__(self, folder: Path) -> None:
        """Read adapter_config.json and the names and shapes of all tensors."""
        self.folder = folder
        self.settings = Settings.read(folder)
        self.file = _weights_file(folder)
        self.reader = CheckpointReader(folder, [self.file])
        self.shapes = {name: entry.spec.shape for name, entry in self.reader.entries.items()}
        for name, entry in self.reader.entries.items():
            if not DTYPES[entry.spec.dtype].is_floating_point:
                raise BadModelError(
                    f"an adapter must hold real numbers, {name} in {self.file} is {entry.spec.dtype}; "
                    "save it again in float32 or bfloat16"
                )
        self.updates = self._sorted_updates()

    def settle_ties(self, tied: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Decide what becomes of tied tensors; afterwards ``updates`` says it for each.

        While an adapter is trained, tied modules share the base weight alone: a copy trained whole and a low-rank
        update belong to one module. So the fine-tuned model is tied only where both sides got the same.

        Args:
            tied: copy -> original by the base model.
            shapes: of the base model's tensors.

        Returns:
            Whether the ties must be cut, because the tensors differ from now on.
        """
        settled: dict[str, Update] = {}
        cut = False
        for copy, original in tied.items():
            a, b = self.updates.get(original, Update()), self.updates.get(copy, Update())
            # The base weight itself, or one of another size, replaces what both sides stand on.
            if a.whole and not b.whole and (a.of_base or self.shapes[a.whole] != shapes[original]):
                b = replace(b, whole=a.whole, of_base=a.of_base)
            elif b.whole and not a.whole and (b.of_base or self.shapes[b.whole] != shapes[original]):
                a = replace(a, whole=b.whole, of_base=b.of_base)
            cut = cut or not self._same(a, b)
            settled |= {original: a, copy: b}
        self.updates |= {name: update for name, update in settled.items() if update != Update()}
        if not cut:
            self.updates = {name: update for name, update in self.updates.items() if name not in tied}
        return cut

    def vocabulary(self, embeddings: Collection[str], rows: int) -> int:
        """The vocabulary's size after merging: the rows of the embeddings that were saved whole, or ``rows``.

        Args:
            embeddings: weights with one row per token, input and output; tied ones once.
            rows: the base model's.

        Raises:
            BadModelError: they disagree, or there is none.
        """
        sizes = {name: rows for name in embeddings} | {
            name: self.shapes[whole][0]
            for name in embeddings
            if (whole := self.updates.get(name, Update()).whole) and len(self.shapes[whole]) == 2
        }
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise BadModelError(
                f"input and output embedding must have one row per token each, with {self.folder} they have {listed}; "
                "save both whole, modules_to_save names them"
            )
        found = next(iter(sizes.values()), rows)
        if found < 1:
            raise BadModelError(f"embeddings must have one row per token, {self.folder} has 0; save the adapter again")
        return found

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse an adapter that is not one of this model, is incomplete, or holds NaN.

        Args:
            shapes: of the fine-tuned model's tensors.

        Raises:
            BadModelError: says which tensor does not fit and what was expected.
        """
        for name, update in self.updates.items():
            if name not in shapes:
                raise BadModelError(
                    f"{self.folder} changes {name}, which the model does not have; it is the adapter of another model"
                )
            self._check_update(name, update, shapes[name])
        self.settings.check_complete(
            shapes,
            adapted={name.removesuffix(".weight") for name, update in self.updates.items() if update.low_rank},
            whole={name for name, update in self.updates.items() if update.whole},
        )
        for name in self.shapes:
            if not all(bool(torch.isfinite(chunk).all()) for chunk in self.reader.chunks(name)):
                raise BadModelError(f"an adapter's weights must be finite, {name} in {self.file} holds NaN or Inf")

    def _check_update(self, name: str, update: Update, shape: tuple[int, ...]) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        if update.whole:
            expected[update.whole] = shape
        if update.bias:
            expected[update.bias[0]] = shape
        if low := update.low_rank:
            if len(shape) != 2:
                raise BadModelError(f"LoRA adapts matrices, {self.folder} adapts {name} {list(shape)}")
            rank = self.settings.rank(name.removesuffix(".weight"))
            out, columns = shape
            expected[low.outer] = (rank, out) if low.embedding else (out, rank)
            expected[low.inner] = (columns, rank) if low.embedding else (rank, columns)
            if low.magnitude:
                expected[low.magnitude] = (columns if low.embedding else out,)
        for part, wanted in expected.items():
            if self.shapes[part] != wanted:
                raise BadModelError(
                    f"{part} must have shape {list(wanted)} for this model and the rank in adapter_config.json, "
                    f"{self.folder} holds {list(self.shapes[part])}; it is the adapter of another model, or damaged"
                )

    def _sorted_updates(self) -> dict[str, Update]:
        """Every tensor of the file by the model's tensor that it changes."""
        low_rank: dict[str, dict[str, str]] = {}
        embeddings: set[str] = set()
        updates: dict[str, Update] = {}
        for stored in sorted(self.shapes):
            if not stored.startswith(_PREFIX):
                raise BadModelError(f"names in an adapter must begin with {_PREFIX}, {self.file} holds {stored}")
            name = stored.removeprefix(_PREFIX)
            match = _PART.fullmatch(name)
            if match and (match["part"], match["leaf"]) in _PARTS:
                part = _PARTS[match["part"], match["leaf"]]
                if part in low_rank.setdefault(match["module"], {}):
                    raise BadModelError(f"{self.file} holds {stored} twice, with and without the adapter's name")
                low_rank[match["module"]][part] = stored
                if match["part"].startswith("lora_embedding"):
                    embeddings.add(match["module"])
            elif "lora_" in name or ".token_adapter." in name:
                raise BadModelError(f"{self.file} holds {stored}, which is not understood; merge it with peft itself")
            elif ".original_module." not in name:  # what peft kept of the base beside the trained copy
                self._add_whole(updates, name, stored)
        for module, parts in low_rank.items():
            if bias := parts.pop("bias", None):
                key = f"{module}.bias"
                scaled = (bias, self.settings.scale(module))
                updates[key] = replace(updates.get(key, Update()), bias=scaled)
            key = f"{module}.weight"
            low = self._low_rank(module, parts, module in embeddings)
            updates[key] = replace(updates.get(key, Update()), low_rank=low)
        if not updates:
            raise BadModelError(f"an adapter must change something, {self.file} holds no tensor that does")
        return updates

    def _add_whole(self, updates: dict[str, Update], name: str, stored: str) -> None:
        plain = re.sub(r"\.modules_to_save(\.default)?\.", ".", name).replace(".base_layer.", ".")
        known = updates.get(plain)
        # peft may store a trained module twice, under its own name and under that of its wrapper.
        if known and known.whole and not self._equal(known.whole, stored):
            raise BadModelError(f"{self.file} holds two different tensors for {plain}: {known.whole} and {stored}")
        updates[plain] = Update(whole=stored, of_base=".base_layer." in name)

    def _low_rank(self, module: str, parts: Mapping[str, str], embedding: bool) -> LowRank:
        if not {"outer", "inner"} <= parts.keys():
            raise BadModelError(
                f"LoRA matrices come in pairs, {self.file} holds only {', '.join(parts.values()) or 'a bias'} for "
                f"{module}; the file is incomplete, save the adapter again"
            )
        if self.settings.dora != ("magnitude" in parts):
            raise BadModelError(
                f"use_dora is {str(self.settings.dora).lower()} in adapter_config.json of {self.folder}, and a "
                f"magnitude of {module} is {'' if 'magnitude' in parts else 'not '}stored; they do not belong together"
            )
        return LowRank(embedding=embedding, scale=self.settings.scale(module), **parts)

    def _same(self, a: Update, b: Update) -> bool:
        """Whether two updates of one base weight give one result."""
        if (a.whole is None) != (b.whole is None) or (a.low_rank is None) != (b.low_rank is None):
            return False
        if a.whole and b.whole and not self._equal(a.whole, b.whole):
            return False
        if a.low_rank is None or b.low_rank is None:
            return True
        if a.low_rank.scale != b.low_rank.scale or a.low_rank.magnitude or b.low_rank.magnitude:
            return False
        pairs = zip(self.factors(a.low_rank), self.factors(b.low_rank), strict=True)
        return all(torch.equal(left, right) for left, right in pairs)

    def _equal(self, left: str, right: str) -> bool:
        return left == right or torch.equal(self.reader.read(left), self.reader.read(right))

    def factors(self, low: LowRank) -> tuple[Tensor, Tensor]:
        """[out, r] and [r, in], float32."""
        outer, inner = self.reader.read(low.outer).float(), self.reader.read(low.inner).float()
        return (outer.T, inner.T) if low.embedding else (outer, inner)


def _weights_file(folder: Path) -> Path:
    file = folder / WEIGHTS_NAME
    if file.is_file():
        return file
    if pickles := sorted(path.name for path in folder.glob("adapter_model*.bin")):
        raise BadModelError(
            f"adapter weights must be safetensors, {folder} has a pickle ({pickles[0]}), which can run code when "
            "opened; load it in peft, in an environment you trust, and save_pretrained it again"
        )
    raise BadModelError(f"an adapter folder must hold {WEIGHTS_NAME}, {folder} does not; save the adapter with peft")
