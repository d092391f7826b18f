"""Fused experts are cut: a module that holds all experts in stacked weights, of which each rank keeps a slice.

Such a module (``(num_experts, out, in)`` weights, a forward that takes hidden states and routing) is linear in the
output of its inner dimension: with that dimension cut, the ranks' outputs sum up to the whole. Which dimension it is,
and how gate and up are packed in it, is found by trying, never by name: a layout counts only if the sum over the
ranks of the module's own forward on cut random weights equals its forward on the whole ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_gpuorch.parallel.tensor_parallel.intervals import RankIntervals, from_indices, shift, split_aligned
from lightning_gpuorch.parallel.tensor_parallel.plan import ParameterPlan, dtype_name, local_parameter
from lightning_gpuorch.parallel.tensor_parallel.swap import subclass_of

if TYPE_CHECKING:
    from lightning_gpuorch.parallel.tensor_parallel.communicator import Communicator
    from lightning_gpuorch.parallel.tensor_parallel.plan import LayerPlan

RELATIVE_TOLERANCE = 1e-4
"""Largest accepted difference between the sum over ranks and the whole, relative to the largest value."""
LARGE = 1024.0
"""Factor of the hidden states in a second check, for code that acts beyond a threshold."""
MAX_DISTINCT_ELEMENTS = 1 << 24
"""Stacked weights larger than this share one expert's random values during the check, to bound its memory."""


class SummedExperts(nn.Module):
    """A fused-experts module that holds a slice of every expert: outputs are summed over the ranks."""

    layer_plan: LayerPlan
    communicator: Communicator

    def bind(self, layer_plan: LayerPlan, communicator: Communicator) -> None:
        """Tell the layer its role and its group."""
        self.layer_plan = layer_plan
        self.communicator = communicator

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the module's own forward on the local weights and sum."""
        output: torch.Tensor = super().forward(*args, **kwargs)
        return self.communicator.all_reduce(output)


def swap_experts(module: nn.Module) -> None:
    """Give a fused-experts module its summed form, in place."""
    module.__class__ = subclass_of(type(module), SummedExperts, False)


