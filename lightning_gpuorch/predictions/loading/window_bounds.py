"""How many chunks does a window hold: what is sorted together, what is at risk, and how all replicas end together."""

from __future__ import annotations

from lightning_gpuorch.predictions.loading.work import LeasedChunk

SAMPLES_PER_WINDOW = 8192
"""Samples that are sorted together at most, unless a single chunk has more."""
BYTES_PER_WINDOW = 256 * 2**20
"""Inputs or outputs of a window, on the host."""
SECONDS_PER_WINDOW = (15.0, 4.0, 120.0)
"""Time a window may take: at first, as a multiple of the time the job has run, and at most. What is computed of it is kept
meanwhile; but all replicas can only end together if their speeds are known by then."""
SECONDS_PER_WINDOW_WITHOUT_END = (10.0, 1 / 40, 120.0)
"""The same where several replicas share a stream whose end nobody knows: when it comes, a replica may have two such windows
before it, one being computed and one that is read, and the others nothing."""
CHUNKS_AT_FIRST_WITHOUT_END = 2
"""Chunks of a window of such a stream while this replica's speed is not known."""
REST_PER_WINDOW = 1.25
"""What a replica has still to expect, by its speed, is so many times its next window, so that all end together."""


class WindowBounds:
    """How large windows may be, by what is known of the data and of this replica's speed.

    Args:
        num_replicas: Replicas that share the chunks.

    Attributes:
        samples_per_chunk: About how many the chunks that are leased now have.
        bytes_per_sample: The most that samples have taken on the host, as inputs or outputs.
    """

    def __init__(self, num_replicas: int):
        self._num_replicas = num_replicas
        self.samples_per_chunk = 1
        self.bytes_per_sample = 0.0
        self.seconds_per_sample = 0.0
        """As far as is known; over a whole window: its batches are sorted, and a single one tells nothing of the others."""
        self._num_measured, self._measured_seconds = 0, 0.0

    def observe(self, *, num_samples: int, num_bytes: int = 0, seconds: float = 0.0) -> None:
        """Take in what samples take on the host, as inputs or outputs, and how long they took."""
        if num_samples:
            self.bytes_per_sample = max(self.bytes_per_sample, num_bytes / num_samples)
            if seconds:
                self._num_measured += num_samples
                self._measured_seconds += seconds

    def end_window(self) -> None:
        """All steps of a window have been observed."""
        if self._num_measured:
            self.seconds_per_sample = self._measured_seconds / self._num_measured
            self._num_measured, self._measured_seconds = 0, 0.0

    def max_chunks(self, lease: LeasedChunk, taken: int) -> int:
        """How many chunks a window is to hold, of which ``taken`` are in it already.

        Args:
            lease: The next one. What differs between the ranks of a group comes with it, since it is
                the same for all of them.
            taken: Chunks of the window before that one.
        """
        if not self.bytes_per_sample:
            return 1  # nothing is known of this data yet
        size = self.samples_per_chunk
        limits = [SAMPLES_PER_WINDOW / size, BYTES_PER_WINDOW / (self.bytes_per_sample * size)]
        left, pace = lease.left, lease.pace
        without_end = left is None and self._num_replicas > 1
        if pace is not None:
            least, ages, most = SECONDS_PER_WINDOW_WITHOUT_END if without_end else SECONDS_PER_WINDOW
            seconds = min(most, max(least, ages * pace.age_seconds))
            limits.append(seconds / (pace.seconds_per_sample * size))
        elif without_end:
            limits.append(CHUNKS_AT_FIRST_WITHOUT_END)
        if left is not None and self._num_replicas > 1:
            speed = 1.0 if pace is None else pace.speed
            limits.append((left + taken) * speed / (REST_PER_WINDOW * self._num_replicas))
        return max(1, int(min(limits)))
