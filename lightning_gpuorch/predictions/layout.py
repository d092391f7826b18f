"""How a dataloader's work is counted and cut: units, chunks and batches, by arithmetic alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class LoaderLayout:
    """The work of one dataloader.

    Attributes:
        unit: What is counted: samples; the loader's batches; or ``scattered`` samples, written by ranks that were given
            strided shares by someone else.
        num_units: Units in all; None for a stream whose end has not been seen.
        batch_size: Samples per batch of the loader; None where the unit is a batch.
        chunk_size: Units per chunk.
        identity: What must be equal for a run to go on in the same directory.
    """

    unit: Literal["sample", "batch", "scattered"]
    num_units: int | None
    batch_size: int | None
    chunk_size: int
    identity: Mapping[str, str | int | None] = field(default_factory=dict)

    @property
    def num_chunks(self) -> int:
        """Chunks in all; 0 while the end of a stream is not known."""
        return -(-(self.num_units or 0) // self.chunk_size)

    @property
    def num_batches(self) -> int:
        """Batches a single device would return."""
        units = self.num_units or 0
        return units if self.batch_size is None else -(-units // self.batch_size)

    def chunk_range(self, chunk: int) -> range:
        """Units of a chunk."""
        start = chunk * self.chunk_size
        stop = start + self.chunk_size
        return range(start, stop if self.num_units is None else min(stop, self.num_units))

    def batches_of_chunk(self, chunk: int) -> Iterator[range]:
        """Samples of each batch of a chunk, cut where the loader's batches end and where the chunk ends."""
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
        return range(batch * size, min((batch + 1) * size, self.num_units or 0))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "identity": dict(self.identity)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoaderLayout:
        """The layout that :meth:`to_dict` wrote."""
        return cls(**data)


@dataclass
class StoredBatch:
    """The prediction of consecutive samples, as it was computed.

    Attributes:
        first_unit: First unit it covers.
        indices: Dataset indices of its samples, in order; None where they are unknown.
        size: Samples; None where unknown.
        output: The prediction.
        units: The unit of each sample, where samples in between have no prediction; None: consecutive units.
    """

    first_unit: int
    indices: Sequence[int] | None
    size: int | None
    output: Any
    units: Sequence[int] | None = None
