"""The present speed of an all-reduce between the ranks of a replica."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        latency_seconds: Median duration of a small all-reduce.
        bandwidth_bytes_per_second: Bus bandwidth of a large one, by the convention of nccl-tests: ``2 (n - 1) / n``
            times its size over its duration.
    """

    latency_seconds: float
    bandwidth_bytes_per_second: float


def probe_all_reduce(
    all_reduce: Callable[[torch.Tensor], object],
    world_size: int,
    device: torch.device,
    *,
    num_bytes: int = 16 * 2**20,
    repeats: int = 5,
) -> ProbeResult:
    """Time all-reduces; every rank of the group must call it at the same point, never during a step.

    Args:
        all_reduce: Sums a tensor over the ranks in place.
        world_size: Ranks that take part.
        device: Where the tensors are.
        num_bytes: Size of the large one.
        repeats: Measurements of each size, after one that warms up.
    """

    def median_seconds(size: int) -> float:
        tensor = torch.zeros(max(1, size // 4), device=device)
        seconds = []
        for _ in range(repeats + 1):
            _synchronize(device)
            began = time.perf_counter()
            all_reduce(tensor)
            _synchronize(device)
            seconds.append(time.perf_counter() - began)
        return sorted(seconds[1:])[repeats // 2]

    latency = median_seconds(4)
    return ProbeResult(latency, 2 * (world_size - 1) / world_size * num_bytes / median_seconds(num_bytes))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
