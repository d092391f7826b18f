"""Batches that fit: halving after memory ran out, a model of memory fitted online, batches by token budget."""

from lightning_gpuorch.batching.halving import BatchHalver, HalvedOutput, OOMEvent, SingleSampleOOMError
from lightning_gpuorch.batching.limits import SizeLimits, shape_bucket
from lightning_gpuorch.batching.oom import free_memory, is_out_of_memory, release

__all__ = [
    "BatchHalver",
    "HalvedOutput",
    "OOMEvent",
    "SingleSampleOOMError",
    "SizeLimits",
    "free_memory",
    "is_out_of_memory",
    "release",
    "shape_bucket",
]