def looks_fused(module: nn.Module) -> bool:
    """Tell whether a module could hold fused experts: two or more stacked weights of its own, no layers inside."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    stacked = [parameter for parameter in own if parameter.dim() == 3 and parameter.is_floating_point()]
    if len(stacked) < 2 or len({parameter.shape[0] for parameter in stacked}) != 1 or stacked[0].shape[0] < 2:
        return False
    if isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)):
        return False
    return all(not list(child.parameters()) for child in module.children())


def plan_experts(
    module: nn.Module, call: tuple[tuple[Any, ...], Mapping[str, Any]], num_ranks: int
) -> dict[str, ParameterPlan] | None:
    """Find how a fused-experts module is cut.

    Args:
        module: The module; its weights may be on meta.
        call: The arguments of one call, the first of which holds hidden states ``(..., hidden)``.
        num_ranks: Number of ranks.

    Returns:
        The plan of each cut parameter, or None if no layout passes the check.
    """
    check = _SumCheck(module, call, num_ranks)
    if check.reference is None:
        return None
    return next((plans for plans in _layouts(module, check.hidden_size, num_ranks) if check.passes(plans)), None)


def keeps_shape(module: nn.Module, call: tuple[tuple[Any, ...], Mapping[str, Any]]) -> bool:
    """Tell whether a module maps hidden states to hidden states of the same shape, as experts do."""
    hidden = _hidden_states(call)
    output = None if hidden is None else _SumCheck(module, call, 1).reference
    return hidden is not None and output is not None and output.shape == hidden.shape


def _hidden_states(call: tuple[tuple[Any, ...], Mapping[str, Any]]) -> torch.Tensor | None:
    values = (*call[0], *call[1].values())
    return next((value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()), None)


def experts_plan_is_right(
    module: nn.Module,
    call: tuple[tuple[Any, ...], Mapping[str, Any]],
    num_ranks: int,
    plans: Mapping[str, ParameterPlan],
) -> bool:
    """Check a given cut of a fused-experts module: the sum over the ranks must equal the whole."""
    check = _SumCheck(module, call, num_ranks)
    return check.reference is not None and check.passes(plans)


class _SumCheck:
    """Runs a module's own forward on whole and on cut random weights."""

    def __init__(self, module: nn.Module, call: tuple[tuple[Any, ...], Mapping[str, Any]], num_ranks: int) -> None:
        self.module, self.call, self.num_ranks = module, call, num_ranks
        hidden = _hidden_states(call)
        self.hidden_size = 0 if hidden is None else hidden.shape[-1]
        generator = torch.Generator().manual_seed(5)
        self.whole = {
            name: _random(parameter.shape, generator)
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        self.reference = self._run(self.whole)

    def passes(self, plans: Mapping[str, ParameterPlan]) -> bool:
        """Tell whether the ranks' outputs sum up to the whole, for hidden states of usual size and for large ones."""
        assert self.reference is not None
        large = self._run(self.whole, LARGE)
        references = [(1.0, self.reference), *([(LARGE, large)] if large is not None and _is_finite(large) else [])]
        return all(self._sums_up(plans, scale, reference) for scale, reference in references)

    def _sums_up(self, plans: Mapping[str, ParameterPlan], scale: float, reference: torch.Tensor) -> bool:
        total = torch.zeros_like(reference)
        for rank in range(self.num_ranks):
            local = {
                name: local_parameter(value, plans[name], rank) if name in plans else value
                for name, value in self.whole.items()
            }
            part = self._run(local, scale)
            if part is None or part.shape != reference.shape:
                return False
            total += part
        return bool((total - reference).abs().max() <= RELATIVE_TOLERANCE * reference.abs().max())

    def _run(self, weights: Mapping[str, torch.Tensor], scale: float = 1.0) -> torch.Tensor | None:
        saved = dict(self.module._parameters)
        try:
            for name, value in weights.items():
                self.module._parameters[name] = nn.Parameter(value, requires_grad=False)
            forward: Callable[..., Any] = type(self.module).forward
            hidden = _hidden_states(self.call)
            args = [_copy(value, scale if value is hidden else 1.0) for value in self.call[0]]
            kwargs = {key: _copy(value, scale if value is hidden else 1.0) for key, value in self.call[1].items()}
            with torch.no_grad():
                output = forward(self.module, *args, **kwargs)
        except Exception:  # noqa: BLE001 - unknown code on a layout that may be wrong: it does not pass
            return None
        finally:
            self.module._parameters.update(saved)
        return output if isinstance(output, torch.Tensor) and output.is_floating_point() else None


def _layouts(module: nn.Module, hidden_size: int, num_ranks: int) -> Iterator[dict[str, ParameterPlan]]:
    """Yield the ways to cut: which dimension of each weight, and how packed halves lie in it."""
    own = {name: value for name, value in module._parameters.items() if value is not None and value.is_floating_point()}
    stacked = {name: value for name, value in own.items() if value.dim() == 3}
    choices = []
    for value in stacked.values():
        inner = [dim for dim in (1, 2) if value.shape[dim] != hidden_size]
        choices.append(inner or [1, 2])
    for dims in itertools.product(*choices):
        sizes = [value.shape[dim] for value, dim in zip(stacked.values(), dims, strict=True)]
        inner_size = min(sizes)
        if inner_size < num_ranks or any(size not in (inner_size, 2 * inner_size) for size in sizes):
            continue
        for packing in (_plain, _halves, _pairs):
            cuts = {size: packing(size, inner_size, num_ranks) for size in set(sizes)}
            plans = {}
            for (name, value), dim in zip(stacked.items(), dims, strict=True):
                plans[name] = _plan(value, dim, cuts[value.shape[dim]])
            for name, value in own.items():
                if value.dim() == 2 and value.shape[1] in cuts and value.shape[1] != hidden_size:
                    plans[name] = _plan(value, 1, cuts[value.shape[1]])
                elif value.dim() == 2 and value.shape[1] == hidden_size:
                    shape = tuple(value.shape)
                    plans[name] = ParameterPlan(shape, dtype_name(value.dtype), only_rank=0)
            yield plans
            if inner_size == max(sizes):
                break


def _plan(value: torch.Tensor, dim: int, intervals: RankIntervals) -> ParameterPlan:
    return ParameterPlan(tuple(value.shape), dtype_name(value.dtype), dim, intervals)


def _plain(size: int, inner_size: int, num_ranks: int) -> RankIntervals:
    return split_aligned(size, num_ranks)


def _halves(size: int, inner_size: int, num_ranks: int) -> RankIntervals:
    own = split_aligned(inner_size, num_ranks)
    return own if size == inner_size else tuple((*part, *shift(part, inner_size)) for part in own)


def _pairs(size: int, inner_size: int, num_ranks: int) -> RankIntervals:
    own = split_aligned(inner_size, num_ranks)
    if size == inner_size:
        return own
    return tuple(from_indices(range(2 * start, 2 * stop)) for ((start, stop),) in own)


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    drawn = shape if shape.numel() <= MAX_DISTINCT_ELEMENTS or len(shape) < 3 else torch.Size((1, *shape[1:]))
    scale = drawn[-1] ** -0.5 if len(drawn) > 1 else 1.0
    return (torch.randn(drawn, generator=generator) * scale).expand(shape)


def _copy(value: Any, scale: float) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.clone() if scale == 1.0 else value * scale


def _is_finite(value: torch.Tensor) -> bool:
    return bool(value.isfinite().all())
