"""Multi-GPU inference orchestration for PyTorch Lightning and Fabric.

Importing this package registers ``strategy="gpuorch"`` with Fabric and Trainer. Everything else is imported when it is
first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gpuorch._lazy import lazy_exports
from lightning_gpuorch._version import __version__
from lightning_gpuorch.strategies import registry

if TYPE_CHECKING:
    from lightning_gpuorch.config import OrchestratorConfig
    from lightning_gpuorch.devices.memory import ResourceAllocator
    from lightning_gpuorch.fabric import GPUOrchStrategy
    from lightning_gpuorch.parallel.groups.process_group import ProcessGroupManager
    from lightning_gpuorch.parallel.tensor_parallel import TensorParallelPlan, plan_tensor_parallel
    from lightning_gpuorch.predictions import read_predictions
    from lightning_gpuorch.predictions.loading.shards.files import ArrowShards, FileShards
    from lightning_gpuorch.predictions.loading.shards.protocol import ShardedDataset, ShardedSource
    from lightning_gpuorch.supervisor.restart_policy import FailureRecoveryManager
    from lightning_gpuorch.worker.orchestrator import MultiGPUOrchestrator

_HOMES = {
    "ArrowShards": "predictions.loading.shards.files",
    "FailureRecoveryManager": "supervisor.restart_policy",
    "FileShards": "predictions.loading.shards.files",
    "GPUOrchStrategy": "fabric",
    "MultiGPUOrchestrator": "worker.orchestrator",
    "OrchestratorConfig": "config",
    "ProcessGroupManager": "parallel.groups.process_group",
    "ResourceAllocator": "devices.memory",
    "ShardedDataset": "predictions.loading.shards.protocol",
    "ShardedSource": "predictions.loading.shards.protocol",
    "TensorParallelPlan": "parallel.tensor_parallel",
    "plan_tensor_parallel": "parallel.tensor_parallel",
    "read_predictions": "predictions",
}

__all__ = [
    "ArrowShards",
    "FailureRecoveryManager",
    "FileShards",
    "GPUOrchStrategy",
    "MultiGPUOrchestrator",
    "OrchestratorConfig",
    "ProcessGroupManager",
    "ResourceAllocator",
    "ShardedDataset",
    "ShardedSource",
    "TensorParallelPlan",
    "__version__",
    "plan_tensor_parallel",
    "read_predictions",
]


__getattr__ = lazy_exports(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


registry.register()
