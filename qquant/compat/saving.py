"""A quantized model in memory becomes a checkpoint folder: the same folder that ``quantize_checkpoint`` makes.

How files look is checkpoint.py and shards.py, how a folder appears is publish.py; nothing is quantized here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qquant.checkpoint import LOG_NAME, MANIFEST_NAME, reopen, write_manifest
from qquant.config import QuantizeConfig, QuantizeLog
from qquant.errors import BadModelError, NumericError, UsageError
from qquant.identity import files_sha256
from qquant.json_files import read_json
from qquant.linear import QuantLinear
from qquant.publish import Kind, published
from qquant.shard_writer import ShardWriter
from qquant.shards import DTYPE_NAMES, DTYPES, INDEX_NAME, CheckpointReader, TensorSpec, weight_files
from qquant.side_files import collect

_SHARD_BYTES = 4_000_000_000  # as the command line's default
_WEIGHTS = frozenset((".safetensors", ".bin", ".pt", ".pth", ".ckpt"))
# What a save writes and a script does not: the manifest vouches for these and the weights alone, because scripts save
# the tokenizer into the same folder afterwards.
_OURS = frozenset(("config.json", "quantize_config.json", LOG_NAME, MANIFEST_NAME, INDEX_NAME))


@dataclass(frozen=True)
class Run:
    """What a quantization leaves for the manifest."""

    config: QuantizeConfig
    data: dict[str, Any]
    """Fingerprint and number of the calibration samples."""
    log: QuantizeLog
    computed_in: str
    """Name of the compute dtype."""


def save_model(model: Any, out: Path, *, source: Path, dtype: torch.dtype | None, run: Run | None) -> None:
    """Write a checkpoint with tokenizer and side files; it appears at once, when all of it is proven.

    An existing folder is replaced if it holds a quantized model or no model at all. Files in it that are not part of a
    checkpoint, such as a tokenizer that a script saved, stay.

    Args:
        model: quantized causal language model. Read, never written.
        out: folder to make.
        source: folder the model was read from: side files are carried over, tensors keep the dtype they have there.
        dtype: of all floating tensors but scales instead.
        run: how it was quantized; None: it was loaded quantized, and neither log nor manifest is written.

    Raises:
        UsageError: the folder holds something else, or a link.
        NumericError: what was written is not what is in memory; nothing is left at ``out``.
    """
    if (out.exists() or out.is_symlink()) and (out.is_symlink() or not out.is_dir() or not _replaceable(out)):
        raise UsageError(
            f"a save makes a folder or replaces a quantized model's, and {out} is another model's, has folders in it, "
            "or is no folder; the model is still in memory: save it elsewhere"
        )
    _foreign_files(out)
    with published(out, _OUTPUT, overwrite=True) as staging:
        stored = {name: DTYPES[entry.spec.dtype] for name, entry in CheckpointReader(source).entries.items()}
        _write_weights(model, staging, stored, dtype)
        _write_side_files(model, source, staging, dtype)
        # A script may have saved its tokenizer first.
        for path in _foreign_files(out):
            shutil.copyfile(path, staging / path.name)
        _prove(model, staging, stored, dtype)
        if run is not None:
            _write_manifest(source, staging, run)


def _tensors(model: Any, stored: dict[str, torch.dtype], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """What is saved, in model order and in the dtype it is saved in; tied copies are left out."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    scales = {f"{name}.scales" for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    for name, tensor in _state(model):
        if name in tied:
            continue
        if not tensor.is_floating_point() or name in scales:
            yield name, tensor
            continue
        cast = tensor.to(dtype or stored.get(name, tensor.dtype))
        if not bool(torch.isfinite(cast).all()):
            raise NumericError(f"weights must be finite, {name} is not in {cast.dtype}; choose another torch_dtype")
        yield name, cast


def _state(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The state dict, module by module: packed linears make their tensors anew, and not all of them at once."""
    for path, module in model.named_modules(remove_duplicate=False):
        own: dict[str, Tensor] = {}
        module._save_to_state_dict(own, f"{path}." if path else "", keep_vars=False)
        yield from own.items()


def _write_weights(model: Any, folder: Path, stored: dict[str, torch.dtype], dtype: torch.dtype | None) -> None:
    plan = {
        name: TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in _tensors(model, stored, dtype)
    }
    writer = ShardWriter(folder, plan, max_shard_bytes=_SHARD_BYTES)
    for name, tensor in _tensors(model, stored, dtype):
        writer.write(name, tensor)
    writer.close()


def _write_side_files(model: Any, source: Path, folder: Path, dtype: torch.dtype | None) -> None:
    changes = {}
    if dtype is not None:
        key = "dtype" if "dtype" in read_json(source / "config.json") else "torch_dtype"
        changes[key] = str(dtype).removeprefix("torch.")
    # Named first, as quantize_checkpoint does; transformers moves it to the end.
    keys = {"quant_method": "gptq"} | model.config.quantization_config.to_dict()
    beside = collect(source, changes=changes)
    beside.check_tokenizer()
    beside.write(folder, keys)


def _prove(model: Any, folder: Path, stored: dict[str, torch.dtype], dtype: torch.dtype | None) -> None:
    """Reopen what was written: every key and shape fits the model, every tensor is the one in memory."""
    reader = reopen(folder, dtype=model.dtype, device="cpu").reader
    for name, tensor in _tensors(model, stored, dtype):
        if not torch.equal(reader.read(name), tensor.cpu()):
            raise NumericError(f"the written {name} is not the one in memory; the checkpoint was not published")


def _write_manifest(source: Path, folder: Path, run: Run) -> None:
    write_manifest(
        folder,
        source=source,
        source_files=files_sha256([*sorted(weight_files(source)), source / "config.json"]),
        config=run.config,
        data=run.data,
        log=run.log,
        computed_in=run.computed_in,
        files=_OURS | {path.name for path in folder.iterdir() if path.suffix in _WEIGHTS},
    )


def _replaceable(folder: Path) -> bool:
    """A quantized model, or a folder without any model: never an original, which may be the only copy."""
    with suppress(BadModelError, OSError):
        paths = list(folder.iterdir())
        if any(path.is_dir() for path in paths):
            return False
        if (folder / "config.json").exists():
            return "quantization_config" in read_json(folder / "config.json")
        return not any(path.suffix in _WEIGHTS for path in paths)
    return False


_OUTPUT = Kind("a quantized model's folder", _replaceable)


def _foreign_files(folder: Path) -> list[Path]:
    """What stands in a folder and is not part of a checkpoint; it stays.

    Raises:
        UsageError: a link, whose bytes may lie anywhere and must not end up in a checkpoint, or no file at all.
    """
    if not folder.exists():
        return []
    found = [path for path in sorted(folder.iterdir()) if path.name not in _OURS and path.suffix not in _WEIGHTS]
    for path in found:
        if path.is_symlink() or not path.is_file():
            raise UsageError(
                f"a save keeps the other files of its folder, and {path} is a link or no file; remove it or put the "
                "file itself there, or save elsewhere: the model is still in memory"
            )
    return found
