"""Which samples are computed together: batches of one replica, cut from windows of samples as they are needed.

A window is sorted by length, and batches are cut from its long end. Each is as large as pays: one more sample saves its
share of what a batch costs whatever its size, and adds padding. A token budget and the memory model bound it. Batches
are cut one at a time, so that each profits from what the ones before have shown: what their samples were padded to, and
how much memory they took.

Lengths need not be tokens. What a batch was padded to is read off the batch, and lengths are converted by that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.worker.batching.lengths import REFERENCE_KEYS, LengthFn, length_of, length_sorted_order
from lightning_gpuorch.worker.batching.memory_model import BatchSizer

MAX_COUNT = 4096
"""Samples of a batch, whatever their length."""
CPU_TOKENS = 1024
"""Default token budget on the CPU: MiniLM computes most tokens per second in batches of about that there."""
CPU_OVERHEAD_TOKENS = 32
"""What a step costs on the CPU besides its tokens, as a number of tokens."""
ACCELERATOR_OVERHEAD_TOKENS = 4096
"""The same on a GPU, which computes a few thousand tokens while the kernels of a step are launched."""


class DynamicBatcher:
    """Cuts the batches of one replica and learns from them.

    Args:
        max_tokens: Padded tokens of a batch; None leaves it to the memory model. A longer sample is a batch of its own.
        overhead_tokens: What a batch costs besides its padded tokens, as a number of tokens.
        length_fn: Gives the length of a sample.
        sizer: The memory model of this replica's device; None where memory cannot be measured.
        max_count: Samples of a batch.

    Raises:
        ConfigurationError: A limit is below one, or nothing bounds a batch.
    """

    def __init__(
        self,
        max_tokens: int | None,
        *,
        overhead_tokens: int = CPU_OVERHEAD_TOKENS,
        length_fn: LengthFn = length_of,
        sizer: BatchSizer | None = None,
        max_count: int = MAX_COUNT,
    ):
        if max_tokens is None and sizer is None:
            raise ConfigurationError("give max_tokens: without a memory model nothing else bounds a batch.")
        for name, value in (("max_tokens", max_tokens), ("max_count", max_count)):
            if value is not None and value < 1:
                raise ConfigurationError(f"{name}={value} is out of range: it must be at least 1.")
        self.sizer = sizer
        self._max_tokens = math.inf if max_tokens is None else max_tokens
        self._overhead_tokens, self._max_count, self._length_fn = overhead_tokens, max_count, length_fn
        self._knots: dict[int, tuple[int, float]] = {}

    @property
    def learns_memory(self) -> bool:
        """Whether it learns from batches what fits."""
        return self.sizer is not None

    def measure(self, samples: Iterable[Any]) -> npt.NDArray[np.int64]:
        """Lengths of samples, shape (samples,).

        Raises:
            ConfigurationError: ``length_fn`` does not give a number, or the default one does not know the type.
        """
        lengths = []
        for sample in samples:
            length = self._length_fn(sample)
            if not isinstance(length, (int, np.integer)) or length < 0:
                raise ConfigurationError(
                    f"length_fn returned {length!r} for a sample of type {type(sample).__name__}; it must return the "
                    "length as an integer of 0 or more."
                )
            lengths.append(int(length))
        return np.array(lengths, dtype=np.int64)

    @staticmethod
    def order(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Positions of the samples of a window, longest first; equal lengths in their order."""
        return length_sorted_order(lengths)

    def next_count(self, lengths: npt.NDArray[np.int64]) -> int:
        """How many of the next samples make a batch; at least one.

        Args:
            lengths: Their lengths, longest first.
        """
        tokens = self._padded(lengths[: self._max_count])
        counts = np.arange(1, len(tokens) + 1)
        fits = max(1, int(np.searchsorted(tokens[0] * counts, self._max_tokens, side="right")))
        if self.sizer is not None:
            fits = min(fits, self.sizer.choose(math.ceil(tokens[0])))
        fits = min(fits, len(tokens))
        cost = (self._overhead_tokens + tokens[0] * counts[:fits]) / np.cumsum(tokens[:fits])
        return len(cost) - int(np.argmin(cost[::-1]))  # of equals the largest

    def formed(self, batch: Any, longest: int) -> tuple[int, int] | None:
        """Take in a batch as it was collated.

        Args:
            batch: The batch.
            longest: Length of its longest sample, in units of ``length_fn``.

        Returns:
            Its samples and what each is padded to, where the batch shows it.
        """
        shape = padded_shape(batch)
        if shape is not None and longest > 0:
            self._knots[_bucket(longest)] = longest, float(shape[1])
        return shape

    def _padded(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Tokens to expect of samples, longest first: lines through what batches of about their length showed."""
        values = np.maximum(lengths, 1).astype(np.float64)
        if not self._knots:
            return values
        known = sorted(self._knots.values())
        last_length, last_tokens = known[-1]
        tokens = np.interp(values, [0.0, *(k[0] for k in known)], [0.0, *(k[1] for k in known)])
        beyond = values > last_length
        tokens[beyond] = values[beyond] * (last_tokens / last_length)
        return np.minimum.accumulate(np.maximum(tokens, 1.0))


def padded_shape(batch: Any) -> tuple[int, int] | None:
    """Samples in a collated batch and elements of each, by the tensor that decides its cost; None if there is none.

    The tensor is the one under ``input_ids`` and the like, or the first one.
    """
    tensor = _reference(batch)
    if tensor is None or not tensor.ndim or not tensor.shape[0]:
        return None
    return int(tensor.shape[0]), max(1, math.prod(tensor.shape[1:]))


def _reference(batch: Any) -> torch.Tensor | None:
    if isinstance(batch, torch.Tensor):
        return batch
    children: Iterable[Any] = ()
    if hasattr(batch, "keys") and hasattr(batch, "__getitem__"):
        keys = list(batch.keys())
        children = (batch[key] for key in sorted(keys, key=lambda key: _rank(key, keys)))
    elif isinstance(batch, (list, tuple)):
        children = batch
    return next((found for child in children if (found := _reference(child)) is not None), None)


def _rank(key: Any, keys: Sequence[Any]) -> int:
    return REFERENCE_KEYS.index(key) if key in REFERENCE_KEYS else len(REFERENCE_KEYS) + keys.index(key)


def _bucket(length: int) -> int:
    """Four per doubling."""
    return int(4 * math.log2(length))
