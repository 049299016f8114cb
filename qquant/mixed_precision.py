"""Mixed precision: which linears get 4 bits and which 8, and in which groups, for a size or a divergence to stay under.

Costs are measured by sensitivity.py and weighed by allocation.py; here they become settings, sizes of files, rules
that readers understand, and a record. Quantizing with them is quantizing.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qquant.allocation import Allocation, Allocator, Option
from qquant.checkpoint import QUANTIZED_FOLDER, plan_tensors, reopen
from qquant.config import QuantizeConfig
from qquant.divergence import Divergence, divergence
from qquant.errors import BadDataError, UsageError
from qquant.mixed_samples import SENSITIVITY_TOKENS, probes_of, split
from qquant.mixed_settings import label, rules_for, settings_of, stage_bytes
from qquant.model_folder import resolve_folder
from qquant.padding import fit_to_ranks
from qquant.ranks import ALONE, Ranks
from qquant.run import Run
from qquant.run_identity import agreed_identity, model_hashes, refuse_ranks, run_identity
from qquant.samples import Sample
from qquant.sensitivity import known_stages, measure_stages
from qquant.shard_writer import written_bytes
from qquant.sources import StreamedModel
from qquant.stage_costs import StageCost
from qquant.telling import OnProgress, unheard
from qquant.unfinished import MEASURING, going_on

RECORD_NAME = "mixed_precision.json"
"""In the quantized folder: target, frontier, costs and what was chosen."""
FEW_CHECK_TOKENS = 2048
"""Over fewer a mean KL is uncertain by 5 % and more: over 48 windows of 256 tokens its standard error was 1.7 to 2.1 %
of it on three models, which makes 4 to 5 % over 8 windows."""
NEAR = 0.98
"""A size target is met from below, and from here on where the sizes allow it."""
MARGIN = 1.15
"""A predicted KL is taken to be so many times as large: with plain GPTQ, by which costs are measured, 0.8 to 1.2 times
what was predicted was measured."""
BEST_LEAVES = "0.3 to 0.8"
"""Share of a predicted KL that method "best" left: 16 mixes of four models, docs/mixed-precision.md."""

_POINTS = 10
_log = logging.getLogger("qquant")


@dataclass(frozen=True)
class Point:
    """One choice of settings for all stages."""

    size_bytes: int
    """Of all weight files, embeddings, head and headers included."""
    predicted_kl: float
    """Sum of the stages' costs, nats per token."""
    stages: Mapping[str, int]
    """How many stages have which setting, such as "Int4 g128"."""


@dataclass(frozen=True)
class Choice:
    """What was chosen."""

    config: QuantizeConfig
    """With a rule for every linear that differs from the general settings."""
    point: Point
    chosen: tuple[int, ...]
    """Per stage the place of its setting."""


