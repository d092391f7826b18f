"""What lies behind the header of a part file, as far as it can be told without the packages that predictions are made of.

Its checksum says that this is what was written; the writer may have been another program.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from lightning_gpuorch.checked_files import integer, parse_json
from lightning_gpuorch.errors import CorruptPartError

_MAX_DIMS = 64
"""As many as numpy arrays and tensors may have."""
_LENGTH = struct.Struct("<Q")


class _Column(msgspec.Struct):
    """A column as the list of columns tells of it."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class ColumnPlace(NamedTuple):
    """Element type, shape and bytes of a column."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


_NODES = msgspec.json.Decoder(list[msgspec.Raw])
_COLUMNS = msgspec.json.Decoder(dict[str, _Column])


@dataclass(frozen=True)
class PartContents:
    """The structure of a part and the list of its columns.

    Attributes:
        nodes: One per prediction, as JSON: they are parsed one at a time, when they are asked for.
        columns: By name.
        data_start: Where the columns' bytes begin, behind the structure.
    """

    nodes: Sequence[msgspec.Raw | bytes]
    columns: Mapping[str, ColumnPlace]
    data_start: int


def read_contents(body: memoryview, header: Mapping[str, Any], source: str) -> PartContents:
    """Read the structure and the list of columns.

    Args:
        body: What lies behind the header, up to :func:`num_bytes_before_data` or further.
        header: The header, checked.
        source: Name of the file, for error messages.

    Raises:
        CorruptPartError: They are not of this format, or do not fit in the bytes that are there.
    """
    try:
        nodes = _split(body[: header["structure_bytes"]])
        end = num_bytes_before_data(body, header)
        start = header["structure_bytes"] + _LENGTH.size
        if end > len(body):
            raise ValueError("the list of its columns goes beyond its end")  # noqa: TRY301
        num_data_bytes = header["structure_bytes"] + header["columns_bytes"] - end
        columns = _check_columns(_COLUMNS.decode(body[start:end]), num_data_bytes)
    except (ValueError, RecursionError, msgspec.DecodeError, struct.error) as error:
        raise CorruptPartError(
            f"{source} is damaged: its structure or the list of its columns is not of this format ({error}). Restore it from "
            "a copy; or delete it and run the same command again, which computes only what it held."
        ) from error
    return PartContents(nodes, columns, end - header["structure_bytes"])


def read_nodes(body: memoryview, header: Mapping[str, Any], source: str) -> Sequence[msgspec.Raw | bytes]:
    """Read the structure alone; see :func:`read_contents`.

    Raises:
        CorruptPartError: It is not of this format.
    """
    try:
        return _split(body[: header["structure_bytes"]])
    except (ValueError, RecursionError, msgspec.DecodeError) as error:
        raise CorruptPartError(f"{source} is damaged: its structure is not of this format ({error}).") from error


def num_bytes_before_data(body: memoryview, header: Mapping[str, Any]) -> int:
    """Bytes of the structure and the list of columns, given those of the structure and 8 more.

    Raises:
        ValueError: The list is longer than all columns.
        struct.error: There are not so many bytes.
    """
    (list_bytes,) = _LENGTH.unpack(body[header["structure_bytes"] : header["structure_bytes"] + _LENGTH.size])
    if list_bytes > header["columns_bytes"] - _LENGTH.size:
        raise ValueError("the list of its columns goes beyond its end")
    return int(header["structure_bytes"] + _LENGTH.size + list_bytes)


def _split(structure: memoryview) -> Sequence[msgspec.Raw | bytes]:
    """The nodes of a structure, unparsed."""
    try:
        return _NODES.decode(structure)
    except msgspec.DecodeError:
        raw = bytes(structure)
        if b"\\ud" not in raw.lower():
            raise
    # Half of a character pair, as in a file's name that is no UTF-8, is JSON for Python alone.
    nodes = parse_json(raw)
    if not isinstance(nodes, list):
        raise ValueError("its structure is no list")  # noqa: TRY004 - of the file
    return [json.dumps(node).encode() for node in nodes]


def _check_columns(columns: Mapping[str, _Column], num_bytes: int) -> dict[str, ColumnPlace]:
    """Take the list of columns, which must fit in so many bytes. Raises ValueError where one does not."""
    places, total = {}, 0
    for name, column in columns.items():
        if len(column.shape) > _MAX_DIMS:
            raise ValueError(f"column {name:.40} has {len(column.shape)} dimensions")
        end = integer(column.data_offsets[1], "the end of a column", 0, num_bytes)
        start = integer(column.data_offsets[0], "the start of a column", 0, end)
        total += end - start
        shape = tuple(integer(size, "a size") for size in column.shape)
        places[name] = ColumnPlace(column.dtype, shape, start, end)
    if total > num_bytes:
        raise ValueError("its columns overlap")
    return places
