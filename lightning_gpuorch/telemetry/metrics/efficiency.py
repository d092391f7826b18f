"""Scaling efficiency of the job, against a measured baseline or not at all.

Efficiency is ``100 x job samples/s / (devices x baseline samples/s)``, with the baseline of one device, the same model
and the same kind of data. A baseline of something else would give a number that looks right and means nothing, so it is
refused.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_gpuorch.checked_files import (
    NotRegularFileError,
    TooLargeFileError,
    integer,
    is_number,
    parse_object,
    read_file,
)
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.paths import local_path
from lightning_gpuorch.telemetry.atomic_file import replace_file
from lightning_gpuorch.telemetry.steps import StepRecord

CALIBRATION = "_GPUORCH_CALIBRATION"
"""Environment variable, ``<seconds> <file>``: measure one device for so long, write the baseline to the file, and end."""


@dataclass(frozen=True)
class Baseline:
    """What one device does.

    Attributes:
        samples_per_second: Measured on one device.
        fingerprint: What it was measured with: model, dtype, device name, batch size, versions. All of it must agree
            with the run that is compared.
        num_samples: How many samples it was measured over.
    """

    samples_per_second: float
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    num_samples: int = 0

    def __post_init__(self) -> None:
        """Check the figures.

        Raises:
            ConfigurationError: The throughput is not positive.
        """
        if not self.samples_per_second > 0:
            raise ConfigurationError(f"samples_per_second={self.samples_per_second} of a baseline must be positive.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; an older one is replaced as a whole or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        replace_file(local_path(path, "path"), json.dumps(asdict(self), indent=1, sort_keys=True).encode("utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str], fingerprint: Mapping[str, Any]) -> Baseline:
        """Read a baseline, if it is one for this run.

        Args:
            path: Written by :meth:`save`.
            fingerprint: Of the run.

        Raises:
            ConfigurationError: The file is no baseline, or was measured with something else; the differences are named.
            OSError: The file cannot be read.
        """
        try:
            stored = parse_object(read_file(local_path(path, "path")))
            if not is_number(stored["samples_per_second"]) or not isinstance(stored["fingerprint"], dict):
                raise ValueError("its figures are none")  # noqa: TRY301
            baseline = cls(
                stored["samples_per_second"], stored["fingerprint"], integer(stored["num_samples"], "num_samples")
            )
        except (ValueError, KeyError, NotRegularFileError, TooLargeFileError) as error:
            raise ConfigurationError(
                f"{path} holds no baseline: {error!r}; make one with gpuorch calibrate."
            ) from error
        wanted = json.loads(json.dumps(dict(fingerprint)))
        differences = [
            f"{name} was {baseline.fingerprint.get(name)!r} and is {wanted.get(name)!r}"
            for name in sorted({*baseline.fingerprint, *wanted})
            if baseline.fingerprint.get(name) != wanted.get(name)
        ]
        if differences:
            raise ConfigurationError(
                f"the baseline in {path} is not for this run: {'; '.join(differences)}. Run gpuorch calibrate again."
            )
        return baseline


class Calibration:
    """Measures the throughput of one device while a script runs, and writes it as a baseline.

    Time runs from the end of the warm-up to the end of the last step, fetching of data included, since the job that is
    compared pays for that, too.

    Args:
        seconds: How long to measure after the warm-up.
        path: Where the baseline goes.
        warm_up_steps: Steps that do not count.
        min_steps: Fewer that count give no baseline.
    """

    def __init__(self, seconds: float, path: str | os.PathLike[str], *, warm_up_steps: int = 3, min_steps: int = 10):
        self._seconds, self.path = seconds, Path(path)
        self._warm_up_steps, self._min_steps = warm_up_steps, min_steps
        self._steps = 0
        self._samples = 0
        self._began = self._ended = 0.0

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> Calibration | None:
        """The calibration this process was asked for, if any."""
        if CALIBRATION not in variables:
            return None
        seconds, _, path = variables[CALIBRATION].partition(" ")
        return cls(float(seconds), path)

    def observe_step(self, record: StepRecord) -> None:
        """Count a step that has just ended."""
        now = record.ended_ns / 1e9
        self._steps += 1
        if self._steps <= self._warm_up_steps:
            self._began = now
            return
        self._samples += record.num_samples
        self._ended = now

    @property
    def is_enough(self) -> bool:
        """Whether enough is measured."""
        measured = self._steps - self._warm_up_steps
        return measured >= self._min_steps and self._ended - self._began >= self._seconds

    def finish(self, fingerprint: Mapping[str, Any]) -> Baseline:
        """Write the baseline.

        Raises:
            ConfigurationError: Too little was measured to say anything.
            OSError: The file cannot be written.
        """
        measured = self._steps - self._warm_up_steps
        if measured < self._min_steps or self._samples == 0:
            raise ConfigurationError(
                f"{self._steps} steps are too few to measure one device: {self._warm_up_steps} warm up and at least "
                f"{self._min_steps} have to follow. Give the script more data, or a smaller batch size."
            )
        seconds = self._ended - self._began
        baseline = Baseline(self._samples / seconds, fingerprint, self._samples)
        baseline.save(self.path)
        return baseline


class ScalingEfficiency:
    """Efficiency of a running job over a sliding window.

    Args:
        baseline: Of one device.
        num_devices: Devices of the job, those of retired replicas included: they were paid for.
        window_seconds: Over which throughput is taken.
    """

    def __init__(self, baseline: Baseline, num_devices: int, window_seconds: float = 60.0):
        self._ideal_per_second = baseline.samples_per_second * num_devices
        self._window_seconds = window_seconds
        self._points: collections.deque[tuple[float, int]] = collections.deque()

    def update(self, at_seconds: float, samples_done: int) -> float | None:
        """Take the job's progress.

        Args:
            at_seconds: By a clock that only goes forward.
            samples_done: Samples of the whole job that are done.

        Returns:
            Percent, or None until two looks are a second or more apart.
        """
        self._points.append((at_seconds, samples_done))
        while len(self._points) > 2 and self._points[1][0] <= at_seconds - self._window_seconds:
            self._points.popleft()
        began, before = self._points[0]
        elapsed = at_seconds - began
        if elapsed < 1.0:
            return None
        return 100.0 * (samples_done - before) / elapsed / self._ideal_per_second
