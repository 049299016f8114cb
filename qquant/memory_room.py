"""Whether what quantizing holds fits into memory, and what it takes of the disk; counted by needs.py beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qquant.config import QuantizeConfig
from qquant.errors import BadModelError, UsageError
from qquant.measure import free_memory_bytes
from qquant.needs import IMPORTED_BYTES, quantizing_needs
from qquant.ranks import LANES, Ranks
from qquant.samples import Sample
from qquant.shapes import model_shapes
from qquant.sources import StreamedModel
from qquant.telling import say_once


def activations_spill(
    source: StreamedModel, config: QuantizeConfig, samples: Sequence[Sample], max_memory: int | None, ranks: Ranks
) -> tuple[bool, int]:
    """Whether activations have to be kept on the disk, and the bytes of disk that the work takes beside the result.

    Args:
        source: the model.
        config: what is done to it.
        samples: that it is done with.
        max_memory: bytes that the process may take; None: half of what is free now.
        ranks: the processes that do it together.

    Raises:
        UsageError: ``max_memory`` for a model whose memory cannot be predicted.
        DoesNotFitError: not even without activations.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    longest = max(lengths)
    count = -(-sum(lengths) // longest)  # samples of that length would be as many tokens
    sizes: dict[str, Any] = {
        "seq_len": longest,
        "device": source.device.type,
        "element_bytes": torch.empty(0, dtype=source.dtype).element_size(),
    }
    try:
        shapes = model_shapes(source.config)
    except BadModelError as error:
        if max_memory is not None:
            raise UsageError(
                f"--max-memory is for models whose memory can be predicted; leave it out: {error}"
            ) from error
        return False, 0
    lanes = len(range(0, LANES, ranks.size))  # of the rank that has most
    needs = quantizing_needs(shapes, config.recipe, samples=-(-count * lanes // LANES), **sizes)
    disk = quantizing_needs(shapes, config.recipe, samples=count, **sizes).shelf_bytes
    on_cpu = source.device.type == "cpu"
    if max_memory is not None:
        spills = needs.spills(max_memory, imported_bytes=IMPORTED_BYTES if on_cpu else 0)
    else:
        free = free_memory_bytes() // ranks.neighbours if on_cpu else torch.cuda.mem_get_info(source.device)[0]
        needs.spills(free, imported_bytes=0)  # whether it fits at all
        spills = needs.spills(max(free // 2, needs.fixed_bytes), imported_bytes=0)
    if spills:
        say_once(f"activations, {needs.activation_bytes / 1e9:.2f} GB, are kept on the disk to stay within memory")
    return spills, disk
