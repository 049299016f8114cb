"""What is asked of a tokenizer, and whether it is the right one: the loaded one beside the model's tokenizer.json.

Only ids are compared; nothing is loaded from a hub and nothing is changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from qquant.errors import BadModelError
from qquant.text_sources import one_line

PROBE = (
    "The quick brown fox's 2 jumps: 1234567890, 3.14 and 0x1F.\n\n"
    "def f(x):\n    return  x*2\t# tab\r\n\n\n   trailing   spaces   \n"
    "Ünïcode, naïve café, ½, Straße — “quotes”…\n量化模型需要校准数据。日本語のテキスト、한국어 문장.\n"
    "Съешь ещё этих мягких булок; שלום עולם; नमस्ते दुनिया; مرحبا 🙂👍🏽 don't WE'LL <tag/> __init__ a1b2C3"
)


class Tokenizer(Protocol):
    """What is asked of a tokenizer; every transformers tokenizer is one."""

    def encode(self, text: Any, *, add_special_tokens: bool, **kwargs: Any) -> Any:
        """Turn text into a list of ids."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Turn a list of messages into a list of ids."""


def check_tokenizer(tokenizer: Tokenizer, folder: str | Path, probe: str | None = None) -> str | None:
    """Compare a loaded tokenizer with the tokenizer.json it should follow.

    transformers picks the pre-tokenizer by model type. For a model trained with another one the ids then come out
    differently, without a word and at a high price in accuracy.

    Args:
        tokenizer: as AutoTokenizer gave it.
        folder: the model's folder.
        probe: text to compare on, such as the head of the user's data; None: a built-in one of many scripts.

    Returns:
        One sentence for the user where the two differ; None if they agree or there is no tokenizer.json.

    Raises:
        BadModelError: tokenizer.json cannot be read.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer as FileTokenizer

    try:
        written = FileTokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise BadModelError(f"tokenizer.json must be readable, got: {one_line(error)}; fetch it again") from error
    written.no_truncation()
    written.no_padding()
    text = PROBE if probe is None else probe
    encoding = written.encode(text, add_special_tokens=False)
    theirs = encoding.ids
    ours = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    if ours == theirs:
        return None
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    char = encoding.offsets[same][0] if same < len(theirs) else len(text)
    # A user's own text stays out of the sentence, which may end up in a published log.
    place = f"character {char}" + (f" ({text[char : char + 12]!r})" if probe is None else "")
    return (
        f"the loaded {type(tokenizer).__name__} does not give the ids of tokenizer.json: {len(ours)} against "
        f"{len(theirs)} tokens on a probe text, first different at token {same}, {place}; if the model was trained "
        "with tokenizer.json, load that file by PreTrainedTokenizerFast(tokenizer_file=...) and use it throughout"
    )
