"""The units and chunks of a dataloader, by arithmetic alone: nothing here grows with the dataset.

Work is counted in *units* and cut into *chunks* of consecutive units. The first have ``chunk_size`` units each. In long
jobs the later ones get a size that makes parts of the wanted bytes and seconds: it is decided as the job goes, for a
*stretch* of chunks at a time, and durably before any of them is leased
(:mod:`lightning_gpuorch.predictions.storage.stretches`), so that whoever computes a chunk means the same units by it. What
a unit is depends on the loader:

``sample``
    Position in the sampler's order; for a ``SequentialSampler`` that is the dataset index. For map-style loaders with
    torch's own ``BatchSampler``.
``batch``
    Number of the loader's batch. For custom batch samplers, streams and any other iterable. In a stream that is read by
    shard, batches are numbered within their shard, and shard ``s`` begins at unit ``s * units_per_shard``: how many batches
    a shard has is known when it has been read to its end.
``scattered``
    Dataset index, computed by any rank: for loaders that another strategy has sharded (a callback under another
    strategy). Parts have arbitrary numbers, and each stored batch names its dataset indices.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from lightning_gpuorch.checked_files import MAX_INTEGER
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.predictions.storage.unit_ranges import UnitRanges

Unit = Literal["sample", "batch", "scattered"]

_RANGES_SHOWN = 20
_MAX_CHUNKS = 10**18
"""Part files have numbers below."""
CHUNKS_PER_SHARD = 10**8
"""Numbers that are kept for the chunks of a shard: chunk 17 of shard 3 is in ``part-300000017.gpq``."""


class Stretch(NamedTuple):
    """Consecutive chunks of one size."""

    num_chunks: int
    chunk_size: int


class _Run(NamedTuple):
    """Where chunks of one size begin."""

    first_chunk: int
    first_unit: int
    chunk_size: int


@dataclass(frozen=True, kw_only=True)
class LoaderLayout:
    """The work of one dataloader.

    Attributes:
        unit: What is counted; see the module.
        num_units: Units in all; None for a stream whose end has not been seen.
        batch_size: Samples per batch of the loader; None where the unit is a batch.
        chunk_size: Units per chunk, of the first chunks or of all. On resume it is the one the job began with, while
            ``batch_size`` may be another: chunks then need not be multiples of batches.
        first_chunks: How many chunks have that size; None if all do.
        stretches: The chunks after these, as far as they are decided. Beyond them the last size is what is expected.
        identity: Plain values that must be equal for a run to go on in the same directory.
        num_shards: Shards of a stream that is read by shard; None where work is numbered from beginning to end.
        ends: Units of each shard that is known to end; not part of what :meth:`to_dict` gives.

    Raises:
        ConfigurationError: A value is out of range, or does not go with the unit.
    """

    unit: Unit
    num_units: int | None
    batch_size: int | None
    chunk_size: int
    first_chunks: int | None = None
    stretches: tuple[Stretch, ...] = ()
    identity: Mapping[str, str | int | None] = field(default_factory=dict)
    num_shards: int | None = None
    ends: Mapping[int, int] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ConfigurationError(f"unit must be one of {get_args(Unit)}, got {self.unit!r}")
        if self.chunk_size < 1:
            raise ConfigurationError(f"chunk_size must be at least 1, got {self.chunk_size}")
        if self.num_units is not None and self.num_units < 0:
            raise ConfigurationError(f"num_units must not be negative, got {self.num_units}")
        if max(self.chunk_size, self.num_units or 0, self.batch_size or 0, self.first_chunks or 0) > MAX_INTEGER:
            raise ConfigurationError(
                f"chunk_size, num_units, batch_size and first_chunks must not exceed {MAX_INTEGER}"
            )
        if self.first_chunks is not None and self.first_chunks < 1:
            raise ConfigurationError(f"first_chunks must be at least 1 or None, got {self.first_chunks}")
        if self.stretches and (self.first_chunks is None or not all(map(_is_possible, self.stretches))):
            raise ConfigurationError(
                f"stretches {self.stretches!r:.80} do not go with {self.first_chunks} first chunks"
            )
        if (self.batch_size is None) != (self.unit == "batch"):
            raise ConfigurationError(f"batch_size={self.batch_size} does not go with unit {self.unit!r}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigurationError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.num_shards is not None:
            self._check_shards(self.num_shards)

    def _check_shards(self, num_shards: int) -> None:
        if self.unit != "batch" or num_shards < 0 or self.first_chunks is not None:
            raise ConfigurationError(f"num_shards={num_shards} does not go with unit {self.unit!r} or growing chunks")
        numbers = num_shards * CHUNKS_PER_SHARD * self.chunk_size * self.samples_per_unit
        if numbers > MAX_INTEGER or num_shards * CHUNKS_PER_SHARD >= _MAX_CHUNKS:
            raise ConfigurationError(
                f"{num_shards} shards, with chunks of {self.chunk_size} batches of {self.samples_per_unit} samples, have "
                "more numbers than there are. Put several files in a shard, or lower chunk_size."
            )

    @property
    def noun(self) -> str:
        """What a unit is to the user."""
        return "batch" if self.unit == "batch" else "sample"

    @property
    def samples_per_unit(self) -> int:
        """Samples of a unit at most; 1 also where that is not known."""
        return int(self.identity.get("batch_size") or 1) if self.unit == "batch" else 1

    def max_samples(self, chunk: int) -> int:
        """Samples of a chunk at most, as far as is known."""
        return len(self.chunk_range(chunk)) * self.samples_per_unit

    @functools.cached_property
    def _runs(self) -> list[_Run]:
        runs = [_Run(0, 0, self.chunk_size)]
        num_chunks = self.first_chunks or 0
        for stretch in self.stretches:
            last = runs[-1]
            first_unit = last.first_unit + (num_chunks - last.first_chunk) * last.chunk_size
            runs.append(_Run(num_chunks, first_unit, stretch.chunk_size))
            num_chunks += stretch.num_chunks
        return runs

    @property
    def num_chunks(self) -> int:
        """Chunks in all, as far as their sizes are decided; 0 while the end of a stream is not known."""
        if self.num_shards is not None and self.num_units is not None:
            return sum(-(-units // self.chunk_size) for units in self.ends.values())
        return self.chunk_of(self.num_units - 1) + 1 if self.num_units else 0

    @property
    def num_decided_chunks(self) -> int | None:
        """Chunks whose size is decided; None if all are."""
        if self.first_chunks is None:
            return None
        decided = self.first_chunks + sum(stretch.num_chunks for stretch in self.stretches)
        return None if self.num_units is not None and decided >= self.num_chunks else decided

    @property
    def num_decided_units(self) -> int:
        """Units of the chunks whose size is decided, counted as if no stream ended."""
        last = self._runs[-1]
        decided = self.num_decided_chunks
        if decided is None:
            return self.num_units if self.num_units is not None else MAX_INTEGER
        return last.first_unit + (decided - last.first_chunk) * last.chunk_size

    @property
    def newest_chunk_size(self) -> int:
        """Units of the chunks that were decided last."""
        return self._runs[-1].chunk_size

    def chunk_of(self, unit: int) -> int:
        """The chunk that a unit is in."""
        runs = self._runs
        run = runs[bisect.bisect_right(runs, unit, key=lambda run: run.first_unit) - 1]
        return run.first_chunk + (unit - run.first_unit) // run.chunk_size

    @property
    def units_per_shard(self) -> int:
        """Numbers from the first unit of a shard to that of the next."""
        return CHUNKS_PER_SHARD * self.chunk_size

    def shard_range(self, shard: int) -> range:
        """Units of a shard; of one whose end is not known, those it may hold."""
        start = shard * self.units_per_shard
        return range(start, start + self.ends.get(shard, self.units_per_shard))

    @property
    def num_batches(self) -> int:
        """Batches a single device would return; 0 while the end of a stream is not known."""
        units = self.num_units or 0
        return units if self.batch_size is None else -(-units // self.batch_size)

    def chunk_range(self, chunk: int) -> range:
        """Units of a chunk; of a stream without a known end, those it may hold."""
        runs = self._runs
        run = runs[bisect.bisect_right(runs, chunk, key=lambda run: run.first_chunk) - 1]
        start = run.first_unit + (chunk - run.first_chunk) * run.chunk_size
        stop = start + run.chunk_size
        if self.num_shards is not None:
            return range(start, max(start, min(stop, self.shard_range(chunk // CHUNKS_PER_SHARD).stop)))
        return range(start, stop if self.num_units is None else max(start, min(stop, self.num_units)))

    def batches_of_chunk(self, chunk: int) -> Iterator[range]:
        """Units of each batch of a chunk, cut where the loader's batches end and where the chunk ends."""
        units = self.chunk_range(chunk)
        size = self.batch_size or 1
        start = units.start
        while start < units.stop:
            stop = min((start // size + 1) * size, units.stop)
            yield range(start, stop)
            start = stop

    def batch_range(self, batch: int) -> range:
        """Units of the loader's batch ``batch``."""
        size = self.batch_size or 1
        start = batch * size
        return range(start, max(start, min(start + size, self.num_units or 0)))

    def with_num_units(self, num_units: int) -> LoaderLayout:
        """Return the layout of a stream whose end has become known."""
        return dataclasses.replace(self, num_units=num_units)

    def with_ends(self, ends: Mapping[int, int]) -> LoaderLayout:
        """Return the layout of a stream of shards, of which some have been read to their end.

        Args:
            ends: Units of each of them.
        """
        assert self.num_shards is not None
        known = {shard: units for shard, units in ends.items() if shard < self.num_shards}
        total = sum(known.values()) if len(known) == self.num_shards else None
        return dataclasses.replace(self, num_units=total, ends=known)

    def named(self, units: Iterable[range]) -> str:
        """What units are to the user: ``3, 7-9``, or ``0-2 of shard 5``.

        Args:
            units: Ascending ranges of them.
        """
        ranges = UnitRanges(units)
        if self.num_shards is None:
            return str(ranges)
        size, by_shard = self.units_per_shard, dict[int, list[range]]()
        for piece in itertools.islice(ranges.ranges, _RANGES_SHOWN):
            shard = piece.start // size
            by_shard.setdefault(shard, []).append(range(piece.start - shard * size, piece.stop - shard * size))
        shown = [f"{UnitRanges(pieces)} of shard {shard}" for shard, pieces in by_shard.items()]
        hidden = sum(map(len, ranges.ranges[_RANGES_SHOWN:]))
        return "; ".join([*shown, f"and {hidden} more"] if hidden else shown)

    def with_stretches(self, stretches: Sequence[Sequence[int]]) -> LoaderLayout:
        """Return the layout with what has been decided of later chunks.

        Raises:
            ConfigurationError: A stretch is none, or this layout has chunks of one size only.
            TypeError: A stretch is no pair.
        """
        return dataclasses.replace(self, stretches=tuple(Stretch(*stretch) for stretch in stretches))

    def to_dict(self) -> dict[str, Any]:
        """Return the layout as plain JSON."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("ends", "num_shards")]
        shards = {} if self.num_shards is None else {"num_shards": self.num_shards, "num_units": None}
        return {
            **{name: getattr(self, name) for name in names},
            "stretches": [list(stretch) for stretch in self.stretches],
            "identity": dict(self.identity),
            **shards,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoaderLayout:
        """Return the layout that :meth:`to_dict` described.

        Raises:
            ConfigurationError: A value is out of range.
            TypeError: A field is unknown or missing.
        """
        if not isinstance(data, dict):
            raise TypeError(f"a layout is no object: {data!r:.40}")
        for name in ("num_units", "batch_size", "chunk_size", "first_chunks", "num_shards"):
            if type(data.get(name)) not in (int, type(None)):
                raise TypeError(f"{name} is no integer: {data[name]!r:.40}")
        if "ends" in data:
            raise TypeError("ends are no part of a layout")
        identity = data.get("identity", {})
        if not isinstance(identity, dict) or not all(type(v) in (str, int, type(None)) for v in identity.values()):
            raise TypeError("identity holds more than text and integers")
        if type(identity.get("batch_size")) not in (int, type(None)):
            raise TypeError("the batch size in identity is no integer")
        stretches = data.get("stretches", [])
        if not isinstance(stretches, list) or not all(isinstance(s, list) and len(s) == 2 for s in stretches):
            raise TypeError("stretches are no pairs")
        return cls(**{**data, "stretches": tuple(Stretch(*stretch) for stretch in stretches)})


def _is_possible(stretch: Stretch) -> bool:
    return all(type(number) is int and 1 <= number <= MAX_INTEGER for number in stretch)


@dataclass
class StoredBatch:
    """The prediction of one batch as it was computed; it need not be a batch of the loader.

    Attributes:
        first_unit: First unit it covers.
        indices: Dataset indices of its samples, in order; None where they are unknown (streams).
        size: Samples in ``output``; None where unknown. Taken from ``indices`` if these are given.
        output: The prediction.
        units: The unit of each sample, ascending, where units in between have no prediction. None: consecutive units
            from ``first_unit``.
        num_lost: Samples of the batch that have no prediction. To be told where the unit is a batch: ``units`` tell it
            where it is a sample.
        error: Why there is no prediction: it stands in the place of one, and ``output`` is None.

    Raises:
        ValueError: ``indices`` or ``units`` do not number ``size``, or ``units`` do not ascend.
    """

    first_unit: int
    indices: Sequence[int] | None
    size: int | None
    output: Any
    units: Sequence[int] | None = None
    num_lost: int = 0
    error: str | None = None

    def __post_init__(self) -> None:
        if self.size is None and self.indices is not None:
            self.size = len(self.indices)
        for name, given in (("indices", self.indices), ("units", self.units)):
            if given is not None and len(given) != self.size:
                raise ValueError(f"a stored batch of {self.size} samples has {len(given)} {name}")
        if isinstance(self.units, range):
            return  # it ascends, however long it is
        if self.units is not None and any(a >= b for a, b in zip(self.units, self.units[1:], strict=False)):
            raise ValueError(f"units of a stored batch must ascend, got {list(self.units)[:20]}")
