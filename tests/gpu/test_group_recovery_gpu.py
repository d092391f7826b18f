"""Recovery inside a tensor-parallel group on NCCL: two ranks on one GPU.

NCCL refuses two ranks on one device by comparing host and bus id; ``NCCL_HOSTID`` makes it take the ranks for two hosts.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_gpuorch.distributed import ControlServer, ProcessGroupManager, RemoteChannel
from lightning_gpuorch.errors import GroupOutOfMemoryError
from lightning_gpuorch.group_recovery import GroupRecovery
from lightning_gpuorch.head import Head

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

TWO_RANKS_ON_ONE_GPU = {
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_NET": "Socket",
    "NCCL_IB_DISABLE": "1",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
}
DEVICE = torch.device("cuda", 0)
SIZE, WIDTH, LAYERS, ATTEMPTS, FAULTS = 2, 256, 4, 60, 20


def _rank(rank: int, address: str, port: int, how: str, way: str, end: Connection) -> None:
    try:
        os.environ.update(TWO_RANKS_ON_ONE_GPU, NCCL_HOSTID=f"r{rank}")
        torch.cuda.set_per_process_memory_fraction(0.4, DEVICE)
        manager = ProcessGroupManager("nccl", 30.0, DEVICE, recoverable=True)
        manager.initialize(rank, SIZE, store=manager.create_store("127.0.0.1", port, False, SIZE), is_replica=True)
        group: Any = manager.device_mesh(1, SIZE).get_group("tensor_parallel")
        channel = RemoteChannel(address, "secret")
        owner = {"replica": 0, "generation": 0, "rank": rank}
        recovery = GroupRecovery(
            channel, owner, rank, SIZE, group, 30.0, reconnect_seconds={"drain": math.inf, "abort": 0.0}[way]
        )
        end.send((_work(rank, recovery, group, how), None))
        recovery.close()
        group.wait_until_released(60)
        manager.finalize()
        channel.close()
    except BaseException:  # noqa: BLE001 - handed to the test
        end.send((None, traceback.format_exc()))


def _work(rank: int, recovery: GroupRecovery, group: Any, how: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(WIDTH, WIDTH, generator=generator).div(WIDTH).to(DEVICE) for _ in range(LAYERS)]
    seconds, ooms, outputs = [], 0, []
    recovery.on_recovery = lambda one: seconds.append(one.seconds)
    memory = []

    def run(number: int, fault: bool) -> torch.Tensor:
        x = torch.full((64, WIDTH), 1.0 + number, device=DEVICE)
        for layer, weight in enumerate(weights):
            x = x @ weight
            if fault and layer == number % LAYERS:
                if how == "injected":
                    raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
                torch.empty(10**15, dtype=torch.uint8, device=DEVICE)
            dist.all_reduce(x, group=group)
        return x

    for number in range(ATTEMPTS):
        faulty = number % (ATTEMPTS // FAULTS) == 0 and (number // 3) % SIZE == rank
        try:
            inputs = torch.empty(64, WIDTH, device="meta")
            output = recovery.attempt(lambda: run(number, faulty), inputs)  # noqa: B023 - called at once
        except GroupOutOfMemoryError:
            ooms += 1
            output = recovery.attempt(lambda: run(number, False), inputs)  # noqa: B023
        outputs.append(output.cpu())
        memory.append(torch.cuda.memory_allocated(DEVICE))
    expected = [recovery.attempt(lambda: run(number, False)).cpu() for number in range(ATTEMPTS)]  # noqa: B023
    return {
        "ooms": ooms,
        "drained": recovery.num_drains,
        "epoch": recovery.epochs.number,
        "equal": sum(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True)),
        "seconds": sorted(seconds),
        "memory_growth_bytes": memory[-1] - memory[ATTEMPTS // 2],
    }


@pytest.mark.timeout(400)
@pytest.mark.parametrize("way", ["drain", "abort"])
@pytest.mark.parametrize("how", ["injected", "real"])
def test_out_of_memory_on_one_rank_is_mended_in_place(how: str, way: str) -> None:
    context = multiprocessing.get_context("spawn")
    server = ControlServer(Head(SIZE), token="secret")
    store = dist.TCPStore("127.0.0.1", 0, SIZE, is_master=True, wait_for_workers=False)
    processes, ends = [], []
    try:
        for rank in range(SIZE):
            here, there = context.Pipe()
            processes.append(
                context.Process(target=_rank, args=(rank, server.address, store.port, how, way, there), daemon=True)
            )
            processes[-1].start()
            there.close()
            ends.append(here)
        drained = 0
        for rank, end in enumerate(ends):
            assert end.poll(300), f"rank {rank} hangs"
            result, error = end.recv()
            assert error is None, error
            drained += result["drained"]
            assert result["epoch"] <= 3 if way == "drain" else result["epoch"] == FAULTS
            print(f"rank {rank}: seconds from the error to ready: {result['seconds']}")
            assert result["ooms"] == FAULTS
            assert result["equal"] == ATTEMPTS
            assert result["memory_growth_bytes"] < 2**20
        assert drained >= FAULTS - 3 if way == "drain" else drained == 0, "the first ones know too little to drain"
    finally:
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join(10)
        server.close()
