"""How much memory a device may give, what a model needs of it, and tensors allocated within that budget."""

from lightning_gpuorch.devices.memory.allocator import ResourceAllocator
from lightning_gpuorch.devices.memory.budget import (
    ACTIVATION_HEADROOM,
    ModelBytes,
    check_model_fits,
    memory_budget_bytes,
    memory_summary,
    model_bytes,
    total_memory_bytes,
)
from lightning_gpuorch.devices.memory.host import keep_freed_memory
from lightning_gpuorch.devices.memory.pool import BufferPool

__all__ = [
    "ACTIVATION_HEADROOM",
    "BufferPool",
    "ModelBytes",
    "ResourceAllocator",
    "check_model_fits",
    "keep_freed_memory",
    "memory_budget_bytes",
    "memory_summary",
    "model_bytes",
    "total_memory_bytes",
]
