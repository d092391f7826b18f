"""Lists, tuples, sets, dicts, and classes that hold fields."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_gpuorch.errors import UnsupportedPredictionError
from lightning_gpuorch.predictions.storage.values.base import (
    INT64_MAX,
    INT64_MIN,
    Decode,
    Decoder,
    Encode,
    Encoder,
    Finder,
    Node,
    add_bytes,
    check_hashes,
    class_name,
    decode_as,
    loaded_class,
    type_name,
)

_MIN_PACKED_LENGTH = 16
"""Shorter lists are written as JSON: they are readable there and cost no column."""

_FACTORIES = {cls.__name__: cls for cls in (list, dict, set, tuple, int, float, str, bool, bytes)}
"""What a defaultdict may make of nothing: no code of the user is called."""


# --- Sequences and sets -----------------------------------------------------------------------------------------------


def _encode_all(encoder: Encoder, values: Any, path: str, depth: int) -> list[Node]:
    return [encoder.encode_part(item, f"{path}[{position}]", depth + 1) for position, item in enumerate(values)]


def _encode_sequence(encoder: Encoder, value: list[Any] | tuple[Any, ...], path: str, depth: int) -> Node:
    tag = "list" if type(value) is list else "tuple"
    packed = _pack(encoder, value)
    return [tag, *packed] if packed is not None else [tag, _encode_all(encoder, value, path, depth)]


def _pack(encoder: Encoder, value: Sequence[Any]) -> Node | None:
    """Write a long list of one plain type as columns: ``[None, kind, column, ...]``, or None if it is not one."""
    if len(value) < _MIN_PACKED_LENGTH:
        return None
    kinds = set(map(type, value))
    if len(kinds) != 1:
        return None
    kind = kinds.pop()
    if kind is str or kind is bytes:
        # Lengths count characters: the reader decodes the text once and cuts it.
        joined = "".join(value).encode("utf-8", "surrogatepass") if kind is str else b"".join(value)
        lengths = np.fromiter(map(len, value), np.dtype("<i8"), len(value))
        text = add_bytes(encoder, joined)
        return [None, kind.__name__, text, encoder.add("I64", lengths.shape, lengths)]
    if kind is bool:
        return [None, "bool", encoder.add("BOOL", (len(value),), bytes(value))]
    if kind is float:
        return [None, "float", encoder.add("F64", (len(value),), np.array(value, "<f8"))]
    if kind is int and min(value) >= INT64_MIN and max(value) <= INT64_MAX:
        return [None, "int", encoder.add("I64", (len(value),), np.array(value, "<i8"))]
    return None


def _unpack(decoder: Decoder, kind: str, column: int, lengths_column: int | None = None) -> list[Any]:
    buffer = decoder.buffer(column)
    if lengths_column is not None:
        joined: Any = bytes(buffer) if kind == "bytes" else str(buffer, "utf-8", "surrogatepass")
        lengths = np.frombuffer(decoder.buffer(lengths_column), "<i8")
        # Each alone as well: a sum of large ones can wrap around.
        if (lengths < 0).any() or (lengths > len(joined)).any() or int(lengths.sum()) != len(joined):
            raise ValueError("lengths do not add up")
        ends = lengths.cumsum().tolist()
        return [joined[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    numbers: list[Any] = np.frombuffer(buffer, {"bool": "?", "float": "<f8", "int": "<i8"}[kind]).tolist()
    return numbers


def _decode_all(decoder: Decoder, nodes: Sequence[Node]) -> list[Any]:
    return [decoder.decode(node) for node in nodes]


def _decode_sequence(make: Callable[[list[Any]], Any], decoder: Decoder, nodes: Any, *packed: Any) -> Any:
    return make(_unpack(decoder, *packed) if packed else _decode_all(decoder, nodes))


def _encode_set(encoder: Encoder, value: set[Any] | frozenset[Any], path: str, depth: int) -> Node:
    try:
        items = sorted(value)  # the order of a set differs between processes, and bytes must not
    except TypeError:
        items = sorted(value, key=lambda item: (type_name(type(item)), repr(item)))
    for item in items:
        _check_key(item, path, "an entry")
    return [type(value).__name__, _encode_sequence(encoder, items, path, depth)]


def _encode_deque(encoder: Encoder, value: collections.deque[Any], path: str, depth: int) -> Node:
    return ["deque", _encode_all(encoder, value, path, depth), value.maxlen]


def _encode_slice(encoder: Encoder, value: slice, path: str, depth: int) -> Node:
    return ["slice", *_encode_all(encoder, (value.start, value.stop, value.step), path, depth)]


def _encode_range(encoder: Encoder, value: range, path: str, depth: int) -> Node:
    return ["range", *_encode_all(encoder, (value.start, value.stop, value.step), path, depth)]


# --- Classes with fields ----------------------------------------------------------------------------------------------


def is_struct_sequence(cls: type) -> bool:
    """Whether a class is one of C's named tuples, such as ``torch.return_types.max``."""
    return issubclass(cls, tuple) and isinstance(getattr(cls, "n_sequence_fields", None), int)


