"""What happens to sizes that are written into a forward? ``x.view(b, n, 8, 64)`` on a rank that holds 4 of the 8 heads.

Where no attribute can be patched, the call itself is: a ``view``, ``reshape`` or ``unflatten`` whose sizes cannot fit
the local tensor gets the one size the planner learned replaced. Calls that fit are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.plan import ShapeRule
from lightning_gpuorch.parallel.tensor_parallel.swap import subclass_of

OPERATIONS: Mapping[Any, str] = {
    torch.Tensor.view: "view",
    torch.Tensor.reshape: "reshape",
    torch.reshape: "reshape",
    torch.Tensor.unflatten: "unflatten",
    torch.unflatten: "unflatten",
}


class ShapeMismatch(TensorParallelError):  # noqa: N818 - an event of the search, not an error of the user
    """A hard-coded size does not fit a rank's tensor and no rule covers the call."""


def _sizes_of(operation: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Give the integer sizes of a call; None if it is not of the simple form."""
    if kwargs or len(args) < 2:
        return None
    if operation == "unflatten":
        sizes: Any = args[2] if len(args) == 3 else None
    else:
        sizes = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
    if not isinstance(sizes, (tuple, list)) or not sizes or not all(type(size) is int for size in sizes):
        return None
    return tuple(sizes)


def _fits(sizes: tuple[int, ...], available: int) -> bool:
    product = 1  # a plain loop: torch.compile traces through here
    for size in sizes:
        if size != -1:
            product *= size
    if -1 in sizes:
        return product > 0 and available % product == 0
    return product == available


def _available(operation: str, args: tuple[Any, ...]) -> int:
    tensor = args[0]
    return int(tensor.shape[args[1]]) if operation == "unflatten" else int(tensor.numel())


def _replaced(operation: str, args: tuple[Any, ...], sizes: tuple[int, ...]) -> tuple[Any, ...]:
    return (*args[:2], sizes) if operation == "unflatten" else (args[0], sizes)


class ShapeRuleMode(TorchFunctionMode):
    """Applies rules on one rank; with a size map, learns them.

    Args:
        rules: Rules known so far, by operation and number of sizes; learning adds to it.
        rank: The rank whose sizes apply.
        size_map: For learning: whole size to the size by rank, likely ones first.
        preference: When several sizes of a call could be the one, which of them to take.
    """

    def __init__(
        self,
        rules: dict[tuple[str, int], ShapeRule],
        rank: int,
        size_map: Mapping[int, tuple[int, ...]] | None = None,
        preference: int = 0,
    ) -> None:
        super().__init__()
        self.rules, self.rank, self.size_map, self.preference = rules, rank, size_map, preference

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        operation = OPERATIONS.get(func)
        sizes = None if operation is None else _sizes_of(operation, args, kwargs)
        if operation is None or sizes is None or _fits(sizes, _available(operation, args)):
            return func(*args, **kwargs)
        adjusted = self._adjust(operation, sizes, _available(operation, args))
        return func(*_replaced(operation, args, adjusted))

    def _adjust(self, operation: str, sizes: tuple[int, ...], available: int) -> tuple[int, ...]:
        key = (operation, len(sizes))
        if key not in self.rules and self.size_map is not None:
            fitting = [rule for rule in self._candidates(operation, sizes) if self._try(rule, sizes, available)]
            if fitting:
                self.rules[key] = fitting[min(self.preference, len(fitting) - 1)]
        adjusted = self._try(self.rules[key], sizes, available) if key in self.rules else None
        if adjusted is None:
            raise ShapeMismatch(f"{operation}{sizes} does not fit a tensor of {available} elements on a rank.")
        return adjusted

    def _candidates(self, operation: str, sizes: tuple[int, ...]) -> list[ShapeRule]:
        assert self.size_map is not None
        return [
            ShapeRule(operation, len(sizes), index - len(sizes), size, local)
            for size, local in self.size_map.items()
            for index in range(len(sizes))
            if sizes[index] == size
        ]

    def _try(self, rule: ShapeRule, sizes: tuple[int, ...], available: int) -> tuple[int, ...] | None:
        index = rule.position + len(sizes)
        if sizes[index] % rule.whole:
            return None
        local = sizes[index] // rule.whole * rule.local[self.rank]
        adjusted = (*sizes[:index], local, *sizes[index + 1 :])
        return adjusted if _fits(adjusted, available) else None


def index_rules(rules: Iterable[ShapeRule]) -> dict[tuple[str, int], ShapeRule]:
    """Key rules the way :class:`ShapeRuleMode` looks them up."""
    return {(rule.operation, rule.num_dims): rule for rule in rules}


class ShapeRuled(nn.Module):
    """A module whose forward runs under shape rules."""

    shape_rules: tuple[ShapeRule, ...]
    shape_rules_rank: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward under the rules."""
        with ShapeRuleMode(index_rules(self.shape_rules), self.shape_rules_rank):
            return super().forward(*args, **kwargs)


def swap_shape_ruled(module: nn.Module, rules: tuple[ShapeRule, ...], rank: int) -> None:
    """Make a module's forward run under shape rules, in place."""
    module.__class__ = subclass_of(type(module), ShapeRuled, False)
    module.shape_rules, module.shape_rules_rank = rules, rank  # type: ignore[assignment]
