"""What is to be known of an Arrow IPC stream before Arrow reads it, and of its arrays before they are made into objects.

A compressed buffer claims its own length, and Arrow makes room for it before it decompresses. This package writes none, so
a stream with one is of another origin and refused. Only Flatbuffers' tables are walked here, down to the field that names the
compression: https://arrow.apache.org/docs/format/Columnar.html
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

_CONTINUATION = 0xFFFFFFFF
_HEADER, _BODY_LENGTH = 2, 3
_DICTIONARY_DATA = 1
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_COMPRESSION = 3


def refuse_compression(stream: bytes) -> None:
    """Check that no record batch of a stream is compressed.

    Raises:
        ValueError: One is, or the frame of the stream is damaged.
    """
    position = 0
    try:
        while position + 8 <= len(stream):
            marker, length = struct.unpack_from("<Ii", stream, position)
            if marker != _CONTINUATION or length < 0:
                raise ValueError("an Arrow message does not begin where it should")
            if length == 0:
                return
            message = stream[position + 8 : position + 8 + length]
            if len(message) < length:
                raise ValueError("an Arrow message goes beyond the end")
            body_bytes = _check_message(message)
            position += 8 + length + body_bytes
    except struct.error as error:
        raise ValueError(f"an Arrow message is damaged: {error}") from error


def _check_message(message: bytes) -> int:
    """Check one message; returns the length of its body."""
    root = _follow(message, 0)
    kind_at, header_at, length_at = (_field(message, root, slot) for slot in (1, _HEADER, _BODY_LENGTH))
    kind = message[kind_at] if kind_at else 0
    if kind in (_DICTIONARY_BATCH, _RECORD_BATCH) and header_at:
        batch = _follow(message, header_at)
        if kind == _DICTIONARY_BATCH:
            data_at = _field(message, batch, _DICTIONARY_DATA)
            batch = _follow(message, data_at) if data_at else batch
        if _field(message, batch, _COMPRESSION):
            raise ValueError("an Arrow record batch is compressed")
    body_bytes = struct.unpack_from("<q", message, length_at)[0] if length_at else 0
    if body_bytes < 0:
        raise ValueError("an Arrow message has a body of negative length")
    return int(body_bytes)


def _follow(message: bytes, position: int) -> int:
    return position + int(struct.unpack_from("<I", message, position)[0])


def _field(message: bytes, table: int, slot: int) -> int:
    """Where a field of a table is; 0 if it has the default."""
    vtable = table - int(struct.unpack_from("<i", message, table)[0])
    if vtable < 0:
        raise ValueError("an Arrow message is damaged: a table lies outside of it")
    (num_bytes,) = struct.unpack_from("<H", message, vtable)
    if 4 + 2 * slot >= num_bytes:
        return 0
    offset = int(struct.unpack_from("<H", message, vtable + 4 + 2 * slot)[0])
    if table + offset >= len(message):
        raise ValueError("an Arrow message is damaged: a field lies outside of it")
    return table + offset if offset else 0


def count_values(array: Any) -> int:
    """Values of an array at all levels, and bytes of text that is stored once and seen many times.

    Lists of nulls take no bytes, and views may show the same values again and again.

    Args:
        array: Of pyarrow, validated.
    """
    import pyarrow as pa

    kind, count = array.type, len(array)
    if isinstance(kind, pa.BaseExtensionType):
        return count_values(array.storage)
    if pa.types.is_struct(kind) or pa.types.is_union(kind):
        return count + sum(count_values(array.field(number)) for number in range(kind.num_fields))
    if pa.types.is_dictionary(kind):
        return count + count_values(array.dictionary)
    if pa.types.is_run_end_encoded(kind):
        return count + count_values(array.values)
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        shown = int(array.sizes.to_numpy(zero_copy_only=False).sum())
        return count + shown + count_values(array.values)
    if pa.types.is_nested(kind):
        return count + count_values(array.values)
    if kind in (pa.string_view(), pa.binary_view()) and count:
        lengths = np.frombuffer(array.buffers()[1], "<i4")[4 * array.offset : 4 * (array.offset + count) : 4]
        return count + int(lengths.astype(np.int64).sum())
    return count
