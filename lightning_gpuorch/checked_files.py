"""Files that another program may have written: opened without waiting, parsed into JSON of the expected types.

Everything that reads an output directory, a run's records or a cache of plans goes through here. A checksum tells that bytes
are as they were written, not who wrote them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MAX_INTEGER = 2**62
"""Counts and positions beyond are refused: sums of a few still fit 64 bits."""
MAX_LINE_BYTES = 2**20
"""Of a file of records: what is longer is no line that was written here."""
MAX_FILE_BYTES = 8 * 2**20
"""Of what is read at once, unless a kind of file may have more. A file without content can have any length."""
_MAX_DEPTH = 256
"""Of JSON; what is written here is less deep, and can be walked by functions that call themselves."""
_MEMORY_BYTES, _MEMORY_PER_BYTE = 32 * 2**20, 24
"""JSON may become so many bytes of objects, or so many times its own; what is written here becomes 10 times its own."""
_OBJECT_BYTES, _ARRAY_BYTES, _ITEM_BYTES = 240, 96, 40
"""What a dict, a list and anything in them take in memory."""


class TooLargeFileError(OSError):
    """A file is larger than one of its kind may be."""


class NotRegularFileError(OSError):
    """A link, directory, pipe, socket or device is where a file should be."""


def open_file(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading; never waits for a writer, as a pipe would, and follows no link.

    Returns:
        A descriptor.

    Raises:
        NotRegularFileError: It is something else.
        OSError: It cannot be opened.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):  # opening a device can have effects
        raise NotRegularFileError(f"{os.fspath(path)} is no regular file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegularFileError(f"{os.fspath(path)} is no regular file")
    return descriptor


def read_file(path: str | os.PathLike[str], max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Read a whole regular file.

    Raises:
        NotRegularFileError: It is something else.
        TooLargeFileError: It is larger than it may be.
        OSError: It cannot be read.
    """
    with open(open_file(path), "rb") as file:
        content = file.read(max_bytes + 1) if os.fstat(file.fileno()).st_size <= max_bytes else None
    if content is None or len(content) > max_bytes:
        raise TooLargeFileError(
            errno.EFBIG, f"it is larger than the {max_bytes:,} bytes that such a file may have", os.fspath(path)
        )
    return content


def read_lines(path: str | os.PathLike[str], offset: int = 0) -> Iterator[bytes]:
    """Read the lines of a regular file, each with its newline; the last one may be without, if it is being written.

    A line that is too long is the last one: what comes behind it is not read.

    Raises:
        NotRegularFileError: It is something else.
        OSError: It cannot be read.
    """
    with open(open_file(path), "rb") as file:
        file.seek(offset)
        while line := file.readline(MAX_LINE_BYTES):
            yield line
            if len(line) == MAX_LINE_BYTES:
                return


def regular_files(directory: Path, pattern: str) -> Iterator[Path]:
    """Find the regular files of a directory whose names match, ascending."""
    for path in sorted(directory.glob(pattern)):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(path.lstat().st_mode):
                yield path


def parse_json(raw: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: It is none, is nested too deeply, or would take much more memory than bytes.
    """
    _check_memory(raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw)
    try:
        data = json.loads(raw)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [data]
    for _ in range(_MAX_DEPTH):
        level = [item for value in level for item in _items(value) if isinstance(item, (list, dict))]
        if not level:
            return data
    raise ValueError("it is nested too deeply")


def _check_memory(raw: bytes) -> None:
    """Raise ValueError if JSON has so many small values that they would take much more memory than its bytes."""
    limit_bytes = max(_MEMORY_BYTES, _MEMORY_PER_BYTE * len(raw))
    if _memory_bytes(raw) <= limit_bytes:
        return
    # Text may hold any number of brackets: count those outside of it.
    shorn = raw.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_STRUCTURE).replace(b'""', b"")
    num_bytes = _memory_bytes(b"".join(shorn.split(b'"')[::2]))
    if num_bytes > limit_bytes:
        raise ValueError(f"its {len(raw):,} bytes would take some {num_bytes:,} in memory")


_NO_STRUCTURE = bytes(set(range(256)) - set(b'"[{,'))


def _memory_bytes(raw: bytes) -> int:
    arrays, objects = raw.count(b"["), raw.count(b"{")
    return _ARRAY_BYTES * arrays + _OBJECT_BYTES * objects + _ITEM_BYTES * (raw.count(b",") + arrays + objects)


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def parse_object(raw: bytes | str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: It is none.
    """
    data = parse_json(raw)
    if not isinstance(data, dict):
        raise ValueError(f"it is no JSON object but a {type(data).__name__}")  # noqa: TRY004 - of the file, not of an argument
    return data


def integer(value: Any, name: str, low: int = 0, high: int = MAX_INTEGER) -> int:
    """Check that a value is an integer within bounds.

    Raises:
        ValueError: It is not.
    """
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is no integer from {low} to {high}, but {value!r:.40}")
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a number that arithmetic can be done with: finite, no bool, and not beyond 64 bits."""
    return type(value) in (int, float) and math.isfinite(value if type(value) is float else 0) and abs(value) < 2**63
