"""What of our compiled kernels this processor runs: for tests that pretend to be elsewhere, and then call them."""

from __future__ import annotations

import pytest
import torch

from qquant import _native, plain_attention

BUILT = any(module.live for module in _native.status() if module.name == "qquant._C")
TILES = not BUILT or "avx512_bf16" in torch.ops.qquant.cpu_kernel_info()
"""Whether many bfloat16 rows can be multiplied: by tiles, or by the reference where nothing is compiled."""
ATTENDS = not BUILT or plain_attention.kernel_is_live()
"""Whether one token can attend to a bfloat16 cache, likewise."""

BFLOAT16 = "AVX512" in torch.backends.cpu.get_cpu_capability()
"""Whether torch multiplies in bfloat16 in reasonable time: without AVX-512 it takes ten times as long as in float32."""

needs_tiles = pytest.mark.skipif(not TILES, reason="no bfloat16 tile kernel here")
needs_attention = pytest.mark.skipif(not ATTENDS, reason="no attention kernel for this processor")
