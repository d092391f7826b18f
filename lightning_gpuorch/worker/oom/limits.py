"""How large a batch fits, per bucket of sample shapes; learned from failures, grown back with care."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_gpuorch.predictions.samples.kinds import Node, children, node_of

_MAX_PATIENCE_FACTOR = 64
_NO_SAMPLES = -1
"""The size of a batch inside of one sample: nothing there has a sample dimension."""


def shape_bucket(batch: Any, size: int) -> int:
    """The bucket of a batch: the binary logarithm, rounded up, of the elements of its largest sample.

    Arrays count by their shape, and lists with one entry per sample by their longest entry, since such entries end up
    padded to it.

    Args:
        batch: A batch.
        size: Samples in it.
    """
    return _elements(batch, max(1, size)).bit_length()


def _elements(value: Any, size: int) -> int:
    node = node_of(value)
    if node is Node.ARRAY:
        count = value.numel() if hasattr(value, "numel") else value.size
        return int(count) // size if value.ndim and value.shape[0] == size else int(count)
    if isinstance(value, (str, bytes)):
        return len(value)
    if node is not Node.SEQUENCE:
        return sum(_elements(item, size) for _, item in children(value, node))
    if len(value) and isinstance(value[0], (int, float)):
        return 1 if len(value) == size else len(value)
    if len(value) == size:
        return max(_elements(entry, _NO_SAMPLES) for entry in value)
    return sum(_elements(entry, size) for entry in value)


@dataclass
class _Record:
    cap: int
    failed_size: int | None
    failed_at: int
    good: int = 0
    calm: int = 0
    patience: int = 8


class SizeLimits:
    """Remembers sizes that fit and sizes that did not.

    A bucket with a failure gets a cap. After some calm steps the cap moves half-way towards the smallest size that
    failed; a failure there puts it back and doubles the patience. A failure is forgotten after ``forget_after`` steps,
    since other processes and other data come and go. Deterministic: ranks that see the same batches and failures keep
    the same caps.

    Args:
        patience: Calm steps at the cap before it grows.
        forget_after: Steps after which a failure counts no more.
    """

    def __init__(self, patience: int = 8, forget_after: int = 1000):
        self._patience, self._forget_after = patience, forget_after
        self._records: dict[int, _Record] = {}
        self._step = 0

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return bool(self._records)

    def limit(self, bucket: int) -> int | None:
        """The largest batch to try; None if nothing is known against any size.

        What is too many short samples is too many long ones as well.
        """
        caps = [
            record.cap
            for other, record in self._records.items()
            if other == bucket or (other < bucket and self._step - record.failed_at < self._forget_after)
        ]
        return min(caps, default=None)

    def failed(self, bucket: int, size: int) -> None:
        """A batch of this size did not fit."""
        record = self._records.get(bucket)
        half = (size + 1) // 2
        if record is None:
            self._records[bucket] = _Record(half, size, self._step, patience=self._patience)
            return
        record.failed_size = size if record.failed_size is None else min(size, record.failed_size)
        record.failed_at, record.calm = self._step, 0
        if 0 < record.good < size:  # growing did not work: back to what did
            record.cap = record.good
            record.patience = min(_MAX_PATIENCE_FACTOR * self._patience, record.patience * 2)
        else:
            record.cap, record.good = half, 0

    def fitted(self, bucket: int, size: int) -> None:
        """A batch of this size did fit."""
        record = self._records.get(bucket)
        if record is not None:
            record.good = max(record.good, size)
            if record.failed_size is not None and size >= record.failed_size:
                record.failed_size = None

    def end_step(self, bucket: int, size: int, *, calm: bool) -> None:
        """A batch of ``size`` samples is done, in as many parts as it took.

        Args:
            bucket: Its bucket.
            size: Its samples.
            calm: Nothing failed on the way.
        """
        self._step += 1
        record = self._records.get(bucket)
        if record is None:
            return
        if not calm:
            record.calm = 0
            return
        if self._step - record.failed_at >= self._forget_after:
            record.failed_size = None
        if size <= record.cap:  # the cap was no limit to this batch
            if record.failed_size is None:
                del self._records[bucket]
            return
        record.calm += 1
        if record.calm >= record.patience:
            record.calm = 0
            above = record.failed_size if record.failed_size is not None else 2 * record.cap + 1
            record.cap = max(record.cap, (record.cap + above) // 2)

    def clear(self) -> None:
        """Forget everything."""
        self._records.clear()

    def snapshot(self, bucket: int) -> _Record | None:
        """A copy of what is known of a bucket."""
        record = self._records.get(bucket)
        return None if record is None else _Record(**vars(record))

    def restore(self, bucket: int, snapshot: _Record | None) -> None:
        """Take back what was learned of a bucket since the snapshot."""
        if snapshot is None:
            self._records.pop(bucket, None)
        else:
            self._records[bucket] = snapshot
