"""The number of ranks a model needs: the smallest at which weights and headroom fit a device's budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_gpuorch.errors import ModelDoesNotFitError, TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.plan import TensorParallelPlan, format_bytes
from lightning_gpuorch.parallel.tensor_parallel.planning import plan_tensor_parallel

MAX_SIZE_TO_RECOMMEND = 1024
"""Where no degree at hand is enough, the message names a larger one up to this."""


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


@dataclasses.dataclass(frozen=True)
class WeightBytes:
    """What a whole model's weights take; tied ones count once, those on meta by their shape.

    Attributes:
        parameters: Bytes of parameters.
        buffers: Bytes of buffers, which every rank keeps whole.
    """

    parameters: int
    buffers: int

    @classmethod
    def of(cls, model: nn.Module) -> WeightBytes:
        """Measure a model."""
        return cls(
            sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
            sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        )

    def at_least(self, size: int) -> int:
        """Bytes per rank if everything could be cut evenly: no plan can do better."""
        return -(-self.parameters // size) + self.buffers


def smallest_tensor_parallel_size(
    model: nn.Module,
    budget_bytes: int,
    example_input: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    method: str | Callable[..., Any] = "forward",
    candidates: Sequence[int] = (1, 2, 4, 8),
    headroom_fraction: float = 0.1,
    planner: Callable[..., TensorParallelPlan] = plan_tensor_parallel,
) -> SizeChoice:
    """Find the smallest degree at which a model fits.

    Args:
        model: The whole model; weights may be on meta.
        budget_bytes: Bytes one device may use.
        example_input: As for :func:`plan_tensor_parallel`; needed as soon as one device is not enough.
        example_kwargs: Keyword arguments of the call.
        method: Name of the method that is called.
        candidates: Degrees to consider.
        headroom_fraction: Share of the budget kept free for activations and workspaces.
        planner: Called as :func:`plan_tensor_parallel`; a cache's ``plan``, say.

    Raises:
        ModelDoesNotFitError: If no candidate fits; the message holds the arithmetic and a degree that would do.
        TensorParallelError: If more than one rank is needed and there is no example input, or no plan is verified at
            any degree that could be enough.
    """
    headroom = int(budget_bytes * headroom_fraction)
    usable = budget_bytes - headroom
    whole = WeightBytes.of(model)
    lines = [
        f"{type(model).__name__}: {format_bytes(whole.parameters)} of weights + {format_bytes(whole.buffers)} of "
        f"buffers; a device may give {format_bytes(budget_bytes)}, less {format_bytes(headroom)} for activations = "
        f"{format_bytes(usable)}"
    ]
    refusals: list[TensorParallelError] = []

    def needed(size: int) -> tuple[int, TensorParallelPlan | None] | None:
        """Bytes on the fullest rank and the plan; None where there is no plan."""
        if size == 1:
            return whole.at_least(1), None
        bound = whole.at_least(size)
        if bound > usable:
            lines.append(f"{size} ranks: at least {format_bytes(bound)} each: too much")
            return None
        if example_input is None and not example_kwargs:
            raise TensorParallelError(
                f"{type(model).__name__} needs more than one device ({lines[0]}), and planning that needs an "
                "example_input."
            )
        try:
            plan = planner(model, example_input, size, example_kwargs=example_kwargs, method=method)
        except TensorParallelError as error:
            refusals.append(error)
            lines.append(f"{size} ranks: no plan passes verification")
            return None
        return plan.max_rank_bytes + whole.buffers, plan

    def try_size(size: int) -> SizeChoice | None:
        found = needed(size)
        if found is None:
            return None
        rank_bytes, plan = found
        fits = rank_bytes <= usable
        ranks = "1 rank" if size == 1 else f"{size} ranks"
        lines.append(f"{ranks}: {format_bytes(rank_bytes)} each: {'fits' if fits else 'too much'}")
        return SizeChoice(size, plan, rank_bytes, headroom, budget_bytes, tuple(lines)) if fits else None

    sizes = sorted(candidates)
    for size in sizes:
        choice = try_size(size)
        if choice is not None:
            return choice
    if refusals and len(sizes) == 1:
        raise refusals[0]
    if refusals and any(whole.at_least(size) <= usable for size in sizes):
        raise TensorParallelError("\n  ".join(["No degree fits that could be planned:", *lines, str(refusals[0])]))
    fitting = None
    if example_input is not None or example_kwargs:
        try:
            two = planner(model, example_input, 2, example_kwargs=example_kwargs, method=method)
            fitting = _size_beyond(sizes[-1], usable, two.replicated_bytes + whole.buffers, two.total_bytes, lines)
        except TensorParallelError as error:
            lines.append(f"no plan passes verification: {error}")
    best = min(whole.at_least(size) for size in sizes)
    advice = (
        f"tensor_parallel_size={fitting} could do" if fitting else "no tensor_parallel_size was found that would do"
    )
    raise ModelDoesNotFitError(
        "\n  ".join([f"{type(model).__name__} does not fit {_ranks(sizes)}; {advice}.", *lines]),
        best + headroom,
        budget_bytes,
        fitting,
    )


def _size_beyond(largest: int, usable: int, on_every_rank: int, total: int, lines: list[str]) -> int | None:
    """The power of two at which a model would fit, as far as what stays on every rank tells."""
    size = 2
    while size <= MAX_SIZE_TO_RECOMMEND:
        if size > largest:
            needed = on_every_rank + -(-total // size)
            fits = needed <= usable
            lines.append(f"{size} ranks: about {format_bytes(needed)} each: {'could fit' if fits else 'too much'}")
            if fits:
                return size
        if on_every_rank > usable:
            lines.append(f"{format_bytes(on_every_rank)} stay on every rank, however many there are")
            return None
        size *= 2
    return None


def _ranks(sizes: Sequence[int]) -> str:
    return "one device" if tuple(sizes) == (1,) else f"{' or '.join(map(str, sizes))} devices"
