"""The numbers that stubs return, and how values of two runs are copied and compared."""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import functools
import hashlib
import itertools
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_gpuorch.errors import TensorParallelError

MAX_ITERATED = 10_000
"""A result that is an iterator of more items is taken to have no end."""
TABLE_ELEMENTS = 1 << 22
RELATIVE_TOLERANCE = 1e-4
"""Largest accepted difference between a rank's value and the whole model's, relative to the largest value."""

ROUNDING = 1e-6
"""What rounding of numbers of very different size may add to that, relative to the largest value of the tensor."""


class PseudoRandom:
    """Normal numbers that depend on a key only: the same key gives the same tensor in every run.

    The numbers come from one table, read from an offset that the key decides, because drawing them would dominate the
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


def output_leaves(value: Any, path: str = "output", caches: bool = True) -> Iterator[tuple[str, Any]]:
    """List everything a caller sees in a result, down to tensors, arrays, numbers and text.

    Generators are run to their end; objects of any class are taken apart.

    Args:
        value: The result.
        path: What it is called.
        caches: Whether to look into key/value caches, which hold a rank's own heads by design.

    Raises:
        TensorParallelError: The result holds something that cannot be taken apart.
    """
    return _leaves(value, path, caches, set())


def plain_outputs(value: Any, path: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """List the tensors a caller sees in a result, not those inside caches."""
    return ((where, leaf) for where, leaf in output_leaves(value, path, False) if isinstance(leaf, torch.Tensor))


def _leaves(value: Any, path: str, caches: bool, above: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic, enum.Enum, nn.Module)) or _is_atom(value):
        yield path, value
        return
    if id(value) in above or (not caches and is_cache(value)):
        return
    above = above | {id(value)}
    for name, item in _parts(value, path):
        yield from _leaves(item, f"{path}{name}", caches, above)


def _parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Take a container or object apart, one level."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (set, frozenset)):
        yield from ((f"[{index}]", item) for index, item in enumerate(sorted(value, key=_rank_in_set)))
    elif isinstance(value, Iterator):
        items = list(itertools.islice(value, MAX_ITERATED + 1))
        if len(items) > MAX_ITERATED:
            raise TensorParallelError(f"{path} is an iterator of more than {MAX_ITERATED} items; return a list.")
        yield from ((f"[{index}]", item) for index, item in enumerate(items))
    elif isinstance(value, (list, tuple, collections.deque)):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif dataclasses.is_dataclass(value):
        yield from ((f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value))
    elif isinstance(value, weakref.ReferenceType):
        yield ".__class__", type(value)  # what it refers to is someone else's
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
    elif isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        yield from (
            (".__qualname__", value.__qualname__),
            (".__defaults__", value.__defaults__),
            (".__closure__", cells),
        )
    else:
        yield from _fields(value, path)


def _fields(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    cls = type(value)
    yield ".__class__", cls
    names = ("__reduce_ex__", "__reduce__", "__getstate__")
    inherits = all(getattr(cls, name, None) is getattr(object, name, None) for name in names)
    if inherits and hasattr(value, "__dict__"):
        slots = [name for base in cls.__mro__ for name in _slots_of(base) if hasattr(value, name)]
        yield from ((f".{name}", getattr(value, name)) for name in slots)
        yield from ((f".{name}", item) for name, item in vars(value).items())
        return
    try:
        reduced = value.__reduce_ex__(4)
    except Exception as error:
        raise TensorParallelError(
            f"{path} is a {cls.__module__}.{cls.__qualname__}, which cannot be compared between ranks ({error}). Return "
            "tensors, arrays, numbers, text or containers of them."
        ) from error
    if isinstance(reduced, str):
        yield ".name", reduced
        return
    _, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    yield ".arguments", arguments
    yield ".state", state
    yield ".items", None if items is None else list(items)
    yield ".pairs", None if pairs is None else list(pairs)


def _slots_of(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(name for name in slots if not name.startswith("__"))


def _rank_in_set(item: Any) -> tuple[str, Any]:
    if isinstance(item, (bool, int, float)):
        return "number", item
    if isinstance(item, torch.Tensor):
        return "tensor", (tuple(item.shape), float(item.detach().double().sum()))
    return type(item).__qualname__, repr(item)


def is_cache(value: Any) -> bool:
    """Tell whether an object is a key/value cache: not data for a caller but state for the model's next call."""
    if isinstance(value, (Mapping, list, tuple, set, frozenset)) or dataclasses.is_dataclass(value):
        return False
    return callable(getattr(value, "update", None)) or type(value).__module__.startswith("transformers.")


