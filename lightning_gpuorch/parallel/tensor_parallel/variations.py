"""A plan is checked on more than the example: what an example does not show by chance would be wrong later.

- other batch sizes and lengths, such that local sizes fit by chance, and such that they do not;
- much larger and much smaller numbers, all together and row by row, for code that acts beyond a threshold (a norm that
  is clipped, say);
- two steps in a row, where the model keeps state from one to the next.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lightning_gpuorch.parallel.tensor_parallel.anatomy import Anatomy, ModelCall
from lightning_gpuorch.parallel.tensor_parallel.installation import LARGEST_SCALE, MIXED
from lightning_gpuorch.parallel.tensor_parallel.isolation import CommunicatesError
from lightning_gpuorch.parallel.tensor_parallel.reference_run import ExampleError
from lightning_gpuorch.parallel.tensor_parallel.stubs import StubbedModel

logger = logging.getLogger(__name__)

ENOUGH_ROWS = 16
"""Samples times length at which a variation shows what it can: more only takes longer."""
ENOUGH_MIXED_ROWS = 48
"""The same where every row has its own scale: on two ranks, the norm of a rank's half is 1.4 times smaller than that of the
whole, and two of so many scales lie closer together, so that a threshold lies between for one of them."""


class Recordings:
    """Recorded calls of a model, and variations of the first of them.

    Variations are recorded when they are needed and forgotten afterwards: what all layers of a large model receive takes
    more memory than is worth keeping several times.

    Args:
        anatomy: The model's parts.
        calls: The calls; the model has to accept them all.
        num_ranks: Number of ranks, which decides which sizes are telling.
        seed: Seed of the stubs' numbers.

    Attributes:
        first: The first call.
        others: The other calls.

    Raises:
        TensorParallelError: The model cannot be run with one of the calls.
    """

    def __init__(self, anatomy: Anatomy, calls: Sequence[ModelCall], num_ranks: int, seed: int = 0) -> None:
        self.anatomy, self.seed = anatomy, seed
        self.first, *self.others = (StubbedModel(anatomy, call, seed) for call in calls)
        for stubbed in (self.first, *self.others):
            stubbed.run_reference()
        call = self.first.call
        coprime = _other_shapes(call, lambda size: math.gcd(size, num_ranks) == 1, ENOUGH_MIXED_ROWS)
        multiple = _other_shapes(call, lambda size: size % num_ranks == 0, ENOUGH_ROWS)
        # Each variation is a list of alternatives, the first that the model accepts counts.
        self._variations: list[list[tuple[ModelCall, float, int]]] = [
            [(one, MIXED, 1) for one in coprime],
            [(one, LARGEST_SCALE, 1) for one in multiple],
            [(call, 1 / LARGEST_SCALE, 1)],
        ]
        if self.first.keeps_state:
            self._variations.append([(call, 1.0, 2)])

    def variations(self) -> Iterator[StubbedModel]:
        """Record one variation after the other; each is only good until the next."""
        for alternatives in self._variations:
            while alternatives:
                stubbed = StubbedModel(self.anatomy, alternatives[0][0], self.seed, *alternatives[0][1:])
                stubbed.is_variation = True
                try:
                    stubbed.run_reference()
                except (ExampleError, CommunicatesError) as error:
                    logger.debug("a variation of the example is not checked: %s", error)
                    del alternatives[0]
                else:
                    yield stubbed
                    del stubbed  # before the next is recorded
                    break


def _other_shapes(call: ModelCall, is_good: Callable[[int], bool], enough: int) -> Iterator[ModelCall]:
    """Yield the call with a number of samples and a length that are good, then with only one of the two, then itself."""
    values = (call.args, dict(call.kwargs))
    tensors = list(_tensors(values))
    num_samples = tensors[0].shape[0] if tensors else 0
    length = next((tensor.shape[1] for tensor in tensors if tensor.dim() > 1), 0)
    more = next((size for size in range(num_samples, 2 * num_samples + 1) if is_good(size)), num_samples)
    longest = min(length, max(length // 2, -(-enough // max(more, 1))))
    less = next((size for size in (*range(longest, 1, -1), *range(longest, length)) if is_good(size)), length)
    for samples, cut in dict.fromkeys(((more, less), (num_samples, less), (more, length), (num_samples, length))):
        args, kwargs = _mapped(values, functools.partial(_resized, (num_samples, samples), (length, cut)))
        yield ModelCall(args, kwargs, call.method)


Change = Callable[[torch.Tensor], torch.Tensor]


def _resized(samples: tuple[int, int], length: tuple[int, int], value: torch.Tensor) -> torch.Tensor:
    """Repeat samples and cut lengths, from one size to another."""
    if value.shape[0] == samples[0]:
        value = torch.cat([value, value[: samples[1] - samples[0]]])
    for dim in range(1, value.dim()):
        if value.shape[dim] == length[0]:
            value = value.narrow(dim, 0, length[1])
    return value.clone()


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
