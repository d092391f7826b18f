"""Whether a plan that was read is one: types, and numbers that its own shapes allow.

A plan from a file is verified against the model as any other; to verify it lists the indices of every interval and runs the
model with the attributes of every rank. So no number in it may be larger than the largest dimension of a parameter.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from lightning_gpuorch.checked_files import integer

_MAX_RANKS = 2**16


def check_plan(plan: Any) -> None:
    """Check a :class:`TensorParallelPlan` that was read from data.

    Raises:
        ValueError: Something in it has the wrong type, or is out of range.
    """
    size = integer(plan.tensor_parallel_size, "tensor_parallel_size", 1, _MAX_RANKS)
    largest = 0
    for name, own in plan.parameters.items():
        _text(name, own.dtype)
        shape = [integer(length, f"the shape of {name}") for length in own.shape]
        largest = max([largest, *shape])
        if own.dim is not None:
            integer(own.dim, f"the dimension of {name}", 0, len(shape) - 1)
        if own.only_rank is not None:
            integer(own.only_rank, f"the rank of {name}", 0, size - 1)
        if own.dim is not None or own.intervals:
            _intervals(own.intervals, size, shape[own.dim] if own.dim is not None else largest)
    for name, layer in plan.layers.items():
        _text(name, layer.reason, layer.source)
        if layer.intervals:
            _intervals(layer.intervals, size, largest)
    for patch in plan.attributes:
        _text(patch.module, patch.attribute)
        _numbers((patch.values, patch.whole), largest)
        if len(patch.values) != size:
            raise ValueError(f"{patch.attribute} has {len(patch.values)} values for {size} ranks")
    for rule in itertools.chain.from_iterable(plan.shape_rules.values()):
        _text(rule.operation)
        integer(rule.num_dims, "a number of sizes", 1, _MAX_RANKS)
        integer(rule.position, "the position of a size", -rule.num_dims, -1)
        integer(rule.whole, "a size", 1)
        _numbers(rule.local, rule.whole)
        if len(rule.local) != size:
            raise ValueError(f"a size has {len(rule.local)} values for {size} ranks")
    _text(*itertools.chain.from_iterable(plan.ties), *plan.notes)


def _text(*values: Any) -> None:
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"there is no text but {value!r:.40}")  # noqa: TRY004 - of the data, not of an argument


def _intervals(by_rank: Any, size: int, end: int) -> None:
    if len(by_rank) != size:
        raise ValueError(f"there are intervals of {len(by_rank)} ranks in place of {size}")
    for intervals in by_rank:
        reached = 0
        for start, stop in intervals:
            reached = integer(stop, "an interval", integer(start, "an interval", reached, end), end)


def _numbers(value: Any, largest: int) -> None:
    """Numbers, booleans, text and tuples of these, none of them larger than the largest dimension."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        for item in value:
            _numbers(item, largest)
    elif isinstance(value, (int, float)) and not abs(value) <= largest:
        raise ValueError(f"{value!r:.40} is larger than any dimension")
