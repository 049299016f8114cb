"""Parts of ``qquant verify``: what is private in a string, which patterns are endless, numbers of packed linears."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qquant import shards
from qquant.checks.packed import PackedLinear, mean_step, packed_values
from qquant.checks.plain import plain_values
from qquant.checks.private_text import local_path, named, relative_path, secret, words_of_prose
from qquant.packing import in_order, pack_codes, pack_zeros
from qquant.rule_patterns import endless
from qquant.shards import CheckpointReader

PATHS = [
    "/home/alice/x", "/Users/bob/models/qwen", "/root/.cache/huggingface", "/tmp/tmp1a2b", "/mnt/nfs/x", "/data/q",
    "/data2/x/y", "/a/b", "/opt", "C:\\Users\\bob", "D:/models/qwen", "\\\\server\\share\\x", "~/models", "~bob/x",
    "file:///home/x", "made from /home/alice/x today", "--model=/mnt/data/q", "['/scratch/u/x']", "c:\\\\Users\\\\x",
    "see file:///srv/models/x", "loaded ~/models/q", "/Volumes/disk/x", "host:/home/alice/x", "/fsx/team/run",
]  # fmt: skip
NO_PATHS = [
    "Qwen/Qwen2.5-7B", "https://huggingface.co/home/x", "http://host:80/data/x", "https://github.com/a/gptqmodel",
    "model.layers.0", "and/or", "1/2", "a /b c", "<|im_start|>", "</s>", "/think", "silu", "s3://bucket/data/x", "",
    "-:^model\\.layers\\.0\\.mlp$", "+:.*\\.(?:1|2)\\.x", "text/plain", "n/a", "km/h", "Apache-2.0", "{{ x }}",
    "regex: \\d+/\\w+", "C: a letter", "utf-8", "docs/home/index.md", "~", "~5/6",
]  # fmt: skip


@pytest.mark.parametrize("text", PATHS)
def test_paths_of_machines_are_seen(text: str) -> None:
    assert local_path(text)


@pytest.mark.parametrize("text", NO_PATHS)
def test_what_only_looks_like_a_path_is_none(text: str) -> None:
    assert local_path(text) is None


def test_paths_that_hold_only_where_they_were_written_are_told_apart() -> None:
    assert relative_path("./out/x")
    assert relative_path("../models")
    assert not relative_path("...")
    assert not relative_path(".hidden")
    assert not relative_path("x/y")


def test_secrets_are_named_by_kind_only() -> None:
    token = "hf_" + "Ab3" * 12
    assert secret(f"token={token}") == "an access token of a model hub"
    assert secret("hf_model") is None
    assert secret("https://example.org/a:b@c") is None
    assert secret("https://user:pass@example.org") == "a password in a URL"


def test_a_name_counts_as_a_whole_word_only() -> None:
    assert named("made on node-17", ["node-17"]) == "node-17"
    assert named("made on node-170", ["node-17"]) is None
    assert named("xnode-17", ["node-17"]) is None


def test_prose_has_many_words_or_many_characters_of_a_writing_without_spaces() -> None:
    assert words_of_prose("the quick brown fox jumps over the lazy dog and runs away") == 12
    assert words_of_prose("float16") == 0
    assert words_of_prose("q_proj k_proj v_proj") == 0
    assert words_of_prose("数" * 24) == 24
    assert words_of_prose("x" * 1000) == 0


@pytest.mark.parametrize(
    "text", ["/" * 100_000, "a/" * 50_000, "~" * 100_000, "\\" * 100_000, "/home" * 20_000, "hf_" * 30_000]
)
def test_looking_at_a_long_string_takes_no_time(text: str) -> None:
    start = time.process_time()
    local_path(text), relative_path(text), secret(text), words_of_prose(text)
    assert time.process_time() - start < 1


ENDLESS = ["(a+)+$", "(.*)*", "(a|ab)*c", "(?:.*x){9}", "((a{1,9}){1,9}){1,9}", ".*" * 6 + "x", "a?" * 40, "x" * 20_000]
HONEST = [
    r".*", r"^model\.layers\.(?:1[0-9]|2[0-3])\..*(gate|up)_proj$", r".*\.layers\..*\.mlp\..*_proj.*", r"lm_head",
    r"model\.layers\.\d+\.mlp\.(?:gate_proj|up_proj|gate_up_proj)$", r"(?!.*lm_head).*", r".*\.(q|k|v)_proj", "(",
]  # fmt: skip


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_that_may_take_for_ever_are_refused(pattern: str) -> None:
    assert endless([pattern])


def test_honest_rules_are_not_refused() -> None:
    assert endless(HONEST) is None
    assert endless([rf"model\.layers\.{i}\.mlp\.down_proj$" for i in range(2000)]) is None


def test_many_costly_patterns_are_refused_together() -> None:
    assert endless([".*a.*b.*c.*d"]) is None
    assert endless([f".*a.*b.*c.*{i}" for i in range(9)])


ROWS, COLUMNS, GROUP = 64, 32, 16


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., tuple[CheckpointReader, PackedLinear]]:
    """A file with one packed linear of normally distributed weights, and what its keys say."""

    def make(bits: int = 4, *, sym: bool = True, version: int = 1, **parts: Tensor) -> Any:
        draw = torch.Generator().manual_seed(bits)
        middle, top = 2 ** (bits - 1), 2**bits - 1
        zeros = torch.full((ROWS // GROUP, COLUMNS), middle)
        if not sym:
            zeros = torch.randint(1, top, zeros.shape, generator=draw)
        codes = torch.randn(ROWS, COLUMNS, generator=draw) * top / 6 + zeros.repeat_interleave(GROUP, 0)
        tensors = {
            "x.qweight": pack_codes(codes.round().clamp(0, top).int(), bits),
            "x.qzeros": pack_zeros(zeros, bits, version),
            "x.scales": (torch.rand(zeros.shape, generator=draw) + 0.5).half(),
            "x.g_idx": in_order(ROWS, GROUP, "cpu"),
        }
        save_file({**tensors, **{f"x.{name}": part for name, part in parts.items()}}, tmp_path / "model.safetensors")
        linear = PackedLinear("x", ROWS, COLUMNS, bits, GROUP, sym, False, version)
        return CheckpointReader(tmp_path), linear

    return make


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_sound_numbers_give_no_finding(stored: Any, bits: int, sym: bool, version: int) -> None:
    assert list(packed_values(*stored(bits, sym=sym, version=version))) == []


def test_scales_of_either_sign_are_sound(stored: Any) -> None:
    scales = torch.rand(ROWS // GROUP, COLUMNS, generator=torch.Generator().manual_seed(0)).add(0.5).half()
    scales[:, ::2] *= -1
    assert list(packed_values(*stored(scales=scales))) == []


def test_a_scale_of_zero_is_sound_where_all_weights_are_zero(stored: Any) -> None:
    codes = torch.full((ROWS, COLUMNS), 8)
    codes[GROUP:] = torch.randint(0, 16, (ROWS - GROUP, COLUMNS), generator=torch.Generator().manual_seed(0))
    scales = torch.ones(ROWS // GROUP, COLUMNS).half()
    scales[0] = 0
    assert list(packed_values(*stored(scales=scales, qweight=pack_codes(codes, 4)))) == []
    scales[1, 5] = 0
    (finding,) = packed_values(*stored(scales=scales, qweight=pack_codes(codes, 4)))
    assert (finding.check, finding.subject) == ("scales", "x.scales")


def test_a_scale_that_is_hardly_there_is_sound_where_all_weights_are_zero(stored: Any) -> None:
    codes = torch.full((ROWS, COLUMNS), 8)
    codes[GROUP:] = torch.randint(0, 16, (ROWS - GROUP, COLUMNS), generator=torch.Generator().manual_seed(0))
    scales = torch.ones(ROWS // GROUP, COLUMNS).half()
    scales[0] = 2**-24
    assert list(packed_values(*stored(scales=scales, qweight=pack_codes(codes, 4)))) == []
    scales[1, 5] = -(2**-24)
    (finding,) = packed_values(*stored(scales=scales, qweight=pack_codes(codes, 4)))
    assert (finding.level, finding.check) == ("warning", "scales")


def test_columns_that_calibration_never_reached_are_no_hole(stored: Any) -> None:
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))
    codes[:32] = 8  # weights of zero
    assert list(packed_values(*stored(qweight=pack_codes(codes, 4)))) == []


def test_weights_that_are_all_zero_are_a_warning_not_a_problem(stored: Any) -> None:
    (finding,) = packed_values(*stored(qweight=pack_codes(torch.full((ROWS, COLUMNS), 8), 4)))
    assert (finding.level, finding.check) == ("warning", "codes")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_mean_code_shows_zeros_of_the_other_version(stored: Any, bits: int) -> None:
    reader, linear = stored(bits, sym=False)
    other = PackedLinear("x", ROWS, COLUMNS, bits, GROUP, False, False, 2)
    # Exactly one step apart, whatever the weights are.
    assert mean_step(reader, other) - mean_step(reader, linear) == pytest.approx(1, abs=1e-4)


def test_a_group_that_is_not_there_does_not_end_the_check(stored: Any) -> None:
    index = in_order(ROWS, GROUP, "cpu")
    index[3] = 2**31 - 1
    findings = list(packed_values(*stored(g_idx=index)))
    assert [finding.check for finding in findings] == ["groups"]


WIDTH = 4096


@pytest.fixture
def found_in(tmp_path: Path) -> Callable[..., list[tuple[str, str]]]:
    """Level and text of each finding in a normally distributed matrix [64, 4096] in which something was changed."""

    def look(change: Callable[[Tensor], object], dtype: torch.dtype = torch.bfloat16) -> list[tuple[str, str]]:
        matrix = (torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
        matrix[matrix == 0] = 0.02
        change(matrix)
        save_file({"x": matrix}, tmp_path / "model.safetensors")
        findings = plain_values(CheckpointReader(tmp_path), "x", filled=True, zero=False)
        return [(finding.level, finding.text) for finding in findings]

    return look


HOLES: dict[str, tuple[int, int]] = {
    "within a row": (9 * WIDTH + 100, 9 * WIDTH + 1100),
    "over an end of a row": (9 * WIDTH - 300, 9 * WIDTH + 212),
    "over several rows": (9 * WIDTH + 4000, 12 * WIDTH + 20),
    "from the first number on": (0, 300),
    "to the last number": (60 * WIDTH + 1000, 64 * WIDTH),
}


@pytest.mark.parametrize("piece", [2**24, 2 * 1000])
@pytest.mark.parametrize(("start", "end"), list(HOLES.values()), ids=list(HOLES))
def test_a_write_that_was_cut_off_is_found_in_a_matrix(
    start: int, end: int, piece: int, found_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever pieces the matrix is read in."""
    monkeypatch.setattr(shards, "_CHUNK", piece)
    ((level, text),) = found_in(lambda matrix: matrix.view(-1)[start:end].zero_())
    assert (level, text.split()[0]) == ("problem", str(end - start))


