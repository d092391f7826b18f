"""Finds ranks that have disconnected, where another launcher has made them and no supervisor watches.

Rank 0 hosts the coordinator, and a rank keeps a connection to it for as long as it lives. Some launchers end or restart
everybody when a rank dies (torchrun); then rank 0 must not wait for ranks that are gone. Others let the rest
go on (srun, unless told otherwise); then the dead rank's work must go to them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection

from lightning_gpuorch.control.coordinator import Coordinator

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
GONE_SECONDS = 2.0
"""A rank without a connection for so long has left: one that lives connects again at once."""


class Disconnects:
    """Watches the other ranks of a job on behalf of rank 0.

    Args:
        coordinator: The coordinator.
        connected: Ranks that have a connection to the coordinator now.
        give_up_seconds: A rank that is gone for so long is not waited for any more: others do its work.
    """

    def __init__(self, coordinator: Coordinator, connected: Callable[[], Collection[int]], give_up_seconds: float):
        self._coordinator, self._connected, self._give_up_seconds = coordinator, connected, give_up_seconds
        self._last_seen = dict.fromkeys(range(1, coordinator.world_size), time.monotonic())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gpuorch-disconnects", daemon=True)
        self._thread.start()

    def outlive_the_others(self, timeout_seconds: float) -> list[int]:
        """Wait until all others have left or are gone.

        Args:
            timeout_seconds: Covers the whole wait.

        Returns:
            Ranks that are still there; empty unless the time has run out.
        """
        deadline = time.monotonic() + timeout_seconds
        others = set(self._last_seen)
        while (left := self._left(GONE_SECONDS)) and time.monotonic() < deadline:
            self._coordinator.departures.wait_for(others, LOOK_SECONDS)
        self.close()
        return left

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join(5)

    def _left(self, seconds: float) -> list[int]:
        """Ranks that have not left in good order and were seen within ``seconds``."""
        now = time.monotonic()
        return [
            r
            for r, seen in self._last_seen.items()
            if r not in self._coordinator.departures.ranks and now - seen < seconds
        ]

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self._last_seen.update(dict.fromkeys(set(self._connected()) & set(self._last_seen), time.monotonic()))
            self._give_up()

    def _give_up(self) -> None:
        coordinator = self._coordinator
        size = coordinator.tensor_parallel_size
        if size is None or coordinator.gang:
            return
        here = self._left(self._give_up_seconds)
        for rank in set(self._last_seen) - set(here) - coordinator.departures.ranks:
            replica = rank // size
            if replica and replica not in coordinator.retired:  # a peer of rank 0 takes rank 0 with it
                log.error("rank %d has disconnected; the others do the work of replica %d", rank, replica)
                coordinator.retire(replica)
