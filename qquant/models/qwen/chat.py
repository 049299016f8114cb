"""``chat`` on the original Qwen (v1) models: one answer, several at once, or one as it is being made.

Lives here: the mixin that gives the model these methods, what ends and restricts a generation, stop words. Not here:
the prompt and what of the output is the answer (context.py), and how tokens are streamed (token_stream.py).
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import LogitsProcessorList, SuppressTokensLogitsProcessor

from qquant.errors import BadModelError, UsageError
from qquant.models.qwen.context import (
    MAX_WINDOW_SIZE,
    History,
    checked_turns,
    make_context,
    require_own,
    split_answer,
)
from qquant.models.qwen.vocabulary import DEFAULT_SYSTEM
from qquant.token_stream import stream_tokens

MAX_NEW_TOKENS = 512
"""Of an answer where nobody says another number, as in every published generation_config.json: transformers' own
default of 20 is no answer."""

# Values that transformers takes for "not set"; None would be filled from the model's own config again.
_NEUTRAL = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


class StopSequences(StoppingCriteria):
    """Ends each row of a batch when what it generated ends in one of some sequences of ids, which stays in the output.

    ``generate``'s own ``eos_token_id`` does this for single ids and its ``stop_strings`` for text; this is for several
    ids in a row, as Qwen's ``stop_words_ids`` names them.

    Args:
        sequences: the sequences, none of them empty. Read, never written.
        prompt_length: columns of the prompt, padding included; a sequence is not looked for in them.

    Raises:
        UsageError: they are no sequences of ids.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], prompt_length: int) -> None:
        try:
            self._sequences = [torch.tensor([int(index) for index in sequence]) for sequence in sequences]
        except (TypeError, ValueError) as error:
            raise UsageError(f"stop_words_ids must be a list of lists of ids, got {sequences!r:.100}") from error
        if not all(len(sequence) for sequence in self._sequences):
            raise UsageError("each of stop_words_ids must hold at least one id, got an empty one; leave it out")
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Any, scores: Any, new_token_length: int = 1, **kwargs: Any) -> Any:
        """[B] bool: the rows that are done; ``new_token_length`` tokens came since the last call."""
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for sequence in self._sequences:
            first = input_ids.shape[1] - new_token_length - len(sequence) + 1
            tail = input_ids[:, max(first, self._prompt_length) :]
            if tail.shape[1] >= len(sequence):
                windows = tail.unfold(1, len(sequence), 1)  # [B, places, len(sequence)]
                done |= (windows == sequence.to(windows.device)).all(-1).any(-1)
        return done


class TokenlessIds(SuppressTokensLogitsProcessor):
    """Never chooses given ids, whatever else is suppressed.

    A class of its own, because ``generate`` drops the processor of its setting ``suppress_tokens`` where it is handed
    another one of exactly the same class.
    """


