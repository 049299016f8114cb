"""What a script of another tool hands over, in our terms: options to take, ignore or refuse, devices, examples.

No model is loaded here and nothing is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from qquant.calibrate import Sample, samples_from_ids
from qquant.code_keys import ignoring_code
from qquant.device_map import SPREAD as NAMED
from qquant.errors import BadDataError, UsageError
from qquant.shards import weight_files
from qquant.sources import pick_device, pick_dtype

_log = logging.getLogger("qquant")
P = ParamSpec("P")
T = TypeVar("T")

# Chose AutoGPTQ's kernels, their preparation, or where tensors wait; never what is computed.
_SPEED = frozenset((
    "autotune_warmup_after_quantized", "cache_examples_on_gpu", "disable_exllama", "disable_exllamav2",
    "inject_fused_attention", "inject_fused_mlp", "low_cpu_mem_usage", "strict", "use_cuda_fp16", "use_flash_attn",
    "use_marlin", "use_qigen", "use_triton", "use_tritonv2", "warmup_triton",
))  # fmt: skip
# Choose what the hub client fetches; a local folder is there already.
_HUB = frozenset((
    "_commit_hash", "cache_dir", "force_download", "local_files_only", "proxies", "resume_download", "revision",
    "token", "use_auth_token",
))  # fmt: skip
SPREAD = (None, *NAMED)
"""Values of ``device_map`` that leave the choice to the tool."""
_ROOM = 2  # times the weights: beside them lie their packed copies, a Hessian and the hidden states of all samples


def without_hub(call: str, options: Mapping[str, Any], *, local: bool) -> dict[str, Any]:
    """The options without those that say what to fetch from the hub, before anything is fetched.

    Args:
        call: as a message names it.
        options: what the script named.
        local: whether the model is a local folder, for which they mean nothing.

    Raises:
        UsageError: one of them would choose other weights, or how they are fetched.
    """
    rest = dict(options)
    if rest.pop("subfolder", None):
        raise UsageError(f"{call} takes no subfolder; name the folder itself")
    for name in sorted(rest.keys() & _HUB):
        if rest.pop(name) and not local:
            raise UsageError(f"{call} takes no {name}; fetch the model with huggingface_hub and name its local folder")
    return rest


def accept(
    call: str, options: Mapping[str, Any], *, ignored: Set[str] = frozenset(), passes: Set[str] = frozenset()
) -> dict[str, Any]:
    """Sort a call's options: those to pass on are returned, those without effect are logged, others are refused.

    Args:
        call: as a message names it.
        options: what the script named.
        ignored: options without effect besides those that choose kernels.
        passes: options to return.

    Raises:
        UsageError: an option that is not known.
    """
    idle = sorted(options.keys() & (_SPEED | ignored))
    rest = {name: value for name, value in options.items() if name not in idle}
    unknown = sorted(rest.keys() - passes)
    if unknown:
        known = ", ".join(sorted(_SPEED | ignored | passes))
        raise UsageError(f"{call} does not know {', '.join(unknown)}, which might change the numbers; known: {known}")
    if idle:
        _log.warning("%s ignores %s: they chose AutoGPTQ's kernels and places, not the numbers", call, ", ".join(idle))
    return rest


def without_its_code(load: Callable[P, T]) -> Callable[P, T]:
    """A loader that opens folders whose files name code, if remote code is asked for, and tells that none runs."""

    @wraps(load)
    def inner(*arguments: P.args, **options: P.kwargs) -> T:
        asked = bool(options.get("trust_remote_code"))
        if asked:
            _log.warning("trust_remote_code is not needed: the model is native here, and no code of its folder is run")
        with ignoring_code(asked):
            return load(*arguments, **options)

    return inner


def refuse_pickles(use_safetensors: bool) -> None:
    """Raise UsageError if pickled weights are asked for."""
    if not use_safetensors:
        raise UsageError("weights are safetensors only, since pickles can run code, got use_safetensors=False; drop it")


def refuse_contradictions(folder: Path, keys: Mapping[str, Any], said: Mapping[str, Any], basename: str | None) -> None:
    """What a script says about a quantized folder must be what the folder says: it decides how tensors are read.

    Args:
        folder: a quantized model's.
        keys: its quantization keys.
        said: the script's; empty for none.
        basename: the script's name of the weight file, without suffix; None for none. One that is not there is logged.

    Raises:
        UsageError: bits or group size differ, or the named file is there and another one is read.
    """
    for name in ("bits", "group_size"):
        if name in said and keys.get(name) not in (None, said[name]):
            raise UsageError(
                f"quantize_config says {name} {said[name]}, and {folder} {keys[name]}; leave quantize_config out"
            )
    if basename is None:
        return
    files, named = [file.name for file in weight_files(folder)], f"{basename}.safetensors"
    if named not in files and (folder / named).exists():
        raise UsageError(f"model_basename names {named}, and {folder} is read from {files[0]}; remove one of the two")
    if named not in files:
        _log.warning("model_basename: %s is not in the folder; its weights are read from %s", named, files[0])


def one_device(asked: Any, nbytes: int) -> torch.device:
    """The device that a ``device_map`` or ``device`` comes down to.

    Args:
        asked: a device, a GPU's number, a map of modules to one device, or a name that leaves the choice.
        nbytes: size of the weights; a choice left open falls on the first GPU only if it has room to work beside them.

    Raises:
        UsageError: several devices, or one that is not here.
    """
    if isinstance(asked, Mapping):
        devices = set(asked.values())
        if len(devices) != 1:
            raise UsageError(f"the model must be on one device, got {sorted(map(str, devices))}; use device_map='auto'")
        asked = devices.pop()
    if asked in SPREAD:
        device = pick_device("auto")
        if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < _ROOM * nbytes:
            _log.warning("the model does not fit on the GPU with room to work, so it is quantized on the CPU")
            return torch.device("cpu")
        return device
    return pick_device(f"cuda:{asked}" if isinstance(asked, int) else str(asked))


def samples_of(examples: Iterable[Mapping[str, Any]]) -> list[Sample]:
    """One sample per row of every example's ``input_ids``.

    Args:
        examples: mappings with ``input_ids`` and perhaps ``attention_mask``, [T] or [N, T], tensors or lists of
            integers. Read, never written. Other keys, such as labels, have no part in calibration.

    Raises:
        BadDataError: something else; the message names the example.
    """
    if isinstance(examples, Mapping | str) or not isinstance(examples, Iterable):
        raise BadDataError(
            f"examples must be a list of mappings, got {type(examples).__name__}; give [tokenizer(text)]"
        )
    samples: list[Sample] = []
    for index, example in enumerate(examples):
        if not isinstance(example, Mapping) or "input_ids" not in example:
            raise BadDataError(
                f"example {index} must map input_ids to token ids, got {type(example).__name__}; give tokenizer(text)"
            )
        mask = example.get("attention_mask")
        try:
            samples += samples_from_ids(_rows(example["input_ids"]), None if mask is None else _rows(mask))
        except BadDataError as error:
            raise BadDataError(f"example {index}: {error}") from error
    return samples


def allows_gradients(model: nn.Module) -> bool:
    """Whether gradients can be taken of a model; if not, a line says what the most accurate method goes without."""
    allowed = not any(parameter.is_inference() for parameter in model.parameters())
    if not allowed:
        _log.warning(
            "weights were made under torch.inference_mode(), which forbids gradients, so outputs are not weighted by "
            "how much predictions feel them (output); load and convert the model outside for a more accurate result"
        )
    return allowed


def say_one_pass(true_sequential: bool) -> None:
    """Say what the most accurate method goes without if a script switches true_sequential off."""
    if not true_sequential:
        _log.warning(
            "true_sequential=False leaves out what compares with the original model stage by stage (qep and residual); "
            "True is more accurate"
        )


def a_path(call: str, value: Any) -> Path:
    """A folder or hub id that a script names; raises UsageError if it is something else."""
    if not isinstance(value, str | Path):
        raise UsageError(f"{call} needs a folder or a hub id, got {type(value).__name__}; name the model")
    return Path(value)


def a_dtype(value: Any) -> torch.dtype | None:
    """The dtype that a script names; None for None and "auto". Raises UsageError if it is not one to compute in."""
    if value is None or isinstance(value, str):
        return None if value is None else pick_dtype(value.removeprefix("torch."))
    if value not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"torch_dtype must be torch.float32, bfloat16 or float16, got {value!r}")
    return value  # type: ignore[no-any-return]


def _rows(values: Any) -> Any:
    """[T] as [1, T]; [N, T] as it is."""
    if isinstance(values, Tensor):
        return values.unsqueeze(0) if values.dim() == 1 else values
    nested = isinstance(values, Sequence) and len(values) > 0 and isinstance(values[0], Sequence | Tensor)
    return values if nested else [values]
