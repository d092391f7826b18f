"""Which numbers do stubs return, and how are values of two runs copied and compared?"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

TABLE_ELEMENTS = 1 << 22
RELATIVE_TOLERANCE = 1e-4
"""Largest accepted difference between a rank's value and the whole model's, relative to the largest value."""


class PseudoRandom:
    """Normal numbers that depend on a key only: the same key gives the same tensor in every run.

    The numbers come from one table, read from an offset that the key decides, because drawing anew would dominate the
    time of planning a large model.

    Args:
        seed: Seed of the table.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._table = torch.randn(2 * TABLE_ELEMENTS, generator=torch.Generator().manual_seed(seed))

    def view(self, key: object, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """Give ``shape`` numbers for ``key``, read-only: the tensor shares the table's memory."""
        shape = torch.Size(shape)
        digest = hashlib.blake2b(repr((self.seed, key)).encode(), digest_size=8).digest()
        offset = int.from_bytes(digest, "little") % TABLE_ELEMENTS
        count = shape.numel()
        if count <= TABLE_ELEMENTS:
            return self._table[offset : offset + count].view(shape)
        repeats = -(-(count + offset) // self._table.numel())
        return self._table.repeat(repeats)[offset : offset + count].view(shape)

    def tensor(self, key: object, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """Give ``shape`` numbers for ``key``, in memory of their own."""
        return self.view(key, shape).clone()


@functools.lru_cache(maxsize=2)
def pseudo_random(seed: int) -> PseudoRandom:
    """Give the (cached) source of a seed."""
    return PseudoRandom(seed)


def _is_atom(value: Any) -> bool:
    return value is None or isinstance(
        value, (int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, nn.Module, type)
    )


def tensors_within(value: Any) -> Iterator[torch.Tensor]:
    """Find the tensors in containers and objects of any kind (key/value caches, model outputs)."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if _is_atom(item) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, Mapping):
            stack.extend(reversed(list(item.values())))
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack.extend(reversed(list(item)))
        elif not callable(item) or hasattr(item, "update"):
            stack.extend(reversed(list(getattr(item, "__dict__", {}).values())))


def plain_outputs(value: Any, path: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """List the tensors a caller sees in a result: in dicts, sequences and dataclasses, not inside caches."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from plain_outputs(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from plain_outputs(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from plain_outputs(getattr(value, field.name), f"{path}.{field.name}")


def snapshot(value: Any) -> Any:
    """Copy an argument so that a later run can neither change it nor be changed through it."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if _is_atom(value):
        return value
    if type(value) in (tuple, list):
        return type(value)(snapshot(item) for item in value)
    if type(value) is dict:
        return {key: snapshot(item) for key, item in value.items()}
    if callable(value) and not hasattr(value, "update"):
        return value
    # Caches and outputs: deep copies in which tensors (graph nodes cannot be deep-copied) are replaced by clones.
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in tensors_within(value)}
    return copy.deepcopy(value, memo)


def detached(value: Any) -> Any:
    """Cut tensors in tuples, lists and dicts off their graphs, sharing their memory."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if type(value) in (tuple, list):
        return type(value)(detached(item) for item in value)
    if type(value) is dict:
        return {key: detached(item) for key, item in value.items()}
    return value


def to_float32(value: Any) -> Any:
    """Copy an example input to the CPU, floating-point tensors as float32: stubs compute in float32."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return value.float() if value.is_floating_point() else value.clone()
    if type(value) in (tuple, list):
        return type(value)(to_float32(item) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_float32(item) for item in value))
    if type(value) is dict:
        return {key: to_float32(item) for key, item in value.items()}
    if isinstance(value, Mapping) and hasattr(value, "data"):  # a tokenizer's BatchEncoding
        return {key: to_float32(item) for key, item in value.items()}
    return snapshot(value)


def difference(value: torch.Tensor, expected: torch.Tensor) -> str:
    """Say how a value differs from what is expected; empty if it does not."""
    if value.shape != expected.shape:
        return f"shape {tuple(value.shape)} instead of {tuple(expected.shape)}"
    if value.dtype.is_floating_point != expected.dtype.is_floating_point:
        return f"dtype {value.dtype} instead of {expected.dtype}"
    if torch.equal(value, expected):
        return ""
    if not (value.is_floating_point() or value.is_complex()):
        return "other values"
    finite = expected.isfinite()
    if not bool(finite.all()):
        if not torch.equal(finite, value.isfinite()):
            return "other values"
        if not bool(finite.any()):
            return "no finite values to compare"
        value, expected = value[finite], expected[finite]
    error = (value - expected).abs().max().item()
    scale = max(expected.abs().max().item(), 1e-6)
    return "" if error <= RELATIVE_TOLERANCE * scale else f"values differ by {error / scale:.1e} of the largest"
