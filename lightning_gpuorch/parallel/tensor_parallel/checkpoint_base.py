"""What every kind of checkpoint offers: its keys, the shapes of its tensors, and slices of them."""

from __future__ import annotations

import abc

import torch

from lightning_gpuorch.parallel.tensor_parallel.intervals import Intervals


class Checkpoint(abc.ABC):
    """Tensors by key. Reading is safe from several threads.

    Attributes:
        location: Where it lies, for messages.
    """

    location: str

    @abc.abstractmethod
    def keys(self) -> list[str]:
        """List the keys of all tensors."""

    @abc.abstractmethod
    def shape(self, key: str) -> tuple[int, ...] | None:
        """Give a tensor's shape without reading it; None if that is not possible."""

    def dtype(self, key: str) -> torch.dtype | None:
        """Give the dtype a tensor is stored in without reading it; None if that is not possible."""
        return None

    @abc.abstractmethod
    def read(self, key: str, dim: int | None = None, intervals: Intervals = ()) -> tuple[torch.Tensor, int]:
        """Read a tensor, or intervals of one of its dimensions.

        Returns:
            The tensor and the bytes that were asked from the source.
        """
