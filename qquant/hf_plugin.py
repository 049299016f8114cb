"""The transformers quantizer plug-in: swaps linears for QuantLinear while a GPTQ checkpoint is loaded.

What a checkpoint's quantization keys mean to us is decided here, and so is what is refused: whatever would change the
numbers and is not understood. Folders and files around it are checkpoint.py's.
"""

# ruff: noqa: SIM905 - a split string of words reads better than sixty quoted ones
from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qquant.config import ModuleOverride, QuantizeConfig
from qquant.errors import BadModelError
from qquant.linear import Kernel, QuantLinear
from qquant.packing import unpack_zeros
from qquant.shards import DTYPES, CheckpointReader

_log = logging.getLogger("qquant")

METHOD = "qquant"
"""Our name in transformers' tables; files always say ``gptq``."""

_VERSIONS = {"gptq": 1, "gptq_v2": 2}

# Keys that record how a checkpoint was made, or how some reader should run it, and do not change what it holds.
_PROVENANCE = frozenset(
    "act_group_aware auto_round_version autoround_version backend batch_size block_name_to_quantize "
    "cache_block_outputs damp_auto_increment damp_percent data_type dataset disable_exllama "
    "enable_minmax_tuning enable_quanted_input exllama_config fallback foem gptaq "
    "gradient_accumulate_steps hessian hyb_act is_marlin_format iters low_gpu_mem_usage lr "
    "max_input_length max_length meta minmax_lr model_file_base_name model_name_or_path model_seqlen "
    "module_name_preceding_first_block mse nsamples offload_to_disk pad_token_id pack_impl provider "
    "quant_method method quantizer scale_dtype seqlen static_groups tokenizer true_sequential uri "
    "use_cuda_fp16 use_exllama vram_strategy ".split()
)
_UNDERSTOOD = frozenset(
    "bits group_size sym desc_act checkpoint_format format lm_head dynamic modules_in_block_to_quantize "
    "pack_dtype".split()
)


@register_quantization_config(METHOD)
class GptqFileConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a GPTQ checkpoint, kept as it was found so that saving writes the same keys."""

    def __init__(self, kernel: Kernel = "auto", **keys: Any) -> None:
        """Check the keys; raises BadModelError naming the one that is not understood."""
        self.quant_method = METHOD  # type: ignore[assignment]
        self.kernel = kernel
        self.keys = {**keys, "quant_method": "gptq"}
        check_keys(self.keys)

    @property
    def version(self) -> int:
        """1 if qzeros hold ``zero - 1``, 2 if they hold ``zero``."""
        return _VERSIONS[self.keys.get("checkpoint_format") or self.keys.get("format") or "gptq"]

    @property
    def sym(self) -> bool:
        """Whether all zeros stand at mid-range."""
        return bool(self.keys.get("sym", True))

    @property
    def desc_act(self) -> bool:
        """Whether g_idx scatters the groups."""
        return bool(self.keys.get("desc_act", False))

    def for_module(self, name: str) -> tuple[int, int]:
        """Bits and group size of a module by its name, rules included."""
        rules = {pattern: _override(changes) for pattern, changes in (self.keys.get("dynamic") or {}).items()}
        bits, size = self.keys.get("bits", 4), self.keys.get("group_size", 128)
        chosen = QuantizeConfig(bits=bits, group_size=size, act_group_aware=False, dynamic=rules).for_module(name)
        return (bits, size) if chosen is None else (chosen.bits, chosen.group_size)

    def to_dict(self) -> dict[str, Any]:
        """What is written into config.json: the keys every GPTQ reader knows."""
        return dict(self.keys)

    def to_diff_dict(self) -> dict[str, Any]:
        """The same; there are no defaults to leave out."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build from config.json's dict."""
        config = cls(**{key: value for key, value in config_dict.items() if key != "quant_method"})
        return (config, kwargs) if return_unused_kwargs else config


