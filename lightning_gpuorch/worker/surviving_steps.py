"""Steps that survive running out of memory: the batch is computed in parts, and a sample that does not fit is given up."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning_gpuorch.devices.memory import memory_summary
from lightning_gpuorch.predictions.loading.tickets import Ticket
from lightning_gpuorch.telemetry.current import observe_oom
from lightning_gpuorch.worker.oom.halving import BatchHalver, OOMEvent
from lightning_gpuorch.worker.step_context import StepContext


class SurvivingSteps:
    """A step wrapper for the predict calls of one rank; the ranks of a tensor-parallel group cut alike.

    Args:
        context: The rank whose steps they are.
        on_oom: Called with each :class:`~lightning_gpuorch.worker.oom.halving.OOMEvent`, on the rank that ran out of memory.
    """

    def __init__(self, context: StepContext, on_oom: Callable[[OOMEvent], Any] | None = None):
        self._context, self._on_oom = context, on_oom
        self.halvers: dict[int, BatchHalver] = {}
        """One per dataloader: their steps may lay out outputs in different ways."""

    @staticmethod
    def possible(context: StepContext) -> bool:
        """Whether the ranks of a tensor-parallel group can halve together; a rank alone always can."""
        return context.world.topology.tensor_parallel_size == 1 or context.world.recovery is not None

    def __call__(self, call: Callable[[Any], Any], batch: Any, ticket: Ticket) -> Any:
        """Compute a batch, at once or in parts."""
        context, halver = self._context, self._halver(ticket)
        recollate = None
        rebuild = ticket.recollate
        if rebuild is not None:
            recollate = lambda start, stop: context.transfer(rebuild(start, stop), ticket.loader)  # noqa: E731
        if ticket.size is None:  # a stream: nobody could compute a lost sample later
            return halver.run(call, batch, recollate=recollate)
        halved = halver.run_surviving(call, batch, size=ticket.size, recollate=recollate)
        if halved.lost:
            assert context.job is not None
            context.job.lose(dict.fromkeys(halved.lost, "out of memory with this sample alone"), ticket)
        return halved.output

    def _halver(self, ticket: Ticket) -> BatchHalver:
        if ticket.loader not in self.halvers:
            self.halvers[ticket.loader] = BatchHalver(
                self._take_oom,
                functools.partial(memory_summary, self._context.device),
                outputs_to_host=self._context.world.topology.tensor_parallel_size > 1,
                remember=not ticket.sized,
            )
        return self.halvers[ticket.loader]

    def _take_oom(self, event: OOMEvent) -> None:
        recovery = self._context.world.recovery
        if recovery is not None and recovery.last is not None and not recovery.last.own:
            return  # the rank of the group that ran out of memory tells it
        fields: dict[str, Any] = {} if event.next_size else {"lost_samples": event.size}
        if recovery is not None and recovery.last is not None:
            fields["recovery_seconds"] = recovery.last.seconds
        observe_oom(event.size, event.next_size or None, **fields)
        if self._on_oom is not None:
            self._on_oom(event)