class QWenChat:
    """What a Qwen v1 model offers besides ``generate``: answers in a conversation. Mixed into ``QWenLMHeadModel``."""

    def chat(
        self,
        tokenizer: Any,
        query: str,
        history: History | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answer one query of a conversation.

        Args:
            tokenizer: the model's ``QWenTokenizer``.
            query: what the user says now.
            history: earlier turns. Read, never written.
            system: the system prompt.
            stop_words_ids: sequences of ids that also end the answer; it then ends with the one that was met. Read,
                never written.
            generation_config: how to generate; None: as generation_config.json says.
            **kwargs: ``max_window_size``, see ``make_context``, and anything that ``generate`` takes.

        Returns:
            The answer, and a new history that ends with this turn.

        Raises:
            UsageError: the model is no chat model, ``stream`` is asked for, or an argument is not what it should be.
            BadModelError: the prompt has a token that the model has no row for.
        """
        turns = checked_turns(history)
        (answer,) = self.chat_batch(tokenizer, [query], [turns], system, stop_words_ids, generation_config, **kwargs)
        return answer, [*turns, (query, answer)]

    def chat_batch(
        self,
        tokenizer: Any,
        queries: Sequence[str],
        histories: Sequence[History | None] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Answer one query in each of several conversations, all at once.

        Prompts are padded on the left, and each row ends at its own end marker. Decoded greedily, each answer is the
        one that ``chat`` gives, up to rounding.

        Args:
            tokenizer: as in ``chat``, and so all arguments that are not named here.
            queries: one per conversation.
            histories: earlier turns of each; None: none anywhere.
            system: the system prompt of all.
            stop_words_ids: see ``chat``.
            generation_config: see ``chat``.
            **kwargs: see ``chat``.

        Returns:
            The answers.

        Raises:
            UsageError: as ``chat``, or no query, or another number of histories.
        """
        _refuse_stream(kwargs)
        histories = [None] * len(queries) if histories is None else histories
        if isinstance(queries, str) or not queries or len(histories) != len(queries):
            raise UsageError(
                f"chat_batch takes a list of queries and as many histories, got {type(queries).__name__} of "
                f"{len(queries)} and {len(histories)} histories"
            )
        model: Any = self
        config, window, options = _settings(model, tokenizer, generation_config, kwargs)
        prompts = [
            make_context(tokenizer, query, turns, system, window)[1]
            for query, turns in zip(queries, histories, strict=True)
        ]
        for prompt in prompts:
            require_rows(model, prompt)
        rows, mask = _left_padded(prompts, tokenizer.eod_id, model.device)
        options = _with_stops(options, stop_words_ids, rows.shape[1])
        output = model.generate(rows, attention_mask=mask, generation_config=config, **options)
        return [split_answer(row, tokenizer, "chatml")[0] for row in output[:, rows.shape[1] :].tolist()]

    def chat_stream(
        self,
        tokenizer: Any,
        query: str,
        history: History | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        logits_processor: Any = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        """Answer one query while it is being generated. Arguments and errors as of ``chat``, but for these.

        Args:
            tokenizer: the model's ``QWenTokenizer``.
            query: what the user says now.
            history: earlier turns. Read, never written; there is no new one, the last text is the answer.
            system: the system prompt.
            stop_words_ids: see ``chat``.
            logits_processor: processors that come before the model's own.
            generation_config: see ``chat``.
            **kwargs: see ``chat``.

        Returns:
            An iterator of the whole text so far, once per token, never with half a character at its end. Closing or
            dropping it ends the generation after the token it is at.
        """
        _refuse_stream(kwargs)
        model: Any = self
        config, window, options = _settings(
            model, tokenizer, generation_config, {**kwargs, "logits_processor": logits_processor}
        )
        if (config.num_beams or 1) > 1:
            raise UsageError(f"beams cannot be followed token by token, got num_beams={config.num_beams}; use chat")
        prompt = make_context(tokenizer, query, history, system, window)[1]
        require_rows(model, prompt)
        rows, mask = _left_padded([prompt], tokenizer.eod_id, model.device)
        options = _with_stops(options, stop_words_ids, rows.shape[1])
        stream = stream_tokens(model, rows, attention_mask=mask, generation_config=config, **options)
        return _texts(stream, tokenizer)


def chat_config(model: Any, tokenizer: Any, config: GenerationConfig) -> tuple[GenerationConfig, LogitsProcessorList]:
    """How ``generate`` has to run for a chat: what ends an answer, and which ids it never chooses.

    Args:
        model: a Qwen v1 model. Not changed.
        tokenizer: its tokenizer.
        config: how the caller wants it; what it leaves open is filled from the model's own. Not changed.

    Returns:
        A new config, and a processor against the rows of ``lm_head`` that no token has (empty if the model masks them).

    Raises:
        UsageError: the tokenizer has ids for text or turns that the model has no rows for, or several answers are asked
            for.
    """
    require_own(tokenizer)
    rows = model.config.vocab_size
    markers = {tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id}
    if max(markers) >= rows:  # the 205 others are never made of a message: a small model may do without them
        raise UsageError(
            f"the tokenizer needs ids up to {max(markers)} and the model has only {rows} rows for them; load the "
            "tokenizer from the model's own folder"
        )
    config = copy.deepcopy(config)
    for name, value in model.generation_config.to_dict().items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    if (config.num_return_sequences or 1) > 1:
        raise UsageError(
            f"a query has one answer, got num_return_sequences={config.num_return_sequences}; repeat it in chat_batch"
        )
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = sorted(markers.union(index for index in own if index is not None))
    config.pad_token_id = tokenizer.eod_id  # of rows that are done: an end marker, so decode_tokens drops it
    config.return_dict_in_generate = False
    if config.max_new_tokens is None and config.max_length is None:
        config.max_new_tokens = MAX_NEW_TOKENS
    without_sampling(config)
    unused = list(range(len(tokenizer), getattr(model, "used_ids", rows)))
    masking = [TokenlessIds(unused, device=str(model.device))] if unused else []
    return config, LogitsProcessorList(masking)


def require_rows(model: Any, ids: Sequence[int]) -> None:
    """Refuse a prompt with an id that a model, of any family, has no row for, such as a token added to its tokenizer.

    Raises:
        BadModelError: it has one.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if ids and max(ids) >= rows:
        raise BadModelError(
            f"every token of a prompt needs a row of the model, this one has the id {max(ids)} and the model {rows} "
            "rows; take the tokenizer's files from the model's own source, without the tokens added to it"
        )


def without_sampling(config: GenerationConfig) -> None:
    """Take the sampling settings out of a config that does not sample: transformers warns about each. In place."""
    if config.do_sample is not True:
        for name, neutral in _NEUTRAL.items():
            setattr(config, name, neutral)


def _settings(
    model: Any, tokenizer: Any, config: GenerationConfig | None, options: dict[str, Any]
) -> tuple[GenerationConfig, int, dict[str, Any]]:
    """The config to generate with, the window, and what is left of a caller's keyword arguments for ``generate``."""
    config = copy.deepcopy(model.generation_config if config is None else config)
    window = options.pop("max_window_size", None)
    given = list(options.pop("logits_processor", None) or [])
    rest = config.update(**options)
    config, masking = chat_config(model, tokenizer, config)
    if (chat_format := getattr(config, "chat_format", None)) != "chatml":
        raise UsageError(
            f'chat needs "chat_format": "chatml" in generation_config.json, got {chat_format!r}; a base model only '
            'continues text (use generate); for one taught to chat set model.generation_config.chat_format = "chatml"'
        )
    if window is None:
        window = getattr(config, "max_window_size", None)
    if given or masking:
        rest["logits_processor"] = LogitsProcessorList([*given, *masking])
    return config, MAX_WINDOW_SIZE if window is None else int(window), rest


def _with_stops(
    options: dict[str, Any], stop_words_ids: Sequence[Sequence[int]] | None, prompt_length: int
) -> dict[str, Any]:
    """The options of ``generate`` with a criterion for the caller's stop words."""
    if not stop_words_ids:
        return options
    criteria = [*(options.get("stopping_criteria") or []), StopSequences(stop_words_ids, prompt_length)]
    return {**options, "stopping_criteria": StoppingCriteriaList(criteria)}


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask, both [B, longest] int64, of prompts that end together."""
    longest = max(map(len, prompts))
    rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def _texts(stream: Generator[int], tokenizer: Any) -> Iterator[str]:
    """The text so far after each token; half a character is held back until its other bytes are there."""
    tokens = []
    with closing(stream):
        for token in stream:
            tokens.append(token)
            yield tokenizer.decode(tokens, skip_special_tokens=True, errors="ignore")


def _refuse_stream(options: dict[str, Any]) -> None:
    if "stream" in options:
        raise UsageError("chat has no option stream; iterate over chat_stream(...) with the same arguments instead")
