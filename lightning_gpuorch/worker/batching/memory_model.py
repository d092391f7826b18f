"""The memory that a batch of given size and length takes, and how large the next one may be; learned while running.

The model is ``peak_bytes(b, s) = w . (1, b, b s, b s^2)`` with ``w >= 0``: weights and workspaces, what each sample
takes, what each token takes, and attention matrices. It is fitted to the peaks of real batches, by least squares of
relative errors.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_NUM_FEATURES = 4
_SUPPORTS = [
    list(support)
    for count in range(1, _NUM_FEATURES + 1)
    for support in itertools.combinations(range(_NUM_FEATURES), count)
]
_ENOUGH_POINTS = 6
_GOOD_POINTS = 32


class MemoryModel:
    """Predicts the peak memory of a batch.

    Args:
        margin: Least share to add to a prediction.
        early_margin: Least share to add while there are fewer than six points.
        max_points: Shapes to remember; the oldest are dropped.
    """

    def __init__(self, margin: float = 0.03, early_margin: float = 0.15, max_points: int = 256):
        self._margin, self._early_margin, self._max_points = margin, early_margin, max_points
        self._peaks: dict[tuple[int, int], float] = {}
        self._weights: tuple[float, ...] | None = None
        self._num_new = 0
        self._error = early_margin
        self._stale = False

    @property
    def is_ready(self) -> bool:
        """Whether there is enough to predict from."""
        return len(self._peaks) >= 2

    @property
    def is_confident(self) -> bool:
        """Whether the margin in force is that of a fit to enough points."""
        return len(self._peaks) >= _ENOUGH_POINTS

    @property
    def relative_margin(self) -> float:
        """Share added to predictions: 1.2 times the worst error of the fit, or the least margin if that is larger."""
        self._fit()
        least = self._margin if self.is_confident else self._early_margin
        return max(least, 1.2 * self._error)

    def observe(self, count: int, length: int, peak_bytes: float) -> None:
        """Take in the peak of a batch; of several batches of one shape the worst counts.

        Args:
            count: Samples in the batch.
            length: Padded length of its samples.
            peak_bytes: Most memory in use at once while it was computed.
        """
        shape = (count, length)
        known = self._peaks.get(shape)
        if known is not None and known >= peak_bytes:
            return
        self._peaks[shape] = peak_bytes
        if len(self._peaks) > self._max_points:
            del self._peaks[next(iter(self._peaks))]
        self._num_new += 1
        # A fit takes up to a millisecond: once the model is good, it waits until it was wrong or much is new.
        if self._weights is None or len(self._peaks) < _GOOD_POINTS or self._num_new >= _GOOD_POINTS:
            self._stale = True
        else:
            self._stale = self._stale or 1 - self._value(count, length) / peak_bytes > max(0.0, self._error)

    def predict(self, count: int, length: int) -> float:
        """The peak to expect, in bytes, without margin.

        Raises:
            ValueError: Nothing was observed yet.
        """
        self._fit()
        if self._weights is None:
            raise ValueError("the memory model has seen no batch yet.")
        return self._value(count, length)

    def largest_count(self, length: int, budget_bytes: float) -> int:
        """The largest batch of samples of this length whose prediction, with margin, fits; 0 if none does."""
        usable = budget_bytes / (1 + self.relative_margin)
        empty, one = self.predict(0, length), self.predict(1, length)
        if one > usable:
            return 0
        return int((usable - empty) / (one - empty)) if one > empty else 2**31

    def _fit(self) -> None:
        if not self._stale:
            return
        self._stale = False
        self._num_new = 0
        shapes = np.array(list(self._peaks), dtype=np.float64)
        peaks = np.array(list(self._peaks.values()))
        relative = _features(shapes[:, 0], shapes[:, 1]) / peaks[:, None]
        scale = relative.max(axis=0)
        relative = relative / scale
        # Non-negative least squares: the solution is the plain one on some set of features, and there are 15 sets.
        gram, target = relative.T @ relative, relative.sum(axis=0)
        best, best_loss = np.zeros(_NUM_FEATURES), math.inf
        for support in _SUPPORTS:
            part, *_ = np.linalg.lstsq(gram[np.ix_(support, support)], target[support], rcond=1e-12)
            if (part < 0).any():
                continue
            weights = np.zeros(_NUM_FEATURES)
            weights[support] = part
            loss = float(weights @ gram @ weights - 2 * weights @ target)
            if loss < best_loss - 1e-12:
                best, best_loss = weights, loss
        self._error = float(np.max(1 - relative @ best))  # only being too low can hurt
        self._weights = tuple((best / scale).tolist())

    def _value(self, count: int, length: int) -> float:
        assert self._weights is not None
        empty, per_sample, per_token, per_square = self._weights
        return empty + count * (per_sample + length * (per_token + length * per_square))


def _features(counts: npt.NDArray[np.float64], lengths: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.stack([np.ones_like(counts), counts, counts * lengths, counts * lengths * lengths], axis=-1)


@dataclass
class _Failure:
    count: int
    step: int


class BatchSizer:
    """Chooses batch sizes that fill a memory budget.

    It starts small, and never more than doubles what was computed before in tokens or in squared tokens. An
    out-of-memory error bounds batches of that length and of longer ones for a while; if the model was sure of itself,
    the budget must have shrunk (another process, fragmentation), and the smaller one is used, growing back over time.
    Deterministic: the same history gives the same sizes. One per replica: each has its own device.

    Args:
        budget_bytes: Memory that a batch's peak may reach, weights included.
        max_count: Largest batch.
        start: First batch.
        growth: Largest step beyond what was computed before.
        forget_after: Steps after which an out-of-memory error counts no more.

    Attributes:
        model: The memory model.
        num_ooms: Out-of-memory errors reported.
    """

    def __init__(
        self,
        budget_bytes: float,
        max_count: int = 512,
        *,
        start: int = 1,
        growth: float = 2.0,
        forget_after: int = 500,
    ):
        self.model = MemoryModel()
        self.num_ooms = 0
        self._nominal_bytes = self._budget_bytes = float(budget_bytes)
        self._max_count, self._start, self._growth, self._forget_after = max_count, start, growth, forget_after
        self._most_tokens = self._most_squares = 0
        self._highest_peak_bytes = 0.0
        self._failures: dict[int, _Failure] = {}
        self._step = 0
        self._last_shrink = 0
        self._shrink = 0.0

    @property
    def budget_bytes(self) -> float:
        """The budget in force: the nominal one, or what errors have shown."""
        return self._budget_bytes

    def choose(self, length: int) -> int:
        """How many samples of this length to compute next; at least one.

        Args:
            length: Padded length of the batch.
        """
        length = max(1, length)
        count = self._start
        if self.model.is_ready:
            count = min(self.model.largest_count(length, self._budget_bytes), self._max_count)
        elif self._growth * self._highest_peak_bytes <= self._budget_bytes:
            count = self._max_count  # one shape is no model, but a bounded step from it is safe
        trusted = min(self._most_tokens / length, self._most_squares / length**2)
        count = min(count, max(self._start, int(self._growth * trusted)), self._ceiling(length))
        return max(1, count)

    def fitted(self, count: int, length: int, peak_bytes: float) -> None:
        """A batch was computed.

        Args:
            count: Its samples.
            length: Its padded length.
            peak_bytes: Most memory in use at once.
        """
        self._step += 1
        length = max(1, length)
        self.model.observe(count, length, peak_bytes)
        self._highest_peak_bytes = max(self._highest_peak_bytes, peak_bytes)
        self._most_tokens = max(self._most_tokens, count * length)
        self._most_squares = max(self._most_squares, count * length**2)
        if peak_bytes > self._budget_bytes:
            self._budget_bytes = min(self._nominal_bytes, peak_bytes)
        if self._budget_bytes < self._nominal_bytes and self._step - self._last_shrink >= self._forget_after:
            self._budget_bytes = min(self._nominal_bytes, 1.05 * self._budget_bytes)
            self._last_shrink = self._step

    def failed(self, count: int, length: int) -> int:
        """A batch did not fit.

        Args:
            count: Its samples.
            length: Its padded length.

        Returns:
            How many samples of this length to try next.
        """
        self.num_ooms += 1
        length = max(1, length)
        self._failures[_bucket(length)] = _Failure(count, self._step)
        if self.model.is_confident:
            # With a good fit, what did not fit here was the budget: it ends below the prediction. How far below shows
            # only when that fails as well, so further failures take ever larger steps.
            again = bool(self._last_shrink) and self._step - self._last_shrink < self._forget_after
            self._shrink = min(0.25, max(0.04, 2 * self._shrink)) if again else 0.0
            self._budget_bytes = min(self._budget_bytes, self.model.predict(count, length) * (1 - self._shrink))
            self._last_shrink = self._step
        return min(max(1, count // 2), self.choose(length))

    def _ceiling(self, length: int) -> int:
        """What failed at a length fails at longer ones as well."""
        bucket = _bucket(length)
        return min(
            (
                failure.count - 1
                for other, failure in self._failures.items()
                if other <= bucket and self._step - failure.step < self._forget_after
            ),
            default=self._max_count,
        )


def _bucket(length: int) -> int:
    return max(4, (length - 1).bit_length())
