"""Turns roles of layers into a whole plan: every parameter gets its cut, ties agree, what is left is gathered."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from lightning_gpuorch.parallel.tensor_parallel.anatomy import Anatomy, layer_parameters
from lightning_gpuorch.parallel.tensor_parallel.attention import plan_attention
from lightning_gpuorch.parallel.tensor_parallel.intervals import split_aligned
from lightning_gpuorch.parallel.tensor_parallel.layers import features
from lightning_gpuorch.parallel.tensor_parallel.plan import (
    AttributePatch,
    LayerKind,
    LayerPlan,
    ParameterPlan,
    ShapeRule,
    TensorParallelPlan,
    dtype_name,
)

MIN_GATHER_ELEMENTS = 1 << 12
"""Weights with fewer elements are not worth an all-gather: they stay whole."""


@dataclasses.dataclass
class Decisions:
    """What was decided about a model, before it is written as a plan.

    Attributes:
        roles: Roles of layers; layers not listed get :func:`independent_role`.
        tensors: Cuts of parameters and buffers outside the layers, by name.
        expert_cuts: Cuts of fused experts' weights, by qualified name.
        attributes: Attribute patches.
        shape_rules: Rules by scope.
        notes: For people.
    """

    roles: dict[nn.Module, LayerPlan] = dataclasses.field(default_factory=dict)
    tensors: dict[str, ParameterPlan] = dataclasses.field(default_factory=dict)
    expert_cuts: dict[str, ParameterPlan] = dataclasses.field(default_factory=dict)
    attributes: list[AttributePatch] = dataclasses.field(default_factory=list)
    shape_rules: dict[str, tuple[ShapeRule, ...]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def independent_role(module: nn.Module, num_ranks: int, reason: str = "") -> LayerPlan:
    """Give a layer a role that is right wherever it stands: gathered, by vocabulary, or whole if it is small.

    Args:
        module: A Linear, Conv1D or Embedding.
        num_ranks: Number of ranks.
        reason: Why the layer has no better role.
    """
    rows, columns = features(module)
    elements = rows * columns
    if isinstance(module, nn.Embedding):
        if elements >= 4 * MIN_GATHER_ELEMENTS and rows >= num_ranks:
            return LayerPlan(LayerKind.VOCABULARY, split_aligned(rows, num_ranks))
    elif elements >= MIN_GATHER_ELEMENTS and columns >= num_ranks:
        return LayerPlan(LayerKind.COLUMN_GATHER, split_aligned(columns, num_ranks), reason, "fallback")
    return LayerPlan(LayerKind.REPLICATED, reason="small", source="fallback")


def replicated(reason: str) -> LayerPlan:
    """Give the role of a layer that stays whole."""
    return LayerPlan(LayerKind.REPLICATED, reason=reason, source="fallback")


def assemble(anatomy: Anatomy, decisions: Decisions, num_ranks: int) -> TensorParallelPlan:
    """Write decisions as a plan."""
    roles = dict(decisions.roles)
    for module in (*anatomy.linears, *anatomy.embeddings):
        roles.setdefault(module, independent_role(module, num_ranks))
    _settle_ties(anatomy, roles)
    parameters = {
        name: ParameterPlan(tuple(value.shape), dtype_name(value.dtype))
        for name, value in anatomy.model.named_parameters(remove_duplicate=False)
    }
    layers: dict[str, LayerPlan] = {}
    for module, name in anatomy.names.items():
        prefix = f"{name}." if name else ""
        if module in anatomy.attentions:
            role, cuts = plan_attention(module, num_ranks)
            layers[name] = decisions.roles.get(module, role)
            if layers[name].kind is not LayerKind.REPLICATED:
                parameters.update({prefix + key: cut for key, cut in cuts.items()})
        elif module in anatomy.experts:
            layers[name] = roles.get(module, replicated("no cut of these experts passed the check"))
        elif module in roles:
            layers[name] = roles[module]
            parameters.update({prefix + key: cut for key, cut in layer_parameters(module, roles[module]).items()})
    parameters.update(decisions.expert_cuts)
    parameters.update(decisions.tensors)
    parameters = _spread_ties(anatomy, parameters)
    return TensorParallelPlan(
        num_ranks,
        layers,
        parameters,
        tuple(decisions.attributes),
        dict(decisions.shape_rules),
        anatomy.ties,
        tuple(decisions.notes),
    )


def _settle_ties(anatomy: Anatomy, roles: dict[nn.Module, LayerPlan]) -> None:
    """Layers that share a weight must cut it alike; where their roles differ in that, the weight stays whole."""
    users: dict[int, list[nn.Module]] = defaultdict(list)
    for module, role in roles.items():
        for parameter in module._parameters.values():
            if parameter is not None and role.kind is not LayerKind.LOCAL:
                users[id(parameter)].append(module)
    changed = True
    while changed:
        changed = False
        for identity, modules in users.items():
            cuts = {_cut_of(module, roles[module], identity) for module in modules}
            if len(cuts) > 1:
                changed = True
                for module in modules:
                    roles[module] = replicated("shares a weight with layers that would cut it differently")


def _cut_of(module: nn.Module, role: LayerPlan, identity: int) -> tuple[object, ...]:
    if role.kind is LayerKind.EXPERTS:
        return ()
    plans = layer_parameters(module, role)
    return tuple(
        (plans[name].dim, plans[name].intervals)
        for name, value in module._parameters.items()
        if id(value) == identity and name in plans
    )[:1]


def _spread_ties(anatomy: Anatomy, parameters: Mapping[str, ParameterPlan]) -> dict[str, ParameterPlan]:
    result = dict(parameters)
    for names in anatomy.ties:
        cut = next((parameters[name] for name in names if parameters[name].dim is not None), None)
        if cut is not None:
            result.update(dict.fromkeys(names, cut))
    return result
