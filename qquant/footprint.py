"""What a model takes in memory, as plain arithmetic over its shapes: weights, cache, and the peak of a generation.

Every term is derived from code that is named beside it; the few constants that were measured instead say how. Nothing
here builds a model, touches a tensor or asks a device. Shapes come from shapes.py; what is asked for, and how it is
judged against a card, is planning.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qquant.errors import UsageError
from qquant.plan_report import Runtime
from qquant.records import Footprint, KVKind, Precision
from qquant.stored_bytes import BITS as BITS
from qquant.stored_bytes import ELEMENT_BYTES as ELEMENT_BYTES
from qquant.stored_bytes import RESERVE_AHEAD, layer_bytes
from qquant.stored_bytes import CacheShape as CacheShape
from qquant.stored_bytes import LinearShape as LinearShape
from qquant.stored_bytes import ModelShapes as ModelShapes
from qquant.stored_bytes import weights_bytes as weights_bytes

CPU_PROMPT_BYTES, CPU_STEP_BYTES = 16_000_000, 4_000_000
"""What a CPU process holds beside tensors once the prompt has passed, and what the first decoding step adds: code of
torch and oneDNN that is paged in when it first runs, compiled kernels, stacks of threads. These six were measured, not
derived: resident set less model, cache and activations of the reference model, 11 MB, in the cells of docs/plan.md
(torch 2.13, one thread). Beside a model of 500 MB they are less than 5 %."""
CPU_CACHE_BYTES, CPU_PACKED_BYTES = 3_000_000, 2_000_000
"""The same for the Int8 cache's operators, and for packed linears."""
CPU_PRODUCT_BYTES = 5_000_000
"""Of the first for oneDNN's products in 16 bits: a model does without whose linears all go through the Int4 kernel."""
CPU_FLOAT32_BYTES = 8_000_000
"""Instead of the first two for a model that computes in float32, for which torch does not need oneDNN."""
CPU_QUANTIZING_BYTES = 50_000_000
"""Tokenizer, calibration samples and code that is paged in while a checkpoint is made. Measured: docs/plan.md."""
CUBLAS_WORKSPACE_BYTES = 32 * 2**20
"""What torch reserves for cuBLAS on its first product on compute capability 9.0; 8.1 MiB on older cards."""
CUDA_CONTEXT_BYTES = 2**29
"""What a CUDA process takes on a card outside torch's allocator: context and loaded kernels. Read off nvidia-smi, about
0.5 GiB with torch 2; not part of any peak here."""
INT4_KERNEL_ROWS = 128
"""Rows up to which ``linear.QuantLinear`` uses torch's packed Int4 kernel on a CPU with AVX-512."""
_INT4_KERNEL_GROUPS = (32, 64, 128, 256)

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
        device: where it runs; "cpu" is one with AVX-512, where Int4 linears keep a second copy for their kernel.
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
        weights = weights_bytes(self.shapes, self.precision, group_size=self.group_size, element_bytes=self.element)
        copies = self._kernel_copies()
        first, last = self._cache(1), self._cache(self.new_tokens)
        early = self.batch * self.prompt_tokens <= INT4_KERNEL_ROWS  # the kernel's copies are made in the prompt's pass
        held = copies if early else 0
        code, later = self._code(), CPU_STEP_BYTES if self.device == "cpu" and self.element == 2 else 0
        # (copies of weights, cache, activations, code) at each moment that can be the peak.
        found = [(held, first, self._prompt(), code), (held, first, self._head(), code)]
        if self.new_tokens > 1:
            found.append((copies, last, self._decoding(), code + later))
        if copies and (early or self.new_tokens > 1):
            found.append((copies, first, self._converting(), code + (0 if early else later)))
        copied, cache, activations, overhead = max(found, key=sum)
        return Footprint(
            weights_bytes=weights + copied,
            cache_bytes=cache,
            activations_bytes=activations,
            overhead_bytes=overhead,
            peak_bytes=weights + copied + cache + activations + overhead,
        )

    def _code(self) -> int:
        """What is neither weights nor cache nor activations: of libraries on a CPU, cuBLAS's on a card."""
        if self.device == "cuda":
            return CUBLAS_WORKSPACE_BYTES
        found = CPU_PROMPT_BYTES if self.element == 2 else CPU_FLOAT32_BYTES
        if self.kv_cache in BITS:
            found += CPU_CACHE_BYTES
        if self.precision in BITS:
            found += CPU_PACKED_BYTES
        if self._kernel_copies() and self.batch * self.prompt_tokens <= INT4_KERNEL_ROWS:
            found -= CPU_PRODUCT_BYTES
        return found

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
            # RMSNorm: the float32 copy, its square.
            3 * hidden + 2 * single * hidden,
            # act(gate(x)) * up(x): both factors and the product, beside residual and normed input.
            4 * hidden + 3 * inner,
        ]
        if shapes.query_norms:
            widths.append(3 * hidden + queries + 2 * single * queries)
        if self.kv_cache in BITS:
            # Int8Layer._easy_to_quantize: the keys in float32, and those less their mean.
            widths.append(attending + 2 * single * keys)
        peak = rows * self.element * max(widths)
        if self._dequantizes(rows):
            made = (rows * self.element * self._beside(x, inner) + self._dequantized(x) for x in self._kinds())
            peak = max(peak, *made)
        return peak

    def _beside(self, linear: LinearShape, inner: int) -> int:
        """Width of what is alive while a linear is made from its codes."""
        hidden = self.shapes.hidden
        return 4 * hidden + inner if inner in (linear.inputs, linear.outputs) else 3 * hidden

    def _kinds(self) -> set[LinearShape]:
        """Linears that differ in shape."""
        return {
            LinearShape(name="", inputs=x.inputs, outputs=x.outputs, bias=False, tail=False)
            for x in self.shapes.linears
        }

    def _dequantizes(self, rows: int) -> bool:
        return self.precision in BITS and (self._kernel_copies() == 0 or rows > INT4_KERNEL_ROWS)

    def _dequantized(self, linear: LinearShape) -> int:
        """``packing.dequantize``: float32 beside the codes, a byte each, or beside the copy in the compute dtype."""
        return linear.weights * (4 + max(1, self.element if self.element < 4 else 0))

    def _kernel_copies(self) -> int:
        """``QuantLinear._int4pack_forward``: half a byte per weight, and two bfloat16 per group, kept for ever."""
        applies = (
            self.device == "cpu"
            and self.precision == "int4"
            and self.compute_dtype == "bf16"
            and self.group_size in _INT4_KERNEL_GROUPS
        )
        if not applies:
            return 0
        return sum(x.weights // 2 + 4 * -(-x.inputs // self.group_size) * x.outputs for x in self.shapes.linears)

    def _converting(self) -> int:
        """The same's widest point: the codes as int32, twice, before they are packed for the kernel."""
        return 8 * max(linear.weights for linear in self.shapes.linears)

    def _head(self) -> int:
        """Logits of the last position, and their float32 copy in ``generate``.

        Parameters that require gradients, as from_pretrained loads them, are taken for granted. Without, torch's matmul
        on a CPU would copy the output projection for every sequence: see docs/plan.md.
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


def quantizing_bytes(
    shapes: ModelShapes,
    *,
    samples: int,
    seq_len: int,
    device: Literal["cpu", "cuda"] = "cuda",
) -> tuple[int, int]:
    """What making a checkpoint takes: bytes on the device that computes, and in the machine's memory beside a GPU.

    The largest of three moments. Before the first block: the embedding and the activations of all samples. In the last
    stage of a block: the block, those activations, and a Hessian and its inverse in float32 with the weights that share
    it. At the end, when the written folder is proven: the embedding and the output projection of both models, and the
    logits of one sample from each. See ``walk.Walk``, ``solver.solve``, ``gptq.quantize_checkpoint``.

    Args:
        shapes: of the model.
        samples: of calibration.
        seq_len: tokens of each, at most; shorter samples take less.
        device: that computes; "cpu" adds what is in its memory beside tensors.
    """
    element_bytes = 2  # of the compute dtype, bfloat16 or float16
    block = element_bytes * sum(inputs * outputs for inputs, outputs in shapes.stages)
    stream = samples * seq_len * shapes.hidden * element_bytes
    inner = max(inputs for inputs, _ in shapes.stages)
    # walk._KEPT_TAIL_BYTES: inputs of a unit's last linear are kept between Hessian and output if they are few.
    kept = samples * seq_len * inner * element_bytes
    kept = kept if kept <= 256 * 2**20 else 0
    # Hessian, factor, and half of each side again while the factor is inverted, or the column loop's matrices: side by
    # side in the stored dtype, in float32 (4), as codes (1), and those turned round (1).
    stage = max(
        8 * inputs * inputs + max(2 * inputs * inputs, (element_bytes + 6) * inputs * outputs)
        for inputs, outputs in shapes.stages
    )
    passing = 3 * seq_len * inner * element_bytes + 4 * seq_len * shapes.hidden * element_bytes
    computing = block + stream + kept + max(stage, passing)
    embedding = stream + shapes.largest_tensor * element_bytes
    # Of what was written, read again beside the first model's ends and logits: a block packed in at most a byte per
    # weight and its widest linear dequantized in float32 and in the compute dtype; then all logits, of both models; and
    # with the first model alone torch.isfinite, the magnitudes and three bytes of truth values.
    ends, logits = shapes.embedding_parameters * element_bytes, seq_len * shapes.vocabulary
    widest = (4 + element_bytes) * max(linear.weights for linear in shapes.linears) + passing
    running = 2 * ends + logits * element_bytes + block // element_bytes + widest
    proving = max(running, 2 * (ends + logits * element_bytes), ends + logits * (3 * element_bytes + 3))
    beside = CPU_QUANTIZING_BYTES if device == "cpu" else 0
    # A tensor as it is stored and as it is computed in, on its way to the device.
    return max(computing, embedding, proving) + beside, 2 * shapes.largest_tensor * element_bytes
