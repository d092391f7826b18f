"""Several ranks on one GPU, so that one is enough to test a job: ``Trainer(accelerator=TrainerSharedGPU(), devices=2)``.

NCCL refuses two ranks on one device, which it tells by host and bus id. ``NCCL_HOSTID`` makes it take the ranks for
several hosts; they speak over sockets on the loopback interface then. Give each rank a part of the memory with
``memory_fraction``.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.fabric.accelerators.cuda import CUDAAccelerator as FabricCUDA
from lightning.pytorch.accelerators.cuda import CUDAAccelerator as TrainerCUDA

NCCL_SETTINGS = {
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_NET": "Socket",
    "NCCL_IB_DISABLE": "1",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
}


def share_gpu(rank: int) -> None:
    """Let NCCL take this process for one on another host; before its first use of NCCL.

    Args:
        rank: Tells the processes apart.
    """
    os.environ.update(NCCL_SETTINGS, NCCL_HOSTID=f"rank{rank}")


class _SharedGPU:
    def __init__(self) -> None:
        share_gpu(int(os.environ.get("RANK", "0")))

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return list(range(int(devices)))

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("cuda", 0) for _ in devices]


class TrainerSharedGPU(_SharedGPU, TrainerCUDA):
    """All ranks of a Trainer on the first GPU."""


class FabricSharedGPU(_SharedGPU, FabricCUDA):
    """All ranks of Fabric on the first GPU."""
