"""The step of a replica: the user's, in all that surrounds it.

On a rank that computes alone a step that raises gives up the samples that raise alone; in a tensor-parallel group the ranks
agree on the samples that all of them have read. Inside that, memory that runs out halves the batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_gpuorch.predictions.loading.describe import Source
from lightning_gpuorch.predictions.loading.tickets import Ticket
from lightning_gpuorch.predictions.storage.layout import LoaderLayout
from lightning_gpuorch.worker.batches_in_flight import BatchInFlight
from lightning_gpuorch.worker.commit_pipeline import CommitPipeline
from lightning_gpuorch.worker.dynamic_steps import DynamicSteps
from lightning_gpuorch.worker.group_samples import SamplesDifferError, SamplesRead, samples_of, without
from lightning_gpuorch.worker.step_context import StepContext, StepWrapper
from lightning_gpuorch.worker.step_isolation import StepIsolation
from lightning_gpuorch.worker.surviving_steps import SurvivingSteps

Call = Callable[[Any], Any]
"""Computes a batch."""


class ReplicaStep:
    """Computes the batches of one rank.

    Args:
        context: The rank.
        sources: The dataloaders.
        layouts: Their layouts.
        pipeline: Told of the samples that have no prediction.
        dynamic: With dynamic batching, what learns from each step.
        begin_blame: Called where a batch is computed once more: how long a step takes is judged.
        isolates: Whether samples that cannot be computed are given up.
    """

    def __init__(
        self,
        context: StepContext,
        sources: Sequence[Source],
        layouts: Sequence[LoaderLayout],
        pipeline: CommitPipeline,
        dynamic: DynamicSteps | None,
        begin_blame: Callable[[Ticket], None],
        isolates: bool,
    ):
        self._context, self._layouts, self._pipeline, self._dynamic = context, layouts, pipeline, dynamic
        self._begin_blame = begin_blame
        self._in_group = context.world.topology.tensor_parallel_size > 1
        halves = context.config.enable_oom_halving and SurvivingSteps.possible(context)
        self._surviving_steps = SurvivingSteps(context) if halves else None
        self._isolations = [
            self._isolation(index, source) for index, source in enumerate(sources) if isolates and not self._in_group
        ]
        self._lost: set[int] = set()
        self.in_hand: SamplesRead | None = None
        """What this rank has read of the batch that is being computed, where the ranks of a group have to agree on it."""
        self.group_has_asked = False
        """Whether all ranks of the group have asked for the batch after those that are done; reset by the predict call."""

    def compute(self, call: Call, batch: Any, in_flight: BatchInFlight) -> tuple[Any, frozenset[int]]:
        """Compute a batch.

        Args:
            call: The user's step.
            batch: The batch, on the device.
            in_flight: Its place among the batches; gets the ticket of what is left of it.

        Returns:
            The output, and the positions in the batch that it does not cover.

        Raises:
            Exception: What ``call`` raises, where it is not a sample's.
        """
        self._lost.clear()
        call = functools.partial(self._call, call)
        output = (self._on_common_samples if self._in_group else self._isolated)(call, batch, in_flight)
        return output, frozenset(self._lost)

    def lose(self, reasons: Mapping[int, str], ticket: Ticket) -> None:
        """Give up samples of the batch that is being computed; its output covers the others.

        Args:
            reasons: Why, for the report and the error at the end, by position in the batch.
            ticket: The batch, or the part of it that is being computed.
        """
        self._lost.update(reasons if ticket.rows is None else [ticket.rows[position] for position in reasons])
        by_unit: dict[int, list[str]] = {}
        indices = ticket.indices if self._layouts[ticket.loader].unit == "batch" else None
        for position, reason in reasons.items():
            named = reason if indices is None else f"sample {indices[position]}: {reason}"
            by_unit.setdefault(ticket.span.unit(position), []).append(named)
        self._pipeline.give_up(ticket.loader, {unit: "; ".join(named) for unit, named in by_unit.items()})

    def skip(self, ticket: Ticket) -> None:
        """Nothing of a batch could be read here: the other ranks of the group learn it where they would compute it."""
        self.in_hand = SamplesRead(None, self._pipeline.reasons(ticket.loader))
        with contextlib.suppress(SamplesDifferError):  # the others give up what they could read
            self._context.compute_together(lambda nothing: None, None)
        self.in_hand = None
        self.group_has_asked = True

    def _isolation(self, index: int, source: Source) -> StepIsolation:
        return StepIsolation(source, lambda batch: self._context.transfer(batch, index))

    def _call(self, call: Call, batch: Any) -> Any:
        self.group_has_asked = True  # its ranks have compared their input, or there is only this one
        return call(batch)

    def _wrapped(self, call: Call, batch: Any, ticket: Ticket) -> Any:
        """Compute a batch, or a part of one, in what survives running out of memory."""
        step: Call = functools.partial(self._context.compute_together, call)
        if self._dynamic is not None:
            step = self._dynamic.step(call, ticket)
        surviving = self._context.surviving_steps or self._surviving_steps
        for wrapper in (*reversed(self._context.step_wrappers), *([] if surviving is None else [surviving])):
            step = functools.partial(_wrap, wrapper, step, ticket)
        return step(batch)

    def _isolated(self, call: Call, batch: Any, in_flight: BatchInFlight) -> Any:
        """Compute a batch, without the samples that make the step raise."""
        ticket = in_flight.ticket
        if not self._isolations:
            return self._wrapped(call, batch, ticket)

        def step(part: Any, its_ticket: Ticket) -> Any:
            if part is not batch:
                self._begin_blame(ticket)
            return self._wrapped(call, part, its_ticket)

        plain_step = functools.partial(self._context.compute_together, call)
        output, reasons = self._isolations[ticket.loader].compute(step, plain_step, batch, ticket, self._lost)
        if reasons:
            self.lose(reasons, ticket)
        return output

    def _on_common_samples(self, call: Call, batch: Any, in_flight: BatchInFlight) -> Any:
        """Compute a batch, less the samples that another rank of the group could not read; None if none are left."""
        while True:
            ticket = in_flight.ticket
            self.in_hand = self._read_by_this_rank(ticket)
            try:
                return self._wrapped(call, batch, ticket)
            except SamplesDifferError as differ:
                reasons = differ.reasons
            finally:
                self.in_hand = None
            self.group_has_asked = True
            samples = samples_of(ticket.span)
            lost = frozenset(position for position, sample in enumerate(samples) if sample in reasons)
            if not lost:
                continue  # it is the others who compute less now
            self._pipeline.give_up(
                ticket.loader, {samples[position][0]: reasons[samples[position]] for position in lost}
            )
            if len(lost) == ticket.size:
                self._lost |= lost
                return None
            in_flight.ticket = without(ticket, lost)
            if ticket.window is not None:
                self._pipeline.collectors[ticket.loader].give_up_in_window(ticket.window, len(lost))
            assert ticket.collate is not None
            batch = self._context.transfer(ticket.collate(in_flight.ticket.indices or []), ticket.loader)

    def _read_by_this_rank(self, ticket: Ticket) -> SamplesRead | None:
        """What this rank has of a batch; None if it could not be read again."""
        if ticket.indices is None or ticket.collate is None:
            return None
        return SamplesRead(ticket.span, self._pipeline.reasons(ticket.loader))


def _wrap(wrapper: StepWrapper, call: Call, ticket: Ticket, batch: Any) -> Any:
    return wrapper(call, batch, ticket)
