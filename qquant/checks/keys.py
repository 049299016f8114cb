"""The keys of a checkpoint: what the quantization keys say and to whom, and keys that name code to run.

Whether tensors fit them is names.py's to see.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qquant.checkpoint import quantization_config
from qquant.checks.findings import Finding, problem, warning
from qquant.checks.side_text import content_of, values_of
from qquant.code_keys import QWEN, check_code, ignoring_code, names_code
from qquant.errors import BadModelError
from qquant.gptq_keys import GptqFileConfig
from qquant.json_files import read_json

_SAME = ("quant_method", "pack_dtype", "lm_head", "modules_in_block_to_quantize", "static_groups")
"""Keys on which the two files must agree, besides those that loading compares."""
_FAST_GROUPS = (-1, 32, 64, 128)
_BESIDE = "quantize_config.json"


def check_keys(folder: Path, packed: list[str]) -> tuple[GptqFileConfig | None, list[Finding]]:
    """Read and judge the quantization keys.

    Args:
        folder: the checkpoint's.
        packed: full names of linears that are stored packed.

    Returns:
        What they mean, None if there are none or they make no sense; and the findings.
    """
    main = read_json(folder / "config.json").get("quantization_config")
    side = read_json(folder / _BESIDE) if (folder / _BESIDE).is_file() else None
    if main is None and side is None:
        if packed:
            text = f"{len(packed)} linears are stored packed and no key says so; get config.json again"
            return None, [problem("keys", "quantization_config", text)]
        return None, [warning("keys", "quantization_config", "the checkpoint is not quantized")]
    try:
        keys = quantization_config(folder)
        settings = GptqFileConfig.from_dict(keys)
    except BadModelError as error:
        return None, [problem("keys", "quantization_config", str(error))]
    findings = []
    if main is None:
        text = f"stands only in {_BESIDE}, and transformers, which does not read it, makes random weights; copy it"
        findings.append(warning("keys", "quantization_config", text))
    elif side is not None:
        for key in _SAME:
            if key in main and key in side and main[key] != side[key]:
                text = f"config.json and {_BESIDE} must agree on it; remove the one that does not belong"
                findings.append(problem("keys", key, text))
    findings += _readers(settings, keys, packed)
    return settings, findings


def check_code_keys(folder: Path, model_type: object) -> Iterator[Finding]:
    """Keys of any settings file that name code, another repository, or other files than those that were looked at."""
    for path in sorted(folder.glob("*config*.json")):
        content = content_of(path)
        try:
            with ignoring_code():
                check_code(content, path.name, model_type=model_type)
        except BadModelError as error:
            yield problem("code", path.name, str(error))
        for key, value in values_of(content, all_values=True):
            leaf = key.rpartition(".")[2]
            if not names_code(leaf, value):
                continue
            if leaf == "auto_map" and model_type == QWEN and _own_classes(value):
                text = "is a part of the original Qwen's format; qquant never follows it, trust_remote_code does"
                yield warning("code", f"{path.name}: {key}", text)
            else:
                text = "names code to run, which a sound checkpoint does not need; remove the key"
                yield problem("code", f"{path.name}: {key}", text)


def _readers(settings: GptqFileConfig, keys: dict[str, Any], packed: list[str]) -> Iterator[Finding]:
    """What is sound, and some readers refuse or run slowly."""
    if (settings.keys.get("lm_head") is True) != ("lm_head" in packed):
        if "lm_head" in packed:
            text = "lm_head is stored packed, and the key does not say true; GPTQModel then looks for a plain one"
        else:
            text = "says that lm_head is packed, and it is not; set it to false"
        yield problem("keys", "lm_head", text)
    elif "lm_head" in packed:
        yield warning("keys", "lm_head", "is packed, and transformers ignores that and makes a random one")
    chosen = {name: settings.for_module(name) for name in packed}
    if settings.version == 1 and not all(one.sym for one in chosen.values()) and not _names_writer(keys):
        text = 'GPTQModel refuses asymmetric v1 zeros unless "gptqmodel:0.9.0" or later is named there'
        yield warning("keys", "meta.quantizer", text)
    for size in sorted({one.group_size for one in chosen.values()} - {*_FAST_GROUPS}):
        yield warning("keys", "group_size", f"{size}: fast kernels of other readers (Marlin) take -1, 32, 64 or 128")
    if len({(one.bits, one.group_size, one.sym) for one in chosen.values()}) > 1:
        yield warning(
            "keys", "dynamic", "modules differ in their settings, which transformers with optimum cannot read"
        )


def _names_writer(keys: dict[str, Any]) -> bool:
    meta = keys.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, dict) else None
    named = [writers] if isinstance(writers, str) else writers if isinstance(writers, list) else []
    versions = (re.fullmatch(r"gptqmodel:(\d{1,9})\.(\d{1,9}).*", str(writer)) for writer in named)
    return any(found and (int(found[1]), int(found[2])) >= (0, 9) for found in versions)


def _own_classes(auto_map: Any) -> bool:
    """Whether every entry is simply ``module.Class``, and none of another repository."""
    entries = [name for value in auto_map.values() for name in (value if isinstance(value, list) else [value])]
    return all(name is None or re.fullmatch(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", str(name)) for name in entries)
