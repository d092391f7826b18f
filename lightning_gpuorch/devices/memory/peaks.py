"""Peak memory of a step. Measured on CUDA; on the CPU only by a stand-in that tests install."""

from __future__ import annotations

from typing import Protocol

import torch


class PeakMeter(Protocol):
    """Measures the memory of one step after another."""

    @property
    def budget_bytes(self) -> float:
        """What a peak may reach."""
        ...

    def begin(self) -> None:
        """A step begins."""
        ...

    def peak_bytes(self) -> int:
        """Most bytes in tensors at once since the step began, those that were there before included."""
        ...


class CudaPeakMeter:
    """Asks torch's allocator, whose figures are right as soon as a step's kernels are launched.

    Args:
        device: The device.
        budget_bytes: What a peak may reach.
    """

    def __init__(self, device: torch.device, budget_bytes: float):
        self._device, self._budget_bytes = device, budget_bytes

    @property
    def budget_bytes(self) -> float:
        """What a peak may reach."""
        return self._budget_bytes

    def begin(self) -> None:
        """A step begins."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        """Most bytes in tensors at once since the step began."""
        return int(torch.cuda.max_memory_allocated(self._device))


_stand_in: PeakMeter | None = None


def use_stand_in(meter: PeakMeter | None) -> PeakMeter | None:
    """Let a meter answer for the CPU; returns the one that did so before."""
    global _stand_in
    before, _stand_in = _stand_in, meter
    return before


def peak_meter(device: torch.device, budget_bytes: float) -> PeakMeter | None:
    """The meter of a device.

    Args:
        device: The device.
        budget_bytes: What a peak may reach there.

    Returns:
        None where memory cannot be measured step by step: on the CPU, outside of tests.
    """
    if device.type == "cuda":
        return CudaPeakMeter(device, budget_bytes)
    return _stand_in if device.type == "cpu" else None
