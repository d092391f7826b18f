"""Dynamic batching in a predict call: a batcher for each dataloader, and steps that teach it what memory allows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from lightning_gpuorch.batching import BatchSizer, DynamicBatcher, is_out_of_memory, length_of
from lightning_gpuorch.batching.dynamic import (
    ACCELERATOR_OVERHEAD_TOKENS,
    CPU_OVERHEAD_TOKENS,
    CPU_TOKENS,
    MAX_COUNT,
    padded_shape,
)
from lightning_gpuorch.batching.token_budget import LengthFn
from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.memory.peaks import PeakMeter, peak_meter
from lightning_gpuorch.predictions.loader import Ticket
from lightning_gpuorch.predictions.source import MapSource, Source, check_rebatchable

log = logging.getLogger(__name__)

UNMEASURED_TOKENS = 16384
"""Token budget of an accelerator whose memory is not learned: under tensor parallelism."""

Call = Callable[[Any], Any]


class DynamicSteps:
    """What one replica has learned about batches and memory during a predict call.

    The ranks of a tensor-parallel group have to form the same batches. What each could learn of its own memory would
    differ, so there the token budget alone decides.

    Args:
        config: Settings.
        device: Device of this rank.
        budget_bytes: Memory the job may use there.
        tensor_parallel_size: Ranks per replica.
        length_fn: Gives the length of a sample; None knows common types.
    """

    def __init__(
        self,
        config: OrchestratorConfig,
        device: torch.device,
        budget_bytes: float,
        tensor_parallel_size: int,
        length_fn: LengthFn | None,
    ):
        self._device, self._length_fn = device, length_fn or length_of
        self._max_tokens = None if config.max_batch_tokens == "auto" else config.max_batch_tokens
        alone = tensor_parallel_size == 1
        self._meter: PeakMeter | None = peak_meter(device, budget_bytes) if alone else None
        self._batchers: list[DynamicBatcher] = []

    def batcher(self, source: Source) -> DynamicBatcher:
        """The batcher of the next dataloader.

        Args:
            source: The loader, described.

        Raises:
            ConfigurationError: Its samples cannot be put into other batches, or their length is not known.
        """
        check_rebatchable(source)
        on_cpu = self._device.type == "cpu"
        max_tokens = self._max_tokens
        if max_tokens is None and self._meter is None:
            max_tokens = CPU_TOKENS if on_cpu else UNMEASURED_TOKENS
        batcher = DynamicBatcher(
            max_tokens,
            overhead_tokens=CPU_OVERHEAD_TOKENS if on_cpu else ACCELERATOR_OVERHEAD_TOKENS,
            length_fn=self._length_fn,
            sizer=BatchSizer(self._meter.budget_bytes, MAX_COUNT) if self._meter is not None else None,
        )
        if isinstance(source, MapSource) and source.num_units:
            first = next(source.spans(source.layout(1), 0, range(0), frozenset()))
            assert first.indices is not None
            batcher.measure([source.loader.dataset[first.indices[0]]])  # an unknown type is refused before work starts
        self._batchers.append(batcher)
        return batcher

    def measured(self, call: Call, ticket: Ticket) -> Call:
        """A step, watched: its peak, or that it ran out of memory, decides how large later batches are."""
        sizer, meter = self._batchers[ticket.loader].sizer, self._meter
        if sizer is None or meter is None:
            return call
        given = ticket.shape

        def step(batch: Any) -> Any:
            nonlocal given
            # A part of a batch that does not show its size teaches nothing.
            shape, given = padded_shape(batch) or given, None
            meter.begin()
            try:
                output = call(batch)
            except Exception as error:
                if shape is not None and is_out_of_memory(error):
                    sizer.failed(*shape)
                raise
            if shape is not None:
                sizer.fitted(*shape, meter.peak_bytes())
            return output

        return step
