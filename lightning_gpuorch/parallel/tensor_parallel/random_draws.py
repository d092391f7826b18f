"""Random numbers are drawn for whole tensors only: a mask of a rank's own channels is not a slice of the whole mask."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Draw = tuple[str, tuple[tuple[int, ...], ...]]
"""What was drawn: the operation, and the shapes it filled."""


class RandomDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, lists the operations that took numbers from a random generator of torch.

    Attributes:
        drawn: The draws, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn: list[Draw] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Planning compiles nothing, and looking whether it does would take longer than the operations."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and see whether a generator moved on."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        generator = kwargs.get("generator") or torch.default_generator
        before = generator.get_state()
        result = func(*args, **kwargs)
        if not torch.equal(before, generator.get_state()):
            outputs = result if isinstance(result, (tuple, list)) else (result,)
            shapes = tuple(tuple(value.shape) for value in outputs if isinstance(value, torch.Tensor))
            self.drawn.append((func.name(), shapes))
        return result
