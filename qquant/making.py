"""A quantized checkpoint in the making: copied, walked, proven, described, each step where the last process left it.

What is kept between processes is unfinished.py's, mathematics the walk's; who asks for it is quantizing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qquant.activations import Streams
from qquant.calibrate import Sample
from qquant.capture import Stream, capture, head
from qquant.checkpoint import check_logits, quantization_keys, reopen, write_manifest
from qquant.config import ModuleRecord, QuantizeConfig
from qquant.folding import foldable
from qquant.gradients import output_moments
from qquant.hooks import first_output
from qquant.identity import files_sha256
from qquant.linear import QuantLinear
from qquant.models.layouts import block_list
from qquant.packing import PARTS, dequantize
from qquant.run_identity import model_hashes, run_identity
from qquant.shards import DTYPES, CheckpointReader, TensorSpec
from qquant.side_files import SideFiles
from qquant.solver import Solution
from qquant.sources import StreamedModel
from qquant.stage_records import changed_by_folds, log_of
from qquant.telling import OnProgress
from qquant.unfinished import UnfinishedRun
from qquant.walk import Walk

_COPIED = "copied"


@dataclass
class Making:
    """Everything that is decided before the first number is computed."""

    source: StreamedModel
    beside: SideFiles
    config: QuantizeConfig
    samples: list[Sample]
    plan: dict[str, TensorSpec]
    """Every tensor of the result, in model order."""
    quantized: list[str]
    skipped: list[str]
    data: dict[str, Any]
    """What the manifest says of the samples."""
    adapter: Path | None
    """Folder of the adapter that the source merges."""
    max_shard_bytes: int
    spills: bool
    """Whether activations are kept on the disk and not in memory."""
    on_module: Callable[[ModuleRecord], None]
    on_progress: OnProgress

    def __post_init__(self) -> None:
        """Nothing is read or hashed yet."""
        self._hashes: dict[str, dict[str, str]] = {}
        self._device = self.source.device

    def identity(self, *, with_files: bool = True, **options: Any) -> dict[str, Any]:
        """What the result depends on, ``options`` too; with the model's files every byte of these is read."""
        if with_files:
            self._hashes = model_hashes(self.source.folder, self.adapter, self.on_progress)
        copied = files_sha256(list(self.beside.copied.values()))
        return run_identity(
            files={name: digest for part in self._hashes.values() for name, digest in part.items()},
            beside={**copied, **self.beside.rewritten, "config.json": self.beside.config},
            config=self.config,
            samples=self.samples,
            computed_in=self.source.dtype,
            device=self._device,
            options={"max_shard_bytes": self.max_shard_bytes, **options},
        )

    def make(self, run: UnfinishedRun) -> None:
        """Fill the run's result with all but its manifest, and prove it."""
        run.begin_result(self.plan, max_shard_bytes=self.max_shard_bytes)
        late = self._late()
        unchanged = [name for name in self.plan if name in self.source.reader.entries]
        if run.finished(_COPIED) is None:
            self._copy(run, [name for name in unchanged if name not in late])
            run.finish(_COPIED, True)
        stream = self._walk(run)
        with run.ranks.agreed():
            if run.ranks.writer:
                self._complete(run, stream, unchanged, late)

    def _complete(self, run: UnfinishedRun, stream: Stream, unchanged: list[str], late: set[str]) -> None:
        """Write what lies beside the quantized weights, and prove the result."""
        self._copy(run, [name for name in unchanged if name in late - changed_by_folds(run)])
        assert run.writer is not None
        done = [f"{record.name}.{part}" for record in log_of(run).modules for part in PARTS]
        run.writer.written_before([*done, *changed_by_folds(run), *(name for name in unchanged if name not in late)])
        run.writer.close()
        self.beside.write(run.result, quantization_keys(self.config, self.quantized, self.skipped))
        self._prove(run, stream)

    def describe(self, run: UnfinishedRun) -> None:
        """Write the log and the manifest of a result that is complete but for these."""
        write_manifest(
            run.result,
            source=self.source.folder,
            source_files=self._hashes["source"],
            adapter=self.adapter,
            adapter_files=self._hashes.get("adapter", {}),
            config_changes=self.source.config_changes,
            config=self.config,
            data=self.data,
            log=log_of(run),
            computed_in=str(self.source.dtype).removeprefix("torch."),
        )

    def _late(self) -> set[str]:
        """The tensors that are no quantized weights and that the walk may change."""
        if not self.config.recipe.folds:
            return set()
        return foldable(self.source.layout, len(block_list(self.source.model, self.source.layout)))

    def _copy(self, run: UnfinishedRun, names: list[str]) -> None:
        if run.writer is not None:
            for name in names:
                run.writer.write_chunks(name, self.source.finite_chunks(name))

    def _walk(self, run: UnfinishedRun) -> Stream:
        source, written = self.source, run.writer

        def keep(name: str, tensor: Tensor) -> None:
            if written is not None:
                written.write(name, tensor)

        def emit(name: str, layer: nn.Linear, solution: Solution, settings: QuantizeConfig) -> None:
            if written is not None:
                packed = QuantLinear.from_codes(
                    *solution.packable(), bits=settings.bits, group_size=settings.group_size
                )
                for part, tensor in packed.state_dict().items():
                    written.write(f"{name}.{part}", tensor)

        source.load_outside(with_head=False)
        stream, streams = self._captured(run)
        outputs: Mapping[str, Tensor] = {}
        if self.config.recipe.output:
            outputs = output_moments(source, stream, self._device, run=run, on_progress=self.on_progress)
        source.release_outside()
        if not streams.block:
            streams.begin_exact()
        walk = Walk(
            source,
            self.config,
            emit,
            self.on_module,
            outputs,
            keep,
            {name: DTYPES[spec.dtype] for name, spec in self.plan.items()}.get,
            run,
            self._weight_of(run),
        )
        walk.run(stream, streams)
        return stream

    def _captured(self, run: UnfinishedRun) -> tuple[Stream, Streams]:
        """The samples in front of block 0, or of the block that an earlier process came to."""
        lengths = [len(sample.input_ids) for sample in self.samples]
        made: list[Streams] = []
        mine = set(run.ranks.mine(range(len(lengths))))

        def keep(number: int, hidden: Tensor) -> None:
            if not made:
                exact = self.config.recipe.needs_exact_stream
                sizes = (hidden.shape[2], hidden.dtype, self._device)
                made.append(Streams(run, lengths, *sizes, with_exact=exact, spilled=self.spills))
                made[0].restore()
            if not made[0].restored and number in mine:
                made[0].hidden[number] = hidden

        stream = capture(self.source, self.samples, self._device, keep=keep)
        stream.hidden = made[0].hidden
        return stream, made[0]

    def _weight_of(self, run: UnfinishedRun) -> Callable[[str], Tensor]:
        """Reads the weight [out, in] of a linear that is finished, as every reader of the file computes it."""
        reader: list[CheckpointReader] = []

        def weight_of(name: str) -> Tensor:
            settings = self.config.for_module(name)
            assert settings is not None
            with run.own_result():
                if not reader:
                    reader.append(CheckpointReader(run.result))
                parts = [reader[0].read(f"{name}.{part}") for part in PARTS]
            return dequantize(*parts, bits=settings.bits).T.to(self._device)

        return weight_of

    def _prove(self, run: UnfinishedRun, stream: Stream) -> None:
        """Read the written folder again, and have it compute what the walk computed."""
        self.source.load_outside(with_head=True)
        with torch.no_grad():
            walked = head(self.source, stream.hidden[0], self._device)
        self.source.release_outside()
        with run.own_result():
            again = reopen(run.result, dtype=self.source.dtype, device=self._device)
            written = _logits_of(again, self.samples[0], self._device)
        check_logits(written, walked)


def _logits_of(source: StreamedModel, sample: Sample, device: torch.device | str) -> Tensor:
    """Logits [1, T, vocab] of one sample through a folder that is read block by block."""
    source.load_outside(with_head=False)
    stream = capture(source, [sample], device)
    source.release_outside()
    hidden = stream.hidden[0]
    with torch.inference_mode():
        for index in range(len(block_list(source.model, source.layout))):
            hidden = first_output(source.load(index)(hidden, **stream.calls[0][index]))
            source.release(index)
        source.load_outside(with_head=True)
        return head(source, hidden, device)
