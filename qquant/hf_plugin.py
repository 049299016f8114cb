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
from qquant.errors import BadModelError, UsageError
from qquant.kv_cache_quant import enable_as_configured
from qquant.linear import Kernel, QuantLinear
from qquant.models.qwen.modeling import register_qwen
from qquant.packing import in_order, packable, unpack_zeros
from qquant.shards import DTYPE_NAMES, DTYPES, INDEX_NAME, SINGLE_NAME, CheckpointReader, TensorSpec, weight_files
from qquant.sources import computed_by_model

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
        self._settings = _settings(self.keys)

    @property
    def version(self) -> int:
        """1 if qzeros hold ``zero - 1``, 2 if they hold ``zero``."""
        return _VERSIONS[self.keys.get("checkpoint_format") or self.keys.get("format") or "gptq"]

    def for_module(self, name: str) -> QuantizeConfig:
        """Bits, group size, symmetry and act-order of a module by its name, rules included."""
        return self._settings.for_module(name) or self._settings

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
        reader = CheckpointReader(_folder_of(checkpoint_files or [], model))
        self._filled = swap_linears(model, reader, self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        for name, tensor in self._filled.items():
            path, _dot, leaf = name.rpartition(".")
            layer = model.get_submodule(path)
            setattr(layer, leaf, tensor.to(layer.qweight.device))
        check_values(model)
        enable_as_configured(model)

    def update_attn_implementation(self, config: Any) -> Any:
        """The one hook that sees the config before files are looked up: names AutoGPTQ's file to transformers.

        A folder of AutoGPTQ's time holds one ``gptq_model-4bit-128g.safetensors`` and no ``model.safetensors``.
        """
        folder = Path(str(getattr(config, "_name_or_path", "")))
        if folder.is_dir() and not (folder / SINGLE_NAME).exists() and not (folder / INDEX_NAME).exists():
            config.transformers_weights = weight_files(folder)[0].name
        return config

    def is_serializable(self) -> bool:
        """Saving writes the packed tensors as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return False


def register() -> None:
    """Teach transformers' Auto classes, in this process, the original Qwen models and GPTQ checkpoints.

    ``AutoConfig``, ``AutoModelForCausalLM`` and ``AutoTokenizer`` then know the type ``qwen`` without remote code, and
    ``from_pretrained`` reads GPTQ checkpoints through qquant: that replaces transformers' own entry for
    ``quant_method: gptq``, which needs optimum and gptqmodel. Idempotent.
    """
    register_qwen()
    AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = GptqFileConfig


def check_keys(keys: Mapping[str, Any]) -> None:
    """Refuse, by name, quantization keys that would change the numbers and are not understood."""
    method = keys.get("quant_method", "gptq")
    if method not in ("gptq", METHOD):
        raise BadModelError(f"quant_method must be gptq to be read here, got {method!r}")
    if keys.get("is_marlin_format"):
        raise BadModelError("is_marlin_format: weights in Marlin's own layout are not read; use the plain GPTQ files")
    tags = {str(keys[key]) for key in ("checkpoint_format", "format") if keys.get(key)}
    if len(tags) > 1 or not tags <= _VERSIONS.keys():
        raise BadModelError(f"checkpoint_format must be one of {sorted(_VERSIONS)}, got {' and '.join(sorted(tags))}")
    if keys.get("pack_dtype", "int32") != "int32":
        raise BadModelError(f"pack_dtype must be int32, got {keys['pack_dtype']!r}")
    _settings(keys)
    for key, value in keys.items():
        if key not in _PROVENANCE | _UNDERSTOOD and value not in (None, False, {}, [], ""):
            raise BadModelError(
                f"quantization key {key!r} ({str(value)[:60]!r}) is not understood and might change the numbers; "
                "remove it from config.json if it only records how the checkpoint was made"
            )


def _settings(keys: Mapping[str, Any]) -> QuantizeConfig:
    """The keys that say how tensors are laid out, with the defaults that AutoGPTQ gave them."""
    dynamic = keys.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(changes or {}, dict) for changes in dynamic.values()):
        raise BadModelError(f"dynamic must map patterns to changed settings, got {str(dynamic)[:60]}")
    rules = {}
    for pattern, changes in dynamic.items():
        unknown = (changes or {}).keys() - ModuleOverride.model_fields.keys() - _PROVENANCE
        if unknown:
            raise BadModelError(f"dynamic rule key {min(unknown)!r} is not understood and might change the numbers")
        # GPTQModel also takes a pattern without a sign for one that changes settings.
        sign = "" if pattern[:2] in ("-:", "+:") else "+:"
        rules[sign + pattern] = {key: changes[key] for key in (changes or {}) if key in ModuleOverride.model_fields}
    defaults = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    try:
        return QuantizeConfig.from_dict(
            {key: keys.get(key, default) for key, default in defaults.items()}
            | {"act_group_aware": False, "dynamic": rules}
        )
    except UsageError as error:
        raise BadModelError(f"the quantization keys make no sense: {error}") from error


def _folder_of(checkpoint_files: list[str], model: Any) -> Path:
    """The one folder that holds all files which transformers is about to read.

    transformers itself follows an index out of a local folder.
    """
    if not checkpoint_files:
        raise BadModelError("a quantized model is loaded from safetensors files, got none")
    folder = Path(checkpoint_files[0]).parent
    named = Path(str(getattr(model.config, "name_or_path", "")))
    inside = not named.is_dir() or folder.resolve().is_relative_to(named.resolve())
    # The name that the user gave may go up; what an index adds to it may not.
    if not inside or any(Path(file).parent != folder or Path(file).name == ".." for file in checkpoint_files):
        raise BadModelError(f"all weights must lie in the model folder {named}, {checkpoint_files[0]} does not")
    return folder


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
    layers: dict[str, QuantLinear] = {}
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
        layers[name] = _empty_layer(name, linear, reader, config)
        filled.update(_left_out(name, layers[name], reader, config))
    version = _stored_version(reader, list(layers), config)
    for name, layer in layers.items():
        layer.version = version
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    _check_names(model, reader, filled)
    return filled


def _empty_layer(name: str, linear: nn.Linear, reader: CheckpointReader, config: GptqFileConfig) -> QuantLinear:
    """A QuantLinear on the meta device whose buffers have the shapes and dtypes that are stored."""
    rows, columns = linear.in_features, linear.out_features
    settings = config.for_module(name)
    bits, size = settings.bits, settings.group_size
    if not packable(rows, columns, bits):
        raise BadModelError(f"{name}: [{columns}, {rows}] does not fill whole words of {bits}-bit codes")
    scales, bias = reader.spec(f"{name}.scales"), reader.entries.get(f"{name}.bias")
    if bias is None and linear.bias is not None:
        raise BadModelError(f"tensor {name}.bias is missing from {reader.folder}")
    layer = QuantLinear(
        rows,
        columns,
        bits=bits,
        group_size=size,
        version=config.version,
        bias=DTYPES[bias.spec.dtype] if bias else None,
        scales_dtype=DTYPES[scales.dtype],
        kernel=config.kernel,
        device="meta",
    )
    if not all(layer.get_buffer(part).is_floating_point() for part in ("scales", "bias") if part in layer.state_dict()):
        raise BadModelError(f"{name}: scales and bias must be floating, got {scales.dtype}")
    for part, buffer in layer.state_dict().items():
        stored = reader.entries.get(f"{name}.{part}")
        wanted = TensorSpec(DTYPE_NAMES[buffer.dtype], tuple(buffer.shape))
        if stored is not None and stored.spec != wanted:
            raise BadModelError(
                f"{name}.{part} must be {wanted.dtype} {list(wanted.shape)} for {bits} bits and group_size {size}, "
                f"got {stored.spec.dtype} {list(stored.spec.shape)}; "
                "quantization_config and tensors do not belong together"
            )
    return layer


def _left_out(name: str, layer: QuantLinear, reader: CheckpointReader, config: GptqFileConfig) -> dict[str, Tensor]:
    """g_idx follows from the keys where there is no act-order; anything else must be stored."""
    reader.spec(f"{name}.qzeros")
    if f"{name}.g_idx" in reader.entries:
        return {}
    if config.for_module(name).desc_act:
        raise BadModelError(f"tensor {name}.g_idx is missing from {reader.folder}, and desc_act needs it")
    return {f"{name}.g_idx": in_order(layer.in_features, layer.group_size, "cpu")}


def _check_names(model: Any, reader: CheckpointReader, filled: Mapping[str, Tensor]) -> None:
    """Every tensor of the model is stored, and every stored one has a place."""
    wanted: dict[str, Tensor] = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(wanted.keys() - reader.entries.keys() - tied - filled.keys())
    if missing:
        raise BadModelError(f"tensor {missing[0]} is missing from {reader.folder} ({len(missing)} missing in all)")
    extra = sorted(name for name in reader.entries.keys() - wanted.keys() if not computed_by_model(name))
    if extra:
        raise BadModelError(f"{reader.folder} holds {extra[0]} ({len(extra)} such), which the model has no place for")
    for name, tensor in wanted.items():
        if name in reader.entries and reader.spec(name).shape != tuple(tensor.shape):
            got = list(reader.spec(name).shape)
            raise BadModelError(f"{name} must have shape {list(tensor.shape)} by config.json, got {got}")


def _stored_version(reader: CheckpointReader, names: list[str], config: GptqFileConfig) -> int:
    """The version the zeros were really written in: symmetric zeros show it, whatever the tag says."""
    name = next((name for name in names if config.for_module(name).sym), None)
    if name is None:
        return config.version
    bits = config.for_module(name).bits
    raw = unpack_zeros(reader.read(f"{name}.qzeros"), bits, version=2)
    middle = 2 ** (bits - 1)
    seen = 2 if bool((raw == middle).all()) else 1 if bool((raw == middle - 1).all()) else config.version
    if seen != config.version:
        _log.warning(
            "checkpoint_format says v%d, but the symmetric zeros of %s are v%d; reading them as v%d",
            config.version, name, seen, seen,
        )  # fmt: skip
    return seen


def check_values(model: nn.Module) -> None:
    """Refuse loaded tensors that would give nonsense without an error: numbers not finite, groups that are not there.

    Raises:
        BadModelError: naming the tensor.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise BadModelError(f"weights must be finite, {name} holds NaN or Inf")
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and not layer.g_idx.is_meta:
            low, high = (int(end) for end in layer.g_idx.aminmax())
            if low < 0 or high >= layer.scales.shape[0]:
                raise BadModelError(f"{name}.g_idx must name groups 0..{layer.scales.shape[0] - 1}, got {low}..{high}")
