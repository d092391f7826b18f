"""What lies behind the header of a part file, as far as it can be told without the packages that predictions are made of.

Its checksum says that this is what was written; the writer may have been another program.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_gpuorch.checked_files import integer, parse_json, parse_object
from lightning_gpuorch.errors import CorruptPartError

_MAX_DIMS = 64
"""As many as numpy arrays and tensors may have."""
_LENGTH = struct.Struct("<Q")


class ColumnPlace(NamedTuple):
    """Element type, shape and bytes of a column."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class PartContents:
    """The structure of a part and the list of its columns.

    Attributes:
        nodes: One per prediction.
        columns: By name.
        data_start: Where the columns' bytes begin, behind the structure.
    """

    nodes: list[Any]
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
        nodes = parse_json(bytes(body[: header["structure_bytes"]]))
        if not isinstance(nodes, list):
            raise ValueError("its structure is no list")  # noqa: TRY004, TRY301
        end = num_bytes_before_data(body, header)
        start = header["structure_bytes"] + _LENGTH.size
        if end > len(body):
            raise ValueError("the list of its columns goes beyond its end")  # noqa: TRY301
        num_data_bytes = header["structure_bytes"] + header["columns_bytes"] - end
        columns = _check_columns(parse_object(bytes(body[start:end])), num_data_bytes)
    except (ValueError, struct.error) as error:
        raise CorruptPartError(
            f"{source} is damaged: its structure or the list of its columns is not of this format ({error}). Restore it from "
            "a copy; or delete it and run the same command again, which computes only what it held."
        ) from error
    return PartContents(nodes, columns, end - header["structure_bytes"])


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


def _check_columns(entries: Mapping[str, Any], num_bytes: int) -> dict[str, ColumnPlace]:
    """Read the list of columns, which must fit in so many bytes. Raises ValueError where one is not of this format."""
    places, total = {}, 0
    for name, entry in entries.items():
        if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"column {name:.40} is not described")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or not isinstance(shape, list) or len(shape) > _MAX_DIMS:
            raise ValueError(f"column {name:.40} has no dtype or no shape")
        if not isinstance(offsets, list) or len(offsets) != 2:
            raise ValueError(f"column {name:.40} has no place")
        end = integer(offsets[1], "the end of a column", 0, num_bytes)
        start = integer(offsets[0], "the start of a column", 0, end)
        total += end - start
        places[name] = ColumnPlace(dtype, tuple(integer(size, "a size") for size in shape), start, end)
    if total > num_bytes:
        raise ValueError("its columns overlap")
    return places
