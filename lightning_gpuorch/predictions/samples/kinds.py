"""What a node of a batch or output is, and what is known of how a step lays out its outputs."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import decimal
import fractions
import itertools
import pathlib
import types
import uuid
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from enum import Enum, auto
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

from lightning_gpuorch.errors import EXIT_CONFIGURATION, GPUOrchError


class CannotSplitError(GPUOrchError):
    """A batch or output has no sample dimension along which it could be cut."""


class CannotMergeError(GPUOrchError):
    """The outputs of the parts of a batch do not add up to the output of the whole."""

    exit_code = EXIT_CONFIGURATION


class AmbiguousStructureError(CannotSplitError, CannotMergeError):
    """There is more than one way to read the structure, and nothing tells which is right."""


class NotKept:
    """Stands in the place of an output that is not kept, whatever its samples are."""

    def __repr__(self) -> str:
        return "NOT_KEPT"


NOT_KEPT = NotKept()


class Node(Enum):
    """How a value is treated."""

    ARRAY = auto()
    MAPPING = auto()
    RECORD = auto()
    """A dataclass instance."""
    FIELDS = auto()
    """A named tuple, or a result type of torch such as that of ``torch.max``."""
    SEQUENCE = auto()
    CONSTANT = auto()
    OPAQUE = auto()
    """Anything else: it may or may not have a sample dimension."""


_CONSTANTS = (
    type(None),
    NotKept,
    str,
    bytes,
    int,
    float,
    complex,
    np.generic,
    Enum,
    torch.dtype,
    torch.device,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    decimal.Decimal,
    fractions.Fraction,
    pathlib.PurePath,
    uuid.UUID,
)


_LONGEST_RANGE = 2**20
"""Of one that is taken for a list with an entry for each sample."""


def node_of(value: Any) -> Node:
    """Classify a value."""
    if isinstance(value, torch.Tensor):
        return Node.OPAQUE if value.is_nested or value.layout is not torch.strided else Node.ARRAY
    if isinstance(value, np.ndarray):
        return Node.ARRAY
    if isinstance(value, _CONSTANTS):
        return Node.CONSTANT
    if type(value).__module__.startswith("scipy.sparse"):
        return Node.OPAQUE  # one kind of them is a dict, whose entries are not its keys' values
    if isinstance(value, Mapping):
        return Node.MAPPING
    if dataclasses.is_dataclass(value):
        return Node.RECORD
    if isinstance(value, range) and value[_LONGEST_RANGE:]:
        return Node.CONSTANT  # it has any length, and no entries in memory
    if type(value) in (list, tuple, range) or isinstance(value, list):
        return Node.SEQUENCE
    if isinstance(value, tuple) and not isinstance(value, (PackedSequence, torch.Size)):
        return Node.FIELDS
    return Node.OPAQUE


def children(value: Any, node: Node) -> Iterator[tuple[str, Any]]:
    """The parts of a container and how each is written behind the container's name: ``['x']``, ``.x`` or ``[0]``."""
    if node is Node.MAPPING:
        for key in value:
            yield f"[{key!r}]", value[key]
    elif node is Node.RECORD:
        for field in dataclasses.fields(value):
            # An init=False field may not have been set yet.
            if hasattr(value, field.name):
                yield f".{field.name}", getattr(value, field.name)
    elif node is Node.FIELDS and hasattr(value, "_fields"):
        for name, item in zip(value._fields, value, strict=True):
            yield f".{name}", item
    elif node in (Node.FIELDS, Node.SEQUENCE):
        for position, item in enumerate(value):
            yield f"[{position}]", item


def rebuild(template: Any, node: Node, items: list[Any], encodings: Any = None) -> Any:
    """Make a container like ``template`` with other parts.

    Args:
        template: A container.
        node: What it is.
        items: New parts, in the order of :func:`children`.
        encodings: The tokenizer's per-sample encodings, for a ``BatchEncoding``.

    Raises:
        CannotSplitError: The class cannot be built from parts.
    """
    if node is Node.MAPPING:
        return _rebuild_mapping(template, dict(zip(template, items, strict=True)), encodings)
    if node is Node.RECORD:
        return _rebuild_record(template, items)
    if hasattr(template, "_fields"):
        return type(template)._make(items)
    return list(items) if isinstance(template, range) else type(template)(items)