def zero_columns(matrix: Tensor) -> Tensor:
    """An MLP's padding in the linear that reads it, and channels that were taken out."""
    matrix[:, -512:] = 0
    matrix[:, 1000:1200] = 0
    return matrix


def out_of_exponent(matrix: Tensor) -> None:
    """A token that nobody trained: decay left only its largest numbers."""
    matrix[9] = 0
    matrix[9, ::300] = 2.0**-24


SOUND: dict[str, Callable[[Tensor], object]] = {
    "nothing": lambda matrix: None,
    "rows at the end": lambda matrix: matrix[40:].zero_(),
    "columns": zero_columns,
    "columns, and rows at the end": lambda matrix: zero_columns(matrix)[40:].zero_(),
    "the row of a token for padding": lambda matrix: matrix[9].zero_(),
    "a row beside a few zeros": lambda matrix: matrix.view(-1)[9 * WIDTH - 4 : 10 * WIDTH + 4].zero_(),
    "half of all numbers": lambda matrix: matrix.mul_(
        torch.rand(matrix.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    ),
    "two numbers of four": lambda matrix: matrix.view(64, -1, 4)[..., 1:3].zero_(),
    "numbers that ran out of exponent": out_of_exponent,
}


@pytest.mark.parametrize("piece", [2**24, 2 * 1000])
@pytest.mark.parametrize("change", list(SOUND.values()), ids=list(SOUND))
def test_zeros_that_are_meant_are_no_hole(
    change: Callable[[Tensor], object], piece: int, found_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_CHUNK", piece)
    assert found_in(change, torch.float16) == []


def test_whole_rows_of_zeros_inside_are_a_warning(found_in: Any) -> None:
    ((level, text),) = found_in(lambda matrix: matrix[9:12].zero_())
    assert (level, text.split(";")[0]) == ("warning", "rows 9 to 11 are all zeros")


def test_filters_of_more_dimensions_and_vectors_are_looked_at_as_what_they_are(tmp_path: Path) -> None:
    filters, vector = torch.ones(16, 8, 8, 8), torch.ones(9000)
    filters.view(-1)[700:2000] = 0
    vector[100:5000] = 0
    save_file({"x": filters, "y": vector}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    levels = [[finding.level for finding in plain_values(reader, name, filled=True, zero=False)] for name in "xy"]
    assert levels == [["problem"], []]