def _encode_namedtuple(encoder: Encoder, value: Any, path: str, depth: int) -> Node:
    fields = list(type(value)._fields)
    nodes = [encoder.encode_part(item, f"{path}.{name}", depth + 1) for name, item in zip(fields, value, strict=True)]
    return ["namedtuple", class_name(type(value)), fields, nodes]


def _decode_namedtuple(decoder: Decoder, name: str, fields: list[str], nodes: list[Node]) -> Any:
    cls = loaded_class(name)
    if cls is None or not issubclass(cls, tuple) or getattr(cls, "_fields", None) != tuple(fields):
        cls = _fresh_namedtuple(name.rpartition(".")[2].rpartition(":")[2], tuple(fields))
    values = _decode_all(decoder, nodes)
    if len(values) != len(fields):
        raise ValueError(f"{len(values)} values for {len(fields)} fields")
    return tuple.__new__(cls, values)


@functools.lru_cache(maxsize=256)
def _fresh_namedtuple(name: str, fields: tuple[str, ...]) -> type[tuple[Any, ...]]:
    plain: Any = collections.namedtuple(name, fields)  # type: ignore[misc]
    return type(name, (_FieldsByName, plain), {"__slots__": (), "__module__": plain.__module__})


class _FieldsByName:
    """What models return as a named tuple is often read like a dict; the class that could do so is not there."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str) and key in self._fields:  # type: ignore[attr-defined]
            return getattr(self, key)
        return super().__getitem__(key)  # type: ignore[misc]


def _encode_struct_sequence(encoder: Encoder, value: Any, path: str, depth: int) -> Node:
    return ["structseq", class_name(type(value)), _encode_all(encoder, value, path, depth)]


def _decode_struct_sequence(decoder: Decoder, name: str, nodes: list[Node]) -> Any:
    cls = loaded_class(name)
    values = _decode_all(decoder, nodes)
    if cls is None or not is_struct_sequence(cls) or cls.n_sequence_fields != len(values):  # type: ignore[attr-defined]
        return tuple(values)
    return cls(values)


def _encode_dataclass(encoder: Encoder, value: Any, path: str, depth: int) -> Node:
    names, nodes = [], []
    for field in dataclasses.fields(value):
        try:
            item = getattr(value, field.name)
        except AttributeError as error:
            raise UnsupportedPredictionError(
                f"{path} is a {type_name(type(value))} whose field {field.name!r} is not set. Set it."
            ) from error
        names.append(field.name)
        nodes.append(encoder.encode_part(item, f"{path}.{field.name}", depth + 1))
    return ["dataclass", class_name(type(value)), names, nodes]


def _decode_dataclass(decoder: Decoder, name: str, names: list[str], nodes: list[Node]) -> Any:
    values = dict(zip(names, _decode_all(decoder, nodes), strict=True))
    cls = loaded_class(name)
    if cls is None or not dataclasses.is_dataclass(cls) or [field.name for field in dataclasses.fields(cls)] != names:
        return values
    # No __init__ or __post_init__: the fields already have their final values.
    instance = object.__new__(cls)
    for field, value in values.items():
        object.__setattr__(instance, field, value)
    return instance


def _encode_namespace(encoder: Encoder, value: types.SimpleNamespace, path: str, depth: int) -> Node:
    names = list(vars(value))
    nodes = [encoder.encode_part(item, f"{path}.{name}", depth + 1) for name, item in vars(value).items()]
    return ["namespace", names, nodes]


# --- Mappings ---------------------------------------------------------------------------------------------------------


def _check_key(key: Any, path: str, what: str) -> None:
    if isinstance(key, torch.Tensor):  # equal by identity, which no file keeps
        raise UnsupportedPredictionError(f"{path} has {what} that is a tensor. Use .item() or .tolist() of it.")
    if isinstance(key, (tuple, frozenset)):
        for part in key:
            _check_key(part, path, what)


def _encode_items(encoder: Encoder, items: Mapping[Any, Any], path: str, depth: int) -> tuple[list[Node], list[Node]]:
    keys, values = [], []
    for key, value in items.items():
        _check_key(key, path, "a key")
        keys.append(encoder.encode_part(key, f"{path}: the key {key!r:.80}", depth + 1))
        values.append(encoder.encode_part(value, f"{path}[{key!r:.80}]", depth + 1))
    return keys, values


def _encode_dict(encoder: Encoder, value: Mapping[Any, Any], path: str, depth: int) -> Node:
    return ["dict", *_encode_items(encoder, value, path, depth)]


def _decode_dict(decoder: Decoder, keys: list[Node], values: list[Node]) -> dict[Any, Any]:
    items = dict(zip(check_hashes(_decode_all(decoder, keys)), _decode_all(decoder, values), strict=True))
    if len(items) != len(keys):
        raise ValueError("two keys are equal; where keys are of an enum, import its class before reading")
    return items


def dict_base(cls: type) -> Any:
    """Return the built-in whose ``__new__`` and ``__setitem__`` are right for a subclass of dict."""
    return next(base for base in (collections.OrderedDict, collections.defaultdict, dict) if issubclass(cls, base))


def _encode_dict_subclass(encoder: Encoder, value: Any, path: str, depth: int) -> Node:
    cls = type(value)
    is_user_dict = isinstance(value, collections.UserDict)
    items = value.data if is_user_dict else {key: dict_base(cls).__getitem__(value, key) for key in value}
    keys, values = _encode_items(encoder, items, path, depth)
    positions = {id(item): position for position, item in enumerate(items.values()) if item is not None}
    own = {k: v for k, v in getattr(value, "__dict__", {}).items() if not (is_user_dict and k == "data")}
    # transformers' ModelOutput has each value as item and as attribute: the same object, stored once.
    shared: dict[str, Node] = {k: ["item", positions[id(v)]] for k, v in own.items() if id(v) in positions}
    rest = {k: v for k, v in own.items() if k not in shared}
    attributes = shared | encoder.encode_attributes(rest, path, depth)
    names = [name for name in own if name in attributes]
    node = ["mapping", class_name(cls), keys, values, names, [attributes[name] for name in names]]
    factory = getattr(value, "default_factory", None)
    return [*node, factory.__name__] if factory is not None and factory in _FACTORIES.values() else node


def _decode_mapping(
    decoder: Decoder,
    name: str,
    keys: list[Node],
    values: list[Node],
    names: list[str],
    nodes: list[Node],
    factory: str | None = None,
) -> Any:
    items = _decode_dict(decoder, keys, values)
    cls = loaded_class(name)
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
    if factory is not None and isinstance(mapping, collections.defaultdict):
        mapping.default_factory = _FACTORIES[factory]
    decoded = list(items.values())
    for attribute, node in zip(names, nodes, strict=True):
        is_item = isinstance(node, list) and node[0] == "item"
        object.__setattr__(mapping, attribute, decoded[node[1]] if is_item else decoder.decode(node))
    return mapping


def _is_dataclass(value: Any) -> bool:
    others = (torch.Tensor, np.ndarray, torch.nn.Module, list, tuple, set, frozenset, str, bytes, int, float)
    return dataclasses.is_dataclass(value) and not isinstance(value, (*others, BaseException, type))


ENCODERS: dict[type, Encode] = {
    list: _encode_sequence,
    tuple: _encode_sequence,
    set: _encode_set,
    frozenset: _encode_set,
    collections.deque: _encode_deque,
    range: _encode_range,
    slice: _encode_slice,
    torch.Size: lambda _encoder, value, _path, _depth: ["size", list(value)],
    dict: _encode_dict,
    types.SimpleNamespace: _encode_namespace,
}

FINDERS: list[Finder] = [
    (lambda v: isinstance(v, tuple) and isinstance(getattr(type(v), "_fields", None), tuple), _encode_namedtuple),
    (lambda v: is_struct_sequence(type(v)), _encode_struct_sequence),
    (lambda v: isinstance(v, (dict, collections.UserDict)), _encode_dict_subclass),
    (lambda v: isinstance(v, Mapping), _encode_dict),
    (_is_dataclass, _encode_dataclass),
]

DECODERS: dict[str, Decode] = {
    "list": functools.partial(_decode_sequence, list),
    "tuple": functools.partial(_decode_sequence, tuple),
    "set": lambda decoder, items: set(check_hashes(decode_as(decoder, list, items))),
    "frozenset": lambda decoder, items: frozenset(check_hashes(decode_as(decoder, list, items))),
    "deque": lambda decoder, nodes, maxlen: collections.deque(_decode_all(decoder, nodes), maxlen),
    "range": lambda decoder, *ends: range(*_decode_all(decoder, ends)),
    "slice": lambda decoder, *ends: slice(*_decode_all(decoder, ends)),
    "size": lambda _decoder, dims: torch.Size(dims),
    "namedtuple": _decode_namedtuple,
    "structseq": _decode_struct_sequence,
    "dict": _decode_dict,
    "mapping": _decode_mapping,
    "dataclass": _decode_dataclass,
    "namespace": lambda decoder, names, nodes: types.SimpleNamespace(
        **dict(zip(names, _decode_all(decoder, nodes), strict=True))
    ),
}