def leaf_difference(value: Any, expected: Any, by_row: bool = False) -> str:
    """Say how a leaf of a result differs from what is expected, as :func:`difference` does."""
    if isinstance(expected, (np.ndarray, np.generic)) and isinstance(value, (np.ndarray, np.generic)):
        value, expected = np.asarray(value), np.asarray(expected)
        if value.dtype != expected.dtype:
            return f"dtype {value.dtype} instead of {expected.dtype}"
        if expected.dtype.kind not in "fc":
            if value.shape != expected.shape:
                return f"shape {value.shape} instead of {expected.shape}"
            return "" if _equal_arrays(value, expected) else "other values"
        wide = np.complex128 if expected.dtype.kind == "c" else np.float64
        value, expected = (torch.from_numpy(np.array(one, dtype=wide)) for one in (value, expected))
    if type(value) in (float, complex) and type(value) is type(expected):
        wide_type = torch.complex128 if type(value) is complex else torch.float64
        value, expected = (torch.tensor(one, dtype=wide_type) for one in (value, expected))
    if isinstance(value, torch.Tensor) and isinstance(expected, torch.Tensor):
        return difference(value, expected, by_row)
    if type(value) is not type(expected):
        return f"a {type(value).__name__} instead of a {type(expected).__name__}"
    return "" if value is expected or bool(value == expected) else "another value"


def _equal_arrays(value: Any, expected: Any) -> bool:
    if expected.dtype != object:
        return bool(np.array_equal(value, expected))
    # Arrays of objects, tensors among them.
    pairs = zip(value.ravel().tolist(), expected.ravel().tolist(), strict=True)
    return all(
        not leaf_difference(one, other)
        for first, second in pairs
        for (_, one), (_, other) in itertools.zip_longest(
            output_leaves(first), output_leaves(second), fillvalue=("", ...)
        )
    )


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


NOTHING_FINITE = "no finite values to compare"


def difference(value: torch.Tensor, expected: torch.Tensor, by_row: bool = False) -> str:
    """Say how a tensor differs from what is expected; empty if it does not.

    Args:
        value: The tensor.
        expected: What is expected.
        by_row: Whether each row of the last dimension is held to its own largest value, not to the tensor's.
    """
    if value.shape != expected.shape:
        return f"shape {tuple(value.shape)} instead of {tuple(expected.shape)}"
    if value.dtype != expected.dtype:
        return f"dtype {value.dtype} instead of {expected.dtype}"
    if value.layout is not torch.strided or value.is_quantized:
        if value.layout is not expected.layout:
            return f"layout {value.layout} instead of {expected.layout}"
        dense = (one.dequantize() if one.is_quantized else one.to_dense() for one in (value, expected))
        value, expected = dense
    if torch.equal(value, expected):
        return ""
    if not (value.is_floating_point() or value.is_complex()):
        return "other values"
    finite = expected.isfinite()
    if not bool(finite.all()):
        apart = ~finite
        same = torch.equal(finite, value.isfinite()) and torch.equal(
            value[apart].nan_to_num(), expected[apart].nan_to_num()
        )
        if not same:
            return "other values"
        if not bool(finite.any()):
            return NOTHING_FINITE
        value, expected = value[finite], expected[finite]
    elif by_row and expected.dim() > 1:
        size = expected.abs()
        allowed = RELATIVE_TOLERANCE * size.amax(-1, keepdim=True) + ROUNDING * size.max()
        return "" if bool(((value - expected).abs() <= allowed).all()) else "values differ in some of its rows"
    error = (value - expected).abs().max().item()
    scale = max(expected.abs().max().item(), 1e-6)
    return "" if error <= RELATIVE_TOLERANCE * scale else f"values differ by {error / scale:.1e} of the largest"
