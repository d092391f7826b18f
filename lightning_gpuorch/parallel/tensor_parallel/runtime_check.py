"""Does the sharded model compute what the whole one does, with its real weights on real data? One block is asked.

The plan was verified without weights. What remains are things only a real run shows: a kernel that misbehaves on a
local shape, a checkpoint read into the wrong place, ranks with different weights or inputs. On the first batch, the
first cut block is computed a second time, unsharded: its weights are gathered from the ranks, its classes and
attributes put back.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any

import torch
from torch import nn

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.apply import applied_plan, set_attribute
from lightning_gpuorch.parallel.tensor_parallel.communicator import Communicator
from lightning_gpuorch.parallel.tensor_parallel.generation import group_of
from lightning_gpuorch.parallel.tensor_parallel.intervals import indices_of
from lightning_gpuorch.parallel.tensor_parallel.plan import LayerKind, ParameterPlan, TensorParallelPlan
from lightning_gpuorch.parallel.tensor_parallel.values import snapshot, tensors_within

logger = logging.getLogger(__name__)

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest accepted difference relative to the largest value, by the block's dtype: sums are taken in another order."""


@dataclasses.dataclass
class FirstBatchCheck:
    """A check that waits for its block's first call.

    Attributes:
        block: Name of the block that is checked.
        error: Largest relative difference over all ranks, None until the block was called.
    """

    block: str
    error: float | None = None
    _handles: list[Any] = dataclasses.field(default_factory=list)

    @property
    def pending(self) -> bool:
        """Whether the block has not been called yet."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take the check off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def check_first_batch(model: nn.Module) -> FirstBatchCheck | None:
    """Check a sharded model's first cut block when it is first called; every rank of the group does the same.

    The block's call is a collective operation then. It raises :class:`TensorParallelError` on every rank if any rank
    finds a difference. A call that ``torch.compile`` traces is not checked.

    Args:
        model: A sharded model with its weights loaded.

    Returns:
        The check, or None if no single block of the model can be computed by itself.

    Raises:
        TensorParallelError: If the model is not sharded.
    """
    applied = applied_plan(model)
    if applied is None:
        raise TensorParallelError("The model is not sharded; there is nothing to check.")
    plan, _ = applied
    name = _first_block(model, plan)
    if name is None:
        logger.info("No block of %s can be computed by itself; its first batch is not checked.", type(model).__name__)
        return None
    check = FirstBatchCheck(name)
    block = model.get_submodule(name)
    calls: list[tuple[Any, Any]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if check.pending and not torch.compiler.is_compiling():
            calls[:] = [(snapshot(args), snapshot(kwargs))]

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if calls and check.pending and not torch.compiler.is_compiling():
            check.remove()
            check.error = _compare(model, plan, name, calls.pop(), output)

    check._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
    check._handles.append(block.register_forward_hook(after, with_kwargs=True))
    return check


def _first_block(model: nn.Module, plan: TensorParallelPlan) -> str | None:
    """Name the smallest module around the first row-wise layer that holds column-wise layers too."""
    for name, layer in plan.layers.items():
        if layer.kind in (LayerKind.HEADS, LayerKind.EXPERTS):
            return name
        if layer.kind is LayerKind.ROW:
            parent = name.rpartition(".")[0]
            while parent:
                inside = (role.kind for other, role in plan.layers.items() if other.startswith(f"{parent}."))
                if LayerKind.COLUMN in inside and type(model.get_submodule(parent)) not in (
                    nn.ModuleList,
                    nn.ModuleDict,
                ):
                    return parent
                parent = parent.rpartition(".")[0]
    return None


def _compare(model: nn.Module, plan: TensorParallelPlan, name: str, call: tuple[Any, Any], output: Any) -> float:
    communicator = group_of(model)
    whole = _whole_block(model, plan, name, communicator)
    args, kwargs = call
    with torch.no_grad():
        expected = list(tensors_within(whole(*args, **kwargs)))
    worst, tolerance = 0.0, min(TOLERANCES.values())
    for value, reference in zip(tensors_within(output), expected, strict=False):
        if value.shape != reference.shape or not value.is_floating_point():
            continue  # what the rank has of its own heads: attention maps, caches
        scale = reference.abs().max().float().clamp(min=1e-6)
        error = ((value - reference).abs().max().float() / scale).item()
        worst = max(worst, float("inf") if error != error else error)
        tolerance = max(tolerance, TOLERANCES.get(value.dtype, 1e-3))
    # Every rank learns the worst, so that all raise or none does.
    device = next(model.parameters()).device
    shared = torch.tensor([[worst], [tolerance]], device=device)
    worst, tolerance = communicator.all_gather_last(shared, [1] * communicator.size).amax(-1).tolist()
    if not worst <= tolerance:
        raise TensorParallelError(
            f"On the first batch, {name} differs from the unsharded block by {worst:.1e} of its largest value (at most "
            f"{tolerance:.0e} is rounding). The ranks hold different weights or inputs, or a kernel fails on "
            "local shapes; run "
            "with verify='off' only if you know why."
        )
    logger.info("First batch: %s agrees with the unsharded block to %.1e.", name, worst)
    return float(worst)


def _whole_block(model: nn.Module, plan: TensorParallelPlan, name: str, communicator: Communicator) -> nn.Module:
    """Copy a block and undo its sharding: gathered weights, original classes and attributes."""
    block = model.get_submodule(name)
    memo: dict[int, Any] = {}
    for parameter in block.parameters():
        memo[id(parameter)] = parameter  # shared with the copy until it is replaced
    whole = copy.deepcopy(block, memo)
    prefix = f"{name}."
    for local_name, module in whole.named_modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        full_name = f"{name}.{local_name}" if local_name else name
        while hasattr(type(module), "_gpuorch_swap"):
            module.__class__ = type(module)._gpuorch_swap[0]
        for own in (module._parameters, module._buffers):
            for key, value in own.items():
                cut = plan.parameters.get(f"{full_name}.{key}")
                if value is None or cut is None:
                    continue
                gathered = _gather(value.detach(), cut, communicator)
                if own is module._parameters:
                    gathered = nn.Parameter(gathered, requires_grad=False)
                own[key] = gathered
    for patch in plan.attributes:
        if patch.module == name or patch.module.startswith(prefix):
            set_attribute(
                whole.get_submodule(patch.module.removeprefix(name).removeprefix(".")), patch.attribute, patch.whole
            )
    return whole


def _gather(value: torch.Tensor, cut: ParameterPlan, communicator: Communicator) -> torch.Tensor:
    if cut.only_rank is not None:
        return communicator.all_reduce(value.clone())
    if cut.dim is None:
        return value
    sizes = [len(indices_of(own)) for own in cut.intervals]
    joined = communicator.all_gather_last(value.movedim(cut.dim, -1).contiguous(), sizes)
    order = torch.tensor([index for own in cut.intervals for index in indices_of(own)], device=value.device)
    whole = joined.new_empty((*joined.shape[:-1], cut.shape[cut.dim]))
    whole[..., order] = joined  # indices that several ranks keep are written with equal values
    return whole.movedim(-1, cut.dim).contiguous()
