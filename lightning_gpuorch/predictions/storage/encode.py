"""How does a prediction become JSON plus binary columns, and the same prediction again?

Lightning lets ``predict_step`` return any Python object. :class:`TreeEncoder` walks it and writes a *node* (plain JSON)
for each object; what is large (tensors, arrays, long lists of strings or numbers) becomes a *column* that the
envelope stores as raw bytes. :mod:`lightning_gpuorch.predictions.storage.decode` is the inverse. Nothing is pickled and
nothing a file names is ever imported or called: a class is used again only if the reading process has already loaded it.

=======================  ==============================================================================
Object                   Comes back as
=======================  ==============================================================================
torch.Tensor             a writable CPU tensor, same dtype, shape and bits; ``requires_grad`` is dropped
numpy array or scalar    the same, C-contiguous; any dtype of fixed size (numbers, bool, U, S, M8, m8)
None, bool, int          themselves (an int of any size)
float, complex           themselves, bit for bit (infinities, negative zero, NaN)
str, bytes               themselves
list, tuple, torch.Size  themselves
namedtuple               its class if loaded with the same fields, else a fresh namedtuple of that name
torch.return_types.*     its class
dict                     a dict in the same order; keys are str, int, float, bool or None
(User)dict subclass      its class if loaded, with its instance attributes, else a dict. A private attribute
                         that cannot be stored is None afterwards (``BatchEncoding._encodings``), and a
                         defaultdict has no factory
other Mapping            a dict
dataclass                its class if loaded with the same fields, else a dict of its fields
=======================  ==============================================================================

Everything else is refused with :class:`~lightning_gpuorch.errors.UnsupportedPredictionError`, which names the place
in the prediction, the type, and the way out.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from lightning_gpuorch.errors import UnsupportedPredictionError

Node: TypeAlias = Any
"""JSON: None, bool, str, a 64-bit int or a finite float stand for themselves, ``[tag, ...]`` for everything else."""

SAFETENSORS_DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
"""Torch dtypes and their names in safetensors."""

OPAQUE_DTYPES = {
    name: getattr(torch, name) for name in ("complex128", "complex32", "float8_e8m0fnu", "float4_e2m1fn_x2")
}
"""Dtypes stored as plain bytes, since not every reader of safetensors knows them; the node names the dtype."""

TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
_OPAQUE_NAMES = {dtype: name for name, dtype in OPAQUE_DTYPES.items()}
_NUMPY_KINDS = frozenset("biufcmMUS")
NUMPY_DTYPES = {
    name: np.dtype(f"<{code}")
    for name, code in zip(
        ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "F32", "F64", "C64"),
        ("b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8"),
        strict=True,
    )
}
_NUMPY_NAMES = {dtype.str: name for name, dtype in NUMPY_DTYPES.items()}

_MAX_DEPTH = 100
_MIN_PACKED_LENGTH = 16
"""Shorter lists are written as JSON: they are readable there and cost no column."""

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Column:
    """Raw bytes of one tensor, array or packed list.

    Attributes:
        dtype: Name of the element type in safetensors.
        shape: Shape of the column.
        source: What holds the elements; it is read only by :meth:`buffer`.
    """

    dtype: str
    shape: tuple[int, ...]
    source: torch.Tensor | np.ndarray[Any, Any] | bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the column in the file."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.nbytes

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return 1 if isinstance(self.source, bytes) else self.source.itemsize

    def buffer(self) -> memoryview:
        """Return the elements in C order, little-endian. Copies only what is not contiguous or not on the CPU."""
        source = self.source
        if isinstance(source, bytes):
            return memoryview(source)
        if not self.num_bytes:
            return memoryview(b"")
        if isinstance(source, torch.Tensor):
            flat = source.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            return memoryview(flat.view(torch.uint8).numpy().data)
        return memoryview(np.ascontiguousarray(source).reshape(-1).view(np.uint8).data)


class TreeEncoder:
    """Turns predictions into nodes, collecting their columns.

    Attributes:
        columns: The columns of all trees encoded so far; nodes refer to them by position.
    """

    def __init__(self) -> None:
        self.columns: list[Column] = []

    def encode(self, tree: Any, path: str = "output") -> Node:
        """Encode one prediction.

        Args:
            tree: The prediction.
            path: How error messages call it.

        Returns:
            The node. Its tensors are referenced, not copied: they must not change until their columns are read.

        Raises:
            UnsupportedPredictionError: It contains a type without a durable form; nothing was added.
        """
        num_columns = len(self.columns)
        try:
            return self._encode(tree, path, 0)
        except UnsupportedPredictionError:
            del self.columns[num_columns:]
            raise

    def _add(self, dtype: str, shape: Sequence[int], source: torch.Tensor | np.ndarray[Any, Any] | bytes) -> int:
        self.columns.append(Column(dtype, tuple(shape), source))
        return len(self.columns) - 1

    def _encode(self, value: Any, path: str, depth: int) -> Node:
        if depth > _MAX_DEPTH:
            raise UnsupportedPredictionError(
                f"{path} is nested deeper than {_MAX_DEPTH} levels, or contains itself. Return a flatter prediction."
            )
        encode = _ENCODERS.get(type(value))
        if encode is None:
            encode = _find_encoder(value, path)
        return encode(self, value, path, depth)

    def _encode_scalar(self, value: Any, _path: str, _depth: int) -> Node:
        return value

    def _encode_str(self, value: str, _path: str, _depth: int) -> Node:
        # JSON would join two lone surrogates into one character.
        try:
            value.encode()
        except UnicodeEncodeError:
            return ["str", value.encode("utf-8", "surrogatepass").hex()]
        return value

    def _encode_int(self, value: int, _path: str, _depth: int) -> Node:
        # Beyond 64 bits decimal digits are slow, and Python limits how many it converts.
        return value if _INT64_MIN <= value <= _INT64_MAX else ["int", hex(value)]

    def _encode_float(self, value: float, _path: str, _depth: int) -> Node:
        return value if value - value == 0.0 else ["float", struct.pack("<d", value).hex()]

    def _encode_complex(self, value: complex, _path: str, _depth: int) -> Node:
        return ["complex", struct.pack("<dd", value.real, value.imag).hex()]

    def _encode_bytes(self, value: bytes, _path: str, _depth: int) -> Node:
        return ["bytes", self._add("U8", (len(value),), value)]

    def _encode_tensor(self, value: torch.Tensor, path: str, _depth: int) -> Node:
        if value.is_sparse or value.layout is not torch.strided:
            raise UnsupportedPredictionError(f"{path} is a tensor of layout {value.layout}. Return {path}.to_dense().")
        if value.is_quantized:
            raise UnsupportedPredictionError(f"{path} is a quantized tensor. Return {path}.dequantize().")
        if value.is_nested:
            raise UnsupportedPredictionError(f"{path} is a nested tensor. Return list({path}.unbind()).")
        if value.device.type == "meta":
            raise UnsupportedPredictionError(f"{path} is a tensor on the meta device: it has no values to store.")
        name = SAFETENSORS_DTYPES.get(value.dtype)
        if name is not None:
            return ["tensor", self._add(name, value.shape, value)]
        opaque = _OPAQUE_NAMES.get(value.dtype)
        if opaque is None:
            raise UnsupportedPredictionError(
                f"{path} is a tensor of {value.dtype}, which cannot be stored. Convert it."
            )
        return ["tensor", self._add("U8", (value.nbytes,), value), opaque, list(value.shape)]

    def _encode_ndarray(self, value: np.ndarray[Any, Any], path: str, _depth: int) -> Node:
        _check_numpy_dtype(value.dtype, path)
        name = _NUMPY_NAMES.get(value.dtype.str)
        if name is not None:
            return ["ndarray", self._add(name, value.shape, value)]
        return ["ndarray", self._add("U8", (value.nbytes,), value), value.dtype.str, list(value.shape)]

    def _encode_numpy_scalar(self, value: np.generic, path: str, _depth: int) -> Node:
        _check_numpy_dtype(value.dtype, path)
        return ["numpy", value.dtype.str, value.tobytes().hex()]

    def _encode_sequence(self, value: list[Any] | tuple[Any, ...], path: str, depth: int) -> Node:
        tag = "list" if type(value) is list else "tuple"
        packed = self._pack(value)
        if packed is not None:
            return [tag, *packed]
        return [tag, [self._encode(item, f"{path}[{position}]", depth + 1) for position, item in enumerate(value)]]

    def _pack(self, value: Sequence[Any]) -> Node | None:
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
            text = self._add("U8", (len(joined),), joined)
            return [None, kind.__name__, text, self._add("I64", lengths.shape, lengths)]
        if kind is bool:
            return [None, "bool", self._add("BOOL", (len(value),), bytes(value))]
        if kind is float:
            return [None, "float", self._add("F64", (len(value),), np.array(value, "<f8"))]
        if kind is int and min(value) >= _INT64_MIN and max(value) <= _INT64_MAX:
            return [None, "int", self._add("I64", (len(value),), np.array(value, "<i8"))]
        return None

    def _encode_namedtuple(self, value: Any, path: str, depth: int) -> Node:
        fields = list(type(value)._fields)
        nodes = [self._encode(item, f"{path}.{name}", depth + 1) for name, item in zip(fields, value, strict=True)]
        return ["namedtuple", _class_name(type(value)), fields, nodes]

    def _encode_struct_sequence(self, value: Any, path: str, depth: int) -> Node:
        nodes = [self._encode(item, f"{path}[{position}]", depth + 1) for position, item in enumerate(value)]
        return ["structseq", _class_name(type(value)), nodes]

    def _encode_items(self, items: Mapping[Any, Any], path: str, depth: int) -> tuple[list[Node], list[Node]]:
        keys, values = [], []
        for key, value in items.items():
            if type(key) not in _KEY_TYPES:
                raise UnsupportedPredictionError(
                    f"{path} has the key {key!r} of type {type_name(type(key))}; keys must be str, int, float, bool or "
                    "None. Convert the keys."
                )
            keys.append(self._encode(key, path, depth + 1))
            values.append(self._encode(value, f"{path}[{key!r}]", depth + 1))
        return keys, values

    def _encode_dict(self, value: Mapping[Any, Any], path: str, depth: int) -> Node:
        return ["dict", *self._encode_items(value, path, depth)]

    def _encode_dict_subclass(self, value: Any, path: str, depth: int) -> Node:
        cls = type(value)
        is_user_dict = isinstance(value, collections.UserDict)
        items = value.data if is_user_dict else {key: dict_base(cls).__getitem__(value, key) for key in value}
        keys, values = self._encode_items(items, path, depth)
        positions = {id(item): position for position, item in enumerate(items.values())}
        attributes: dict[str, Node] = {}
        for name, attribute in getattr(value, "__dict__", {}).items():
            if is_user_dict and name == "data":
                continue
            if id(attribute) in positions and attribute is not None:
                # transformers' ModelOutput has each value as item and as attribute: the same object, stored once.
                attributes[name] = ["item", positions[id(attribute)]]
                continue
            num_columns = len(self.columns)
            try:
                attributes[name] = self._encode(attribute, f"{path}.{name}", depth + 1)
            except UnsupportedPredictionError:
                if not name.startswith("_"):
                    raise
                del self.columns[num_columns:]
                attributes[name] = None
        return ["mapping", _class_name(cls), keys, values, list(attributes), list(attributes.values())]

    def _encode_dataclass(self, value: Any, path: str, depth: int) -> Node:
        names, nodes = [], []
        for field in dataclasses.fields(value):
            try:
                item = getattr(value, field.name)
            except AttributeError as error:
                raise UnsupportedPredictionError(
                    f"{path} is a {type_name(type(value))} whose field {field.name!r} is not set. Set it."
                ) from error
            names.append(field.name)
            nodes.append(self._encode(item, f"{path}.{field.name}", depth + 1))
        return ["dataclass", _class_name(type(value)), names, nodes]


_Encoder: TypeAlias = Callable[[TreeEncoder, Any, str, int], Node]

_ENCODERS: dict[type, _Encoder] = {
    type(None): TreeEncoder._encode_scalar,
    bool: TreeEncoder._encode_scalar,
    str: TreeEncoder._encode_str,
    int: TreeEncoder._encode_int,
    float: TreeEncoder._encode_float,
    complex: TreeEncoder._encode_complex,
    bytes: TreeEncoder._encode_bytes,
    torch.Tensor: TreeEncoder._encode_tensor,
    torch.nn.Parameter: TreeEncoder._encode_tensor,
    np.ndarray: TreeEncoder._encode_ndarray,
    np.memmap: TreeEncoder._encode_ndarray,
    list: TreeEncoder._encode_sequence,
    tuple: TreeEncoder._encode_sequence,
    torch.Size: lambda _encoder, value, _path, _depth: ["size", list(value)],
    dict: TreeEncoder._encode_dict,
}
"""Exact types: a subclass may carry state that its base's encoder would drop without a word."""

