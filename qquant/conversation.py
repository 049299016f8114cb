"""A conversation with a loaded model: its turns, its settings, the prompt of the next one and the answer as it comes.

For the original Qwen (v1), for models with a chat template, and for base models that only continue text. Nothing here
reads or writes a terminal; chat.py does, with the words of chat_terminal.py.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig

from qquant.errors import DoesNotFitError, NumericError, UsageError
from qquant.models.qwen.chat import DEFAULT_SYSTEM, chat_config, without_sampling
from qquant.models.qwen.context import MAX_WINDOW_SIZE, make_context
from qquant.token_stream import stream_tokens

Style = Literal["chatml", "template", "raw"]
"""How a prompt is made: Qwen v1's ``make_context``, the tokenizer's chat template, or the bare text."""
Asked = Literal["auto", "chatml", "raw"]

_MAX_NEW_TOKENS = 512  # where neither the model nor the user says another number
_HALF = "\ufffd"
"""What a character decodes to of which only some bytes are there."""


@dataclass(frozen=True)
class Prompt:
    """What is asked next, ready to be generated for."""

    query: str
    ids: list[int]
    left_out: int
    """Turns of the history, the oldest ones, that did not fit."""


def choose_style(model: Any, tokenizer: Any, asked: str = "auto") -> Style:
    """How to prompt a model.

    Args:
        model: its generation config says whether a Qwen v1 model is a chat model.
        tokenizer: a Qwen v1 tokenizer, or one with or without a chat template.
        asked: "auto", "raw" to continue text, or "chatml" for a Qwen v1 model that does not say what it is.

    Raises:
        UsageError: a base model was to chat, or ChatML is asked of a model that is not Qwen v1.
    """
    if asked not in get_args(Asked):
        raise UsageError(f"the format must be one of {', '.join(get_args(Asked))}, got {asked!r}")
    if asked == "raw":
        return "raw"
    if hasattr(tokenizer, "im_start_id"):
        declared = getattr(model.generation_config, "chat_format", None)
        if asked == "chatml" or declared == "chatml":
            return "chatml"
        raise UsageError(
            f'generation_config.json must say "chat_format": "chatml" for a chat, it says {declared!r}; choose the '
            "format raw to let a base model continue text, or chatml if this one was taught to chat"
        )
    if asked == "chatml":
        raise UsageError("the format chatml is for the original Qwen models; leave it out, and the chat template rules")
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "a chat needs a chat template, this model's tokenizer has none; choose the format raw to let a base model "
            "continue text, or take the chat template from the model's own source"
        )
    return "template"


@dataclass
class Conversation:
    """The state of one conversation.

    Raises:
        UsageError: a system prompt for a base model, which knows none.
    """

    model: Any
    tokenizer: Any
    style: Style
    system: str | None = None
    """None: Qwen v1's own, or what the chat template makes of none."""
    seed: int = 0
    """Of the sampling of every answer: the same question in the same state has the same answer."""
    history: list[tuple[str, str]] = field(default_factory=list)
    """Turns, oldest first: (query, answer)."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the model's own."""

    def __post_init__(self) -> None:
        if self.style == "raw" and self.system is not None:
            raise UsageError("a base model that continues text has no system prompt; leave it out")

    def set(self, values: Mapping[str, Any]) -> None:
        """Change settings of generation; None undoes an earlier change."""
        for name, value in values.items():
            if value is None:
                self.overrides.pop(name, None)
            else:
                self.overrides[name] = value

    def setting(self, name: str) -> Any:
        """What holds now: the user's, else the model's; None where neither says."""
        return self.overrides.get(name, getattr(self.model.generation_config, name, None))

    def prepare(self, query: str) -> Prompt:
        """The prompt that asks ``query`` next, with as much of the history as fits.

        Raises:
            UsageError: the query alone leaves no room for an answer.
        """
        if self.style == "chatml":
            return self._windowed(query)
        if self.style == "raw":
            ids = self.tokenizer(query)["input_ids"]
            if not ids:
                raise UsageError("there is nothing to continue: the text has no tokens; write some")
            room = self._room()
            if room is not None and len(ids) > room:
                raise self._too_long(len(ids), room)
            return Prompt(query, ids, 0)
        return self._templated(query)

    def answer(self, prompt: Prompt) -> Generator[str]:
        """Generate, and yield the answer so far after each token; each text begins with the one before.

        When it ends, or is closed or interrupted, what came until then is the newest turn of the history.

        Raises:
            DoesNotFitError: the device's memory does not suffice.
            NumericError: the model's logits are not finite.
        """
        config, options = self._generation()
        ids = torch.tensor([prompt.ids], device=self.model.device)
        options |= {"attention_mask": torch.ones_like(ids), "generation_config": config}
        torch.manual_seed(self.seed)
        tokens: list[int] = []
        complete = False
        try:
            with closing(stream_tokens(self.model, ids, **options)) as stream:
                for token in stream:
                    tokens.append(token)
                    yield self._text(tokens).rstrip(_HALF)
            complete = True
            yield self._text(tokens)
        except (GeneratorExit, KeyboardInterrupt):
            complete = True
            raise
        except torch.OutOfMemoryError as error:
            raise DoesNotFitError(
                f"the answer does not fit the device's memory; forget the conversation with :clear: {error}"
            ) from error
        except RuntimeError as error:
            if "probability tensor" not in str(error):  # torch's words where it is to sample from NaN
                raise
            raise NumericError("the model's logits must be finite to sample from; try --dtype float32") from error
        finally:
            if complete and tokens and self.style != "raw":
                self.history.append((prompt.query, self._text(tokens).strip()))

    def _windowed(self, query: str) -> Prompt:
        """A prompt by Qwen v1's own rule."""
        window = self.setting("max_window_size")
        _, ids = make_context(
            self.tokenizer,
            query,
            self.history,
            DEFAULT_SYSTEM if self.system is None else self.system,
            MAX_WINDOW_SIZE if window is None else window,
        )
        # System, query and answer begin with the marker once each, a turn twice, and no text can contain its id.
        kept = (ids.count(self.tokenizer.im_start_id) - 3) // 2
        return Prompt(query, ids, len(self.history) - kept)

    def _templated(self, query: str) -> Prompt:
        """A prompt by the chat template, from the first turn on that leaves room for an answer."""
        room = self._room()
        for first in range(len(self.history) + 1):
            ids = self._rendered(query, self.history[first:])
            if room is None or len(ids) <= room:
                return Prompt(query, ids, first)
        raise self._too_long(len(ids), room or 0)

    def _rendered(self, query: str, turns: list[tuple[str, str]]) -> list[int]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for asked, answered in turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                [*messages, {"role": "user", "content": query}],
                add_generation_prompt=True,
                return_dict=False,
                # Special tokens in messages are text; the template alone says where turns begin and end.
                sanitize_control_tokens=True,
            )
        except TemplateError as error:
            raise UsageError(
                f"the model's chat template refuses the conversation: {error}; many know no system prompt"
            ) from error
        return ids

    def _positions(self) -> int | None:
        """Positions that the model knows; None where its config does not say, and for Qwen v1, which stretches them."""
        if self.model.config.model_type == "qwen":
            return None
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    def _room(self) -> int | None:
        """Tokens that a prompt may have; None: any number."""
        positions = self._positions()
        return None if positions is None else positions - self._max_new_tokens()

    def _max_new_tokens(self) -> int:
        chosen = self.setting("max_new_tokens")
        if chosen is not None:
            return int(chosen)
        positions = self._positions()
        return _MAX_NEW_TOKENS if positions is None else min(_MAX_NEW_TOKENS, positions // 2)

    def _too_long(self, length: int, room: int) -> UsageError:
        return UsageError(
            f"prompt and answer must fit {self._positions()} positions: the prompt has {length} tokens and "
            f"max_new_tokens={self._max_new_tokens()} leaves {max(room, 0)}; shorten it or lower max_new_tokens"
        )

    def _generation(self) -> tuple[GenerationConfig, dict[str, Any]]:
        """The settings of the next answer, and what else ``generate`` needs."""
        config = copy.deepcopy(self.model.generation_config)
        for name, value in self.overrides.items():
            setattr(config, name, value)
        config.max_new_tokens, config.max_length = self._max_new_tokens(), None
        config.num_beams = config.num_return_sequences = 1  # what can be followed token by token
        config.return_dict_in_generate = False
        if hasattr(self.tokenizer, "im_start_id"):
            config, masking = chat_config(self.model, self.tokenizer, config)
            return config, {"logits_processor": masking} if masking else {}
        without_sampling(config)
        if config.eos_token_id is None:
            config.eos_token_id = self.tokenizer.eos_token_id
        if config.pad_token_id is None:
            first = config.eos_token_id
            config.pad_token_id = first[0] if isinstance(first, list) else first
        return config, {}

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
