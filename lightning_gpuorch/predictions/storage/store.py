"""Where files are kept: a file system, or an object store. Everything else here is written once, over this interface.

A store offers few operations, and one that the commit of everything rests on: :meth:`Store.create_once`. Of many that
create the same file, one wins, and no reader ever sees a part of it. A file system gives that by a link
(:mod:`lightning_gpuorch.predictions.storage.files`), an object store by a conditional put
(:mod:`lightning_gpuorch.predictions.storage.object_store`).

All operations raise ``OSError`` where the store refuses, ``FileNotFoundError`` where there is no such file;
:meth:`Store.error` makes the one for the user of it.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from lightning_gpuorch.errors import PredictionStorageError
from lightning_gpuorch.paths import ObjectPath

MAX_READ_BYTES = 64 * 2**20
"""Of what is read at once; parts are read with :meth:`Store.open`."""

PathT = TypeVar("PathT", Path, ObjectPath)


class ReadableFile(Protocol):
    """An open file, read from its beginning."""

    def read(self, size: int = -1, /) -> bytes:
        """Read the next bytes, at most so many; none at the end."""
        ...

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Read the next bytes into a buffer; returns how many."""
        ...


class Store(ABC, Generic[PathT]):
    """What a place for files can do. Paths are those of its kind.

    What an operation costs is told in requests to an object store and bytes that travel; on a file system a request is a
    system call or a few.
    """

    @abstractmethod
    def names(self, directory: PathT) -> Iterator[str]:
        """Names of the files in a directory, in any order; one request per 1,000, and no content."""

    @abstractmethod
    def sizes_bytes(self, directory: PathT) -> Iterator[tuple[str, int]]:
        """Names and lengths of the files in a directory, as :meth:`names`; no file whose length cannot be told."""

    @abstractmethod
    def folders(self, directory: PathT, prefix: str) -> list[str]:
        """Names of the directories in a directory that begin with a prefix, ascending; none if there is no directory."""

    @abstractmethod
    def exists(self, path: PathT) -> bool:
        """Whether there is such a file; one request, no content."""

    @abstractmethod
    def holds_anything(self, directory: PathT) -> bool:
        """Whether a directory is there; in an object store, whether a file is below it. One request."""

    @abstractmethod
    def size_bytes(self, path: PathT) -> int:
        """Length of a file; one request, no content."""

    @abstractmethod
    def open(self, path: PathT) -> contextlib.AbstractContextManager[tuple[ReadableFile, int]]:
        """Open a file, and tell its length; one request, at most 64 KiB of content. The rest: one per 8 MiB."""

    @abstractmethod
    def read(self, path: PathT, max_bytes: int = MAX_READ_BYTES) -> bytes:
        """Read a whole file; one request, its content once. A larger one is refused with ``OSError``."""

    @abstractmethod
    def create_once(self, path: PathT, buffers: Sequence[bytes | memoryview], *, fsync: bool = True) -> bool:
        """Create a file with all its content, unless it exists.

        Of an object store: one request and the content once; above 64 MiB a request per 8 MiB, three more, and the content
        once more within the store.

        Args:
            path: Its directory must exist, where the store has directories.
            buffers: The content, one buffer after the other.
            fsync: Wait until it survives a power cut. Object stores always do.

        Returns:
            True if this call made the file, False if somebody else's is there.
        """

    @abstractmethod
    def replace(self, path: PathT, content: bytes) -> None:
        """Replace a file; readers see the old content or the new one. One request, the content once."""

    @abstractmethod
    def append(self, path: PathT, line: bytes) -> None:
        """Add to the end of a file of notes, which is made if need be.

        An object store reads and replaces it, so of two that append at once, one may be lost there: for what only explains.
        """

    @abstractmethod
    def remove(self, path: PathT) -> None:
        """Remove a file durably; one request."""

    @abstractmethod
    def remove_directory(self, directory: PathT) -> None:
        """Remove a directory with all that is in it, as far as that can be done; a request per 1,000 files."""

    @abstractmethod
    def set_aside(self, path: PathT, target: PathT) -> None:
        """Give a file another name in its directory, durably; what has that name is replaced. Content stays in the store."""

    @abstractmethod
    def make_directory(self, directory: PathT, parents: bool = True) -> None:
        """Make a directory durably; without ``parents``, the one above it has to be there. Nothing in an object store."""

    @abstractmethod
    def check_writable(self, directory: PathT) -> None:
        """Find out before work starts whether results can be written. An object store: at most eight requests.

        Raises:
            PredictionStorageError: They cannot; the error says why and what to do.
        """

    @abstractmethod
    def sweep_temporaries(self, directory: PathT, older_than_seconds: float) -> int:
        """Remove what killed writers left in a directory; returns how many files."""

    @abstractmethod
    def error(self, error: OSError, directory: PathT, wanted_bytes: int) -> PredictionStorageError:
        """Return the error to raise when the store refuses: where, why, and what to do."""
