"""A prediction of any structure as checksummed bytes, and back.

The structure becomes a JSON tree; tensors and arrays become safetensors columns. Around both stands an envelope with
CRC-32 sums of its own, because neither torch nor safetensors notices a flipped bit::

    magic | header length, header CRC, body length, body CRC | CRC of all before | header (JSON) | body (safetensors)
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import json
import struct
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch

from lightning_gpuorch.errors import CorruptPartError, UnsupportedPredictionError

MAGIC = b"GPUORCH\x01"
_PREFIX = struct.Struct("<8sIIQI")
_PREFIX_CRC = struct.Struct("<I")
PREFIX_BYTES = _PREFIX.size + _PREFIX_CRC.size


def encode(metadata: Mapping[str, Any], tree: Any) -> bytes:
    """Serialise a pytree.

    Args:
        metadata: JSON-serialisable fields for the header.
        tree: Tensors, arrays, text, numbers, None, and containers of them.

    Raises:
        UnsupportedPredictionError: A value has no durable form; its place and type are named.
    """
    writer = _TreeWriter()
    structure = writer.write(tree, "output")
    header = json.dumps({"metadata": metadata, "tree": structure}, separators=(",", ":")).encode()
    body = safetensors.torch.save(writer.columns)
    prefix = _PREFIX.pack(MAGIC, len(header), zlib.crc32(header), len(body), zlib.crc32(body))
    return b"".join((prefix, _PREFIX_CRC.pack(zlib.crc32(prefix)), header, body))


def decode(data: bytes, source: str) -> tuple[dict[str, Any], Any]:
    """Read what :func:`encode` wrote.

    Args:
        data: The bytes.
        source: Where they come from, for error messages.

    Returns:
        Metadata and tree.

    Raises:
        CorruptPartError: Any byte is missing, added or changed.
    """
    header, body = check(data, source)
    columns = safetensors.torch.load(body)
    return header["metadata"], _TreeReader(columns).read(header["tree"])


def read_header(data: bytes, source: str) -> dict[str, Any]:
    """The metadata alone; ``data`` must hold at least prefix and header.

    Raises:
        CorruptPartError: The header is damaged.
    """
    header_bytes, _, _ = _check_prefix(data, source)
    return dict(_check_header(data, header_bytes, source)["metadata"])


def header_bytes(prefix: bytes, source: str) -> int:
    """Length of the header, from the first :data:`PREFIX_BYTES` bytes."""
    return _check_prefix(prefix, source)[0]


def check(data: bytes, source: str) -> tuple[dict[str, Any], bytes]:
    """Verify all checksums; returns the parsed header and the body."""
    length, body_length, body_crc = _check_prefix(data, source)
    expected = PREFIX_BYTES + length + body_length
    if len(data) != expected:
        raise CorruptPartError(f"{source} has {len(data)} bytes, its header says {expected}; it was cut or added to.")
    header = _check_header(data, length, source)
    body = data[PREFIX_BYTES + length :]
    if zlib.crc32(body) != body_crc:
        raise CorruptPartError(f"{source}: the checksum of its data does not match; it is damaged.")
    return header, body


def _check_prefix(data: bytes, source: str) -> tuple[int, int, int]:
    if len(data) < PREFIX_BYTES:
        raise CorruptPartError(f"{source} has only {len(data)} bytes; it was cut.")
    prefix = data[: _PREFIX.size]
    (crc,) = _PREFIX_CRC.unpack_from(data, _PREFIX.size)
    magic, length, _, body_length, body_crc = _PREFIX.unpack(prefix)
    if zlib.crc32(prefix) != crc:
        raise CorruptPartError(f"{source}: the checksum of its first bytes does not match; it is damaged.")
    if magic != MAGIC:
        raise CorruptPartError(f"{source} is no part file of this version.")
    return length, body_length, body_crc


def _check_header(data: bytes, length: int, source: str) -> dict[str, Any]:
    crc = _PREFIX.unpack_from(data)[2]
    header = data[PREFIX_BYTES : PREFIX_BYTES + length]
    if len(header) != length or zlib.crc32(header) != crc:
        raise CorruptPartError(f"{source}: the checksum of its header does not match; it is damaged.")
    return dict(json.loads(header))


class _TreeWriter:
    """Turns a pytree into JSON; each container that JSON does not have is an object with one telling key."""

    def __init__(self) -> None:
        self.columns: dict[str, torch.Tensor] = {}

    def write(self, value: Any, path: str) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, np.ndarray):
            return self._array(value, path)
        if isinstance(value, np.generic):
            return {"scalar": self._array(np.asarray(value), path)}
        if type(value) is list:
            return [self.write(item, f"{path}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, tuple):
            return self._tuple(value, path)
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: self.write(getattr(value, f.name), f"{path}.{f.name}") for f in dataclasses.fields(value)}
            return {"dataclass": _qualified_name(value), "fields": fields}
        if type(value) is bytes:
            return {"bytes": base64.b64encode(value).decode()}
        if type(value) is complex:
            return {"complex": [value.real, value.imag]}
        raise UnsupportedPredictionError(
            f"{path} is a {_qualified_name(value)}, which has no durable form. Return tensors, numpy arrays, text, "
            "numbers, None, or dicts, lists, tuples and dataclasses of them."
        )

    def _column(self, tensor: torch.Tensor) -> str:
        name = str(len(self.columns))
        own = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        shared = any(tensor.data_ptr() == other.data_ptr() for other in self.columns.values() if tensor.numel())
        self.columns[name] = tensor if own and not shared else tensor.clone(memory_format=torch.contiguous_format)
        return name

    def _tensor(self, tensor: torch.Tensor, path: str) -> dict[str, Any]:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            raise UnsupportedPredictionError(
                f"{path} is a {_qualified_name(tensor)} of layout {tensor.layout}; return a dense torch.Tensor "
                "(.to_dense(), .full_tensor() or .dequantize())."
            )
        if tensor.is_quantized or tensor.is_meta:
            raise UnsupportedPredictionError(f"{path} is a quantized or meta tensor; return a dense one with values.")
        tensor = tensor.detach().cpu()
        if tensor.is_complex():
            return {"tensor": self._column(torch.view_as_real(tensor.resolve_conj())), "complex": True}
        return {"tensor": self._column(tensor.resolve_neg())}

    def _array(self, array: np.ndarray[Any, Any], path: str) -> dict[str, Any]:
        kind = array.dtype.kind
        if kind == "U":
            return {"array": array.ravel().tolist(), "dtype": array.dtype.str, "shape": list(array.shape)}
        if kind in "Mm":
            integers = np.ascontiguousarray(array).view(np.int64)
            return {"array": self._column(torch.from_numpy(integers.copy())), "dtype": array.dtype.str}
        if kind not in "biufc" or array.dtype.names:
            raise UnsupportedPredictionError(
                f"{path} is a numpy array of dtype {array.dtype}, which has no durable form; convert it to numbers or text."
            )
        plain = np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True)
        try:
            tensor = torch.from_numpy(plain)
        except TypeError:
            raise UnsupportedPredictionError(
                f"{path} is a numpy array of dtype {array.dtype}; use one torch has."
            ) from None
        if tensor.is_complex():
            return {"array": self._column(torch.view_as_real(tensor)), "dtype": array.dtype.str, "complex": True}
        return {"array": self._column(tensor), "dtype": array.dtype.str}

    def _tuple(self, value: tuple[Any, ...], path: str) -> dict[str, Any]:
        if hasattr(value, "_fields"):
            fields = value._fields
            items = [self.write(item, f"{path}.{name}") for name, item in zip(fields, value, strict=True)]
            return {"namedtuple": _qualified_name(value), "fields": list(fields), "items": items}
        if type(value) is not tuple:
            raise UnsupportedPredictionError(
                f"{path} is a {_qualified_name(value)}, a tuple of its own kind; use a tuple."
            )
        return {"tuple": [self.write(item, f"{path}[{i}]") for i, item in enumerate(value)]}

    def _mapping(self, value: Mapping[Any, Any], path: str) -> dict[str, Any]:
        pairs = []
        for key, item in value.items():
            if key is not None and type(key) not in (str, int, float, bool):
                raise UnsupportedPredictionError(
                    f"{path} has the key {key!r}, a {type(key).__name__}; use text or numbers."
                )
            pairs.append([key, self.write(item, f"{path}[{key!r}]")])
        return {"dict": pairs} if type(value) is dict else {"mapping": _qualified_name(value), "dict": pairs}


class _TreeReader:
    """Turns the JSON of :class:`_TreeWriter` back into the pytree."""

    def __init__(self, columns: Mapping[str, torch.Tensor]):
        self._columns = columns

    def read(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self.read(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "tensor" in node:
            column = self._columns[node["tensor"]]
            return torch.view_as_complex(column) if node.get("complex") else column
        if "array" in node:
            return self._array(node)
        if "tuple" in node:
            return tuple(self.read(item) for item in node["tuple"])
        if "scalar" in node:
            return self._array(node["scalar"])[()]
        if "namedtuple" in node:
            return _named_tuple(node["namedtuple"], node["fields"], [self.read(item) for item in node["items"]])
        if "dataclass" in node:
            return _data_class(node["dataclass"], {name: self.read(item) for name, item in node["fields"].items()})
        if "bytes" in node:
            return base64.b64decode(node["bytes"])
        if "complex" in node:
            return complex(*node["complex"])
        plain = {key: self.read(item) for key, item in node["dict"]}
        return _mapping(node["mapping"], plain) if "mapping" in node else plain

    def _array(self, node: dict[str, Any]) -> np.ndarray[Any, Any]:
        if "shape" in node:
            return np.array(node["array"], dtype=node["dtype"]).reshape(node["shape"])
        column = self._columns[node["array"]]
        if node.get("complex"):
            column = torch.view_as_complex(column)
        array: np.ndarray[Any, Any] = column.numpy()
        dtype = np.dtype(node["dtype"])
        return array.view(dtype) if dtype.kind in "Mm" else array.astype(dtype, copy=False)


def _qualified_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _loaded_class(name: str) -> Any:
    """A class by name, only if its module is loaded already: nothing named in a file is ever imported."""
    module_name, _, path = name.rpartition(".")
    while module_name:
        found: Any = sys.modules.get(module_name)
        if found is not None:
            for attribute in path.split("."):
                found = getattr(found, attribute, None)
            return found if isinstance(found, type) else None
        module_name, _, outer = module_name.rpartition(".")
        path = f"{outer}.{path}"
    return None


def _named_tuple(name: str, fields: list[str], items: list[Any]) -> Any:
    kind = _loaded_class(name)
    if kind is None or getattr(kind, "_fields", None) != tuple(fields):
        kind = collections.namedtuple(name.rpartition(".")[2], fields)
    return kind(*items)


def _data_class(name: str, fields: dict[str, Any]) -> Any:
    kind = _loaded_class(name)
    if kind is None or not dataclasses.is_dataclass(kind) or {f.name for f in dataclasses.fields(kind)} != set(fields):
        return fields
    value = object.__new__(kind)
    for field_name, item in fields.items():
        object.__setattr__(value, field_name, item)
    return value


def _mapping(name: str, plain: dict[Any, Any]) -> Any:
    kind = _loaded_class(name)
    if kind is None or not issubclass(kind, Mapping):
        return plain
    try:
        return kind(**plain) if dataclasses.is_dataclass(kind) else kind(plain)
    except TypeError:  # its constructor wants something else
        return plain
