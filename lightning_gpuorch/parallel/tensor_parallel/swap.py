"""Gives a module another forward: its class becomes a subclass, in place.

``isinstance``, ``module.weight``, state-dict keys, hooks, ``torch.compile`` and pickling go on working, which an
instance attribute ``forward`` or a wrapper module would not give.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_gpuorch.parallel.tensor_parallel.layer_calls import LayerCalls

_subclasses: dict[tuple[Any, ...], type[nn.Module]] = {}


def subclass_of(original: type[nn.Module], behaviour: type, inside: bool) -> type[nn.Module]:
    """Give the class that joins a module's class with a behaviour.

    Args:
        original: The module's class.
        behaviour: A class whose ``forward`` is wanted.
        inside: False: the behaviour's forward replaces the module's. True: the module's own forward runs, and the
            library operation on the layer's weight inside of it is the behaviour's.
    """
    key = (original, behaviour, inside)
    if key not in _subclasses:
        bases = (original, behaviour) if inside else (behaviour, original)
        namespace: dict[str, Any] = {
            "__module__": original.__module__,
            "__doc__": original.__doc__,
            "__reduce_ex__": _reduce,
            "_gpuorch_swap": key,
        }
        if inside:
            namespace["forward"] = _forward_inside(original, behaviour)
        name = behaviour.__name__ if original in behaviour.__mro__ else f"{behaviour.__name__}Of{original.__name__}"
        _subclasses[key] = type(name, bases, namespace)
    return _subclasses[key]


def swap_class(module: nn.Module, behaviour: type, inside: bool = False) -> None:
    """Give ``module`` a behaviour, in place."""
    module.__class__ = subclass_of(type(module), behaviour, inside)


def _forward_inside(original: type[nn.Module], behaviour: Any) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        compute = functools.partial(behaviour.apply_to, self)
        with LayerCalls(self.weight, getattr(self, "bias", None), compute):
            return original.forward(self, *args, **kwargs)

    return forward


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    return _rebuild, (type(self)._gpuorch_swap,), self.__dict__.copy()  # type: ignore[attr-defined]


def _rebuild(swap: tuple[type[nn.Module], type, bool]) -> nn.Module:
    cls = subclass_of(*swap)
    return cls.__new__(cls)
