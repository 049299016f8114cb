"""A conversation with a loaded model: its turns, its settings, the prompt of the next one and the answer as it comes.

For the original Qwen (v1), for models with a chat template, and for base models that only continue text. Nothing here
reads or writes a terminal; chat.py does, with the words of chat_terminal.py.
"""

from __future__ import annotations

import copy
import logging
from bisect import bisect_left
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, LogitsProcessor

from qquant.chat_templates import apply_template
from qquant.chat_terminal import SETTINGS
from qquant.errors import BadModelError, DoesNotFitError, NumericError, QquantError, UsageError
from qquant.models.qwen.chat import MAX_NEW_TOKENS, chat_config, require_rows, without_sampling
from qquant.models.qwen.context import MAX_WINDOW_SIZE, windowed_context
from qquant.models.qwen.vocabulary import DEFAULT_SYSTEM
from qquant.token_stream import stream_tokens

Style = Literal["chatml", "template", "raw"]
"""How a prompt is made: Qwen v1's ``make_context``, the tokenizer's chat template, or the bare text."""
Wanted = Literal["auto", "chatml", "raw"]
"""What a user may say about it."""

_LOG = logging.getLogger(__name__)

_STRETCH = 4
"""How many times its positions a Qwen v1 model is asked to read where nobody widens the window: what its authors show
dynamic NTK to serve, 32768 tokens for 8192. There is no end to what NTK computes; this is one to waiting for it."""

_SETTING_FAULTS = (ValueError, TypeError, ImportError, AssertionError)
"""What transformers raises, mostly while it prepares to generate, for settings that it cannot follow."""

_TEMPLATE_FAULTS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError)
"""What the expressions of a chat template can raise, besides the errors of the template language."""

_HALF = "\ufffd"
"""What a character decodes to of which only some bytes are there."""


@dataclass(frozen=True)
class Prompt:
    """What is asked next, ready to be generated for."""

    query: str
    ids: list[int]
    left_out: int
    """Turns of the history, the oldest ones, that did not fit."""


