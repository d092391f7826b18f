"""Tensors within a byte budget, and a truthful account of where the memory is."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Sequence

import torch

from lightning_gpuorch.devices.memory.budget import format_bytes, memory_budget_bytes, total_memory_bytes
from lightning_gpuorch.devices.memory.pool import BufferPool
from lightning_gpuorch.errors import ConfigurationError, MemoryBudgetError

ALLOCATION_BYTES = 512
"""Granularity of the CUDA caching allocator: smaller storages cost this much."""
CUDA_RESERVE_BYTES = 512 * 2**20
"""What the CUDA context, NCCL's buffers and library workspaces take outside the allocator, unless told otherwise."""
_MIB = 2**20


class ResourceAllocator:
    """The memory budget of one device.

    ``budget = memory_fraction x device memory - reserve``. On CUDA torch's allocator is told the budget, so that it
    holds for everything in the process: torch raises ``torch.OutOfMemoryError`` beyond it, caches included. So that
    caches of batches of other sizes are not in the way, segments are made expandable, unless the environment configures
    the allocator. Elsewhere the budget holds for what is allocated here. Either way :meth:`allocate_tensor` checks
    before it allocates.

    Args:
        device: The device.
        memory_fraction: Share of the device's memory that the job may use.
        budget_bytes: The budget itself, instead of a share less a reserve.
        reserve_bytes: Taken off the share for what does not go through the allocator. None takes 512 MiB on CUDA, but
            at most a twentieth of the device, and nothing elsewhere.

    Attributes:
        device_pool: Buffers on the device; idle ones count as allocated, and are freed before an allocation is refused.
        pinned_pool: Page-locked host buffers (ordinary ones where there is no CUDA); outside the budget.

    Raises:
        ConfigurationError: The share is out of range, or the reserve leaves nothing.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        memory_fraction: float = 0.9,
        budget_bytes: int | None = None,
        reserve_bytes: int | None = None,
    ):
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if budget_bytes is None:
            share = memory_budget_bytes(self.device, memory_fraction)
            if reserve_bytes is None:
                reserve_bytes = 0
                if self.device.type == "cuda":
                    reserve_bytes = min(CUDA_RESERVE_BYTES, total_memory_bytes(self.device) // 20)
            budget_bytes = share - reserve_bytes
            if budget_bytes <= 0:
                raise ConfigurationError(
                    f"memory_fraction={memory_fraction} of {self.device} is {format_bytes(share)}, and a reserve of "
                    f"{format_bytes(reserve_bytes)} leaves nothing."
                )
        self.budget_bytes = budget_bytes
        self._storages: dict[int, int] = {}
        self.device_pool = BufferPool(lambda size_bytes: self.allocate_tensor((size_bytes,), torch.uint8))
        self.pinned_pool = BufferPool(_allocate_pinned)
        if self.device.type == "cuda":
            _expand_segments()
            fraction = min(1.0, self.budget_bytes / total_memory_bytes(self.device))
            torch.cuda.set_per_process_memory_fraction(fraction, self.device)

    def allocate_tensor(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Allocate an uninitialised tensor.

        Args:
            shape: Its shape.
            dtype: Its element type.

        Returns:
            The tensor. Its bytes count until the last tensor that shares its storage is gone.

        Raises:
            MemoryBudgetError: It would exceed the budget; nothing was allocated.
            ValueError: A dimension is negative.
        """
        shape = tuple(shape)
        if any(length < 0 for length in shape):
            raise ValueError(f"shape={shape} has a negative dimension.")
        wanted = -(-math.prod(shape) * dtype.itemsize // ALLOCATION_BYTES) * ALLOCATION_BYTES
        if self.allocated_bytes + wanted > self.budget_bytes:
            self.device_pool.clear()
        used = self.allocated_bytes
        if used + wanted > self.budget_bytes:
            raise MemoryBudgetError(
                f"a tensor of shape {shape} and {dtype} takes {wanted} bytes. On {self.device} "
                f"{used} of the budget of {self.budget_bytes} bytes are in use, {self.budget_bytes - used} are left: "
                f"{used + wanted - self.budget_bytes} too few."
            )
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        if self.device.type != "cuda":
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = wanted
            weakref.finalize(storage, self._storages.pop, storage._cdata, None).atexit = False
        return tensor

    @property
    def allocated_bytes(self) -> int:
        """Bytes in tensors: of the whole process on CUDA, of those allocated here elsewhere."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_allocated(self.device))
        return sum(self._storages.values())

    def get_memory_usage(self) -> dict[str, float]:
        """Where the memory is.

        Returns:
            In MiB: ``allocated_mb`` in tensors, ``reserved_mb`` held by torch's allocator (tensors and cache),
            ``max_budget_mb``, ``pooled_mb`` in idle buffers of the device pool (part of allocated), ``pinned_mb`` in
            idle host buffers, ``outside_allocator_mb`` of the device used by everything else: CUDA contexts, NCCL,
            other processes. ``utilization_percent`` is allocated / budget; ``fragmentation`` the share, from 0 to 1, of
            the reserved memory that is free but split off; ``device_pool_hit_rate`` and ``pinned_pool_hit_rate`` the
            shares of buffers that needed no allocation.
        """
        allocated = reserved = self.allocated_bytes
        inactive = outside = 0
        if self.device.type == "cuda":
            reserved = int(torch.cuda.memory_reserved(self.device))
            inactive = int(torch.cuda.memory_stats(self.device).get("inactive_split_bytes.all.current", 0))
            free, total = torch.cuda.mem_get_info(self.device)
            outside = max(0, total - free - reserved)
        return {
            "allocated_mb": allocated / _MIB,
            "reserved_mb": reserved / _MIB,
            "max_budget_mb": self.budget_bytes / _MIB,
            "utilization_percent": 100 * allocated / self.budget_bytes,
            "fragmentation": inactive / reserved if reserved else 0.0,
            "pooled_mb": self.device_pool.idle_bytes / _MIB,
            "pinned_mb": self.pinned_pool.idle_bytes / _MIB,
            "outside_allocator_mb": outside / _MIB,
            "device_pool_hit_rate": self.device_pool.hit_rate,
            "pinned_pool_hit_rate": self.pinned_pool.hit_rate,
        }

    def reset(self) -> None:
        """Free idle buffers, reset their counts, and give cached memory back to the device. Tensors stay."""
        for pool in (self.device_pool, self.pinned_pool):
            pool.clear()
            pool.num_hits = pool.num_misses = 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _expand_segments() -> None:
    """Have torch's allocator map memory where it is needed: a segment kept for one batch size fits the next one, too."""
    if any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        return
    for name in ("_accelerator_setAllocatorSettings", "_cuda_cudaCachingAllocator_set_allocator_settings"):
        if hasattr(torch._C, name):
            getattr(torch._C, name)("expandable_segments:True")
            return


def _allocate_pinned(size_bytes: int) -> torch.Tensor:
    return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
