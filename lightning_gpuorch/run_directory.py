"""What a supervisor keeps on its node while it runs, and how the next one removes what a killed one has left.

A folder under the temporary directory for logs, events and error records, and a file in shared memory for heartbeats.
The supervisor holds a lock in the folder for as long as it lives; the kernel releases it whatever way it dies. A folder
whose lock can be taken has no owner any more.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

_PREFIX = "gpuorch-"
_LOCK_NAME = "lock"
_SHARED_MEMORY = Path("/dev/shm")


class RunDirectory:
    """The folder of one run on this node; made at once.

    Args:
        run_id: Name of the run.

    Attributes:
        path: The folder.
        table: Where the heartbeat table goes.
    """

    def __init__(self, run_id: str):
        # Under a hidden name until it is locked: nobody may take it for one that was left behind.
        hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}{run_id}-"))
        self._lock = os.open(hidden / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = hidden.with_name(hidden.name.removeprefix("."))
        hidden.rename(self.path)
        self.table = _table_of(self.path)

    def remove(self) -> None:
        """Remove the folder and the table."""
        _remove(self.path)
        os.close(self._lock)


def sweep() -> list[Path]:
    """Remove the folders of supervisors that are gone.

    Returns:
        What was removed.
    """
    removed = []
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}run-*"):
        try:
            if path.stat().st_uid != os.getuid():
                continue
            lock = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # gone meanwhile, or not one of these folders
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
            removed.append(path)
        except BlockingIOError:  # its owner lives
            continue
        finally:
            os.close(lock)
    if removed:
        log.debug("removed what killed supervisors had left: %s", ", ".join(map(str, removed)))
    return removed


def _table_of(path: Path) -> Path:
    if not _SHARED_MEMORY.is_dir():
        return path / "heartbeats"
    return _SHARED_MEMORY / path.name.rpartition("-")[0]  # without the random letters of the folder's name


def _remove(path: Path) -> None:
    _table_of(path).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
