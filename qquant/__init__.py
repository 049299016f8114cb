"""qquant: GPTQ Int4/Int8 weights and an Int8 KV cache for Qwen-family and Llama-like models, with proof of the cost.

This is the lazy face: it names the public API and imports each piece on first use, so that ``import qquant`` and
``qquant --help`` stay fast and ``python -m qquant.gptq`` never finds its module imported already.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qquant.calibrate import Sample as Sample
    from qquant.calibrate import load_samples as load_samples
    from qquant.checkpoint import load_quantized as load_quantized
    from qquant.code_keys import ignoring_code as ignoring_code
    from qquant.config import QuantizeConfig as QuantizeConfig
    from qquant.errors import QquantError as QquantError
    from qquant.hf_plugin import register as register
    from qquant.kv_cache_quant import Int8KVCache as Int8KVCache
    from qquant.kv_cache_quant import dequantize_cache_torch as dequantize_cache_torch
    from qquant.kv_cache_quant import disable_kv_quant as disable_kv_quant
    from qquant.kv_cache_quant import enable_kv_quant as enable_kv_quant
    from qquant.kv_cache_quant import quantize_cache_v as quantize_cache_v
    from qquant.quantizing import quantize_checkpoint as quantize_checkpoint
    from qquant.quantizing import quantize_model as quantize_model
    from qquant.verification import verify_checkpoint as verify_checkpoint

__version__ = "0.1.0"

_HOME = {
    "Int8KVCache": "qquant.kv_cache_quant",
    "QquantError": "qquant.errors",
    "QuantizeConfig": "qquant.config",
    "Sample": "qquant.calibrate",
    "dequantize_cache_torch": "qquant.kv_cache_quant",
    "disable_kv_quant": "qquant.kv_cache_quant",
    "enable_kv_quant": "qquant.kv_cache_quant",
    "ignoring_code": "qquant.code_keys",
    "load_quantized": "qquant.checkpoint",
    "load_samples": "qquant.calibrate",
    "quantize_cache_v": "qquant.kv_cache_quant",
    "quantize_checkpoint": "qquant.quantizing",
    "quantize_model": "qquant.quantizing",
    "register": "qquant.hf_plugin",
    "verify_checkpoint": "qquant.verification",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qquant' has no attribute {name!r}; it offers {sorted(_HOME)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
