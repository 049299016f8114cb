"""The recipe of quantization: a checkpoint from disk to disk, or a model in memory.

From top to bottom: plan the output, walk the blocks and write each as it is done, add the side files, reopen what was
written and compare, publish. Every step's own room does the work. Options and reading samples are the door's,
``gptq.py``, which imports this room at once: so torch is imported inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant.telling import OnProgress, say_once, unheard

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from qquant.calibrate import Sample
    from qquant.config import ModuleRecord, QuantizeConfig, QuantizeLog
    from qquant.mixed_precision import Choice, MixedPrecision
    from qquant.sensitivity import Divergence
    from qquant.solver import Solution

_MOST_RUNS = 4  # of a model whose divergence was higher than predicted
_STRICTER = 1.05  # than what was measured asks for, so that the next choice does not miss by a hair
_LOOSE = 0.75  # predictions so much too high cost more bytes than another run is worth
_PROBE_TOKENS = 32  # length of the made-up sample that proves a checkpoint made without data


class _ChooseAgain(Exception):
    """What was quantized is further from the original than was asked for, or much nearer."""


def quantize_checkpoint(
    model: str | Path,
    samples: Sequence[Sample] | None,
    config: QuantizeConfig,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    max_shard_bytes: int = 4_000_000_000,
    overwrite: bool = False,
    on_module: Callable[[ModuleRecord], None] | None = None,
    on_progress: OnProgress = unheard,
    adapter: str | Path | None = None,
    before_sealing: Callable[[Path], None] = lambda folder: None,
    also_seen: Sequence[Sample] = (),
) -> QuantizeLog:
    """Quantize a model folder into a new one, one decoder block in memory at a time.

    The result is written beside ``out``, reopened, compared with what the walk computed, and only then renamed.

    Args:
        model: folder or hub id of the original, safetensors weights.
        samples: calibration samples; None for a method that needs none, "rtn".
        config: what to do.
        out: folder to make.
        dtype: compute dtype; None: the stored one (float32 for float16 weights on a CPU).
        device: where blocks are computed.
        max_shard_bytes: size at which a new output shard begins.
        overwrite: replace an existing model folder, in the moment the new one is complete.
        on_module: called after each linear, for progress.
        on_progress: told of what comes before the first linear, where a method takes gradients.
        adapter: folder of a peft LoRA adapter to merge into the model as its blocks are read; None: none.
        before_sealing: called with the complete folder before it is sealed by its manifest and published. What it adds
            goes along; if it raises, nothing is published.
        also_seen: samples by which ``config`` was chosen, for the manifest's sketch of what the model has seen.

    Returns:
        What was done to each module; the same is in the folder's quant_log.json.

    Raises:
        QquantError: bad options (UsageError), model, data, numbers, or disk; nothing is left at ``out``.
    """
    import torch

    from qquant.calibrate import check_samples, data_record
    from qquant.capture import capture, head
    from qquant.checkpoint import (
        QUANTIZED_FOLDER,
        check_logits,
        plan_tensors,
        quantization_keys,
        reopen,
        write_manifest,
    )
    from qquant.config import QuantizeLog
    from qquant.folding import foldable
    from qquant.gradients import output_moments
    from qquant.linear import QuantLinear
    from qquant.model_folder import resolve_folder
    from qquant.models.layouts import block_list
    from qquant.publish import published
    from qquant.shards import DTYPES, ShardWriter
    from qquant.side_files import collect
    from qquant.sources import StreamedModel
    from qquant.walk import Walk

    folder, target = resolve_folder(str(model)), Path(out)
    tuned = None if adapter is None else Path(adapter).expanduser()
    source = StreamedModel(folder, dtype=dtype, device=device, adapter=tuned)
    beside = collect(folder, adapter=tuned, changes=source.config_changes)
    beside.check_tokenizer()
    vocabulary = int(source.config.get_text_config().vocab_size)
    chosen = _samples_or_probe(samples, config, vocabulary)
    check_samples(chosen, vocabulary)
    seen = samples is not None and (config.needs_data or bool(also_seen))
    data: dict[str, Any] = data_record(samples or (), also_seen) if seen else {}
    plan, quantized, skipped = plan_tensors(source, config)
    with published(target, QUANTIZED_FOLDER, overwrite=overwrite) as staging:
        writer = ShardWriter(staging, plan, max_shard_bytes=max_shard_bytes)
        blocks = len(block_list(source.model, source.layout))
        late = foldable(source.layout, blocks) if config.recipe.folds else set()
        unchanged = {name for name in plan if name in source.reader.entries}
        for name in plan:
            if name in unchanged - late:
                writer.write_chunks(name, source.finite_chunks(name))

        def keep(name: str, tensor: torch.Tensor) -> None:
            unchanged.discard(name)
            writer.write(name, tensor)

        def write(name: str, layer: nn.Linear, solution: Solution, settings: QuantizeConfig) -> None:
            packed = QuantLinear.from_codes(*solution.packable(), bits=settings.bits, group_size=settings.group_size)
            for part, tensor in packed.state_dict().items():
                writer.write(f"{name}.{part}", tensor)

        source.load_outside(with_head=config.recipe.output)
        stream = capture(source, chosen, device)
        outputs = output_moments(source, stream, device, on_progress=on_progress) if config.recipe.output else {}
        source.release_outside()
        stored = {name: DTYPES[spec.dtype] for name, spec in plan.items()}
        walk = Walk(source, config, write, on_module or (lambda record: None), outputs, keep, stored.get)
        walk.run(stream)
        for name in plan:
            if name in unchanged & late:
                writer.write_chunks(name, source.finite_chunks(name))
        writer.close()
        beside.write(staging, quantization_keys(config, quantized, skipped))

        source.load_outside(with_head=True)
        with torch.no_grad():
            walked = head(source, stream.hidden[0], device)
        source.release_outside()
        del stream
        check_logits(_logits_of(reopen(staging, dtype=source.dtype, device=device), chosen[0], device), walked)
        before_sealing(staging)
        log = QuantizeLog(modules=tuple(walk.records), skipped=tuple(walk.skipped))
        computed_in = str(source.dtype).removeprefix("torch.")
        write_manifest(
            staging, source=folder, adapter=tuned, config=config, data=data, log=log, computed_in=computed_in
        )
    return log


def quantize_mixed(
    mixed: MixedPrecision,
    out: str | Path,
    *,
    target_bytes: int | None = None,
    max_kl: float | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    on_choice: Callable[[Choice, float | None], None] = lambda choice, before: None,
    on_module: Callable[[ModuleRecord], None] | None = None,
    on_progress: OnProgress = unheard,
) -> tuple[QuantizeLog, Divergence]:
    """Quantize a model that has been measured so that its files stay within a size, or its divergence under a limit.

    The result is compared with the original on samples that were used for nothing else. If a limit on KL is missed
    there, or undercut by far at the first try, the costs are corrected by what was measured, and the model is quantized
    again; nothing that misses it is published.

    Args:
        mixed: from ``mixed_precision.measure``.
        out: folder to make; mixed_precision.json in it tells what was chosen from.
        target_bytes: size of all weight files to stay under.
        max_kl: measured mean KL in nats per token to stay under.
        dtype: as in ``quantize_checkpoint``; device, adapter and size of shards are those of ``measure``.
        overwrite: as in ``quantize_checkpoint``.
        on_choice: called with what is about to be quantized, and the KL measured of what was chosen before, if any.
        on_module: as in ``quantize_checkpoint``.
        on_progress: as in ``quantize_checkpoint``.

    Returns:
        What was done to each module, and the KL that was measured.

    Raises:
        UsageError: a target that cannot be met; the message says what can.
    """
    from qquant.errors import UsageError
    from qquant.json_files import write_json
    from qquant.mixed_precision import FEW_CHECK_TOKENS, MARGIN, RECORD_NAME

    assert (target_bytes is None) != (max_kl is None), "one target"
    limit = math.inf if max_kl is None else max_kl
    target = {"max_kl": limit} if target_bytes is None else {"size_bytes": target_bytes}
    # By the calibration samples costs were measured; those for the check decide only where they are held to a limit.
    seen = [*mixed.calibration, *(mixed.check if max_kl is not None else ())]
    checked = sum(int(sample.mask.sum()) for sample in mixed.check)
    if max_kl is not None and checked < FEW_CHECK_TOKENS:
        say_once(
            f"the limit on KL is held to what is measured on {checked} tokens, and a mean over fewer than "
            f"{FEW_CHECK_TOKENS} is uncertain by 5 % and more; give more samples (--n-samples), of which one in eight "
            "is kept for this",
            key="few check tokens",
        )
    measured: Divergence | None = None
    correction = MARGIN
    for number in range(_MOST_RUNS):
        choice = mixed.choose(target_bytes=target_bytes, max_kl=max_kl, correction=correction)
        on_choice(choice, None if measured is None else measured.kl)

        def check(folder: Path, choice: Choice = choice, first: bool = number == 0) -> None:
            nonlocal measured, correction
            measured = mixed.measured_kl(folder)
            if max_kl is not None:
                corrected = _STRICTER * measured.kl / choice.point.predicted_kl
                loose = first and corrected < _LOOSE * correction
                correction = corrected
                if measured.kl > limit or (loose and choice != mixed.for_kl(limit, correction=corrected)):
                    raise _ChooseAgain
            write_json(folder / RECORD_NAME, mixed.record(choice, target, measured))

        try:
            log = quantize_checkpoint(
                mixed.source.folder,
                mixed.calibration,
                choice.config,
                out,
                dtype=dtype,
                device=mixed.source.device,
                max_shard_bytes=mixed.max_shard_bytes,
                overwrite=overwrite,
                on_module=on_module,
                on_progress=on_progress,
                adapter=mixed.adapter,
                before_sealing=check,
                also_seen=seen,
            )
        except _ChooseAgain:
            continue
        assert measured is not None  # by ``check``, before anything is published
        return log, measured
    assert measured is not None
    raise UsageError(
        f"a KL of at most {limit:g} was missed {_MOST_RUNS} times, the last measured {measured.kl:.3g}; nothing was "
        "published. Ask for a higher one, or for a size"
    )


def quantize_model(
    model: PreTrainedModel,
    samples: Sequence[Sample] | None,
    config: QuantizeConfig,
    *,
    on_module: Callable[[ModuleRecord], None] | None = None,
) -> QuantizeLog:
    """Quantize a model in memory; its linears become ``QuantLinear`` and ``save_pretrained`` writes a GPTQ checkpoint.

    Args:
        model: causal language model on one device. Modified in place.
        samples: calibration samples; None for a method that needs none, "rtn".
        config: what to do.
        on_module: called after each linear, for progress.

    Returns:
        What was done to each module.

    Raises:
        QquantError: bad options, data or numbers. The model may then be partly quantized; load it again.
    """
    from qquant.calibrate import check_samples
    from qquant.capture import capture
    from qquant.checkpoint import attach_quantization, refuse_unpackable_model
    from qquant.config import QuantizeLog
    from qquant.gradients import output_moments
    from qquant.linear import QuantLinear
    from qquant.model_kernels import attach_kernels
    from qquant.sources import LoadedModel
    from qquant.walk import Walk

    source = LoadedModel(model)
    vocabulary = int(model.config.get_text_config().vocab_size)
    chosen = _samples_or_probe(samples, config, vocabulary)
    check_samples(chosen, vocabulary)
    refuse_unpackable_model(source, config)
    replacements: dict[str, QuantLinear] = {}

    def keep(name: str, layer: nn.Linear, solution: Solution, settings: QuantizeConfig) -> None:
        replacements[name] = QuantLinear.from_codes(
            *solution.packable(), bias=layer.bias, bits=settings.bits, group_size=settings.group_size
        )

    stream = capture(source, chosen, model.device)
    outputs = output_moments(source, stream, model.device) if config.recipe.output else {}
    walk = Walk(source, config, keep, on_module or (lambda record: None), outputs)
    walk.run(stream)
    for name, layer in replacements.items():
        model.set_submodule(name, layer)
    attach_quantization(model, config, list(replacements), walk.skipped)
    attach_kernels(model)
    return QuantizeLog(modules=tuple(walk.records), skipped=tuple(walk.skipped))


def _samples_or_probe(samples: Sequence[Sample] | None, config: QuantizeConfig, vocabulary: int) -> list[Sample]:
    """The calibration samples, or for round-to-nearest one made-up sample that only serves to compare logits."""
    from qquant.calibrate import samples_from_ids
    from qquant.errors import BadModelError, UsageError

    if vocabulary < 1:
        raise BadModelError(
            f"a model must have one row per token, vocab_size is {vocabulary}; get its config.json again"
        )
    if not config.needs_data:
        return samples_from_ids([[i % vocabulary for i in range(_PROBE_TOKENS)]])
    if samples is None:
        raise UsageError(
            f'method "{config.method}" needs calibration data, got none; give --data, or choose --method rtn'
        )
    return list(samples)


def _logits_of(source: Any, sample: Sample, device: torch.device | str) -> torch.Tensor:
    """Logits [1, T, vocab] of one sample through a folder that is read block by block."""
    import torch

    from qquant.capture import capture, head
    from qquant.hooks import first_output
    from qquant.models.layouts import block_list

    source.load_outside(with_head=True)
    stream = capture(source, [sample], device)
    hidden = stream.hidden[0]
    with torch.inference_mode():
        for index in range(len(block_list(source.model, source.layout))):
            hidden = first_output(source.load(index)(hidden, **stream.calls[0][index]))
            source.release(index)
        return head(source, hidden, device)
