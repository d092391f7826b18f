"""A byte budget for the CPU that behaves as a full GPU does, so that recovery from out-of-memory runs in any test."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_gpuorch.devices.memory.peaks import PeakMeter, use_stand_in

ROUNDING_BYTES = 512
"""The CUDA caching allocator hands out multiples of this."""


class CPUMemoryBudget(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of CPU tensors made inside, and raises ``torch.OutOfMemoryError`` above a limit.

    As on a device, storages count and not tensors: a view costs nothing, and a storage counts until its last owner is
    gone. The tensor that would exceed the limit is freed before the error is raised. Operations on fake tensors cost
    nothing; a DTensor counts by its local shards.

    ::

        with CPUMemoryBudget(64 * 2**20, resident=model):
            model(batch)

    Args:
        limit_bytes: The budget; may be changed at any time.
        resident: A module whose parameters and buffers count from the start.

    Attributes:
        used_bytes: Bytes alive now.
        peak_bytes: Most bytes alive at once since the last :meth:`reset_peak`.
        num_ooms: Errors raised.
    """

    def __init__(self, limit_bytes: int, resident: torch.nn.Module | None = None):
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit_bytes = limit_bytes
        self.used_bytes = self.peak_bytes = self.num_ooms = 0
        self._before: PeakMeter | None = None
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}
        if resident is not None:
            for tensor in (*resident.parameters(), *resident.buffers()):
                self._charge((tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage())

    def reset_peak(self) -> None:
        """Start measuring the peak from what is alive now."""
        self.peak_bytes = self.used_bytes

    def __enter__(self) -> CPUMemoryBudget:
        self._before = use_stand_in(_BudgetMeter(self))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        use_stand_in(self._before)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let it run its local operations, which come by here
        result = func(*args, **(kwargs or {}))
        if any(issubclass(kind, FakeTensor) for kind in types):
            return result
        # A view of a tensor from outside is no allocation.
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _is_counted(leaf)}
        wanted = 0
        for leaf in tree_leaves(result):
            if _is_counted(leaf):
                storage = leaf.untyped_storage()
                if storage._cdata in self._alive or storage._cdata not in given:
                    wanted = max(wanted, self._charge(storage))
        if wanted and self.used_bytes > self.limit_bytes:
            in_use = self.used_bytes
            leaf = storage = result = None  # the storage dies here, as if it had never been allocated
            self.num_ooms += 1
            raise torch.OutOfMemoryError(
                f"CPU budget exceeded: tried to allocate {wanted} bytes; with them {in_use} bytes would be in use, the "
                f"budget is {self.limit_bytes}."
            )
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return result

    def _charge(self, storage: torch.UntypedStorage) -> int:
        """Account for a storage; returns the bytes it adds."""
        key = storage._cdata
        size_bytes = -(-storage.nbytes() // ROUNDING_BYTES) * ROUNDING_BYTES
        known = self._alive.get(key)
        if known is not None and known[1]() is not None:
            added = size_bytes - known[0]  # zero, or it was resized
            self._alive[key] = (size_bytes, known[1])
        else:
            if known is not None:  # the address is in use again before the callback ran
                self.used_bytes -= known[0]
            added = size_bytes
            reference = weakref.ref(storage, lambda dead: self._release(key, dead))
            self._alive[key] = (size_bytes, reference)
        self.used_bytes += added
        return added

    def _release(self, key: int, dead: weakref.ref[Any]) -> None:
        known = self._alive.get(key)
        if known is not None and known[1] is dead:
            del self._alive[key]
            self.used_bytes -= known[0]


class _BudgetMeter:
    """Lets dynamic batching learn from the budget as it does from a device."""

    def __init__(self, budget: CPUMemoryBudget):
        self._budget = budget

    @property
    def budget_bytes(self) -> float:
        return self._budget.limit_bytes

    def begin(self) -> None:
        self._budget.reset_peak()

    def peak_bytes(self) -> int:
        return self._budget.peak_bytes


def _is_counted(leaf: Any) -> bool:
    return type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.device.type == "cpu"
