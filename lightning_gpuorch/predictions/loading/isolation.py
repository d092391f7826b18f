"""A batch that cannot be read is read again sample by sample; those that fail are left out of it.

A sample is to blame for an error only if others can be read. Where nothing of a batch can be read, a sample that was read
before, or some from elsewhere in the dataset, are read as well: if they fail too, the error is not a sample's, and is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning_gpuorch.errors import summarize_exception
from lightning_gpuorch.predictions.loading.source import BatchSource, MapSource


@dataclass(frozen=True)
class Readable:
    """What can be read of a batch.

    Attributes:
        batch: The batch of the samples that can be read; None if there are none.
        positions: Their positions in the batch that was asked for, ascending.
        reasons: Why each of the others cannot be read, by position.
    """

    batch: Any
    positions: list[int]
    reasons: dict[int, str]


class SampleIsolation:
    """Finds the samples that cannot be read in batches of one loader.

    Args:
        source: The loader, described.
        uncollated: Batches are lists of samples.
    """

    def __init__(self, source: MapSource | BatchSource, uncollated: bool = False):
        self._source, self._uncollated = source, uncollated
        self._last_good: list[Any] = []

    def note_good(self, indices: list[Any]) -> None:
        """A batch was read."""
        self._last_good = indices

    def isolate(
        self, indices: list[Any], error: Exception, has_failed: bool, reading: Callable[[int], None]
    ) -> Readable:
        """Read what can be read of a batch.

        Args:
            indices: Dataset indices of its samples.
            error: What reading raised.
            has_failed: Whether it was this batch that raised it, as far as is known.
            reading: Called with the position of each sample before it is read.

        Raises:
            Exception: ``error``, or what reading raised now, where no sample is to blame.
        """
        everything = list(range(len(indices)))
        if not has_failed or len(indices) == 1 or isinstance(self._source, BatchSource):
            batch = self._read(indices)
            if not isinstance(batch, Exception):
                return Readable(batch, everything, {})
            error = batch
        reasons = {} if len(indices) > 1 else {0: _reason(error)}
        if len(indices) > 1:
            outcomes = self._outcomes([[index] for index in indices])
            for position in everything:
                reading(position)
                outcome = next(outcomes)
                if isinstance(outcome, Exception):
                    error = error if reasons else outcome
                    reasons[position] = _reason(outcome)
        if isinstance(self._source, BatchSource):
            self._check_others(indices, error)
            named = "; ".join(f"sample {indices[position]}: {reason}" for position, reason in reasons.items())
            return Readable(None, [], dict.fromkeys(everything, named or _reason(error)))
        while kept := [position for position in everything if position not in reasons]:
            batch = self._read([indices[position] for position in kept])
            if not isinstance(batch, Exception):
                return Readable(batch, kept, reasons)
            reasons |= self._odd_ones(indices, kept, batch)
        self._check_others(indices, error)
        return Readable(None, [], reasons)

    def _odd_ones(self, indices: list[Any], kept: list[int], error: Exception) -> dict[int, str]:
        """Samples that can be read and not be collated with the others.

        Raises:
            Exception: ``error``: there are not more of the others.
        """
        anchors = [(self._last_good[0], len(kept))] if self._last_good else []
        anchors += [(indices[position], len(kept) + 1) for position in kept[:2]]
        for anchor, least_twice in anchors:
            pairs = [[anchor, indices[position]] for position in kept]
            outcomes = dict(zip(kept, self._outcomes(pairs), strict=True))
            odd = {position: outcome for position, outcome in outcomes.items() if isinstance(outcome, Exception)}
            if odd and 2 * (len(kept) - len(odd)) >= least_twice:
                return {p: f"it cannot be collated with others: {_reason(outcome)}" for p, outcome in odd.items()}
        raise error

    def _check_others(self, indices: list[Any], error: Exception) -> None:
        """Nothing of a batch can be read.

        Raises:
            Exception: ``error``: nor can anything else.
        """
        if self._last_good:
            others = [self._last_good if isinstance(self._source, BatchSource) else self._last_good[:1]]
        else:
            others = [other for other in self._source.some_batches() if other != indices and set(other) - set(indices)]
        if all(isinstance(outcome, Exception) for outcome in self._outcomes(others)):
            raise error

    def _read(self, indices: list[Any]) -> Any:
        return next(self._outcomes([indices]))

    def _outcomes(self, batches: list[list[Any]]) -> Iterator[Any]:
        return self._source.outcomes(batches, self._uncollated)


def _reason(error: Exception) -> str:
    return str(summarize_exception(error))
