"""Other tools' quantizations to compare with: a plain model folder as bitsandbytes loads it, in NF4 or LLM.int8().

Both round each weight when the model is loaded, without calibration data, and nothing is written. GPTQ folders, ours
and others', are checkpoint.py's; which rows a report has is the evaluation's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qquant.errors import BadModelError, UsageError
from qquant.model_folder import BUILD_ERRORS, name_weights, read_config
from qquant.shards import CheckpointReader
from qquant.text_sources import one_line

_log = logging.getLogger("qquant")

BitsAndBytesKind = Literal["nf4", "llm-int8"]
"""``nf4``: 4 bits, 16 levels spaced for a normal distribution, a float32 scale for each 64 weights. ``llm-int8``: 8
bits with a scale for each output row; activations in 8 bits too, but for columns that hold one above 6."""
_SWITCH = "support_avx512bf16_for_cpu"
"""Attribute of a 4-bit linear of bitsandbytes, see ``_in_plain_arithmetic``."""


def load_bitsandbytes(
    folder: Path, kind: BitsAndBytesKind, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A plain model with its linears quantized by bitsandbytes while they are loaded; the output head stays plain.

    On a CPU NF4 always multiplies in ``dtype``, although bitsandbytes has kernels that round to bfloat16 there.

    Args:
        folder: a local folder whose weights are not quantized. Read, never written.
        kind: what to store the weights of the linears in.
        dtype: compute dtype, and the dtype of everything else; LLM.int8() rounds activations to float16 all the same.
        device: where all of it goes.

    Returns:
        The model in eval mode.

    Raises:
        UsageError: see ``check_bitsandbytes``.
        BadModelError: damaged or incomplete files, or a model that cannot be built.
    """
    check_bitsandbytes(folder, kind)
    CheckpointReader(folder)  # refuses damaged files, and names that lead outside, before they are opened
    config = read_config(folder)
    if kind == "llm-int8" and dtype != torch.float16:
        name = str(dtype).removeprefix("torch.")
        _log.warning("llm-int8 rounds activations to float16 on their way to 8 bits; the rest runs in %s", name)
    name_weights(config, folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            quantization_config=_settings(kind, dtype),
            device_map={"": str(device)},
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except torch.OutOfMemoryError:
        raise
    except (*BUILD_ERRORS, SafetensorError) as error:
        raise BadModelError(f"bitsandbytes cannot load the model in {folder}: {one_line(error)}") from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers fills what is missing with random numbers
        raise BadModelError(f"tensor {missing[0]} is missing from {folder} ({len(missing)} missing in all)")
    _in_plain_arithmetic(model)
    return cast(PreTrainedModel, model.eval())


def check_bitsandbytes(folder: Path, kind: str) -> None:
    """Refuse what ``load_bitsandbytes`` cannot do, before anything else is loaded or measured.

    Raises:
        UsageError: an unknown kind, bitsandbytes cannot be imported, or the folder is quantized already.
        BadModelError: the folder has no config.json that a known model can follow.
    """
    known = get_args(BitsAndBytesKind)
    if kind not in known:
        raise UsageError(f"a bitsandbytes baseline must be one of {', '.join(known)}, got {kind!r}")
    _import_bitsandbytes()
    quantized = getattr(read_config(folder), "quantization_config", None) or (folder / "quantize_config.json").exists()
    if quantized:
        raise UsageError(f"bitsandbytes quantizes a plain model, {folder} is quantized already; give the original")


def weights_bytes_of(model: nn.Module, *, stored_dtype: torch.dtype) -> int:
    """What the weights of such a model would take in a file: quantized ones with their scales, the others plain.

    Tensors that are stored nowhere, such as rotary angles, do not count, and tensors that two names share count once.

    Args:
        model: as ``load_bitsandbytes`` returns it.
        stored_dtype: of the original's files; what is not quantized counts in it, whatever dtype it was loaded in.
    """
    total = sum(tensor.nbytes for module in model.modules() for tensor in _scales(module))
    for parameter in model.parameters():
        size = stored_dtype.itemsize if parameter.is_floating_point() else parameter.element_size()
        total += parameter.numel() * size
    return total


def unlisted_bytes_of(model: nn.Module) -> int:
    """Bytes that such a model holds beside its parameters and buffers: scales and levels of quantized weights.

    Storage that several modules share, as a table of levels may be, counts once.
    """
    storages = {}
    for tensor in (tensor for module in model.modules() for tensor in _scales(module)):
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _scales(module: nn.Module) -> Iterator[Tensor]:
    """What bitsandbytes keeps beside a quantized weight and a module does not list."""
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        yield from (state.absmax, state.code)
    # The first call moves the rows' scales of an 8-bit weight from the weight to the module.
    for holder in (weight, getattr(module, "state", None)):
        scale = getattr(holder, "SCB", None)
        if isinstance(scale, Tensor):
            yield scale


def _settings(kind: BitsAndBytesKind, dtype: torch.dtype) -> BitsAndBytesConfig:
    if kind == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return BitsAndBytesConfig(load_in_8bit=True)


def _in_plain_arithmetic(model: nn.Module) -> None:
    """Switch off the kernels that bitsandbytes uses for 4 bits on CPUs with AVX512-BF16.

    They round inputs and scales to bfloat16 in a model of any dtype, so that not only the weights would differ between
    the rows of a report, and rows between machines. They also refuse layers whose outputs are no multiple of 32, and in
    version 0.50 a model whose ``state_dict`` was read computes garbage afterwards.
    """
    for module in model.modules():
        if getattr(module, _SWITCH, False):
            setattr(module, _SWITCH, False)


def _import_bitsandbytes() -> None:
    """Import bitsandbytes quietly and without code from a hub; UsageError if it is not there or broken."""
    # One says at every call of every layer what load_bitsandbytes says once, the other that there is no hub kernel.
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with _no_hub_kernels():
            import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(
            "nf4 and llm-int8 need the package bitsandbytes; run pip install 'qquant[baselines]', or leave them out: "
            f"{one_line(error)}"
        ) from error


@contextmanager
def _no_hub_kernels() -> Iterator[None]:
    """Hide the package kernels: with it, importing bitsandbytes fetches compiled code from a hub and runs it."""
    name = "kernels"
    absent = object()
    found: Any = sys.modules.get(name, absent)
    sys.modules[name] = None  # type: ignore[assignment]  # an import of it now fails as if it were not installed
    try:
        yield
    finally:
        if found is absent:
            del sys.modules[name]
        else:
            sys.modules[name] = found
