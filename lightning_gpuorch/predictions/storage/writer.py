"""Writes parts in the background, so that the loop does not wait for the disk.

One thread commits what :meth:`PartWriter.put` hands over, in that order. Handing over costs a few microseconds; it
waits only when more than ``max_pending_bytes`` are on their way, so that memory stays bounded when the disk is slower
than the model.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from lightning_gpuorch.errors import PredictionStorageError, StorageFullError
from lightning_gpuorch.predictions.storage.layout import StoredBatch
from lightning_gpuorch.predictions.storage.parts import PartStore

log = logging.getLogger(__name__)

OnCommitted = Callable[[int, int, bool, int, int], None]
"""``on_committed(loader, chunk, won, num_samples, num_bytes)``, on the writer's thread, once the part is durable."""

_FIRST_RETRY_SECONDS = 0.1
_LONGEST_RETRY_SECONDS = 2.0
_OBJECT_BYTES = 64
"""What a number, a string or a small object is counted as."""


@dataclass(frozen=True)
class _Pending:
    loader: int
    chunk: int
    batches: Sequence[StoredBatch]
    metadata: Mapping[str, Any]
    num_bytes: int


class PartWriter:
    """Commits parts on a thread of its own.

    An error ends the writer: the next :meth:`put`, :meth:`flush` or :meth:`close` raises it, with a note naming what
    was handed over and is not written. These chunks are not in the journal, so a rerun computes them again; nothing is
    lost silently. After that, :meth:`put` and :meth:`flush` refuse and :meth:`close` does nothing.

    Can be used as a context manager; leaving it closes the writer, after an exception as well, since what was computed
    is worth keeping. A writer nobody has closed is closed when the interpreter exits.

    Args:
        stores: One per dataloader.
        max_pending_bytes: Size of predictions that may wait.
        on_committed: Told of each part that is durable. What it raises counts as an error of the writer.
        full_retry_seconds: How long a full disk is tried again before it is an error.
        around_commit: Makes a context in which each part is written and reported.
        on_full: Called when a part has no room, to make some.
    """

    def __init__(
        self,
        stores: Sequence[PartStore],
        *,
        max_pending_bytes: int,
        on_committed: OnCommitted | None = None,
        full_retry_seconds: float = 10.0,
        around_commit: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        on_full: Callable[[], None] = lambda: None,
    ):
        self._stores = stores
        self._max_pending_bytes = max_pending_bytes
        self._on_committed = on_committed
        self._full_retry_seconds = full_retry_seconds
        self._around_commit, self._on_full = around_commit, on_full
        self._queue: collections.deque[_Pending] = collections.deque()
        self._pending_bytes = 0
        self._closing = False
        self._error: BaseException | None = None
        self._failed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="gpuorch-writer", daemon=True)
        self._thread.start()
        # The interpreter does not wait for daemon threads, and waits for ever for others: this one is asked to finish.
        atexit.register(self.close)

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pending_bytes(self) -> int:
        """Size of the predictions that are handed over and not durable yet."""
        return self._pending_bytes

    def put(self, loader: int, chunk: int, batches: Sequence[StoredBatch], metadata: Mapping[str, Any]) -> None:
        """Hand over a chunk's predictions, and their ownership: the caller must not change them any more.

        Args:
            loader: Which dataloader.
            chunk: Which chunk.
            batches: Its predictions, in ascending order of their units; tensors on the CPU.
            metadata: Plain JSON to keep with them.

        Raises:
            PredictionStorageError: An earlier part could not be written, or the writer is closed.
        """
        pending = _Pending(loader, chunk, batches, metadata, sum(size_bytes(batch.output) for batch in batches))
        with self._changed:
            # What is larger than the limit goes alone, rather than never.
            self._changed.wait_for(
                lambda: (
                    self._failed
                    or self._closing
                    or not self._queue
                    or self._pending_bytes + pending.num_bytes <= self._max_pending_bytes
                )
            )
            self._refuse_if_failed()
            if self._closing:
                raise PredictionStorageError(
                    f"the writer is closed; chunk {chunk} of dataloader {loader} came too late."
                )
            self._queue.append(pending)
            self._pending_bytes += pending.num_bytes
            self._changed.notify_all()

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Wait until everything handed over is durable.

        Args:
            timeout_seconds: Covers the whole wait; None waits as long as it takes.

        Raises:
            PredictionStorageError: Something could not be written.
            TimeoutError: It took longer; the writer goes on.
        """
        with self._changed:
            finished = self._changed.wait_for(lambda: self._failed or not self._queue, timeout_seconds)
            self._refuse_if_failed()
            if not finished:
                raise TimeoutError(
                    f"{len(self._queue)} parts ({self._pending_bytes:,} bytes) are still to be written to "
                    f"{self._stores[0].directory.parent} after {timeout_seconds} s."
                )

    def close(self) -> None:
        """Write what is left and end the thread; safe to call again.

        Raises:
            PredictionStorageError: Something could not be written.
        """
        atexit.unregister(self.close)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            self._raise_error()

    def _refuse_if_failed(self) -> None:
        self._raise_error()
        if self._failed:
            raise PredictionStorageError(
                "the writer has failed, and has said why; nothing more can be written with it."
            )

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
                # It stays in the queue until it is durable, so that flush() and the error know of it.
                pending = self._queue[0]
            try:
                with self._around_commit():
                    won = self._commit(pending)
                    if self._on_committed is not None:
                        num_samples = sum(batch.size or 0 for batch in pending.batches)
                        self._on_committed(pending.loader, pending.chunk, won, num_samples, pending.num_bytes)
            except BaseException as error:  # noqa: BLE001 - it is carried to the thread that hands over
                with self._changed:
                    self._fail(error)
                return
            with self._changed:
                self._queue.popleft()
                self._pending_bytes -= pending.num_bytes
                self._changed.notify_all()
            del pending  # the predictions, before waiting for the next ones

    def _fail(self, error: BaseException) -> None:
        unwritten = ", ".join(f"chunk {pending.chunk} of dataloader {pending.loader}" for pending in self._queue)
        note = f"Not durable, to be computed again by a rerun: {unwritten}."
        if hasattr(error, "add_note"):
            error.add_note(note)
        log.error("%s %s", error, note)
        self._error, self._failed = error, True
        self._queue.clear()
        self._pending_bytes = 0
        self._changed.notify_all()

    def _commit(self, pending: _Pending) -> bool:
        deadline = time.monotonic() + self._full_retry_seconds
        delay_seconds = _FIRST_RETRY_SECONDS
        while True:
            try:
                return self._stores[pending.loader].commit(pending.chunk, pending.batches, pending.metadata)
            except StorageFullError as error:
                self._on_full()
                if time.monotonic() + delay_seconds > deadline:
                    raise
                log.warning("%s Trying again in %.1f s.", error, delay_seconds)
            time.sleep(delay_seconds)
            delay_seconds = min(2 * delay_seconds, _LONGEST_RETRY_SECONDS)


def size_bytes(output: Any) -> int:
    """Estimate what a prediction takes in memory: exact for tensors and arrays, rough for the rest, and quick."""
    num_bytes = getattr(output, "nbytes", None)
    if isinstance(num_bytes, int):
        return num_bytes
    if isinstance(output, (str, bytes)):
        return len(output) + _OBJECT_BYTES
    if isinstance(output, Mapping):
        return sum(map(size_bytes, output.values()))
    if isinstance(output, (list, tuple)):
        if output and isinstance(output[0], (str, bytes, int, float)):
            # A list per sample of something small: walking it would cost more than it tells.
            return len(output) * size_bytes(output[0])
        return sum(map(size_bytes, output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return sum(size_bytes(getattr(output, field.name, None)) for field in dataclasses.fields(output))
    return _OBJECT_BYTES
