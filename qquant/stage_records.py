"""What a run keeps of the walk: which linears of which stage are done, and how; put together as the log of all."""

from __future__ import annotations

from typing import Any

from qquant.config import ModuleRecord, QuantizeLog
from qquant.run import Run

DONE, FOLDED = "done: ", "folded: "
"""In front of the name of a stage, and of a block: the keys of what is kept."""


def piece_of(records: list[ModuleRecord], skipped: list[str]) -> dict[str, Any]:
    """A finished stage, or block, as a run keeps it."""
    return {"modules": [record.model_dump(mode="json") for record in records], "skipped": skipped}


def log_of(run: Run) -> QuantizeLog:
    """What a run's walk did to each module, whichever process did it."""
    pieces = [piece for key, piece in run.items() if key.startswith(DONE) and piece]
    return QuantizeLog(
        modules=tuple(ModuleRecord.model_validate(record) for piece in pieces for record in piece["modules"]),
        skipped=tuple(name for piece in pieces for name in piece["skipped"]),
    )


def changed_by_folds(run: Run) -> set[str]:
    """The tensors that are no quantized weights and that the walk changed."""
    return {name for key, piece in run.items() if key.startswith(FOLDED) for name in piece["changed"]}
