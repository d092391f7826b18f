"""Plans that a model publishes itself: transformers' ``_tp_plan``, read as the dictionary it is.

Only the public mapping from module patterns to style names is read; none of transformers' tensor-parallel code runs,
which changes from release to release. Styles this file does not know make it give up, and the model is probed
instead.
"""

from __future__ import annotations

from torch import nn

from lightning_gpuorch.parallel.tensor_parallel.anatomy import Anatomy
from lightning_gpuorch.parallel.tensor_parallel.assemble import Decisions
from lightning_gpuorch.parallel.tensor_parallel.intervals import split_aligned
from lightning_gpuorch.parallel.tensor_parallel.layers import features
from lightning_gpuorch.parallel.tensor_parallel.plan import LayerKind, LayerPlan, generic_name

_LINEAR_STYLES = {
    "colwise": LayerKind.COLUMN,
    "colwise_gather_output": LayerKind.COLUMN_GATHER,
    "colwise_rep": LayerKind.COLUMN_GATHER,
    "rowwise": LayerKind.ROW,
    "rowwise_split_input": LayerKind.ROW_SPLIT,
    "rowwise_rep": LayerKind.ROW_SPLIT,
}
_WHOLE_STYLES = frozenset({"replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params"})
_EXPERT_STYLES = frozenset({"moe_tp_experts", "packed_colwise", "packed_rowwise", "grouped_gemm", "all_reduce"})


def published_plan(model: nn.Module) -> dict[str, str]:
    """Give a model's published plan, empty if it has none."""
    plan = getattr(model, "_tp_plan", None)
    return dict(plan) if isinstance(plan, dict) else {}


def published_decisions(anatomy: Anatomy, num_ranks: int) -> Decisions | None:
    """Translate a model's published plan; None if there is none or it holds a style this file does not know.

    Fused experts are left to their handler: the published styles do not say how gate and up are packed.
    """
    styles = {generic_name(pattern): style for pattern, style in published_plan(anatomy.model).items()}
    if not styles:
        return None
    decisions = Decisions()
    for module in anatomy.linears:
        style = styles.get(generic_name(anatomy.names[module]))
        if style is None or style in _WHOLE_STYLES or style in _EXPERT_STYLES:
            continue
        kind = _LINEAR_STYLES.get(style)
        rows, columns = features(module)
        cut_size = columns if kind in (LayerKind.COLUMN, LayerKind.COLUMN_GATHER) else rows
        if kind is None or cut_size < num_ranks:
            return None
        decisions.roles[module] = LayerPlan(kind, split_aligned(cut_size, num_ranks), source="published")
    return decisions if decisions.roles else None
