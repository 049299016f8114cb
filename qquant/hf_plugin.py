"""The transformers quantizer plug-in: swaps linears for QuantLinear while a GPTQ checkpoint is loaded.

Whether tensors and keys belong together is decided here. Packed tensors are read here as well, one layer at a time:
transformers would have all of them in memory before the first can be rearranged. What keys mean is gptq_keys.py's,
folders and files are checkpoint.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer

from qquant.device_map import check_names, offloads
from qquant.errors import BadModelError, UsageError
from qquant.finite import all_finite
from qquant.gptq_keys import METHOD as METHOD
from qquant.gptq_keys import GptqFileConfig as GptqFileConfig
from qquant.gptq_keys import check_keys as check_keys
from qquant.kv_cache_quant import enable_as_configured
from qquant.linear import QuantLinear
from qquant.linear_kernels import Kernel
from qquant.model_kernels import attach_kernels
from qquant.models.qwen.modeling import register_qwen
from qquant.packing import in_order, packable, unpack_zeros
from qquant.shards import DTYPE_NAMES, DTYPES, INDEX_NAME, SINGLE_NAME, CheckpointReader, TensorSpec, weight_files
from qquant.sources import computed_by_model
from qquant.telling import say_once

_log = logging.getLogger("qquant")
_kernel_log = logging.getLogger("qquant.kernels")
if _kernel_log.level == logging.NOTSET:
    _kernel_log.setLevel(logging.INFO)  # shown unless somebody asks for less: see say_kernels

_STREAMED = ("qweight", "qzeros", "scales")
"""What we read ourselves. The rest of a layer is small, and where transformers puts it says where the layer goes."""
_AGAIN = "get the checkpoint again, or quantize the model again"
_MAY_MISS, _MAY_HOLD = "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"
"""Patterns of a model: tensors that a checkpoint may leave out, and those that it may hold and the model has not."""


@register_quantizer(METHOD)
class GptqLoader(HfQuantizer):
    """Puts empty QuantLinear modules where the checkpoint holds packed tensors, before weights are loaded."""

    requires_calibration = False
    quantization_config: GptqFileConfig

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        """Nothing is looked at yet."""
        super().__init__(quantization_config, **options)
        self._model: Any = None
        self._reader: Any = None
        self._ignored: dict[str, Any] = {}
        self._left_out: dict[str, Tensor] = {}
        self._aside: dict[str, dict[str, Tensor]] = {}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, device_map: Any = None, **_: Any
    ) -> None:
        self._reader = CheckpointReader(_folder_of(checkpoint_files or [], model))
        self._left_out = swap_linears(model, self._reader, self.quantization_config)
        self._model = model
        if not isinstance(device_map, str):
            self._set_aside(device_map)

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Called once more when "auto" has become a map: before that, the sizes of the packed tensors were needed."""
        if self._model is not None:
            self._set_aside(device_map)

    def _set_aside(self, device_map: Any) -> None:
        """Hide from transformers what we read ourselves: it loads, reports and moves what a state dict names."""
        model, self._model = self._model, None
        self._ignored = {name: getattr(model, name) for name in (_MAY_MISS, _MAY_HOLD)}
        setattr(model, _MAY_MISS, {*(self._ignored[_MAY_MISS] or ()), r"\.g_idx$"})
        if isinstance(device_map, Mapping):
            check_names(device_map, {*(name for name, _ in model.named_modules()), *model.state_dict()})
        if offloads(device_map):
            return  # what is taken from the disk or another device at every use stays as it is stored
        for name, layer in _packed_layers(model):
            self._aside[name] = {part: layer.get_buffer(part) for part in _STREAMED}
            for part in _STREAMED:
                setattr(layer, part, None)
        ours = r"\.(" + "|".join(_STREAMED) + ")$"
        setattr(model, _MAY_HOLD, {*(self._ignored[_MAY_HOLD] or ()), ours})

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        for name, patterns in self._ignored.items():
            setattr(model, name, patterns)
        for name, tensor in self._left_out.items():
            layer = model.get_submodule(name.removesuffix(".g_idx"))
            layer.g_idx = tensor.to(layer.g_idx.device)
        streamed = bool(self._aside)
        for name, layer in _packed_layers(model):
            for part, empty in self._aside.get(name, {}).items():
                setattr(layer, part, empty)
            if not streamed and layer.qweight.is_meta:
                self._serve_from_elsewhere(name, layer)
        if streamed:
            _leave_files(model, self._reader)
        check_values(model)
        say_kernels(attach_kernels(model, self._fill if streamed else None))
        assert not self._aside, f"never read: {sorted(self._aside)}"
        self._reader, self._left_out = None, {}
        enable_as_configured(model)

    def _serve_from_elsewhere(self, name: str, layer: QuantLinear) -> None:
        """Only the reference reads a layer as it is stored, and that is how it is fetched at every use."""
        if self.quantization_config.kernel not in (Kernel.AUTO, Kernel.REFERENCE) or layer.activation_bits is not None:
            raise UsageError(
                f"only the reference serves layers that are fetched at every use, and device_map puts {name} on the "
                "disk or another device; leave kernel and activation_bits out, or keep it in memory"
            )
        layer.kernel = Kernel.REFERENCE
        say_once("packed linears that device_map puts on the disk or another device are fetched at every use: slowly")

    def _fill(self, name: str, layer: QuantLinear) -> None:
        """Read what was set aside of one layer to where the rest of it is, and check it."""
        for part in self._aside.pop(name):
            setattr(layer, part, self._reader.read(f"{name}.{part}").to(layer.g_idx.device))
        check_layer(name, layer)

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
    modules = dict(model.named_modules())
    for base in (name.removesuffix(".qzeros") for name in reader.entries if name.endswith(".qzeros")):
        if base in modules and f"{base}.qweight" not in reader.entries:
            raise BadModelError(f"tensor {base}.qweight is missing from {reader.folder}; {_AGAIN}")
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
        raise BadModelError(
            f"{name}: [{columns}, {rows}] does not fill whole words of {bits}-bit codes, so no GPTQ file can hold it; "
            "correct bits in quantization_config"
        )
    scales, bias = reader.spec(f"{name}.scales"), reader.entries.get(f"{name}.bias")
    if bias is None and linear.bias is not None:
        raise BadModelError(f"tensor {name}.bias is missing from {reader.folder}; {_AGAIN}")
    layer = QuantLinear(
        rows,
        columns,
        bits=bits,
        group_size=size,
        version=config.version,
        bias=DTYPES[bias.spec.dtype] if bias else None,
        scales_dtype=DTYPES[scales.dtype],
        kernel=config.kernel,
        activation_bits=config.activation_bits,
        device="meta",
    )
    for part, buffer in layer.state_dict().items():
        if part in ("scales", "bias") and not buffer.is_floating_point():
            raise BadModelError(f"{name}.{part} must be floating, got {DTYPE_NAMES[buffer.dtype]}; {_AGAIN}")
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
        raise BadModelError(f"tensor {name}.g_idx is missing from {reader.folder}, and desc_act needs it; {_AGAIN}")
    return {f"{name}.g_idx": in_order(layer.in_features, layer.group_size, "cpu")}


