"""The recipe of quantization: a checkpoint from disk to disk, or a model in memory.

From top to bottom: plan the output, walk the blocks and write each as it is done, add the side files, reopen what was
written and compare, publish. Every step's own room does the work. Options and reading samples are the door's,
``gptq.py``, which imports this room at once: so torch is imported inside.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qquant.telling import OnProgress, say_once, unheard

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from qquant.calibrate import Sample
    from qquant.config import ModuleRecord, QuantizeConfig, QuantizeLog
    from qquant.divergence import Divergence
    from qquant.mixed_precision import Choice, MixedPrecision
    from qquant.ranks import Ranks
    from qquant.solver import Solution
    from qquant.unfinished import UnfinishedRun

_MOST_RUNS = 4  # of a model whose divergence was higher than predicted
_STRICTER = 1.05  # than what was measured asks for, so that the next choice does not miss by a hair
_LOOSE = 0.75  # predictions so much too high cost more bytes than another run is worth
_MEASURED = "measured KL"  # of a result, before it is decided whether it is published
_PROBE_TOKENS = 32  # length of the made-up sample that proves a checkpoint made without data


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
    before_sealing: Callable[[UnfinishedRun], None] = lambda run: None,
    also_seen: Sequence[Sample] = (),
    tensor_parallel: int = 1,
    max_memory: int | None = None,
    ranks: Ranks | None = None,
    number: int = 0,
) -> QuantizeLog:
    """Quantize a model folder into a new one, one decoder block in memory at a time.

    What is finished is kept in ``out.unfinished``; a run that was cut off goes on there when it is called again in the
    same way, with as many ranks as there are then. The result is reopened, compared with what the walk computed, and
    only then becomes ``out``, by one rename.

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
        before_sealing: called with the run, on every rank, when its result is a complete folder, before that is sealed
            by its manifest and published. What it adds goes along; if it raises, nothing is published.
        also_seen: samples by which ``config`` was chosen, for the manifest's sketch of what the model has seen.
        tensor_parallel: cards that servers will cut the model over; MLPs are padded with zeros where that needs it.
        max_memory: bytes that the process may take; activations that do not fit are kept on the disk. None: half of
            what is free now.
        ranks: the processes that do this together, each with the same arguments; one of them writes. None: this one.
        number: of this try, where several are made for one ``out``.

    Returns:
        What was done to each module; the same is in the folder's quant_log.json.

    Raises:
        QquantError: bad options (UsageError), model, data, numbers, memory or disk; ``out`` is as it was.
        StoppedError: SIGINT or SIGTERM came; what is finished is kept.
    """
    from qquant.calibrate import check_samples, data_record
    from qquant.checkpoint import QUANTIZED_FOLDER, plan_tensors
    from qquant.making import Making
    from qquant.memory_room import activations_spill
    from qquant.model_folder import resolve_folder
    from qquant.padding import fit_to_ranks
    from qquant.ranks import ALONE
    from qquant.run_identity import agreed_identity, refuse_ranks
    from qquant.side_files import collect
    from qquant.sources import StreamedModel, tell_slow_dtype
    from qquant.stage_records import log_of
    from qquant.unfinished import going_on, refuse_output

    folder, target, together = resolve_folder(str(model)), Path(out), ranks or ALONE
    refuse_output(target, QUANTIZED_FOLDER, overwrite=overwrite)
    tuned = None if adapter is None else Path(adapter).expanduser()
    source = StreamedModel(folder, dtype=dtype, device=device, adapter=tuned)
    if dtype is None:
        tell_slow_dtype(source.dtype, source.device)
    fit_to_ranks(source, config, tensor_parallel)
    beside = collect(folder, adapter=tuned, changes=source.config_changes)
    beside.check_tokenizer()
    vocabulary = int(source.config.get_text_config().vocab_size)
    chosen = _samples_or_probe(samples, config, vocabulary)
    check_samples(chosen, vocabulary)
    refuse_ranks(together, config, len(chosen))
    seen = samples is not None and (config.needs_data or bool(also_seen))
    plan, quantized, skipped = plan_tensors(source, config)
    spills, shelves = activations_spill(source, config, chosen, max_memory, together)
    making = Making(
        source=source,
        beside=beside,
        config=config,
        samples=chosen,
        plan=plan,
        quantized=quantized,
        skipped=skipped,
        data=data_record(samples or (), also_seen) if seen else {},
        adapter=tuned,
        max_shard_bytes=max_shard_bytes,
        spills=spills,
        on_module=on_module or (lambda record: None),
        on_progress=on_progress,
    )
    identity = agreed_identity(partial(making.identity, tensor_parallel=tensor_parallel), together)
    with going_on(target, QUANTIZED_FOLDER, identity, overwrite=overwrite, ranks=together, part=number) as run:
        if not run.sealed:
            with together.agreed():
                if together.writer:
                    run.refuse_full_disk(sum(spec.nbytes for spec in plan.values()) + shelves)
            making.make(run)
            run.may_stop()
            before_sealing(run)
            if together.writer:
                making.describe(run)
        run.publish()
        return log_of(run)


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
    max_memory: int | None = None,
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
        dtype: as in ``quantize_checkpoint``; device, adapter, cards, ranks and size of shards are those of ``measure``.
        overwrite: as in ``quantize_checkpoint``.
        on_choice: called with what is about to be quantized, and the KL measured of what was chosen before, if any; on
            every rank.
        on_module: as in ``quantize_checkpoint``.
        on_progress: as in ``quantize_checkpoint``.
        max_memory: as in ``quantize_checkpoint``; what was measured before is not held to it.

    Returns:
        What was done to each module, and the KL that was measured.

    Raises:
        UsageError: a target that cannot be met; the message says what can.
    """
    from qquant.divergence import Divergence
    from qquant.errors import QquantError, UsageError
    from qquant.json_files import write_json
    from qquant.mixed_precision import FEW_CHECK_TOKENS, MARGIN, RECORD_NAME
    from qquant.unfinished import AnotherTry, would_come_again

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
    measured: dict[int, Divergence] = {}
    """By try."""
    correction = MARGIN
    for number in range(_MOST_RUNS):
        try:
            choice = mixed.choose(target_bytes=target_bytes, max_kl=max_kl, correction=correction)
        except UsageError as error:
            _give_up_tries(mixed, out, number)
            raise UsageError(f"{error}{_for_another(out)}") from error
        on_choice(choice, measured[number - 1].kl if measured else None)

        def check(run: UnfinishedRun, choice: Choice = choice, number: int = number) -> None:
            nonlocal correction
            found = run.finished(_MEASURED)
            if found is None:
                with run.own_result():
                    found = asdict(mixed.measured_kl(run.result))
                run.finish(_MEASURED, found)
            measured[number] = Divergence(**found)
            if max_kl is not None:
                corrected = _STRICTER * measured[number].kl / choice.point.predicted_kl
                loose = number == 0 and corrected < _LOOSE * correction
                correction = corrected
                if measured[number].kl > limit or (loose and choice != mixed.for_kl(limit, correction=corrected)):
                    raise AnotherTry
            if run.ranks.writer:
                write_json(run.result / RECORD_NAME, mixed.record(choice, target, measured[number]))

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
                tensor_parallel=mixed.tensor_parallel,
                max_memory=max_memory,
                ranks=mixed.ranks,
                number=number,
            )
        except AnotherTry:
            continue
        except QquantError as error:
            if would_come_again(error):
                _give_up_tries(mixed, out, number)
            raise
        return log, measured.get(number) or mixed.measured_kl(Path(out))  # sealed by an earlier process
    _give_up_tries(mixed, out, _MOST_RUNS)
    raise UsageError(
        f"a KL of at most {limit:g} was missed {_MOST_RUNS} times, the last measured {measured[number].kl:.3g}; "
        f"nothing was published. Ask for a higher one, or for a size{_for_another(out)}"
    )


def _give_up_tries(mixed: MixedPrecision, out: str | Path, count: int) -> None:
    """Remove what is left of the first tries: each was complete and missed its limit."""
    from qquant.unfinished import work_folder

    for number in range(count) if mixed.ranks.writer else ():
        shutil.rmtree(work_folder(Path(out), number), ignore_errors=True)


def _for_another(out: str | Path) -> str:
    """What a user has who asks for another target, as the end of a message."""
    from qquant.unfinished import MEASURING, work_folder

    kept = work_folder(Path(out), MEASURING)
    return f"; what was measured is kept in {kept} for another target" if kept.is_dir() else ""


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
    from qquant.gradients import output_moments
    from qquant.linear import QuantLinear
    from qquant.model_kernels import attach_kernels
    from qquant.sources import LoadedModel
    from qquant.stage_records import log_of
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
    log = log_of(walk.unfinished)
    for name, layer in replacements.items():
        model.set_submodule(name, layer)
    attach_quantization(model, config, list(replacements), list(log.skipped))
    attach_kernels(model)
    return log


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
