"""Records as lines of JSON: encoded, appended, and read back so that a torn line harms no other."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_gpuorch import checked_files


def encode_line(fields: Mapping[str, Any]) -> bytes:
    """One record as one line of strict JSON, newline included.

    What JSON has no form for (devices, paths, exceptions) is written as its text; numbers that are not finite, which
    JSON forbids, as ``"nan"``, ``"inf"`` and ``"-inf"``.
    """
    try:
        text = json.dumps(fields, default=_plain, allow_nan=False, ensure_ascii=False)
    except ValueError:
        text = json.dumps(_finite(fields), default=_plain, allow_nan=False, ensure_ascii=False)
    # A lone surrogate (an undecodable file name) has no UTF-8 form.
    return text.encode("utf-8", "backslashreplace") + b"\n"


class LineFile:
    """A file that one process appends whole lines to, with one write each; made, with its folder, by the first.

    A line may be torn: by an earlier process that died while it wrote, or by a disk that took a part. What is appended next
    begins on a new line.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None
        self._torn = False

    def append(self, lines: bytes) -> None:
        """Append lines.

        Args:
            lines: Each with its newline.

        Raises:
            OSError: They are not written, or only a part of them is.
        """
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._torn = os.fstat(self._descriptor).st_size > 0
        data = b"\n" + lines if self._torn else lines
        written = os.write(self._descriptor, data)
        self._torn = written < len(data)
        if self._torn:
            raise OSError(f"{self.path}: {written} of {len(data)} bytes written")

    def close(self) -> None:
        """Close the file; the next line opens it again.

        Raises:
            OSError: A network file system reports late that it could not write.
        """
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read every whole record of a file.

    Args:
        path: A file of lines written by :func:`encode_line`; a process may have died while writing any of them.

    Returns:
        The records, in file order, and the number of lines that could not be read.

    Raises:
        OSError: The file cannot be read at all.
    """
    records, unreadable = [], 0
    for line in checked_files.read_lines(path):
        if line == b"\n":
            continue
        try:
            records.append(checked_files.parse_object(line))
        except ValueError:
            unreadable += 1
    return records, unreadable


def _plain(value: Any) -> Any:
    # numpy scalars and tensors of one element; without importing either
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:
        number = item()
        return number if not isinstance(number, float) or math.isfinite(number) else str(number)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
