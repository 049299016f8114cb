"""The n-th allocation of torch fails: a dispatch mode that counts operators which make a new tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Refusing(TorchDispatchMode):
    """Raises ``torch.OutOfMemoryError`` in the stead of one allocating operator."""

    def __init__(self, number: int) -> None:
        """Args: number: which, from 1; 0: none."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self._number = number

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _allocates(func):
            self.count += 1
            if self.count == self._number:
                raise torch.OutOfMemoryError(f"allocation {self.count}, {func}, was refused")
        call: Callable[..., Any] = func
        return call(*args, **(kwargs or {}))


def _allocates(func: Any) -> bool:
    """Whether an operator returns a tensor that shares no memory with its arguments."""
    return any(result.alias_info is None and "Tensor" in str(result.type) for result in func._schema.returns)
