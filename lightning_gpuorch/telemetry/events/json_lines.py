"""How is a record written as one line of JSON, and read back so that a torn line harms no other?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
    for line in path.read_bytes().split(b"\n"):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            unreadable += 1
            continue
        if isinstance(record, dict):
            records.append(record)
        else:
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
