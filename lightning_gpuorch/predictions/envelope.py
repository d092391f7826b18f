"""What are the bytes of a part file, and how is every damaged bit noticed?

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
:mod:`lightning_gpuorch.predictions.codec`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_gpuorch.errors import CorruptPartError, PredictionStorageError
from lightning_gpuorch.predictions.codec import Column, Node, TreeEncoder
from lightning_gpuorch.predictions.decoder import decode_tree

FORMAT_VERSION = 1

_MAGIC = b"GPQ1"
_COVERED = struct.Struct("<4sHHI")
_PRELUDE_BYTES = _COVERED.size + 4
_ALIGNMENT_BYTES = 64
_FIRST_READ_BYTES = 4096
"""Enough for the header of most parts: one read instead of two."""
_OWN_FIELDS = frozenset({"structure_bytes", "columns_bytes", "body_crc32"})


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
    if not _OWN_FIELDS.isdisjoint(fields):
        raise PredictionStorageError(
            f"{sorted(_OWN_FIELDS)} are fields of the envelope itself; rename those of {fields}."
        )
    encoder = TreeEncoder()
    structure = _padded([encoder.encode(prediction) for prediction in predictions], 0)
    columns = _safetensors(encoder.columns)
    body = [memoryview(structure), *columns]
    checksum = 0
    for buffer in body:
        checksum = zlib.crc32(buffer, checksum)
    columns_bytes = sum(buffer.nbytes for buffer in columns)
    own = {"structure_bytes": len(structure), "columns_bytes": columns_bytes, "body_crc32": checksum}
    try:
        header = _padded({**fields, **own}, _PRELUDE_BYTES)
    except (TypeError, ValueError) as error:
        raise PredictionStorageError(f"The metadata of a part must be plain JSON, got {fields!r}: {error}.") from error
    covered = _COVERED.pack(_MAGIC, FORMAT_VERSION, 0, len(header))
    prelude = covered + struct.pack("<I", zlib.crc32(header, zlib.crc32(covered)))
    num_bytes = len(prelude) + len(header) + len(structure) + columns_bytes
    return EncodedEnvelope([memoryview(prelude + header), *body], num_bytes)


def _padded(data: Any, offset_bytes: int) -> bytes:
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
        num_predictions: Number of predictions in it.

    Raises:
        CorruptPartError: A checksum, a length or the magic does not fit.
    """

    def __init__(self, raw: bytearray | bytes, source: str):
        view = memoryview(raw)
        header_bytes = _check_prelude(view[:_PRELUDE_BYTES], len(view), source)
        header = _check_header(view, header_bytes, len(view), source)
        body = view[_PRELUDE_BYTES + header_bytes :]
        if zlib.crc32(body) != header["body_crc32"]:
            raise damage(source, "the checksum of its body does not fit")
        structure, columns = body[: header["structure_bytes"]], body[header["structure_bytes"] :]
        self.fields = _without_own_fields(header)
        self._source = source
        self._nodes: list[Node] = json.loads(bytes(structure))
        self.num_predictions = len(self._nodes)
        (entries_bytes,) = struct.unpack("<Q", columns[:8])
        self._entries: dict[str, Any] = json.loads(bytes(columns[8 : 8 + entries_bytes]))
        self._data = columns[8 + entries_bytes :]

    def prediction(self, position: int) -> Any:
        """Decode one prediction. It owns its memory; its tensors are writable.

        Raises:
            CorruptPartError: It uses a construct that this version does not know.
        """
        try:
            return decode_tree(self._nodes[position], self)
        except CorruptPartError as error:
            raise damage(self._source, str(error)) from None

    def dtype(self, column: int) -> str:
        """Return the safetensors dtype of a column."""
        return str(self._entries[str(column)]["dtype"])

    def shape(self, column: int) -> tuple[int, ...]:
        """Return the shape of a column."""
        return tuple(self._entries[str(column)]["shape"])

    def buffer(self, column: int) -> memoryview:
        """Return the bytes of a column, in the file's buffer."""
        start, end = self._entries[str(column)]["data_offsets"]
        return self._data[start:end]


def read_fields(file: io.FileIO, file_bytes: int, source: str) -> dict[str, Any]:
    """Read the writer's fields only.

    Args:
        file: The file, at its beginning.
        file_bytes: Its length.
        source: Its name, for error messages.

    Returns:
        The fields. The header's checksum and the file's length are verified, the body's checksum is not.

    Raises:
        CorruptPartError: A checksum, a length or the magic does not fit.
    """
    raw = file.read(_FIRST_READ_BYTES)
    header_bytes = _check_prelude(memoryview(raw)[:_PRELUDE_BYTES], file_bytes, source)
    if len(raw) < _PRELUDE_BYTES + header_bytes:
        raw += file.read(_PRELUDE_BYTES + header_bytes - len(raw))
    return _without_own_fields(_check_header(memoryview(raw), header_bytes, file_bytes, source))


def damage(source: str, what: str) -> CorruptPartError:
    """Return the error to raise for a damaged file: which one, what is wrong with it, and the way out."""
    return CorruptPartError(
        f"{source} is damaged: {what}. Restore it from a copy; or delete it and run the same command again, which "
        "computes only what it held."
    )


def _check_prelude(prelude: memoryview, file_bytes: int, source: str) -> int:
    """Check the first bytes as far as can be without the header; returns the header's length."""
    if len(prelude) < _PRELUDE_BYTES:
        raise damage(source, f"it ends after {file_bytes} bytes")
    magic, version, _, header_bytes = _COVERED.unpack(prelude[: _COVERED.size])
    if magic != _MAGIC:
        raise damage(source, f"it begins with {bytes(magic)!r} in place of {_MAGIC!r}")
    if file_bytes < _PRELUDE_BYTES + header_bytes:
        raise damage(source, f"it ends after {file_bytes} bytes, within its header")
    if version > FORMAT_VERSION:
        raise CorruptPartError(
            f"{source} says it has format {version}, and this version of lightning_gpuorch reads formats up to "
            f"{FORMAT_VERSION}. It is damaged, or a newer version has written it."
        )
    return int(header_bytes)


def _check_header(view: memoryview, header_bytes: int, file_bytes: int, source: str) -> dict[str, Any]:
    end = _PRELUDE_BYTES + header_bytes
    if len(view) < end:
        raise damage(source, f"it ends after {len(view)} bytes, within its header")
    (expected,) = struct.unpack("<I", view[_COVERED.size : _PRELUDE_BYTES])
    if zlib.crc32(view[_PRELUDE_BYTES:end], zlib.crc32(view[: _COVERED.size])) != expected:
        raise damage(source, "the checksum of its header does not fit")
    header: dict[str, Any] = json.loads(bytes(view[_PRELUDE_BYTES:end]))
    expected_bytes = end + header["structure_bytes"] + header["columns_bytes"]
    if file_bytes != expected_bytes:
        raise damage(source, f"it has {file_bytes} bytes in place of {expected_bytes}")
    return header


def _without_own_fields(header: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in header.items() if name not in _OWN_FIELDS}
