"""One output out of the outputs of a batch's parts, exactly as the whole batch would have given it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_gpuorch.predictions.samples.kinds import (
    AmbiguousStructureError,
    CannotMergeError,
    Entries,
    Node,
    OutputLayout,
    children,
    encodings_of,
    entries_of,
    node_of,
    rebuild,
)

_ADVICE = "Return one value per sample and reduce them afterwards."


def merge_samples(parts: Sequence[Any], sizes: Sequence[int], layout: OutputLayout | None = None) -> Any:
    """Put the outputs of consecutive parts of a batch together.

    Args:
        parts: Outputs, in the order of the samples.
        sizes: Samples of each.
        layout: What is known of the step's outputs. Given one, nothing is taken on trust: what parts of equal size
            leave open raises :class:`AmbiguousStructureError`, and parts of unequal size answer it. What was found is
            noted in it.

    Returns:
        The output of the whole batch. Tensors are new, unless there is one part only.

    Raises:
        CannotMergeError: The parts have different structure, or hold a reduction over the batch.
        AmbiguousStructureError: It depends on the reading of a list or dimension, see above.
        ValueError: No parts, or as many sizes as there are not parts.
    """
    if not parts or len(parts) != len(sizes):
        raise ValueError(f"{len(parts)} parts and {len(sizes)} sizes; give one size per part, and at least one part.")
    return parts[0] if len(parts) == 1 else _Merger(list(sizes), layout).merge(list(parts), "")


class _Merger:
    def __init__(self, sizes: list[int], layout: OutputLayout | None):
        self._sizes, self._layout = sizes, layout
        self._equal_size = sizes[0] if len(set(sizes)) == 1 else None

    def merge(self, parts: list[Any], path: str) -> Any:
        first = parts[0]
        if any(type(part) is not type(first) for part in parts):
            kinds = sorted({type(part).__name__ for part in parts})
            raise CannotMergeError(f"output{path} differs in type between parts of a batch: {', '.join(kinds)}.")
        node = node_of(first)
        if node is Node.ARRAY:
            return self._merge_arrays(parts, path)
        if node is Node.CONSTANT:
            return self._merge_constants(parts, path)
        if node is Node.OPAQUE:
            if all(part is first for part in parts):
                return first
            raise CannotMergeError(
                f"output{path} is a {type(first).__name__}, which cannot be put together from parts. Return tensors, "
                "arrays, lists with one entry per sample, or dicts of such."
            )
        if node is Node.SEQUENCE and self._is_per_sample(parts, path):
            joined = [entry for part in parts for entry in part]
            return joined if isinstance(first, range) else type(first)(joined)
        return self._merge_containers(parts, node, path)

    def _merge_containers(self, parts: list[Any], node: Node, path: str) -> Any:
        names = [[name for name, _ in children(part, node)] for part in parts]
        if any(sorted(part) != sorted(names[0]) for part in names):
            raise CannotMergeError(
                f"output{path} has different entries in parts of a batch: {', '.join(names[0]) or 'none'} in one, "
                f"{', '.join(next(part for part in names if sorted(part) != sorted(names[0]))) or 'none'} in another."
            )
        columns = [dict(children(part, node)) for part in parts]
        items = [self.merge([column[name] for column in columns], path + name) for name in names[0]]
        encodings = [encodings_of(part) for part in parts]
        if any(encoding is None for encoding in encodings):
            return rebuild(parts[0], node, items)
        return rebuild(parts[0], node, items, [entry for encoding in encodings for entry in encoding])

    def _merge_arrays(self, parts: list[Any], path: str) -> Any:
        first = parts[0]
        if not all(part.ndim and part.shape[0] == size for part, size in zip(parts, self._sizes, strict=True)):
            if first.ndim and all(_same_bits(part, first) for part in parts[1:]):
                return first
            raise CannotMergeError(
                f"output{path} has shape {tuple(first.shape)} for {self._sizes[0]} samples, not one entry each: a "
                f"reduction over the batch cannot be put together from parts. {_ADVICE}"
            )
        if any(part.shape[1:] != first.shape[1:] or part.dtype != first.dtype for part in parts):
            shapes = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in parts)
            raise CannotMergeError(
                f"output{path} differs in shape or dtype between parts of a batch: {shapes}. If it is padded to the "
                "longest sample, return a list with one tensor per sample."
            )
        for dimension in range(1, first.ndim):
            # With equal parts a similarity matrix of the batch with itself looks like any other output.
            if self._is_open(path, dimension, first.shape[dimension]) and self._equal_size != 1:
                raise AmbiguousStructureError(
                    f"output{path} has shape {tuple(first.shape)} for {self._equal_size} samples: dimension "
                    f"{dimension} may be the batch once more, which cannot be put together from parts. {_ADVICE}"
                )
        if isinstance(first, torch.Tensor):
            return torch.cat(parts)
        if isinstance(first, np.ma.MaskedArray):
            return np.ma.concatenate(parts)  # type: ignore[no-untyped-call]
        return np.concatenate(parts)

    def _merge_constants(self, parts: list[Any], path: str) -> Any:
        first = parts[0]
        for part in parts:
            if not (part == first or (part != part and first != first)):  # NaN equals NaN here
                raise CannotMergeError(
                    f"output{path} is {first!r} for one part of a batch and {part!r} for another: a value of the whole "
                    f"batch cannot be put together from parts. {_ADVICE}"
                )
        if isinstance(first, int) and not isinstance(first, bool) and self._is_open(path, -1, first):
            raise AmbiguousStructureError(
                f"output{path} is {first} for {first} samples: it may count them, and then it cannot be put together "
                f"from parts. {_ADVICE}"
            )
        return first

    def _is_open(self, path: str, dimension: int, length: int) -> bool:
        """Whether this length may or may not follow the size of the batch; asked only for those given a layout."""
        layout = self._layout
        return layout is not None and length == self._equal_size and not layout.is_independent(path, dimension)

    def _is_per_sample(self, parts: list[Any], path: str) -> bool:
        known = None if self._layout is None else self._layout.per_sample(path)
        follows = all(len(part) == size for part, size in zip(parts, self._sizes, strict=True))
        alike = len({len(part) for part in parts}) == 1
        if not (follows or alike) or (known and not follows) or (known is False and not alike):
            raise CannotMergeError(
                f"output{path} has {', '.join(str(len(part)) for part in parts)} entries for parts of "
                f"{', '.join(map(str, self._sizes))} samples: neither one per sample nor the same number in each."
            )
        if known is not None:
            return known
        if follows != alike:
            if self._layout is not None:
                self._layout.set_per_sample(path, follows)
            return follows
        return self._read_equal_parts(parts, path)

    def _read_equal_parts(self, parts: list[Any], path: str) -> bool:
        """Every part has as many entries as samples, and all have the same number."""
        size = self._sizes[0]
        entries = {entries_of(part, size) for part in parts}
        if Entries.COLUMNS in entries:
            return False
        strict = self._layout is not None and size > 1
        if entries == {Entries.UNCLEAR} or (isinstance(parts[0], tuple) and size > 1) or strict:
            raise AmbiguousStructureError(
                f"output{path} is a {type(parts[0]).__name__} of {size} entries for {size} samples: they may be one "
                f"per sample, or {size} columns. Return a dict for columns."
            )
        return True


def _same_bits(one: Any, other: Any) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if isinstance(one, torch.Tensor):
        return bool(torch.equal(one, other))
    return bool(np.array_equal(one, other))
