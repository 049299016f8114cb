"""Writes the rank file that the package ships as Qwen v1's small vocabulary, from the reference model's tokenizer.

What lives here: turning a byte-level BPE ``tokenizer.json`` into ``base64(token) rank`` lines. What does not: training
that tokenizer (train_reference_model.py does).

    python examples/make_small_vocabulary.py

Both give the same ids, for the special tokens too: the reference model's three follow its last token in the order in
which Qwen v1 numbers its own. The format has no merges; two tokens merge if together they are one, lowest rank first.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers.convert_slow_tokenizer import bytes_to_unicode

from qquant.models.qwen.tokenization import SMALL_VOCABULARY
from qquant.models.qwen.vocabulary import rank_file

TOKENIZER = Path(__file__).with_name("reference-model") / "tokenizer.json"


def small_vocabulary(tokenizer: Path = TOKENIZER) -> bytes:
    """The rank file of a byte-level ``tokenizer.json``: its tokens in the order of their ids, without added tokens."""
    spelled = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    byte_of = {character: value for value, character in bytes_to_unicode().items()}
    by_id = sorted((index, bytes(byte_of[character] for character in token)) for token, index in spelled.items())
    return rank_file((token, index) for index, token in by_id)


if __name__ == "__main__":
    SMALL_VOCABULARY.write_bytes(small_vocabulary())
    print(SMALL_VOCABULARY)
