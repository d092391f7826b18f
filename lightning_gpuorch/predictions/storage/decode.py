"""How do the nodes and columns of :mod:`lightning_gpuorch.predictions.storage.encode` become a prediction again?"""

from __future__ import annotations

import collections
import dataclasses
import functools
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from lightning_gpuorch.errors import CorruptPartError
from lightning_gpuorch.predictions.storage.encode import (
    NUMPY_DTYPES,
    OPAQUE_DTYPES,
    TORCH_DTYPES,
    Node,
    dict_base,
    is_struct_sequence,
)


class ColumnReader(Protocol):
    """Where :func:`decode_tree` finds the columns of a tree."""

    def dtype(self, column: int) -> str:
        """Return the safetensors dtype of a column."""
        ...

    def shape(self, column: int) -> tuple[int, ...]:
        """Return the shape of a column."""
        ...

    def buffer(self, column: int) -> memoryview:
        """Return the bytes of a column, valid while the reader lives; the decoder copies them."""
        ...


def decode_tree(node: Node, columns: ColumnReader) -> Any:
    """Rebuild a prediction.

    Args:
        node: What :meth:`TreeEncoder.encode` returned.
        columns: The columns that were collected with it.

    Returns:
        The prediction. It owns its memory: tensors and arrays are writable and independent of ``columns``.

    Raises:
        CorruptPartError: The node is not one of this format.
    """
    if not isinstance(node, list):
        return node
    try:
        decode = _DECODERS[node[0]]
    except (KeyError, IndexError, TypeError):
        raise CorruptPartError(f"unknown node {str(node)[:80]!r}; was it written by a newer version?") from None
    return decode(columns, *node[1:])


def _decode_all(columns: ColumnReader, nodes: Sequence[Node]) -> list[Any]:
    return [decode_tree(node, columns) for node in nodes]


def _decode_tensor(
    columns: ColumnReader, column: int, opaque: str | None = None, shape: Sequence[int] | None = None
) -> torch.Tensor:
    dtype = TORCH_DTYPES[columns.dtype(column)] if opaque is None else OPAQUE_DTYPES[opaque]
    tensor = torch.empty(tuple(columns.shape(column) if shape is None else shape), dtype=dtype)
    if tensor.numel():
        tensor.reshape(-1).view(torch.uint8).numpy()[:] = np.frombuffer(columns.buffer(column), np.uint8)
    return tensor


def _decode_ndarray(
    columns: ColumnReader, column: int, dtype: str | None = None, shape: Sequence[int] | None = None
) -> np.ndarray[Any, Any]:
    element = NUMPY_DTYPES[columns.dtype(column)] if dtype is None else np.dtype(dtype)
    size = tuple(columns.shape(column) if shape is None else shape)
    # An element may have no bytes (dtype "<U0"): there is nothing to read then.
    if 0 in size or element.itemsize == 0:
        return np.zeros(size, element)
    array: np.ndarray[Any, Any] = np.frombuffer(columns.buffer(column), element).reshape(size).copy()
    return array


def _decode_numpy_scalar(_columns: ColumnReader, dtype: str, raw: str) -> np.generic:
    element = np.dtype(dtype)
    scalar: np.generic = np.frombuffer(bytes.fromhex(raw), element)[0] if element.itemsize else element.type()
    return scalar


