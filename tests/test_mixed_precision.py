"""Mixed precision: sizes are met from below, rules say exactly what was chosen, and what is claimed was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import qquant
import qquant.mixed_precision
import qquant.sensitivity
from qquant.checkpoint import QUANTIZED_FOLDER, reopen
from qquant.cli import app
from qquant.config import QuantizeConfig
from qquant.divergence import Divergence, divergence
from qquant.errors import BadDataError, NumericError, UsageError
from qquant.mixed_precision import RECORD_NAME, Choice, MixedPrecision, choose, measure
from qquant.mixed_settings import rules_for, settings_of
from qquant.quantizing import quantize_checkpoint, quantize_mixed
from qquant.samples import Sample, samples_from_ids
from qquant.sources import StreamedModel
from qquant.stage_costs import StageShape
from tests.adapters import saved, trained
from tests.conftest import CORPUS, VOCAB, Factory
from tests.processor import BFLOAT16

CONFIG = QuantizeConfig(method="gptq", bits=4, group_size=64)
SIBLINGS = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]


def some_samples(count: int = 12, length: int = 32) -> list[Sample]:
    return samples_from_ids(torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def mixed(tiny_qwen2: Path) -> MixedPrecision:
    return measure(tiny_qwen2, some_samples(), CONFIG, sensitivity_tokens=256)


def between(mixed: MixedPrecision, share: float) -> int:
    """A size so far from the smallest to the largest."""
    least, most = (mixed.allocator.least_bytes, mixed.allocator.most_bytes)
    smallest = mixed.frontier()[0].point.size_bytes
    return smallest + int(share * (most - least))


def int4_kl(mixed: MixedPrecision) -> float:
    """What is predicted of all stages at 4 bits."""
    four = mixed.pure(4)
    assert four is not None
    return four.predicted_kl


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def settings_in(choice: Choice, mixed: MixedPrecision) -> dict[str, tuple[int, int]]:
    return {
        name: (stage.settings[place].bits, stage.settings[place].group_size)
        for stage, place in zip(mixed.costs, choice.chosen, strict=True)
        for name in stage.shape.names
    }


@pytest.mark.parametrize("share", [0.03, 0.2, 0.5, 0.8, 0.97])
def test_a_size_is_met_from_below_within_two_percent_to_the_byte(
    mixed: MixedPrecision, tmp_path: Path, share: float
) -> None:
    target = between(mixed, share)
    seen: list[Choice] = []
    quantize_mixed(mixed, tmp_path / "q", target_bytes=target, on_choice=lambda choice, before: seen.append(choice))
    assert weight_bytes(tmp_path / "q") == seen[0].point.size_bytes
    assert 0.98 * target <= seen[0].point.size_bytes <= target


def test_a_size_counts_every_shard(tiny_qwen2: Path, tmp_path: Path) -> None:
    mixed = measure(tiny_qwen2, some_samples(), CONFIG, sensitivity_tokens=256, max_shard_bytes=60_000)
    target = between(mixed, 0.4)
    quantize_mixed(mixed, tmp_path / "q", target_bytes=target)
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 2
    assert 0.98 * target <= weight_bytes(tmp_path / "q") <= target


def test_predicted_costs_lie_under_the_line_between_pure_choices(mixed: MixedPrecision) -> None:
    four, eight = mixed.pure(4), mixed.pure(8)
    assert four is not None
    assert eight is not None
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        point = mixed.for_size(int(four.size_bytes + share * (eight.size_bytes - four.size_bytes))).point
        part = (point.size_bytes - four.size_bytes) / (eight.size_bytes - four.size_bytes)
        assert point.predicted_kl <= four.predicted_kl + part * (eight.predicted_kl - four.predicted_kl)


def test_rules_say_what_was_chosen_and_nothing_else(mixed: MixedPrecision) -> None:
    for share in (0.2, 0.5, 0.8):
        choice = mixed.for_size(between(mixed, share))
        expected = settings_in(choice, mixed)
        got = {name: choice.config.for_module(name) for name in expected}
        assert {name: (one.bits, one.group_size) for name, one in got.items() if one} == expected
        for rule in choice.config.dynamic:
            assert rule.startswith("+:")
            assert rule.endswith("$")


def test_linears_that_share_an_input_get_one_setting(mixed: MixedPrecision) -> None:
    choice = mixed.for_size(between(mixed, 0.5))
    chosen = settings_in(choice, mixed)
    for block in range(2):
        for together in SIBLINGS:
            assert len({chosen[f"model.layers.{block}.{name}"] for name in together}) == 1


def some_rules(chosen: dict[int, tuple[int, int]], count: int = 12) -> dict[str, Any]:
    """Rules for q, k and v of some of ``count`` blocks, which take (bits, group size)."""
    shapes = [
        StageShape(tuple(f"model.layers.{i}.{name}" for name in SIBLINGS[0]), (64, 32, 32), 64) for i in range(count)
    ]
    general = QuantizeConfig(bits=4, group_size=64)
    settings = [
        general if i not in chosen else QuantizeConfig(bits=chosen[i][0], group_size=chosen[i][1])  # type: ignore[arg-type]
        for i in range(count)
    ]
    return {
        rule: change.model_dump(exclude_none=True)
        for rule, change in rules_for(shapes, settings, general, "model.layers").items()
    }


QKV = r"self_attn\.(?:q_proj|k_proj|v_proj|qkv_proj)$"


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, {}),
        ({1: (8, 64)}, {rf"+:model\.layers\.1\.{QKV}": {"bits": 8}}),
        ({1: (8, 64), 11: (8, 64)}, {rf"+:model\.layers\.(?:1|11)\.{QKV}": {"bits": 8}}),
        ({i: (4, 32) for i in range(12)}, {rf"+:model\.layers\.\d+\.{QKV}": {"group_size": 32}}),
        (
            {0: (4, 32), 2: (8, 32)},
            {
                rf"+:model\.layers\.0\.{QKV}": {"group_size": 32},
                rf"+:model\.layers\.2\.{QKV}": {"bits": 8, "group_size": 32},
            },
        ),
    ],
    ids=["none", "one", "two", "all", "two settings"],
)
def test_one_rule_tells_of_one_setting(chosen: dict[int, tuple[int, int]], expected: dict[str, Any]) -> None:
    assert some_rules(chosen) == expected


def test_rules_match_whole_names_and_the_fused_names_of_other_readers() -> None:
    (rule,) = some_rules({1: (8, 64)})
    for name in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
        assert re.match(rule[2:], f"model.layers.1.self_attn.{name}")
    for name in (
        "model.layers.11.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj.base",
        "modelxlayers.1.self_attn.q_proj",
    ):
        assert not re.match(rule[2:], name)


def test_the_folder_tells_what_was_chosen_from(mixed: MixedPrecision, tmp_path: Path) -> None:
    target = between(mixed, 0.5)
    _, found = quantize_mixed(mixed, tmp_path / "q", target_bytes=target)
    record = json.loads((tmp_path / "q" / RECORD_NAME).read_text())
    assert record["target"] == {"size_bytes": target}
    assert record["measured_kl"] == found.kl > 0
    assert record["chosen"]["size_bytes"] == weight_bytes(tmp_path / "q")
    sizes = [point["size_bytes"] for point in record["frontier"]]
    assert sizes == sorted(sizes)
    assert 5 <= len(sizes) <= 10
    named = {name for stage in record["stages"] for name in stage["modules"]}
    assert len(named) == 14
    predicted = [stage["settings"][stage["chosen"]]["predicted_kl"] for stage in record["stages"]]
    assert sum(predicted) == pytest.approx(record["chosen"]["predicted_kl"])
    manifest = json.loads((tmp_path / "q" / "manifest.json").read_text())
    assert RECORD_NAME in manifest["files"]


def test_the_checkpoint_loads_with_its_mixed_settings(mixed: MixedPrecision, tmp_path: Path) -> None:
    target = between(mixed, 0.5)
    choice = mixed.for_size(target)
    quantize_mixed(mixed, tmp_path / "q", target_bytes=target)
    model = qquant.load_quantized(tmp_path / "q", dtype=torch.float32)
    for name, (bits, size) in settings_in(choice, mixed).items():
        layer: Any = model.get_submodule(name)
        assert (layer.bits, layer.group_size) == (bits, size)


def test_held_out_samples_are_used_for_nothing_else(tiny_qwen2: Path) -> None:
    samples = some_samples(40)
    mixed = measure(tiny_qwen2, samples, CONFIG, sensitivity_tokens=256)
    kept = {tuple(one.input_ids.tolist()) for one in mixed.check}
    used = {tuple(one.input_ids.tolist()) for one in mixed.calibration}
    assert len(kept) == 5
    assert not kept & used
    assert kept | used == {tuple(one.input_ids.tolist()) for one in samples}


def test_the_smallest_files_under_a_limit_are_measured_to_be_under_it(mixed: MixedPrecision, tmp_path: Path) -> None:
    four = mixed.pure(4)
    assert four is not None
    limit = four.predicted_kl / 2
    seen: list[Choice] = []
    _, found = quantize_mixed(mixed, tmp_path / "q", max_kl=limit, on_choice=lambda choice, before: seen.append(choice))
    assert found.kl <= limit
    assert seen[0].point.predicted_kl * qquant.mixed_precision.MARGIN <= limit
    assert four.size_bytes < seen[-1].point.size_bytes


def test_a_limit_that_is_missed_is_tried_again_more_strictly(
    mixed: MixedPrecision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = int4_kl(mixed) / 2
    answers = iter([Divergence(limit * 1.5, None, 1), Divergence(limit * 0.9, None, 1)])
    monkeypatch.setattr(MixedPrecision, "measured_kl", lambda self, folder: next(answers))
    seen: list[Choice] = []
    told: list[float | None] = []

    def on_choice(choice: Choice, before: float | None) -> None:
        seen.append(choice)
        told.append(before)

    _, found = quantize_mixed(mixed, tmp_path / "q", max_kl=limit, on_choice=on_choice)
    assert found.kl == limit * 0.9
    assert told == [None, limit * 1.5]
    assert seen[1].point.size_bytes > seen[0].point.size_bytes
    # What was measured tells how much too low predictions are: the next one must stay under the limit by that.
    assert seen[1].point.predicted_kl * (1.5 * limit / seen[0].point.predicted_kl) <= limit
    record = json.loads((tmp_path / "q" / RECORD_NAME).read_text())
    assert record["chosen"]["size_bytes"] == seen[1].point.size_bytes == weight_bytes(tmp_path / "q")


def test_a_limit_that_is_undercut_by_far_is_met_with_fewer_bytes(
    mixed: MixedPrecision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a method that is better than the one that costs are measured with."""
    limit = int4_kl(mixed) / 4
    seen: list[Choice] = []
    monkeypatch.setattr(
        MixedPrecision, "measured_kl", lambda self, folder: Divergence(0.4 * seen[-1].point.predicted_kl, None, 1)
    )
    _, found = quantize_mixed(mixed, tmp_path / "q", max_kl=limit, on_choice=lambda choice, before: seen.append(choice))
    assert len(seen) == 2
    assert seen[1].point.size_bytes < seen[0].point.size_bytes
    assert found.kl == 0.4 * seen[1].point.predicted_kl <= limit


