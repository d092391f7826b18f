"""Decides the sizes of a dataloader's later chunks while the ones before are leased, so that no replica waits for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from lightning_gpuorch.control.background import Background, in_thread
from lightning_gpuorch.control.chunk_growth import ChunkGrowth
from lightning_gpuorch.control.leases import LeaseQueue
from lightning_gpuorch.errors import CorruptPartError, PredictionStorageError
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.storage.stretches import decide_stretch

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 0.5
_LONGEST_RETRY_SECONDS = 30.0


class StretchPlanner:
    """Decides the stretches of one dataloader, in the background, since its store may take long.

    While a store refuses, it is asked again and again; replicas that need a chunk of that stretch wait for it, as they do
    for the disk.

    Args:
        directory: Of the dataloader.
        growth: Tells how large they are to be.
        num_replicas: Tells how many replicas there are now.
        background: Asks the store, which may take long.

    Attributes:
        queue: The leases of the dataloader, to be set before the first is given.
    """

    queue: LeaseQueue

    def __init__(
        self,
        directory: Location,
        growth: ChunkGrowth,
        num_replicas: Callable[[], int],
        background: Background = in_thread,
    ):
        self._background = background
        self._directory, self._growth, self._num_replicas = directory, growth, num_replicas
        self._deciding = False
        self._lock = threading.Lock()

    def observe(self, chunk: int, num_bytes: int, seconds: float) -> None:
        """Take in what a chunk took."""
        with self._lock:
            self._growth.observe(len(self.queue.layout.chunk_range(chunk)), num_bytes, seconds)

    def on_leased(self, num_leased: int) -> None:
        """So many chunks have been leased: decide the next stretch if it is time."""
        with self._lock:
            if self._deciding or not self._growth.is_due(self.queue.layout, num_leased):
                return
            self._deciding = True
        self._background("gpuorch-stretch", self._decide)

    def _decide(self) -> None:
        layout, delay_seconds = self.queue.layout, _FIRST_RETRY_SECONDS
        with self._lock:
            self._growth.num_replicas = self._num_replicas()
            wanted = self._growth.next_stretch(layout)
        while True:
            try:
                decided = decide_stretch(self._directory, layout, wanted)
                break
            except (PredictionStorageError, CorruptPartError) as error:
                log.warning("%s The size of the next chunks is decided in %.1f s.", error, delay_seconds)
            if self.queue.wait_for_drain(delay_seconds):
                return
            delay_seconds = min(2 * delay_seconds, _LONGEST_RETRY_SECONDS)
        log.debug("the next chunks of %s: %s", self._directory, decided.stretches[-1])
        with self._lock:
            self._deciding = False
        self.queue.extend(decided.stretches)