def _rebuild_mapping(template: Any, items: dict[Any, Any], encodings: Any) -> Any:
    if type(template) is dict:
        return items
    if encodings is not None:
        return type(template)(items, encoding=encodings, n_sequences=template.n_sequences)
    try:
        if not isinstance(template, MutableMapping):
            return type(template)(items)
        clone = copy.copy(template)
        for key, item in items.items():
            clone[key] = item
    except Exception as error:
        raise CannotSplitError(
            f"a {type(template).__name__} cannot be rebuilt from other values ({error}); use a dict."
        ) from error
    return clone


def _rebuild_record(template: Any, items: list[Any]) -> Any:
    fields = [field for field in dataclasses.fields(template) if hasattr(template, field.name)]
    values = {field.name: item for field, item in zip(fields, items, strict=True)}
    if not type(template).__dataclass_params__.init:  # its own __init__ takes who knows what
        clone = copy.copy(template)
    else:
        # Through __init__, so that what __post_init__ derives from the fields belongs to the new ones.
        try:
            clone = dataclasses.replace(template, **{field.name: values[field.name] for field in fields if field.init})
        except (TypeError, ValueError) as error:
            raise CannotSplitError(
                f"a {type(template).__name__} cannot be rebuilt from its fields ({error}); use a dict."
            ) from error
    for field in fields:
        derived = field.init is False and hasattr(clone, field.name)
        if not (derived and node_of(values[field.name]) is Node.CONSTANT):
            object.__setattr__(clone, field.name, values[field.name])
    return clone


def encodings_of(value: Any) -> Any:
    """The tokenizer's encodings, one per sample, that a ``BatchEncoding`` carries; None for anything else."""
    if isinstance(value, Mapping) and hasattr(type(value), "encodings") and hasattr(type(value), "n_sequences"):
        return value.encodings  # type: ignore[attr-defined]
    return None


def has_samples(value: Any, size: int) -> bool:
    """Whether something in ``value`` has ``size`` entries along its first dimension."""
    node = node_of(value)
    if node is Node.ARRAY:
        return bool(value.ndim > 0 and value.shape[0] == size)
    if node is Node.SEQUENCE and len(value) == size:
        return True
    return any(has_samples(item, size) for _, item in children(value, node))


class Entries(Enum):
    """What the entries of a list with one for each sample tell of whether they are samples or columns."""

    SAMPLES = auto()
    """Nothing in them has as many entries as there are samples."""
    RAGGED = auto()
    """Something in some of them has: samples of different length, or columns of which some hold no samples."""
    UNCLEAR = auto()
    """Something in each of them has, or in some, and they differ within."""
    COLUMNS = auto()
    """They are of different kinds, as columns are and samples are not."""


def entries_of(sequence: Any, size: int) -> Entries:
    """Look at the entries of a list that has one for each of ``size`` samples; those that hold nothing tell nothing."""
    told = [entry for entry in sequence if not _is_empty(entry)]
    batched = [has_samples(entry, size) for entry in told]
    if not any(batched):
        return Entries.SAMPLES
    if is_mixed(told):
        return Entries.COLUMNS
    alike = all(_are_alike(one, other) for one, other in itertools.pairwise(told))
    return Entries.UNCLEAR if all(batched) or not alike else Entries.RAGGED


def is_mixed(sequence: Any) -> bool:
    """Whether the entries are of different kinds, as columns are and samples are not; None says nothing."""
    return len({_signature(entry) for entry in sequence if entry is not None}) > 1


def _is_keyed(value: Any) -> bool:
    return node_of(value) in (Node.MAPPING, Node.RECORD, Node.FIELDS)


def _is_empty(value: Any) -> bool:
    """Whether there is nothing but None."""
    if not _is_keyed(value):
        return value is None
    return all(_is_empty(item) for _, item in children(value, node_of(value)))


