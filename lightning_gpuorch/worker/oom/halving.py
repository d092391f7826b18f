"""Run a step on a batch that may not fit: halve it, run the parts, and give the output of the whole.

What happens on an out-of-memory error, in this order:

1. Inside the handler, the error's frames and causes are released, and the handler is left: while it runs, it keeps the
   failed step's activations alive.
2. Cycles are collected, cached blocks go back to the device. Outputs of parts that are done and lie on the device move
   to the host; then the same size is tried again, and later batches move theirs at once.
3. Otherwise the size is halved, or falls back to one that is known to fit, and what is left of the batch is cut again.
4. A single sample that does not fit is tried once more, built again without the padding of its batch; then it is lost.

In the end the outputs are merged in order. Sizes that fit are remembered per bucket of sample shapes, so that the next
such batch is cut before it fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_gpuorch.errors import GPUOrchError
from lightning_gpuorch.predictions.samples import (
    AmbiguousStructureError,
    CannotSplitError,
    OutputLayout,
    batch_size_of,
    slice_samples,
)
from lightning_gpuorch.worker.oom.detection import free_memory, is_out_of_memory, release
from lightning_gpuorch.worker.oom.limits import SizeLimits, shape_bucket
from lightning_gpuorch.worker.oom.outputs import PartOutputs

log = logging.getLogger(__name__)

Step = Callable[[Any], Any]
Recollate = Callable[[int, int], Any]
"""Builds the batch of samples ``start`` to ``stop`` of a batch again."""


class SingleSampleOOMError(GPUOrchError, MemoryError):
    """One sample alone does not fit into memory.

    Attributes:
        position: Where in the batch it is.
    """

    def __init__(self, message: str, position: int):
        super().__init__(message)
        self.position = position


@dataclass(frozen=True)
class OOMEvent:
    """One out-of-memory error that was caught.

    Attributes:
        position: First sample of the part that did not fit.
        size: Samples in that part.
        next_size: Largest part from now on; 0 if a single sample was given up.
        bucket: Shape bucket of the batch.
        message: The error's text.
        memory: Where the memory was, as the halver's ``describe_memory`` put it.
    """

    position: int
    size: int
    next_size: int
    bucket: int
    message: str
    memory: str


@dataclass(frozen=True)
class HalvedOutput:
    """The output of a batch of which samples may be lost.

    Attributes:
        output: Output of the other samples, merged in order; None if there are no others.
        lost: Positions of samples that do not fit alone, ascending.
    """

    output: Any
    lost: tuple[int, ...] = ()


class BatchHalver:
    """Runs steps; see the module's text for what it does when memory runs out.

    Parts are views of the batch where its structure is clear, and built again by ``recollate`` where it is not. Without
    an error a step costs some microseconds and nothing is copied. Decisions depend on batches and failures alone: ranks
    that see the same ones cut the same way. Not to be shared by threads.

    Args:
        on_oom: Called for each caught error, after the memory was released. What it raises is logged and dropped.
        describe_memory: Gives the line about memory in log and event; called when memory has been released.
        limits: Remembers sizes.
        outputs_to_host: Move the outputs of parts to the host from the start, not only after they were in the way.
            Needed where ranks have to cut alike and their outputs may differ.
        remember: Cut later batches at what did not fit before. Not where the batcher learns from errors.
    """

    def __init__(
        self,
        on_oom: Callable[[OOMEvent], Any] | None = None,
        describe_memory: Callable[[], str] | None = None,
        limits: SizeLimits | None = None,
        outputs_to_host: bool = False,
        remember: bool = True,
    ):
        self.limits = SizeLimits() if limits is None else limits
        self.layout = OutputLayout()
        self.num_ooms = 0
        """Errors caught."""
        self.num_splits = 0
        """Batches computed in parts."""
        self.num_lost = 0
        """Samples given up."""
        self._on_oom, self._describe_memory = on_oom, describe_memory
        self._outputs_to_host, self._remember = outputs_to_host, remember

    def run(self, step: Step, batch: Any, *, size: int | None = None, recollate: Recollate | None = None) -> Any:
        """Compute a batch.

        Args:
            step: Computes the output of a batch, or of a part of one.
            batch: The batch.
            size: Samples in it. None looks at its structure, and only when memory runs out.
            recollate: Builds a part again, for batches whose structure does not tell where samples are.

        Returns:
            What ``step(batch)`` returns, given enough memory.

        Raises:
            SingleSampleOOMError: A single sample does not fit.
            CannotSplitError: Memory ran out, and the batch cannot be cut.
            CannotMergeError: Memory ran out, and the outputs of parts do not add up to the output of the batch.
        """
        halved = self._run(step, batch, size, recollate, give_up=False)
        return halved.output

    def run_surviving(
        self, step: Step, batch: Any, *, size: int | None = None, recollate: Recollate | None = None
    ) -> HalvedOutput:
        """Compute a batch, leaving out samples that do not fit alone.

        Args:
            step: See :meth:`run`.
            batch: See :meth:`run`.
            size: See :meth:`run`.
            recollate: See :meth:`run`.

        Raises:
            CannotSplitError: See :meth:`run`.
            CannotMergeError: See :meth:`run`.
        """
        return self._run(step, batch, size, recollate, give_up=True)

    def _run(
        self, step: Step, batch: Any, size: int | None, recollate: Recollate | None, give_up: bool
    ) -> HalvedOutput:
        message = ""
        if not self.limits:
            output, failure = _attempt(step, batch)
            if failure is None:
                if size is not None and not self.layout.knows_size(size):
                    self.layout.learn(output, size)
                return HalvedOutput(output)
            message = failure
        if size is None:
            size = _size_of(batch, message)
            if size is None:
                return HalvedOutput(step(batch))
        if size == 0:
            return HalvedOutput(step(batch))
        halved = _Run(self, step, batch, size, recollate, give_up).run(message)
        if not self._remember:
            self.limits.clear()
        return halved

    def _report(self, event: OOMEvent) -> None:
        self.num_ooms += 1
        log.warning(
            "out of memory with %d samples at position %d; %s. %s",
            event.size,
            event.position,
            f"going on with {event.next_size}" if event.next_size else "this sample is given up",
            event.memory or event.message,
        )
        if self._on_oom is None:
            return
        try:
            self._on_oom(event)
        except Exception:  # an observer never kills the job
            log.exception("the on_oom hook failed")

    def _memory(self) -> str:
        if self._describe_memory is None:
            return ""
        try:
            return self._describe_memory()
        except Exception as error:  # noqa: BLE001 - an observer never kills the job
            return f"memory unknown: {error!r}"


class _Run:
    """One batch on its way through the parts."""

    def __init__(
        self, halver: BatchHalver, step: Step, batch: Any, size: int, recollate: Recollate | None, give_up: bool
    ):
        self._halver, self._step, self._batch, self._size = halver, step, batch, size
        self._recollate, self._give_up = recollate, give_up
        self._bucket = shape_bucket(batch, size)
        self._limits = halver.limits
        self._before = self._limits.snapshot(self._bucket)
        self._cap = self._limits.limit(self._bucket) or size
        self._outputs = PartOutputs(to_host=halver._outputs_to_host)
        self._lost: list[int] = []
        self._num_failures = 0
        self._rebuild = False

    def run(self, failed_message: str) -> HalvedOutput:
        """Compute the batch; ``failed_message`` is set if the whole was tried already."""
        position = 0
        if failed_message:
            self._on_failure(0, self._size, failed_message)
        while position < self._size:
            length = self._next_length(position)
            stop = position + length
            output, failure = self._attempt(position, stop)
            if failure is None:
                self._limits.fitted(self._bucket, length)
                self._outputs.keep(position, stop, output)
                position = stop
                if self._lost:
                    self._cap = min(2 * self._cap, self._size)
            elif length > 1:
                self._on_failure(position, length, failure)
            else:
                self._on_single_failure(position, failure)
                position = stop
            output = None
        self._limits.end_step(self._bucket, self._size, calm=not self._num_failures)
        return HalvedOutput(self._merged(), tuple(sorted(self._lost)))

    def _next_length(self, position: int) -> int:
        """Parts of equal length, as few as the cap allows."""
        left = self._size - position
        return -(-left // -(-left // self._cap))

    def _attempt(self, start: int, stop: int) -> tuple[Any, str | None]:
        return _attempt(self._step, self._part(start, stop))

    def _part(self, start: int, stop: int) -> Any:
        if (start, stop) == (0, self._size):
            return self._batch
        if self._rebuild and self._recollate is not None:
            return self._recollate(start, stop)
        try:
            return slice_samples(self._batch, start, stop, self._size)
        except CannotSplitError as error:
            if self._recollate is None:
                raise CannotSplitError(
                    f"memory ran out with {self._size} samples, and the batch cannot be cut: {error}"
                ) from error
        return self._recollate(start, stop)

    def _on_failure(self, position: int, length: int, message: str) -> None:
        self._num_failures += 1
        if self._outputs.move_to_host():
            self._halver._outputs_to_host = True  # they were in the way: try the same size without them
        else:
            self._limits.failed(self._bucket, length)
            self._cap = max(1, min(self._limits.limit(self._bucket) or self._size, length - 1))
        # Old garbage is worth a full collection when the young one was not enough, but not at every size on the way.
        free_memory(thorough=self._num_failures == 2)
        self._halver._report(OOMEvent(position, length, self._cap, self._bucket, message, self._halver._memory()))

    def _on_single_failure(self, position: int, message: str) -> None:
        self._num_failures += 1
        self._outputs.move_to_host()
        free_memory()
        # Its own batch may have padded it, and the others, to a length that is not theirs.
        self._rebuild = True
        output, failure = self._attempt(position, position + 1)
        if failure is None:
            self._halver._report(OOMEvent(position, 1, 1, self._bucket, message, self._halver._memory()))
            self._outputs.keep(position, position + 1, output)
            return
        free_memory(thorough=False)
        self._halver._report(OOMEvent(position, 1, 0, self._bucket, failure, self._halver._memory()))
        # One sample that is too large says nothing of the others.
        self._limits.restore(self._bucket, self._before)
        self._halver.num_lost += 1
        if not self._give_up:
            raise SingleSampleOOMError(
                f"out of memory with a single sample, at position {position} of a batch of {self._size}: {failure}",
                position,
            )
        self._lost.append(position)

    def _merged(self) -> Any:
        outputs, layout = self._outputs, self._halver.layout
        if not outputs:
            return None
        if len(outputs) > 1:
            self._halver.num_splits += 1
        elif outputs.sizes[0] == self._size:
            outputs.learn(layout)
        try:
            merged = self._merge()
        except AmbiguousStructureError:
            if not self._resplit_last():
                raise
            merged = self._merge()
        back, failure = _attempt(outputs.back, merged)
        return back if failure is None else merged

    def _merge(self) -> Any:
        merged, failure = _attempt(self._outputs.merged, self._halver.layout)
        if failure is None:
            return merged
        self._outputs.move_to_host()  # parts and whole at once are too much for the device
        free_memory()
        return self._outputs.merged(self._halver.layout)

    def _resplit_last(self) -> bool:
        """Compute the last part again in two, so that parts of unequal size tell what equal ones leave open."""
        start, stop = self._outputs.spans[-1]
        if len(set(self._outputs.sizes)) > 1 or stop - start < 2:
            return False
        self._outputs.drop_last()
        middle = (start + stop + 1) // 2
        pending = [(middle, stop), (start, middle)]
        while pending:
            low, high = pending.pop()
            output, failure = self._attempt(low, high)
            if failure is None:
                self._outputs.keep(low, high, output)
            elif high - low == 1:
                self._on_single_failure(low, failure)
            else:  # less memory than a moment ago
                self._on_failure(low, high - low, failure)
                pending += [((low + high + 1) // 2, high), (low, (low + high + 1) // 2)]
        return len(set(self._outputs.sizes)) > 1


def _attempt(step: Step, batch: Any) -> tuple[Any, str | None]:
    """Run a step. Returns its output and None, or None and the text of an out-of-memory error, which is released."""
    try:
        return step(batch), None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        release(error)
        return None, f"{type(error).__name__}: {error}"


def _size_of(batch: Any, message: str) -> int | None:
    """The batch's size by its structure; None where nothing failed and it cannot be told."""
    try:
        return batch_size_of(batch)
    except CannotSplitError as error:
        if not message:
            return None
        raise CannotSplitError(
            f"memory ran out, and the batch cannot be cut since its size is not known: {error} ({message})"
        ) from error
