"""The sharded model computes what the whole one does, with its real weights on real data: one block of each kind is asked.

The plan was verified without weights. What remains are things only a real run shows: a kernel that misbehaves on a
local shape, a checkpoint read into the wrong place, ranks with different weights or inputs. On the first batch, the
first cut block of each kind is computed a second time, unsharded: its weights are gathered from the ranks, its classes
and attributes put back, its state as it was before the call.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.apply import applied_plan, communicator_of, set_attribute
from lightning_gpuorch.parallel.tensor_parallel.communicator import Communicator
from lightning_gpuorch.parallel.tensor_parallel.intervals import indices_of
from lightning_gpuorch.parallel.tensor_parallel.plan import LayerKind, ParameterPlan, TensorParallelPlan, generic_name
from lightning_gpuorch.parallel.tensor_parallel.state import RandomState, random_state_kept
from lightning_gpuorch.parallel.tensor_parallel.values import output_leaves, snapshot, tensors_within

logger = logging.getLogger(__name__)

GATHERED = frozenset({LayerKind.COLUMN_GATHER, LayerKind.ROW_SPLIT, LayerKind.VOCABULARY})
"""Kinds of layers that are whole to their neighbours."""
ALONE = GATHERED | {LayerKind.HEADS, LayerKind.EXPERTS}
"""Kinds of layers that are blocks by themselves."""

MAX_COMPARED_ELEMENTS = 1 << 16
"""Outputs of the ranks are compared up to so many elements."""
NUM_SUMS = 8
"""Of so many sums; other channels agree in all of them, to a tenth of their spread, once in a billion cases."""
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest accepted difference relative to the largest value, by the block's dtype: sums are taken in another order."""


MAX_GATHERED_BYTES = 1 << 28
"""Single layers whose whole weights are larger (vocabularies, heads of a language model) are not gathered for a check."""


@dataclasses.dataclass
class FirstBatchCheck:
    """A check that waits for the first call of one block of each kind.

    Attributes:
        blocks: Names of the blocks that are checked.
        errors: Largest relative difference over all ranks, of each block that was called.
    """

    blocks: tuple[str, ...]
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    _handles: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    @property
    def block(self) -> str:
        """The first block."""
        return self.blocks[0]

    @property
    def error(self) -> float | None:
        """The largest of the errors, None until a block was called."""
        return max(self.errors.values(), default=None)

    @property
    def pending(self) -> bool:
        """Whether some blocks have not been called yet."""
        return bool(self._handles)

    def remove(self, block: str | None = None) -> None:
        """Take the check of a block, or of all of them, off the model."""
        for name in list(self._handles) if block is None else [block]:
            for handle in self._handles.pop(name, ()):
                handle.remove()


def check_first_batch(model: nn.Module) -> FirstBatchCheck | None:
    """Check one block of each kind of a sharded model when it is first called; every rank of the group does the same.

    The block's call is a collective operation then. It raises :class:`TensorParallelError` on every rank if any rank
    finds a difference. A call that ``torch.compile`` traces is not checked.

    Args:
        model: A sharded model with its weights loaded.

    Returns:
        The check, or None if no block of the model can be computed by itself.

    Raises:
        TensorParallelError: If the model is not sharded.
    """
    applied = applied_plan(model)
    if applied is None:
        raise TensorParallelError("The model is not sharded; there is nothing to check.")
    plan, _ = applied
    check = FirstBatchCheck(tuple(_blocks(model, plan)))
    if not check.blocks:
        logger.info("No block of %s can be computed by itself; its first batch is not checked.", type(model).__name__)
        return None
    for name in check.blocks:
        _watch(check, model, plan, name)
    return check


def _watch(check: FirstBatchCheck, model: nn.Module, plan: TensorParallelPlan, name: str) -> None:
    block = model.get_submodule(name)
    prepared: list[_WholeCall] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in check._handles and not torch.compiler.is_compiling():
            # Before the call: a block may keep state that its own call moves on.
            whole = _whole_block(model, plan, name, _group_of(model))
            prepared[:] = [_WholeCall(whole, snapshot(args), snapshot(kwargs), RandomState.now())]

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if prepared and name in check._handles and not torch.compiler.is_compiling():
            check.remove(name)
            check.errors[name] = _compare(model, name, prepared.pop(), output)

    check._handles[name] = [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after, with_kwargs=True),
    ]


def _blocks(model: nn.Module, plan: TensorParallelPlan) -> Iterator[str]:
    """Name the first block of each kind: the smallest module around a row-wise layer that holds column-wise layers too.

    Layers that are whole to their neighbours, such as gathered ones, are blocks of their own.
    """
    kinds: set[tuple[Any, ...]] = set()
    for name, layer in plan.layers.items():
        block = name if layer.kind in ALONE else _around(model, plan, name) if layer.kind is LayerKind.ROW else None
        if not block:
            continue
        kind = (generic_name(block), type(model.get_submodule(block)), _roles(plan, block))
        if kind in kinds:
            continue
        kinds.add(kind)
        own = [cut for key, cut in plan.parameters.items() if key.startswith(f"{block}.")]
        too_large = layer.kind in GATHERED and sum(cut.num_bytes for cut in own) > MAX_GATHERED_BYTES
        # A second run would call hooks of the user's a second time, and one without them would be another block.
        if not too_large and not any(_has_hooks(module) for module in model.get_submodule(block).modules()):
            yield block


