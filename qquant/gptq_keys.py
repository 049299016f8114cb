"""What the quantization keys of a GPTQ checkpoint mean, and which are refused: whatever would change the numbers.

Whether tensors fit the keys is hf_plugin.py's to see; the keys that we write are checkpoint.py's.
"""

# ruff: noqa: SIM905 - a split string of words reads better than sixty quoted ones
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from qquant.config import ModuleOverride, QuantizeConfig
from qquant.errors import BadModelError, UsageError
from qquant.linear_kernels import Kernel, wished
from qquant.rule_patterns import endless

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

    def __init__(
        self, kernel: Kernel | str = Kernel.AUTO, activation_bits: Literal[8] | None = None, **keys: Any
    ) -> None:
        """Check the keys; raises BadModelError naming the one that is not understood.

        Args:
            kernel: what multiplies packed linears; not written into files.
            activation_bits: of their activations, see ``QuantLinear``; not written into files.
            **keys: ``quantization_config`` as config.json has it.
        """
        self.quant_method = METHOD  # type: ignore[assignment]
        self.kernel, self.activation_bits = wished(kernel), activation_bits
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

    def skips(self, name: str) -> bool:
        """Whether a rule of ``dynamic`` leaves a module alone."""
        return self._settings.for_module(name) is None

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


def check_keys(keys: Mapping[str, Any]) -> None:
    """Refuse, by name, quantization keys that would change the numbers and are not understood.

    Raises:
        BadModelError: naming the key.
    """
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
    """The keys that say how tensors are laid out, with the defaults that AutoGPTQ gave them.

    Raises:
        BadModelError: they make no sense.
    """
    dynamic = keys.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(changes or {}, dict) for changes in dynamic.values()):
        raise BadModelError(f"dynamic must map patterns to changed settings, got {str(dynamic)[:60]}")
    if too_much := endless(pattern.removeprefix("-:").removeprefix("+:") for pattern in dynamic):
        raise BadModelError(
            f"dynamic rules must match names in bounded time, {too_much}; write them without such repeats"
        )
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
