"""The budget and the halving on a real device."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from lightning_gpuorch.devices.memory import ResourceAllocator, memory_summary, total_memory_bytes
from lightning_gpuorch.errors import MemoryBudgetError
from lightning_gpuorch.worker.oom.detection import is_out_of_memory
from lightning_gpuorch.worker.oom.halving import BatchHalver

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

DEVICE = torch.device("cuda", 0)
GIB = 2**30


@pytest.fixture(autouse=True)
def whole_device() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


class Hungry(torch.nn.Module):
    """Makes 64 MiB of activations per sample."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x[:, :1].expand(-1, 16 * 2**20) + 0.0  # 64 MiB per sample
        return wide[:, :4].clone() + x[:, :4]


def test_the_cap_holds_for_the_whole_process() -> None:
    ResourceAllocator(DEVICE, budget_bytes=GIB)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2 * GIB, dtype=torch.uint8, device=DEVICE)
    assert is_out_of_memory(caught.value)


def test_the_reserve_is_taken_off_the_share() -> None:
    total = total_memory_bytes(DEVICE)
    allocator = ResourceAllocator(DEVICE, 0.5)
    assert int(total * 0.5) - total // 20 <= allocator.budget_bytes < int(total * 0.5)


def test_allocations_are_checked_and_frees_are_seen() -> None:
    allocator = ResourceAllocator(DEVICE, budget_bytes=GIB)
    tensor = allocator.allocate_tensor((GIB // 2,), torch.uint8)
    with pytest.raises(MemoryBudgetError, match="too few"):
        allocator.allocate_tensor((GIB,), torch.uint8)
    usage = allocator.get_memory_usage()
    assert usage["allocated_mb"] >= 512
    assert usage["reserved_mb"] >= usage["allocated_mb"]
    assert usage["outside_allocator_mb"] > 0  # the context at least
    assert 0 <= usage["fragmentation"] < 1
    del tensor
    assert allocator.get_memory_usage()["allocated_mb"] < usage["allocated_mb"]


def test_pinned_buffers_wait_for_their_copies() -> None:
    allocator = ResourceAllocator(DEVICE, budget_bytes=4 * GIB)
    buffer = allocator.pinned_pool.acquire((256 * 2**20,), torch.uint8)
    assert buffer.is_pinned()
    target = torch.empty(buffer.shape, dtype=torch.uint8, device=DEVICE)
    torch.cuda._sleep(200_000_000)
    target.copy_(buffer, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    address = buffer.data_ptr()
    allocator.pinned_pool.release(buffer, event)
    other = allocator.pinned_pool.acquire((256 * 2**20,), torch.uint8)
    assert other.data_ptr() != address
    event.synchronize()
    assert allocator.pinned_pool.acquire((256 * 2**20,), torch.uint8).data_ptr() == address


def test_halving_with_real_errors_equals_the_undisturbed_step() -> None:
    model = Hungry().to(DEVICE)
    batch = torch.arange(64 * 8, dtype=torch.float32, device=DEVICE).view(64, 8)
    with torch.inference_mode():
        expected = model(batch)
        torch.cuda.empty_cache()
        ResourceAllocator(DEVICE, budget_bytes=torch.cuda.memory_allocated(DEVICE) + GIB + GIB // 2)
        halver = BatchHalver(describe_memory=lambda: memory_summary(DEVICE))
        for _ in range(30):
            output = halver.run(model, batch, size=64)
            assert output.device == DEVICE
            assert torch.equal(output, expected)
    assert 1 <= halver.num_ooms <= 8
    assert torch.cuda.memory_allocated(DEVICE) < 2**20 * 64


def test_outputs_that_fill_the_device_move_to_the_host() -> None:
    def step(batch: torch.Tensor) -> torch.Tensor:
        scratch = batch[:, :1].expand(-1, 16 * 2**20) + 0.0  # 64 MiB per sample, gone afterwards
        return scratch.to(torch.float16)  # 32 MiB per sample, kept

    batch = torch.arange(16.0, device=DEVICE).view(16, 1)
    torch.cuda.empty_cache()
    # All outputs together take 512 MiB; with them on the device no step of two samples fits.
    ResourceAllocator(DEVICE, budget_bytes=torch.cuda.memory_allocated(DEVICE) + 600 * 2**20)
    halver = BatchHalver()
    output = halver.run(step, batch, size=16)
    assert output.shape == (16, 16 * 2**20)
    assert torch.equal(output[:, 0].float().cpu(), batch[:, 0].cpu())
    assert halver.num_lost == 0


def test_memory_taken_by_another_process_is_survived() -> None:
    free, _ = torch.cuda.mem_get_info(DEVICE)
    take = free - 3 * GIB
    hog = (
        "import torch,sys; x=torch.empty(int(sys.argv[1]),dtype=torch.uint8,device='cuda');"
        "torch.cuda.synchronize(); print('ready',flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hog, str(take)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        batch = torch.arange(64 * 8, dtype=torch.float32, device=DEVICE).view(64, 8)
        halver = BatchHalver()
        with torch.inference_mode():
            output = halver.run(Hungry().to(DEVICE), batch, size=64)  # 4 GiB of activations, about 2.5 are left
        assert torch.equal(output, batch[:, :1] + batch[:, :4])
        assert halver.num_ooms >= 1
    finally:
        process.communicate(timeout=60)
