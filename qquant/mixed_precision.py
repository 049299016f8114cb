"""Mixed precision: which linears get 4 bits and which 8, and in which groups, for a size or a divergence to stay under.

Costs are measured by sensitivity.py and weighed by allocation.py; here they become settings, sizes of files, rules
that readers understand, and a record. Quantizing with them is quantizing.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qquant.allocation import Allocation, Allocator, Option
from qquant.checkpoint import plan_tensors, reopen
from qquant.config import QuantizeConfig
from qquant.errors import BadDataError, UsageError
from qquant.mixed_settings import label, rules_for, settings_of, stage_bytes
from qquant.model_folder import resolve_folder
from qquant.padding import fit_to_ranks
from qquant.samples import Sample
from qquant.sensitivity import Divergence, StageCost, divergence, measure_stages
from qquant.shard_writer import written_bytes
from qquant.sources import StreamedModel
from qquant.telling import OnProgress, say_once, unheard

RECORD_NAME = "mixed_precision.json"
"""In the quantized folder: target, frontier, costs and what was chosen."""
SENSITIVITY_TOKENS = 2048
"""Tokens that costs are measured on; see docs/mixed-precision.md for what fewer or more change."""
CHECK_TOKENS = 8192
"""Tokens, used for nothing else, on which the result is compared with the original."""
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

_WINDOW = 256  # tokens of a sequence that KL is measured on: logits of a large vocabulary take 600 kB each
_DATA_TOKENS = 1 << 16  # in the Hessians: six times the longest rows of a 7B model
_CHECK_SHARE = 8  # at most one sample in so many is kept for the check
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
        """KL(original || folder) on the held-out windows, both computed in float32."""
        other = reopen(folder, dtype=self.source.dtype, device=self.source.device)
        return divergence(self.source, other, self.check)

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
    on_progress: OnProgress = unheard,
) -> MixedPrecision:
    """Measure what each stage of a model costs at 4 and 8 bits.

    The model is computed in float32, whatever it is stored in: rounding to bfloat16 costs more than 8 bits do.

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
        on_progress: told of each block.

    Raises:
        UsageError: other bits, or a linear that neither 4 nor 8 bits can hold.
        BadDataError: fewer than three samples.
    """
    if config.bits != 4:
        raise UsageError(f"mixed precision chooses between 4 and 8 bits, so bits must be left at 4, got {config.bits}")
    if samples is None or len(samples) < 3:
        raise BadDataError(
            f"mixed precision needs at least 3 calibration samples, one of them to check the result on; got "
            f"{len(samples or [])}"
        )
    calibration, check = _split(samples)
    probes, data = _probes(calibration, sensitivity_tokens, apart=config.needs_data)
    tuned = None if adapter is None else Path(adapter).expanduser()
    source = StreamedModel(resolve_folder(str(model)), dtype=torch.float32, device=device, adapter=tuned)
    fit_to_ranks(source, config, tensor_parallel)
    costs = measure_stages(source, probes, data, lambda shape: settings_of(shape, config), on_progress=on_progress)
    if not costs:
        raise UsageError("the rules leave every linear layer alone, so there is nothing to choose; remove some")
    return MixedPrecision(source, config, costs, calibration, check, max_shard_bytes, tuned, tensor_parallel)


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


def _split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Calibration samples, and windows of those that are kept apart: every eighth, or fewer if they are long."""
    windows = -(-CHECK_TOKENS // _WINDOW)
    per_sample = max(1, max(len(sample.input_ids) for sample in samples) // _WINDOW)
    count = max(1, min(len(samples) // _CHECK_SHARE, -(-windows // per_sample)))
    kept = {round((place + 0.5) * len(samples) / count - 0.5) for place in range(count)}
    cut = [window for place in sorted(kept) for window in _windows(samples[place])]
    return [sample for place, sample in enumerate(samples) if place not in kept], cut[:windows]


def _probes(samples: Sequence[Sample], tokens: int, *, apart: bool) -> tuple[list[Sample], list[Sample]]:
    """Windows to measure costs on, from samples spread over all, and samples for Hessians.

    These are the others (``apart``: they should be), or all if fewer than half are left.
    """
    count = max(1, min(len(samples), -(-tokens // _WINDOW)))
    picked = sorted({round((place + 0.5) * len(samples) / count - 0.5) for place in range(count)})
    probes = [_windows(samples[place])[0] for place in picked]
    others = [sample for place, sample in enumerate(samples) if place not in set(picked)]
    if len(others) < len(samples) / 2:
        others = list(samples)
        if apart:
            say_once(
                f"costs are measured on samples that are in the Hessians too, so that they may come out too low: "
                f"{len(picked)} of {len(samples)} samples would be needed apart; give more samples (--n-samples), or "
                "lower --sensitivity-tokens",
                key="probes in Hessians",
            )
    longest = max(len(sample.input_ids) for sample in others)
    count = max(1, min(len(others), _DATA_TOKENS // longest))
    return probes, [others[place * len(others) // count] for place in range(count)]


def _windows(sample: Sample) -> list[Sample]:
    """A sample in pieces of at most 256 tokens, leaving out those without a token that counts."""
    pieces = [
        Sample(ids, mask)
        for ids, mask in zip(sample.input_ids.split(_WINDOW), sample.mask.split(_WINDOW), strict=True)
        if bool(mask.any()) and len(ids) > 1
    ]
    return pieces or [sample]


def _mix(point: Point) -> str:
    """What a point consists of, in words."""
    return ", ".join(f"{count} stages {label}" for label, count in point.stages.items())


def _said(size: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.3f} {name}"
    return f"{size} bytes"
