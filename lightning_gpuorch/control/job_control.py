"""What the registry of nodes needs of the coordinator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from lightning_gpuorch.paths import Location


class JobControl(Protocol):
    """What the registry needs of the :class:`~lightning_gpuorch.control.coordinator.Coordinator`."""

    gang: bool

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        ...

    @property
    def tensor_parallel_size(self) -> int | None:
        """Ranks per replica, once it is known."""
        ...

    @property
    def progress_by_replica(self) -> dict[int, int]:
        """Chunks made durable."""
        ...

    @property
    def jobs(self) -> Mapping[int, object]:
        """The predict calls that were opened."""
        ...

    @property
    def needs_every_replica(self) -> bool:
        """Whether the share of a rank cannot be taken over."""
        ...

    @property
    def draining(self) -> bool:
        """Whether no more work is handed out."""
        ...

    @property
    def finished(self) -> bool:
        """Whether every opened predict call is complete."""
        ...

    @property
    def kept_directory(self) -> Location | None:
        """Where results are that somebody wants to keep."""
        ...

    @property
    def is_closed(self) -> bool:
        """Whether no rank can join any more: ranks train or evaluate together, or some have ended their script."""
        ...

    def set_world(self, world_size: int, ranks: Iterable[int]) -> None:
        """The job begins: its size, and the ranks that are there."""
        ...

    def readmit(self, replica: int) -> None:
        """Serve a replica again that was given up."""
        ...

    def next_generation(self, replica: int) -> int:
        """A generation of a replica that is newer than all that were started."""
        ...

    def expire_leases(self, replica: int) -> int:
        """Take back the leases of a silent replica; returns how many chunks went back."""
        ...

    def open_ranks(self, ranks: Iterable[int]) -> dict[int, bool]:
        """Ranks that have opened a predict call and not closed it."""
        ...

    def end_generation(self, replica: int, generation: int) -> int:
        """Take back the leases of a generation that is over."""
        ...

    def retire(self, replica: int) -> None:
        """Give a replica up."""
        ...
