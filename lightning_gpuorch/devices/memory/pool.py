"""Buffers that are used again: page-locked ones for copies to a device, and ones on the device."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

_MIN_BYTES = 512


class BufferPool:
    """Hands out buffers by size class (powers of two), so that batches of different shapes share them.

    A buffer may be given back together with the CUDA event of a copy that still reads or writes it; it is handed out
    again once the event has happened. May be used by several threads.

    Args:
        allocate: Makes a flat ``uint8`` tensor of a number of bytes.
        max_idle: Idle buffers to keep of one size class; more are freed.
    """

    def __init__(self, allocate: Callable[[int], torch.Tensor], max_idle: int = 4):
        self._allocate, self._max_idle = allocate, max_idle
        self._idle: dict[int, list[tuple[torch.Tensor, Any]]] = defaultdict(list)
        self._lock = threading.Lock()
        self.num_hits = 0
        self.num_misses = 0

    def acquire(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Take a buffer.

        Args:
            shape: Its shape.
            dtype: Its element type.

        Returns:
            An uninitialised tensor; give it back with :meth:`release`.
        """
        wanted_bytes = math.prod(shape) * dtype.itemsize
        size_bytes = _size_class(wanted_bytes)
        with self._lock:
            flat = self._take(size_bytes)
        if flat is None:
            flat = self._allocate(size_bytes)
        return flat[:wanted_bytes].view(dtype).view(tuple(shape))

    def release(self, buffer: torch.Tensor, event: Any = None) -> None:
        """Give a buffer back; it must not be used afterwards.

        Args:
            buffer: What :meth:`acquire` returned.
            event: A recorded ``torch.cuda.Event`` after which nobody uses the buffer any more.
        """
        storage = buffer.untyped_storage()
        flat = torch.empty(0, dtype=torch.uint8, device=buffer.device).set_(storage)
        with self._lock:
            idle = self._idle[storage.nbytes()]
            if len(idle) < self._max_idle:
                idle.append((flat, event))
            elif event is not None:
                event.synchronize()

    @contextmanager
    def borrow(self, shape: Sequence[int], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A buffer for the length of a ``with`` block."""
        buffer = self.acquire(shape, dtype)
        try:
            yield buffer
        finally:
            self.release(buffer)

    @property
    def idle_bytes(self) -> int:
        """Bytes of buffers that wait to be used again."""
        with self._lock:
            return sum(size_bytes * len(idle) for size_bytes, idle in self._idle.items())

    @property
    def hit_rate(self) -> float:
        """Share of requests that were served without an allocation."""
        requests = self.num_hits + self.num_misses
        return self.num_hits / requests if requests else 0.0

    def clear(self) -> None:
        """Free idle buffers."""
        with self._lock:
            self._idle.clear()

    def _take(self, size_bytes: int) -> torch.Tensor | None:
        idle = self._idle[size_bytes]
        for position, (flat, event) in enumerate(idle):
            if event is None or event.query():
                del idle[position]
                self.num_hits += 1
                return flat
        self.num_misses += 1
        return None


def _size_class(size_bytes: int) -> int:
    return max(_MIN_BYTES, 1 << max(0, size_bytes - 1).bit_length())