def test_what_misses_its_limit_is_never_published(
    mixed: MixedPrecision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = int4_kl(mixed)
    monkeypatch.setattr(MixedPrecision, "measured_kl", lambda self, folder: Divergence(1.01 * limit, None, 1))
    with pytest.raises(UsageError, match=r"was missed 4 times, the last measured .*; nothing was published"):
        quantize_mixed(mixed, tmp_path / "q", max_kl=limit)
    assert list(tmp_path.iterdir()) == []


def test_a_second_try_that_cannot_be_chosen_leaves_room_for_another_target(
    mixed: MixedPrecision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = int4_kl(mixed)
    with monkeypatch.context() as patched:
        patched.setattr(MixedPrecision, "measured_kl", lambda self, folder: Divergence(1e6 * limit, None, 1))
        with pytest.raises(UsageError, match="no choice of settings is sure to stay under"):
            quantize_mixed(mixed, tmp_path / "q", max_kl=limit)
    assert list(tmp_path.iterdir()) == []
    quantize_mixed(mixed, tmp_path / "q", target_bytes=between(mixed, 0.5))


def test_a_second_try_that_fails_for_good_takes_the_first_with_it(
    mixed: MixedPrecision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def measured(self: MixedPrecision, folder: Path) -> Divergence:
        tries.append(folder)
        if len(tries) > 1:
            raise NumericError("logits must be finite")
        return Divergence(1.5 * int4_kl(mixed), None, 1)

    monkeypatch.setattr(MixedPrecision, "measured_kl", measured)
    with pytest.raises(NumericError):
        quantize_mixed(mixed, tmp_path / "q", max_kl=int4_kl(mixed))
    assert len(tries) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_cannot_be_met_is_refused_with_what_can(mixed: MixedPrecision) -> None:
    least, most = mixed.frontier()[0].point.size_bytes, between(mixed, 1.0)
    for target in (least - 1, int(most / 0.98) + 500):
        with pytest.raises(
            UsageError, match=r"must lie between \d+ bytes \(8 stages Int4 g64\) and \d+ bytes \(8 stages Int8"
        ):
            mixed.for_size(target)
    assert mixed.for_size(least).point.size_bytes == least


def test_a_kl_that_cannot_be_met_is_refused_with_the_least(mixed: MixedPrecision) -> None:
    with pytest.raises(UsageError, match=r"stay under a KL of 1e-12; the least that is predicted is .* Int8 g64"):
        mixed.for_kl(1e-12)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "no target": ({}, {}, UsageError, "either target_bytes or max_kl"),
    "two targets": ({}, {"target_bytes": 10, "max_kl": 1.0}, UsageError, "either target_bytes or max_kl"),
    "other bits": ({"bits": 8}, {"max_kl": 1.0}, UsageError, "bits must be left at 4, got 8"),
    "everything skipped": ({"dynamic": {"-:.*": {}}}, {"max_kl": 1.0}, UsageError, "nothing to choose"),
    "siblings apart": (
        {"dynamic": {r"+:.*q_proj": {"bits": 8}}},
        {"max_kl": 1.0},
        UsageError,
        "share an input must have the same settings",
    ),
}


@pytest.mark.parametrize(("settings", "target", "error", "words"), list(REFUSED.values()), ids=list(REFUSED))
def test_what_makes_no_sense_is_refused(
    tiny_qwen2: Path, settings: dict[str, Any], target: dict[str, Any], error: type[Exception], words: str
) -> None:
    config = QuantizeConfig.from_dict({"bits": 4, "group_size": 64, **settings})
    with pytest.raises(error, match=words):
        choose(tiny_qwen2, some_samples(), config, **target)


@pytest.mark.parametrize("samples", [None, some_samples(2)], ids=["none", "two"])
def test_too_few_samples_are_refused(tiny_qwen2: Path, samples: list[Sample] | None) -> None:
    with pytest.raises(BadDataError, match="at least 3 calibration samples"):
        choose(tiny_qwen2, samples, CONFIG, max_kl=1.0)


def test_rules_of_the_user_stay_and_their_modules_are_left_to_them(tiny_qwen2: Path, tmp_path: Path) -> None:
    rules = {r"-:.*\.0\.mlp\.down_proj$": {}, r"+:.*o_proj$": {"bits": 8, "group_size": 32}}
    config = QuantizeConfig.from_dict({"bits": 4, "group_size": 64, "dynamic": rules})
    mixed = measure(tiny_qwen2, some_samples(), config, sensitivity_tokens=256)
    choice = mixed.for_size(between(mixed, 0.5))
    assert list(choice.config.dynamic)[:2] == list(rules)
    assert choice.config.for_module("model.layers.0.mlp.down_proj") is None
    for block in range(2):
        found = choice.config.for_module(f"model.layers.{block}.self_attn.o_proj")
        assert found is not None
        assert (found.bits, found.group_size) == (8, 32)
    quantize_mixed(mixed, tmp_path / "q", target_bytes=between(mixed, 0.5))
    assert weight_bytes(tmp_path / "q") == choice.point.size_bytes


def test_rows_that_no_group_divides_get_whole_rows_of_eight_bits() -> None:
    config = QuantizeConfig(bits=4, group_size=64, act_group_aware=True)
    (only,) = settings_of(StageShape(("model.layers.0.mlp.down_proj",), (64,), 172), config)
    assert (only.bits, only.group_size) == (8, -1)


def test_a_linear_that_no_format_holds_is_refused_with_the_way_around() -> None:
    with pytest.raises(UsageError, match=r"rows of 171 columns fit neither 4 nor 8 bits.*--skip '\.\*down_proj'"):
        settings_of(StageShape(("model.layers.0.mlp.down_proj",), (64,), 171), CONFIG)


def test_a_config_chosen_by_itself_quantizes_as_usual(tiny_qwen2: Path, tmp_path: Path) -> None:
    samples, target = some_samples(), 232_000
    config = choose(tiny_qwen2, samples, CONFIG, target_bytes=target, sensitivity_tokens=256)
    quantize_checkpoint(tiny_qwen2, samples, config, tmp_path / "q")
    assert 0.98 * target <= weight_bytes(tmp_path / "q") <= target


@pytest.mark.parametrize("method", ["best", "gptq", "rtn"])
def test_every_block_structured_model_can_be_mixed(checkpoint: Factory, tmp_path: Path, method: str) -> None:
    """gemma2 is in no table: its stages are found by watching it."""
    folder = checkpoint("gemma2", head_dim=16)
    config = QuantizeConfig.from_dict({"bits": 4, "group_size": 64, "method": method})
    mixed = measure(folder, some_samples(), config, sensitivity_tokens=256)
    target = between(mixed, 0.5)
    quantize_mixed(mixed, tmp_path / "q", target_bytes=target)
    assert 0.98 * target <= weight_bytes(tmp_path / "q") <= target


def test_an_adapter_is_measured_and_merged(tiny_qwen2: Path, tmp_path: Path) -> None:
    adapter = saved(trained(tiny_qwen2), tmp_path / "lora")
    mixed = measure(tiny_qwen2, some_samples(), CONFIG, sensitivity_tokens=256, adapter=adapter)
    _, found = quantize_mixed(mixed, tmp_path / "q", target_bytes=between(mixed, 0.5))
    manifest = json.loads((tmp_path / "q" / "manifest.json").read_text())
    assert "adapter" in manifest
    # Against the model without its adapter it would be far off.
    plain = StreamedModel(tiny_qwen2, dtype=torch.float32)
    other = reopen(tmp_path / "q", dtype=torch.float32, device="cpu")
    assert found.kl < divergence(plain, other, mixed.check).kl / 2


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calib.txt"
    file.write_text("\n".join(f"{i} {line}" for i in range(40) for line in CORPUS), encoding="utf-8")
    return file


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["quantize", *map(str, arguments)])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def test_the_command_shows_what_it_chose_from_and_who_can_read_it(
    tiny_qwen2: Path, text: Path, tmp_path: Path, mixed: MixedPrecision
) -> None:
    target = between(mixed, 0.5)
    common = ["--model", tiny_qwen2, "--data", text, "--seq-len", 64, "--n-samples", 16, "--group-size", 64]
    common += ["--out", tmp_path / "q", "--sensitivity-tokens", 256, "--target-size", f"{target / 2**20:.4f}MiB"]
    code, stdout, shown = run(*common, "--dry-run")
    assert code == 0, shown
    assert list(tmp_path.iterdir()) == []
    assert re.search(r"linears   \d+ to 4 bits, \d+ to 8 bits, 0 left alone", stdout)
    assert shown.count("->") == 1
    assert "predicted KL" in shown
    assert "measured KL" not in shown
    code, stdout, stderr = run(*common)
    assert code == 0, stderr
    assert stdout == f"{tmp_path / 'q'}\n"
    assert re.search(
        r"measured KL \d\.\d\de-\d\d \(standard error \d\.\de-\d\d\) on \d+ tokens that were used for nothing else",
        stderr,
    )
    assert "followed by qquant, GPTQModel's own loader, vLLM and SGLang (" in stderr
    assert QUANTIZED_FOLDER.recognizes(tmp_path / "q")
    assert 0.98 * target <= weight_bytes(tmp_path / "q") <= target


COMMANDS: dict[str, tuple[list[str], int, str]] = {
    "two targets": (["--target-size", "1GiB", "--max-kl", "0.1"], 2, "two targets"),
    "no size": (["--target-size", "much"], 2, "--target-size must be a size such as 24GiB"),
    "a size without a unit": (["--target-size", "4.6"], 2, "--target-size must be a size such as 24GiB"),
    "no divergence": (["--max-kl", "0"], 2, "--max-kl must be above 0"),
    "not a number": (["--max-kl", "nan"], 2, "--max-kl must be above 0"),
    "too small": (["--target-size", "1000KiB"], 2, "the size target must lie between"),
    "other bits": (["--bits", "8", "--max-kl", "0.1"], 2, "bits must be left at 4"),
}


@pytest.mark.parametrize(("options", "code", "words"), list(COMMANDS.values()), ids=list(COMMANDS))
def test_the_command_refuses_with_the_rule(
    tiny_qwen2: Path, text: Path, tmp_path: Path, options: list[str], code: int, words: str
) -> None:
    common = ["--model", tiny_qwen2, "--data", text, "--seq-len", 64, "--n-samples", 8, "--group-size", 64]
    got, _, stderr = run(*common, "--out", tmp_path / "q", *options)
    assert got == code
    assert words in stderr
    # What was measured before a target turns out to be one that cannot be met is of use to another target.
    assert [path.name for path in tmp_path.iterdir()] == ["q.unfinished-measured"] * ("must lie between" in words)


def test_another_target_goes_on_with_what_was_measured(
    tiny_qwen2: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed: MixedPrecision
) -> None:
    common = ["--model", tiny_qwen2, "--data", text, "--seq-len", 64, "--n-samples", 16, "--group-size", 64]
    common += ["--sensitivity-tokens", 256, "--out"]
    target = f"{between(mixed, 0.5) / 2**20:.4f}MiB"
    code, _, stderr = run(*common, tmp_path / "whole", "--target-size", target)
    assert code == 0, stderr
    code, _, stderr = run(*common, tmp_path / "q", "--target-size", "1000KiB")
    assert code == 2
    assert f"what was measured is kept in {tmp_path / 'q'}.unfinished-measured for another target" in stderr
    monkeypatch.setattr(qquant.sensitivity, "_Pass", None)  # nothing is measured from here on
    code, _, stderr = run(*common, tmp_path / "q", "--target-size", target)
    assert code == 0, stderr
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "q" / file.name).read_bytes() == file.read_bytes(), file.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "whole"]