_KEY_TYPES = frozenset({str, int, float, bool, type(None)})


def check_storable(tree: Any, path: str = "output") -> None:
    """Check that a prediction can be stored, without copying it.

    Args:
        tree: The prediction.
        path: How the error message calls it.

    Raises:
        UnsupportedPredictionError: It contains a type without a durable form.
    """
    TreeEncoder().encode(tree, path)


def type_name(cls: type) -> str:
    """Return the name of a class as a user would import it."""
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _class_name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _check_numpy_dtype(dtype: np.dtype[Any], path: str) -> None:
    if dtype.kind not in _NUMPY_KINDS:
        remedy = "a list" if dtype.kind == "O" else "a dict of plain arrays"
        raise UnsupportedPredictionError(f"{path} is a numpy value of dtype {dtype}. Return {remedy} instead.")


def is_struct_sequence(cls: type) -> bool:
    """Whether a class is one of C's named tuples, such as ``torch.return_types.max``."""
    return issubclass(cls, tuple) and isinstance(getattr(cls, "n_sequence_fields", None), int)


def _find_encoder(value: Any, path: str) -> _Encoder:
    """Choose the encoder of a type that is not in the table, or refuse it with the way out."""
    cls = type(value)
    if isinstance(value, np.generic):
        return TreeEncoder._encode_numpy_scalar
    if isinstance(value, tuple) and isinstance(getattr(cls, "_fields", None), tuple):
        return TreeEncoder._encode_namedtuple
    if is_struct_sequence(cls):
        return TreeEncoder._encode_struct_sequence
    if isinstance(value, (dict, collections.UserDict)):
        return TreeEncoder._encode_dict_subclass
    if isinstance(value, Mapping):
        return TreeEncoder._encode_dict
    plain_bases = (torch.Tensor, np.ndarray, torch.nn.Module, list, tuple, set, frozenset, str, bytes, int, float)
    if dataclasses.is_dataclass(value) and not isinstance(value, (*plain_bases, BaseException, type)):
        return TreeEncoder._encode_dataclass
    raise UnsupportedPredictionError(f"{path} is of type {type_name(cls)}, which cannot be stored. {_remedy(value)}")


def _remedy(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return "Return its .value or .name."
    if isinstance(value, torch.Tensor):
        if hasattr(value, "full_tensor"):
            return "Return its .full_tensor()."
        return "Return a plain tensor: .as_subclass(torch.Tensor) drops what the subclass adds."
    if isinstance(value, np.ndarray):
        return "Return a plain array; of a masked array, the data and the mask."
    if isinstance(value, (set, frozenset, range)):
        return "Return a list."
    if hasattr(value, "__array_interface__"):
        return "Return np.asarray(...) of it."
    for base in (list, tuple, str, bytes, int, float, complex):
        if isinstance(value, base):
            return f"Return {base.__name__}(...) of it."
    return "Return tensors, numpy arrays, numbers, str, bytes, None, or dicts, lists, tuples and dataclasses of these."


def dict_base(cls: type) -> Any:
    """Return the built-in whose ``__new__`` and ``__setitem__`` are right for a subclass of dict."""
    return next(base for base in (collections.OrderedDict, collections.defaultdict, dict) if issubclass(cls, base))
