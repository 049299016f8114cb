"""The identity of a model is what ``sha256sum`` says of its files."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qquant.identity import model_sha256, tokenizer_sha256


def test_it_is_the_hash_that_sha256sum_gives(tiny_qwen2: Path) -> None:
    if not shutil.which("sha256sum"):
        pytest.skip("needs sha256sum")
    line = "sha256sum config.json *.safetensors | sha256sum"
    done = subprocess.run(
        ["bash", "-c", f"LC_ALL=C; {line}"], cwd=tiny_qwen2, capture_output=True, text=True, check=True
    )
    assert model_sha256(tiny_qwen2) == done.stdout.split()[0]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_one_byte_changes_it(tiny_qwen2: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(tiny_qwen2, tmp_path / "copy")
    assert model_sha256(copy) == model_sha256(tiny_qwen2)
    (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    assert model_sha256(copy) != model_sha256(tiny_qwen2)


def test_a_tokenizer_is_no_part_of_it(tiny_qwen2: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_qwen2, tmp_path / "copy")
    (copy / "tokenizer_config.json").write_text("{}")
    assert model_sha256(copy) == model_sha256(tiny_qwen2)


def test_progress_ends_with_all_bytes(tiny_qwen2: Path) -> None:
    seen: list[tuple[int, int]] = []
    model_sha256(tiny_qwen2, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_the_tokenizer_has_an_identity_of_its_own(tiny_qwen2: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(tiny_qwen2, tmp_path / "copy")
    assert tokenizer_sha256(copy) == tokenizer_sha256(tiny_qwen2)
    (copy / "config.json").write_text("{}")
    assert tokenizer_sha256(copy) == tokenizer_sha256(tiny_qwen2)
    (copy / name).write_text("{}")
    assert tokenizer_sha256(copy) != tokenizer_sha256(tiny_qwen2)
