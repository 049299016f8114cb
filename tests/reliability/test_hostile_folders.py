"""Checkpoints made to harm whoever opens them: paths that lead out, sizes that lie, pickles, keys that name code,
pipes, endless JSON and templates. Each is refused in one line or harmless, a canary untouched, and no socket opened.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import qquant
from qquant.calibrate import load_samples
from qquant.checkpoint import load_model
from qquant.cli import app
from qquant.code_keys import ignoring_code
from qquant.config import QuantizeConfig
from qquant.errors import BadDataError, BadModelError, QquantError
from qquant.inspect import examine
from qquant.model_folder import load_tokenizer
from qquant.quantizing import quantize_checkpoint
from qquant.shards import SINGLE_NAME
from tests.conftest import make_checkpoint
from tests.reliability.hostile import Maker, put
from tests.reliability.hostile_cases import CODE, HARMLESS, REFUSED, TEMPLATES

ROW = "hostile checkpoints"
Count = Callable[..., None]
RTN = QuantizeConfig(method="rtn", group_size=32)


def some_quick(names: Iterable[str], every: int) -> list[Any]:
    """All of them; one of so many belongs to the quick part."""
    long = pytest.mark.reliability
    return [pytest.param(name, marks=() if n % every == 0 else long) for n, name in enumerate(names)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sound") / "m", hidden_size=32, intermediate_size=64)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every attempt to reach anything; none succeeds. The hub's client does not know that it is offline."""
    tried: list[str] = []

    def refuse(name: str) -> Callable[..., Any]:
        def inner(*arguments: object, **_: object) -> None:
            tried.append(f"{name} {arguments[-1:]}")
            raise OSError("no network in this test")

        return inner

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse(name))
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse(name))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield tried
    assert tried == []


@pytest.fixture
def made(sound: Path, tmp_path: Path) -> Callable[[Maker], tuple[Path, Path]]:
    """A hostile copy of the sound model, and the canary beside it."""

    def make(maker: Maker) -> tuple[Path, Path]:
        folder, canary = tmp_path / "m", tmp_path / "canary"
        shutil.copytree(sound, folder)
        (tmp_path / "outside").mkdir()
        shutil.copy(sound / SINGLE_NAME, tmp_path / "outside" / "x.safetensors")
        shutil.copy(sound / "tokenizer.json", tmp_path / "outside" / "tokenizer.4.0.0.json")
        canary.write_text("untouched")
        maker(folder, canary)
        return folder, canary

    return make


def open_everywhere(folder: Path) -> None:
    """What else opens a model, each for itself; what it says is not looked at."""
    for opening in (lambda: load_tokenizer(folder), lambda: examine(folder), lambda: load_model(folder, device=CPU)):
        try:
            opening()
        except QquantError as error:
            assert "\n" not in str(error)  # noqa: PT017 - whether it is raised at all differs


CPU = torch.device("cpu")


@pytest.mark.parametrize("name", some_quick(REFUSED, 9))
def test_a_hostile_checkpoint_is_refused(
    made: Callable[[Maker], tuple[Path, Path]], name: str, no_network: list[str], outcome: Count
) -> None:
    folder, canary = made(REFUSED[name])
    with pytest.raises(BadModelError) as raised:
        quantize_checkpoint(folder, None, RTN, folder.parent / "out")
    assert raised.value.exit_code == 4
    assert "\n" not in str(raised.value)
    open_everywhere(folder)
    assert canary.read_text() == "untouched"
    assert not [path.name for path in folder.parent.iterdir() if path.name.startswith("out") and path.name != "outside"]
    outcome("refused")


@pytest.mark.parametrize("name", some_quick(HARMLESS, 5))
def test_what_is_not_refused_is_harmless(
    made: Callable[[Maker], tuple[Path, Path]], name: str, no_network: list[str], outcome: Count
) -> None:
    folder, canary = made(HARMLESS[name])
    out = folder.parent / "out"
    quantize_checkpoint(folder, None, RTN, out)
    open_everywhere(folder)
    qquant.load_quantized(out)
    assert canary.read_text() == "untouched"
    assert not [path.name for path in out.iterdir() if path.suffix in (".py", ".bin", ".pt", ".pth")]
    for path in out.glob("*.json"):
        assert not any(word in path.read_text() for word in ("/etc", "../", "autoset", '"name_or_path"')), path.name
    outcome("harmless")