def _roles(plan: TensorParallelPlan, block: str) -> tuple[tuple[str, LayerKind], ...]:
    inside = ((name, layer) for name, layer in plan.layers.items() if f"{name}.".startswith(f"{block}."))
    return tuple((name.removeprefix(block), layer.kind) for name, layer in inside)


def check_outputs_agree(model: nn.Module, output: Any) -> None:
    """Compare what the ranks of a sharded model's group got from one step; every rank of the group does the same.

    What is whole is the same on every rank. A step that was not planned (a function of the user's that takes hidden
    channels out of the model, say) gives each rank its own.

    Args:
        model: The sharded model.
        output: What the step returned.

    Raises:
        TensorParallelError: On every rank, if tensors or arrays in the ranks' outputs differ.
    """
    communicator = _group_of(model)
    try:
        leaves = [(path, _digest(leaf)) for path, leaf in output_leaves(output) if _has_numbers(leaf)]
    except TensorParallelError as error:  # of a type that cannot be looked into
        logger.info("The outputs of the ranks are not compared: %s", error)
        leaves = []
    gathered: list[Any] = [None] * communicator.size
    dist.all_gather_object(gathered, leaves, group=communicator.process_group)
    for rank, other in enumerate(gathered):
        for (path, own), (_, theirs) in zip(gathered[0], other, strict=False):
            if own[0] != theirs[0] or not torch.allclose(own[1], theirs[1], rtol=0, atol=0.1, equal_nan=True):
                raise TensorParallelError(
                    f"On the first batch, {path} is not the same on rank {rank} as on rank 0 of a group that shares "
                    f"{type(model).__name__}: the step takes something out of the model that only holds a rank's own "
                    "channels. Return outputs of the model itself, or use tensor_parallel_size=1."
                )


def _group_of(model: nn.Module) -> Communicator:
    communicator = communicator_of(model)
    if communicator is None:
        raise TensorParallelError(f"{type(model).__name__} is not sharded; apply a plan first.")
    return communicator


def _has_numbers(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind in "fiub"
    return isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_complex()


def _digest(leaf: Any) -> tuple[tuple[int, ...], torch.Tensor]:
    """Describe a tensor by its shape and by signed sums that other channels do not have, in units of their spread."""
    values = torch.as_tensor(leaf).detach().flatten()[:MAX_COMPARED_ELEMENTS].double().cpu()
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (NUM_SUMS, values.numel()), generator=generator).double() * 2 - 1
    return tuple(leaf.shape), signs @ values / values.norm().clamp(min=1e-30)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _around(model: nn.Module, plan: TensorParallelPlan, name: str) -> str | None:
    parent = name.rpartition(".")[0]
    while parent:
        inside = (role.kind for other, role in plan.layers.items() if other.startswith(f"{parent}."))
        if LayerKind.COLUMN in inside and type(model.get_submodule(parent)) not in (nn.ModuleList, nn.ModuleDict):
            return parent
        parent = parent.rpartition(".")[0]
    return None


@dataclasses.dataclass
class _WholeCall:
    """A block as it was before its call, unsharded, and what it was called with."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random_state: RandomState

    def run(self) -> list[torch.Tensor] | None:
        """Compute the block; None if it cannot be computed by itself."""
        with torch.no_grad(), random_state_kept():
            self.random_state.restore()
            try:
                return list(tensors_within(self.block(*self.args, **self.kwargs)))
            except Exception as error:  # noqa: BLE001 - a block that knows its surroundings may fail alone in any way
                logger.info("A block cannot be computed by itself, and is not checked: %r", error)
                return None


def _compare(model: nn.Module, name: str, call: _WholeCall, output: Any) -> float:
    communicator = _group_of(model)
    worst, tolerance = 0.0, min(TOLERANCES.values())
    for value, reference in zip(tensors_within(output), call.run() or (), strict=False):
        if value.shape != reference.shape or not value.is_floating_point():
            continue  # what the rank has of its own heads: attention maps, caches
        scale = reference.abs().max().float().clamp(min=1e-6)
        error = ((value - reference).abs().max().float() / scale).item()
        worst = max(worst, float("inf") if error != error and bool(reference.isfinite().all()) else error)
        tolerance = max(tolerance, TOLERANCES.get(value.dtype, 1e-3))
    # Every rank learns the worst, so that all raise or none does.
    device = next(model.parameters()).device
    shared = torch.tensor([[worst], [tolerance]], device=device)
    worst, tolerance = communicator.all_gather_last(shared, [1] * communicator.size).amax(-1).tolist()
    if not worst <= tolerance:
        raise TensorParallelError(
            f"On the first batch, {name} differs from the unsharded block by {worst:.1e} of its largest value (at most "
            f"{tolerance:.0e} is rounding). The ranks hold different weights or inputs, or a kernel fails on local shapes; "
            "run with verify='off' only if you know why."
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
        module._forward_hooks.clear()  # the check's own
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
