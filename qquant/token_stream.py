"""The tokens of one generation while they are made: ``generate`` runs in a thread, its consumer sees each token.

Lives here: the thread, how its errors reach the consumer, how it ends early. Not here: prompts, and tokens as text.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import nullcontext
from contextvars import copy_context
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qquant.errors import UsageError


class _Feed(BaseStreamer):
    """Hands generated tokens over to a queue; transformers sends the prompt first, which is left out."""

    def __init__(self, queue: SimpleQueue[int | BaseException | None]) -> None:
        self._queue = queue
        self._prompt_is_next = True

    def put(self, value: Tensor) -> None:
        if not self._prompt_is_next:
            for token in value.flatten().tolist():  # several at once where drafts are verified
                self._queue.put(token)
        self._prompt_is_next = False

    def end(self) -> None:
        """Nothing to flush."""


class _Abandoned(StoppingCriteria):
    """Ends every row once nobody listens any more."""

    def __init__(self, event: Event) -> None:
        self._event = event

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._event.is_set(), dtype=torch.bool, device=input_ids.device)


def stream_tokens(model: Any, input_ids: Tensor, *, stopping_criteria: Any = None, **options: Any) -> Generator[int]:
    """Generate for one prompt and yield each new token as soon as it is there, end markers included.

    Nothing runs before the first token is asked for. When the iterator is closed, dropped or interrupted, generation
    ends after the token it is at, and the thread is gone before the consumer goes on.

    Args:
        model: a transformers model with ``generate``.
        input_ids: [1, L] int64, on the model's device.
        stopping_criteria: criteria besides the model's own.
        **options: passed on to ``generate``; no beams and no second sequence, which cannot be streamed.

    Yields:
        Token ids.

    Raises:
        UsageError: more than one prompt.
        Exception: whatever ``generate`` raises.
    """
    if input_ids.dim() != 2 or len(input_ids) != 1:
        raise UsageError(f"a stream follows one prompt [1, L], got {list(input_ids.shape)}; use chat_batch for several")
    return _tokens(model, input_ids, StoppingCriteriaList(stopping_criteria or []), options)


def _tokens(model: Any, input_ids: Tensor, criteria: StoppingCriteriaList, options: dict[str, Any]) -> Generator[int]:
    queue: SimpleQueue[int | BaseException | None] = SimpleQueue()
    abandoned = Event()
    criteria.append(_Abandoned(abandoned))

    def run() -> None:
        # The current CUDA device belongs to a thread; a new one begins at the first.
        device = torch.cuda.device(input_ids.device) if input_ids.device.type == "cuda" else nullcontext()
        try:
            with device:
                model.generate(input_ids, streamer=_Feed(queue), stopping_criteria=criteria, **options)
        except BaseException as error:  # it belongs to the consumer, who raises it
            queue.put(error)
        else:
            queue.put(None)

    thread = Thread(target=copy_context().run, args=(run,), name="qquant generation", daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        abandoned.set()
        thread.join()
