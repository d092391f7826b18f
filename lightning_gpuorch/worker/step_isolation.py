"""A step that raises is computed again without the samples that make it raise; those are given up.

1. The batch is read again. If the one in hand is another by now, since the step or a hook has changed it in place, or since
   the dataset is random, parts of either would be wrong: nothing is isolated.
2. It is halved, and what raises is halved again, until single samples raise.
3. A single sample is tried twice; the second time it is read alone, without the padding of its batch.
4. If nothing of the batch can be computed, something from elsewhere is: a sample that could be computed before, else some
   of the dataset. Where that raises too, the error is not one of a sample.
5. The samples that do not raise alone are computed as one batch, and its output counts.

An error that is not one of a sample is raised as it came: one of the device, the network, the machine, of this package, of
how Lightning is used, and one that no single sample raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from lightning_gpuorch.control.error_record import is_environment
from lightning_gpuorch.errors import GPUOrchError, summarize_exception
from lightning_gpuorch.predictions.loading.describe import Source
from lightning_gpuorch.predictions.loading.source import BatchSource
from lightning_gpuorch.predictions.loading.stream import StreamSource
from lightning_gpuorch.predictions.loading.tickets import Ticket
from lightning_gpuorch.predictions.samples import CannotSplitError, map_arrays, take_samples
from lightning_gpuorch.predictions.samples.tensors import digest
from lightning_gpuorch.worker.oom.detection import is_out_of_memory, release_frames

log = logging.getLogger(__name__)

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
            if isinstance(self._source, StreamSource) or not _may_be_of_a_sample(error):
                raise  # a stream cannot be read again, elsewhere or alone
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
            if not isolated[1]:
                log.warning(
                    "the step of batch %d raised %s; computed again, it did not",
                    ticket.number,
                    summarize_exception(failed),
                )
            self._last_good = self._good_ones(ticket, lost | isolated[1].keys()) or self._last_good
            return isolated
        finally:
            del failed  # its traceback refers to this frame

    def _good_ones(self, ticket: Ticket, lost: set[int]) -> list[Any]:
        return [index for row, index in enumerate(ticket.indices or ()) if row not in lost]

    def build(self, indices: list[Any]) -> Any:
        """A batch of dataset indices, read again."""
        assert not isinstance(self._source, StreamSource)
        return self._transfer(self._source.collate(indices))

    def from_elsewhere(self, ticket: Ticket) -> list[list[Any]]:
        """Dataset indices of small batches, of which the step raises in all only if that is not the fault of a sample."""
        assert not isinstance(self._source, StreamSource)
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
        self._read: Any = None
        """The batch, read again; parts are copies, since a step may change them."""
        self._reads_parts = False
        """The batch cannot be cut, or what is cut from it raises where the same samples, read alone, do not."""
        self._any_good = False
        """Whether something can be computed."""
        self._reasons: dict[int, str] = {}

    def outcome(self) -> tuple[Any, dict[int, str]] | None:
        """The output of the others, and why samples were given up; None if the error is not known to be a sample's."""
        try:
            self._read = self._build(range(self._size))
        except Exception as unreadable:  # noqa: BLE001 - what the step raised is told
            log.debug("the batch cannot be read again: %s", unreadable)
            return None
        if digest(self._read, max_elements=None) != digest(self._batch, max_elements=None):
            log.debug("the batch is another when it is read again")
            return None
        self._reads_parts = not self._can_cut()
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
        reads_parts, self._reads_parts = self._reads_parts, True
        error = self._attempt(row)[1]
        self._reads_parts = reads_parts or error is None
        return error

    def _attempt(self, rows: list[int]) -> tuple[Any, Exception | None]:
        """The output of some samples, or what the step raised."""
        rows = [row for row in rows if row not in self._lost]
        if not rows:
            return None, None
        try:
            return self._step(self._part(rows), self._ticket.part(rows)), None
        except Exception as error:
            if not _may_be_of_a_sample(error):
                raise
            release_frames(error)
            return None, error

    def _part(self, rows: list[int]) -> Any:
        if self._reads_parts:
            return self._build(rows)
        part = self._read if len(rows) == self._size else take_samples(self._read, rows, self._size, None)
        return map_arrays(part, lambda array: array.clone() if isinstance(array, torch.Tensor) else array.copy())

    def _build(self, rows: Iterable[int]) -> Any:
        assert self._ticket.indices is not None
        return self._isolation.build([self._ticket.indices[row] for row in rows])

    def _can_cut(self) -> bool:
        try:
            take_samples(self._read, [0], self._size, None)
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
