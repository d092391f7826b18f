"""Dynamic batching in a predict call: a batcher for each dataloader, and steps that teach it what memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_gpuorch.devices.memory.peaks import PeakMeter, peak_meter
from lightning_gpuorch.predictions.loading.describe import Source, check_rebatchable
from lightning_gpuorch.predictions.loading.source import MapSource
from lightning_gpuorch.predictions.loading.tickets import Ticket
from lightning_gpuorch.worker.batching.dynamic import (
    ACCELERATOR_OVERHEAD_TOKENS,
    CPU_OVERHEAD_TOKENS,
    CPU_TOKENS,
    MAX_COUNT,
    DynamicBatcher,
    padded_shape,
)
from lightning_gpuorch.worker.batching.lengths import length_of
from lightning_gpuorch.worker.batching.memory_model import BatchSizer
from lightning_gpuorch.worker.oom.detection import is_out_of_memory
from lightning_gpuorch.worker.step_context import StepContext, StepNote

GROUP_BUDGET = 2**40
"""In a group memory is counted in parts of each rank's own budget, so that all can learn from the one with least room."""

UNMEASURED_TOKENS = 16384
"""Token budget of an accelerator whose memory is not learned, since to run out of it would cost a restart: in a group that
does not recover in place."""

Call = Callable[[Any], Any]


@dataclass
class _Untold:
    """What the last batch of a group took here; the others get to know it with the next one."""

    sizer: BatchSizer
    shape: tuple[int, int]
    peak: int


class DynamicSteps:
    """What one replica has learned about batches and memory during a predict call.

    The ranks of a tensor-parallel group have to form the same batches, so all of them learn the same: of every batch the
    largest peak of any rank, which they tell each other with the batch after it.

    Args:
        context: The rank whose steps they are.
    """

    def __init__(self, context: StepContext):
        self._context = context
        self._is_group = context.world.topology.tensor_parallel_size > 1
        learns = not self._is_group or context.world.recovery is not None
        self._meter: PeakMeter | None = None
        if learns:
            self._meter = peak_meter(context.device, context.allocator.budget_bytes)
        self._budget_bytes = 0.0 if self._meter is None else self._meter.budget_bytes
        self._batchers: list[DynamicBatcher] = []
        self._untold: _Untold | None = None
        self._heard: Sequence[StepNote] = ()
        self.asked_to_leave = False
        """Whether this rank was asked to leave before the work is done."""

    @property
    def leaves(self) -> bool:
        """Whether the replica leaves before the next batch: all ranks of a group know of it since the last one."""
        return any(note.leaves for note in self._heard) if self._is_group else self.asked_to_leave

    def batcher(self, source: Source) -> DynamicBatcher:
        """The batcher of the next dataloader.

        Args:
            source: The loader, described.

        Raises:
            ConfigurationError: Its samples cannot be put into other batches, or their length is not known.
        """
        check_rebatchable(source)
        context, sizer = self._context, self._sizer()
        on_cpu = context.device.type == "cpu"
        max_tokens: int | None
        if context.config.max_batch_tokens != "auto":
            max_tokens = context.config.max_batch_tokens
        elif sizer is None:
            max_tokens = CPU_TOKENS if on_cpu else UNMEASURED_TOKENS
        else:
            max_tokens = None
        batcher = DynamicBatcher(
            max_tokens,
            overhead_tokens=CPU_OVERHEAD_TOKENS if on_cpu else ACCELERATOR_OVERHEAD_TOKENS,
            length_fn=context.length_fn or length_of,
            sizer=sizer,
        )
        if isinstance(source, MapSource):
            source.try_on_first(batcher.measure)  # an unknown type is refused before work starts
        self._batchers.append(batcher)
        return batcher

    def _sizer(self) -> BatchSizer | None:
        if self._meter is None:
            return None
        return BatchSizer(GROUP_BUDGET if self._is_group else self._budget_bytes, MAX_COUNT)

    def step(self, call: Call, ticket: Ticket) -> Call:
        """A step of the replica: its peak, or that it ran out of memory, decides how large later batches are.

        Args:
            call: Computes a batch, or a part of one.
            ticket: The batch.
        """
        sizer, meter = self._batchers[ticket.loader].sizer, self._meter
        given = ticket.shape

        def step(batch: Any) -> Any:
            nonlocal given
            # A part of a batch that does not show its size teaches nothing.
            shape = None if sizer is None else padded_shape(batch) or given
            given = None
            if meter is not None:
                meter.begin()
            peak = 0 if self._untold is None else self._untold.peak
            try:
                output, self._heard = self._context.compute_and_tell(
                    call, batch, StepNote(peak, int(self.asked_to_leave))
                )
            except Exception as error:
                if sizer is not None and shape is not None and is_out_of_memory(error):
                    sizer.failed(*shape)
                raise
            if sizer is not None and meter is not None:
                self._learn(sizer, shape, meter)
            return output

        return step

    def _learn(self, sizer: BatchSizer, shape: tuple[int, int] | None, meter: PeakMeter) -> None:
        if not self._is_group:
            if shape is not None:
                sizer.fitted(*shape, meter.peak_bytes())
            return
        if self._untold is not None:
            self._untold.sizer.fitted(*self._untold.shape, max(note.peak for note in self._heard))
        peak = int(GROUP_BUDGET * meter.peak_bytes() / self._budget_bytes)
        self._untold = None if shape is None else _Untold(sizer, shape, peak)
