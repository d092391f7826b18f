"""A file system as a store: the interface over :mod:`lightning_gpuorch.predictions.storage.files`."""
# ruff: noqa: D102 - the interface tells what its methods do

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_gpuorch.checked_files import NotRegularFileError, open_file, read_file
from lightning_gpuorch.errors import PredictionStorageError
from lightning_gpuorch.predictions.storage import files
from lightning_gpuorch.predictions.storage.store import MAX_READ_BYTES, Store


class FileSystem(Store[Path]):
    """A directory of this machine, or of a file system that it mounts."""

    def names(self, directory: Path) -> Iterator[str]:
        return iter(os.listdir(directory))

    def sizes_bytes(self, directory: Path) -> Iterator[tuple[str, int]]:
        for name in self.names(directory):
            with contextlib.suppress(OSError):  # opening the file tells why
                yield name, self.size_bytes(directory / name)

    def folders(self, directory: Path, prefix: str) -> list[str]:
        return sorted(path.name for path in directory.glob(f"{prefix}*") if path.is_dir())

    def exists(self, path: Path) -> bool:
        return path.exists()

    def holds_anything(self, directory: Path) -> bool:
        return directory.is_dir()

    def size_bytes(self, path: Path) -> int:
        return files.content_path(path).stat().st_size

    @contextlib.contextmanager
    def open(self, path: Path) -> Iterator[tuple[io.FileIO, int]]:
        with open(_descriptor(path), "rb", buffering=0) as file:
            yield file, os.fstat(file.fileno()).st_size

    def read(self, path: Path, max_bytes: int = MAX_READ_BYTES) -> bytes:
        return read_file(files.content_path(path), max_bytes)

    def create_once(self, path: Path, buffers: Sequence[bytes | memoryview], *, fsync: bool = True) -> bool:
        return files.create_once(path, buffers, fsync=fsync)

    def replace(self, path: Path, content: bytes) -> None:
        files.replace(path, content)

    def append(self, path: Path, line: bytes) -> None:
        # One write to the end of the file; it begins a line, whatever a killed writer left before it.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, b"\n" + line + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        files.remove(path)

    def remove_directory(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)

    def set_aside(self, path: Path, target: Path) -> None:
        files.set_aside(path, target)

    def make_directory(self, directory: Path, parents: bool = True) -> None:
        if not parents and not directory.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory.parent))
        files.make_directory(directory)

    def check_writable(self, directory: Path) -> None:
        files.check_writable(directory)

    def sweep_temporaries(self, directory: Path, older_than_seconds: float) -> int:
        return files.sweep_temporaries(directory, older_than_seconds)

    def error(self, error: OSError, directory: Path, wanted_bytes: int) -> PredictionStorageError:
        return files.storage_error(error, directory, wanted_bytes)


def _descriptor(path: Path) -> int:
    try:
        return open_file(files.content_path(path))
    except FileNotFoundError as error:
        if path.is_dir():
            raise NotRegularFileError("it is a directory without content") from error
        raise
