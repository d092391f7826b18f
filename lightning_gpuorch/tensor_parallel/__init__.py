"""Tensor parallelism for any module: plan, verify, apply, load."""

from lightning_gpuorch.tensor_parallel.apply import applied_plan, apply_plan
from lightning_gpuorch.tensor_parallel.communicator import Communicator
from lightning_gpuorch.tensor_parallel.plan import (
    AttributePatch,
    LayerKind,
    LayerPlan,
    ParameterPlan,
    ShapeRule,
    TensorParallelPlan,
)
from lightning_gpuorch.tensor_parallel.planning import plan_tensor_parallel
from lightning_gpuorch.tensor_parallel.verify import VerificationFailure, VerificationReport, verify_plan

__all__ = [
    "AttributePatch",
    "Communicator",
    "LayerKind",
    "LayerPlan",
    "ParameterPlan",
    "ShapeRule",
    "TensorParallelPlan",
    "VerificationFailure",
    "VerificationReport",
    "applied_plan",
    "apply_plan",
    "plan_tensor_parallel",
    "verify_plan",
]