@register_quantizer(METHOD)
class GptqLoader(HfQuantizer):
    """Puts empty QuantLinear modules where the checkpoint holds packed tensors, before weights are loaded."""

    requires_calibration = False
    quantization_config: GptqFileConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not checkpoint_files:
            raise BadModelError("a quantized model is loaded from safetensors files, got none")
        reader = CheckpointReader(Path(checkpoint_files[0]).parent)
        self._filled = swap_linears(model, reader, self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        for name, tensor in self._filled.items():
            path, _dot, leaf = name.rpartition(".")
            layer = model.get_submodule(path)
            setattr(layer, leaf, tensor.to(layer.qweight.device))

    def is_serializable(self) -> bool:
        """Saving writes the packed tensors as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return False


def register() -> None:
    """Let ``AutoModelForCausalLM.from_pretrained`` read GPTQ checkpoints through qquant in this process.

    Replaces transformers' own entry for ``quant_method: gptq``, which needs optimum and gptqmodel. Idempotent.
    """
    AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = GptqFileConfig


def check_keys(keys: Mapping[str, Any]) -> None:
    """Refuse, by name, quantization keys that would change the numbers and are not understood."""
    method = keys.get("quant_method", "gptq")
    if method not in ("gptq", METHOD):
        raise BadModelError(f"quant_method must be gptq to be read here, got {method!r}")
    if keys.get("is_marlin_format"):
        raise BadModelError("is_marlin_format: weights in Marlin's own layout are not read; use the plain GPTQ files")
    layout = keys.get("checkpoint_format") or keys.get("format") or "gptq"
    if layout not in _VERSIONS:
        raise BadModelError(f"checkpoint_format must be one of {sorted(_VERSIONS)}, got {layout!r}")
    if keys.get("pack_dtype", "int32") != "int32":
        raise BadModelError(f"pack_dtype must be int32, got {keys['pack_dtype']!r}")
    if keys.get("bits", 4) not in (2, 3, 4, 8):
        raise BadModelError(f"bits must be 2, 3, 4 or 8, got {keys['bits']!r}")
    for key, value in keys.items():
        if key not in _PROVENANCE | _UNDERSTOOD and value not in (None, False, {}, [], ""):
            raise BadModelError(
                f"quantization key {key!r} ({str(value)[:60]!r}) is not understood and might change the numbers; "
                "remove it from config.json if it only records how the checkpoint was made"
            )


def swap_linears(model: Any, reader: CheckpointReader, config: GptqFileConfig) -> dict[str, Tensor]:
    """Replace, on the meta device, every linear whose packed tensors are stored by an empty QuantLinear.

    Args:
        model: skeleton of the model. Modified in place.
        reader: the checkpoint's tensors.
        config: its quantization keys.

    Returns:
        Tensors that the checkpoint leaves out and its keys determine (g_idx, symmetric qzeros), by full name.

    Raises:
        BadModelError: a module's tensors are incomplete or do not fit together, or the skeleton has no such linear.
    """
    names = [name.removesuffix(".qweight") for name in reader.entries if name.endswith(".qweight")]
    if not names:
        raise BadModelError(f"config.json of {reader.folder} says gptq, but no tensor *.qweight is stored")
    version = _stored_version(reader, names, config)
    filled: dict[str, Tensor] = {}
    for name in names:
        try:
            linear = model.get_submodule(name)
        except AttributeError as error:
            raise BadModelError(f"{name} is stored packed, but the model has no such layer") from error
        if not isinstance(linear, nn.Linear):
            raise BadModelError(f"{name} is stored packed, but in the model it is a {type(linear).__name__}")
        if name in {key.removesuffix(".weight") for key in getattr(model, "all_tied_weights_keys", None) or {}}:
            raise BadModelError(
                f"{name} is stored packed, but tie_word_embeddings says it shares the embedding's weight"
            )
        layer = _empty_layer(name, linear, reader, config, version)
        filled.update(_left_out(name, layer, reader, config))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    _check_names(model, reader, filled)
    return filled


def _empty_layer(
    name: str, linear: nn.Linear, reader: CheckpointReader, config: GptqFileConfig, version: int
) -> QuantLinear:
    rows, columns = linear.in_features, linear.out_features
    spec = reader.spec(f"{name}.qweight")
    expected_bits, size = config.for_module(name)
    bits = spec.shape[0] * 32 // rows if len(spec.shape) == 2 else 0
    scales = reader.spec(f"{name}.scales")
    groups = scales.shape[0]
    if -(-rows // (rows if size == -1 else size)) != groups:
        raise BadModelError(
            f"{name} has {groups} groups for {rows} inputs, which does not fit group_size {size}; "
            "quantization_config and tensors do not belong together"
        )
    bias = reader.entries.get(f"{name}.bias")
    layer = QuantLinear(
        rows,
        columns,
        bits=expected_bits,
        group_size=size,
        version=version,
        bias=DTYPES[bias.spec.dtype] if bias else None,
        scales_dtype=DTYPES[scales.dtype],
        kernel=config.kernel,
        device="meta",
    )
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        stored = reader.entries.get(f"{name}.{part}")
        wanted = tuple(getattr(layer, part).shape)
        if stored is not None and (stored.spec.shape != wanted):
            raise BadModelError(
                f"{name}.{part} must have shape {list(wanted)} for {expected_bits} bits and group_size {size}, "
                f"got {list(stored.spec.shape)}" + (f" (it looks like {bits} bits)" if part == "qweight" else "")
            )
    if bias is None and linear.bias is not None:
        raise BadModelError(f"tensor {name}.bias is missing from {reader.folder}")
    return layer


def _left_out(name: str, layer: QuantLinear, reader: CheckpointReader, config: GptqFileConfig) -> dict[str, Tensor]:
    """g_idx without act-order and symmetric qzeros follow from the keys; anything else must be stored."""
    filled = {}
    if f"{name}.g_idx" not in reader.entries:
        if config.desc_act:
            raise BadModelError(f"tensor {name}.g_idx is missing from {reader.folder}, and desc_act needs it")
        filled[f"{name}.g_idx"] = (torch.arange(layer.in_features, device="cpu") // layer.group_size).to(torch.int32)
    if f"{name}.qzeros" not in reader.entries:
        raise BadModelError(f"tensor {name}.qzeros is missing from {reader.folder}")
    return filled


def _check_names(model: Any, reader: CheckpointReader, filled: Mapping[str, Tensor]) -> None:
    """Every tensor of the model is stored, and every stored one has a place."""
    wanted = set(model.state_dict().keys())
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(wanted - reader.entries.keys() - tied - filled.keys())
    if missing:
        raise BadModelError(f"tensor {missing[0]} is missing from {reader.folder} ({len(missing)} missing in all)")
    extra = sorted(name for name in reader.entries.keys() - wanted if not name.endswith("rotary_emb.inv_freq"))
    if extra:
        raise BadModelError(f"{reader.folder} holds {extra[0]} ({len(extra)} such), which the model has no place for")


def _stored_version(reader: CheckpointReader, names: list[str], config: GptqFileConfig) -> int:
    """The version the zeros were really written in: symmetric zeros show it, whatever the tag says."""
    if not config.sym:
        return config.version
    name = names[0]
    bits, _ = config.for_module(name)
    raw = unpack_zeros(reader.read(f"{name}.qzeros"), bits, version=2)
    middle = 2 ** (bits - 1)
    seen = 2 if bool((raw == middle).all()) else 1 if bool((raw == middle - 1).all()) else config.version
    if seen != config.version:
        _log.warning(
            "checkpoint_format says v%d, but the symmetric zeros of %s are v%d; reading them as v%d",
            config.version, name, seen, seen,
        )  # fmt: skip
    return seen


def _override(changes: Mapping[str, Any]) -> ModuleOverride:
    known = {key: value for key, value in changes.items() if key in ModuleOverride.model_fields}
    unknown = changes.keys() - known.keys() - _PROVENANCE
    if unknown:
        raise BadModelError(f"dynamic rule key {sorted(unknown)[0]!r} is not understood and might change the numbers")
    return ModuleOverride(**known)
