"""How many ranks does a model need? The smallest degree at which weights and headroom fit a device's budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_gpuorch.errors import ModelDoesNotFitError, TensorParallelError
from lightning_gpuorch.tensor_parallel.plan import TensorParallelPlan, format_bytes
from lightning_gpuorch.tensor_parallel.planning import plan_tensor_parallel


@dataclasses.dataclass(frozen=True)
class SizeChoice:
    """A tensor-parallel degree and why it was chosen.

    Attributes:
        tensor_parallel_size: The degree.
        plan: The plan at that degree; None for degree 1.
        rank_bytes: Weights and buffers on the rank that keeps most.
        headroom_bytes: What is left free for activations.
        budget_bytes: What one device may use.
        arithmetic: One line per degree that was looked at.
    """

    tensor_parallel_size: int
    plan: TensorParallelPlan | None
    rank_bytes: int
    headroom_bytes: int
    budget_bytes: int
    arithmetic: tuple[str, ...]

    def describe(self) -> str:
        """Write the arithmetic."""
        return "\n".join(self.arithmetic)


def smallest_tensor_parallel_size(
    model: nn.Module,
    budget_bytes: int,
    example_input: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    method: str = "forward",
    candidates: Sequence[int] = (1, 2, 4, 8),
    headroom_fraction: float = 0.2,
) -> SizeChoice:
    """Find the smallest degree at which a model fits.

    Args:
        model: The whole model; weights may be on meta.
        budget_bytes: Bytes one device may use.
        example_input: As for :func:`plan_tensor_parallel`; needed as soon as one device is not enough.
        example_kwargs: Keyword arguments of the call.
        method: Name of the method that is called.
        candidates: Degrees to consider, ascending.
        headroom_fraction: Share of the budget kept free for activations and workspaces.

    Raises:
        ModelDoesNotFitError: If no candidate fits; the message holds the arithmetic.
        TensorParallelError: If more than one rank is needed and there is no example input, or no plan.
    """
    headroom = int(budget_bytes * headroom_fraction)
    usable = budget_bytes - headroom
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    lines = [
        f"{format_bytes(weights)} of weights + {format_bytes(buffers)} of buffers; a device has "
        f"{format_bytes(budget_bytes)}, "
        f"{format_bytes(headroom)} of it for activations, {format_bytes(usable)} usable"
    ]
    smallest = weights + buffers
    for size in sorted(candidates):
        plan: TensorParallelPlan | None = None
        needed = weights + buffers
        if size > 1:
            # No plan can do better than an even share of everything.
            if -(-weights // size) + buffers > usable:
                lines.append(f"{size} ranks: at least {format_bytes(weights / size + buffers)} each: too much")
                smallest = min(smallest, -(-weights // size) + buffers)
                continue
            if example_input is None and not example_kwargs:
                raise TensorParallelError(
                    f"{type(model).__name__} needs more than one device ({lines[0]}), and planning that needs an "
                    "example_input."
                )
            plan = plan_tensor_parallel(model, example_input, size, example_kwargs=example_kwargs, method=method)
            needed = plan.max_rank_bytes + buffers
        verdict = "fits" if needed <= usable else "too much"
        lines.append(f"{size} rank{'s' if size > 1 else ''}: {format_bytes(needed)} each: {verdict}")
        smallest = min(smallest, needed)
        if needed <= usable:
            return SizeChoice(size, plan, needed, headroom, budget_bytes, tuple(lines))
    raise ModelDoesNotFitError(
        f"{type(model).__name__} does not fit:\n  " + "\n  ".join(lines), smallest + headroom, budget_bytes, None
    )
