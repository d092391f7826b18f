"""Batches of similar length: sorted within windows, longest first, as many samples as a token budget allows.

A batch costs what its padding makes it: the length of its longest sample times its samples. Sorting makes the padding
small, and a budget in tokens makes the batches alike in cost, whatever the lengths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lightning_gpuorch.errors import ConfigurationError

LengthFn = Callable[[Any], int]

REFERENCE_KEYS = ("input_ids", "tokens", "text", "sentence", "content", "input_values", "input_features", "inputs", "x")
"""Where mappings keep the part that decides their cost, in this order."""

_TEXT_PIECES = re.compile(r"[^\W\d_]{1,8}|\d{1,3}|[^\w\s]|_")
"""Batches of 32 out of 20,000 English texts and code comments, sorted, compute 1.62 padded tokens per real one if
sorted by characters, 1.20 by these pieces, 1.00 by the tokens themselves; counting takes 7 us per text."""


def length_of(sample: Any) -> int:
    """The length of a sample of a common type: what a batch of such samples is padded to.

    Text counts by words, signs and pieces of long words, about as tokenizers cut it; sequences by entries, tensors and
    arrays by elements, mappings by ``input_ids``, ``text`` and the like, and a tuple ``(input, target, ...)`` by its first
    entry. Lengths serve to compare samples, and need not be tokens exactly.

    Args:
        sample: A sample, as the dataset returns it.

    Raises:
        ConfigurationError: The type is not known; give a ``length_fn``.
    """
    if isinstance(sample, str):
        return len(_TEXT_PIECES.findall(sample))
    if isinstance(sample, bytes):
        return len(sample)
    if isinstance(sample, torch.Tensor):
        return int(sample.numel())
    if isinstance(sample, np.ndarray):
        return int(sample.size)
    if isinstance(sample, Mapping):
        for key in REFERENCE_KEYS:
            if key in sample:
                return length_of(sample[key])
    elif isinstance(sample, tuple) and sample:
        return length_of(sample[0])
    elif isinstance(sample, Sequence):
        return len(sample)
    raise ConfigurationError(
        f"the length of a sample of type {type(sample).__name__} is not known"
        + (f" (keys {', '.join(map(repr, sample))})" if isinstance(sample, Mapping) else "")
        + "; pass length_fn, a function from a sample to its length."
    )


def measure_lengths(
    dataset: Any, positions: Iterable[int] | None = None, length_fn: LengthFn = length_of
) -> npt.NDArray[np.int64]:
    """The lengths of samples of a map-style dataset; each is read once.

    Args:
        dataset: Has ``__getitem__``, and ``__len__`` if no positions are given.
        positions: Which samples; None for all.
        length_fn: Gives the length of a sample.

    Returns:
        Lengths in the order of ``positions``, shape (samples,).
    """
    wanted = range(len(dataset)) if positions is None else positions
    return np.fromiter((length_fn(dataset[position]) for position in wanted), dtype=np.int64)


def length_sorted_order(
    lengths: Sequence[int] | npt.NDArray[np.int64], window: int | None = None
) -> npt.NDArray[np.int64]:
    """Positions, longest first within each window; equal lengths keep their order.

    Args:
        lengths: Length of each sample.
        window: Samples that are sorted together; None sorts all.

    Returns:
        A permutation of the positions, shape (samples,); the same for the same lengths on every machine.
    """
    values = np.asarray(lengths, dtype=np.int64)
    size = max(1, len(values) if window is None else window)
    return np.concatenate(
        [start + np.argsort(-values[start : start + size], kind="stable") for start in range(0, len(values), size)]
        or [np.empty(0, np.int64)]
    )


class TokenBudgetBatcher:
    """Cuts samples into batches of at most a number of padded tokens.

    ::

        batcher = TokenBudgetBatcher(measure_lengths(dataset), max_tokens=8192)
        for positions in batcher:
            outputs = step(collate([dataset[p] for p in positions]))

    Every position comes once. Results return to the dataset's order by their positions. The batches depend on lengths
    and budget alone, unless a ``count_for`` is given that learns, such as
    :meth:`BatchSizer.choose <lightning_gpuorch.worker.batching.memory_model.BatchSizer.choose>`.

    Args:
        lengths: Length of each sample.
        max_tokens: Padded tokens of a batch; a single longer sample is a batch of its own.
        max_count: Samples of a batch.
        window: Samples that are sorted together; None sorts all.
        count_for: How many samples of a length fit on this replica's device; asked before each batch, with the length
            of its longest sample.

    Raises:
        ConfigurationError: A limit is below one.
    """

    def __init__(
        self,
        lengths: Sequence[int] | npt.NDArray[np.int64],
        max_tokens: int,
        max_count: int = 512,
        window: int | None = None,
        count_for: Callable[[int], int] | None = None,
    ):
        for name, value in (("max_tokens", max_tokens), ("max_count", max_count), ("window", window)):
            if value is not None and value < 1:
                raise ConfigurationError(f"{name}={value} is out of range: it must be at least 1.")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self._max_tokens, self._max_count, self._window = max_tokens, max_count, window
        self._count_for = count_for

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of positions of all samples."""
        return self.batches(range(len(self.lengths)))

    def batches(self, positions: Sequence[int]) -> Iterator[list[int]]:
        """Batches of some samples, such as those of a chunk.

        Args:
            positions: Which samples.

        Yields:
            Positions of a batch, longest sample first.
        """
        chosen = np.asarray(positions, dtype=np.int64)
        order = chosen[length_sorted_order(self.lengths[chosen], self._window)]
        start = 0
        while start < len(order):
            # Windows follow each other, so the first sample of a batch need not be its longest.
            stop = start + self._count(self.lengths[order[start : start + self._max_count]])
            yield order[start:stop].tolist()
            start = stop

    def _count(self, lengths: npt.NDArray[np.int64]) -> int:
        """How many of the next samples make a batch."""
        padded = np.maximum.accumulate(np.maximum(lengths, 1)) * np.arange(1, len(lengths) + 1)
        count = max(1, int(np.searchsorted(padded, self._max_tokens, side="right")))
        if self._count_for is not None:
            count = min(count, max(1, self._count_for(int(lengths[:count].max()))))
        return count


def batch_stream(
    samples: Iterable[Any],
    max_tokens: int,
    *,
    max_count: int = 512,
    window: int = 1024,
    length_fn: LengthFn = length_of,
    count_for: Callable[[int], int] | None = None,
) -> Iterator[list[tuple[int, Any]]]:
    """Batches of a stream: as many samples as a window holds are read and sorted at a time.

    Args:
        samples: The stream.
        max_tokens: Padded tokens of a batch.
        max_count: Samples of a batch.
        window: Samples to read ahead; they are held in memory.
        length_fn: Gives the length of a sample.
        count_for: See :class:`TokenBudgetBatcher`.

    Yields:
        Position in the stream and sample, for each sample of a batch; every sample of a window comes before the next
        window.
    """
    stream, first = iter(samples), 0
    while held := list(islice(stream, window)):
        lengths = [length_fn(sample) for sample in held]
        for batch in TokenBudgetBatcher(lengths, max_tokens, max_count, count_for=count_for):
            yield [(first + position, held[position]) for position in batch]
        first += len(held)
