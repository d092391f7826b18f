"""What a loader is given to do: a leased chunk, or a reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol


class NoWork(Enum):
    """Why there is no chunk."""

    PAUSE = "pause"
    """Not now; others may give some back."""
    STOP = "stop"
    """Every chunk is durable."""
    DRAIN = "drain"
    """The job is to stop; it can be resumed."""
    FENCED = "fenced"
    """This generation of the replica was replaced."""


class ReplicaPace(Protocol):
    """How fast the replica is."""

    @property
    def seconds_per_sample(self) -> float:
        """What a sample takes."""
        ...

    @property
    def speed(self) -> float:
        """As a multiple of the mean of all replicas."""
        ...

    @property
    def age_seconds(self) -> float:
        """For how long there has been work."""
        ...


class LeasedChunk(Protocol):
    """A chunk to compute; see :class:`~lightning_gpuorch.control.messages.leases.Lease`."""

    @property
    def chunk(self) -> int:
        """Which chunk."""
        ...

    @property
    def left(self) -> int | None:
        """Chunks that no replica has yet; None where the end of a stream is not known."""
        ...

    @property
    def stretches(self) -> Sequence[tuple[int, int]]:
        """Numbers and sizes of the later chunks, as far as they are decided."""
        ...

    @property
    def again(self) -> bool:
        """Another replica had it and lost it."""
        ...

    @property
    def begun(self) -> bool:
        """Something of it may be in fragments."""
        ...

    @property
    def isolate(self) -> tuple[int, int] | None:
        """Units ``[start, stop)`` to be computed one by one."""
        ...

    @property
    def skip(self) -> tuple[int, ...]:
        """Units that are given up."""
        ...

    @property
    def pace(self) -> ReplicaPace | None:
        """Of this replica, if it is known."""
        ...


class WorkQueue(Protocol):
    """Where a replica gets its chunks from; see :class:`~lightning_gpuorch.control.leases.LeaseQueue`."""

    def next(self, block: bool, seconds_per_sample: float = 0.0, after: int | None = None) -> LeasedChunk | NoWork:
        """Ask for work.

        Args:
            block: Wait until there is some, or none will come.
            seconds_per_sample: How fast it goes here, if that is known.
            after: A chunk whose shard is to go on, if there is more of it.
        """
        ...

    def end_of_stream(self, units: int) -> None:
        """Report where a stream ended."""
        ...

    def end_of_shard(self, shard: int, units: int, is_readable: bool) -> None:
        """Report where a shard of a stream ended, or could not be read any further."""
        ...

    def saw(self, chunk: int, digest: str) -> None:
        """Report what was read of a stream, to be compared with what others read."""
        ...


def isolated_units(lease: LeasedChunk) -> range:
    """Units that have to be computed one by one."""
    return range(*lease.isolate) if lease.isolate is not None else range(0)
