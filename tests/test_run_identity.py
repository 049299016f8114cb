"""What a result depends on: the same for every rank, and another one wherever last bits might differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qquant import _native, run_identity
from qquant.calibrate import samples_from_ids
from qquant.config import QuantizeConfig
from qquant.errors import UsageError
from qquant.run_identity import refuse_another_run


def identity(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "files": {},
        "beside": {},
        "config": QuantizeConfig(),
        "samples": samples_from_ids([[1, 2, 3]]),
        "computed_in": torch.float32,
        "device": "cpu",
        "options": {},
    }
    return run_identity.run_identity(**{**given, **changes})


def test_ranks_that_were_told_the_same_go_on() -> None:
    refuse_another_run(identity(), {**identity(), "sha256 of model.safetensors": "only the first rank hashes"}, 1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"config": QuantizeConfig(bits=8)}, "bits is '8' of rank 1 and '4' of the first"),
        ({"samples": samples_from_ids([[1, 2, 4]])}, "calibration samples is"),
        ({"computed_in": torch.bfloat16}, "compute dtype is 'bfloat16' of rank 1"),
    ],
)
def test_a_rank_that_was_told_otherwise_is_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=f"all ranks must do the same, but {named}.*start them with one command"):
        refuse_another_run(identity(**changes), identity(), 1)


def test_a_processor_with_other_instructions_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    class Host:
        def __init__(self, *there: str) -> None:
            self.there = there

        def cpu_features(self) -> dict[str, bool]:
            return {name: name in self.there for name in ("avx512f", "avx512_bf16")}

    monkeypatch.setattr(_native, "host", lambda: Host("avx512f"))
    before = identity()
    monkeypatch.setattr(_native, "host", lambda: Host("avx512f", "avx512_bf16"))
    differing = [key for key, value in identity().items() if value != before[key]]
    assert differing == ["processor"]
    assert str(before["processor"]).endswith("avx512f")