def _are_alike(one: Any, other: Any) -> bool:
    """Whether both are the same kind of thing, with the same keys and the same kinds of things under them."""
    if _is_empty(one) or _is_empty(other):
        return True
    if _signature(one) != _signature(other):
        return False
    if not _is_keyed(one):
        return True
    items, others = (dict(children(value, node_of(value))) for value in (one, other))
    return items.keys() == others.keys() and all(_are_alike(items[name], others[name]) for name in items)


def _signature(value: Any) -> Any:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return type(value), value.dtype, value.ndim
    return "number" if isinstance(value, (int, float, np.generic)) else type(value)


class OutputLayout:
    """What outputs of one step tell about how it lays them out.

    Three questions have no answer in a single output, and are answered by outputs of batches of other sizes: whether a
    list has one entry per sample or is structure; whether a dimension that happens to be as long as the batch is the
    batch once more (a similarity matrix), so that parts cannot be joined; whether a number counts the samples.
    """

    def __init__(self) -> None:
        self._per_sample: dict[str, bool] = {}
        self._lengths: dict[str, int] = {}
        self._independent: set[tuple[str, int]] = set()
        self._sizes: set[int] = set()

    def __repr__(self) -> str:
        return f"OutputLayout(per_sample={self._per_sample})"

    def knows_size(self, size: int) -> bool:
        """Whether an output of a batch of this size was learned from."""
        return size in self._sizes

    def has_seen_other_than(self, sizes: set[int]) -> bool:
        """Whether an output of a batch of yet another size was learned from."""
        return not self._sizes <= sizes

    def learn(self, output: Any, size: int) -> None:
        """Take in the output of a batch that was computed as a whole.

        Args:
            output: The output.
            size: Samples in the batch.
        """
        self._sizes.add(size)
        self._learn(output, size, "")

    def per_sample(self, path: str) -> bool | None:
        """Whether the list at ``path`` has an entry per sample (True) or is structure (False); None if not known."""
        return self._per_sample.get(path)

    def set_per_sample(self, path: str, value: bool) -> None:
        """Note what the list at ``path`` was proven to be."""
        self._per_sample[path] = value

    def is_independent(self, path: str, dimension: int) -> bool:
        """Whether this dimension (-1: the number itself) was seen with another value than the batch's size."""
        return (path, dimension) in self._independent

    def _learn(self, value: Any, size: int, path: str) -> None:
        node = node_of(value)
        if node is Node.ARRAY:
            self._independent.update((path, d) for d in range(1, value.ndim) if value.shape[d] != size)
        elif node is Node.CONSTANT:
            if isinstance(value, int) and value != size:
                self._independent.add((path, -1))
        elif node is Node.SEQUENCE and self._learn_sequence(value, size, path):
            return
        for name, item in children(value, node):
            self._learn(item, size, path + name)

    def _learn_sequence(self, value: Any, size: int, path: str) -> bool:
        """Returns whether the walk ends here: the list has an entry per sample, or nobody knows."""
        if len(value) != size:
            self._per_sample[path] = False  # proof, whatever was thought before
        elif path not in self._per_sample:
            if self._lengths.setdefault(path, size) != size:
                self._per_sample[path] = True  # its length followed the batch's size
            elif size > 1:
                entries = entries_of(value, size)
                if entries is Entries.COLUMNS:
                    self._per_sample[path] = False
                elif entries is not Entries.UNCLEAR and not isinstance(value, tuple):
                    self._per_sample[path] = True
        return self._per_sample.get(path) is not False


def map_arrays(tree: Any, convert: Callable[[Any], Any]) -> Any:
    """Apply ``convert`` to every tensor and array of a tree.

    Args:
        tree: A batch or output.
        convert: Gives the replacement of a tensor or array.

    Returns:
        A tree of the same structure; objects of unknown type are the same ones.
    """
    node = node_of(tree)
    if node is Node.ARRAY:
        return convert(tree)
    if node in (Node.CONSTANT, Node.OPAQUE) or isinstance(tree, range):
        return tree
    items = [map_arrays(item, convert) for _, item in children(tree, node)]
    return rebuild(tree, node, items, encodings_of(tree))
