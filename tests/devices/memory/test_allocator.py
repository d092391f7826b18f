"""The budget: checked before an allocation, given back when tensors die, and reported truthfully."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lightning_gpuorch.devices.memory import BufferPool, ResourceAllocator, total_memory_bytes
from lightning_gpuorch.errors import ConfigurationError, MemoryBudgetError
from tests.support.examples import examples

KEYS = {
    "allocated_mb",
    "reserved_mb",
    "max_budget_mb",
    "utilization_percent",
    "fragmentation",
    "pooled_mb",
    "pinned_mb",
    "outside_allocator_mb",
    "device_pool_hit_rate",
    "pinned_pool_hit_rate",
}


def test_the_budget_is_a_share_of_the_device_less_a_reserve() -> None:
    total = total_memory_bytes(torch.device("cpu"))
    assert ResourceAllocator("cpu", 0.5).budget_bytes == int(total * 0.5)
    assert ResourceAllocator("cpu", 0.5, reserve_bytes=1000).budget_bytes == int(total * 0.5) - 1000
    assert ResourceAllocator("cpu", budget_bytes=4096).budget_bytes == 4096


@pytest.mark.parametrize("options", [{"memory_fraction": 0}, {"memory_fraction": 1.5}, {"reserve_bytes": 2**62}])
def test_a_budget_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        ResourceAllocator("cpu", **options)


def test_the_refusal_has_the_arithmetic() -> None:
    allocator = ResourceAllocator(budget_bytes=10_240)
    kept = allocator.allocate_tensor((1024,), torch.float32)
    with pytest.raises(
        MemoryBudgetError, match=r"8192 bytes.*4096 of the budget of 10240.*6144 are left: 2048 too few"
    ):
        allocator.allocate_tensor((1024,), torch.float64)
    assert allocator.allocated_bytes == kept.nbytes


def test_nothing_is_allocated_when_refused() -> None:
    allocator = ResourceAllocator(budget_bytes=2**20)
    with pytest.raises(MemoryBudgetError):
        allocator.allocate_tensor((2**60,), torch.uint8)
    assert allocator.allocated_bytes == 0


def test_views_keep_the_bytes_and_cost_nothing() -> None:
    allocator = ResourceAllocator(budget_bytes=10_000)
    tensor = allocator.allocate_tensor((1000,), torch.float32)
    view = tensor.view(10, 100)[3]
    assert allocator.allocated_bytes == 4096
    del tensor
    assert allocator.allocated_bytes == 4096
    del view
    gc.collect()
    assert allocator.allocated_bytes == 0


def test_bad_shapes() -> None:
    allocator = ResourceAllocator(budget_bytes=10_000)
    with pytest.raises(ValueError, match="negative"):
        allocator.allocate_tensor((2, -1))
    assert allocator.allocate_tensor((0, 5)).shape == (0, 5)
    assert allocator.allocate_tensor(()).ndim == 0


def test_usage_has_the_keys_and_adds_up() -> None:
    allocator = ResourceAllocator(budget_bytes=4 * 2**20)
    tensor = allocator.allocate_tensor((2**18,), torch.float32)
    usage = allocator.get_memory_usage()
    assert set(usage) == KEYS
    assert usage["allocated_mb"] == usage["reserved_mb"] == tensor.nbytes / 2**20 == 1.0
    assert usage["max_budget_mb"] == 4.0
    assert usage["utilization_percent"] == 25.0
    assert usage["fragmentation"] == usage["outside_allocator_mb"] == 0.0


def test_buffers_are_used_again_whatever_their_shape() -> None:
    allocator = ResourceAllocator(budget_bytes=2**20)
    pool = allocator.device_pool
    first = pool.acquire((10, 30), torch.float32)
    address = first.data_ptr()
    pool.release(first)
    del first
    second = pool.acquire((290,), torch.int32)
    assert second.data_ptr() == address
    assert (second.shape, second.dtype) == ((290,), torch.int32)
    assert pool.hit_rate == 0.5
    with pool.borrow((3,), torch.float16) as other:
        assert other.data_ptr() != address
    assert allocator.get_memory_usage()["pooled_mb"] == 512 / 2**20


def test_idle_buffers_make_way_before_an_allocation_is_refused() -> None:
    allocator = ResourceAllocator(budget_bytes=8192)
    allocator.device_pool.release(allocator.device_pool.acquire((8192,), torch.uint8))
    assert allocator.allocated_bytes == 8192
    assert allocator.allocate_tensor((8192,), torch.uint8).nbytes == 8192
    assert allocator.device_pool.idle_bytes == 0


def test_a_buffer_in_flight_is_not_handed_out() -> None:
    class Event:
        done = False

        def query(self) -> bool:
            return self.done

    pool = BufferPool(lambda size_bytes: torch.empty(size_bytes, dtype=torch.uint8))
    event, buffer = Event(), pool.acquire((4,), torch.float32)
    address = buffer.data_ptr()
    pool.release(buffer, event)
    other = pool.acquire((4,), torch.float32)
    assert other.data_ptr() != address
    event.done = True
    assert pool.acquire((4,), torch.float32).data_ptr() == address


def test_a_pool_keeps_a_bounded_number() -> None:
    pool = BufferPool(lambda size_bytes: torch.empty(size_bytes, dtype=torch.uint8), max_idle=2)
    buffers = [pool.acquire((1000,), torch.uint8) for _ in range(5)]
    for buffer in buffers:
        pool.release(buffer)
    assert pool.idle_bytes == 2048


def test_reset_empties_pools_and_keeps_tensors() -> None:
    allocator = ResourceAllocator(budget_bytes=2**20)
    kept = allocator.allocate_tensor((128,), torch.float32)
    allocator.device_pool.release(allocator.device_pool.acquire((128,), torch.float32))
    allocator.pinned_pool.release(allocator.pinned_pool.acquire((128,), torch.float32))
    allocator.reset()
    usage = allocator.get_memory_usage()
    assert usage["pooled_mb"] == usage["pinned_mb"] == usage["device_pool_hit_rate"] == 0.0
    assert allocator.allocated_bytes == kept.nbytes


class AllocatorMachine(RuleBasedStateMachine):
    """The account always equals what is alive, and never exceeds the budget."""

    BUDGET = 16_384

    def __init__(self) -> None:
        super().__init__()
        self.allocator = ResourceAllocator(budget_bytes=self.BUDGET)
        self.alive: list[torch.Tensor] = []
        self.borrowed: list[torch.Tensor] = []

    def _used(self) -> int:
        return sum(-(-t.untyped_storage().nbytes() // 512) * 512 for t in self.alive + self.borrowed)

    @rule(count=st.integers(0, 3000), dtype=st.sampled_from([torch.uint8, torch.float32]))
    def allocate(self, count: int, dtype: torch.dtype) -> None:
        wanted = -(-count * dtype.itemsize // 512) * 512
        if self._used() + wanted <= self.BUDGET:
            self.alive.append(self.allocator.allocate_tensor((count,), dtype))
        else:
            with pytest.raises(MemoryBudgetError):
                self.allocator.allocate_tensor((count,), dtype)

    @rule(position=st.integers(0, 50))
    def free(self, position: int) -> None:
        if self.alive:
            self.alive.pop(position % len(self.alive))

    @rule(position=st.integers(0, 50))
    def replace_by_view(self, position: int) -> None:
        if self.alive:
            self.alive[position % len(self.alive)] = self.alive[position % len(self.alive)][:1]

    @rule(count=st.integers(1, 3000))
    def borrow(self, count: int) -> None:
        try:
            self.borrowed.append(self.allocator.device_pool.acquire((count,), torch.uint8))
        except MemoryBudgetError:
            assert self._used() + max(512, 1 << (count - 1).bit_length()) > self.BUDGET

    @rule()
    def give_back(self) -> None:
        if self.borrowed:
            self.allocator.device_pool.release(self.borrowed.pop())

    @invariant()
    def adds_up(self) -> None:
        used = self.allocator.allocated_bytes
        assert used == self._used() + self.allocator.device_pool.idle_bytes
        assert used <= self.BUDGET


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = examples(40, stateful_step_count=30)