@pytest.mark.parametrize(
    "name", some_quick((name for name in CODE if "another" not in name and "quantiz" not in name), 20)
)
def test_what_names_code_is_opened_without_it_where_that_is_asked_for(
    made: Callable[[Maker], tuple[Path, Path]], name: str, no_network: list[str], outcome: Count
) -> None:
    folder, canary = made(CODE[name])
    out = folder.parent / "out"
    if name == "auto_map of an unknown type":
        with ignoring_code(), pytest.raises(BadModelError, match="cannot be built"):
            quantize_checkpoint(folder, None, RTN, out)
    elif "text_config" in name:
        with ignoring_code():
            open_everywhere(folder)
    else:
        with ignoring_code():
            quantize_checkpoint(folder, None, RTN, out)
        for path in out.glob("*.json"):
            found = path.read_text()
            assert not any(word in found for word in ("owner/", "code.", "auto_map", "trust_remote", "kernel")), (
                path.name
            )
    assert canary.read_text() == "untouched"
    outcome("opened without the code")


@pytest.mark.parametrize("name", some_quick(TEMPLATES, 5))
def test_a_chat_template_can_neither_escape_nor_go_on_for_ever(
    made: Callable[[Maker], tuple[Path, Path]], name: str, no_network: list[str], outcome: Count
) -> None:
    folder, canary = made(
        put("chat_template.jinja", TEMPLATES[name] + "{% for m in messages %}{{ m.content }}{% endfor %}")
    )
    chats = folder.parent / "chats.jsonl"
    turns = [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four five six"}]
    chats.write_text((json.dumps({"messages": turns}) + "\n") * 4)
    tokenizer = load_tokenizer(folder)
    try:
        samples = load_samples(chats, tokenizer, n_samples=2, seq_len=16)
    except (BadModelError, BadDataError) as error:
        outcome("refused" if error else "")
    else:
        shown = tokenizer.decode([id for sample in samples for id in sample.input_ids.flatten().tolist()])
        assert not any(word in shown for word in ("class", "module", "environment", "root:", "uid=")), shown
        outcome("nothing shown")
    assert canary.read_text() == "untouched"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["quantize", "eval", "plan", "inspect", "verify", "chat"])
def test_no_command_opens_a_socket_for_a_local_folder(
    sound: Path, tmp_path: Path, held_out: Path, no_network: list[str], command: str, outcome: Count
) -> None:
    commands: dict[str, list[object]] = {
        "quantize": [
            "--model",
            sound,
            "--data",
            held_out,
            "--out",
            tmp_path / "q",
            "--group-size",
            32,
            "--seq-len",
            16,
        ],
        "eval": [
            "--baseline",
            sound,
            "--candidate",
            sound,
            "--data",
            held_out,
            "--out",
            tmp_path / "e",
            "--seq-len",
            16,
            "--max-tokens",
            64,
        ],
        "plan": [sound, "--device", "cpu", "--group-size", 32],
        "inspect": [sound],
        "verify": [sound],
        "chat": [sound, "--max-new-tokens", 2],
    }
    result = CliRunner().invoke(app, [command, *map(str, commands[command])], input="hello\n")
    assert result.exit_code in (0, 4 if command == "verify" else 0), result.output
    outcome("offline")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from qquant.cli import app; sys.argv[0] = 'qquant'; app()"
    command = [sys.executable, "-P", "-c", program, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


COMMANDS = {
    "index names '../outside/x.safetensors'": "quantize",
    "only pytorch_model.bin": "inspect",
    "auto_map in config.json": "chat",
    "tokenizer.json is a pipe": "chat",
    "shape of 2**63": "inspect",
}


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_command_says_so_in_one_line_and_ends_with_4(
    made: Callable[[Maker], tuple[Path, Path]], name: str, outcome: Count
) -> None:
    folder, canary = made(REFUSED[name])
    more = ("--method", "rtn", "--group-size", "32", "--out", str(folder.parent / "out"))
    arguments = (
        ("quantize", "--model", str(folder), *more) if COMMANDS[name] == "quantize" else (COMMANDS[name], str(folder))
    )
    ended = run(*arguments)
    assert ended.returncode == 4, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in ended.stderr
    assert canary.read_text() == "untouched"
    outcome("refused")


@pytest.mark.slow
@pytest.mark.reliability
def test_the_option_that_ignores_code_is_said_in_the_error_and_works(
    made: Callable[[Maker], tuple[Path, Path]], outcome: Count
) -> None:
    folder, canary = made(CODE["auto_map in config.json"])
    words = (
        "quantize",
        "--model",
        str(folder),
        "--method",
        "rtn",
        "--group-size",
        "32",
        "--out",
        str(folder.parent / "out"),
    )
    refused, done = run(*words), run(*words, "--ignore-code")
    assert (refused.returncode, done.returncode) == (4, 0), done.stderr
    assert "auto_map" in refused.stderr
    assert "--ignore-code" in refused.stderr
    assert done.stderr.count("names code (auto_map), which was left out") == 1
    assert canary.read_text() == "untouched"
    outcome("refused")
    outcome("opened without the code")
