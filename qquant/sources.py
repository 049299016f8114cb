"""Where the walk's blocks come from: a model in memory, or a folder that is read block by block.

Reading tensors is shards.py; where blocks are is models/layouts.py. Nothing here quantizes.
"""

from __future__ import annotations

import fnmatch
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.backends.cpu import get_cpu_capability
from transformers import PreTrainedModel

from qquant.adapter import Adapter
from qquant.errors import BadModelError, UsageError
from qquant.finite import all_finite
from qquant.merging import MergedReader
from qquant.model_folder import read_config, skeleton
from qquant.models.layouts import Layout, block_list, find_layout
from qquant.shards import DTYPES, CheckpointReader, Entry, TensorSpec, read_ahead
from qquant.telling import say_once

_log = logging.getLogger("qquant")

# Buffers that old checkpoints stored and every model computes for itself.
_COMPUTED_BUFFERS = ("*.rotary_emb.inv_freq", "*.attn.bias", "*.attn.masked_bias", "*.attention.bias")


def computed_by_model(name: str) -> bool:
    """Whether a stored tensor is one of the buffers that old checkpoints kept and every model computes for itself."""
    return any(fnmatch.fnmatch(name, known) for known in _COMPUTED_BUFFERS)


def pick_device(name: str) -> torch.device:
    """A device by name; "auto" is the first GPU, or the CPU where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {name} was asked for, this torch sees {torch.cuda.device_count()} GPUs; use --device cpu"
        )
    return device


def pick_dtype(name: str) -> torch.dtype | None:
    """A compute dtype by name; None for "auto"."""
    names = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise UsageError(f"dtype must be one of {list(names)}, got {name!r}")
    return names[name]


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What to compute in when nothing was asked for: float16 on a CPU is slow, and some operations lack it."""
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored


def tell_slow_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Say once where another dtype would compute much faster; it is the user's to choose, because results differ."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    if dtype == torch.bfloat16 and device.type == "cpu" and x86 and "AVX512" not in get_cpu_capability():
        say_once(
            "this processor has no AVX-512, and multiplies in bfloat16 four to nine times as slowly as in float32; "
            "--dtype float32 is faster, and takes twice the memory for a block and its activations",
            key="slow bfloat16",
        )


