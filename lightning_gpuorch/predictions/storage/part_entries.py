"""What a part's header tells of its stored batches, written so that thousands of like batches take as little as one.

Batches of one size that follow each other, as nearly all do, are one *run*: ``{"first_unit": 0, "size": 32, "indices":
{"start": 0, "stop": 65536}, "count": 2048, "step": 32}``. Whoever looks through all parts of a job walks runs, not batches.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from lightning_gpuorch.checked_files import MAX_INTEGER, integer
from lightning_gpuorch.predictions.storage.layout import StoredBatch

_MAX_SAMPLES = 2**28
"""Of a part. Ranges of indices take no bytes in the file, and much memory where each is looked at."""


@dataclass(frozen=True)
class BatchEntry:
    """What a part's header tells of one stored batch; the fields are those of :class:`StoredBatch`."""

    first_unit: int
    indices: Sequence[int] | None
    size: int | None
    units: Sequence[int] | None
    num_lost: int = 0
    error: str | None = None


@dataclass(frozen=True)
class EntryRun:
    """Stored batches that follow each other.

    Attributes:
        first: The first of them.
        indices: Dataset indices of all of them.
        count: How many.
        step: Units from the beginning of one to that of the next.
    """

    first: BatchEntry
    indices: Sequence[int] | None
    count: int = 1
    step: int = 0

    def __getitem__(self, position: int) -> BatchEntry:
        if self.count == 1:
            return self.first
        indices = self.indices
        if indices is not None:
            assert self.first.size is not None
            indices = indices[position * self.first.size : (position + 1) * self.first.size]
        return BatchEntry(self.first.first_unit + position * self.step, indices, self.first.size, None)


class Entries(Sequence[BatchEntry]):
    """The stored batches of a part, in order.

    Args:
        runs: What they are in.
    """

    def __init__(self, runs: Iterable[EntryRun]):
        self.runs = tuple(runs)
        self._ends = list(itertools.accumulate(run.count for run in self.runs))
        self.num_samples = sum((run.first.size or 0) * run.count for run in self.runs)
        """As far as sizes are known."""

    @property
    def errors(self) -> list[BatchEntry]:
        """Those that hold an error in place of a prediction."""
        return [run.first for run in self.runs if run.first.error is not None]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> BatchEntry: ...

    @overload
    def __getitem__(self, index: slice) -> list[BatchEntry]: ...

    def __getitem__(self, index: int | slice) -> BatchEntry | list[BatchEntry]:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        position = range(len(self))[index]
        which = bisect.bisect_right(self._ends, position)
        return self.runs[which][position - (self._ends[which - 1] if which else 0)]

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[BatchEntry]:
        return (run[position] for run in self.runs for position in range(run.count))


def split_error(error: str) -> tuple[str, str]:
    """Type and message of an error that was written as ``Type: message``; without a type where it does not begin so."""
    kind, colon, message = error.partition(": ")
    return (kind, message) if colon and kind.replace(".", "").isidentifier() else ("", error)


def pack_entries(batches: Iterable[StoredBatch]) -> list[dict[str, Any]]:
    """Write stored batches as plain JSON."""
    packed: list[dict[str, Any]] = []
    for entry in map(_pack_entry, batches):
        if not packed or not _joined(packed[-1], entry):
            packed.append(entry)
    return packed


def unpack_entries(packed: Any, max_count: int) -> Entries:
    """Read what :func:`pack_entries` wrote.

    Args:
        packed: Plain JSON.
        max_count: As many batches as there can be.

    Raises:
        TypeError: It is not of this format.
        ValueError: It is not, or claims more than can be.
        KeyError: A field is missing.
    """
    if not isinstance(packed, list):
        raise TypeError("its batches are no list")
    entries = Entries(map(_unpack_run, packed))
    if entries.num_samples > _MAX_SAMPLES:
        raise ValueError(f"it claims more than {_MAX_SAMPLES} samples")
    if len(entries) > max_count:
        raise ValueError(f"it claims {len(entries)} batches, more than can be in it")
    return entries


