"""Units held as ranges: a job may lack billions of them, and a manifest may claim as many."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import overload

from lightning_gpuorch.errors import format_indices


class UnitRanges(Sequence[int]):
    """Ascending units, held as ranges.

    Args:
        ranges: Ascending and disjoint.
    """

    def __init__(self, ranges: Iterable[range] = ()):
        merged: list[range] = []
        for units in ranges:
            if merged and merged[-1].stop == units.start:
                merged[-1] = range(merged[-1].start, units.stop)
            elif units:
                merged.append(units)
        self.ranges = tuple(merged)
        self._ends = list(itertools.accumulate(map(len, merged)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        position = range(len(self))[index]
        which = bisect.bisect_right(self._ends, position)
        return self.ranges[which].start + position - (self._ends[which - 1] if which else 0)

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(self.ranges)

    def __contains__(self, unit: object) -> bool:
        return any(unit in units for units in self.ranges)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, UnitRanges):
            return self.ranges == other.ranges
        return list(self) == list(other) if isinstance(other, (list, tuple, range)) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"UnitRanges({self})"

    def __str__(self) -> str:
        # format_indices joins neighbours, so a range need not be walked to be written: its ends do.
        shown = list(itertools.islice(self.ranges, 20))
        text = ", ".join(
            format_indices([units[0]]) if len(units) == 1 else f"{units[0]}-{units[-1]}" for units in shown
        )
        hidden = len(self) - sum(map(len, shown))
        return f"{text} and {hidden} more" if hidden else text


class IntegerSet(Set[int]):
    """A set of integers that can grow, held as ranges: where nearly all come in order, it stays small.

    Args:
        integers: To begin with.
    """

    def __init__(self, integers: Iterable[int] = ()):
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._length = 0
        for integer in integers:
            self.add(integer)

    def add(self, integer: int) -> None:
        """Add one; no effect if it is there."""
        after = bisect.bisect_right(self._starts, integer)
        before = after - 1
        if before >= 0 and integer < self._stops[before]:
            return
        self._length += 1
        joins_before = before >= 0 and self._stops[before] == integer
        joins_after = after < len(self._starts) and self._starts[after] == integer + 1
        if joins_before and joins_after:
            self._stops[before] = self._stops.pop(after)
            del self._starts[after]
        elif joins_before:
            self._stops[before] = integer + 1
        elif joins_after:
            self._starts[after] = integer
        else:
            self._starts.insert(after, integer)
            self._stops.insert(after, integer + 1)

    def ranges(self) -> Iterator[range]:
        """The ranges, ascending."""
        return map(range, self._starts, self._stops)

    def __contains__(self, integer: object) -> bool:
        if not isinstance(integer, int):
            return False
        before = bisect.bisect_right(self._starts, integer) - 1
        return before >= 0 and integer < self._stops[before]

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(self.ranges())

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"IntegerSet({', '.join(f'{r.start}-{r.stop - 1}' for r in self.ranges())})"
