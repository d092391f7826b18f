"""How much memory a device may give, what a model needs of it, and tensors allocated within that budget."""

from __future__ import annotations

import logging
import math
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from lightning_gpuorch.errors import MemoryBudgetError, ModelDoesNotFitError

log = logging.getLogger(__name__)

ALLOCATION_BYTES = 512
"""Granularity of the CUDA caching allocator; smaller storages cost this much."""
ACTIVATION_HEADROOM = 0.1
"""Share of the budget that must stay free for activations when a model is set up."""
_MIB = 2**20


def total_memory_bytes(device: torch.device) -> int:
    """Memory of a device; for the CPU what this process may use, by its control group or the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return min(psutil.virtual_memory().total, *_cgroup_limits())


def _cgroup_limits() -> list[int]:
    limits = [2**62]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                limits.append(int(file.read()))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return limits


def memory_budget_bytes(device: torch.device, memory_fraction: float) -> int:
    """Bytes a job may use on a device."""
    return int(total_memory_bytes(device) * memory_fraction)


@dataclass(frozen=True)
class ModelBytes:
    """What a model's weights take.

    Attributes:
        parameters: Bytes of parameters on this rank; tied ones count once.
        buffers: Bytes of buffers.
    """

    parameters: int
    buffers: int

    @property
    def total(self) -> int:
        """Parameters and buffers."""
        return self.parameters + self.buffers


def model_bytes(module: torch.nn.Module) -> ModelBytes:
    """Measure a model: by shape on meta, by local shard for DTensors, tied tensors once."""
    return ModelBytes(_distinct_bytes(module.parameters()), _distinct_bytes(module.buffers()))


def _distinct_bytes(tensors: Iterator[torch.Tensor]) -> int:
    seen: dict[Any, int] = {}
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        key = id(tensor) if local.is_meta else (local.device, local.data_ptr() or id(tensor))
        seen[key] = max(seen.get(key, 0), local.numel() * local.element_size())
    return sum(seen.values())


def check_model_fits(
    module: torch.nn.Module,
    budget_bytes: int,
    *,
    tensor_parallel_size: int = 1,
    activation_headroom: float = ACTIVATION_HEADROOM,
) -> None:
    """Refuse a model that cannot fit, before anything is moved.

    Args:
        module: The whole model, before it is sharded.
        budget_bytes: Bytes one device may use.
        tensor_parallel_size: Ranks that will share the model; sharded models hold about this part of it each.
        activation_headroom: Share of the budget that must stay free.

    Raises:
        ModelDoesNotFitError: It does not fit; the message has the arithmetic and the degree that would.
    """
    total = model_bytes(module).total
    usable = int(budget_bytes * (1 - activation_headroom))
    needed = math.ceil(total / tensor_parallel_size)
    if needed <= usable:
        return
    fitting = math.ceil(total / usable) if usable > 0 else None
    advice = f"tensor_parallel_size={fitting} would fit" if fitting else "no tensor_parallel_size would fit"
    raise ModelDoesNotFitError(
        f"{type(module).__name__} needs {_gib(total)} for its weights"
        + (f", {_gib(needed)} on each of {tensor_parallel_size} ranks" if tensor_parallel_size > 1 else "")
        + f", and a device may give {_gib(budget_bytes)}, less {activation_headroom:.0%} for activations = "
        f"{_gib(usable)}; {advice}.",
        needed,
        budget_bytes,
        fitting,
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


class ResourceAllocator:
    """Tensors within a byte budget, and pools of buffers that are used again.

    On CUDA the budget is also enforced on everything else in the process, through torch's allocator. Elsewhere it covers
    the tensors this object allocates.

    Args:
        device: Where tensors are allocated.
        memory_fraction: Share of the device's memory to use.
        budget_bytes: The budget itself, instead of a share.
    """

    def __init__(
        self, device: torch.device | str = "cpu", memory_fraction: float = 0.9, budget_bytes: int | None = None
    ):
        self.device = torch.device(device)
        self.budget_bytes = memory_budget_bytes(self.device, memory_fraction) if budget_bytes is None else budget_bytes
        self._accounted: dict[int, int] = {}
        self._pools: dict[tuple[tuple[int, ...], torch.dtype, bool], list[torch.Tensor]] = defaultdict(list)
        self.pool_hits = 0
        self.pool_misses = 0
        if self.device.type == "cuda":
            fraction = min(1.0, self.budget_bytes / total_memory_bytes(self.device))
            torch.cuda.set_per_process_memory_fraction(fraction, self.device)

    def allocate_tensor(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Allocate an uninitialised tensor.

        Args:
            shape: Its shape.
            dtype: Its element type.

        Raises:
            MemoryBudgetError: It would exceed the budget; nothing was allocated.
        """
        wanted = _rounded(math.prod(shape) * dtype.itemsize)
        used = self.allocated_bytes
        if used + wanted > self.budget_bytes:
            raise MemoryBudgetError(
                f"a tensor of shape {tuple(shape)} and {dtype} takes {wanted} bytes; {used} of the budget of "
                f"{self.budget_bytes} bytes on {self.device} are in use, {self.budget_bytes - used} are free."
            )
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        self._account(tensor, wanted)
        return tensor

    def _account(self, tensor: torch.Tensor, size_bytes: int) -> None:
        # By storage: views keep it alive and cost nothing of their own.
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._accounted[key] = size_bytes
        weakref.finalize(storage, self._accounted.pop, key, None)

    @property
    def allocated_bytes(self) -> int:
        """Bytes in use: of the whole process on CUDA, of this object's tensors elsewhere."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_allocated(self.device))
        return sum(self._accounted.values())

    @contextmanager
    def pooled(self, shape: Sequence[int], dtype: torch.dtype, *, pinned: bool = False) -> Iterator[torch.Tensor]:
        """Borrow a buffer from a pool; it goes back at the end of the block, and must not be used after.

        Args:
            shape: Its shape.
            dtype: Its element type.
            pinned: Page-locked host memory, for copies to a GPU.
        """
        key = (tuple(shape), dtype, pinned)
        if self._pools[key]:
            self.pool_hits += 1
            buffer = self._pools[key].pop()
        else:
            self.pool_misses += 1
            if pinned:
                buffer = torch.empty(key[0], dtype=dtype, pin_memory=torch.cuda.is_available())
            else:
                buffer = self.allocate_tensor(shape, dtype)
        try:
            yield buffer
        finally:
            self._pools[key].append(buffer)

    @property
    def pooled_bytes(self) -> int:
        """Bytes of idle buffers in the pools."""
        return sum(b.untyped_storage().nbytes() for buffers in self._pools.values() for b in buffers)

    def get_memory_usage(self) -> dict[str, float]:
        """Where the memory is.

        Returns:
            ``allocated_mb``, ``reserved_mb``, ``max_budget_mb``, ``pooled_mb`` and ``outside_allocator_mb`` in MiB;
            ``utilization_percent`` of the budget; ``fragmentation``, the share of reserved memory that is free but split
            off, from 0 to 1.
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
            "utilization_percent": 100 * allocated / self.budget_bytes if self.budget_bytes else 0.0,
            "fragmentation": inactive / reserved if reserved else 0.0,
            "pooled_mb": self.pooled_bytes / _MIB,
            "outside_allocator_mb": outside / _MIB,
        }

    def reset(self) -> None:
        """Empty the pools and give cached memory back."""
        self._pools.clear()
        self.pool_hits = self.pool_misses = 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _rounded(size_bytes: int) -> int:
    return max(1, -(-size_bytes // ALLOCATION_BYTES)) * ALLOCATION_BYTES
