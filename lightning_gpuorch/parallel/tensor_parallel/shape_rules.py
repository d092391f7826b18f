"""Sizes that are written into a forward are adjusted: ``x.view(b, n, 8, 64)`` on a rank that holds 4 of the 8 heads.

Where no attribute can be patched, the call itself is: a ``view``, ``reshape`` or ``unflatten`` gets the one size the
planner learned replaced. A call without ``-1`` tells by itself whether its tensor is whole: then it fits and is left
alone. A call with ``-1`` may fit a local tensor by chance of its length, so a rule for such calls holds for all of them,
whether they fit or not; where a module makes both kinds of such calls, no rule passes the verifier.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
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


Key = tuple[str, int, bool]
"""What rules are looked up by: operation, number of sizes, whether one of them is ``-1``."""


@dataclasses.dataclass
class RuleSearch:
    """One attempt at rules for a block: what is chosen for the calls it makes.

    Where several sizes of a call could be the one the cut changes, or none of them, there is a choice. Attempts with
    growing numbers go through all combinations, likely ones first.

    Attributes:
        sizes: Whole size to the size by rank, likely ones first.
        attempt: Number of the attempt.
        num_attempts: How many there are, as far as this one has seen.
        chosen: The choices.
    """

    sizes: Mapping[int, tuple[int, ...]]
    attempt: int
    num_attempts: int = 1
    chosen: dict[Key, ShapeRule | None] = dataclasses.field(default_factory=dict)

    def choose(self, key: Key, options: Sequence[ShapeRule | None]) -> None:
        """Choose for a kind of call that is seen for the first time."""
        if options:
            self.chosen[key] = options[self.attempt // self.num_attempts % len(options)]
            self.num_attempts *= len(options)

    @property
    def rules(self) -> tuple[ShapeRule, ...]:
        """The rules that were chosen."""
        return tuple(rule for rule in self.chosen.values() if rule is not None)


class ShapeRuleMode(TorchFunctionMode):
    """Applies rules on one rank; with a search, finds them.

    Args:
        rules: The rules.
        rank: The rank whose sizes apply.
        search: Chooses for calls that are seen for the first time.
    """

    def __init__(self, rules: Mapping[Key, ShapeRule | None], rank: int, search: RuleSearch | None = None) -> None:
        super().__init__()
        self.rules, self.rank, self.search = (rules if search is None else search.chosen), rank, search

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
        if operation is None or sizes is None:
            return func(*args, **kwargs)
        available = _available(operation, args)
        adjusted = self._adjust(operation, sizes, available)
        if adjusted is not None:
            return func(*_replaced(operation, args, adjusted))
        if not _fits(sizes, available):
            raise ShapeMismatch(f"{operation}{sizes} does not fit a tensor of {available} elements on a rank.")
        return func(*args, **kwargs)

    def _adjust(self, operation: str, sizes: tuple[int, ...], available: int) -> tuple[int, ...] | None:
        """Give the sizes for this rank; None if the call is to be left as it is."""
        is_open, fits = -1 in sizes, _fits(sizes, available)
        if fits and not is_open:
            return None
        key = (operation, len(sizes), is_open)
        if self.search is not None and key not in self.rules:
            fitting = [rule for rule in self._candidates(operation, sizes) if self._try(rule, sizes, available)]
            self.search.choose(key, [None, *fitting] if fits else fitting)
        rule = self.rules.get(key)
        return None if rule is None else self._try(rule, sizes, available)

    def _candidates(self, operation: str, sizes: tuple[int, ...]) -> list[ShapeRule]:
        assert self.search is not None
        return [
            ShapeRule(operation, len(sizes), index - len(sizes), size, local, -1 in sizes)
            for size, local in self.search.sizes.items()
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


def index_rules(rules: Iterable[ShapeRule]) -> dict[Key, ShapeRule]:
    """Key rules the way :class:`ShapeRuleMode` looks them up."""
    return {(rule.operation, rule.num_dims, rule.is_open): rule for rule in rules}


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
