"""The tokenizer of the original Qwen (v1) behind transformers' interface.

Text to ids and back is vocabulary.py's. A regular token is ``bytes``, because a token of a byte-level vocabulary need
not be text; a special token is ``str``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BatchEncoding, PreTrainedConfig, PreTrainedTokenizer
from transformers.utils.generic import to_py_obj

from qquant.errors import BadModelError, UsageError
from qquant.models.qwen.vocabulary import (
    DEFAULT_SYSTEM,
    SPECIAL_TOKENS,
    SpecialNames,
    Vocabulary,
    defused,
    rank_file,
    require_text,
)

SMALL_VOCABULARY = Path(__file__).with_name("small.tiktoken")
"""The reference model's vocabulary as a rank file: 4093 tokens of English and Python, and its special tokens have the
same ids too. Written by examples/make_small_vocabulary.py."""

CHATML_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The chat template of a folder that brings none."""

Token = str | bytes


class QWenTokenizer(PreTrainedTokenizer):
    """Text to ids and back for Qwen v1; encoding is tiktoken's, and several threads may share one tokenizer.

    As in the original, no bos, eos, pad or unk token is set; any of the special tokens may be made one.

    Args:
        vocab_file: rank file; ``qwen.tiktoken`` in a model folder.
        errors: what decoding does with bytes that are not UTF-8: "replace", "ignore" or "strict".
        extra_vocab_file: rank file of added tokens; ``qwen_extra.tiktoken`` in a model folder.
        **kwargs: what every transformers tokenizer takes: ``pad_token``, ``padding_side``, ``model_max_length``, ...

    Raises:
        BadModelError: a rank file is missing or malformed, the folder declares added tokens, or ``errors`` or
            ``model_max_length`` is something else than it should be.
        UsageError: a token that is not one of the special tokens is to become one.
    """

    vocab_files_names = {"vocab_file": "qwen.tiktoken", "extra_vocab_file": "qwen_extra.tiktoken"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str | Path | None,
        errors: str = "replace",
        extra_vocab_file: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        if vocab_file is None:
            where = kwargs.get("name_or_path", "the folder")
            raise BadModelError(f"a Qwen v1 tokenizer needs the vocabulary qwen.tiktoken, {where} has none; add it")
        _require_sound(errors, kwargs.get("model_max_length"))
        self.errors = errors
        self.vocabulary = Vocabulary(vocab_file, extra_vocab_file)
        self.eod_id, self.im_start_id, self.im_end_id = map(self.special_tokens.__getitem__, SPECIAL_TOKENS[:3])
        # auto_map names remote code, which is never run and which saving a tokenizer does not write; the others say
        # where this folder was found, which is nobody's business in the next one.
        for name in ("auto_map", "is_local", "local_files_only"):
            kwargs.pop(name, None)
        for index, token in kwargs.pop("added_tokens_decoder", {}).items():
            if self.special_tokens.get(str(token)) != index:
                raise BadModelError(f"a Qwen v1 folder adds no tokens of its own, this one adds {token} as {index}")
        if kwargs.get("chat_template") is None:
            kwargs["chat_template"] = CHATML_TEMPLATE
        super().__init__(errors=errors, **kwargs)  # type: ignore[no-untyped-call]
        self._require_special([*self.special_tokens_map.values(), *self.extra_special_tokens])

    # ---- the vocabulary

    @property
    def mergeable_ranks(self) -> dict[bytes, int]:
        """Token bytes -> id of everything but the special tokens, as the original calls it. A new dict."""
        return self.vocabulary.ranks | self.vocabulary.extra_ranks

    @property
    def special_tokens(self) -> dict[str, int]:
        """Name -> id of the 208 special tokens, as the original calls it."""
        return self.vocabulary.special

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: 151851 for Qwen's own vocabulary; models pad it to 151936 or 152064 rows."""
        return len(self.vocabulary)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def get_vocab(self) -> dict[Token, int]:  # type: ignore[override]
        """A new dict of token to id: ``bytes``, as in the original, and the special tokens, which it leaves out.

        transformers counts on every id being there, and on what ``convert_ids_to_tokens`` gives being a key.
        """
        ranks: dict[Token, int] = dict(self.mergeable_ranks.items())
        return ranks | self.special_tokens

    @property
    def all_special_tokens(self) -> list[str]:
        """All 208 names, whether or not one of them is the eos or pad token."""
        return list(self.special_tokens)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Id of a token, or a list of ids for several; None for what is not a token.

        Args:
            tokens: bytes, the name of a special token, text that is one token, or an iterable of these.
        """
        if isinstance(tokens, str | bytes):
            return self.vocabulary.id_of(tokens)
        return [self.vocabulary.id_of(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Token of an id, or a list of tokens for a list, array or tensor of ids.

        Raises:
            UsageError: an id has no token, like the rows that a model is padded with.
        """
        ids = to_py_obj(ids)
        if isinstance(ids, int):
            return self.vocabulary.token_of(ids)
        tokens = [self.vocabulary.token_of(index) for index in ids]
        return [token for token in tokens if isinstance(token, bytes)] if skip_special_tokens else tokens

    def _convert_id_to_token(self, index: int) -> Token:  # type: ignore[override]
        return self.vocabulary.token_of(index)

    def convert_tokens_to_string(self, tokens: Iterable[Token]) -> str:
        """The text of tokens; their bytes are joined before they are read as UTF-8."""
        parts = (token.encode("utf-8") if isinstance(token, str) else token for token in tokens)
        return b"".join(parts).decode("utf-8", self.errors)

    def _require_special(self, names: Iterable[object]) -> None:
        unknown = [str(name) for name in names if str(name) not in self.special_tokens]
        if unknown:
            raise UsageError(
                f"a Qwen v1 vocabulary takes no new tokens and {unknown} is not in it; use one of its special tokens, "
                "such as <|extra_0|>, or bring merges in extra_vocab_file"
            )

    def _add_tokens(self, new_tokens: Iterable[object], special_tokens: bool = False) -> int:
        """Adds nothing: a special token is there already, and anything else is refused."""
        self._require_special(new_tokens)
        return 0

    def __setattr__(self, key: str, value: Any) -> None:
        if value is not None and (key in self.SPECIAL_TOKENS_ATTRIBUTES or key == "extra_special_tokens"):
            self._require_special([value] if isinstance(value, str) or key != "extra_special_tokens" else value)
        super().__setattr__(key, value)  # type: ignore[no-untyped-call]

    # ---- text to ids and back

    def tokenize(  # type: ignore[override]
        self,
        text: str,
        *,
        allowed_special: SpecialNames = "all",
        disallowed_special: SpecialNames = (),
        split_special_tokens: bool | None = None,
        **kwargs: Any,
    ) -> list[Token]:
        """The tokens of a text; arguments and errors as in ``_encode_plus``."""
        plain = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        ids = self.vocabulary.encode(text, () if plain else allowed_special, disallowed_special)
        return [self.vocabulary.token_of(index) for index in ids]

    def _encode_plus(  # type: ignore[override]
        self,
        text: Any,
        text_pair: Any = None,
        *,
        allowed_special: SpecialNames = "all",
        disallowed_special: SpecialNames = (),
        split_special_tokens: bool | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """What ``tokenizer(...)`` and ``encode`` come to: a text becomes ids in one step, the rest is transformers'.

        Args:
            text: text, ids, or a batch of either.
            text_pair: as ``text``.
            allowed_special: special tokens that are parsed where a text spells them, by default all. With an empty set
                a text cannot inject one: what it spells is encoded as ordinary text.
            disallowed_special: texts that must not appear; "all" for every special token that is not allowed.
            split_special_tokens: True is transformers' way to ask for an empty ``allowed_special``.
            **kwargs: padding, truncation, kinds of output.

        Raises:
            UsageError: a disallowed text appears, an allowed special token is unknown, or offsets are asked for.
        """
        if kwargs.get("return_offsets_mapping"):
            raise UsageError("this tokenizer knows no offsets, got return_offsets_mapping=True; leave it out")
        if self.split_special_tokens if split_special_tokens is None else split_special_tokens:
            allowed_special = ()
        # Empty text stays text: transformers takes an empty list of ids for an empty batch.
        if isinstance(text, str):
            text = self.vocabulary.encode(text, allowed_special, disallowed_special) or text
        if isinstance(text_pair, str):
            text_pair = self.vocabulary.encode(text_pair, allowed_special, disallowed_special) or text_pair
        special: dict[str, Any] = {"allowed_special": allowed_special, "disallowed_special": disallowed_special}
        return super()._encode_plus(text, text_pair, **special, **kwargs)

    def _decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str | None = None,
        **kwargs: Any,
    ) -> str:
        """What ``decode`` and ``batch_decode`` come to for one sequence. Text is never "cleaned up".

        Args:
            token_ids: 0 or more. One without a token, such as a padded row of the model, counts as a byte that is not
                UTF-8: U+FFFD under errors="replace", nothing under "ignore", an error under "strict".
            skip_special_tokens: leave out special tokens and ids without a token.
            clean_up_tokenization_spaces: no effect.
            errors: in place of the tokenizer's own; "ignore" suits streaming, where a character may be half there.
            **kwargs: no effect; callers of ``decode`` pass options of other tokenizers.

        Raises:
            UsageError: an id is negative.
            UnicodeDecodeError: the bytes are not UTF-8 and ``errors`` is "strict".
        """
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return self.vocabulary.decode(ids, skip_special=skip_special_tokens).decode("utf-8", errors or self.errors)

    # ---- conversations

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = True,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Text or ids of a conversation, as in transformers, except that messages cannot inject a turn.

        Under ``CHATML_TEMPLATE`` the ids are those of Qwen's ``make_context``: role and content are encoded each on
        its own, as ordinary text. Under another template, special tokens in messages are ordinary text too.

        Args:
            conversation: messages with ``role`` and ``content``, or a list of such conversations.
            tools: for a template that reads them; Qwen v1 describes tools in the text of a message.
            documents: as ``tools``.
            chat_template: in place of the tokenizer's own.
            add_generation_prompt: end with the header of the assistant's turn.
            continue_final_message: leave the last message open.
            tokenize: False for the text, in which a special token of a message looks like any other.
            sanitize_control_tokens: False parses special tokens in contents, as Qwen's calibration script does.
            return_dict: False for the ids alone.
            return_assistant_tokens_mask: must be False.
            tokenizer_kwargs: more arguments of ``tokenizer(...)``.
            **kwargs: padding, truncation, max_length and return_tensors; the rest are the template's variables.

        Raises:
            UsageError: a message is not text, or an option does not go with the template or with another option.
        """
        _require_possible(return_assistant_tokens_mask, bool(continue_final_message and add_generation_prompt))
        chats, batched = _conversations(conversation)
        template = self.get_chat_template(chat_template, tools)
        chatml = template == CHATML_TEMPLATE
        if chatml:
            _require_chatml(chats, tools or documents, continue_final_message)
        encoding = {name: kwargs.pop(name) for name in _ENCODING_OPTIONS & kwargs.keys()}
        ends: Any = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        if chatml and tokenize:
            rows = [self._chatml_ids(chat, parse=not sanitize_control_tokens, **ends) for chat in chats]
        else:
            defuse = tokenize and sanitize_control_tokens
            inputs: Any = {"conversation": chats, "tools": tools, "documents": documents, **kwargs}
            inputs = defused(inputs) if defuse else inputs
            texts: Any = super().apply_chat_template(**inputs, **ends, chat_template=template, tokenize=False)
            if not tokenize:
                return texts if batched else texts[0]
            rows = [self.vocabulary.encode_rendered(t) if defuse else self.vocabulary.encode(t, "all") for t in texts]
        options = {"add_special_tokens": False, **encoding, **(tokenizer_kwargs or {})}
        encoded = self(rows if batched else rows[0], **options)
        return encoded if return_dict else encoded["input_ids"]

    def _chatml_ids(
        self, chat: Sequence[Any], *, parse: bool, add_generation_prompt: bool, continue_final_message: bool | str
    ) -> list[int]:
        return self.vocabulary.encode_chat(
            chat,
            allowed_special="all" if parse else (),
            header=add_generation_prompt,
            open_end=bool(continue_final_message),
        )

    # ---- files

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the rank files into an existing folder, each byte for byte as the original writes them.

        Raises:
            UsageError: there is no such folder.
        """
        folder = Path(save_directory)
        if not folder.is_dir():
            raise UsageError(f"a vocabulary is saved into a folder that exists, {folder} is none; make it first")
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        files = {"vocab_file": self.vocabulary.ranks, "extra_vocab_file": self.vocabulary.extra_ranks}
        written = {folder / (prefix + self.vocab_files_names[key]): ranks for key, ranks in files.items() if ranks}
        for path, ranks in written.items():
            path.write_bytes(rank_file(ranks.items()))
        return tuple(map(str, written))


_ERRORS = ("replace", "ignore", "strict")


def _require_sound(errors: object, longest: object) -> None:
    """Refuse values of tokenizer_config.json that would fail only once a text is decoded or encoded."""
    if errors not in _ERRORS:
        raise BadModelError(
            f"errors of a Qwen v1 tokenizer must be one of {', '.join(_ERRORS)}, got {errors!r:.100}; correct "
            "tokenizer_config.json, or leave it out"
        )
    if longest is not None and not (isinstance(longest, int | float) and longest >= 1):
        raise BadModelError(
            f"model_max_length of a tokenizer must be a number of tokens from 1, got {longest!r:.100}; correct "
            "tokenizer_config.json, or leave it out"
        )


_ENCODING_OPTIONS = frozenset({"padding", "truncation", "max_length", "return_tensors"})


def _conversations(given: Any) -> tuple[list[Any], bool]:
    """The conversations handed to ``apply_chat_template``, and whether they came as a list of them."""
    given = getattr(given, "messages", given)
    if not len(given):
        raise UsageError("a conversation has at least one message, got none; give the user's")
    batched = not isinstance(given[0], Mapping)
    return [getattr(chat, "messages", chat) for chat in (given if batched else [given])], batched


def _require_possible(offsets: bool, two_ends: bool) -> None:
    """Refuse what no template makes possible: offsets, and a last message both left open and followed by a header."""
    if offsets:
        raise UsageError("this tokenizer knows no offsets, so there is no assistant tokens mask; leave it out")
    if two_ends:
        raise UsageError("continue_final_message and add_generation_prompt exclude each other; drop one of them")


def _require_chatml(chats: Sequence[Any], other_inputs: object, continued: bool | str) -> None:
    """Refuse what ``CHATML_TEMPLATE`` would pass over in silence."""
    if other_inputs or continued not in (True, False, "content"):
        raise UsageError(
            "ChatML knows no tools, no documents and no field to continue but content; leave them out and describe "
            "tools in the text of a message, or give a chat_template that reads them"
        )
    for chat in chats:
        require_text(chat)


class _StandIn(PreTrainedConfig):
    """A configuration that no model has, under which transformers knows the tokenizer."""

    model_type = "qwen-v1-tokenizer"


def register_tokenizer() -> None:
    """Let ``AutoTokenizer`` find this class wherever a folder names a ``QWenTokenizer``. Twice does no harm.

    It is registered under a stand-in, and found by its name. Registered under the model's own configuration it would
    lose: with ``trust_remote_code=True`` transformers then runs the folder's code of 2023 in its place.
    """
    AutoTokenizer.register(_StandIn, slow_tokenizer_class=QWenTokenizer, exist_ok=True)
