"""Samples out of a batch or output: a range of them, any of them, one after another, and how many there are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from lightning_gpuorch.predictions.samples.kinds import (
    AmbiguousStructureError,
    CannotSplitError,
    Entries,
    Node,
    OutputLayout,
    children,
    encodings_of,
    entries_of,
    is_mixed,
    node_of,
    rebuild,
)

_Cut = Callable[[Any], Any]
"""Takes a position, a slice or a list of positions; gives the part of one node."""


def slice_samples(tree: Any, start: int, stop: int, size: int | None, layout: OutputLayout | None = None) -> Any:
    """The samples ``start`` to ``stop`` of a batch or output.

    Tensors and arrays are views of the given ones.

    Args:
        tree: A batch or output of ``size`` samples.
        start: First sample.
        stop: One past the last sample.
        size: Samples in ``tree``.
        layout: Given for an output, with what is known of the step's outputs, or empty. It tells columns from samples,
            and says that in a list of columns every entry has the sample dimension, as is the rule for outputs.

    Returns:
        A tree of the same structure.

    Raises:
        CannotSplitError: Nothing in ``tree`` has one entry per sample, or ``size`` is None.
        AmbiguousStructureError: A list can be read as samples or as columns, or an object is of a type that may or may
            not have a sample dimension.
    """
    if size is None:
        raise CannotSplitError("the number of samples is not known, so this cannot be cut by sample.")
    if start == 0 and stop == size:
        return tree
    return _Cutter(size, layout).of(tree)(slice(start, stop))


def take_samples(tree: Any, rows: list[int], size: int, layout: OutputLayout | None) -> Any:
    """Some samples of a batch or output, in any order.

    Args:
        tree: The batch or output of ``size`` samples.
        rows: Which samples.
        size: Samples in ``tree``.
        layout: What is known of the step's outputs; None for a batch.

    Returns:
        A tree of the same structure with new tensors and arrays; where nothing in an output has a sample dimension
        (``None``, a constant), the tree itself.

    Raises:
        CannotSplitError: A container cannot be rebuilt, or nothing in a batch has one entry per sample.
        AmbiguousStructureError: A list can be read as samples or as columns.
    """
    return _Cutter(size, layout).of(tree, require=layout is None)(rows)


def iter_samples(tree: Any, size: int | None, layout: OutputLayout | None = None) -> Iterator[Any]:
    """The part of each sample alone, without the sample dimension.

    Args:
        tree: The output of a batch.
        size: Samples in it; None takes :func:`batch_size_of`.
        layout: What is known of the step's outputs.

    Yields:
        A tree per sample, in order; what has no sample dimension is in each.

    Raises:
        CannotSplitError: Nothing in ``tree`` has one entry per sample.
        AmbiguousStructureError: A list can be read as samples or as columns.
    """
    count = batch_size_of(tree) if size is None else size
    if count:
        cut = _Cutter(count, layout if layout is not None else OutputLayout()).of(tree)
        yield from map(cut, range(count))


def batch_size_of(tree: Any) -> int:
    """How many samples a batch has, by its tensors' first dimensions, or its lists' lengths if it has no tensors.

    A guess from structure: take the number of sample indices instead wherever there is one.

    Args:
        tree: A batch.

    Raises:
        CannotSplitError: Nothing has a sample dimension.
        AmbiguousStructureError: Different answers are possible.
    """
    arrays: set[int] = set()
    lists: set[int] = set()
    _collect_sizes(tree, arrays, lists)
    sizes = arrays or lists
    if not sizes:
        raise CannotSplitError(f"nothing in this {type(tree).__name__} has a sample dimension.")
    if len(sizes) > 1:
        raise AmbiguousStructureError(
            f"the number of samples in this {type(tree).__name__} cannot be told: first dimensions are {sorted(sizes)}."
        )
    return sizes.pop()


class _Cutter:
    """Builds the function that cuts a tree: what each node is gets decided once, not once per sample."""

    def __init__(self, size: int, layout: OutputLayout | None):
        self._size, self._layout = size, layout
        self._root = "batch" if layout is None else "output"
        self._found = False

    def of(self, tree: Any, require: bool = True) -> _Cut:
        cut = self._cut(tree, "")
        if require and not self._found:
            raise CannotSplitError(f"nothing in this {type(tree).__name__} has {self._size} entries, one per sample.")
        return cut

    def _cut(self, value: Any, path: str) -> _Cut:
        node = node_of(value)
        if node is Node.OPAQUE:
            raise AmbiguousStructureError(
                f"{self._root}{path} is a {type(value).__name__}: nothing tells whether it has a sample dimension."
            )
        if node is Node.ARRAY:
            by_sample = value.ndim > 0 and value.shape[0] == self._size
        else:
            by_sample = node is Node.SEQUENCE and self._is_per_sample(value, path)
        if by_sample:
            self._found = True
            return value.__getitem__ if node is Node.ARRAY else functools.partial(_entries, value)
        if node in (Node.ARRAY, Node.CONSTANT):
            return lambda where: value
        cuts = [self._cut(item, path + name) for name, item in children(value, node)]
        encodings = encodings_of(value)
        if encodings is None:
            return lambda where: rebuild(value, node, [cut(where) for cut in cuts])
        return lambda where: rebuild(
            value,
            node,
            [cut(where) for cut in cuts],
            [encodings[where]] if isinstance(where, int) else _entries(encodings, where),
        )

    def _is_per_sample(self, value: Any, path: str) -> bool:
        known = None if self._layout is None else self._layout.per_sample(path)
        if known is not None:
            if known and len(value) != self._size:
                raise CannotSplitError(
                    f"{self._root}{path} has {len(value)} entries for {self._size} samples; it had one for each before."
                )
            return known
        if len(value) != self._size:
            return False
        entries = entries_of(value, self._size)
        if entries is Entries.COLUMNS:
            return False
        # A list of columns may hold one without the sample dimension (say, weights) in a batch, but not in an output.
        open_question = entries is Entries.UNCLEAR or (entries is Entries.RAGGED and self._layout is None)
        if not open_question and isinstance(value, tuple) and self._layout is None:
            open_question = any(node_of(entry) is Node.OPAQUE for entry in value)
        if open_question:
            raise AmbiguousStructureError(
                f"{self._root}{path} is a {type(value).__name__} of {len(value)} entries for {self._size} samples: "
                f"they may be one per sample, or {len(value)} columns. Use a dict for columns."
            )
        return True


def _entries(sequence: Any, where: Any) -> Any:
    if not isinstance(where, list):
        return sequence[where]
    entries = [sequence[row] for row in where]
    return entries if isinstance(sequence, range) else type(sequence)(entries)


def _collect_sizes(value: Any, arrays: set[int], lists: set[int]) -> None:
    node = node_of(value)
    if node is Node.ARRAY:
        if value.ndim:
            arrays.add(int(value.shape[0]))
        return
    if node is not Node.SEQUENCE:
        for _, item in children(value, node):
            _collect_sizes(item, arrays, lists)
        return
    inner_arrays: set[int] = set()
    inner_lists: set[int] = set()
    for entry in value:
        _collect_sizes(entry, inner_arrays, inner_lists)
    inner = inner_arrays or inner_lists
    if not inner:
        lists.add(len(value))
    elif is_mixed(value) or _shapes_differ_behind_the_first(value):
        arrays |= inner_arrays
        lists |= inner_lists
    elif len(inner) > 1:  # alike but for their first dimension: samples of different length
        (arrays if inner_arrays else lists).add(len(value))
    else:  # either columns that share the sample dimension or samples of one shape
        (arrays if inner_arrays else lists).update(inner | {len(value)})


def _shapes_differ_behind_the_first(entries: Any) -> bool:
    return len({tuple(entry.shape[1:]) for entry in entries if node_of(entry) is Node.ARRAY}) > 1
