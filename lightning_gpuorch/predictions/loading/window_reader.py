"""The samples of a window are read when it begins, or while the one before is computed."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_gpuorch.predictions.loading.source import Span
from lightning_gpuorch.predictions.loading.window import Window
from lightning_gpuorch.predictions.loading.window_bounds import WindowBounds
from lightning_gpuorch.predictions.loading.work import LeasedChunk

_CLOSE_SECONDS = 5.0

LOST = object()
"""Stands for a batch of which no sample can be read."""


@dataclass(frozen=True)
class Requested:
    """A span that was leased and is being read.

    Attributes:
        lease: The chunk it belongs to.
        span: Units, batch number and dataset indices.
        alone: It must not share a batch with others.
        is_last: It ends its chunk.
    """

    lease: LeasedChunk
    span: Span
    alone: bool
    is_last: bool


class WindowReader:
    """Reads all of a window when it is needed, or some of the next one whenever it is told to.

    Args:
        spans: One span after another with its samples, or ``LOST``. What it raises is raised when all windows before are
            through.
        bounds: Of windows.
        samples_per_unit: See :class:`~lightning_gpuorch.predictions.loading.window.Window`.
    """

    def __init__(
        self,
        spans: Iterator[tuple[Requested, Any]],
        bounds: WindowBounds,
        samples_per_unit: int = 1,
    ):
        self._spans = spans
        self._bounds, self._samples_per_unit = bounds, samples_per_unit
        self._open: Window | None = None
        """The one that chunks are put into."""
        self._whole: collections.deque[Window] = collections.deque()
        self._chunk: list[tuple[Requested, list[Any]]] = []
        """What is read of a chunk that is not whole."""
        self._ended = False
        self._error: BaseException | None = None

    def next(self) -> Window | None:
        """The next window; None when there is no work for the moment."""
        while not self._whole and not self._ended:
            self._read_span()
        return self._next_whole()

    def _next_whole(self) -> Window | None:
        if not self._whole and self._error is not None:
            raise self._error
        return self._whole.popleft() if self._whole else None

    def read_ahead(self, num_samples: int) -> None:
        """Read so many samples of the next window, as long as it is not whole."""
        while num_samples > 0 and not self._whole and not self._ended:
            num_samples -= self._read_span()

    def close(self) -> None:
        """Read no more."""

    def _read_span(self) -> int:
        try:
            read = next(self._spans, None)
        except Exception as error:  # noqa: BLE001 - raised where the samples are needed
            self._error, read = error, None
        if read is None:
            self._end()
            return 0
        self._add(*read)
        return 0 if read[1] is LOST else len(read[1])

    def _add(self, asked: Requested, samples: Any) -> None:
        self._chunk.append((asked, samples))
        if not asked.is_last:
            return
        before, window = self._open, self._window_of(asked.lease)
        if before is not None and before is not window:
            self._whole.append(before)
        for part, samples_of_part in self._chunk:
            if samples_of_part is LOST:
                continue
            window.add(part.lease.chunk, part.span, samples_of_part, part.alone)
        self._chunk.clear()
        if window.closed:
            self._cut()

    def _window_of(self, lease: LeasedChunk) -> Window:
        """The window of a leased chunk: the open one, or a new one, which is open then.

        A chunk that another replica has lost goes alone, so that blame can be precise.
        """
        alone = lease.again or lease.isolate is not None
        window = self._open
        if window is None or window.closed or alone:
            window = self._open = Window(lease.again, self._samples_per_unit)
        # Asked for every chunk: where windows are read ahead, more is known when the later ones come.
        window.max_chunks = 1 if alone else self._bounds.max_chunks(lease, window.num_chunks)
        window.num_chunks += 1
        window.closed = window.num_chunks >= window.max_chunks
        return window

    def _cut(self) -> None:
        """What is read of the open window is all of it."""
        window, self._open = self._open, None
        if window is not None:
            self._whole.append(window)

    def _end(self) -> None:
        self._ended = True
        self._cut()


class BackgroundWindowReader(WindowReader):
    """Reads on a thread of its own, as fast as it goes, at most one whole window ahead.

    When a window is needed before all of it is read, it is cut where it stands. So no rank waits for more than a chunk:
    windows grow while reading is faster than computing, and are as small as it takes where it is slower.

    The ranks of a tensor-parallel group would cut at different places; they cannot use it.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="gpuorch-reader", daemon=True)
        self._thread.start()

    def next(self) -> Window | None:
        """The next window, or as much of it as is read, but a chunk at least; None when there is no work for the moment."""
        with self._changed:
            self._changed.wait_for(lambda: self._whole or self._open is not None or self._ended)
            if not self._whole:
                self._cut()
            self._changed.notify_all()
            return self._next_whole()

    def read_ahead(self, num_samples: int) -> None:
        """It does so by itself."""

    def close(self) -> None:
        """Read no more; a dataset that does not give the sample it is asked for is not waited for."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            while self._read_on():
                pass
        except BaseException as error:  # noqa: BLE001 - it is raised where the window is needed
            self._error = error
        with self._changed:
            self._end()
            self._changed.notify_all()

    def _read_on(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or not self._whole)
            if self._closing:
                return False
        read = next(self._spans, None)
        with self._changed:
            if read is None:
                return False
            self._add(*read)
            self._changed.notify_all()
        return True
