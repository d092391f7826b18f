"""Directories in a store for what works on files of this machine: a run's records, its report."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lightning_gpuorch.paths import Location, ObjectPath
from lightning_gpuorch.predictions.storage.store import Store
from lightning_gpuorch.predictions.storage.stores import store_of

log = logging.getLogger(__name__)


@contextlib.contextmanager
def working_copy(directory: Location) -> Iterator[Path]:
    """Give a directory as one of this machine: itself, or a copy, of which all that is new or changed goes up at the end.

    Records are kept as well as can be: what the store refuses is told in the log.
    """
    if isinstance(directory, Path):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="gpuorch-copy-") as name:
        local, store = Path(name), store_of(directory)
        try:
            download(store, directory, local)
        except OSError as error:
            log.warning("%s cannot be read: %s", directory, error.strerror)
        before = _states(local)
        yield local
        try:
            for path, state in _states(local).items():
                if before.get(path) != state:
                    store.replace(directory / path.as_posix(), (local / path).read_bytes())
        except OSError as error:
            log.warning("not all records are kept in %s: %s", directory, error.strerror)


def download(store: Store[ObjectPath], directory: ObjectPath, target: Path) -> None:
    """Copy a directory of an object store, with all that is below it, into one of this machine.

    Raises:
        OSError: The store refuses.
    """
    for name in store.names(directory):
        (target / name).write_bytes(store.read(directory / name))
    for name in store.folders(directory, ""):
        (target / name).mkdir()
        download(store, directory / name, target / name)


def _states(directory: Path) -> dict[Path, tuple[int, int]]:
    found = {}
    for path in directory.rglob("*"):
        if path.is_file():
            state = path.stat()
            found[path.relative_to(directory)] = (state.st_size, state.st_mtime_ns)
    return found
