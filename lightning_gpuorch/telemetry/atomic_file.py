"""Files that readers see whole: the old content or the new one, never a part."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, in place of one that may be there.

    Args:
        path: The file.
        data: Its content.

    Raises:
        OSError: It cannot be written; what was there before still is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
