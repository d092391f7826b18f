"""Multi-GPU inference orchestration for PyTorch Lightning and Fabric.

Importing this package registers ``strategy="gpuorch"`` with Fabric and Trainer. Everything else is imported when it is
first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_gpuorch import _register
from lightning_gpuorch._version import __version__

if TYPE_CHECKING:
    from lightning_gpuorch.config import OrchestratorConfig
    from lightning_gpuorch.distributed import ProcessGroupManager
    from lightning_gpuorch.fabric import GPUOrchStrategy
    from lightning_gpuorch.memory import ResourceAllocator
    from lightning_gpuorch.orchestrator import MultiGPUOrchestrator
    from lightning_gpuorch.predictions import read_predictions
    from lightning_gpuorch.recovery import FailureRecoveryManager
    from lightning_gpuorch.tensor_parallel import TensorParallelPlan, plan_tensor_parallel

_HOMES = {
    "FailureRecoveryManager": "lightning_gpuorch.recovery",
    "GPUOrchStrategy": "lightning_gpuorch.fabric",
    "MultiGPUOrchestrator": "lightning_gpuorch.orchestrator",
    "OrchestratorConfig": "lightning_gpuorch.config",
    "ProcessGroupManager": "lightning_gpuorch.distributed",
    "ResourceAllocator": "lightning_gpuorch.memory",
    "TensorParallelPlan": "lightning_gpuorch.tensor_parallel",
    "plan_tensor_parallel": "lightning_gpuorch.tensor_parallel",
    "read_predictions": "lightning_gpuorch.predictions",
}

__all__ = [
    "FailureRecoveryManager",
    "GPUOrchStrategy",
    "MultiGPUOrchestrator",
    "OrchestratorConfig",
    "ProcessGroupManager",
    "ResourceAllocator",
    "TensorParallelPlan",
    "__version__",
    "plan_tensor_parallel",
    "read_predictions",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


_register.register()
