"""Tensor parallelism for any module: plan, verify, apply, load."""

from lightning_gpuorch.parallel.tensor_parallel.anatomy import ModelCall
from lightning_gpuorch.parallel.tensor_parallel.apply import applied_plan, apply_plan
from lightning_gpuorch.parallel.tensor_parallel.checkpoint import open_checkpoint
from lightning_gpuorch.parallel.tensor_parallel.checkpoint_base import Checkpoint
from lightning_gpuorch.parallel.tensor_parallel.communicator import Communicator
from lightning_gpuorch.parallel.tensor_parallel.example_input import cut_small, find_example_input
from lightning_gpuorch.parallel.tensor_parallel.generation import (
    from_first_rank,
    generate,
    random_state_digest,
    synchronize_random_state,
)
from lightning_gpuorch.parallel.tensor_parallel.loading import LoadReport, load_sharded
from lightning_gpuorch.parallel.tensor_parallel.meta import empty_parameters
from lightning_gpuorch.parallel.tensor_parallel.model_report import build_model, model_report
from lightning_gpuorch.parallel.tensor_parallel.plan import (
    AttributePatch,
    LayerKind,
    LayerPlan,
    ParameterPlan,
    ShapeRule,
    TensorParallelPlan,
)
from lightning_gpuorch.parallel.tensor_parallel.plan_cache import PlanCache, plan_on_first_rank
from lightning_gpuorch.parallel.tensor_parallel.planning import plan_tensor_parallel
from lightning_gpuorch.parallel.tensor_parallel.runtime_check import (
    FirstBatchCheck,
    check_first_batch,
    check_outputs_agree,
)
from lightning_gpuorch.parallel.tensor_parallel.sizing import SizeChoice, smallest_tensor_parallel_size
from lightning_gpuorch.parallel.tensor_parallel.verify import VerificationFailure, VerificationReport, verify_plan

__all__ = [
    "AttributePatch",
    "Checkpoint",
    "Communicator",
    "FirstBatchCheck",
    "LayerKind",
    "LayerPlan",
    "LoadReport",
    "ModelCall",
    "ParameterPlan",
    "PlanCache",
    "ShapeRule",
    "SizeChoice",
    "TensorParallelPlan",
    "VerificationFailure",
    "VerificationReport",
    "applied_plan",
    "apply_plan",
    "build_model",
    "check_first_batch",
    "check_outputs_agree",
    "cut_small",
    "empty_parameters",
    "find_example_input",
    "from_first_rank",
    "generate",
    "load_sharded",
    "model_report",
    "open_checkpoint",
    "plan_on_first_rank",
    "plan_tensor_parallel",
    "random_state_digest",
    "smallest_tensor_parallel_size",
    "synchronize_random_state",
    "verify_plan",
]
