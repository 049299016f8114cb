"""A model whose decisions hang on what it reads, made on the spot; small trained ones say one letter every time."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from qquant.models.qwen.tokenization import SMALL_VOCABULARY
from tests.make_qwen_v1 import make_qwen_v1

HIDDEN = 64
SHARPNESS = 4
"""Factor on the projections of attention. Random ones look at all tokens alike, so that every prompt of a task, which
all end in the same words, would be answered alike; with this one a few tokens decide (4 letters on 20 MMLU items)."""


def make_sharp_qwen_v1(folder: Path, *, window_tokens: int) -> Path:
    """Write an original Qwen with random weights, its own tokenizer, which has no end-of-text token, and no penalties.

    Args:
        folder: where to.
        window_tokens: longest sequence; up to there neither NTK nor LogN changes anything.
    """
    make_qwen_v1(
        folder,
        chat=False,
        vocabulary=SMALL_VOCABULARY,
        vocab_size=4352,  # of all tokens, 4301; the published 151936 rows would only cost memory
        hidden_size=HIDDEN,
        num_attention_heads=4,
        intermediate_size=3 * HIDDEN,
        max_position_embeddings=window_tokens,
        seq_length=window_tokens,
    )
    weights = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    for name in tensors:
        if name.endswith(("attn.c_attn.weight", "attn.c_proj.weight")):
            tensors[name] *= SHARPNESS
    weights.unlink()
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder
