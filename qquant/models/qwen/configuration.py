"""The configuration of the original Qwen models (model type ``qwen``), with the names of their config.json.

Every field of the published files is taken, also those that their own code never read, so that a configuration survives
being read and written. Fields of the first release (August 2023) are taken under their old names. The model itself is
modeling.py.
"""

# No "from __future__ import annotations": @strict checks no type that is written as a string.

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig

from qquant.errors import BadModelError

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_channels", "intermediate_size")
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@strict
class QWenConfig(PretrainedConfig):
    """Settings of one Qwen v1 model.

    ``intermediate_size`` is, as in the published files, twice the width of the MLP. ``seq_length`` is the length that
    the model was trained at: beyond it dynamic NTK and LogN set in. ``bf16``, ``fp16`` and ``fp32`` choose the dtype
    that the model is loaded in where ``dtype`` is not given; at most one may be true, and the one set last is.
    ``use_flash_attn``, ``softmax_in_fp32``, ``scale_attn_weights``, ``onnx_safe`` and ``tokenizer_type`` are kept and
    have no effect: ``attn_implementation`` chooses the attention, and its softmax is float32 always.

    Raises:
        BadModelError: sizes that do not fit together, or two precisions at once.

    Source: config.json and the configuration class of Qwen-1.8B to 72B (2023).
    """

    model_type = "qwen"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
        "ffn_hidden_size": "intermediate_size",
        "embd_pdrop": "emb_dropout_prob",
        "attn_pdrop": "attn_dropout_prob",
    }

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    emb_dropout_prob: float | int = 0.0
    attn_dropout_prob: float | int = 0.0
    layer_norm_epsilon: float | int = 1e-6
    initializer_range: float | int = 0.02
    max_position_embeddings: int = 8192
    scale_attn_weights: bool = True
    use_cache: bool = True
    bf16: bool = False
    fp16: bool = False
    fp32: bool = False
    kv_channels: int = 128
    rotary_pct: float | int = 1.0
    rotary_emb_base: float | int = 10000
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    use_flash_attn: bool | str = "auto"
    intermediate_size: int = 22016
    no_bias: bool = True
    tie_word_embeddings: bool = False
    use_cache_quantization: bool = False
    use_cache_kernel: bool = False
    softmax_in_fp32: bool = False
    seq_length: int = 8192
    onnx_safe: bool | None = None
    tokenizer_type: str = "QWenTokenizer"
    tokenizer_class: str | None = "QWenTokenizer"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check what the model depends on."""
        padded = kwargs.pop("padded_vocab_size", None)
        if padded is not None:  # the first release named the rows of wte so, and beside it the ids in use
            self.vocab_size = padded
        if self.tokenizer_class is None:  # without a name, AutoTokenizer would look for code in the folder
            self.tokenizer_class = "QWenTokenizer"
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self._check_numbers()
        if self.kv_channels * self.num_attention_heads != self.hidden_size:
            raise BadModelError(
                f"kv_channels * num_attention_heads must be hidden_size in a qwen model, got {self.kv_channels} * "
                f"{self.num_attention_heads} and {self.hidden_size}; take config.json from the checkpoint's own source"
            )
        if self.intermediate_size % 2:
            raise BadModelError(
                f"intermediate_size must be even, twice the width of a qwen model's MLP, got {self.intermediate_size}"
            )
        whole = math.isfinite(self.rotary_pct)
        if not whole or not 0 < self.rotary_dim <= self.kv_channels or self.rotary_dim % 2 or self.rotary_dim == 2:
            raise BadModelError(
                f"rotary_pct must leave an even number of at least 4 of the {self.kv_channels} channels, got "
                f"{self.rotary_pct}"
            )
        if self.seq_length < 2:
            raise BadModelError(f"seq_length must be the length of training, at least 2, got {self.seq_length}")
        _ = self.precision

    def __setattr__(self, key: str, value: Any) -> None:
        """Set a field; a precision set to true after the file was read takes the place of the file's."""
        if key in _PRECISIONS and value is True and "eos_token_id" in vars(self):  # the last field: the file is read
            for other in _PRECISIONS:
                super().__setattr__(other, False)  # type: ignore[no-untyped-call]
        super().__setattr__(key, value)  # type: ignore[no-untyped-call]

    def _check_numbers(self) -> None:
        """Refuse what the formulas cannot take, under its name."""
        rules: dict[str, tuple[str, Callable[[float], bool]]] = {
            **dict.fromkeys(_SIZES, ("of at least 1", lambda x: x >= 1)),
            "layer_norm_epsilon": ("above 0", lambda x: x > 0),
            "rotary_emb_base": ("above 1", lambda x: x > 1),
            "initializer_range": ("at least 0", lambda x: x >= 0),
            "emb_dropout_prob": ("from 0 up to, not with, 1", lambda x: 0 <= x < 1),
            "attn_dropout_prob": ("from 0 up to, not with, 1", lambda x: 0 <= x < 1),
        }
        for name, (rule, holds) in rules.items():
            value = getattr(self, name)
            if not math.isfinite(value) or not holds(value):
                raise BadModelError(f"{name} of a qwen model must be a number {rule}, got {value}")

    @property
    def precision(self) -> torch.dtype | None:
        """The dtype that ``bf16``, ``fp16`` or ``fp32`` asks for; None where none is true.

        Raises:
            BadModelError: more than one is.
        """
        named = [name for name in _PRECISIONS if getattr(self, name)]
        if len(named) > 1:
            raise BadModelError(
                f"at most one of bf16, fp16 and fp32 may be true, got {' and '.join(named)}, from config.json and the "
                "arguments together; set the others to False, or give dtype, which comes before all of them"
            )
        return _PRECISIONS[named[0]] if named else None

    @property
    def head_dim(self) -> int:
        """Channels of a head, under the name that caches ask for."""
        return self.kv_channels

    @property
    def num_key_value_heads(self) -> int:
        """As many as query heads: Qwen v1 shares none."""
        return self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that turn with the position; the rest passes through."""
        return int(self.kv_channels * self.rotary_pct)
