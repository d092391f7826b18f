"""Generations that are about to start: their devices are checked first, and bad ones replaced, while others go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from lightning_gpuorch.devices.pool import DevicePool
from lightning_gpuorch.devices.preflight import Preflight, PreflightResult

log = logging.getLogger(__name__)


@dataclass
class PendingStart:
    """Ranks that are to start together.

    Attributes:
        ranks: Global ranks.
        checks: Checks under way, by rank.
        faults: Why a rank cannot start, by rank.
    """

    ranks: list[int]
    checks: dict[int, Preflight]
    faults: dict[int, str] = field(default_factory=dict)


class PendingStarts:
    """Checks devices before ranks are started on them.

    Args:
        devices: The node's devices.
        local: Local rank of a global rank.
        timeout_seconds: Longest wait for a check; None checks nothing.
    """

    def __init__(self, devices: DevicePool, local: Callable[[int], int], timeout_seconds: float | None):
        self._devices, self._local, self._timeout_seconds = devices, local, timeout_seconds
        self._under_way: list[PendingStart] = []

    def __bool__(self) -> bool:
        return bool(self._under_way)

    @property
    def ranks(self) -> list[int]:
        """Ranks whose devices are being checked."""
        return [rank for start in self._under_way for rank in start.ranks]

    def begin(self, ranks: Sequence[int]) -> None:
        """Start the checks for ranks that are to start."""
        checks = {}
        for rank in ranks:
            device = self._devices.holders.get(self._local(rank))
            if self._timeout_seconds is not None and device is not None and device.index is not None:
                checks[rank] = Preflight(device.index, self._timeout_seconds)
        self._under_way.append(PendingStart(list(ranks), checks))

    def ready(self) -> Iterator[PendingStart]:
        """PendingStarts whose devices have all been checked."""
        for start in list(self._under_way):
            for rank, check in list(start.checks.items()):
                found = check.poll()
                if found is not None:
                    self._take(start, rank, found)
            if not start.checks:
                self._under_way.remove(start)
                yield start

    def replace_device(self, rank: int, why: str) -> bool:
        """Condemn a rank's device and give it a spare; False if there is none."""
        bad = self._devices.condemn(self._local(rank), why)
        spare = self._devices.replace(self._local(rank))
        if spare is None:
            return False
        log.warning("rank %d moves from %s to %s", rank, bad, spare)
        return True

    def cancel(self) -> None:
        """Give up all that has not begun."""
        for start in self._under_way:
            for check in start.checks.values():
                check.cancel()
        self._under_way.clear()

    def _take(self, start: PendingStart, rank: int, found: PreflightResult) -> None:
        del start.checks[rank]
        device = self._devices.holders[self._local(rank)]
        device.uuid = found.uuid or device.uuid
        if found.ok:
            return
        log.error("%s of rank %d fails its check: %s", device, rank, found.evidence)
        if not self.replace_device(rank, found.evidence):
            start.faults[rank] = f"{device} of rank {rank} fails its check ({found.evidence}) and there is no spare"
            return
        assert self._timeout_seconds is not None
        spare = self._devices.holders[self._local(rank)].index
        assert spare is not None  # places on the CPU are neither checked nor spares
        start.checks[rank] = Preflight(spare, self._timeout_seconds)
