"""The JSON files of a model and of an adapter are damaged, byte by byte and in what they mean. Each is refused in one
line that names the file or a key, or is read as what every reader takes it for; nothing else happens, and soon.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from qquant.adapter_settings import Settings
from qquant.checkpoint import quantization_config
from qquant.errors import BadModelError
from qquant.gptq_keys import GptqFileConfig
from qquant.json_files import read_json
from qquant.model_folder import check_folder, load_tokenizer, read_config
from qquant.shards import INDEX_NAME, CheckpointReader
from qquant.side_files import collect
from qquant.sources import StreamedModel
from tests.conftest import Factory

ROW = "fuzzed JSON files"
CASES = 500
QUICK, LONG = range(2), range(2, 20)
SECONDS = 5.0  # of processor time, where the usual case takes a few ms and a model's skeleton 20
SLOWER = 3  # every so manyth of those that are accepted is also put to what takes long
Count = Callable[..., None]

HOSTILE: dict[str, Any] = {
    "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]},
    "trust_remote_code": True,
    "_attn_implementation": "owner/kernel",
    "_attn_implementation_internal": "owner/kernel",
    "attn_implementation": "kernels-community/flash-attn",
    "_experts_implementation": "owner/kernel",
    "custom_generate": "owner/name",
    "custom_pipelines": {"x": {"impl": "code.P"}},
    "use_kernels": True,
    "configuration_files": ["config.9.9.9.json"],
    "fast_tokenizer_files": ["tokenizer.9.9.9.json"],
    "transformers_weights": "../elsewhere.safetensors",
    "_name_or_path": "/etc",
    "to_dict": 1,
    "__class__": "x",
}
NUMBERS = [0, 1, -1, 2, 64, 2**31, 2**53, 2**63, 2**64, 10**40, 10**400, 0.5, -0.0, 1e-400, 1e308, math.nan, math.inf]
TEXTS = [
    "",
    "a",
    "qwen2",
    "../x",
    "/etc/passwd",
    "\ud800",
    "\0",
    "\u202e",
    "x" * 2000,
    "float16",
    "None",
    "model.safetensors",
]
VALUES: list[Any] = [None, True, False, [], {}, [[]], {"": None}, [None] * 50, {"a": {"b": [1]}}, *NUMBERS, *TEXTS]
PIECES = [
    b"9",
    b"-",
    b" ",
    b'"',
    b"\0",
    b"{}",
    b"[",
    b"]",
    b"}",
    b",",
    b":",
    b"NaN",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\\ud800",
]


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every value."""
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(place for key, value in inside for place in places(value, (*path, key)))]


def damaged_meaning(text: bytes, draw: random.Random) -> bytes:
    """One value, key or pair of them is another."""
    content = json.loads(text)
    *way, last = draw.choice(places(content)[1:] or [("x",)])
    owner = content
    for key in way:
        owner = owner[key]
    kind = draw.choice(["value", "value", "value", "gone", "rename", "add", "hostile", "deep"])
    if isinstance(owner, list) or kind == "value":
        owner[last] = draw.choice(VALUES)
    elif kind == "gone":
        del owner[last]
    elif kind == "rename":
        owner[draw.choice([*TEXTS, *owner])] = owner.pop(last)
    elif kind == "add":
        owner[draw.choice(TEXTS)] = draw.choice(VALUES)
    elif kind == "hostile":
        key = draw.choice(list(HOSTILE))
        owner[key] = draw.choice([HOSTILE[key], draw.choice(VALUES)])
    else:
        for _ in range(draw.choice([20, 40, 200])):
            owner[last] = [owner[last]]
    new = json.dumps(content).encode()
    return new[:-1] + b"," + new[1:] if draw.random() < 0.1 and len(new) > 2 else new  # every key twice


def damaged_bytes(text: bytes, draw: random.Random) -> bytes:
    """One small damage anywhere."""
    data = bytearray(text)
    place = draw.randrange(len(data) + 1)
    kind = draw.choice(["byte", "bit", "cut", "insert", "insert", "delete", "double", "digits", "kind"])
    if kind == "insert" or place == len(data):
        data[place:place] = draw.choice(PIECES)
    elif kind == "byte":
        data[place] = draw.randrange(256)
    elif kind == "bit":
        data[place] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "delete":
        del data[place : place + draw.randrange(1, 12)]
    elif kind == "double":
        data[place:place] = data[place : place + draw.randrange(1, 80)]
    elif kind == "digits":
        data[place:place] = b"9" * draw.choice([5, 50, 5000])
    else:
        data[:] = draw.choice(
            [b"", b"[]", b"3", b"null", b'"x"', b"\xef\xbb\xbf" + text, b"[" * 100_000, b'{"a":' * 99]
        )
    return bytes(data)


