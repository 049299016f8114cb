"""A model's folder as it came: where it is, its configuration, its skeleton without weights, its tokenizer.

Nothing in it is trusted and no code that lies in it is run: its files are looked at here before transformers sees them.
Reading its tensors is shards.py, going through its blocks sources.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from qquant.adapter_settings import CONFIG_NAME as ADAPTER_CONFIG
from qquant.code_keys import check_code
from qquant.errors import BadModelError, out_of_memory
from qquant.json_files import read_json, write_json
from qquant.models.qwen.modeling import register_qwen
from qquant.shards import DTYPES, INDEX_NAME, CheckpointReader, weight_files
from qquant.text_sources import at_home, one_line

register_qwen()  # a folder of this type is read here, whoever asks for it

_SETTINGS = ("generation_config.json", "tokenizer_config.json", "quantize_config.json")
"""Objects beside config.json whose keys transformers or we follow."""
_READ = ("*.json", "*.jinja", "*.txt", "*.tiktoken", "tokenizer.model*", "additional_chat_templates/*")
"""What transformers may open of a folder, weights aside."""
_LARGEST_READ = 512 * 2**20  # bytes; the largest vocabularies have 40 MB
_SIZES = ("hidden_size", "n_embd", "intermediate_size", "ffn_hidden_size", "vocab_size", "padded_vocab_size")
_HEADS = (("num_attention_heads", "head_dim"), ("n_head", "kv_channels"))
_SPARE = 64
"""The largest matrix of a configuration may have so many elements per byte of the weights: far more than any can."""
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
    ValueError, LookupError, OSError, TypeError, AttributeError, RuntimeError, ArithmeticError, ImportError,
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
        BadModelError: no such folder, a config.json that no model known here can follow, files that name code (see
            ``code_keys.ignoring_code``) or are none, or an adapter beside it.
    """
    if not folder.is_dir():
        raise BadModelError(f"a model must be a local folder, and {folder} is none; download the model first")
    if not (folder / "config.json").exists():
        raise BadModelError(f"a model folder must hold config.json, {folder} does not")
    # transformers loads such an adapter if peft is installed, and leaves it out if not.
    if (folder / ADAPTER_CONFIG).exists():
        raise BadModelError(
            f"a model must lie in a folder without an adapter, {folder} also holds {ADAPTER_CONFIG}; move the adapter "
            "into a folder of its own, and quantize with --adapter to merge it"
        )
    found, content = check_folder(folder)
    _check_config(folder, content)
    try:
        with _config_without(found, content, folder) as place:
            config: PretrainedConfig = AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except BUILD_ERRORS as error:
        raise BadModelError(
            f"the model in {folder} cannot be built by the installed transformers: {one_line(error)}"
        ) from error
    config.name_or_path = str(folder)
    return config


def check_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Refuse what must not reach transformers: files that are none or too large, damaged settings, keys that name code.

    Returns:
        config.json as it is, and without what names code; both empty where there is none.

    Raises:
        BadModelError: naming the file, and the key if it is one.
    """
    for path in (path for pattern in _READ for path in folder.glob(pattern)):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise BadModelError(f"files of a model must be files, and {path} is a pipe or a device; remove it")
        if path.is_file() and path.stat().st_size > _LARGEST_READ:
            raise BadModelError(
                f"a file beside the weights must have at most {_LARGEST_READ >> 20} MiB, {path} has more; remove it"
            )
    found = _config(folder)
    kind = found.get("model_type")
    content = check_code(found, f"config.json of {folder}", model_type=kind)
    for name in _SETTINGS:
        if (folder / name).exists():
            check_code(read_json(folder / name), f"{name} of {folder}", model_type=kind)
    return found, content


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    except BadModelError as error:
        raise BadModelError(f"the model in {folder} cannot be built: {error}") from error


@contextmanager
def _config_without(found: dict[str, Any], content: dict[str, Any], folder: Path) -> Iterator[Path]:
    """A folder whose config.json has this content: the model's own if that is so."""
    if content == found:
        yield folder
        return
    with TemporaryDirectory(prefix="qquant-config-") as name:
        write_json(Path(name) / "config.json", content)
        yield Path(name)


def _check_config(folder: Path, content: dict[str, Any]) -> None:
    """Refuse values that transformers takes: blocks that would be built for ever, a dtype that nothing computes in."""
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
        sizes: list[Any] = [part.get(key) for key in _SIZES]
        pairs: list[list[Any]] = [[part.get(key) for key in keys] for keys in _HEADS]
        sizes += [math.prod(pair) for pair in pairs if _whole(*pair)]
        largest = math.prod(sorted(size for size in sizes if _whole(size))[-2:])
        stored_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
        if stored_bytes and largest > _SPARE * stored_bytes + 2**24:  # built first, in memory, and then compared
            raise BadModelError(
                f"every matrix must be stored, config.json of {folder} asks for one of {repr(largest)[:20]} elements "
                f"and {stored_bytes} bytes are there; config.json belongs to another model"
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


def _whole(*sizes: Any) -> bool:
    return all(type(size) is int and size > 0 for size in sizes)


def name_weights(config: PretrainedConfig, folder: Path) -> PretrainedConfig:
    """Have transformers read the weight files that were checked here, and no others; changes and returns ``config``.

    AutoGPTQ's gptq_model-4bit-128g.safetensors is found so, too.
    """
    files = weight_files(folder)
    config.transformers_weights = INDEX_NAME if (folder / INDEX_NAME).exists() else files[0].name
    return config


def skeleton(config: PretrainedConfig, folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a configuration on the meta device, in eval mode; raises BadModelError if there is none."""
    try:
        with init_empty_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except BUILD_ERRORS as error:
        if out_of_memory(error):  # no fault of the model
            raise
        raise BadModelError(
            f"no causal language model can be built from config.json of {folder}: {one_line(error)}"
        ) from error
    model.eval()
    return model


def check_plain(stored: CheckpointReader) -> None:
    """Refuse by name what transformers refuses without one, or casts: tensors of another shape or kind."""
    wanted = skeleton(read_config(stored.folder), stored.folder).state_dict()
    for name, tensor in wanted.items():
        spec = stored.entries[name].spec if name in stored.entries else None
        kind = "floating" if tensor.is_floating_point() else "whole"
        if spec and (spec.shape != tuple(tensor.shape) or DTYPES[spec.dtype].is_floating_point != (kind == "floating")):
            raise BadModelError(
                f"{name} must hold {kind} numbers of shape {list(tensor.shape)} by config.json, {stored.folder} holds "
                f"{spec.dtype} {list(spec.shape)}"
            )


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; raises BadModelError if there is none or it needs code, and as ``check_folder`` does."""
    # Without any of these transformers makes up a tokenizer with an empty vocabulary and says nothing.
    if not any(any(folder.glob(pattern)) for pattern in VOCABULARIES):
        raise BadModelError(f"{folder} holds no tokenizer ({', '.join(VOCABULARIES)}); copy it from the original")
    check_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BUILD_ERRORS as error:
        raise BadModelError(f"the tokenizer in {folder} cannot be loaded: {one_line(error)}") from error
