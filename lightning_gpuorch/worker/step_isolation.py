"""A step that raises is computed again without the samples that make it raise; those are given up.

1. The batch is halved, and what raises is halved again, until single samples raise.
2. A single sample is tried twice; the second time it is read again, without the padding of its batch.
3. If nothing of the batch can be computed, something from elsewhere is: a sample that could be computed before, else some
   of the dataset. Where that raises too, the error is not one of a sample.
4. The samples that do not raise alone are computed as one batch, and its output counts.

An error that is not one of a sample is raised as it came: one of the device, the network, the machine, of this package, of
how Lightning is used, and one that no single sample raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_gpuorch.control.error_record import is_environment
from lightning_gpuorch.errors import GPUOrchError, summarize_exception
from lightning_gpuorch.predictions.loading.describe import Source
from lightning_gpuorch.predictions.loading.source import BatchSource
from lightning_gpuorch.predictions.loading.stream import StreamSource
from lightning_gpuorch.predictions.loading.tickets import Ticket
from lightning_gpuorch.predictions.samples import CannotSplitError, take_samples
from lightning_gpuorch.worker.oom.detection import is_out_of_memory, release_frames

Step = Callable[[Any, Ticket], Any]
"""Computes a batch, or a part of one, with its ticket."""
PlainStep = Callable[[Any], Any]
"""Computes whatever it is given."""


class StepIsolation:
    """Isolates the samples of one dataloader that raise in the step, on a rank that computes alone.

    Args:
        source: The loader, described.
        transfer: Brings a batch to the device.
    """

    def __init__(self, source: Source, transfer: Callable[[Any], Any]):
        self._source, self._transfer = source, transfer
        self._last_good: list[Any] | None = None

    def compute(
        self, step: Step, plain_step: PlainStep, batch: Any, ticket: Ticket, lost: set[int]
    ) -> tuple[Any, dict[int, str]]:
        """Compute a batch.

        Args:
            step: Computes it; called again with parts of it.
            plain_step: Computes something from elsewhere.
            batch: The batch, on the device.
            ticket: Its ticket.
            lost: Positions that ``step`` gives up by itself, as it goes.

        Returns:
            The output, and why samples were given up, by position. The output does not cover them; it is None if that is
            all of them.

        Raises:
            Exception: What the step raised, where it is not a sample's.
        """
        failed = None
        try:
            output = step(batch, ticket)
        except Exception as error:
            if ticket.size is None or not _may_be_of_a_sample(error):
                raise
            failed = error
        if failed is None:
            if not lost:
                self._last_good = ticket.indices or self._last_good
            return output, {}
        try:
            release_frames(failed)
            isolated = _Isolated(self, step, plain_step, batch, ticket, lost).outcome()
            if isolated is None:
                raise failed
            self._last_good = self._good_ones(ticket, lost | isolated[1].keys()) or self._last_good
            return isolated
        finally:
            del failed  # its traceback refers to this frame

    def _good_ones(self, ticket: Ticket, lost: set[int]) -> list[Any]:
        return [index for row, index in enumerate(ticket.indices or ()) if row not in lost]

    @property
    def can_build(self) -> bool:
        """Whether samples can be read again."""
        return not isinstance(self._source, StreamSource)

    def build(self, indices: list[Any]) -> Any:
        """A batch of dataset indices, read again."""
        assert not isinstance(self._source, StreamSource)
        return self._transfer(self._source.collate(indices))

    def from_elsewhere(self, ticket: Ticket) -> list[list[Any]]:
        """Dataset indices of small batches, of which the step raises in all only if that is not the fault of a sample."""
        if isinstance(self._source, StreamSource):
            return []
        if self._last_good is not None:
            return [self._last_good if isinstance(self._source, BatchSource) else self._last_good[:1]]
        here = ticket.indices or []
        return [other for other in self._source.some_batches() if any(index not in here for index in other)]


class _Isolated:
    """One batch that raises in the step."""

    def __init__(
        self,
        isolation: StepIsolation,
        step: Step,
        plain_step: PlainStep,
        batch: Any,
        ticket: Ticket,
        lost: set[int],
    ):
        assert ticket.size is not None
        self._isolation, self._step, self._plain_step = isolation, step, plain_step
        self._batch, self._ticket, self._lost = batch, ticket, lost
        self._size = ticket.size
        self._reads_again = False
        """What is cut from the batch may raise where the same samples, read again, do not."""
        self._any_good = False
        """Whether something can be computed."""
        self._reasons: dict[int, str] = {}

    def outcome(self) -> tuple[Any, dict[int, str]] | None:
        """The output of the others, and why samples were given up; None if the error is not one of a sample."""
        if not self._can_cut():
            if not self._isolation.can_build:
                return None
            self._reads_again = True
        while kept := [row for row in range(self._size) if row not in self._reasons and row not in self._lost]:
            found = self._raising_alone(kept)
            if found is None:
                return None
            self._reasons |= found
            kept = [row for row in kept if row not in found and row not in self._lost]
            if not kept:
                break
            output, error = self._attempt(kept)
            if error is None:
                return output, self._reasons
            if not found:
                return None
        return None, self._reasons

    def _raising_alone(self, rows: list[int]) -> dict[int, str] | None:
        """Why samples cannot be computed that raise alone, by position; None if nothing else can be computed either."""
        found: dict[int, str] = {}
        pending = _halves(rows)
        while pending:
            part = pending.pop()
            error = self._attempt(part)[1]
            if error is not None and len(part) > 1:
                pending += _halves(part)
                continue
            if error is not None:
                error = self._attempt_again(part)
            if error is None:
                self._any_good = True
                continue
            if not self._any_good and not self._can_compute_elsewhere():
                return None
            self._any_good = True
            found[part[0]] = str(summarize_exception(error))
        return found

    def _attempt_again(self, row: list[int]) -> Exception | None:
        if not self._isolation.can_build or self._reads_again:
            return self._attempt(row)[1]
        self._reads_again = True
        error = self._attempt(row)[1]
        self._reads_again = error is None
        return error

    def _attempt(self, rows: list[int]) -> tuple[Any, Exception | None]:
        """The output of some samples, or what the step raised."""
        is_whole = len(rows) == self._size and not self._reads_again
        ticket = self._ticket if is_whole else self._ticket.part(rows)
        try:
            return self._step(self._batch if is_whole else self._part(rows), ticket), None
        except Exception as error:
            if not _may_be_of_a_sample(error):
                raise
            release_frames(error)
            return None, error

    def _part(self, rows: list[int]) -> Any:
        if not self._reads_again:
            return take_samples(self._batch, rows, self._size, None)
        assert self._ticket.indices is not None
        return self._isolation.build([self._ticket.indices[row] for row in rows])

    def _can_cut(self) -> bool:
        try:
            take_samples(self._batch, [0], self._size, None)
        except CannotSplitError:
            return False
        return True

    def _can_compute_elsewhere(self) -> bool:
        for indices in self._isolation.from_elsewhere(self._ticket):
            try:
                self._plain_step(self._isolation.build(indices))
            except Exception as error:
                if not (is_out_of_memory(error) or _may_be_of_a_sample(error)):
                    raise
                release_frames(error)
            else:
                return True
        return False


def _halves(rows: list[int]) -> list[list[int]]:
    """The second half and the first, which is taken next; a single sample is its own."""
    middle = (len(rows) + 1) // 2
    return [half for half in (rows[middle:], rows[:middle]) if half]


def _may_be_of_a_sample(error: Exception) -> bool:
    of_lightning = any(base.__name__ == "MisconfigurationException" for base in type(error).__mro__)
    return not (isinstance(error, GPUOrchError) or of_lightning or is_out_of_memory(error) or is_environment(error))
