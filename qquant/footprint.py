"""What a model takes in memory, as plain arithmetic over its shapes: weights, cache, and the peak of a generation.

Every term is derived from code that is named beside it; the few constants that were measured instead say how. Nothing
here builds a model, touches a tensor or asks a device. Shapes come from shapes.py; what is asked for, and how it is
judged against a card, is planning.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from qquant.errors import UsageError
from qquant.linear_kernels import Implementation, Place, steps_of
from qquant.plan_report import Runtime
from qquant.records import Footprint, KVKind, Precision
from qquant.stored_bytes import BITS as BITS
from qquant.stored_bytes import ELEMENT_BYTES as ELEMENT_BYTES
from qquant.stored_bytes import RESERVE_AHEAD, held_bytes, layer_bytes
from qquant.stored_bytes import CacheShape as CacheShape
from qquant.stored_bytes import LinearShape as LinearShape
from qquant.stored_bytes import ModelShapes as ModelShapes
from qquant.stored_bytes import weights_bytes as weights_bytes

CPU_PROMPT_BYTES, CPU_STEP_BYTES = 16_000_000, 4_000_000
"""What a CPU process holds beside tensors once the prompt has passed, and what the first decoding step adds: code of
torch and oneDNN that is paged in when it first runs, compiled kernels, stacks of threads. These seven were measured,
not derived: resident set less model, cache and activations of the reference model, 11 MB, in the cells of docs/plan.md
(torch 2.13, one thread). Beside a model of 500 MB they are less than 5 %."""
CPU_KERNELS_BYTES, CPU_KERNELS_STEP_BYTES = 11_500_000, 500_000
"""The same for packed linears in bfloat16, whose products and norms are our own."""
CPU_PRODUCT_BYTES = 5_000_000
"""On top of those two for oneDNN, which such a model needs once its output projection goes to torch."""
CPU_CACHE_BYTES = 3_000_000
"""On top of all of these for the Int8 cache's operators."""
CPU_FLOAT32_BYTES = 8_000_000
"""Instead of all but that for a model that computes in float32, packed or not: torch does not need oneDNN for it."""
CUBLAS_WORKSPACE_BYTES = 32 * 2**20
"""What torch reserves for cuBLAS on its first product on compute capability 9.0; 8.1 MiB on older cards."""
CUDA_CONTEXT_BYTES = 2**29
"""What a CUDA process takes on a card outside torch's allocator: context and loaded kernels. Read off nvidia-smi, about
0.5 GiB with torch 2; not part of any peak here."""
PLACES = {
    "cpu": Place("cpu", "avx512_bf16", "avx512", ""),
    "cuda": Place("cuda", "sm_80", "sm_80", ""),
}
"""Where runs are predicted for, as the table of linear_kernels.py names places: our kernels are built."""
DENSE_KERNEL_TOKENS = 8
"""Tokens up to which the output projection of a packed model needs no product of torch: dense_linear.MAX_TOKENS."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

KV_TABLES_REST_BYTES = 6 * 2**30 // 10
"""Fitted, origin unknown: the median of what Qwen's two KV cache tables show beyond weights and two caches, 0.6 GiB.
For those tables alone; no other prediction contains it."""


def cache_bytes(shapes: ModelShapes, kv_cache: KVKind, *, batch: int, prompt_tokens: int, new_tokens: int) -> int:
    """Bytes that the KV cache holds after ``new_tokens``, room ahead included; the newest token is never stored.

    ``int8`` is our cache, ``int4`` ours with values in 4 bits (keys stay at 8); any other is transformers' own, which
    holds what it needs and not a byte more.
    """
    return sum(sum(layer_bytes(layer, kv_cache, batch, prompt_tokens, new_tokens)) for layer in shapes.caches)


def footprint(
    shapes: ModelShapes,
    *,
    precision: Precision,
    kv_cache: KVKind,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    device: Literal["cpu", "cuda"],
    runtime: Runtime = "qquant",
    group_size: int = 128,
    compute_dtype: KVKind = "bf16",
) -> Footprint:
    """Predict the peak of one generation, beyond what the process held before the model was made.

    The peak is the largest of a few moments: the widest point of the prompt's pass through the last block, the output
    projection behind it, and the last decoding step. On a card it is what torch's allocator hands out; its context
    (``CUDA_CONTEXT_BYTES``) comes on top.

    Args:
        shapes: of the model.
        precision: of the blocks' linears.
        kv_cache: of keys and values; see ``cache_bytes``.
        batch: sequences generated together, all of one length.
        prompt_tokens: per sequence.
        new_tokens: per sequence, at least 1.
        device: where it runs, see ``PLACES``.
        runtime: ours, or the original code of 2023 on a card.
        group_size: of packed linears.
        compute_dtype: of activations and of whatever is not packed.

    Returns:
        The parts and the peak, in bytes. ``activations_bytes`` is what the peak holds beside the other three.

    Raises:
        UsageError: no formula for this precision, or a count below 1.
    """
    for name, count in (("batch", batch), ("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        if count < 1:
            raise UsageError(f"{name} must be at least 1, got {count}")
    run = _Run(shapes, precision, kv_cache, batch, prompt_tokens, new_tokens, device, group_size, compute_dtype)
    if runtime == "qwen-2023":
        return _footprint_2023(run)
    return run.footprint()


@dataclass(frozen=True)
class _Run:
    """One generation, with the bytes of its moments."""

    shapes: ModelShapes
    precision: Precision
    kv_cache: KVKind
    batch: int
    prompt_tokens: int
    new_tokens: int
    device: Literal["cpu", "cuda"]
    group_size: int
    compute_dtype: KVKind

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return ELEMENT_BYTES[self.compute_dtype]

    def footprint(self) -> Footprint:
        weights = held_bytes(self.shapes, self.precision, group_size=self.group_size, element_bytes=self.element)
        first, last = self._cache(1), self._cache(self.new_tokens)
        passing, projecting, stepping = self._code()
        # (cache, activations, code) at each moment that can be the peak.
        found = [(first, self._prompt(), passing), (first, self._head(), projecting)]
        if self.new_tokens > 1:
            found.append((last, self._decoding(), stepping))
        cache, activations, overhead = max(found, key=sum)
        return Footprint(
            weights_bytes=weights,
            cache_bytes=cache,
            activations_bytes=activations,
            overhead_bytes=overhead,
            peak_bytes=weights + cache + activations + overhead,
        )

    def _code(self) -> tuple[int, int, int]:
        """What is neither weights nor cache nor activations, at the three moments: code on a CPU, cuBLAS's on a card.

        What was paged in stays.
        """
        if self.device == "cuda":
            return (CUBLAS_WORKSPACE_BYTES,) * 3
        beside = CPU_CACHE_BYTES if self.kv_cache in BITS else 0
        if self.element == 4:
            return (CPU_FLOAT32_BYTES + beside,) * 3
        if not self._our_kernels():
            code = CPU_PROMPT_BYTES + beside
            return code, code, code + CPU_STEP_BYTES
        code = CPU_KERNELS_BYTES + beside
        projecting = code + (CPU_PRODUCT_BYTES if self.batch > DENSE_KERNEL_TOKENS else 0)
        return code, projecting, projecting + CPU_KERNELS_STEP_BYTES

    def _our_kernels(self) -> bool:
        """Whether model_kernels.py also replaces norms, decoding attention and output projection."""
        return self.precision in BITS and self.device == "cpu" and self.compute_dtype == "bf16"

    def _cache(self, new_tokens: int) -> int:
        reserve = self.prompt_tokens + self.new_tokens - 1
        sizes = self.batch, self.prompt_tokens, new_tokens
        return sum(sum(layer_bytes(layer, self.kv_cache, *sizes, reserve)) for layer in self.shapes.caches)

    def _prompt(self) -> int:
        """The widest point of the prompt's pass through the last block, in terms of tensors [rows, width].

        Alive throughout: the embeddings (the model's own variable) and the block's input (its caller's argument).
        """
        shapes, rows = self.shapes, self.batch * self.prompt_tokens
        hidden, queries = shapes.hidden, shapes.query_width
        keys = max(layer.heads * layer.key_dim for layer in shapes.caches)
        values = max(layer.heads * layer.value_dim for layer in shapes.caches)
        inner = max(linear.inputs for linear in shapes.linears)
        attending = 3 * hidden + queries + keys + values  # with the normed input
        single = 4 // self.element  # a float32 copy, in elements of the compute dtype
        widths = [
            # apply_rotary_pos_emb: product, rotated half and its product beside what there is; keys after queries.
            attending + max(3 * queries, queries + 3 * keys),
            # act(gate(x)) * up(x): both factors and the product, beside residual and normed input.
            4 * hidden + 3 * inner,
        ]
        if not self._our_kernels():
            # RMSNorm: the float32 copy, its square. rms_norm.py makes neither.
            widths.append(3 * hidden + 2 * single * hidden)
            if shapes.query_norms:
                widths.append(3 * hidden + queries + 2 * single * queries)
        if self.kv_cache in BITS:
            # Int8Layer._easy_to_quantize: the keys in float32, and those less their mean.
            widths.append(attending + 2 * single * keys)
        return max(rows * self.element * max(widths), self._multiplying(rows, attending, inner))

    def _multiplying(self, rows: int, attending: int, inner: int) -> int:
        """The widest point of the prompt's packed linears, the last block's residual and normed input beside them."""
        if self.precision not in BITS:
            return 0
        hidden = self.shapes.hidden
        if self._dequantizes(rows):
            # QuantLinear._dense, siblings one after the other: gate, up and its weight; or the MLP's tail and its own.
            def beside(linear: LinearShape) -> int:
                if inner in (linear.inputs, linear.outputs):
                    return 4 * hidden + 2 * inner
                return max(attending, 3 * hidden + linear.outputs)

            made = ((beside(x), self._dequantized(x)) for x in self.shapes.linears)
            return max(rows * self.element * width + weight for width, weight in made)
        # csrc/linear_ops.cpp: results of all siblings, and the input once more as digits or, for tiles, rearranged.
        encoded = 3 if self.element == 4 else 2
        sets = ((inputs, outputs + (0 if inputs == hidden else inputs)) for inputs, outputs in self.shapes.stages)
        return rows * max(self.element * (4 * hidden + width) + encoded * inputs for inputs, width in sets)

    def _dequantizes(self, rows: int) -> bool:
        """Whether the table of linear_kernels.py has packed linears brought to the compute dtype for so many tokens."""
        if self.precision not in BITS:
            return False
        steps = steps_of(PLACES[self.device], dtype=_DTYPES[self.compute_dtype], bits=BITS[self.precision])
        return next(step for step in steps if rows <= step.tokens).implementation is Implementation.DENSE

    def _dequantized(self, linear: LinearShape) -> int:
        """``panel_weights``: one linear in the compute dtype, made from its words without anything between."""
        return linear.weights * self.element

    def _head(self) -> int:
        """Logits of the last position, and their float32 copy in ``generate``.

        Parameters that require gradients, as from_pretrained loads them, are taken for granted. Without, torch's matmul
        on a CPU would copy the output projection of a plain model for every sequence: see docs/plan.md.
        """
        logits = self.batch * self.shapes.vocabulary * (self.element + 4)
        return logits + 2 * self.batch * self.prompt_tokens * self.shapes.hidden * self.element

    def _decoding(self) -> int:
        """The last step: one tensor of one layer's cache beside its longer copy, or a linear being dequantized."""
        tokens = self.prompt_tokens + self.new_tokens - 1
        sizes = self.batch, self.prompt_tokens, self.new_tokens
        parts = [layer_bytes(layer, self.kv_cache, *sizes) for layer in self.shapes.caches]
        # torch.cat in DynamicLayer.update; a TokenStore grows seldom, and by its codes alone.
        copied = max(max(keys, values) for keys, values in parts)
        if self.kv_cache in BITS and tokens <= self.prompt_tokens + RESERVE_AHEAD:
            copied = 0
        made = max(self._dequantized(x) for x in self.shapes.linears) if self._dequantizes(self.batch) else 0
        return max(copied, made, self.batch * self.shapes.vocabulary * (self.element + 4))


def _footprint_2023(run: _Run) -> Footprint:
    """The original code on one card, see docs/plan.md for which terms are derived, inferred and fitted.

    Derived from code: weights; two whole caches, because a step's concatenated cache is made while the caller holds the
    last one; the logits of every position of the prompt; AutoGPTQ's buffer for one dequantized matrix. Inferred: a
    second copy of both embedding matrices while a quantized model is loaded.
    """
    shapes = run.shapes
    weights = weights_bytes(shapes, run.precision, group_size=run.group_size)
    tokens = run.prompt_tokens + run.new_tokens
    # uint8 codes, and a scale and a zero in the activations' dtype.
    per_head = {"int8": 1, "bf16": 2, "fp16": 2}
    if run.kv_cache not in per_head:
        raise UsageError(f"the runtime qwen-2023 has the KV caches bf16 and int8, got {run.kv_cache}")
    ranges = 4 if run.kv_cache == "int8" else 0
    token = sum(
        layer.heads * ((layer.key_dim + layer.value_dim) * per_head[run.kv_cache] + 2 * ranges)
        for layer in shapes.caches
    )
    cache = 2 * run.batch * tokens * token
    logits = 2 * run.batch * run.prompt_tokens * shapes.vocabulary
    buffer = 2 * max(linear.weights for linear in shapes.linears) if run.precision == "int4" else 0
    loading = 2 * shapes.embedding_parameters if run.precision in BITS else 0
    return Footprint(
        weights_bytes=weights,
        cache_bytes=cache,
        activations_bytes=logits,
        overhead_bytes=buffer,
        peak_bytes=weights + max(cache + logits + buffer, loading),
    )
