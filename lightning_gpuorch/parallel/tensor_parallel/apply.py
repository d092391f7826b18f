"""Applies a plan to a model: weights are cut, classes swapped, attributes patched; in place, all or nothing."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.attention import HeadShardedAttention
from lightning_gpuorch.parallel.tensor_parallel.communicator import Communicator
from lightning_gpuorch.parallel.tensor_parallel.experts import swap_experts
from lightning_gpuorch.parallel.tensor_parallel.layers import behaviour_for, has_own_forward
from lightning_gpuorch.parallel.tensor_parallel.plan import (
    AttributePatch,
    LayerKind,
    TensorParallelPlan,
    local_parameter,
)
from lightning_gpuorch.parallel.tensor_parallel.shape_rules import swap_shape_ruled
from lightning_gpuorch.parallel.tensor_parallel.swap import swap_class

UNCHANGED_KINDS = frozenset({LayerKind.REPLICATED, LayerKind.LOCAL})
"""Kinds of layers whose class stays as it is."""

_applied: weakref.WeakKeyDictionary[nn.Module, tuple[TensorParallelPlan, Communicator]] = weakref.WeakKeyDictionary()


def apply_plan(
    model: nn.Module,
    plan: TensorParallelPlan,
    rank: int,
    process_group: dist.ProcessGroup | Communicator | None = None,
) -> None:
    """Turn a model into one rank's part of it, in place.

    Parameters on meta stay there, cut to their local shapes; :func:`load_sharded` then reads them. Parameters with
    values are cut in memory and the rest is freed. All parameters stop requiring gradients.

    Args:
        model: The whole model.
        plan: Its plan.
        rank: This process's rank in the group.
        process_group: The tensor-parallel group, or a communicator on it; None for the default group.

    Raises:
        TensorParallelError: If the plan does not belong to this model or group, or the model is sharded already. The
            model is unchanged then.
    """
    if model in _applied:
        raise TensorParallelError("This model is sharded already; a plan is applied to a whole model, once.")
    if not 0 <= rank < plan.tensor_parallel_size:
        raise TensorParallelError(f"Rank {rank} does not exist in a plan for {plan.tensor_parallel_size} ranks.")
    problems = mismatches(model, plan)
    if problems:
        listed = "\n  ".join(problems[:12]) + (f"\n  and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise TensorParallelError(f"The tensor-parallel plan does not fit this model:\n  {listed}")
    communicator = process_group if isinstance(process_group, Communicator) else Communicator(process_group)
    if (communicator.rank, communicator.size) != (rank, plan.tensor_parallel_size):
        raise TensorParallelError(
            f"The plan is for {plan.tensor_parallel_size} ranks and is applied on rank {rank}, but the process "
            "group has "
            f"{communicator.size} ranks and this process is rank {communicator.rank} in it."
        )
    modules = dict(model.named_modules())
    _cut_tensors(model, plan, rank)
    for name, layer in plan.layers.items():
        swap_layer(modules[name], layer.kind)
        if layer.kind not in UNCHANGED_KINDS:
            modules[name].bind(layer, communicator)
    for patch in plan.attributes:
        set_attribute(modules[patch.module], patch.attribute, patch.values[rank])
    for module in modules.values():
        _leave_fused_kernels(module)
    for scope, rules in plan.shape_rules.items():
        swap_shape_ruled(modules[scope], rules, rank)
    _applied[model] = (plan, communicator)


def applied_plan(model: nn.Module) -> tuple[TensorParallelPlan, int] | None:
    """Give the plan a model was sharded with and the rank it is, None for a whole model."""
    applied = _applied.get(model)
    return None if applied is None else (applied[0], applied[1].rank)


def communicator_of(model: nn.Module) -> Communicator | None:
    """Give the communicator of the ranks that share a model, None for a whole one.

    The model itself need not be what the plan was applied to: it may hold it, or be a part of it.
    """
    if model in _applied:
        return _applied[model][1]
    for module in model.modules():
        communicator = _applied[module][1] if module in _applied else getattr(module, "communicator", None)
        if isinstance(communicator, Communicator):
            return communicator
    return None


def swap_layer(module: nn.Module, kind: LayerKind) -> None:
    """Give a layer the class of its kind, in place."""
    if kind in UNCHANGED_KINDS:
        return
    if kind is LayerKind.HEADS:
        swap_class(module, HeadShardedAttention)
    elif kind is LayerKind.EXPERTS:
        swap_experts(module)
    else:
        behaviour = behaviour_for(module, kind)
        assert behaviour is not None  # checked by mismatches()
        swap_class(module, behaviour, inside=has_own_forward(module))


def _leave_fused_kernels(module: nn.Module) -> None:
    """Switch off the fused kernels of torch's encoder layers: they read the layers' weights and skip their forwards."""
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0
    elif isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False


def _cut_tensors(model: nn.Module, plan: TensorParallelPlan, rank: int) -> None:
    """Cut parameters and buffers; tensors that are one before are one after.

    A model that several ranks share serves inference only; one that a rank has for itself may be trained.
    """
    trains = plan.tensor_parallel_size == 1
    local: dict[int, torch.Tensor] = {}
    keep_ids_unique: list[torch.Tensor] = []
    for prefix, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for key, value in own.items():
                if value is None:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                if id(value) in local:
                    own[key] = local[id(value)]
                    continue
                keep_ids_unique.append(value)
                piece = local_parameter(value, plan.parameters[name], rank) if name in plan.parameters else value
                if own is module._parameters:
                    piece = nn.Parameter(piece.detach(), requires_grad=trains and value.requires_grad)
                local[id(value)] = own[key] = piece


def set_attribute(module: nn.Module, attribute: str, value: Any) -> None:
    """Set an attribute, or a field of a copy of the object it names (``config.num_heads``)."""
    holder, _, field = attribute.rpartition(".")
    if not holder:
        setattr(module, field, value)
        return
    owned = copy.copy(getattr(module, holder))
    owned.__dict__[field] = value
    module.__dict__[holder] = owned


def get_attribute(module: nn.Module, attribute: str) -> Any:
    """Read what :func:`set_attribute` sets; None if there is no such attribute."""
    value: Any = module
    for part in attribute.split("."):
        value = getattr(value, part, None)
    return value


def mismatches(model: nn.Module, plan: TensorParallelPlan) -> list[str]:
    """List what keeps a plan from fitting a whole model: unknown names, other shapes, kinds a layer cannot have."""
    modules = dict(model.named_modules())
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    problems = [f"{name} is not planned for" for name in tensors if name not in plan.parameters]
    tensors.update(model.named_buffers(remove_duplicate=False))
    for name, parameter in plan.parameters.items():
        if name not in tensors:
            problems.append(f"{name} does not exist in the model")
        elif tuple(tensors[name].shape) != parameter.shape:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)}, the plan is for {parameter.shape}")
        elif parameter.dim is not None and len(parameter.intervals) != plan.tensor_parallel_size:
            problems.append(f"{name} is cut for {len(parameter.intervals)} ranks, not {plan.tensor_parallel_size}")
        elif parameter.dim is not None and not all(parameter.intervals):
            problems.append(f"{name} has a rank that keeps nothing of it")
        elif any(stop > parameter.shape[parameter.dim or 0] for own in parameter.intervals for _, stop in own):
            problems.append(f"{name} is cut beyond its size {parameter.shape}")
    for name, layer in plan.layers.items():
        if name not in modules:
            problems.append(f"layer {name} does not exist in the model")
        elif not _can_be(modules[name], layer.kind):
            problems.append(f"{name}, a {type(modules[name]).__name__}, cannot be {layer.kind.value}")
    problems.extend(_patch_problem(modules, patch) for patch in plan.attributes if _patch_problem(modules, patch))
    problems.extend(f"module {scope} does not exist in the model" for scope in plan.shape_rules if scope not in modules)
    changed = [*plan.shape_rules, *(name for name, layer in plan.layers.items() if layer.kind not in UNCHANGED_KINDS)]
    problems.extend(
        f"{name} has a forward of its own on the instance, which would hide the sharded one"
        for name in changed
        if name in modules and "forward" in modules[name].__dict__
    )
    return problems


def _patch_problem(modules: Mapping[str, nn.Module], patch: AttributePatch) -> str:
    if patch.module not in modules:
        return f"module {patch.module} does not exist in the model"
    if get_attribute(modules[patch.module], patch.attribute) is None:
        return f"{patch.module} has no attribute {patch.attribute}"
    return ""


def _can_be(module: nn.Module, kind: LayerKind) -> bool:
    if kind in UNCHANGED_KINDS or kind is LayerKind.EXPERTS:
        return True
    if kind is LayerKind.HEADS:
        return type(module) is nn.MultiheadAttention
    return behaviour_for(module, kind) is not None
