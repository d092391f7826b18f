"""Batches that fit: halving after memory ran out, a model of memory fitted online, batches by token budget."""

from lightning_gpuorch.batching.dynamic import DynamicBatcher
from lightning_gpuorch.batching.halving import BatchHalver, HalvedOutput, OOMEvent, SingleSampleOOMError
from lightning_gpuorch.batching.limits import SizeLimits, shape_bucket
from lightning_gpuorch.batching.memory_model import BatchSizer, MemoryModel
from lightning_gpuorch.batching.oom import free_memory, freeze_objects, is_out_of_memory, release
from lightning_gpuorch.batching.token_budget import (
    TokenBudgetBatcher,
    batch_stream,
    length_of,
    length_sorted_order,
    measure_lengths,
)

__all__ = [
    "BatchHalver",
    "BatchSizer",
    "DynamicBatcher",
    "HalvedOutput",
    "MemoryModel",
    "OOMEvent",
    "SingleSampleOOMError",
    "SizeLimits",
    "TokenBudgetBatcher",
    "batch_stream",
    "free_memory",
    "freeze_objects",
    "is_out_of_memory",
    "length_of",
    "length_sorted_order",
    "measure_lengths",
    "release",
    "shape_bucket",
]