def _pack_entry(batch: StoredBatch) -> dict[str, Any]:
    entry = {
        "first_unit": batch.first_unit,
        "size": batch.size,
        "indices": _pack_integers(batch.indices),
        "units": _pack_integers(batch.units),
        "num_lost": batch.num_lost or None,
        "error": batch.error,
    }
    return {name: value for name, value in entry.items() if value is not None}


def _joined(run: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Make an entry a part of the run before it, if it is one; returns whether it is."""
    count, size, indices = run.get("count", 1), run.get("size"), run.get("indices")
    step = entry["first_unit"] - run["first_unit"] if count == 1 else run["step"]
    if (
        run.keys() - {"count", "step"} != entry.keys()
        or not {"units", "num_lost", "error"}.isdisjoint(entry)
        or entry.get("size") != size
        or entry["first_unit"] != run["first_unit"] + count * step
        or step not in (1, size)
    ):
        return False
    if indices is not None:
        added = entry["indices"]
        if not size or not (
            isinstance(indices, dict) and isinstance(added, dict) and indices["stop"] == added["start"]
        ):
            return False
        run["indices"] = {"start": indices["start"], "stop": added["stop"]}
    run.update(count=count + 1, step=step)
    return True


def _pack_integers(integers: Sequence[Any] | None) -> list[Any] | dict[str, int] | None:
    """Write consecutive integers as their borders. Indices may be keys as well: text, or tuples of both."""
    if integers is None:
        return None
    if isinstance(integers, range) and integers.step == 1 and integers:
        return {"start": integers.start, "stop": integers.stop}
    listed = [_plain(integer) for integer in integers]
    if (
        listed
        and all(isinstance(integer, int) for integer in listed)
        and listed == list(range(listed[0], listed[0] + len(listed)))
    ):
        return {"start": listed[0], "stop": listed[0] + len(listed)}
    return listed


def _plain(index: Any) -> Any:
    try:
        return operator.index(index)
    except TypeError:
        return [_plain(part) for part in index] if isinstance(index, (list, tuple)) else str(index)


def _unpack_run(packed: Any) -> EntryRun:
    """Raises TypeError, ValueError or KeyError where an entry is not of this format."""
    if not isinstance(packed, dict):
        raise TypeError("a stored batch is no object")
    size = None if packed.get("size") is None else integer(packed["size"], "size", high=_MAX_SAMPLES)
    count = integer(packed.get("count", 1), "count", low=1, high=_MAX_SAMPLES)
    indices, units = _unpack_integers(packed.get("indices")), _unpack_integers(packed.get("units"))
    if (indices is not None and len(indices) != (size or 0) * count) or (units is not None and len(units) != size):
        raise ValueError(f"a stored batch of {size!r:.40} samples has other numbers of indices or units")
    if isinstance(units, list):
        if not all(type(unit) is int and 0 <= unit <= MAX_INTEGER for unit in units):
            raise TypeError("units are no integers")
        if any(a >= b for a, b in itertools.pairwise(units)):
            raise ValueError("units do not ascend")
    entry = BatchEntry(
        first_unit=integer(packed["first_unit"], "first_unit"),
        indices=indices,
        size=size,
        units=units,
        num_lost=integer(packed.get("num_lost", 0), "num_lost"),
        error=packed.get("error"),
    )
    if not isinstance(entry.error, (str, type(None))):
        raise TypeError("an error is no text")
    if count == 1:
        return EntryRun(entry, indices)
    if units is not None or entry.num_lost or entry.error is not None or size == 0 or isinstance(indices, list):
        raise ValueError("batches of a run are whole and follow each other")
    step = integer(packed["step"], "step", low=1, high=_MAX_SAMPLES)
    if step not in (1, size):
        raise ValueError(f"batches of {size} samples cannot be {step} units apart")
    first = dataclasses.replace(entry, indices=None if indices is None else indices[:size])
    return EntryRun(first, indices, count, step)


def _unpack_integers(packed: Any) -> Sequence[int] | None:
    if isinstance(packed, dict):
        start = integer(packed["start"], "start", low=-MAX_INTEGER)
        return range(start, integer(packed["stop"], "stop", low=start, high=start + _MAX_SAMPLES))
    if packed is not None and not isinstance(packed, list):
        raise TypeError("it is no list of indices")
    return packed