def _check_names(model: Any, reader: CheckpointReader, filled: Mapping[str, Tensor]) -> None:
    """Every tensor of the model is stored, and every stored one has a place."""
    wanted: dict[str, Tensor] = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(wanted.keys() - reader.entries.keys() - tied - filled.keys())
    if missing:
        count = f"{len(missing)} missing in all"
        raise BadModelError(f"tensor {missing[0]} is missing from {reader.folder} ({count}); {_AGAIN}")
    extra = sorted(name for name in reader.entries.keys() - wanted.keys() if not computed_by_model(name))
    if extra:
        raise BadModelError(f"{reader.folder} holds {extra[0]} ({len(extra)} such), which the model has no place for")
    for name, tensor in wanted.items():
        if name in reader.entries and reader.spec(name).shape != tuple(tensor.shape):
            got = list(reader.spec(name).shape)
            raise BadModelError(f"{name} must have shape {list(tensor.shape)} by config.json, got {got}")
        if name in reader.entries and DTYPES[reader.spec(name).dtype].is_floating_point != tensor.is_floating_point():
            kind = "floating" if tensor.is_floating_point() else "whole"
            raise BadModelError(f"{name} must hold {kind} numbers, got {reader.spec(name).dtype}; {_AGAIN}")


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

    Packed layers are checked as far as their tensors are here and as the checkpoint stores them.

    Raises:
        BadModelError: naming the tensor.
    """
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            check_layer(path, module)
            continue
        for leaf, tensor in _saved(module).items():
            _check_finite(f"{path}.{leaf}", tensor)


def check_layer(name: str, layer: QuantLinear) -> None:
    """The same for one packed layer."""
    here = _saved(layer)
    for part, tensor in here.items():
        _check_finite(f"{name}.{part}", tensor)
    if "scales" in here and "g_idx" in here and not here["g_idx"].is_meta:
        groups = here["scales"].shape[0]
        low, high = (int(end) for end in here["g_idx"].aminmax())
        if low < 0 or high >= groups:
            raise BadModelError(f"{name}.g_idx must name groups 0..{groups - 1}, got {low}..{high}")


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not tensor.is_meta and not all_finite(tensor):
        raise BadModelError(f"weights must be finite, {name} holds NaN or Inf")


def _saved(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers, those left out that no checkpoint holds."""
    unsaved = module._non_persistent_buffers_set
    tensors = {**module._parameters, **module._buffers}
    return {leaf: tensor for leaf, tensor in tensors.items() if tensor is not None and leaf not in unsaved}


def _packed_layers(model: nn.Module) -> list[tuple[str, QuantLinear]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantLinear)]


def _leave_files(model: Any, reader: CheckpointReader) -> None:
    """Give every tensor that is still a view of a mapped file memory of its own.

    transformers does not copy what needs no cast. Any such view, however small, keeps in memory all pages of its file
    that were read for a cast, and what happens to the file happens to the model.
    """
    if model._weight_conversions:
        return  # names or values in the file are not those in the model
    for path, module in model.named_modules():
        for leaf, tensor in _saved(module).items():
            entry = reader.entries.get(f"{path}.{leaf}")
            spec = TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            if entry is not None and entry.spec == spec and tensor.device.type == "cpu":
                own = reader.read(f"{path}.{leaf}")
                if leaf in module._buffers:
                    setattr(module, leaf, own)  # a buffer is a view of a tensor, and would keep that
                else:
                    tensor.data = own  # the very parameter stays, as others may be tied to it


def say_kernels(lines: list[str]) -> None:
    """Log lines that a user is to see. Where nothing shows logs, as in a plain script, they go to stderr.

    ``logging.getLogger("qquant.kernels").setLevel("WARNING")`` silences them.
    """
    shown = logging.StreamHandler()
    silent = not _kernel_log.hasHandlers()
    if silent:
        _kernel_log.addHandler(shown)
    for line in lines:
        _kernel_log.info("%s", line)
    if silent:
        _kernel_log.removeHandler(shown)
