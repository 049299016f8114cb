"""A model with random weights at real shapes: made where it will run, in any precision, without a checkpoint.

Memory and speed of a model do not depend on what its weights say, so they can be measured on these. What answers such
a model gives means nothing. Nothing here measures or knows of files of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from qquant.errors import BadModelError, UsageError
from qquant.linear import QuantLinear
from qquant.model_folder import BUILD_ERRORS, skeleton
from qquant.model_kernels import attach_kernels
from qquant.models.layouts import block_list, find_layout, linears
from qquant.packing import in_order, packable
from qquant.records import Precision
from qquant.stored_bytes import BITS as BITS

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_STD = 0.02
"""Of the weights: what these families are initialised with, so that activations stay finite."""
_PATTERN = 1_048_583
"""Random values that are drawn once and repeated through a matrix: a prime, so that no two of its rows begin alike.
Drawing every value of a 72B model would take minutes, copying them takes seconds."""


def random_model(
    config: PretrainedConfig,
    *,
    precision: Precision,
    dtype: torch.dtype,
    device: torch.device,
    group_size: int = 128,
    seed: int = 0,
) -> PreTrainedModel:
    """A model of a configuration whose weights are random.

    Memory is asked for before the first tensor is filled, so that a model that is too large fails at once and not after
    minutes. With int8 and int4 the linears of the blocks are packed from the start, in the form that the kernels of
    this machine read: the model never exists unpacked, nor twice.

    Args:
        config: of a causal language model. Its dtype is ignored.
        precision: of the linears in the blocks; a float one must be ``dtype``.
        dtype: of everything else, and what is computed in.
        device: where it is made.
        group_size: columns that share a scale, for int8 and int4.
        seed: of what is drawn.

    Returns:
        The model in eval mode.

    Raises:
        UsageError: a precision that cannot be made, or linears that cannot be packed.
        BadModelError: no causal language model can be built of the configuration.
    """
    if precision not in BITS and DTYPES.get(precision) != dtype:
        raise UsageError(
            f"random weights are made in {', '.join([*DTYPES, *BITS])}, and a float precision is what is computed in; "
            f"got {precision} with {str(dtype).removeprefix('torch.')}"
        )
    model: Any = skeleton(config, Path(config.model_type), dtype)
    if precision in BITS:
        _pack(model, config.model_type, BITS[precision], group_size, dtype)
    _allocate(model, device)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            _fill(module, generator)

    def fill(_: str, layer: QuantLinear) -> None:
        _fill_packed(layer.to_empty(device=device), generator)

    if precision in BITS:
        attach_kernels(model, fill)
    result: PreTrainedModel = model.eval()
    return result


def config_from_dict(content: Mapping[str, Any]) -> PretrainedConfig:
    """A configuration from what a config.json holds; raises BadModelError where it names no model known here."""
    values = {key: value for key, value in content.items() if key != "quantization_config"}
    try:
        return AutoConfig.for_model(**values)
    except BUILD_ERRORS as error:
        raise BadModelError(f"no model known here has this configuration: {error}") from error


def _pack(model: Any, model_type: str, bits: int, group_size: int, dtype: torch.dtype) -> None:
    """Put a packed linear, without memory, in the place of every linear of every block."""
    for block in block_list(model, find_layout(model, model_type)):
        for name, linear in linears(block).items():
            if not packable(linear.out_features, linear.in_features, bits):
                raise UsageError(
                    f"{name} of {linear.in_features} x {linear.out_features} does not fill whole words of "
                    f"{bits}-bit codes; measure this model unquantized"
                )
            parent, _, leaf = name.rpartition(".")
            bias = None if linear.bias is None else dtype
            options: dict[str, Any] = {"bits": bits, "group_size": group_size, "bias": bias, "device": "meta"}
            setattr(block.get_submodule(parent), leaf, QuantLinear(linear.in_features, linear.out_features, **options))


def _allocate(model: Any, device: torch.device) -> None:
    """Memory for every parameter; buffers, which the model's own constructor computed, go to the device.

    Packed linears get theirs one by one.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is not None and f"{path}.{leaf}" not in tied:
                # It requires gradients, as what from_pretrained loads: on a CPU torch takes another way otherwise, and
                # copies the output projection for every sequence of a prompt.
                module._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device=device))
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)
    if tied:
        model.tie_weights()


def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Random values for the matrices; norms one, biases zero, as a fresh model has them. In place."""
    for leaf, parameter in module._parameters.items():
        if parameter is None:
            continue
        if parameter.ndim < 2:
            parameter.fill_(1.0 if leaf == "weight" else 0.0)
        else:
            drawn = torch.randn(_pattern_of(parameter), generator=generator) * _STD
            _repeat(parameter, drawn.to(parameter.dtype))


def _fill_packed(layer: QuantLinear, generator: torch.Generator) -> None:
    """Random codes around the middle, groups in order, no bias. In place."""
    with torch.no_grad():
        words = torch.randint(-(2**31), 2**31, (_pattern_of(layer.qweight),), generator=generator, dtype=torch.int64)
        _repeat(layer.qweight, words.to(torch.int32))
        middle = 2 ** (layer.bits - 1)
        layer.qzeros.fill_(_word_of(middle - 1 if layer.version == 1 else middle, layer.bits))
        # Codes are even over 2**bits levels, whose standard deviation is this.
        layer.scales.fill_(_STD / (((4**layer.bits - 1) / 12) ** 0.5))
        layer.g_idx.copy_(in_order(layer.in_features, layer.group_size, layer.g_idx.device))
        if layer.bias is not None:
            layer.bias.zero_()


def _pattern_of(tensor: Tensor) -> int:
    return max(1, min(_PATTERN, tensor.numel()))


def _repeat(tensor: Tensor, pattern: Tensor) -> None:
    """Fill a contiguous tensor with a pattern, again and again."""
    flat, pattern = tensor.view(-1), pattern.to(tensor.device)
    whole = flat.numel() // pattern.numel() * pattern.numel()
    flat[:whole].view(-1, pattern.numel()).copy_(pattern)
    flat[whole:].copy_(pattern[: flat.numel() - whole])


def _word_of(code: int, bits: int) -> int:
    """An int32 all of whose fields hold one code."""
    word = sum(code << shift for shift in range(0, 32, bits))
    return word - 2**32 if word >= 2**31 else word
