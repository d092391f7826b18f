"""Small JSON files that carry a CRC-32 of themselves: a flipped digit in one would put predictions in the wrong place."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from lightning_gpuorch.checked_files import NotRegularFileError, parse_object
from lightning_gpuorch.errors import CorruptPartError
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.storage.stores import storage_error, store_of

_MAX_BYTES = 8 * 2**20
"""Of a file that is read as a whole, and takes some 20 times as much in memory at worst."""


def sealed(data: Mapping[str, Any]) -> bytes:
    """Return the bytes of a file that holds ``data``."""
    return json.dumps({**data, "crc32": _checksum(data)}, indent=1).encode()


def _checksum(data: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())


def read_sealed(path: Location) -> dict[str, Any] | None:
    """Read such a file; None if there is none.

    Raises:
        CorruptPartError: It is damaged.
        PredictionStorageError: It cannot be read.
    """
    try:
        content = store_of(path).read(path, _MAX_BYTES)
    except FileNotFoundError:
        return None
    except NotRegularFileError as error:
        raise CorruptPartError(f"{path} is damaged: it is no regular file. Restore it.") from error
    except OSError as error:
        raise storage_error(error, path.parent) from error
    try:
        data = parse_object(content)
        checksum = data.pop("crc32")
    except (ValueError, KeyError) as error:
        raise CorruptPartError(f"{path} is damaged: it is no JSON object with a checksum. Restore it.") from error
    if checksum != _checksum(data):
        raise CorruptPartError(
            f"{path} is damaged: its checksum does not fit (it must not be edited). Restore it, or use another output "
            "directory."
        )
    return data
