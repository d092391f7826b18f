"""Planning runs a model on one rank alone: a model that talks to other ranks by itself would wait there for ever."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gpuorch.errors import TensorParallelError


class CommunicatesError(TensorParallelError):
    """The model calls collectives of its own."""


class NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, a collective raises :class:`CommunicatesError` instead of waiting for ranks that do not take part."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Planning compiles nothing, and looking whether it does would take longer than the operations."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let everything but collectives pass."""
        if "c10d" in func.namespace:
            raise CommunicatesError(
                f"the model calls the collective {func.__name__} itself, so it is taken to share its work on its own."
            )
        return func(*args, **(kwargs or {}))