@dataclass
class MixedPrecision:
    """A model whose stages have been measured; choosing from it takes no time.

    Made by ``measure``.
    """

    source: StreamedModel
    config: QuantizeConfig
    """What was asked for; its bits and group size are the coarsest setting."""
    costs: list[StageCost]
    calibration: list[Sample]
    """What is left to quantize with."""
    check: list[Sample]
    """Held-out windows for ``measured_kl``."""
    max_shard_bytes: int
    adapter: Path | None
    tensor_parallel: int
    ranks: Ranks
    """The processes that measured together, and go on together."""
    allocator: Allocator = field(init=False)
    _beside: int = field(init=False)

    def __post_init__(self) -> None:
        """Weigh every setting of every stage."""
        self.allocator = Allocator(
            [
                [
                    Option(stage_bytes(stage.shape, one), cost)
                    for one, cost in zip(stage.settings, stage.kl, strict=True)
                ]
                for stage in self.costs
            ]
        )
        packed = {f"{name}.weight" for stage in self.costs for name in stage.shape.names}
        names = [name for name in self.source.stored_names() if name not in packed]
        self._beside = sum(self.source.reader.spec(name).nbytes for name in names)

    def for_size(self, target_bytes: int) -> Choice:
        """The least predicted KL in weight files of at most ``target_bytes``.

        Raises:
            UsageError: smaller than the smallest choice, or more than 2 % larger than the largest.
        """
        least, most = self.ends
        if not least.size_bytes <= target_bytes <= most.size_bytes / NEAR:
            raise UsageError(
                f"the size target must lie between {_said(least.size_bytes)} ({_mix(least)}) and "
                f"{_said(most.size_bytes)} ({_mix(most)}) for this model, got {_said(target_bytes)}"
            )
        beside = least.size_bytes - self.allocator.least_bytes
        while True:
            wanted = int(NEAR * target_bytes) + 1 - beside
            found = self.allocator.within_bytes(target_bytes - beside, wanted_bytes=wanted)
            found = found or self._extreme(largest=False)
            choice = self._choice(found)
            if choice.point.size_bytes <= target_bytes:
                break
            # Headers are a few bytes longer where sizes have more digits.
            beside += choice.point.size_bytes - target_bytes
        if choice.point.size_bytes < NEAR * target_bytes:
            near = _said(choice.point.size_bytes)
            _log.warning("no choice of settings lies within 2 %% below %s; nearest is %s", _said(target_bytes), near)
        return choice

    def choose(
        self, *, target_bytes: int | None = None, max_kl: float | None = None, correction: float = MARGIN
    ) -> Choice:
        """By ``for_size`` or ``for_kl``, whichever is asked for."""
        if target_bytes is not None and max_kl is None:
            return self.for_size(target_bytes)
        if max_kl is not None and target_bytes is None:
            return self.for_kl(max_kl, correction=correction)
        raise UsageError("give either target_bytes or max_kl")

    def for_kl(self, limit: float, *, correction: float = MARGIN) -> Choice:
        """The smallest weight files whose predicted KL, taken ``correction`` times, is at most ``limit``.

        Raises:
            UsageError: no choice is predicted to be under it.
        """
        found = self.allocator.within_cost(limit / correction)
        if found is None:
            best = self.frontier()[-1].point
            raise UsageError(
                f"no choice of settings is sure to stay under a KL of {limit:.3g}; the least that is predicted is "
                f"{best.predicted_kl:.3g} in {_said(best.size_bytes)} ({_mix(best)})"
            )
        return self._choice(found)

    def frontier(self, count: int = _POINTS) -> list[Choice]:
        """Choices than which none is predicted to be both smaller and better, from the smallest to the best."""
        return [self._choice(found) for found in self.allocator.frontier(count)]

    @cached_property
    def ends(self) -> tuple[Point, Point]:
        """Every stage at its smallest setting and at its largest: pure Int4 and pure Int8, but for what rules fix."""
        return self._point(self._extreme(largest=False)), self._point(self._extreme(largest=True))

    def line_kl(self, size_bytes: int) -> float:
        """Predicted KL at a size on the straight line between the two ``ends``: what mixing has to stay under."""
        small, large = self.ends
        share = (size_bytes - small.size_bytes) / max(1, large.size_bytes - small.size_bytes)
        return small.predicted_kl + share * (large.predicted_kl - small.predicted_kl)

    @property
    def predicted_with(self) -> str:
        """The method that costs were measured with, whatever quantizes in the end."""
        return self.costs[0].settings[0].method

    @property
    def prediction(self) -> str:
        """What a predicted KL is, in words."""
        told, method = f"predicted for method {self.predicted_with}", self.config.method
        if method == self.predicted_with:
            return told
        told += ", by which stages are compared"
        return f"{told}: best left {BEST_LEAVES} of it" if method == "best" else f"{told}, not for {method}"

    def pure(self, bits: int) -> Point | None:
        """Every stage at these bits and the general group size, or None if that cannot be had."""
        chosen = []
        for stage in self.costs:
            fitting = [
                place
                for place, one in enumerate(stage.settings)
                if (one.bits, one.group_size) == (bits, self.config.group_size)
            ]
            if not fitting:
                return None
            chosen.append(fitting[0])
        return self._point(self._allocation(chosen))

    def measured_kl(self, folder: Path) -> Divergence:
        """KL(original || folder) on the held-out windows, both computed in float32; every rank calls this."""
        with self.ranks.agreed():
            other = reopen(folder, dtype=self.source.dtype, device=self.source.device)
        return divergence(self.source, other, self.check, ranks=self.ranks)

    def record(self, choice: Choice, target: Mapping[str, float], measured: Divergence) -> dict[str, Any]:
        """All that led to a choice, for a JSON file."""
        stages = [
            {
                "modules": list(stage.shape.names),
                "chosen": label(stage.settings[place]),
                "settings": {
                    label(one): {"size_bytes": stage_bytes(stage.shape, one), "predicted_kl": cost}
                    for one, cost in zip(stage.settings, stage.kl, strict=True)
                },
            }
            for stage, place in zip(self.costs, choice.chosen, strict=True)
        ]
        return {
            "schema_version": 1,
            "target": dict(target),
            "method": self.config.method,
            "prediction": self.prediction,
            "chosen": self._entry(choice.point),
            "measured_kl": measured.kl,
            "measured_kl_stderr": measured.stderr,
            "measured_on_tokens": measured.tokens,
            "frontier": [self._entry(other.point) for other in self.frontier()],
            "stages": stages,
        }

    def _entry(self, point: Point) -> dict[str, Any]:
        sizes = {"size_bytes": point.size_bytes, "predicted_kl": point.predicted_kl}
        return {**sizes, "line_predicted_kl": self.line_kl(point.size_bytes), "stages": dict(point.stages)}

    def _extreme(self, largest: bool) -> Allocation:
        """The largest or the smallest setting of every stage."""
        sizes = [[option.size_bytes for option in options] for options in self.allocator.stages]
        return self._allocation([one.index(max(one) if largest else min(one)) for one in sizes])

    def _allocation(self, chosen: Sequence[int]) -> Allocation:
        pairs = list(zip(self.costs, chosen, strict=True))
        size = sum(stage_bytes(stage.shape, stage.settings[place]) for stage, place in pairs)
        return Allocation(tuple(chosen), size, sum(stage.kl[place] for stage, place in pairs))

    def _choice(self, found: Allocation) -> Choice:
        settings = [stage.settings[place] for stage, place in zip(self.costs, found.chosen, strict=True)]
        rules = rules_for([stage.shape for stage in self.costs], settings, self.config, self.source.layout.blocks)
        config = QuantizeConfig.from_dict({**self.config.model_dump(), "dynamic": {**self.config.dynamic, **rules}})
        return Choice(config, self._point(found, config), found.chosen)

    def _point(self, found: Allocation, config: QuantizeConfig | None = None) -> Point:
        if config is None:
            return self._choice(found).point
        plan, _, _ = plan_tensors(self.source, config)
        assert sum(spec.nbytes for spec in plan.values()) == self._beside + found.size_bytes
        labels = [label(stage.settings[place]) for stage, place in zip(self.costs, found.chosen, strict=True)]
        counts = {label: labels.count(label) for label in sorted(set(labels))}
        return Point(written_bytes(plan, max_shard_bytes=self.max_shard_bytes), found.cost, counts)


