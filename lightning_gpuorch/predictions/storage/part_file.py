"""The bytes of a part file; every damaged bit is noticed.

::

    offset    bytes
    0         4      magic "GPQ1"
    4         2      format version, little-endian like all that follows
    6         2      reserved, 0
    8         4      H, bytes of the header
    12        4      CRC-32 of bytes 0-11 and the header
    16        H      header: JSON, padded with spaces so that the body begins at a multiple of 64
    16+H      T      structure: JSON, one node per prediction, padded likewise
    16+H+T    C      columns: a safetensors blob with tensors named "0", "1", ...

The header holds the writer's fields, ``structure_bytes`` (T), ``columns_bytes`` (C) and ``body_crc32`` over both. Every
byte is under one of the two checksums and the file must end where the header says. CRC-32 finds every error burst of
up to 32 bits and all but one in 4 billion others; ``torch.load`` and safetensors would hand out a flipped bit.

Encoding copies no tensor that is contiguous on the CPU: :attr:`EncodedEnvelope.buffers` are views, to be written one
after the other. Decoding copies a prediction's columns out of the file's buffer when that prediction is asked for, so
what a caller keeps does not keep the rest of the file in memory. How a prediction becomes nodes and columns is told in
:mod:`lightning_gpuorch.predictions.storage.encode`.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_gpuorch.checked_files import parse_json
from lightning_gpuorch.errors import CorruptPartError, PredictionStorageError
from lightning_gpuorch.predictions.storage.decode import decode_tree
from lightning_gpuorch.predictions.storage.encode import TreeEncoder
from lightning_gpuorch.predictions.storage.part_contents import ColumnPlace, read_contents
from lightning_gpuorch.predictions.storage.part_frame import (
    COVERED,
    FORMAT_VERSION,
    MAGIC,
    OWN_FIELDS,
    PRELUDE_BYTES,
    check_header,
    check_prelude,
    damage,
    without_own_fields,
)
from lightning_gpuorch.predictions.storage.values.base import Column

_ALIGNMENT_BYTES = 64


@dataclasses.dataclass(frozen=True)
class EncodedEnvelope:
    """An envelope ready to be written.

    Attributes:
        buffers: Its bytes, to be written in order. They view the tensors that were encoded.
        num_bytes: Their total length.
    """

    buffers: Sequence[memoryview]
    num_bytes: int


def encode_envelope(fields: Mapping[str, Any], predictions: Sequence[Any]) -> EncodedEnvelope:
    """Encode predictions and what is known about them.

    Args:
        fields: Plain JSON for the header, which can be read without the rest.
        predictions: Predictions; each can be decoded alone.

    Returns:
        The bytes, as views of the predictions' tensors wherever these are contiguous and on the CPU.

    Raises:
        UnsupportedPredictionError: A prediction contains a type without a durable form.
        PredictionStorageError: ``fields`` is not plain JSON.
    """
    if not OWN_FIELDS.isdisjoint(fields):
        raise PredictionStorageError(
            f"{sorted(OWN_FIELDS)} are fields of the envelope itself; rename those of {fields}."
        )
    encoder = TreeEncoder()
    structure = padded([encoder.encode(prediction) for prediction in predictions], 0)
    columns = _safetensors(encoder.columns)
    body = [memoryview(structure), *columns]
    checksum = 0
    for buffer in body:
        checksum = zlib.crc32(buffer, checksum)
    columns_bytes = sum(buffer.nbytes for buffer in columns)
    own = {"structure_bytes": len(structure), "columns_bytes": columns_bytes, "body_crc32": checksum}
    try:
        header = padded({**fields, **own}, PRELUDE_BYTES)
    except (TypeError, ValueError) as error:
        raise PredictionStorageError(f"The metadata of a part must be plain JSON, got {fields!r}: {error}.") from error
    covered = COVERED.pack(MAGIC, FORMAT_VERSION, 0, len(header))
    prelude = covered + struct.pack("<I", zlib.crc32(header, zlib.crc32(covered)))
    num_bytes = len(prelude) + len(header) + len(structure) + columns_bytes
    return EncodedEnvelope([memoryview(prelude + header), *body], num_bytes)


def padded(data: Any, offset_bytes: int) -> bytes:
    """JSON that ends at an aligned position if it begins at ``offset_bytes``."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
    return text + b" " * (-(offset_bytes + len(text)) % _ALIGNMENT_BYTES)


def _safetensors(columns: Sequence[Column]) -> list[memoryview]:
    """Lay columns out as one safetensors blob; the library's own writer would copy each of them twice."""
    entries: dict[str, Any] = {}
    # Widest elements first keeps every tensor aligned to its element, as safetensors' own writer does.
    order = sorted(range(len(columns)), key=lambda position: -columns[position].element_bytes)
    offset = 0
    buffers = []
    for position in order:
        column = columns[position]
        end = offset + column.num_bytes
        entries[str(position)] = {"dtype": column.dtype, "shape": column.shape, "data_offsets": [offset, end]}
        if end > offset:
            buffers.append(column.buffer())
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return [memoryview(struct.pack("<Q", len(header)) + header), *buffers]


class Envelope:
    """An envelope in memory, verified.

    Args:
        raw: The whole file.
        source: Its name, for error messages.

    Attributes:
        fields: The writer's fields.
        num_bytes: Its length.
        num_predictions: Number of predictions in it.

    Raises:
        CorruptPartError: A checksum, a length or the magic does not fit.
    """

    def __init__(self, raw: bytearray | bytes, source: str):
        view = memoryview(raw)
        header_bytes = check_prelude(view[:PRELUDE_BYTES], len(view), source)
        header = check_header(view, header_bytes, len(view), source)
        body = view[PRELUDE_BYTES + header_bytes :]
        if zlib.crc32(body) != header["body_crc32"]:
            raise damage(source, "the checksum of its body does not fit")
        self.fields, self.num_bytes = without_own_fields(header), len(view)
        self._source = source
        contents = read_contents(body, header, source)
        self._nodes, self._columns = contents.nodes, contents.columns
        self.num_predictions = len(contents.nodes)
        self._data = body[header["structure_bytes"] + contents.data_start :]

    def prediction(self, position: int) -> Any:
        """Decode one prediction. It owns its memory; its tensors are writable.

        Raises:
            CorruptPartError: It uses a construct that this version does not know, or does not fit its columns.
        """
        try:
            return decode_tree(parse_json(bytes(self._nodes[position])), self)
        except (CorruptPartError, ValueError) as error:
            raise damage(self._source, str(error)) from error

    def dtype(self, column: int) -> str:
        """Return the safetensors dtype of a column."""
        return self._column(column).dtype

    def shape(self, column: int) -> tuple[int, ...]:
        """Return the shape of a column."""
        return self._column(column).shape

    def buffer(self, column: int) -> memoryview:
        """Return the bytes of a column, in the file's buffer."""
        place = self._column(column)
        return self._data[place.start : place.end]

    def _column(self, column: int) -> ColumnPlace:
        place = self._columns.get(str(column)) if type(column) is int else None
        if place is None:
            raise CorruptPartError(f"there is no column {column!r:.40}")
        return place
