"""AutoGPTQ's interface over our engine: a script of 2023 runs after one changed import.

Names and call order are AutoGPTQ 0.7's; docs/auto-gptq.md says what each option means here. Nothing is quantized,
packed or laid out in this file. Importing it calls ``qquant.register()``, so that the script's own Auto classes find
the native models and no remote code is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qquant.calibrate import check_samples, data_record
from qquant.checkpoint import load_quantized, quantization_config
from qquant.compat.saving import Run, save_model
from qquant.compat.script_inputs import (
    SPREAD,
    a_dtype,
    a_path,
    accept,
    allows_gradients,
    one_device,
    refuse_contradictions,
    refuse_pickles,
    samples_of,
    say_one_pass,
    without_hub,
    without_its_code,
)
from qquant.config import ModuleRecord, QuantizeConfig
from qquant.errors import UsageError
from qquant.hf_plugin import check_keys, check_values, register
from qquant.json_files import read_json, write_json
from qquant.methods import best_without
from qquant.model_folder import name_weights, read_config, resolve_folder
from qquant.quantizing import quantize_model
from qquant.shards import weight_files
from qquant.sources import StreamedModel, compute_dtype

_log = logging.getLogger("qquant")

register()

_KEYS_NAME = "quantize_config.json"


@dataclass
class BaseQuantizeConfig:
    """How the weights are quantized, with AutoGPTQ's names, order and defaults.

    Raises:
        UsageError: a value that our engine does not take, named with what is allowed.
    """

    bits: int = 4
    group_size: int = -1
    damp_percent: float = 0.01
    desc_act: bool = True
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    is_marlin_format: bool = False
    model_name_or_path: str | None = None
    model_file_base_name: str | None = None
    awq_gemm_checkpoint: bool = False
    checkpoint_format: str = "gptq"

    def __post_init__(self) -> None:
        """Refuse at once what would fail hours later."""
        self.to_qquant()

    def to_qquant(self, *, gradients: bool = True) -> QuantizeConfig:
        """The same choice in our own terms, carried out by "best" or, where a field excludes parts of it, by the rest.

        Args:
            gradients: whether the model's weights allow any; ``output`` takes them.
        """
        if self.is_marlin_format or self.awq_gemm_checkpoint or self.checkpoint_format != "gptq":
            raise UsageError(
                "only the plain GPTQ format is written, got "
                f"is_marlin_format={self.is_marlin_format}, awq_gemm_checkpoint={self.awq_gemm_checkpoint}, "
                f"checkpoint_format={self.checkpoint_format!r}; leave them out, readers convert the plain files"
            )
        names = ("bits", "group_size", "damp_percent", "desc_act", "static_groups", "sym", "true_sequential")
        excluded = [] if self.true_sequential else ["qep", "residual"]
        excluded += [] if gradients else ["output"]
        method = {"method": best_without(*excluded)} if excluded else {}
        return QuantizeConfig.from_dict({name: getattr(self, name) for name in names} | method)

    def to_dict(self) -> dict[str, Any]:
        """The keys of quantize_config.json."""
        return {key: value for key, value in asdict(self).items() if key != "awq_gemm_checkpoint"} | {
            "quant_method": "gptq"
        }

    def save_pretrained(self, save_dir: str | Path) -> None:
        """Write quantize_config.json into a folder, which is made if absent."""
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        write_json(Path(save_dir) / _KEYS_NAME, self.to_dict())

    @classmethod
    def from_pretrained(cls, save_dir: str | Path) -> Self:
        """Read a local folder's quantize_config.json, or the quantization_config of its config.json.

        Raises:
            BadModelError: neither is there, or a key is not understood.
            UsageError: it holds rules per module, for which there is no field here.
        """
        folder = Path(save_dir)
        keys = read_json(folder / _KEYS_NAME) if (folder / _KEYS_NAME).is_file() else quantization_config(folder)
        check_keys(keys)
        if keys.get("dynamic"):
            raise UsageError(f"BaseQuantizeConfig has no rules per module and {folder} does; use qquant.QuantizeConfig")
        return cls._of(keys)

    @classmethod
    def _of(cls, keys: Mapping[str, Any]) -> Self:
        """The fields that checked keys name; what a file leaves out is as every reader takes it."""
        known = {item.name for item in fields(cls)} - {"checkpoint_format"}
        defaults = {"group_size": 128, "desc_act": False}
        return cls(**defaults | {key: value for key, value in keys.items() if key in known and value is not None})


class BaseGPTQForCausalLM(nn.Module):
    """A model in memory that can be quantized and saved; what it does not know itself it asks of ``model``.

    Made by ``AutoGPTQForCausalLM``.

    Args:
        model: causal language model on one device. Modified in place by ``quantize``.
        folder: where it was read from; side files are carried over from there.
        quantized: whether its linears are packed already.
        quantize_config: what ``quantize`` does, or did.
        dtype: of the floating tensors that are saved; None: each as the folder stores it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        folder: Path,
        *,
        quantized: bool,
        quantize_config: BaseQuantizeConfig,
        dtype: torch.dtype | None,
    ) -> None:
        """Keep the model and where it came from."""
        super().__init__()
        self.model: Any = model
        self.quantize_config = quantize_config
        self._folder, self._dtype = folder, dtype
        self._weights: Literal["original", "half quantized", "quantized"] = "quantized" if quantized else "original"
        self._run: Run | None = None

    def __getattr__(self, name: str) -> Any:
        """Parameters and modules of the wrapper first, then everything that the model offers."""
        if name == "model" or name in self.__dict__.get("_modules", {}):
            return super().__getattr__(name)
        return getattr(self.model, name)

    @property
    def quantized(self) -> bool:
        """Whether the linears are packed."""
        return self._weights == "quantized"

    @property
    def hf_device_map(self) -> dict[str, Any] | None:
        """Which module is where, for a model that was spread over devices; else None."""
        found: dict[str, Any] | None = getattr(self.model, "hf_device_map", None)
        return found

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the model."""
        self.model.to(*args, **kwargs)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate``."""
        with torch.inference_mode():
            return self.model.generate(*args, **kwargs)

    def quantize(self, examples: Iterable[Mapping[str, Any]], batch_size: int = 1, **options: Any) -> None:
        """Quantize the model in memory; afterwards it can be used and saved, in any order.

        Args:
            examples: mappings with ``input_ids`` and, unless every token counts, ``attention_mask``: integers [T] or
                [N, T], as tensors or lists. Masked tokens are not counted. Read, never written.
            batch_size: accepted; samples are run one by one, and the numbers do not depend on it.
            **options: AutoGPTQ's choices of kernels and places, ignored.

        Raises:
            UsageError: an unknown option, or a model that is quantized already.
            BadDataError: examples of another kind, too short, or not of this model's vocabulary.
            QquantError: numbers that cannot be solved; the model is then partly quantized and must be loaded again.
        """
        accept("quantize", options | ({} if batch_size == 1 else {"batch_size": batch_size}), ignored={"batch_size"})
        if self._weights != "original":
            state = "is quantized already" if self.quantized else "was left half quantized by an error"
            raise UsageError(f"quantize needs the original weights, and this model {state}; call from_pretrained again")
        # AutoGPTQ itself quantized under inference_mode, so a script may; gradients are forbidden there.
        with torch.inference_mode(False):
            say_one_pass(self.quantize_config.true_sequential)
            config = self.quantize_config.to_qquant(gradients=allows_gradients(self.model))
            samples = samples_of(examples)
            check_samples(samples, int(self.model.config.get_text_config().vocab_size))
            self._weights = "half quantized"
            try:
                log = quantize_model(self.model, samples, config, on_module=_report)
            except UsageError:  # raised before any weight is touched: the script may change quantize_config and go on
                self._weights = "original"
                raise
        self._weights = "quantized"
        self._run = Run(config, data_record(samples), log, str(self.model.dtype).removeprefix("torch."))

    def save_quantized(
        self,
        save_dir: str | Path,
        use_safetensors: bool = True,
        safetensors_metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write a GPTQ checkpoint with tokenizer and side files; it appears at once, when all of it is proven.

        An existing folder is replaced if it holds a quantized model or no model at all. Files in it that are not part
        of a checkpoint, such as a tokenizer that the script saved, stay.

        Args:
            save_dir: folder to make.
            use_safetensors: must be True.
            safetensors_metadata: accepted; it is not written.

        Raises:
            UsageError: nothing is quantized yet, pickles are asked for, or the folder holds something else.
            NumericError: what was written is not what is in memory; nothing is left at ``save_dir``.
        """
        refuse_pickles(use_safetensors)
        if not self.quantized:
            raise UsageError("save_quantized needs a quantized model; call quantize(examples) first")
        if safetensors_metadata:
            _log.warning("save_quantized ignores safetensors_metadata; quant_log.json and manifest.json say more")
        if self.quantize_config.model_file_base_name not in (None, "model"):
            _log.warning("model_file_base_name is not used: the weights are model.safetensors, which readers look for")
        save_model(
            self.model, a_path("save_quantized", save_dir), source=self._folder, dtype=self._dtype, run=self._run
        )
        self.quantize_config.model_name_or_path = str(save_dir)
        self.quantize_config.model_file_base_name = "model"

    save_pretrained = save_quantized


class AutoGPTQForCausalLM:
    """The two ways to a model: ``from_pretrained`` to quantize one, ``from_quantized`` to use one."""

    def __init__(self) -> None:
        """Refused, as in AutoGPTQ."""
        raise UsageError("AutoGPTQForCausalLM is not called; use from_pretrained to quantize, from_quantized to load")

    @classmethod
    @without_its_code
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        quantize_config: BaseQuantizeConfig,
        max_memory: Mapping[Any, Any] | None = None,
        trust_remote_code: bool = False,
        torch_dtype: torch.dtype | str | None = None,
        *,
        device_map: Any = None,
        **options: Any,
    ) -> BaseGPTQForCausalLM:
        """Load an original model whole into memory, ready for ``quantize``.

        Args:
            pretrained_model_name_or_path: folder with safetensors weights, or hub id.
            quantize_config: what ``quantize`` will do.
            max_memory: accepted; the model is on one device.
            trust_remote_code: accepted; no remote code runs.
            torch_dtype: dtype to compute in and to save the unquantized tensors in; None: as stored. float16 is
                computed in float32 on a CPU.
            device_map: one device; None and "auto": the first GPU if the model fits there twice, else the CPU.
            **options: fields of the model's configuration, or options that only choose kernels, which are ignored.

        Raises:
            UsageError: an option that is not understood, or several devices.
            BadModelError: incomplete, quantized already, or of an unknown kind.
        """
        _check_config("from_pretrained", quantize_config)
        local = a_path("from_pretrained", pretrained_model_name_or_path).expanduser().is_dir()
        options = without_hub("from_pretrained", options, local=local) | ({"max_memory": 0} if max_memory else {})
        dtype = a_dtype(options.pop("dtype", torch_dtype))
        folder = resolve_folder(str(pretrained_model_name_or_path))
        config = read_config(folder)
        passed = accept(
            "from_pretrained",
            options,
            ignored={"max_memory"},
            passes={"attn_implementation"} | {name for name in options if hasattr(config, name)},
        )
        device = one_device(device_map, sum(file.stat().st_size for file in weight_files(folder)))
        # The skeleton is built for its checks: every name and shape, safetensors only, not quantized yet.
        stored = StreamedModel(folder, device=device).dtype
        for name in passed.keys() - {"attn_implementation"}:
            setattr(config, name, passed.pop(name))
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=name_weights(config, folder),
            dtype=stored if dtype is None else compute_dtype(dtype, device),
            device_map=None if device.type == "cpu" else {"": str(device)},
            local_files_only=True,
            trust_remote_code=False,
            **passed,
        )
        check_values(model)
        return BaseGPTQForCausalLM(model.eval(), folder, quantized=False, quantize_config=quantize_config, dtype=dtype)

    @classmethod
    @without_its_code
    def from_quantized(
        cls,
        model_name_or_path: str | Path,
        device_map: Any = None,
        max_memory: Mapping[Any, Any] | None = None,
        device: torch.device | str | int | None = None,
        *,
        torch_dtype: torch.dtype | str | None = None,
        quantize_config: BaseQuantizeConfig | None = None,
        model_basename: str | None = None,
        use_safetensors: bool = True,
        trust_remote_code: bool = False,
        trainable: bool = False,
        **options: Any,
    ) -> BaseGPTQForCausalLM:
        """Load a GPTQ checkpoint, ours or another tool's, as ``qquant.load_quantized`` does.

        Args:
            model_name_or_path: folder or hub id.
            device_map: as in transformers' ``from_pretrained``.
            max_memory: as in transformers' ``from_pretrained``; used with a device_map that spreads the model.
            device: one device instead; neither: "auto" where there is a GPU, else the CPU.
            torch_dtype: compute dtype; None: as config.json says, but float32 for float16 on a CPU.
            quantize_config: accepted if it says what the folder says.
            model_basename: name of the weight file without its suffix; must be the one that is there.
            use_safetensors: must be True.
            trust_remote_code: accepted; no remote code runs.
            trainable: must be False.
            **options: options that only choose kernels, which are ignored, and ``attn_implementation``,
                ``use_cache_quantization``, ``use_cache_kernel``.

        Raises:
            UsageError: an option that is not understood or contradicts the folder.
            BadModelError: see ``qquant.load_quantized``.
        """
        refuse_pickles(use_safetensors)
        if trainable:
            raise UsageError("packed weights have no gradient, got trainable=True; train the original and quantize it")
        if quantize_config is not None:
            _check_config("from_quantized", quantize_config)
        dtype = a_dtype(torch_dtype)
        local = a_path("from_quantized", model_name_or_path).expanduser().is_dir()
        passes = {"attn_implementation", "use_cache_quantization", "use_cache_kernel"}
        passed = accept("from_quantized", without_hub("from_quantized", options, local=local), passes=passes)
        folder = resolve_folder(str(model_name_or_path))
        keys = quantization_config(folder)
        said = {} if quantize_config is None else quantize_config.to_dict()
        refuse_contradictions(folder, keys, said, model_basename)
        if device is not None:
            device_map = {"": str(one_device(device, 0))}
        elif device_map is None and torch.cuda.is_available():
            device_map = "auto"
        if device_map == {"": "cpu"} or (device_map in SPREAD and not torch.cuda.is_available()):
            device_map = None  # load_quantized then also picks the CPU's dtype
        if max_memory and isinstance(device_map, str):
            passed["max_memory"] = dict(max_memory)
        model = load_quantized(folder, dtype=dtype or "auto", device_map=device_map, **passed)
        chosen = quantize_config or BaseQuantizeConfig._of(keys)
        return BaseGPTQForCausalLM(model, folder, quantized=True, quantize_config=chosen, dtype=dtype)


def _check_config(call: str, config: Any) -> None:
    if not isinstance(config, BaseQuantizeConfig):
        raise UsageError(
            f"quantize_config of {call} must be a BaseQuantizeConfig, got {type(config).__name__}; "
            "write BaseQuantizeConfig(bits=4, group_size=128)"
        )


def _report(record: ModuleRecord) -> None:
    _log.info("%s: %d bits, relative error %.3g", record.name, record.bits, record.relative_error)