def measure(
    model: str | Path,
    samples: Sequence[Sample] | None,
    config: QuantizeConfig,
    *,
    sensitivity_tokens: int = SENSITIVITY_TOKENS,
    max_shard_bytes: int = 4_000_000_000,
    device: torch.device | str = "cpu",
    adapter: str | Path | None = None,
    tensor_parallel: int = 1,
    out: str | Path | None = None,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
    on_progress: OnProgress = unheard,
) -> MixedPrecision:
    """Measure what each stage of a model costs at 4 and 8 bits.

    The model is computed in float32, whatever it is stored in: rounding to bfloat16 costs more than 8 bits do. What was
    measured for an output is kept in ``out.unfinished-measured`` until that is published, for any target: the same
    call after an interruption goes on there.

    Args:
        model: folder or hub id of the original.
        samples: calibration samples; some are kept apart for measuring.
        config: its bits must be 4; bits and group size are the coarsest setting, and modules that its rules name keep
            what the rules say.
        sensitivity_tokens: how many tokens costs are measured on.
        max_shard_bytes: as for ``quantize_checkpoint``; headers count.
        device: where blocks are computed.
        adapter: a LoRA adapter to merge.
        tensor_parallel: as for ``quantize_checkpoint``.
        out: the folder that will be made of it; None: what is measured is kept in memory only.
        overwrite: as for ``quantize_checkpoint``.
        ranks: the processes that do this together, each with the same arguments.
        on_progress: told of each block.

    Raises:
        UsageError: other bits, or a linear that neither 4 nor 8 bits can hold; what was measured for ``out`` before is
            of another model, other data or options.
        BadDataError: fewer than three samples.
        StoppedError: SIGINT or SIGTERM came; what is measured is kept.
    """
    if config.bits != 4:
        raise UsageError(f"mixed precision chooses between 4 and 8 bits, so bits must be left at 4, got {config.bits}")
    if samples is None or len(samples) < 3:
        raise BadDataError(
            f"mixed precision needs at least 3 calibration samples, one of them to check the result on; got "
            f"{len(samples or [])}"
        )
    calibration, check = split(samples)
    refuse_ranks(ranks, config, len(calibration))
    probes, data = probes_of(calibration, sensitivity_tokens, apart=config.needs_data)
    tuned = None if adapter is None else Path(adapter).expanduser()
    source = StreamedModel(resolve_folder(str(model)), dtype=torch.float32, device=device, adapter=tuned)
    fit_to_ranks(source, config, tensor_parallel)

    if not any(settings_of(shape, config) for shape in known_stages(source)):
        raise UsageError("the rules leave every linear layer alone, so there is nothing to choose; remove some")

    def identity(*, with_files: bool) -> dict[str, Any]:
        hashes = model_hashes(source.folder, tuned, on_progress) if with_files else {}
        return run_identity(
            files={name: digest for part in hashes.values() for name, digest in part.items()},
            beside={},
            config=config,
            samples=samples,
            computed_in=source.dtype,
            device=source.device,
            options={"sensitivity_tokens": sensitivity_tokens, "tensor_parallel": tensor_parallel},
        )

    with ExitStack() as until_measured:
        run = Run(ranks)
        agreed = agreed_identity(identity, ranks) if out is not None or ranks.size > 1 else {}
        if out is not None:
            lasting = going_on(Path(out), QUANTIZED_FOLDER, agreed, overwrite=overwrite, ranks=ranks, part=MEASURING)
            run = until_measured.enter_context(lasting)
        costs = measure_stages(
            source, probes, data, lambda shape: settings_of(shape, config), run=run, on_progress=on_progress
        )
    return MixedPrecision(source, config, costs, calibration, check, max_shard_bytes, tuned, tensor_parallel, ranks)


def choose(
    model: str | Path,
    samples: Sequence[Sample] | None,
    config: QuantizeConfig | None = None,
    *,
    target_bytes: int | None = None,
    max_kl: float | None = None,
    **options: Any,
) -> QuantizeConfig:
    """A config whose rules give each linear 4 or 8 bits, so that the files stay within a size or a predicted KL.

    Args:
        model: folder or hub id of the original.
        samples: calibration samples.
        config: everything else; None: the defaults.
        target_bytes: size of all weight files to stay under, within 2 % where possible.
        max_kl: predicted KL in nats per token to stay under. Predicted only: ``quantize_mixed`` measures.
        **options: of ``measure``.

    Raises:
        UsageError: not exactly one target, or one that cannot be met; the message says what can.
    """
    if (target_bytes is None) == (max_kl is None):
        raise UsageError("give either target_bytes or max_kl")
    mixed = measure(model, samples, config or QuantizeConfig(), **options)
    return mixed.choose(target_bytes=target_bytes, max_kl=max_kl).config


def _mix(point: Point) -> str:
    """What a point consists of, in words."""
    return ", ".join(f"{count} stages {label}" for label, count in point.stages.items())


def _said(size: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.3f} {name}"
    return f"{size} bytes"
