"""Units held as ranges: a job may lack billions of them, and a manifest may claim as many."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
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