def damaged(text: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        try:
            text = draw.choice([damaged_meaning, damaged_meaning, damaged_bytes])(text, draw)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            break  # too broken already to be changed so
    return text


def check_config(folder: Path, slowly: bool) -> None:
    config = read_config(folder)
    assert isinstance(config, PretrainedConfig)
    if slowly:
        StreamedModel(folder)  # one that is accepted describes the tensors that are there
        collect(folder)


def check_keys(folder: Path, slowly: bool) -> None:
    keys = quantization_config(folder)
    settings = GptqFileConfig.from_dict(keys)
    assert settings.for_module("model.layers.0.mlp.up_proj").bits in (2, 3, 4, 8)


def check_index(folder: Path, slowly: bool) -> None:
    reader = CheckpointReader(folder)
    for name in reader.entries:
        reader.read(name)


def check_tokenizer(folder: Path, slowly: bool) -> None:
    check_folder(folder)
    if slowly:
        load_tokenizer(folder)
        collect(folder).check_tokenizer()


def check_generation(folder: Path, slowly: bool) -> None:
    check_folder(folder)
    if slowly:
        beside = collect(folder)
        assert not {"auto_map", "custom_generate", "trust_remote_code"} & beside.rewritten.get(GENERATION, {}).keys()


def check_adapter(folder: Path, slowly: bool) -> None:
    settings = Settings.read(folder)
    assert math.isfinite(settings.scale("model.layers.0.mlp.up_proj"))


GENERATION = "generation_config.json"
CHECKS: dict[str, Callable[[Path, bool], None]] = {
    "config.json": check_config,
    "quantize_config.json": check_keys,
    INDEX_NAME: check_index,
    "tokenizer_config.json": check_tokenizer,
    GENERATION: check_generation,
    "adapter_config.json": check_adapter,
}
QUANTIZED = {
    "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "quant_method": "gptq", "checkpoint_format": "gptq",
    "dynamic": {"-:.*lm_head": {}, "+:.*down_proj": {"bits": 8}}, "meta": {"quantizer": ["x:1"]}, "damp_percent": 0.01,
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"], "bias": "none",
    "rank_pattern": {"up_proj": 4}, "alpha_pattern": {"layers.1.*q_proj": 8.5}, "use_rslora": False,
    "task_type": "CAUSAL_LM", "modules_to_save": None, "init_lora_weights": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of its own for every kind of file, with the sound file in it."""
    home = tmp_path_factory.mktemp("fuzzed")
    made = {}
    for number, name in enumerate(CHECKS):
        folder = made[name] = home / str(number)
        if name == "adapter_config.json":
            folder.mkdir()
            (folder / name).write_text(json.dumps(ADAPTER))
            continue
        shutil.copytree(checkpoint("qwen2", shards=3 if name == INDEX_NAME else 1), folder)
        if name == "quantize_config.json":
            (folder / name).write_text(json.dumps(QUANTIZED))
    return made


def why_refused(check: Callable[[Path, bool], None], folder: Path, slowly: bool) -> str | None:
    """The error's line; None where the file was accepted."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd values, which are accepted
            check(folder, slowly)
    except BadModelError as error:
        return str(error)
    return None


@pytest.mark.parametrize("seed", [*QUICK, *(pytest.param(seed, marks=pytest.mark.reliability) for seed in LONG)])
def test_a_damaged_file_is_refused_by_name_or_makes_sense(folders: dict[str, Path], seed: int, outcome: Count) -> None:
    draw = random.Random(seed)
    sound = {name: (folder / name).read_bytes() for name, folder in folders.items()}
    refused = 0
    try:
        for number in range(CASES):
            name = list(CHECKS)[number % len(CHECKS)]
            text = damaged(sound[name], draw)
            (folders[name] / name).write_bytes(text)
            case = f"seed {seed}, case {number}, {name}: {text[:2000]!r}"
            began = time.process_time()
            try:
                why = why_refused(CHECKS[name], folders[name], draw.random() < 1 / SLOWER)
            except Exception as error:
                raise AssertionError(case) from error
            assert time.process_time() - began < SECONDS, case
            if why is None:
                read_json(folders[name] / name)  # every reader finds the same in it
                continue
            refused += 1
            assert "\n" not in why, case
            words = [name, "config.json", *(str(key) for key in ADAPTER | QUANTIZED), *HOSTILE]
            assert any(word in why for word in words) or str(folders[name]) in why, f"{why}\n{case}"
    finally:
        for name, folder in folders.items():
            (folder / name).write_bytes(sound[name])
    assert 0 < refused < CASES
    outcome("refused", refused)
    outcome("accepted", CASES - refused)


@pytest.mark.parametrize("name", list(CHECKS))
def test_the_file_that_is_not_damaged_is_accepted(folders: dict[str, Path], name: str) -> None:
    CHECKS[name](folders[name], True)
