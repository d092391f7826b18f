"""Parts written in the background, so that the loop never waits for the disk unless too much is pending."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection

from lightning_gpuorch.errors import StorageFullError
from lightning_gpuorch.predictions.layout import StoredBatch
from lightning_gpuorch.predictions.parts import PartStore

log = logging.getLogger(__name__)

Committed = Callable[[int, int, bool, int], None]
"""``on_committed(loader, chunk, won, samples)``."""


@dataclass
class _Pending:
    loader: int
    chunk: int
    batches: Sequence[StoredBatch]
    metadata: Mapping[str, Any]
    size_bytes: int


class PartWriter:
    """Commits parts on a thread of its own, in the order they come.

    An error of the thread is raised by the next call of :meth:`put`, :meth:`flush` or :meth:`close`; parts behind it are
    not written, and their chunks are computed again by a later run.

    Args:
        stores: One per dataloader.
        max_pending_bytes: Predictions that may wait; :meth:`put` blocks beyond.
        on_committed: Called on the thread for each part that is durable.
        full_retry_seconds: How long a full disk is tried again.
    """

    def __init__(
        self,
        stores: Sequence[PartStore],
        *,
        max_pending_bytes: int,
        on_committed: Committed,
        full_retry_seconds: float = 10.0,
    ):
        self._stores, self._on_committed = stores, on_committed
        self._max_pending_bytes, self._full_retry_seconds = max_pending_bytes, full_retry_seconds
        self._queue: collections.deque[_Pending] = collections.deque()
        self._pending_bytes = 0
        self._busy = False
        self._closing = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="gpuorch-writer", daemon=True)
        self._thread.start()

    def put(self, loader: int, chunk: int, batches: Sequence[StoredBatch], metadata: Mapping[str, Any]) -> None:
        """Hand over a chunk. Its tensors must be on the host and must not be changed any more.

        Raises:
            PredictionStorageError: An earlier part could not be written.
        """
        size = sum(_size_bytes(batch.output) for batch in batches)
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._error is not None or not self._queue or self._pending_bytes + size <= self._max_pending_bytes
                )
            )
            self._raise_error()
            self._queue.append(_Pending(loader, chunk, batches, metadata, size))
            self._pending_bytes += size
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything handed over is durable.

        Raises:
            PredictionStorageError: Something could not be written.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not (self._queue or self._busy))
            self._raise_error()

    def close(self) -> None:
        """Write what is left and end the thread; safe to call again.

        Raises:
            PredictionStorageError: Something could not be written.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            self._raise_error()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                pending = self._queue.popleft()
                self._busy = True
            try:
                won = self._commit(pending)
                samples = sum(batch.size or 0 for batch in pending.batches)
                self._on_committed(pending.loader, pending.chunk, won, samples)
            except BaseException as error:  # noqa: BLE001 - carried to the thread that hands over parts
                with self._changed:
                    self._error = error
                    self._queue.clear()
                    self._pending_bytes = 0
            else:
                with self._changed:
                    self._pending_bytes -= pending.size_bytes
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _commit(self, pending: _Pending) -> bool:
        deadline = time.monotonic() + self._full_retry_seconds
        delay = 0.1
        while True:
            try:
                return self._stores[pending.loader].commit(pending.chunk, pending.batches, pending.metadata)
            except StorageFullError as error:
                if time.monotonic() + delay > deadline:
                    raise
                log.warning("%s Trying again in %.1f s.", error, delay)
                time.sleep(delay)
                delay = min(2 * delay, 2.0)


def _size_bytes(output: Any) -> int:
    total = 0

    def add(value: Any) -> Any:
        nonlocal total
        total += value.nbytes
        return value

    apply_to_collection(output, (torch.Tensor, np.ndarray), add)
    return total