def test_what_was_measured_of_something_else_is_refused(tiny_qwen2: Path, text: Path, tmp_path: Path) -> None:
    common = ["--model", tiny_qwen2, "--data", text, "--seq-len", 64, "--n-samples", 8, "--group-size", 64]
    common += ["--target-size", "1000KiB", "--out", tmp_path / "q"]
    assert run(*common)[0] == 2
    code, _, stderr = run(*common, "--sensitivity-tokens", 512)
    assert code == 2
    assert "sensitivity_tokens was 2048 and is 512" in stderr


def test_a_target_needs_data_whatever_the_method(tiny_qwen2: Path, tmp_path: Path) -> None:
    got, _, stderr = run("--model", tiny_qwen2, "--method", "rtn", "--max-kl", "0.1", "--out", tmp_path / "q")
    assert got == 2
    assert "needs calibration data" in stderr


@pytest.mark.slow  # quantizes the reference model three times
@pytest.mark.skipif(not BFLOAT16, reason="takes minutes without AVX-512")
def test_the_reference_model_lies_under_its_line(tmp_path: Path) -> None:
    folder = Path(__file__).parent.parent / "examples" / "reference-model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples = qquant.load_samples(folder / "calib.txt", tokenizer, n_samples=24, seq_len=128)
    held_out = qquant.load_samples(folder / "eval.txt", tokenizer, n_samples=12, seq_len=128)
    mixed = measure(folder, samples, QuantizeConfig(method="gptq"), sensitivity_tokens=512)
    measured: list[tuple[int, float]] = []
    for bits in (4, 8):
        pure = tmp_path / f"int{bits}"
        quantize_checkpoint(folder, mixed.calibration, QuantizeConfig(method="gptq", bits=bits), pure)
        other = reopen(pure, dtype=torch.float32, device="cpu")
        measured.append((weight_bytes(pure), divergence(mixed.source, other, held_out).kl))
    (small, worst), (large, best) = measured
    target = (small + large) // 2
    quantize_mixed(mixed, tmp_path / "mixed", target_bytes=target)
    size = weight_bytes(tmp_path / "mixed")
    assert 0.98 * target <= size <= target
    kl = divergence(mixed.source, reopen(tmp_path / "mixed", dtype=torch.float32, device="cpu"), held_out).kl
    assert kl <= worst + (size - small) / (large - small) * (best - worst)
    assert kl < worst / 2  # it is a quarter of the line in docs/mixed-precision.md
