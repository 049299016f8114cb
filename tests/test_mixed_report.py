"""What is told and recorded of a mix: how sure its KL is, the line to stay under, what it has seen, who reads it."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qquant.cli import app
from qquant.config import QuantizeConfig
from qquant.divergence import Divergence, mean_of
from qquant.mixed_precision import BEST_LEAVES, FEW_CHECK_TOKENS, RECORD_NAME, MixedPrecision, measure
from qquant.mixed_settings import READERS
from qquant.overlap import overlap_of
from qquant.quantizing import quantize_mixed
from qquant.samples import Sample, samples_from_ids
from tests.conftest import CORPUS, VOCAB

CONFIG = QuantizeConfig(method="gptq", bits=4, group_size=64)


def some_samples(count: int, length: int = 32) -> list[Sample]:
    return samples_from_ids(torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def mixed(tiny_qwen2: Path) -> MixedPrecision:
    """Two of its samples of 32 tokens are kept apart for the check."""
    return measure(tiny_qwen2, some_samples(16), CONFIG, sensitivity_tokens=256)


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qquant.telling.said", set())


def halfway(mixed: MixedPrecision) -> int:
    small, large = mixed.ends
    return (small.size_bytes + large.size_bytes) // 2


# --- how sure a measured KL is


def test_the_error_over_samples_of_one_length_is_that_of_the_mean_of_their_means() -> None:
    means = [0.1, 0.25, 0.2, 0.4]
    found = mean_of([50 * one for one in means], [50] * 4)
    assert found.kl == pytest.approx(statistics.mean(means))
    assert found.stderr == pytest.approx(statistics.stdev(means) / 2)  # the root of four samples
    assert found.tokens == 200


def test_samples_that_agree_token_by_token_leave_no_doubt_whatever_their_length() -> None:
    assert mean_of([0.25, 1.0, 2.5], [1, 4, 10]) == Divergence(0.25, 0.0, 15)


def test_of_samples_of_different_lengths_long_ones_count_for_more() -> None:
    """The jackknife, which leaves one sample out at a time, is another way to the same error."""
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(20, 60, (400,), generator=draw).tolist()
    sums = [count * float(0.2 + 0.05 * torch.randn((), generator=draw)) for count in counts]
    found = mean_of(sums, counts)
    left = [(sum(sums) - s) / (sum(counts) - n) for s, n in zip(sums, counts, strict=True)]
    jackknife = math.sqrt(399 / 400 * sum((one - statistics.mean(left)) ** 2 for one in left))
    assert found.stderr is not None
    # They differ in the second order: by the share of a sample in all tokens, at most 60 of 16000.
    assert found.stderr == pytest.approx(jackknife, rel=2 * 60 / sum(counts))


def test_a_single_sample_does_not_tell_how_sure_it_is() -> None:
    assert mean_of([1.0], [10]) == Divergence(0.1, None, 10)


def test_the_record_says_how_sure_the_measured_kl_is(mixed: MixedPrecision, tmp_path: Path) -> None:
    _, found = quantize_mixed(mixed, tmp_path / "q", target_bytes=halfway(mixed))
    record = json.loads((tmp_path / "q" / RECORD_NAME).read_text())
    assert found.stderr is not None
    assert 0 < found.stderr < found.kl
    assert (record["measured_kl"], record["measured_kl_stderr"]) == (found.kl, found.stderr)
    assert record["measured_on_tokens"] == found.tokens == 64


def test_a_limit_held_to_few_tokens_is_warned_of(
    mixed: MixedPrecision, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantize_mixed(mixed, tmp_path / "size", target_bytes=halfway(mixed))
    assert not caplog.records
    quantize_mixed(mixed, tmp_path / "limit", max_kl=mixed.ends[0].predicted_kl)
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith("the limit on KL is held to what is measured on 64 tokens, and a mean over fewer than 2048")


def test_a_limit_held_to_enough_tokens_is_not(
    mixed: MixedPrecision, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed, "check", mixed.check * (FEW_CHECK_TOKENS // 64))
    quantize_mixed(mixed, tmp_path / "q", max_kl=mixed.ends[0].predicted_kl)
    assert not caplog.records


# --- what costs are measured on


def test_costs_measured_on_samples_of_the_hessians_are_said_once(
    tiny_qwen2: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        measure(tiny_qwen2, some_samples(12), CONFIG, sensitivity_tokens=8 * 256)
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith("costs are measured on samples that are in the Hessians too, so that they may come out too ")
    assert "8 of 11 samples would be needed apart" in told
    assert "--n-samples" in told


@pytest.mark.parametrize(("method", "tokens"), [("gptq", 256), ("rtn", 8 * 256)], ids=["apart", "no Hessians"])
def test_nothing_is_said_where_costs_are_measured_apart(
    tiny_qwen2: Path, caplog: pytest.LogCaptureFixture, method: str, tokens: int
) -> None:
    config = QuantizeConfig.from_dict({"method": method, "group_size": 64})
    measure(tiny_qwen2, some_samples(12), config, sensitivity_tokens=tokens)
    assert not caplog.records


# --- the line between the ends


def test_the_line_goes_through_both_ends_and_every_point_of_the_frontier_lies_on_or_under_it(
    mixed: MixedPrecision,
) -> None:
    small, large = mixed.ends
    assert (small, large) == (mixed.pure(4), mixed.pure(8))
    assert mixed.line_kl(small.size_bytes) == small.predicted_kl
    assert mixed.line_kl(large.size_bytes) == pytest.approx(large.predicted_kl)
    middle = mixed.line_kl((small.size_bytes + large.size_bytes) // 2)
    assert middle == pytest.approx((small.predicted_kl + large.predicted_kl) / 2, rel=1e-4)  # half a byte
    for choice in mixed.frontier():
        assert choice.point.predicted_kl <= mixed.line_kl(choice.point.size_bytes) * (1 + 1e-12)


def test_the_record_holds_the_line_and_the_method_that_predictions_are_of(
    mixed: MixedPrecision, tiny_qwen2: Path, tmp_path: Path
) -> None:
    quantize_mixed(mixed, tmp_path / "q", target_bytes=halfway(mixed))
    record = json.loads((tmp_path / "q" / RECORD_NAME).read_text())
    for point in (record["chosen"], *record["frontier"]):
        assert point["line_predicted_kl"] == mixed.line_kl(point["size_bytes"])
    assert (record["method"], record["prediction"]) == ("gptq", "predicted for method gptq")
    best = measure(tiny_qwen2, some_samples(16), QuantizeConfig(group_size=64), sensitivity_tokens=256)
    assert best.prediction == f"predicted for method gptq, by which stages are compared: best left {BEST_LEAVES} of it"
    best.config = QuantizeConfig(method="fast", group_size=64)
    assert best.prediction == "predicted for method gptq, by which stages are compared, not for fast"


def test_modules_that_a_rule_fixes_are_alike_at_both_ends(tiny_qwen2: Path) -> None:
    config = QuantizeConfig.from_dict({"group_size": 64, "method": "rtn", "dynamic": {"+:.*o_proj$": {"bits": 8}}})
    mixed = measure(tiny_qwen2, some_samples(12), config, sensitivity_tokens=256)
    small, large = mixed.ends
    assert dict(small.stages) == {"Int4 g64": 6, "Int8 g64": 2}
    assert dict(large.stages) == {"Int8 g64": 8}


# --- what it has seen


def seen_of(folder: Path, samples: list[Sample]) -> float:
    """Share of the samples' runs that the manifest's sketch holds; of so few runs it holds all."""
    sketch = json.loads((folder / "manifest.json").read_text())["data"]["sketch"]
    found = overlap_of(sketch, *(sample.input_ids for sample in samples))
    assert found is not None
    return found.share


def test_samples_that_a_limit_is_held_to_have_been_seen(mixed: MixedPrecision, tmp_path: Path) -> None:
    quantize_mixed(mixed, tmp_path / "limit", max_kl=mixed.ends[0].predicted_kl)
    assert seen_of(tmp_path / "limit", mixed.check) == seen_of(tmp_path / "limit", mixed.calibration) == 1
    quantize_mixed(mixed, tmp_path / "size", target_bytes=halfway(mixed))
    assert seen_of(tmp_path / "size", mixed.check) == 0
    assert seen_of(tmp_path / "size", mixed.calibration) == 1


def test_a_mix_without_calibration_has_seen_what_costs_were_measured_on(tiny_qwen2: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(method="rtn", group_size=64)
    mixed = measure(tiny_qwen2, some_samples(12), config, sensitivity_tokens=256)
    quantize_mixed(mixed, tmp_path / "q", target_bytes=halfway(mixed))
    assert seen_of(tmp_path / "q", mixed.calibration) == 1


# --- what the command shows


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calib.txt"
    file.write_text("\n".join(f"{i} {line}" for i in range(40) for line in CORPUS), encoding="utf-8")
    return file


def run(model: Path, text: Path, out: Path, *options: object) -> str:
    """What the command says on stderr, in one line."""
    common = ["--model", model, "--data", text, "--out", out, "--seq-len", 64, "--n-samples", 16, "--group-size", 64]
    done = CliRunner().invoke(app, ["quantize", *map(str, (*common, *options))])
    assert done.exit_code == 0, done.stderr
    return " ".join(done.stderr.split())


def test_the_command_shows_the_line_and_how_sure_it_is(
    mixed: MixedPrecision, tiny_qwen2: Path, text: Path, tmp_path: Path
) -> None:
    size = ["--target-size", f"{halfway(mixed) / 2**20:.4f}MiB", "--sensitivity-tokens", 256]
    shown = run(tiny_qwen2, text, tmp_path / "q", *size, "--method", "gptq")
    record: dict[str, Any] = json.loads((tmp_path / "q" / RECORD_NAME).read_text())
    assert "weight files predicted KL on the line stages" in shown
    point = record["frontier"][3]
    assert f"{point['size_bytes']:,d} {point['predicted_kl']:.2e} {point['line_predicted_kl']:.2e} " in shown
    assert f"measured KL {record['measured_kl']:.2e} (standard error {record['measured_kl_stderr']:.1e}) on " in shown
    assert "predicted for" not in shown
    assert READERS in shown
    shown = run(tiny_qwen2, text, tmp_path / "none", *size, "--dry-run")
    assert "predicted for method gptq, by which stages are compared: best left" in shown


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], False),
        (["--skip", ".*o_proj"], False),
        (["--override", ".*o_proj$=bits:8"], True),
        (["--override", ".*o_proj$=group_size:32"], True),
        (["--override", ".*o_proj$=bits:4,group_size:64"], False),
        (["--override", ".*no_such_module$=bits:8"], False),
    ],
    ids=["no rule", "a skip", "bits", "groups", "what all have", "a rule for nothing"],
)
def test_who_reads_rules_is_said_where_they_change_the_format(
    tiny_qwen2: Path, text: Path, tmp_path: Path, options: list[str], told: bool
) -> None:
    assert (READERS in run(tiny_qwen2, text, tmp_path / "q", "--method", "rtn", *options)) is told
