"""The sample dimension of nested batches and outputs: cut, merge and walk them by sample."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_gpuorch.errors import GPUOrchError


class CannotSplitError(GPUOrchError):
    """An output has no sample dimension that could be told."""


class CannotMergeError(GPUOrchError):
    """Outputs of parts of a batch do not add up to the output of the whole."""


def slice_samples(tree: Any, start: int, stop: int, size: int | None) -> Any:
    """The samples ``start`` to ``stop`` of a batch or output.

    Args:
        tree: Tensors and arrays whose first dimension is the sample, lists with an entry per sample, and containers.
        start: First sample.
        stop: One past the last.
        size: Samples in ``tree``.

    Raises:
        CannotSplitError: Nothing in ``tree`` is cut by sample.
    """
    if size is None:
        raise CannotSplitError("the number of samples is not known, so the output cannot be cut by sample.")
    found = [False]
    cut = _slice(tree, start, stop, size, found)
    if not found[0]:
        raise CannotSplitError(f"nothing in this {type(tree).__name__} has {size} entries, one per sample.")
    return cut


def merge_samples(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Put outputs of consecutive parts of a batch together.

    Args:
        parts: Outputs in order.
        sizes: Samples of each.

    Raises:
        CannotMergeError: The outputs have different structure, or hold a reduction over the batch.
    """
    return _merge(list(parts), list(sizes), "output")


def iter_samples(tree: Any, size: int | None) -> Iterator[Any]:
    """The output of each sample alone, without the sample dimension.

    Args:
        tree: Output of a batch.
        size: Samples in it; None guesses it from the first tensor or list.
    """
    count = size if size is not None else batch_size_of(tree)
    for position in range(count):
        found = [False]
        sample = _pick(tree, position, count, found)
        if not found[0]:
            raise CannotSplitError(f"nothing in this {type(tree).__name__} has {count} entries, one per sample.")
        yield sample


def batch_size_of(tree: Any) -> int:
    """Samples in a batch: the first dimension its tensors share, else the length its lists share.

    Raises:
        CannotSplitError: There is none, or there are several.
    """
    tensors, lists = set(), set()
    for leaf in _leaves(tree):
        if isinstance(leaf, (torch.Tensor, np.ndarray)):
            if leaf.ndim:
                tensors.add(int(leaf.shape[0]))
        elif isinstance(leaf, list):
            lists.add(len(leaf))
    sizes = tensors or lists
    if len(sizes) != 1:
        raise CannotSplitError(f"the number of samples cannot be told: first dimensions are {sorted(sizes)}.")
    return sizes.pop()


def _is_array(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray))


def _is_plain_list(value: Any) -> bool:
    """A list with an entry per sample, rather than a container of batched things."""
    return isinstance(value, list) and not any(_is_array(v) or isinstance(v, (Mapping, list, tuple)) for v in value)


def _leaves(tree: Any) -> Iterator[Any]:
    if _is_array(tree) or _is_plain_list(tree):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _leaves(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from _leaves(getattr(tree, field.name))


def _holds(tree: Any, size: int) -> bool:
    return any(len(leaf) == size for leaf in _leaves(tree) if not (_is_array(leaf) and not leaf.ndim))


def _rebuild(tree: Any, convert: Callable[[Any], Any]) -> Any:
    """Apply ``convert`` to the items of a container, and make a container of the same kind."""
    if isinstance(tree, Mapping):
        items = {key: convert(value) for key, value in tree.items()}
        if type(tree) is dict:
            return items
        clone = copy.copy(tree)
        for key, value in items.items():
            clone[key] = value  # type: ignore[index]
        return clone
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(convert(value) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(convert(value) for value in tree)
    clone = copy.copy(tree)
    for field in dataclasses.fields(tree):
        object.__setattr__(clone, field.name, convert(getattr(tree, field.name)))
    return clone


def _is_container(tree: Any) -> bool:
    return isinstance(tree, (Mapping, list, tuple)) or (dataclasses.is_dataclass(tree) and not isinstance(tree, type))


def _per_sample(tree: Any, size: int) -> bool:
    """Whether a list holds one entry per sample; where its entries are batched themselves, it is structure."""
    return isinstance(tree, list) and len(tree) == size and not all(_holds(entry, size) for entry in tree)


def _slice(tree: Any, start: int, stop: int, size: int, found: list[bool]) -> Any:
    if (_is_array(tree) and tree.ndim and tree.shape[0] == size) or _per_sample(tree, size):
        found[0] = True
        return tree[start:stop]
    if _is_container(tree):
        return _rebuild(tree, lambda value: _slice(value, start, stop, size, found))
    return tree


def _pick(tree: Any, position: int, size: int, found: list[bool]) -> Any:
    if (_is_array(tree) and tree.ndim and tree.shape[0] == size) or _per_sample(tree, size):
        found[0] = True
        return tree[position]
    if _is_container(tree):
        return _rebuild(tree, lambda value: _pick(value, position, size, found))
    return tree


def _merge(parts: list[Any], sizes: list[int], path: str) -> Any:
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(type(part) is not type(first) for part in parts):
        kinds = sorted({type(part).__name__ for part in parts})
        raise CannotMergeError(f"{path} is a different type in parts of the same batch: {kinds}.")
    if _is_array(first):
        if first.ndim and all(part.ndim and part.shape[0] == size for part, size in zip(parts, sizes, strict=True)):
            return torch.cat(parts) if isinstance(first, torch.Tensor) else np.concatenate(parts)
        raise CannotMergeError(
            f"{path} has shape {tuple(first.shape)} and no entry per sample: a reduction over the batch cannot be put "
            "together from parts. Return per-sample values and reduce them afterwards."
        )
    if all(_per_sample(part, size) for part, size in zip(parts, sizes, strict=True)):
        return [entry for part in parts for entry in part]
    if isinstance(first, Mapping):
        if any(part.keys() != first.keys() for part in parts):
            raise CannotMergeError(f"{path} has different keys in parts of the same batch.")
        merged = {key: _merge([part[key] for part in parts], sizes, f"{path}[{key!r}]") for key in first}
        return _with_items(first, merged)
    if isinstance(first, (list, tuple)):
        if len({len(part) for part in parts}) != 1:
            raise CannotMergeError(f"{path} has different lengths in parts of the same batch, and none per sample.")
        items = [_merge(list(column), sizes, f"{path}[{i}]") for i, column in enumerate(zip(*parts, strict=True))]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if _is_container(first):
        clone = copy.copy(first)
        for field in dataclasses.fields(first):
            values = [getattr(part, field.name) for part in parts]
            object.__setattr__(clone, field.name, _merge(values, sizes, f"{path}.{field.name}"))
        return clone
    if all(part == first for part in parts):
        return first
    raise CannotMergeError(
        f"{path} is {first!r} in one part of a batch and {next(p for p in parts if p != first)!r} in another: a value per "
        "batch cannot be put together. Return per-sample values."
    )


def _with_items(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    return items if type(mapping) is dict else _rebuild(mapping, _Next(items.values()))


class _Next:
    """Gives one prepared value after another."""

    def __init__(self, values: Any):
        self._values = iter(values)

    def __call__(self, _: Any) -> Any:
        return next(self._values)
