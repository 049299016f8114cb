"""Small random checkpoints that look like downloaded ones, and the fixtures that share them.

Folders made here hold what a hub folder holds: config, safetensors (sharded on request), a byte-level BPE tokenizer
with ChatML specials and chat template, generation config. Weights are random but seeded, so a test may state numbers.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Tiny matrices gain nothing from a second thread, and two threads on a busy machine wait for one another. Read when
# torch is first imported; commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Read when transformers is first imported: no test looks at the network unless it asks for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if TYPE_CHECKING:
    from typer.testing import Result

Factory = Callable[..., Path]

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB = 320
CORPUS = [
    "The quick brown fox jumps over the lazy dog while the cat watches from the window.",
    "def add(left, right):\n    return left + right\n\nfor number in range(10):\n    print(add(number, 1))",
    "One Two Three Four 1234567890 !?.,;:()[]{} ünïcödé 你好世界 数学 quantization",
]
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": VOCAB,
    "bos_token_id": None,
}


def make_checkpoint(
    folder: Path,
    family: str = "qwen2",
    tie: bool = False,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a tiny random checkpoint of ``family`` (qwen2, qwen3, llama, mistral) into ``folder`` and return it.

    Args:
        folder: created if absent.
        family: a transformers model type with the usual decoder options.
        tie: share the embedding with the head; the head is then not in the file.
        dtype: of every weight on disk.
        shards: 1 writes model.safetensors; more write that many files and an index.
        seed: of the weights.
        **config: options of the model's config that replace the tiny defaults.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    end = _save_tokenizer(folder, family)
    options: dict[str, Any] = {**TINY, "eos_token_id": end, "pad_token_id": end, **config}
    if family == "qwen3":
        options.setdefault("head_dim", options["hidden_size"] // options["num_attention_heads"])
    settings = AutoConfig.for_model(family, tie_word_embeddings=tie, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
        for name, parameter in model.named_parameters():
            # Fresh biases are zero and fresh norms one; a test that drops them must not pass by accident.
            if name.endswith("bias") or "norm" in name:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    GenerationConfig(eos_token_id=end, pad_token_id=end).save_pretrained(folder)
    if shards > 1:
        _split(folder, shards)
    return folder


def _split(folder: Path, shards: int) -> None:
    """Replace model.safetensors by ``shards`` files and their index."""
    from safetensors.torch import load_file

    from tests.weight_files import write_shards

    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    write_shards(folder, tensors, shards)


def _save_tokenizer(folder: Path, family: str) -> int:
    """Train a byte-level BPE on a few lines and save it; returns the id of ``<|endoftext|>``.

    It uses Qwen2's normalizer and pre-tokenizer, because transformers puts those into any qwen2 folder it loads.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIALS[0],
        pad_token=SPECIALS[0],
        chat_template=CHAT_TEMPLATE,
        model_max_length=TINY["max_position_embeddings"],
    )
    fast.save_pretrained(folder)
    if family.startswith("qwen"):
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        settings["tokenizer_class"] = "Qwen2Tokenizer"
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    end = tokenizer.token_to_id(SPECIALS[0])
    assert end is not None
    return int(end)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """``checkpoint(family, **options)``: make_checkpoint's folder, made once per set of options. Never write to it."""
    made: dict[str, Path] = {}

    def get(family: str = "qwen2", **options: Any) -> Path:
        key = repr((family, sorted(options.items(), key=lambda item: item[0])))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def tiny_qwen2(checkpoint: Factory) -> Path:
    """A Qwen2 folder: biases on q, k and v, grouped-query attention, own head. Shared: never write to it."""
    return checkpoint("qwen2")


@pytest.fixture(scope="session")
def tiny_qwen3(checkpoint: Factory) -> Path:
    """A Qwen3 folder: norms on queries and keys, no biases. Shared: never write to it."""
    return checkpoint("qwen3")


@pytest.fixture(scope="session")
def tiny_llama(checkpoint: Factory) -> Path:
    """A Llama folder. Shared: never write to it."""
    return checkpoint("llama")


@pytest.fixture(scope="session")
def tiny_mistral(checkpoint: Factory) -> Path:
    """A Mistral folder. Shared: never write to it."""
    return checkpoint("mistral")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """``qquant.register()`` for one test."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    import qquant

    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "gptq", AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"])
    qquant.register()


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to evaluate on, some hundred tokens of the tiny tokenizers."""
    sentence = "The quick brown fox jumps over the lazy dog, and def add(left, right) returns {} while 你好世界.\n"
    path = tmp_path_factory.mktemp("data") / "held-out.txt"
    path.write_text("".join(sentence.format(number) for number in range(12)), encoding="utf-8")
    return path


@pytest.fixture
def run_eval(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """``qquant.eval`` in this process; ``sys.argv`` is what a user's would be, because the report quotes it."""
    import typer
    from typer.testing import CliRunner

    from qquant.eval import evaluate_command

    app = typer.Typer()
    app.command()(evaluate_command)

    def invoke(*arguments: Any) -> Result:
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["/somewhere/qquant/eval.py", *words])
        return CliRunner().invoke(app, words)

    return invoke


def assert_same_but_for_order(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits of one model whose matrices lie transposed in memory: the order of the sums is all that differs."""
    limit = 64 * torch.finfo(torch.float32).eps * float(expected.max() - expected.min())
    assert float((found - expected).abs().max()) <= limit


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip gpu tests where there is no device, and network tests unless they are asked for by ``-m network``."""
    expression = str(config.getoption("-m") or "")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("network") and "network" not in expression:
            item.add_marker(pytest.mark.skip(reason="needs a network; run with -m network"))


def pytest_collection_finish() -> None:
    """Let the garbage collector overlook what all imports made: going through it takes half a second each time.

    Evaluations collect after every model, hundreds of times in a run. What tests make is still looked at.
    """
    gc.collect()
    gc.freeze()


_OUTCOMES: list[dict[str, Any]] = []
_STARTED = time.time()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect what ``pytest_sessionfinish`` writes: one entry per test, its own phase or the phase that ended it."""
    if report.when == "call" or report.outcome != "passed":
        _OUTCOMES.append({"test": report.nodeid, "outcome": report.outcome, "duration_s": round(report.duration, 4)})


def pytest_sessionfinish(exitstatus: int) -> None:
    """Write the outcomes as JSON where QQUANT_TEST_JSON says, so that a run on another machine can be kept."""
    target = os.environ.get("QQUANT_TEST_JSON")
    if target and "PYTEST_XDIST_WORKER" not in os.environ:
        record = {
            "schema_version": 1,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "exit_status": int(exitstatus),
            "wall_s": round(time.time() - _STARTED, 2),
            "tests": _OUTCOMES,
        }
        Path(target).write_text(json.dumps(record, indent=2) + "\n")


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Kernels of this test may share their work between two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
