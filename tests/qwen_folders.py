"""Tiny folders of the original Qwen: random plain ones, and packed ones as Int4 and Int8 were published.

Imported by tests only. The packed layout is written and read here straight from its description, without packing.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from qquant.models.qwen.configuration import QWenConfig
from qquant.models.qwen.modeling import QWenLMHeadModel
from qquant.shards import SINGLE_NAME
from tests.make_qwen_v1 import PUBLISHED
from tests.weight_files import write_shards

SEQ_LENGTH = 16
LONG = 40
"""Tokens of a prompt that dynamic NTK rotates with an alpha of 7 and LogN sharpens."""
HEADS, DIM = 4, 16
GROUP = 32
HIDDEN, WIDTH, VOCAB, LAYERS = 64, 128, 320, 2
SHAPES = {
    "attn.c_attn": (3 * HIDDEN, HIDDEN),
    "attn.c_proj": (HIDDEN, HIDDEN),
    "mlp.w1": (WIDTH, HIDDEN),
    "mlp.w2": (WIDTH, HIDDEN),
    "mlp.c_proj": (HIDDEN, WIDTH),
}
"""[out, in] of what is packed in a block, in the order in which data meets it."""
PACKED = [f"transformer.h.{index}.{name}" for index in range(LAYERS) for name in SHAPES]
"""Full names of what is packed."""
KEPT = [
    "lm_head.weight",
    "transformer.ln_f.weight",
    "transformer.wte.weight",
    *(f"transformer.h.{index}.{name}" for index in range(LAYERS) for name in ("ln_1.weight", "ln_2.weight")),
    *(f"transformer.h.{index}.attn.c_attn.bias" for index in range(LAYERS)),
]
"""Full names of what is not."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "kv_channels": DIM,
    "intermediate_size": 2 * WIDTH,
    "seq_length": SEQ_LENGTH,
}

IDS = torch.randint(0, 300, (1, LONG), generator=torch.Generator().manual_seed(5))


def make_qwen(folder: Path, **changes: Any) -> Path:
    """A tiny random v1 checkpoint with biases, and keys with a channel far from zero, as the real ones have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = QWenLMHeadModel(QWenConfig(**SIZES | changes))
        for name, parameter in model.named_parameters():
            # Several times the usual spread, so that attention is not flat and a wrong key shows.
            spread = 0.15 if "attn.c_attn.weight" in name else 0.1
            parameter.data.add_(spread * torch.randn_like(parameter))
        for block in model.transformer.h:
            block.attn.c_attn.bias.data[model.config.hidden_size + 5] = 8.0
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """Of more tokens than the training length, so that NTK and LogN take part."""
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def with_weights(plain: Path, tensors: dict[str, Tensor]) -> Any:
    """The plain model with some of its tensors replaced."""
    model = QWenLMHeadModel.from_pretrained(plain, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert len(missing) + len(tensors) == len(model.state_dict())
    return model


def unpacked(tensors: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """[out, in] float32 weight of stored tensors, straight from the format's description."""
    mask, per = 2**bits - 1, 32 // bits
    words, zeros = (tensors[f"{name}.{part}"].numpy().view(np.uint32) for part in ("qweight", "qzeros"))
    shifts = np.arange(per, dtype=np.uint32) * np.uint32(bits)
    codes = ((words[:, None, :] >> shifts[None, :, None]) & mask).reshape(-1, words.shape[1]).astype(np.float32)
    level = ((zeros[:, :, None] >> shifts) & mask).reshape(zeros.shape[0], -1).astype(np.float32) + 1
    scales, group = tensors[f"{name}.scales"].float().numpy(), tensors[f"{name}.g_idx"].numpy()
    return torch.from_numpy(np.ascontiguousarray((scales[group] * (codes - level[group])).T))


def in_words(values: NDArray[np.uint32], bits: int) -> Tensor:
    """Numbers [n, 32 / bits] as int32 words [n], the first in the lowest bits."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    return torch.from_numpy(np.bitwise_or.reduce(values << shifts, axis=-1).astype(np.uint32).view(np.int32).copy())


PACKED_CONFIG = PUBLISHED | SIZES | {"fp16": True, "torch_dtype": "float16"}
"""config.json as the Int4 folders have it, but for the sizes."""


def publish(folder: Path, plain: Path, bits: int, *, keys_in: str = "config", shards: int = 1) -> Tensor:
    """Write random codes as an official Int4 or Int8 folder holds them; returns the logits of the plain model.

    Args:
        folder: made.
        plain: gives the embeddings and norms.
        bits: 4 or 8.
        keys_in: the quantization keys are in "config", "beside" it in quantize_config.json, or in "both".
        shards: of the weights.
    """
    folder.mkdir()
    draw = np.random.default_rng(0)
    original = {name: tensor.half() for name, tensor in load_file(plain / SINGLE_NAME).items()}
    stored = {name: original[name] for name in KEPT}
    dense = {name: tensor.float() for name, tensor in stored.items()}
    for name in PACKED:
        columns, rows = SHAPES[name.split(".", 3)[3]]
        codes = draw.integers(0, 2**bits, (rows, columns), dtype=np.uint32)
        scales = ((draw.random((rows // GROUP, columns)) + 0.5) * 0.2 / 2**bits).astype(np.float16)
        group = np.arange(rows) // GROUP
        middle = 2 ** (bits - 1)
        dense[f"{name}.weight"] = torch.from_numpy(
            scales[group].astype(np.float32) * (codes.astype(np.float32) - middle)
        ).T
        stored[f"{name}.qweight"] = in_words(codes.reshape(-1, 32 // bits, columns).transpose(0, 2, 1), bits)
        zeros = np.full((rows // GROUP, columns * bits // 32, 32 // bits), middle - 1, np.uint32)
        stored[f"{name}.qzeros"] = in_words(zeros, bits)
        stored[f"{name}.scales"] = torch.from_numpy(scales)
        stored[f"{name}.g_idx"] = torch.from_numpy(group.astype(np.int32))
        stored.setdefault(f"{name}.bias", torch.zeros(columns, dtype=torch.float16))
    write_shards(folder, stored, shards)
    keys = {
        "bits": bits,
        "group_size": GROUP,
        "damp_percent": 0.01,
        "desc_act": False,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
    }
    config = dict(PACKED_CONFIG)
    if keys_in != "beside":
        config["quantization_config"] = {**keys, "quant_method": "gptq", "disable_exllama": True}
    if keys_in != "config":
        (folder / "quantize_config.json").write_text(json.dumps(keys))
    (folder / "config.json").write_text(json.dumps(config))
    return logits(with_weights(plain, {name: tensor.contiguous() for name, tensor in dense.items()}))
