"""Part files: durable, first writer wins. The set of committed parts is the journal of a job."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gpuorch.errors import CorruptPartError, PredictionStorageError, StorageFullError

if TYPE_CHECKING:
    from lightning_gpuorch.predictions.layout import StoredBatch

_PREFIX, _SUFFIX, _TEMPORARY = "part-", ".gpq", ".tmp-"
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


def loader_directory(directory: str | os.PathLike[str], loader: int) -> Path:
    """Where the parts of one dataloader of a job are."""
    return Path(directory) / f"dataloader_{loader}"


@dataclass
class Part:
    """A decoded part.

    Attributes:
        metadata: What was committed with it.
        batches: Its predictions, in order.
    """

    metadata: dict[str, Any]
    batches: list[StoredBatch]


class PartStore:
    """The parts of one dataloader.

    Args:
        directory: Where they are; made when the first one is written.
        fsync: Wait until the disk has them. False only for tests of speed.
    """

    def __init__(self, directory: str | os.PathLike[str], fsync: bool = True):
        self.directory = Path(directory)
        self._fsync = fsync

    def path(self, chunk: int) -> Path:
        """The file of a chunk."""
        return self.directory / f"{_PREFIX}{chunk:09d}{_SUFFIX}"

    def commit(self, chunk: int, batches: Sequence[StoredBatch], metadata: Mapping[str, Any]) -> bool:
        """Make a chunk's predictions durable.

        Args:
            chunk: Which chunk.
            batches: Its predictions, in order.
            metadata: JSON-serialisable fields to keep with them.

        Returns:
            True if this call made the part visible, False if somebody else's copy already is.

        Raises:
            UnsupportedPredictionError: A prediction has no durable form.
            StorageFullError: No space is left.
            PredictionStorageError: The directory cannot be written.
        """
        from lightning_gpuorch.predictions.envelope import encode

        header = {
            **metadata,
            "chunk": chunk,
            "batches": [
                {
                    "first_unit": b.first_unit,
                    "indices": _pack_indices(b.indices),
                    "size": b.size,
                    "units": _pack_indices(b.units),
                }
                for b in batches
            ],
        }
        return self.commit_bytes(chunk, encode(header, [b.output for b in batches]))

    def commit_bytes(self, chunk: int, data: bytes) -> bool:
        """Make encoded bytes visible as a chunk's part; see :meth:`commit`."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            return first_writer_wins(self.path(chunk), data, self._fsync)
        except OSError as error:
            raise storage_error(error, self.directory, len(data)) from error

    def done(self) -> set[int]:
        """Chunks that are durable."""
        try:
            with os.scandir(self.directory) as entries:
                names = [entry.name for entry in entries]
        except FileNotFoundError:
            return set()
        return {
            int(name[len(_PREFIX) : -len(_SUFFIX)])
            for name in names
            if name.startswith(_PREFIX) and name.endswith(_SUFFIX)
        }

    def read(self, chunk: int) -> Part:
        """Read and check a part.

        Raises:
            CorruptPartError: It is damaged, or holds another chunk.
        """
        from lightning_gpuorch.predictions.envelope import decode
        from lightning_gpuorch.predictions.layout import StoredBatch

        path = self.path(chunk)
        metadata, outputs = decode(path.read_bytes(), str(path))
        self._check_chunk(metadata, chunk)
        batches = [
            StoredBatch(
                entry["first_unit"],
                unpack_indices(entry["indices"]),
                entry["size"],
                output,
                unpack_indices(entry["units"]),
            )
            for entry, output in zip(metadata["batches"], outputs, strict=True)
        ]
        return Part(metadata, batches)

    def header(self, chunk: int) -> dict[str, Any]:
        """The metadata of a part, without reading its predictions.

        Raises:
            CorruptPartError: The header is damaged.
        """
        from lightning_gpuorch.predictions import envelope

        path = self.path(chunk)
        with open(path, "rb") as file:
            prefix = file.read(envelope.PREFIX_BYTES)
            data = prefix + file.read(envelope.header_bytes(prefix, str(path)))
        metadata = envelope.read_header(data, str(path))
        self._check_chunk(metadata, chunk)
        return metadata

    def sweep_temporaries(self, older_than_seconds: float = 3600.0) -> int:
        """Remove what killed writers left; returns how many files. Young ones may belong to a living writer."""
        removed = 0
        if self.directory.is_dir():
            for path in self.directory.glob(f"{_TEMPORARY}*"):
                if time.time() - path.stat().st_mtime > older_than_seconds:
                    path.unlink(missing_ok=True)
                    removed += 1
        return removed

    def _check_chunk(self, metadata: Mapping[str, Any], chunk: int) -> None:
        if metadata["chunk"] != chunk:
            raise CorruptPartError(f"{self.path(chunk)} holds chunk {metadata['chunk']}; the file was renamed.")


def first_writer_wins(path: Path, data: bytes, fsync: bool = True) -> bool:
    """Create a file with all its content at once, unless it exists.

    1. Write a temporary file nobody else uses, and wait for the disk.
    2. Link it to its final name, which fails if that exists.
    3. Wait for the directory, remove the temporary name.

    Returns:
        Whether this call created it.
    """
    temporary = path.parent / f"{_TEMPORARY}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(6)}"
    try:
        write_durably(temporary, data, fsync)
        try:
            os.link(temporary, path)
            won = True
        except FileExistsError:
            # Over NFS a repeated request may find its own success: then the temporary file has two names.
            won = os.stat(temporary).st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            won = _claim_and_rename(temporary, path)
        if fsync:
            _fsync_directory(path.parent)
        return won
    finally:
        temporary.unlink(missing_ok=True)


def _claim_and_rename(temporary: Path, path: Path) -> bool:
    """Without hard links: rename, which replaces what another writer may have put there in the same moment.

    Both files are whole and hold the same chunk, so a reader sees one of them; only the answer "who won" may be wrong.
    """
    if path.exists():
        return False
    os.rename(temporary, path)
    return True


def write_durably(path: Path, data: bytes, fsync: bool = True) -> None:
    """Write a new file and wait for the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        if fsync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(error: OSError, directory: Path, wanted_bytes: int = 0) -> PredictionStorageError:
    """The error to raise for a failed write: which directory, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next((p for p in (directory, *directory.parents) if p.exists()), Path("/"))
        free = shutil.disk_usage(existing).free
        return StorageFullError(
            f"no space left in {directory}: {wanted_bytes} bytes wanted, {free} free. What is written so far is kept; free "
            "some space and run the same command again."
        )
    return PredictionStorageError(f"cannot write predictions to {directory}: {error.strerror or error}.")


def _pack_indices(indices: Sequence[int] | None) -> Any:
    if indices is None:
        return None
    listed = list(indices)
    if listed and listed == list(range(listed[0], listed[0] + len(listed))):
        return {"start": listed[0], "stop": listed[0] + len(listed)}
    return listed


def unpack_indices(packed: Any) -> Sequence[int] | None:
    """The indices that a part's header holds."""
    return range(packed["start"], packed["stop"]) if isinstance(packed, dict) else packed
