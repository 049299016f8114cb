"""Sizes and lists as people type them: what is taken, and what is refused with a remedy."""

from __future__ import annotations

import pytest

from qquant.console import counts, size_in_bytes, words
from qquant.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 << 30),
        ("24gb", 24 * 10**9),
        ("1.5 MiB", 3 << 19),
        (" 800MB ", 8 * 10**8),
        ("25769803776", 24 << 30),
    ],
)
def test_a_size_is_read_with_its_unit(text: str, size: int) -> None:
    assert size_in_bytes(text, "--gpu") == size


@pytest.mark.parametrize("text", ["", "much", "24", "0GiB", "-1GiB", "1e9GiB", "9" * 400 + "GiB", "8EiB", "24 Gi B"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"--gpu must be a size such as 24GiB"):
        size_in_bytes(text, "--gpu")


def test_lists_keep_their_order_and_drop_what_is_empty() -> None:
    assert words(" b, a,,c ") == ("b", "a", "c")
    assert counts("4, 1,", "--batch") == (4, 1)


@pytest.mark.parametrize("text", ["", ",", "1,x", "1.5", "9" * 5000])
def test_what_is_no_list_of_numbers_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--batch must be whole numbers"):
        counts(text, "--batch")
