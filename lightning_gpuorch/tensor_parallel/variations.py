"""A plan is checked on more than the example: what an example does not show by chance would be wrong later.

- another batch size and another length, so that no size written into the code fits only because of them;
- much larger and much smaller numbers, for code that acts beyond a threshold (a norm that is clipped, say);
- two steps in a row, where the model keeps state from one to the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lightning_gpuorch.tensor_parallel.anatomy import Anatomy, ModelCall
from lightning_gpuorch.tensor_parallel.isolation import CommunicatesError
from lightning_gpuorch.tensor_parallel.reference_run import ExampleError
from lightning_gpuorch.tensor_parallel.stubs import StubbedModel

logger = logging.getLogger(__name__)

SCALES = (1024.0, 1.0 / 1024.0)
"""Factors of the stubs' numbers. Thresholds beyond a thousand times the usual size are not reached."""


def recorded_calls(
    anatomy: Anatomy, calls: Sequence[ModelCall], num_ranks: int, seed: int = 0, analyze: bool = False
) -> list[StubbedModel]:
    """Record calls of a model, and the variations of the first of them that the model accepts.

    Args:
        anatomy: The model's parts.
        calls: The calls; the model has to accept them all.
        num_ranks: Number of ranks, which decides which lengths are telling.
        seed: Seed of the stubs' numbers.
        analyze: Whether the first call is recorded with gradients too.

    Returns:
        The calls, then the variations.

    Raises:
        TensorParallelError: The model cannot be run with one of the calls.
    """
    recorded = [StubbedModel(anatomy, call, seed) for call in calls]
    for index, stubbed in enumerate(recorded):
        stubbed.run_reference(analyze=analyze and index == 0)
    first = recorded[0]
    if first.keeps_state:
        recorded += _accepted(StubbedModel(anatomy, calls[0], seed, num_steps=2))
    for scale in SCALES:
        recorded += _accepted(StubbedModel(anatomy, calls[0], seed, scale))
    for call in _other_shapes(first.call, num_ranks):
        accepted = _accepted(StubbedModel(anatomy, call, seed))
        if accepted:
            recorded += accepted
            break
    return recorded


def _accepted(stubbed: StubbedModel) -> list[StubbedModel]:
    try:
        stubbed.run_reference()
    except (ExampleError, CommunicatesError) as error:
        logger.debug("a variation of the example is not checked: %s", error)
        return []
    stubbed.is_variation = True
    return [stubbed]


def _other_shapes(call: ModelCall, num_ranks: int) -> Iterator[ModelCall]:
    """Yield the call with one more sample and another length, then with only one of the two."""
    values = (call.args, dict(call.kwargs))
    tensors = list(_tensors(values))
    if not tensors:
        return
    num_samples = tensors[0].shape[0]
    lengths = [tensor.shape[1] for tensor in tensors if tensor.dim() > 1]
    length = lengths[0] if lengths else 0
    # A size that is too large by a factor of up to num_ranks fits by chance if the length is a multiple of that factor.
    whole = max(length // num_ranks * num_ranks, num_ranks)
    other = length - 1 if length % num_ranks == 0 else whole
    shortened = _cut_length(length, other) if 1 < other < length else None
    for change in (_both(_one_more(num_samples), shortened), shortened, _one_more(num_samples)):
        if change is not None:
            args, kwargs = _mapped(values, change)
            yield ModelCall(args, kwargs, call.method)


Change = Callable[[torch.Tensor], torch.Tensor]


def _one_more(num_samples: int) -> Change:
    return lambda value: torch.cat([value, value[:1]]) if value.shape[0] == num_samples else value


def _cut_length(length: int, other: int) -> Change:
    def cut(value: torch.Tensor) -> torch.Tensor:
        for dim in range(1, value.dim()):
            if value.shape[dim] == length:
                value = value.narrow(dim, 0, other)
        return value.clone()

    return cut


def _both(first: Change, second: Change | None) -> Change | None:
    return None if second is None else lambda value: first(second(value))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.dim():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _mapped(value: Any, change: Change) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value) if value.dim() else value
    if type(value) is dict:
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, change) for item in value))
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change) for item in value)
    return value