def _unpack(columns: ColumnReader, kind: str, column: int, lengths_column: int | None = None) -> list[Any]:
    buffer = columns.buffer(column)
    if lengths_column is not None:
        joined: Any = bytes(buffer) if kind == "bytes" else str(buffer, "utf-8", "surrogatepass")
        ends = np.frombuffer(columns.buffer(lengths_column), "<i8").cumsum().tolist()
        return [joined[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    numbers: list[Any] = np.frombuffer(buffer, {"bool": "?", "float": "<f8", "int": "<i8"}[kind]).tolist()
    return numbers


def _decode_sequence(make: Callable[[list[Any]], Any], columns: ColumnReader, nodes: Any, *packed: Any) -> Any:
    return make(_unpack(columns, *packed) if packed else _decode_all(columns, nodes))


def _decode_namedtuple(columns: ColumnReader, class_name: str, fields: list[str], nodes: list[Node]) -> Any:
    cls = _loaded_class(class_name)
    if cls is None or not issubclass(cls, tuple) or getattr(cls, "_fields", None) != tuple(fields):
        cls = _fresh_namedtuple(class_name.rpartition(".")[2].rpartition(":")[2], tuple(fields))
    return tuple.__new__(cls, _decode_all(columns, nodes))


@functools.cache
def _fresh_namedtuple(name: str, fields: tuple[str, ...]) -> type[tuple[Any, ...]]:
    return collections.namedtuple(name, fields)


def _decode_struct_sequence(columns: ColumnReader, class_name: str, nodes: list[Node]) -> Any:
    cls = _loaded_class(class_name)
    values = _decode_all(columns, nodes)
    if cls is None or not is_struct_sequence(cls) or cls.n_sequence_fields != len(values):  # type: ignore[attr-defined]
        return tuple(values)
    return cls(values)


def _decode_dict(columns: ColumnReader, keys: list[Node], values: list[Node]) -> dict[Any, Any]:
    return dict(zip(_decode_all(columns, keys), _decode_all(columns, values), strict=True))


def _decode_mapping(
    columns: ColumnReader, class_name: str, keys: list[Node], values: list[Node], names: list[str], nodes: list[Node]
) -> Any:
    items = _decode_dict(columns, keys, values)
    cls = _loaded_class(class_name)
    if cls is None or not issubclass(cls, (dict, collections.UserDict)):
        return items
    if dataclasses.is_dataclass(cls) and not {field.name for field in dataclasses.fields(cls)} <= set(names):
        return items
    # Built without the class's own code (__init__, __setitem__), as pickle would: state in, nothing recomputed.
    if issubclass(cls, collections.UserDict):
        mapping: Any = object.__new__(cls)
        object.__setattr__(mapping, "data", items)
    else:
        base = dict_base(cls)
        mapping = base.__new__(cls)
        for key, value in items.items():
            base.__setitem__(mapping, key, value)
    decoded = list(items.values())
    for name, node in zip(names, nodes, strict=True):
        is_item = isinstance(node, list) and node[0] == "item"
        object.__setattr__(mapping, name, decoded[node[1]] if is_item else decode_tree(node, columns))
    return mapping


def _decode_dataclass(columns: ColumnReader, class_name: str, names: list[str], nodes: list[Node]) -> Any:
    values = dict(zip(names, _decode_all(columns, nodes), strict=True))
    cls = _loaded_class(class_name)
    if cls is None or not dataclasses.is_dataclass(cls) or [field.name for field in dataclasses.fields(cls)] != names:
        return values
    # No __init__ or __post_init__: the fields already have their final values.
    instance = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(instance, name, value)
    return instance


def _loaded_class(class_name: str) -> type | None:
    """Find a class that is already loaded; never imports, and never runs a module's or a class's ``__getattr__``."""
    module_name, _, qualname = class_name.partition(":")
    found: Any = sys.modules.get(module_name)
    for name in qualname.split("."):
        try:
            found = vars(found).get(name)
        except TypeError:
            return None
    return found if isinstance(found, type) else None


_DECODERS: dict[str, Callable[..., Any]] = {
    "str": lambda _columns, text: str(bytes.fromhex(text), "utf-8", "surrogatepass"),
    "int": lambda _columns, digits: int(digits, 16),
    "float": lambda _columns, raw: struct.unpack("<d", bytes.fromhex(raw))[0],
    "complex": lambda _columns, raw: complex(*struct.unpack("<dd", bytes.fromhex(raw))),
    "bytes": lambda columns, column: bytes(columns.buffer(column)),
    "tensor": _decode_tensor,
    "ndarray": _decode_ndarray,
    "numpy": _decode_numpy_scalar,
    "list": functools.partial(_decode_sequence, list),
    "tuple": functools.partial(_decode_sequence, tuple),
    "size": lambda _columns, dims: torch.Size(dims),
    "namedtuple": _decode_namedtuple,
    "structseq": _decode_struct_sequence,
    "dict": _decode_dict,
    "mapping": _decode_mapping,
    "dataclass": _decode_dataclass,
}