class TensorReader(Protocol):
    """What a model's tensors are read through: its files, or what makes others of them on the way."""

    @property
    def entries(self) -> dict[str, Entry]:
        """Every tensor by name."""

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor."""

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own, on the CPU."""

    def has_rows(self, name: str) -> bool:
        """Whether ``rows`` of a tensor can be read."""

    def rows(self, name: str, places: Sequence[int]) -> Tensor:
        """Some rows of a matrix, in the order asked for, in memory of their own, on the CPU."""

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The same piece by piece, flattened."""


class LoadedModel:
    """A model whose weights are all in memory; blocks are already there and stay.

    Args:
        model: a causal language model. Modified in place by whoever replaces its linears.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Find the blocks."""
        self.model: nn.Module = model
        self.layout: Layout = find_layout(model, model.config.model_type)

    def load(self, index: int) -> nn.Module:
        """Block ``index``."""
        return block_list(self.model, self.layout)[index]

    def release(self, index: int) -> None:
        """Nothing to take away."""

    def prefetch(self, index: int) -> None:
        """Nothing to bring nearer."""

    def load_outside(self, *, with_head: bool) -> None:
        """Everything is there."""

    def release_outside(self) -> None:
        """Nothing to take away."""


class StreamedModel:
    """A model folder read block by block: only the skeleton, the current block and what stands outside blocks is held.

    Even of that the embedding stays on disk: each call of it reads the rows that its ids name. It is read whole where
    it is the output projection too and that is wanted, or where an adapter changes it.

    Args:
        folder: model folder with safetensors weights.
        dtype: compute dtype; None: the stored dtype, or float32 for float16 weights on a CPU, where float16 is slow.
        device: where blocks are computed.
        prepare: called with the skeleton before keys are checked, to put packed linears in place.
        adapter: folder of a peft LoRA adapter that is merged into every tensor as it is read; None: the model as it is.

    Attributes:
        config_changes: keys of config.json that the adapter or ``become`` changed, with their new values.

    Raises:
        BadModelError: tensors are missing, unknown or of another shape than the configuration says, or the adapter is
            not one of this model.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        prepare: Any = None,
        adapter: Path | None = None,
    ) -> None:
        """Build the skeleton on the meta device and check every name and shape against the files' headers."""
        self.folder, self.device = folder, torch.device(device)
        self.config = read_config(folder)
        self.reader: TensorReader = CheckpointReader(folder)
        declared = getattr(self.config, "quantization_config", None) is not None
        if prepare is None and (declared or any(name.endswith(".qweight") for name in self.reader.entries)):
            raise BadModelError(f"{folder} is quantized already; start from the original checkpoint")
        self.dtype = dtype or self._compute_dtype()
        if hasattr(self.config, "quantization_config"):
            del self.config.quantization_config
        model = skeleton(self.config, folder, self.dtype)
        if prepare is not None:
            prepare(model, self.reader)
        self.model: nn.Module = model
        self.layout = (
            find_layout(model, self.config.model_type)
            if prepare is None  # packed linears are no nn.Linear, and a plain skeleton has the same blocks
            else find_layout(skeleton(self.config, folder), self.config.model_type)
        )
        self.tied = _tied_names(model)
        self._check_tensors()
        self.config_changes: dict[str, Any] = {}
        if adapter is not None:
            self._merge(Adapter(adapter))

    def load(self, index: int) -> nn.Module:
        """Block ``index`` with its weights in memory, in the compute dtype."""
        block = block_list(self.model, self.layout)[index]
        self._fill(block, f"{self.layout.blocks}.{index}.")
        return block

    def release(self, index: int) -> None:
        """Put block ``index`` back onto the meta device."""
        block_list(self.model, self.layout)[index].to("meta")

    def prefetch(self, index: int) -> None:
        """Have the files of block ``index`` read ahead, in the background; nothing if there is no such block."""
        if 0 <= index < len(block_list(self.model, self.layout)):
            prefix = f"{self.layout.blocks}.{index}."
            read_ahead(entry for name, entry in self.reader.entries.items() if name.startswith(prefix))

    def load_outside(self, *, with_head: bool) -> None:
        """Read what stands outside the blocks; the output projection only if it is wanted."""
        prefix = self.layout.blocks + "."
        heads = {"lm_head.weight", "lm_head.bias"} if not with_head else set()
        looked_up = None if self.tied and with_head else self._looked_up()
        for name, tensor in _tensors(self.model).items():
            if name.startswith(prefix) or not tensor.is_meta or name in heads or name in self.tied:
                continue
            if name == looked_up:
                self._look_up(name)
            else:
                _put(self.model, name, self._read(name, tensor))
        if self.tied and with_head:
            self.model.tie_weights()  # type: ignore[operator]

    def release_outside(self) -> None:
        """Put what stands outside the blocks back onto the meta device."""
        prefix = self.layout.blocks + "."
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if not name.startswith(prefix):
                _put(self.model, name, parameter.to("meta"))
                vars(self.model.get_submodule(name.rpartition(".")[0])).pop("forward", None)  # of ``_look_up``

    def _looked_up(self) -> str | None:
        """The name of the embedding's matrix if its rows can be read one by one."""
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        for name, module in self.model.named_modules():
            if module is embedding and isinstance(module, nn.Embedding):
                return f"{name}.weight" if self.reader.has_rows(f"{name}.weight") else None
        return None

    def _look_up(self, name: str) -> None:
        """Let an embedding whose matrix is on the meta device read the rows that it is asked for."""
        module = self.model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(module, nn.Embedding)
        forward, weight, padding = type(module).forward, module.weight, module.padding_idx

        def look_up(ids: Tensor) -> Tensor:
            if not module.weight.is_meta:
                return forward(module, ids)
            named, places = ids.unique(return_inverse=True)
            rows = self._computed(name, self.reader.rows(name, named.tolist()), weight)
            # What else the module does with its rows, such as scaling them, it does itself.
            module.weight, module.padding_idx = nn.Parameter(rows, requires_grad=False), None
            try:
                return forward(module, places)
            finally:
                module.weight, module.padding_idx = weight, padding

        module.__dict__["forward"] = look_up  # in front of the class's

    def finite_chunks(self, name: str) -> Iterator[Tensor]:
        """A stored tensor piece by piece; raises BadModelError at a value that is not finite."""
        for chunk in self.reader.chunks(name):
            if chunk.is_floating_point() and not all_finite(chunk):
                raise BadModelError(f"weights must be finite, {name} in {self.folder} holds NaN or Inf")
            yield chunk

    def stored_names(self) -> list[str]:
        """The tensors of the model in its own order, without tied copies."""
        return [name for name in _tensors(self.model) if name not in self.tied]

    def become(self, reader: TensorReader, changes: Mapping[str, Any]) -> None:
        """Become a model of other sizes.

        Args:
            reader: gives the tensors with their new shapes.
            changes: keys of config.json with the values that say so.
        """
        self.reader = reader
        for key, value in changes.items():
            self.config_changes[key] = value
            setattr(self.config.get_text_config(), key, value)
        self.model = skeleton(self.config, self.folder, self.dtype)

    def _merge(self, adapter: Adapter) -> None:
        """Become the fine-tuned model: its configuration, its skeleton, its tensors."""
        assert isinstance(self.reader, CheckpointReader)
        model: Any = self.model
        cut = adapter.settle_ties(self.tied, {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()})
        copies = self.tied if cut else {}
        ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end}
        embeddings = [name for name, tensor in _tensors(model).items() if id(tensor) in ends]
        text = self.config.get_text_config()
        rows = adapter.vocabulary([name for name in embeddings if cut or name not in self.tied], int(text.vocab_size))
        if rows != text.vocab_size:
            self.config_changes["vocab_size"] = text.vocab_size = rows
        if cut:
            self.config_changes["tie_word_embeddings"] = False
            self.config.tie_word_embeddings = text.tie_word_embeddings = False
        if self.config_changes:
            self.model = skeleton(self.config, self.folder, self.dtype)
            self.tied = _tied_names(self.model)
        adapter.check({name: tuple(t.shape) for name, t in _tensors(self.model).items() if name not in self.tied})
        adapter.settings.check_names(_tensors(self.model))
        self.reader = MergedReader(self.reader, adapter, copies)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        for name, tensor in _tensors(module).items():
            _put(module, name, self._read(prefix + name, tensor))

    def _read(self, name: str, like: Tensor) -> Tensor:
        spec = self.reader.spec(name)
        stored = DTYPES[spec.dtype]
        if not stored.is_floating_point or stored == like.dtype:
            return self._computed(name, self.reader.read(name), like)
        # Piece by piece: an output projection is large, and would be here twice.
        found, start = torch.empty(spec.shape, dtype=like.dtype, device=self.device), 0
        for chunk in self.finite_chunks(name):
            found.view(-1)[start : start + len(chunk)].copy_(chunk)
            start += len(chunk)
        return found

    def _computed(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        """What was read of a tensor, checked, in the dtype and on the device in which it is computed with."""
        if tensor.is_floating_point():
            if not all_finite(tensor):
                raise BadModelError(f"weights must be finite, {name} in {self.folder} holds NaN or Inf")
            tensor = tensor.to(like.dtype)
        return tensor.to(self.device)

    def _compute_dtype(self) -> torch.dtype:
        floating = [e.spec.dtype for e in self.reader.entries.values() if len(e.spec.shape) >= 2]
        stored = max(set(floating), key=floating.count) if floating else "F32"
        dtype = DTYPES[stored]
        if not dtype.is_floating_point:
            declared = getattr(self.config, "dtype", None)
            dtype = declared if isinstance(declared, torch.dtype) else torch.float32
        return compute_dtype(dtype, self.device)

    def _check_tied(self) -> None:
        """A tied tensor may be stored as well, if it is the same: transformers unties two that differ."""
        for name, original in self.tied.items():
            if name not in self.reader.entries or original not in self.reader.entries:
                continue
            same = self.reader.spec(name) == self.reader.spec(original) and all(
                torch.equal(*pair) for pair in zip(self.reader.chunks(name), self.reader.chunks(original), strict=True)
            )
            if not same:
                raise BadModelError(
                    f"config.json ties {name} to {original}, but {self.folder} stores two different tensors; "
                    "set tie_word_embeddings to false if both are meant"
                )

    def _check_tensors(self) -> None:
        wanted, stored = _tensors(self.model), self.reader.entries
        missing = [name for name in wanted if name not in stored and name not in self.tied]
        if missing:
            raise BadModelError(
                f"tensor {missing[0]} is missing from {self.folder} ({len(missing)} missing in all); "
                "the download is incomplete or config.json belongs to another model"
            )
        for name, tensor in wanted.items():
            if name in stored and stored[name].spec.shape != tuple(tensor.shape):
                got = list(stored[name].spec.shape)
                raise BadModelError(
                    f"{name} must have shape {list(tensor.shape)} by config.json, {self.folder} holds {got}"
                )
            if name in stored and DTYPES[stored[name].spec.dtype].is_floating_point != tensor.is_floating_point():
                raise BadModelError(
                    f"{name} must not be stored as {stored[name].spec.dtype}; {self.folder} is not a plain checkpoint"
                )
        self._check_tied()
        extra = sorted(stored.keys() - wanted.keys())
        unknown = [name for name in extra if not computed_by_model(name)]
        if unknown:
            raise BadModelError(
                f"{self.folder} holds {unknown[0]} ({len(unknown)} such), which a {self.config.model_type} model "
                "does not have; config.json and weights do not belong together"
            )
        if extra:
            _log.warning("%d stored tensors are computed by the model itself and left out: %s", len(extra), extra[0])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name."""
    return dict(module.state_dict(keep_vars=True))


def _tied_names(model: Any) -> dict[str, str]:
    """Tensors that are copies by the model's own rule, such as a tied output projection: copy -> original."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
