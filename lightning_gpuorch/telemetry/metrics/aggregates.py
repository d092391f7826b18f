"""Throughput and latency of the whole job, as numbers a logger can take.

torchmetrics, so that they work wherever those do: as attributes of a module they are gathered over all ranks (with this
plugin's strategy through the control plane), and ``self.log`` takes them. Their states have a fixed size.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_gpuorch.errors import ConfigurationError

_FASTEST_SECONDS, _SLOWEST_SECONDS = 1e-5, 1e3
_BUCKETS_PER_OCTAVE = 8
_NUM_BUCKETS = math.ceil(math.log2(_SLOWEST_SECONDS / _FASTEST_SECONDS) * _BUCKETS_PER_OCTAVE) + 1


class JobThroughput(Metric):
    """Samples per second of all ranks together, from the first update anywhere to the last.

    Nodes' clocks take part: an offset between them is an error of the duration.
    """

    full_state_update = False
    samples: Tensor
    began: Tensor
    ended: Tensor

    def __init__(self, **options: Any):
        super().__init__(**options)
        double = torch.float64  # Unix time in single precision is off by a minute
        self.add_state("samples", torch.tensor(0.0, dtype=double), dist_reduce_fx="sum")
        self.add_state("began", torch.tensor(math.inf, dtype=double), dist_reduce_fx="min")
        self.add_state("ended", torch.tensor(-math.inf, dtype=double), dist_reduce_fx="max")

    def update(self, num_samples: int, seconds: float) -> None:
        """Count a step that has just ended.

        Args:
            num_samples: Samples in it, counted by one rank of a tensor-parallel group.
            seconds: It took.
        """
        now = time.time()
        self.samples += num_samples
        self.began = torch.clamp(self.began, max=now - seconds)
        self.ended = torch.clamp(self.ended, min=now)

    def compute(self) -> Tensor:
        """Samples per second; NaN before the first update."""
        return self.samples / (self.ended - self.began) if self.samples > 0 else torch.tensor(math.nan)


class StepLatency(Metric):
    """A quantile of the step time over all steps of all ranks, within 9 percent.

    Steps are counted in buckets of equal ratio from 10 microseconds to 1,000 seconds, so that the state stays the same
    however long the run, and quantiles of different ranks can be merged, which quantiles themselves cannot.

    Args:
        quantile: Between 0 and 1.
        **options: Of ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: The quantile is not between 0 and 1.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, quantile: float = 0.99, **options: Any):
        super().__init__(**options)
        if not 0 <= quantile <= 1:
            raise ConfigurationError(f"quantile={quantile} must be between 0 and 1.")
        self.quantile = quantile
        self.add_state("counts", torch.zeros(_NUM_BUCKETS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, seconds: float) -> None:
        """Count a step.

        Args:
            seconds: It took.
        """
        octaves = math.log2(max(seconds, _FASTEST_SECONDS) / _FASTEST_SECONDS)
        self.counts[min(_NUM_BUCKETS - 1, int(octaves * _BUCKETS_PER_OCTAVE))] += 1

    def compute(self) -> Tensor:
        """The quantile in seconds: the geometric middle of its bucket; NaN before the first update."""
        total = int(self.counts.sum())
        if total == 0:
            return torch.tensor(math.nan)
        rank = max(1, math.ceil(self.quantile * total))
        bucket = int(torch.searchsorted(self.counts.cumsum(0), rank))
        return torch.tensor(_FASTEST_SECONDS * 2 ** ((bucket + 0.5) / _BUCKETS_PER_OCTAVE))