class FiniteLogits(LogitsProcessor):
    """Ends a generation whose logits are not finite: greedily decoded, NaN would be a token like any other."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """``scores`` as they are; -inf marks what is not to be chosen, as long as something may be."""
        if not torch.isfinite(scores.amax()):  # NaN where any of them is
            raise NumericError("the model's logits must be finite to choose a token; try --dtype float32")
        return scores


def choose_style(model: Any, tokenizer: Any, wanted: str = "auto") -> Style:
    """How to prompt a model.

    Args:
        model: its generation config says whether a Qwen v1 model is a chat model.
        tokenizer: a Qwen v1 tokenizer, or one with or without a chat template.
        wanted: "auto", "raw" to continue text, or "chatml" for a Qwen v1 model that does not say what it is.

    Raises:
        UsageError: a base model was to chat, or ChatML is asked of a model that is not Qwen v1.
    """
    if wanted not in get_args(Wanted):
        raise UsageError(f"the format must be one of {', '.join(get_args(Wanted))}, got {wanted!r}")
    if wanted == "raw":
        return "raw"
    if hasattr(tokenizer, "im_start_id"):
        declared = getattr(model.generation_config, "chat_format", None)
        if wanted == "chatml" or declared == "chatml":
            return "chatml"
        raise UsageError(
            f'generation_config.json must say "chat_format": "chatml" for a chat, it says {declared!r}; choose the '
            "format raw to let a base model continue text, or chatml if this one was taught to chat"
        )
    if wanted == "chatml":
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
        UsageError: a system prompt for a base model, which knows none, or one that is no text.
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
    _said_greedy: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.style == "raw" and self.system is not None:
            raise UsageError("a base model that continues text has no system prompt; leave it out")
        _require_text("a system prompt", self.system or "")

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
            UsageError: the query alone leaves no room for an answer, or it is no text.
            BadModelError: generation_config.json or the chat template cannot be followed, or the tokenizer has tokens
                that the model has no rows for.
        """
        _require_text("a query", query)
        self._settings()
        prompt = self._prompt(query)
        require_rows(self.model, prompt.ids)
        return prompt

    def _prompt(self, query: str) -> Prompt:
        if self.style == "chatml":
            return self._windowed(query)
        if self.style == "raw":
            ids = self.tokenizer(query)["input_ids"]
            if not ids:
                raise UsageError("there is nothing to continue: the text has no tokens; write some")
            self._require_room(ids)
            return Prompt(query, ids, 0)
        return self._templated(query)

    def answer(self, prompt: Prompt) -> Generator[str]:
        """Generate, and yield the answer so far after each token; each text begins with the one before.

        When it ends, or is closed or interrupted, what came until then is the newest turn of the history.

        Raises:
            BadModelError: generation_config.json has settings that cannot be followed.
            DoesNotFitError: the device's memory does not suffice.
            NumericError: the model's logits are not finite.
        """
        try:
            config, options = self._generation()
        except (QquantError, torch.OutOfMemoryError):
            raise
        except _SETTING_FAULTS as error:
            raise self._cannot_follow(error) from error
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
        except QquantError:
            raise
        except _SETTING_FAULTS as error:
            raise self._cannot_follow(error) from error
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
        _, ids, kept = windowed_context(
            self.tokenizer,
            query,
            self.history,
            DEFAULT_SYSTEM if self.system is None else self.system,
            self._window(),
        )
        self._require_room(ids)
        return Prompt(query, ids, len(self.history) - kept)

    def _templated(self, query: str) -> Prompt:
        """A prompt by the chat template, from the first turn on that leaves room for an answer."""
        room, turns = self._room(), len(self.history)
        prompts: dict[int, list[int]] = {}

        def fits(first: int) -> bool:
            prompts[first] = self._rendered(query, self.history[first:])
            return room is None or len(prompts[first]) <= room

        # Mostly all of it fits. If not, bisect: fewer turns make no longer prompt, and rendering one is slow.
        first = 0 if fits(0) else bisect_left(range(turns + 1), True, lo=1, key=fits)
        if first > turns:
            raise self._too_long(len(prompts[turns]), room or 0)
        return Prompt(query, prompts[first], first)

    def _rendered(self, query: str, turns: list[tuple[str, str]]) -> list[int]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for asked, answered in turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        try:
            ids: list[int] = apply_template(
                self.tokenizer,
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
        except QquantError:
            raise
        except _TEMPLATE_FAULTS as error:
            raise BadModelError(
                f"the model's chat template cannot be followed: {_named(error)}; take it from the model's own source"
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
        config = self.model.config
        if config.model_type == "qwen":
            return self._window() + _STRETCH * int(max(config.max_position_embeddings, config.seq_length))
        positions = self._positions()
        return None if positions is None else positions - self._max_new_tokens()

    def _window(self) -> int:
        window = self.setting("max_window_size")
        return MAX_WINDOW_SIZE if window is None else int(window)

    def _require_room(self, ids: list[int]) -> None:
        room = self._room()
        if room is not None and len(ids) > room:
            raise self._too_long(len(ids), room)

    def _max_new_tokens(self) -> int:
        chosen = self.setting("max_new_tokens")
        if chosen is not None:
            return int(chosen)
        positions = self._positions()
        return MAX_NEW_TOKENS if positions is None else min(MAX_NEW_TOKENS, positions // 2)

    def _too_long(self, length: int, room: int) -> UsageError:
        if self.model.config.model_type == "qwen":
            enough = self._window() + length - room
            return UsageError(
                f"a prompt may have {_STRETCH} times the model's positions and max_window_size={self._window()} tokens "
                f"more, here {room}, it has {length}; shorten it, or set max_window_size={enough}"
            )
        return UsageError(
            f"prompt and answer must fit {self._positions()} positions: the prompt has {length} tokens and "
            f"max_new_tokens={self._max_new_tokens()} leaves {max(room, 0)}; shorten it or lower max_new_tokens"
        )

    def _settings(self) -> GenerationConfig:
        """The model's settings under the user's, by the rules for what is typed. A new object."""
        config: GenerationConfig = copy.deepcopy(self.model.generation_config)
        for name, value in self.overrides.items():
            setattr(config, name, value)
        if config.do_sample is True and type(config.temperature) in (int, float) and config.temperature == 0:
            config.do_sample = False
            if not self._said_greedy:
                _LOG.warning("the model's temperature is 0, which nothing can be sampled at: answers are greedy")
            self._said_greedy = True
        without_sampling(config)
        for name, setting in SETTINGS.items():
            value = getattr(config, name, None)
            if value is not None and not setting.takes(value):
                raise BadModelError(
                    f"{name} in the model's generation_config.json must be {setting.rule}, got {value!r:.100}; correct "
                    f"the file, or set it by --conf {name}=..."
                )
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if any(end is not None and type(end) is not int for end in ends):
            raise BadModelError(
                "eos_token_id in the model's generation_config.json must be an id or a list of ids, got "
                f"{config.eos_token_id!r:.100}; correct the file"
            )
        return config

    def _cannot_follow(self, error: Exception) -> BadModelError:
        return BadModelError(
            f"the model's generation_config.json cannot be followed: {_named(error)}; correct or remove the setting"
        )

    def _generation(self) -> tuple[GenerationConfig, dict[str, Any]]:
        """The settings of the next answer, and what else ``generate`` needs."""
        config = self._settings()
        config.max_new_tokens, config.max_length = self._max_new_tokens(), None
        config.num_beams = config.num_return_sequences = 1  # what can be followed token by token
        config.return_dict_in_generate = False
        if hasattr(self.tokenizer, "im_start_id"):
            config, masking = chat_config(self.model, self.tokenizer, config)
            return config, {"logits_processor": [*masking, FiniteLogits()]}
        if config.eos_token_id is None:
            config.eos_token_id = self.tokenizer.eos_token_id
        if config.pad_token_id is None:
            first = config.eos_token_id
            config.pad_token_id = first[0] if isinstance(first, list) else first
        return config, {"logits_processor": [FiniteLogits()]}

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _named(error: Exception) -> str:
    """An error as its kind and its first line."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _require_text(what: str, text: str) -> None:
    """Refuse text with a lone surrogate: what Python reads bytes as that are not in the terminal's encoding."""
    place = next((index for index, character in enumerate(text, 1) if "\ud800" <= character <= "\udfff"), None)
    if place is not None:
        raise UsageError(
            f"{what} must be text, and character {place} of this one is no text: a byte outside the encoding of the "
            "terminal or pipe, or half a surrogate pair; write it anew, or in that encoding"
        )
