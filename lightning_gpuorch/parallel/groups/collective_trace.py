"""The collectives that a step still has to issue: learned from steps that went well, predicted for new batch shapes.

A rank that leaves a step in the middle need not break the connections under the others: if it issues what is left of
the step with zeros in place of the results it does not have, the others come to the end by themselves, and everybody
throws the step away. For that it has to know the rest. :class:`StepTraces` keeps what steps issued, by the sizes of
their inputs. For sizes not seen before, every number in a trace (a length of a tensor, a split size) is foretold from
those of former steps: it may be constant, proportional to a length of the input, at a constant distance from one, or
proportional to the product of two. All of these that fit everything seen so far have to agree, or nothing is foretold.

Steps that issue different collectives for inputs of the same sizes (they depend on the data) are never foretold.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from typing import Any

import torch

from lightning_gpuorch.parallel.groups.recoverable_group import RecoverableProcessGroup, issue_hooks, live_groups

_LEARNT_AFTER = 32
"""Steps of a family that are recorded one after the other; then only every so many-th, to notice a change."""
_CHECK_EVERY = 32
_MOST_CHANGES = 2
"""Times that a family may turn out to issue something else than before; then it is taken to depend on the data."""
_MOST_SIZES = 12
"""Input sizes of a family that are kept, and so compared when others are foretold."""
_MOST_FAMILIES = 32


@dataclass(frozen=True)
class _Tensor:
    ndim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Number:
    """An integer among the arguments, such as a split size."""


@dataclass(frozen=True)
class _Other:
    """An argument that is passed on as it was, such as the options of a collective."""

    kind: type
    value: Any = field(compare=False)


@dataclass(frozen=True)
class _Call:
    """A collective without its sizes."""

    group: int
    method: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class _Trace:
    """The collectives of one step: what they are, and all their sizes in a row."""

    calls: tuple[_Call, ...]
    sizes: tuple[int, ...]


class Rest:
    """What is left of a step.

    Args:
        calls: Collectives without their sizes.
        sizes: Sizes of the whole step.
        skipped: Collectives at the front that have been issued.
    """

    def __init__(self, calls: Sequence[_Call], sizes: Sequence[int], skipped: int):
        self._calls, self._sizes, self._skipped = calls, sizes, skipped

    def __len__(self) -> int:
        return len(self._calls) - self._skipped

    def issue(self, timeout_seconds: float) -> None:
        """Issue it, with zeros for all tensors: finite, and harmless as an index.

        Args:
            timeout_seconds: Longest wait for one collective.

        Raises:
            RuntimeError: A collective failed, because the other ranks issue something else or have left, too.
            DataPlaneError: They gave up this epoch, or did not take part in time.
            MemoryError: There is no memory for the zeros.
        """
        groups = {group.number: group for group in live_groups()}
        sizes = iter(self._sizes)
        for number, call in enumerate(self._calls):
            if number < self._skipped:
                for template in (call.args, [value for _, value in call.kwargs]):
                    _skip(template, sizes)
                continue
            args = [_zeros(template, sizes) for template in call.args]
            kwargs = {name: _zeros(template, sizes) for name, template in call.kwargs}
            work = getattr(groups[call.group], call.method)(*args, **kwargs)
            if work is not None:
                work.wait(timedelta(seconds=timeout_seconds))


class _Family:
    """Steps whose inputs have the same structure."""

    def __init__(self) -> None:
        self.calls: tuple[_Call, ...] | None = None
        self.sizes: dict[tuple[int, ...], tuple[int, ...]] = {}
        """Sizes of the collectives by those of the inputs, the latest last."""
        self.num_steps = self.num_recorded = self.num_changes = 0
        self.regular = True

    def to_be_recorded(self) -> bool:
        self.num_steps += 1
        return self.regular and (self.num_steps <= _LEARNT_AFTER or self.num_steps % _CHECK_EVERY == 0)

    def learn(self, dims: tuple[int, ...], trace: _Trace) -> None:
        if trace.calls != self.calls or self.sizes.get(dims, trace.sizes) != trace.sizes:
            # The first steps may do something once, such as making random states equal.
            self.num_changes += self.calls is not None
            self.regular = self.num_changes <= _MOST_CHANGES
            self.calls, self.num_recorded = trace.calls, 0
            self.sizes.clear()
        self.num_recorded += 1
        self.sizes.pop(dims, None)
        self.sizes[dims] = trace.sizes
        if len(self.sizes) > _MOST_SIZES:
            del self.sizes[next(iter(self.sizes))]

    def foretell(self, dims: tuple[int, ...]) -> tuple[int, ...] | None:
        if not self.regular or self.num_recorded < 2:
            return None
        if dims in self.sizes:
            return self.sizes[dims]
        seen = list(self.sizes)
        foretold: dict[tuple[int, ...], int | None] = {}
        for values in zip(*self.sizes.values(), strict=True):
            if values not in foretold:
                foretold[values] = _extrapolate(seen, values, dims)
        sizes = [foretold[values] for values in zip(*self.sizes.values(), strict=True)]
        return None if None in sizes else tuple(sizes)  # type: ignore[arg-type]


class StepTraces:
    """Records the collectives of this process's recoverable groups, step by step.

    Costs some microseconds per collective in the first steps of a kind, and next to nothing after.
    """

    def __init__(self) -> None:
        self._families: dict[tuple[Any, ...], _Family] = {}
        self._calls: list[_Call] = []
        self._sizes: list[int] = []
        self._key: tuple[_Family, tuple[int, ...]] | None = None
        self._began = (0, 0)
        self._record_hook = self._record  # one object, so that it can be removed

    def begin(self, inputs: Any) -> None:
        """A step on these inputs begins."""
        self._began = _counts()
        signature, dims = _signature(inputs)
        family = self._families.get(signature)
        if family is None:
            if len(self._families) >= _MOST_FAMILIES:
                del self._families[next(iter(self._families))]
            family = self._families[signature] = _Family()
        self._key = family, dims
        if family.to_be_recorded():
            self._calls, self._sizes = [], []
            issue_hooks.append(self._record_hook)

    def end(self, completed: bool) -> None:
        """The step is over.

        Args:
            completed: Whether it issued all that it had to.
        """
        if self._record_hook not in issue_hooks:
            return
        issue_hooks.remove(self._record_hook)
        if completed and self._key is not None:
            family, dims = self._key
            family.learn(dims, _Trace(tuple(self._calls), tuple(self._sizes)))

    def rest(self) -> Rest | None:
        """What the step that has just failed would still have issued; None if that is not known."""
        if self._key is None:
            return None
        family, dims = self._key
        started, failed = (now - before for now, before in zip(_counts(), self._began, strict=True))
        sizes = family.foretell(dims)
        if sizes is None or family.calls is None or failed or started > len(family.calls):
            return None
        return Rest(family.calls, sizes, started)

    def distrust(self) -> None:
        """What :meth:`rest` gave was wrong: foretell nothing about steps of this kind any more."""
        if self._key is not None:
            self._key[0].regular = False

    def _record(
        self, group: RecoverableProcessGroup, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        sizes = self._sizes
        self._calls.append(
            _Call(
                group.number,
                method,
                tuple(_describe(value, sizes) for value in args),
                tuple((name, _describe(value, sizes)) for name, value in kwargs.items()),
            )
        )


def _counts() -> tuple[int, int]:
    """Collectives started and those that failed at once, over all groups."""
    groups = live_groups()
    return sum(group.num_collectives for group in groups), sum(group.num_failed for group in groups)


def _describe(value: Any, sizes: list[int]) -> Any:
    if isinstance(value, torch.Tensor):
        sizes.extend(value.shape)
        return _Tensor(value.ndim, value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return tuple(_describe(item, sizes) for item in value)
    if type(value) is int:
        sizes.append(value)
        return _Number()
    return _Other(type(value), value)


def _zeros(template: Any, sizes: Iterator[int]) -> Any:
    if isinstance(template, _Tensor):
        shape = tuple(itertools.islice(sizes, template.ndim))
        return torch.zeros(shape, dtype=template.dtype, device=template.device)
    if isinstance(template, _Number):
        return next(sizes)
    if isinstance(template, _Other):
        return template.value
    return [_zeros(item, sizes) for item in template]


def _skip(template: Any, sizes: Iterator[int]) -> None:
    if isinstance(template, (_Tensor, _Number)):
        count = template.ndim if isinstance(template, _Tensor) else 1
        next(itertools.islice(sizes, count, count), None)
    elif not isinstance(template, _Other):
        for item in template:
            _skip(item, sizes)


def _signature(inputs: Any) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """The structure of inputs, and the lengths in it."""
    kinds: list[Any] = []
    dims: list[int] = []

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            kinds.append((value.ndim, value.dtype))
            dims.extend(value.shape)
        elif isinstance(value, Mapping):
            kinds.append(tuple(map(str, value)))
            for item in value.values():
                walk(item)
        elif isinstance(value, (list, tuple)):
            kinds.append(type(value))
            dims.append(len(value))
            for item in value:
                walk(item)
        # Anything else says nothing about sizes. If the step depends on it, that shows in its collectives.

    walk(inputs)
    return tuple(kinds), tuple(dims)


def _extrapolate(seen: Sequence[tuple[int, ...]], values: Sequence[int], dims: tuple[int, ...]) -> int | None:
    """The value for new input lengths that every law agrees on which holds for all seen ones.

    Args:
        seen: Input lengths of former steps.
        values: The value in each of them.
        dims: The new input lengths.
    """
    foretold: set[Fraction] = set()
    if len(set(values)) == 1:
        foretold.add(Fraction(values[0]))
    for i in range(len(dims)):
        if len({value - lengths[i] for value, lengths in zip(values, seen, strict=True)}) == 1:
            foretold.add(Fraction(values[0] - seen[0][i] + dims[i]))
        factors = [(lengths[i], dims[i]) for lengths in seen]
        for k in [None, *range(i, len(dims))]:
            products = factors if k is None else [
                (one * lengths[k], new * dims[k]) for (one, new), lengths in zip(factors, seen, strict=True)
            ]  # fmt: skip
            if not all(old for old, _ in products):
                continue
            first_old, new = products[0]
            if all(value * first_old == values[0] * old for value, (old, _) in zip(values, products, strict=True)):
                foretold.add(Fraction(values[0] * new, first_old))
        if len(foretold) > 1:
            return None
    if len(foretold) != 1:
        return None
    value = foretold.pop()
    return int(value) if value.denominator == 1 and value >= 0 else None
