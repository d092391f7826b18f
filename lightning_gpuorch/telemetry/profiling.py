"""A bounded PyTorch profile: what a handful of steps spend their time on, operator by operator.

A profile of a whole run would fill memory and disk; this records a few steps after the first ones, and again whenever a
person asks for it by signal. Between recordings a step costs one comparison.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.telemetry.failures import FailureTally, observer_failures

log = logging.getLogger(__name__)


class BoundedProfiler:
    """Records a few steps at a time into trace files, viewable in Perfetto or ``chrome://tracing``.

    Args:
        directory: Where ``rank-<rank>.profile-<n>.json.gz`` go.
        rank: Global rank.
        skip_steps: Steps before the first recording, so that warm-up is not what is seen; None records only on demand.
        num_steps: Steps of a recording.
        max_recordings: More are not made, however often a person asks.
        failures: Where failures are counted.

    Raises:
        ConfigurationError: A number is out of range.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        rank: int,
        *,
        skip_steps: int | None = 10,
        num_steps: int = 5,
        max_recordings: int = 16,
        failures: FailureTally = observer_failures,
    ):
        if num_steps < 1 or max_recordings < 1 or (skip_steps is not None and skip_steps < 0):
            raise ConfigurationError(
                f"skip_steps={skip_steps}, num_steps={num_steps}, max_recordings={max_recordings}: a profile needs at "
                "least one step and one recording, and cannot skip fewer than none."
            )
        self._directory, self._rank = Path(directory), rank
        self._num_steps, self._max_recordings, self._failures = num_steps, max_recordings, failures
        self._until_start = skip_steps
        self._until_stop = 0
        self._profile: Any = None
        self._previous_handler: Any = None
        self._signal: int | None = None
        self.recordings: list[Path] = []
        """Files that were written."""

    def request(self) -> None:
        """Record from the next step on; from any thread, or from a signal handler."""
        if self._until_start is None:
            self._until_start = 0

    def record_on_signal(self, number: int = signal.SIGUSR2) -> None:
        """Have a signal to this process request a recording.

        Raises:
            ConfigurationError: Not called on the main thread, which alone may install handlers.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ConfigurationError("a profile on signal must be set up on the main thread.")
        self._signal, self._previous_handler = number, signal.signal(number, self._on_signal)

    def step(self) -> None:
        """Tell that a step begins. Costs well under a microsecond unless a recording begins or ends."""
        if self._profile is None and self._until_start is None:
            return
        try:
            self._advance()
        except Exception as error:  # noqa: BLE001 - an observer never ends the run
            self._profile, self._until_start = None, None
            self._failures.add("profiling", error)

    def close(self) -> None:
        """End a recording that is going on, and restore the signal handler; safe to call again."""
        if self._profile is not None:
            try:
                self._finish()
            except Exception as error:  # noqa: BLE001 - an observer never ends the run
                self._profile = None
                self._failures.add("profiling", error)
        if self._signal is not None:
            signal.signal(self._signal, self._previous_handler)
            self._signal = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request()

    def _advance(self) -> None:
        if self._profile is not None:
            self._until_stop -= 1
            if self._until_stop == 0:
                self._finish()
            else:
                self._profile.step()
        elif self._until_start == 0:
            self._until_start = None
            if len(self.recordings) < self._max_recordings:
                self._begin()
        elif self._until_start is not None:
            self._until_start -= 1

    def _begin(self) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        recording = profile(activities=activities, record_shapes=True, acc_events=True)
        recording.start()
        self._profile, self._until_stop = recording, self._num_steps

    def _finish(self) -> None:
        recording, self._profile = self._profile, None
        recording.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"rank-{self._rank:05d}.profile-{len(self.recordings)}.json.gz"
        recording.export_chrome_trace(str(path))
        self.recordings.append(path)
        log.info("profile of %d steps written to %s", self._num_steps, path)
