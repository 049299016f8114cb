"""Every figure of Qwen's README that the package holds, typed a second time and in another layout.

What is predicted of them is test_published.py's.
"""

from __future__ import annotations

import pytest

from qquant.published import ACCURACY, KV_CACHE, SPEED_MEMORY

# Model, precision, and MMLU, C-Eval (val), GSM8K, HumanEval.
SCORES = """
1.8B BF16 43.3 55.6 33.7 26.2
1.8B Int8 43.1 55.8 33.0 27.4
1.8B Int4 42.9 52.8 31.2 25.0
7B   BF16 55.8 59.7 50.3 37.2
7B   Int8 55.4 59.4 48.3 34.8
7B   Int4 55.1 59.2 49.7 29.9
14B  BF16 64.6 69.8 60.1 43.9
14B  Int8 63.6 68.6 60.0 48.2
14B  Int4 63.3 69.0 59.8 45.7
72B  BF16 74.4 80.1 76.4 64.6
72B  Int8 73.5 80.1 73.5 62.2
72B  Int4 73.4 80.1 75.3 61.6
"""
# Model, precision, tokens/s, GB.
SPEEDS = """
1.8B BF16 54.09   4.23
1.8B Int8 55.56   3.48
1.8B Int4 71.07   2.91
7B   BF16 40.93  16.99
7B   Int8 37.47  11.20
7B   Int4 50.09   8.21
14B  BF16 32.22  30.15
14B  Int8 29.28  18.81
14B  Int4 38.72  13.01
72B  BF16  8.48 144.69
72B  Int8  9.05  81.27
72B  Int4 11.32  48.86
"""
# Batch, and GB without and with the quantized cache; 1024 new tokens.
BY_BATCH = """
1   16.3 15.5
4   24.1 17.2
16  31.7 22.3
32  48.7 30.2
64  OOM  48.2
100 OOM  72.4
"""
# New tokens, and the same; batch 1.
BY_LENGTH = """
512  15.2 15.0
1024 16.3 15.5
2048 17.6 15.8
4096 19.5 16.6
8192 23.2 17.6
"""


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().splitlines()]


@pytest.mark.parametrize("row", lines(SCORES), ids=lambda row: f"{row[0]}-{row[1]}")
def test_accuracy_is_what_was_printed(row: list[str]) -> None:
    model, precision, *expected = row
    found = {
        score.task: score.score_percent
        for score in ACCURACY
        if (score.model, score.precision) == (f"qwen-{model.lower()}-chat", precision.lower())
    }
    tasks = ("mmlu", "ceval", "gsm8k", "humaneval")
    assert found == {task: float(figure) for task, figure in zip(tasks, expected, strict=True)}


@pytest.mark.parametrize("row", lines(SPEEDS), ids=lambda row: f"{row[0]}-{row[1]}")
def test_speed_and_memory_are_what_was_printed(row: list[str]) -> None:
    model, precision, speed, memory = row
    (cell,) = [
        cell for cell in SPEED_MEMORY if (cell.model, cell.precision) == (f"qwen-{model.lower()}", precision.lower())
    ]
    assert (cell.tokens_per_second, cell.memory_gib) == (float(speed), float(memory))
    assert (cell.table, cell.kv_cache, cell.batch, cell.new_tokens) == ("speed-memory", "bf16", 1, 2048)
    # One card has 80 GB: what took more was measured on two.
    assert cell.hardware.startswith("2x A100") is (float(memory) > 80)


@pytest.mark.parametrize("column", ["bf16", "int8"])
@pytest.mark.parametrize("table", ["kv-batch", "kv-length"])
def test_memory_of_the_kv_cache_is_what_was_printed(table: str, column: str) -> None:
    expected = {}
    for size, plain, quantized in lines(BY_BATCH if table == "kv-batch" else BY_LENGTH):
        figure = plain if column == "bf16" else quantized
        where = (int(size), 1024) if table == "kv-batch" else (1, int(size))
        expected[where] = None if figure == "OOM" else float(figure)
    found = [cell for cell in KV_CACHE if (cell.table, cell.kv_cache) == (table, column)]
    assert {(cell.batch, cell.new_tokens): cell.memory_gib for cell in found} == expected
    assert len(found) == len(expected)
    assert {(cell.model, cell.precision, cell.tokens_per_second) for cell in found} == {("qwen-7b", "bf16", None)}


def test_there_is_nothing_else() -> None:
    assert (len(ACCURACY), len(SPEED_MEMORY), len(KV_CACHE)) == (48, 12, 22)
