"""A model's folder as it came: where it is, its configuration, its skeleton without weights, its tokenizer.

Nothing in it is trusted and no code that lies in it is run. Reading its tensors is shards.py, going through its blocks
sources.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from qquant.adapter_settings import CONFIG_NAME as ADAPTER_CONFIG
from qquant.errors import BadModelError
from qquant.json_files import read_json
from qquant.models.qwen.modeling import register_qwen
from qquant.shards import CheckpointReader
from qquant.text_sources import at_home, one_line

register_qwen()  # a folder of this type is read here, whoever asks for it

_MANY_BLOCKS = 200  # more than known models have; fewer are built in seconds, then compared with what is stored
QWEN_CODE = (
    "configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py", "qwen_generation_utils.py", "cpp_kernels.py",
    "cache_autogptq_cuda_256.cpp", "cache_autogptq_cuda_kernel_256.cu",
)  # fmt: skip
"""Code that lies beside an original Qwen (v1) model. It is never run here; other readers of that format ask for it."""
_FETCHED = [
    "*.safetensors", "*.json", "*.txt", "*.tiktoken", "*.jinja", "tokenizer.model", "LICENSE", "LICENSE.md", "NOTICE",
    "NOTICE.md", *QWEN_CODE,
]  # fmt: skip
VOCABULARIES = ("tokenizer.json", "tokenizer.model*", "*.tiktoken", "vocab.json", "vocab.txt")
"""Files that hold a tokenizer's vocabulary; a folder without any of them has no tokenizer."""
# What transformers and torch raise when a configuration or tokenizer file makes no sense.
BUILD_ERRORS = (
    ValueError, KeyError, OSError, TypeError, AttributeError, RuntimeError, ArithmeticError, ImportError,
    AssertionError, StrictDataclassError,
)  # fmt: skip


def resolve_folder(name: str) -> Path:
    """A local model folder, or the local copy of a hub model ``owner/name`` (fetched if the hub can be reached).

    Raises:
        BadModelError: neither.
    """
    folder = at_home(name, BadModelError)
    if name and folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise BadModelError(f"a model must be a folder or a hub id owner/name, and {name!r} is neither")
    try:
        return Path(snapshot_download(name, allow_patterns=_FETCHED))
    except (OSError, ValueError) as error:  # the hub client's errors derive from these two
        raise BadModelError(f"{name} is no local folder, and the hub did not give it: {one_line(error)}") from error


def read_config(folder: Path) -> PretrainedConfig:
    """The model's configuration; a local folder only, and never with remote code.

    Raises:
        BadModelError: no such folder, a config.json that no model known here can follow, or an adapter beside it.
    """
    if not folder.is_dir():
        raise BadModelError(f"a model must be a local folder, and {folder} is none; download the model first")
    if not (folder / "config.json").is_file():
        raise BadModelError(f"a model folder must hold config.json, {folder} does not")
    # transformers loads such an adapter if peft is installed, and leaves it out if not.
    if (folder / ADAPTER_CONFIG).exists():
        raise BadModelError(
            f"a model must lie in a folder without an adapter, {folder} also holds {ADAPTER_CONFIG}; move the adapter "
            "into a folder of its own, and quantize with --adapter to merge it"
        )
    _check_config(folder)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BUILD_ERRORS as error:
        raise BadModelError(
            f"the model in {folder} cannot be built by the installed transformers: {one_line(error)}"
        ) from error
    return config


def _check_config(folder: Path) -> None:
    """Refuse values that transformers takes: blocks that would be built for ever, a dtype that nothing computes in."""
    try:
        content = read_json(folder / "config.json")
    except BadModelError:
        return  # transformers says the same of it, and more
    inner = content.get("text_config")
    for part in (content, inner if isinstance(inner, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            name = part.get(key)
            dtype = getattr(torch, name, None) if isinstance(name, str) else None
            if isinstance(name, dict | None) or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                continue  # an object has one for each part of a model
            raise BadModelError(
                f"{key} in config.json of {folder} must name a floating dtype, got {repr(name)[:40]}; "
                "write float32, bfloat16 or float16"
            )
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            count = part.get(key)
            if not isinstance(count, int | float) or count <= _MANY_BLOCKS:
                continue
            if count > (stored := len(CheckpointReader(folder).entries)):
                raise BadModelError(
                    f"every block must have tensors, {key} in config.json of {folder} asks for {repr(count)[:20]} "
                    f"blocks and {stored} tensors are stored; config.json belongs to another model"
                )


def skeleton(config: PretrainedConfig, folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a configuration on the meta device, in eval mode; raises BadModelError if there is none."""
    try:
        with init_empty_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except BUILD_ERRORS as error:
        raise BadModelError(
            f"no causal language model can be built from config.json of {folder}: {one_line(error)}"
        ) from error
    model.eval()
    return model


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; raises BadModelError if there is none or it needs code of its own."""
    # Without any of these transformers makes up a tokenizer with an empty vocabulary and says nothing.
    if not any(any(folder.glob(pattern)) for pattern in VOCABULARIES):
        raise BadModelError(f"{folder} holds no tokenizer ({', '.join(VOCABULARIES)}); copy it from the original")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BUILD_ERRORS as error:
        raise BadModelError(f"the tokenizer in {folder} cannot be loaded: {one_line(error)}") from error
