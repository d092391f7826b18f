"""The run that is differentiated: code that turns gradients off, or leaves torch, does not cut the graph short."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_LEAVES_TORCH: frozenset[Any] = frozenset(
    {
        torch.Tensor.numpy,
        torch.Tensor.__array__,
        torch.Tensor.tolist,
        torch.Tensor.item,
        torch.Tensor.__float__,
        torch.Tensor.__int__,
        torch.Tensor.__bool__,
        torch.Tensor.__index__,
    }
)
_COMPARES: frozenset[Any] = frozenset(
    {
        *(getattr(torch, name) for name in ("gt", "lt", "ge", "le")),
        *(getattr(torch.Tensor, name) for name in ("gt", "lt", "ge", "le", "__gt__", "__lt__", "__ge__", "__le__")),
    }
)


class PythonValues(TorchFunctionMode):
    """While active, tensors with a graph can become arrays and numbers; which ones did is listed.

    Args:
        seen: Gets the tensors. What Python decides with, or hands on, has to be whole on every rank.
    """

    def __init__(self, seen: list[torch.Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Take note of a tensor that leaves torch, and let it go without its graph; of one number that is compared, too."""
        if func in _COMPARES:
            # A comparison has no gradient. One number of many channels decides for all of them.
            operands = (value for value in args if type(value) is torch.Tensor)
            self.seen += [value for value in operands if value.requires_grad and value.numel() == 1]
        if func in _LEAVES_TORCH and type(args[0]) is torch.Tensor and args[0].requires_grad:
            self.seen.append(args[0])
            args = (args[0].detach(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def gradients_stay_on(no_grad_too: bool) -> Iterator[None]:
    """Make ``inference_mode``, and ``no_grad`` if asked for, do nothing for a while.

    Args:
        no_grad_too: Whether ``no_grad`` is ignored as well. It often stands around parts that need no gradient (rotary
            tables), which are then best left out of the analysis; a step that is wholly under it has nothing else.
    """
    ignored: list[Any] = [torch.inference_mode, *([torch.no_grad] if no_grad_too else [])]
    originals = [(cls, cls.__enter__, cls.__exit__) for cls in ignored]
    for cls in ignored:
        cls.__enter__ = lambda self: None
        cls.__exit__ = lambda self, *error: None
    try:
        with torch.enable_grad():
            yield
    finally:
        for cls, enter, leave in originals:
            cls.__enter__, cls.__exit__ = enter, leave
