"""What all codecs share: nodes, columns, and classes that are named but never imported.

A codec is a pair of functions. One turns a value into a *node* (plain JSON: itself, or ``[tag, ...]``), handing what is
large over as *columns*; the other gets what stands behind the tag. Each module has three tables of them: ``ENCODERS`` by
exact type, ``FINDERS`` for types that are recognised otherwise, and ``DECODERS`` by tag.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch

from lightning_gpuorch.errors import CorruptPartError, UnsupportedPredictionError

Node: TypeAlias = Any
"""JSON: None, bool, str, a 64-bit int or a finite float stand for themselves, ``[tag, ...]`` for everything else."""

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
_MAX_EQUAL_HASHES = 256


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


class Encoder(Protocol):
    """What a codec is given to encode with."""

    def add(self, dtype: str, shape: Sequence[int], source: torch.Tensor | np.ndarray[Any, Any] | bytes) -> int:
        """Add a column; returns its number."""
        ...

    def encode_part(self, value: Any, path: str, depth: int) -> Node:
        """Encode a part of the value; ``path`` is how error messages call it."""
        ...

    def encode_attributes(self, attributes: dict[str, Any], path: str, depth: int) -> dict[str, Node]:
        """Encode attributes; a private one that cannot be stored is None."""
        ...


class Decoder(Protocol):
    """What a codec is given to decode with."""

    def decode(self, node: Node) -> Any:
        """Decode a part of the value; it owns its memory."""
        ...

    def dtype(self, column: int) -> str:
        """Return the safetensors dtype of a column."""
        ...

    def shape(self, column: int) -> tuple[int, ...]:
        """Return the shape of a column."""
        ...

    def buffer(self, column: int) -> memoryview:
        """Return the bytes of a column, to be copied."""
        ...


Encode: TypeAlias = Callable[[Encoder, Any, str, int], Node]
Decode: TypeAlias = Callable[..., Any]
Finder: TypeAlias = tuple[Callable[[Any], bool], Encode]


def add_bytes(encoder: Encoder, content: bytes) -> int:
    """Add a column of plain bytes."""
    return encoder.add("U8", (len(content),), content)


def take(decoder: Decoder, column: int, num_bytes: int) -> memoryview:
    """The bytes of a column that must be so many; checked before room is made for them.

    Raises:
        CorruptPartError: They are not.
    """
    buffer = decoder.buffer(column)
    if len(buffer) != num_bytes:
        raise CorruptPartError(f"a column has {len(buffer)} bytes in place of {num_bytes}")
    return buffer


DecodedT = TypeVar("DecodedT")


def decode_as(decoder: Decoder, kind: type[DecodedT], node: Node) -> DecodedT:
    """Decode a part that must be of a type: a range in its place, say, would be made into as many objects as it likes.

    Raises:
        CorruptPartError: It is of another.
    """
    value = decoder.decode(node)
    if not isinstance(value, kind):
        raise CorruptPartError(f"a {type(value).__name__} is where a {kind.__name__} should be")
    return value


def check_hashes(keys: Sequence[Any]) -> Sequence[Any]:
    """Refuse keys of which many have the same hash: to find each takes as long as there are such keys.

    Raises:
        CorruptPartError: There are too many.
    """
    if len(keys) > _MAX_EQUAL_HASHES:
        most = max(collections.Counter(map(hash, keys)).values())
        if most > _MAX_EQUAL_HASHES:
            raise CorruptPartError(f"{most} keys have the same hash")
    return keys


def refuse(value: Any, path: str, remedy: str) -> UnsupportedPredictionError:
    """The error to raise for a value without a durable form."""
    return UnsupportedPredictionError(
        f"{path} is of type {type_name(type(value))}, which cannot be stored. {remedy} If a prediction writer keeps it and "
        "nothing is to be read back, keep_outputs=False stores a marker in its place."
    )


def type_name(cls: type) -> str:
    """Return the name of a class as a user would import it."""
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


_LOCAL = "<locals>"
_local_classes: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
"""Classes made within functions, which no module leads to, as this process has stored instances of them."""


def class_name(cls: type) -> str:
    """Return the name under which :func:`loaded_class` finds a class."""
    name = f"{cls.__module__}:{cls.__qualname__}"
    if _LOCAL in name:
        _local_classes[name] = cls
    return name


def loaded_class(name: str) -> type | None:
    """Find a class that is already loaded; never imports, and never runs a module's or a class's ``__getattr__``."""
    if _LOCAL in name:
        return _local_classes.get(name)
    module_name, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module_name)
    for part in qualname.split("."):
        try:
            found = vars(found).get(part)
        except TypeError:
            return None
    return found if isinstance(found, type) else None


def is_instance(value: Any, *names: str) -> bool:
    """Whether a value is an instance of classes that may not be loaded, named as :func:`class_name` does."""
    return any((cls := loaded_class(name)) is not None and isinstance(value, cls) for name in names)
