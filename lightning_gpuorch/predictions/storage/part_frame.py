"""The frame of a part file: its first bytes, its header, its checksums; see :mod:`.part_file`.

Nothing here looks at the predictions, so nothing here imports torch: a supervisor can check files. A part that is a Parquet
file (:mod:`.parquet_file`) has the same frame behind Parquet's own magic, which readers of Parquet pass over.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

from lightning_gpuorch.checked_files import integer, parse_object
from lightning_gpuorch.errors import CorruptPartError
from lightning_gpuorch.predictions.storage.part_contents import num_bytes_before_data, read_contents, read_nodes
from lightning_gpuorch.predictions.storage.store import ReadableFile

FORMAT_VERSION = 2
"""2 writes like batches as runs."""

MAGIC = b"GPQ1"
PARQUET_MAGIC = b"PAR1"
COVERED = struct.Struct("<4sHHI")
PRELUDE_BYTES = COVERED.size + 4
OWN_FIELDS = frozenset({"structure_bytes", "columns_bytes", "body_crc32"})
_FIRST_READ_BYTES = 4096
"""Enough for the header of most parts: one read instead of two."""
_BLOCK_BYTES = 2**20
_MAX_HEADER_BYTES = 2**28


class NewerFormatError(CorruptPartError):
    """A newer version has written the file; it is not damaged."""


def check_file(file: ReadableFile, file_bytes: int, source: str) -> tuple[dict[str, Any], int]:
    """Check every byte of a file against its checksums, a block at a time, and what can be told of its contents.

    Args:
        file: The file, at its beginning.
        file_bytes: Its length.
        source: Its name, for error messages.

    Returns:
        The writer's fields, and the number of predictions.

    Raises:
        CorruptPartError: A checksum, a length or the magic does not fit, or the structure is none.
    """
    header, raw, body_start = _read_header(file, file_bytes, source)
    first = bytearray(memoryview(raw)[body_start:])  # of the body, as far as its list of columns
    checksum = zlib.crc32(first)
    is_parquet = raw.startswith(PARQUET_MAGIC)
    while block := file.read(_BLOCK_BYTES):
        checksum = zlib.crc32(block, checksum)
        if len(first) < header["structure_bytes"] if is_parquet else _is_short(first, header):
            first += block
    if checksum != header["body_crc32"]:
        raise damage(source, "the checksum of its body does not fit")
    if is_parquet:
        return without_own_fields(header), len(read_nodes(memoryview(first), header, source))
    return without_own_fields(header), len(read_contents(memoryview(first), header, source).nodes)


def _is_short(body: bytearray, header: Mapping[str, Any]) -> bool:
    try:
        with memoryview(body) as view:
            return len(body) < num_bytes_before_data(view, header)
    except struct.error:
        return True
    except ValueError:
        return False  # nothing there will be read


def read_fields(file: ReadableFile, file_bytes: int, source: str) -> dict[str, Any]:
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
    return without_own_fields(_read_header(file, file_bytes, source)[0])


def read_whole(file: ReadableFile, file_bytes: int, source: str) -> bytearray:
    """Read all of a file, once its header has said that it has the right length.

    Args:
        file: The file, at its beginning.
        file_bytes: Its length.
        source: Its name, for error messages.

    Raises:
        CorruptPartError: The header's checksum, a length or the magic does not fit.
    """
    _, read, _ = _read_header(file, file_bytes, source)
    raw = bytearray(file_bytes)
    raw[: len(read)] = read
    position, view = len(read), memoryview(raw)
    while position < file_bytes and (count := file.readinto(view[position:])):
        position += count
    return raw if position == file_bytes else bytearray(view[:position])


def damage(source: str, what: str) -> CorruptPartError:
    """Return the error to raise for a damaged file: which one, what is wrong with it, and the way out."""
    return CorruptPartError(
        f"{source} is damaged: {what}. Restore it from a copy; or delete it and run the same command again, which "
        "computes only what it held."
    )


def _read_header(file: ReadableFile, file_bytes: int, source: str) -> tuple[dict[str, Any], bytes, int]:
    """Read the header; returns it, what was read of the file, and where in that the body begins."""
    raw = file.read(_FIRST_READ_BYTES)
    before = frame_start(raw)
    header_bytes = check_prelude(memoryview(raw)[before : before + PRELUDE_BYTES], file_bytes - before, source)
    end = before + PRELUDE_BYTES + header_bytes
    if len(raw) < end:
        raw += file.read(end - len(raw))
    return check_header(memoryview(raw)[before:], header_bytes, file_bytes - before, source), raw, end


def frame_start(raw: bytes | bytearray | memoryview) -> int:
    """Where the frame begins in a file of whose beginning these are the bytes."""
    return len(PARQUET_MAGIC) if bytes(raw[: len(PARQUET_MAGIC)]) == PARQUET_MAGIC else 0


def check_prelude(prelude: memoryview, file_bytes: int, source: str) -> int:
    """Check the first bytes as far as can be without the header; returns the header's length."""
    if len(prelude) < PRELUDE_BYTES:
        raise damage(source, f"it ends after {file_bytes} bytes")
    magic, _, _, header_bytes = COVERED.unpack(prelude[: COVERED.size])
    if magic != MAGIC:
        raise damage(source, f"it begins with {bytes(magic)!r} in place of {MAGIC!r}")
    if header_bytes > _MAX_HEADER_BYTES:
        raise damage(source, f"it claims a header of {header_bytes} bytes")
    if file_bytes < PRELUDE_BYTES + header_bytes:
        raise damage(source, f"it ends after {file_bytes} bytes, within its header")
    return int(header_bytes)


def check_header(view: memoryview, header_bytes: int, file_bytes: int, source: str) -> dict[str, Any]:
    """Check the header, given the file up to its end, and the file's length; returns the header."""
    end = PRELUDE_BYTES + header_bytes
    if len(view) < end:
        raise damage(source, f"it ends after {len(view)} bytes, within its header")
    (expected,) = struct.unpack("<I", view[COVERED.size : PRELUDE_BYTES])
    if zlib.crc32(view[PRELUDE_BYTES:end], zlib.crc32(view[: COVERED.size])) != expected:
        raise damage(source, "the checksum of its header does not fit")
    version = COVERED.unpack(view[: COVERED.size])[1]
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{source} has format {version}, and this version of lightning_gpuorch reads formats up to "
            f"{FORMAT_VERSION}: a newer version has written it. Use that one."
        )
    try:
        header: dict[str, Any] = parse_object(bytes(view[PRELUDE_BYTES:end]))
        sizes = [integer(header[name], name) for name in ("structure_bytes", "columns_bytes", "body_crc32")]
    except (ValueError, KeyError) as error:
        raise damage(source, f"its header is not of this format ({error!r})") from error
    expected_bytes = end + sizes[0] + sizes[1]
    if file_bytes != expected_bytes:
        raise damage(source, f"it has {file_bytes} bytes in place of {expected_bytes}")
    return header


def without_own_fields(header: Mapping[str, Any]) -> dict[str, Any]:
    """The writer's fields of a header."""
    return {name: value for name, value in header.items() if name not in OWN_FIELDS}
