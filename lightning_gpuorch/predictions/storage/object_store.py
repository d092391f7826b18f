"""Object stores: S3 and what speaks its language, Google Cloud Storage, Azure, and a memory for tests.

:meth:`ObjectStore.create_once` is a conditional put ("create, unless it exists"), which these stores decide atomically:

1. Put the object on the condition that there is none. If the store says that there is one, somebody else has won.
2. An answer may get lost after the store has done its work: a timeout, a 5xx, a broken connection; and a 409 says that two
   puts have met, not how it ended. Then this put is sent again, and from now on "there is one" may mean our own:
3. read it back. Another content has lost us the race, ours is ours. Parts name the run that wrote them, so no two are equal.

Above 64 MiB the content goes up in pieces, under a name of its own, and step 1 is a conditional copy within the store.

The client's own repetitions are switched off: it would not tell step 1 from step 3.
"""
# ruff: noqa: D102 - the interface tells what its methods do

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import random
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, TypeVar

from lightning_gpuorch.errors import ConfigurationError, PredictionStorageError
from lightning_gpuorch.paths import ObjectPath
from lightning_gpuorch.predictions.storage.store import MAX_READ_BYTES, Store

try:
    import obstore
    from obstore import exceptions
    from obstore.store import MemoryStore, from_url
except ImportError as error:
    raise ConfigurationError(
        "to keep predictions in an object store, install the package for it: pip install 'lightning_gpuorch[object-store]'."
    ) from error

from lightning_gpuorch.predictions.storage.object_errors import (
    NO_BUCKET,
    NOT_SUPPORTED,
    as_os_error,
    in_words,
    may_pass,
    status_of,
)

log = logging.getLogger(__name__)

_AnswerT = TypeVar("_AnswerT")

MULTIPART_BYTES = 64 * 2**20
"""Larger content goes up in pieces."""
_PIECE_BYTES = 8 * 2**20
_PIECES_AT_ONCE = 4
_FIRST_READ_BYTES = 2**16
_DELETED_AT_ONCE = 1000
PATIENCE_SECONDS = 240.0
"""A store that cannot be reached is tried for so long; below ``commit_timeout_sec``, so that the error says why."""
_FIRST_CONTACT_SECONDS = 20.0
"""The same, while it has not answered this process once: a wrong endpoint does not get better."""
_GLANCE_SECONDS = 5.0
"""The same, where the answer only saves work: the coordinator asks it between requests of ranks."""
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.1, 5.0
_YOUNG_SECONDS = 3600.0
"""No upload lasts so long: what is older was left by a killed writer. Nothing tells whether one lives."""
_UPLOADS = ".uploads"
_CLIENT_OPTIONS = frozenset({
    "allow_http", "allow_invalid_certificates", "connect_timeout", "default_content_type", "http1_only", "http2_only",
    "pool_idle_timeout", "pool_max_idle_per_host", "proxy_url", "proxy_ca_certificate", "proxy_excludes",
    "root_certificate", "timeout", "user_agent",
})  # fmt: skip
_CLIENT_DEFAULTS = {"allow_http": True, "timeout": "120s", "connect_timeout": "10s"}

_runtime_of: int | None = None
"""The process in which the client has threads. A fork has not, and would wait for them for ever."""


def open_object_store(root: str, options: Mapping[str, str]) -> ObjectStore:
    """Make the client of a bucket; nothing is sent.

    Args:
        root: Scheme and bucket.
        options: As the client names them, ``endpoint``, ``region`` and so on. What is not given comes from the environment.

    Raises:
        ConfigurationError: An option is unknown, or none of a kind that is needed was given.
    """
    if root.startswith("memory:"):
        return ObjectStore(MemoryStore(), root)
    client = {**_CLIENT_DEFAULTS, **{name: v for name, v in options.items() if name.lower() in _CLIENT_OPTIONS}}
    config = {name: v for name, v in options.items() if name.lower() not in _CLIENT_OPTIONS}
    if root.startswith("s3") and not any(name.lower().endswith("copy_if_not_exists") for name in config):
        config["copy_if_not_exists"] = "multipart"
    try:
        made = from_url(root, config=config, client_options=client, retry_config={"max_retries": 0})  # type: ignore[call-overload]
    except (exceptions.BaseError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"{root} cannot be opened: {in_words(error)} Options come from storage_options and from the store's usual "
            "environment."
        ) from error
    return ObjectStore(made, root)


def _pause(seconds: float) -> None:
    """Sleep, and not as long as others that have begun at the same moment."""
    time.sleep(seconds * random.uniform(0.5, 1.0))


class ObjectStore(Store[ObjectPath]):
    """One bucket.

    Args:
        client: Of obstore, without repetitions of its own.
        root: Its name, for messages.
        clock: The time.
        pause: Waits for about so many seconds.
    """

    def __init__(
        self,
        client: Any,
        root: str,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = _pause,
    ):
        self._client, self._root, self._clock, self._pause = client, root, clock, pause
        self._reached = False
        self._copies: bool | None = None
        """Whether conditional copies are what they should be; None if that is not known."""

    def names(self, directory: ObjectPath) -> Iterator[str]:
        return (name for name, _ in self.sizes_bytes(directory))

    def sizes_bytes(self, directory: ObjectPath) -> Iterator[tuple[str, int]]:
        skipped = len(directory.key) + 1 if directory.key else 0
        listed = self._call(lambda: [(found["path"][skipped:], found["size"]) for found in self._listed(directory)])
        return (entry for entry in listed if "/" not in entry[0])

    def folders(self, directory: ObjectPath, prefix: str) -> list[str]:
        answer = self._call(lambda: obstore.list_with_delimiter(self._client, directory.key or None))
        names = (found.rstrip("/").rpartition("/")[2] for found in answer["common_prefixes"])
        return sorted(name for name in names if name.startswith(prefix))

    def exists(self, path: ObjectPath) -> bool:
        try:
            self._call(lambda: obstore.head(self._client, path.key), _GLANCE_SECONDS)
        except FileNotFoundError:
            return False
        return True

    def holds_anything(self, directory: ObjectPath) -> bool:
        return self._call(lambda: next(self._listed(directory), None)) is not None

    def size_bytes(self, path: ObjectPath) -> int:
        return int(self._call(lambda: obstore.head(self._client, path.key))["size"])

    @contextlib.contextmanager
    def open(self, path: ObjectPath) -> Iterator[tuple[ObjectFile, int]]:
        first, size_bytes = self._call(lambda: self._first_bytes(path.key))
        yield ObjectFile(lambda start, stop: self._range(path.key, start, stop), first, size_bytes), size_bytes

    def read(self, path: ObjectPath, max_bytes: int = MAX_READ_BYTES) -> bytes:
        def read() -> bytes:
            answer = obstore.get(self._client, path.key)
            if answer.meta["size"] > max_bytes:
                raise OSError(errno.EFBIG, f"it is larger than the {max_bytes:,} bytes that such a file may have")
            return bytes(answer.bytes())

        return self._call(read)

    def create_once(self, path: ObjectPath, buffers: Sequence[bytes | memoryview], *, fsync: bool = True) -> bool:
        size_bytes = sum(memoryview(buffer).nbytes for buffer in buffers)
        if size_bytes > MULTIPART_BYTES and self._copies_conditionally(path.parent):
            return self._create_in_pieces(path, buffers)
        content = b"".join(buffers)
        return self._create(path, [content], lambda: self._put(path.key, content))

    def replace(self, path: ObjectPath, content: bytes) -> None:
        self._call(lambda: obstore.put(self._client, path.key, content, use_multipart=False), PATIENCE_SECONDS)

    def append(self, path: ObjectPath, line: bytes) -> None:
        try:
            content = self.read(path)
        except FileNotFoundError:
            content = b""
        self.replace(path, content + b"\n" + line + b"\n")

    def remove(self, path: ObjectPath) -> None:
        self._call(lambda: obstore.delete(self._client, path.key))

    def remove_directory(self, directory: ObjectPath) -> None:
        if not directory.key:
            raise ValueError(f"{directory} is a whole bucket; that is never removed")
        try:
            self._remove_all(directory, lambda found: True)
        except OSError as error:
            log.warning("%s cannot be removed: %s", directory, error.strerror)

    def set_aside(self, path: ObjectPath, target: ObjectPath) -> None:
        self._call(lambda: obstore.copy(self._client, path.key, target.key))
        self.remove(path)

    def make_directory(self, directory: ObjectPath, parents: bool = True) -> None:
        pass  # a prefix is there as soon as something is under it

    def check_writable(self, directory: ObjectPath) -> None:
        probe = directory / f".probe-{secrets.token_hex(8)}"
        try:
            self.holds_anything(directory)  # says whether there is such a bucket
            try:
                self.create_once(probe, [b"1"])
                refused = not self.create_once(probe, [b"2"])
            except OSError as error:
                if error.errno != NOT_SUPPORTED:
                    raise
                refused = False
            if not refused:
                raise ConfigurationError(
                    f"{directory}: this store takes no conditional put (it has not refused to create an object a second "
                    "time), so two writers of one part could not be told apart. Use a store that honours If-None-Match, as "
                    "AWS S3, Google Cloud Storage, Azure, MinIO, Ceph and R2 do, or a directory of a file system."
                )
            self.remove(probe)
        except OSError as error:
            raise self.error(error, directory, 0) from error

    def sweep_temporaries(self, directory: ObjectPath, older_than_seconds: float) -> int:
        limit = time.time() - max(older_than_seconds, _YOUNG_SECONDS)
        old = datetime.fromtimestamp(limit, timezone.utc)
        try:
            return self._remove_all(directory / _UPLOADS, lambda found: found["last_modified"] < old)
        except OSError as error:
            log.debug("what killed writers have left in %s stays: %s", directory, error)
            return 0

    def error(self, error: OSError, directory: ObjectPath, wanted_bytes: int) -> PredictionStorageError:
        said = error.strerror or str(error)
        if isinstance(error, PermissionError):
            return PredictionStorageError(
                f"{directory}: the store denies access ({said}). Check the credentials, which come from the store's usual "
                "environment or from storage_options, and that they may list, read, write and delete there."
            )
        if error.errno == NO_BUCKET:
            return PredictionStorageError(
                f"{directory}: there is no such bucket. Create it, or use another output directory."
            )
        return PredictionStorageError(
            f"predictions in {directory} cannot be accessed: {said}. What was written before is kept; run the same command "
            "again when the store can be reached."
        )

    # Step 1 to 3

    def _create(self, path: ObjectPath, buffers: Sequence[bytes | memoryview], create: Callable[[], object]) -> bool:
        """Send what creates the object until it is known how it has ended; True if the object is ours."""
        patience = _Patience(PATIENCE_SECONDS, self._clock, self._pause)
        may_be_ours = False
        while True:
            try:
                self._guarded(create)
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
                met = status_of(error) == 409
                if not (met or may_be_ours):
                    return False
                found = self._compare(path, buffers)
                if found is not None:
                    return found
                if not patience.wait():  # two puts that meet can both be refused
                    raise as_os_error(error) from error
            except (exceptions.BaseError, OSError) as error:
                if not may_pass(error) or not patience.wait():
                    raise as_os_error(error) from error
                may_be_ours = True
                log.debug("%s is put again: %s", path, in_words(error))
            else:
                return True

    def _compare(self, path: ObjectPath, buffers: Sequence[bytes | memoryview]) -> bool | None:
        """Whether an object has this content; None if there is no object."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        try:
            if self.size_bytes(path) != sum(view.nbytes for view in views):
                return False
            with self.open(path) as (file, _):
                for piece in _pieces(views, _PIECE_BYTES):
                    if file.read(piece.nbytes) != piece:
                        return False
        except FileNotFoundError:
            return None
        return True

    def _put(self, key: str, content: bytes) -> None:
        obstore.put(self._client, key, content, mode="create")

    def _create_in_pieces(self, path: ObjectPath, buffers: Sequence[bytes | memoryview]) -> bool:
        upload = path.parent / _UPLOADS / _unique_name()
        views = [memoryview(buffer).cast("B") for buffer in buffers]

        def send() -> None:
            obstore.put(
                self._client, upload.key, _pieces(views, 2**20), use_multipart=True, chunk_size=_PIECE_BYTES,
                max_concurrency=_PIECES_AT_ONCE,
            )  # fmt: skip

        try:
            self._call(send, PATIENCE_SECONDS)
            return self._create(
                path, buffers, lambda: obstore.copy(self._client, upload.key, path.key, overwrite=False)
            )
        finally:
            with contextlib.suppress(OSError):  # a sweep removes it
                self.remove(upload)

    def _copies_conditionally(self, directory: ObjectPath) -> bool:
        """Whether a conditional copy is refused where there is an object, tried once. If not, large parts are put whole."""
        if self._copies is None:
            pair = [directory / _UPLOADS / _unique_name() for _ in range(2)]
            for path in pair:
                self.replace(path, b"1")
            try:
                self._call(lambda: obstore.copy(self._client, pair[0].key, pair[1].key, overwrite=False))
                self._copies = False
            except FileExistsError:
                self._copies = True
            except OSError as error:
                log.info("%s takes no conditional copy (%s); large parts go up in one put", self._root, error.strerror)
                self._copies = False
            for path in pair:
                self.remove(path)
        return self._copies

    # Requests

    def _listed(self, directory: ObjectPath) -> Iterator[Any]:
        stream = obstore.list(self._client, directory.key or None, chunk_size=1000)
        return itertools.chain.from_iterable(stream)

    def _remove_all(self, directory: ObjectPath, chosen: Callable[[Any], bool]) -> int:
        keys = self._call(lambda: [found["path"] for found in self._listed(directory) if chosen(found)])
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            some = keys[start : start + _DELETED_AT_ONCE]
            self._call(lambda some=some: obstore.delete(self._client, some))  # type: ignore[misc]
        return len(keys)

    def _first_bytes(self, key: str) -> tuple[bytes, int]:
        try:
            answer = obstore.get(self._client, key, options={"range": (0, _FIRST_READ_BYTES)})
        except exceptions.GenericError:
            if obstore.head(self._client, key)["size"]:
                raise
            return b"", 0  # stores refuse a range of what is empty
        return bytes(answer.bytes()), int(answer.meta["size"])

    def _range(self, key: str, start: int, stop: int) -> bytes:
        return self._call(lambda: bytes(obstore.get_range(self._client, key, start=start, end=stop)))

    def _call(self, request: Callable[[], _AnswerT], patience_seconds: float | None = None) -> _AnswerT:
        """Send a request that may be repeated, until it is answered.

        Raises:
            FileExistsError: The object is there, and was not to be.
            OSError: The store refuses, or cannot be reached.
        """
        if patience_seconds is None:
            patience_seconds = PATIENCE_SECONDS if self._reached else _FIRST_CONTACT_SECONDS
        patience = _Patience(patience_seconds, self._clock, self._pause)
        while True:
            try:
                return self._guarded(request)
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
                raise FileExistsError(in_words(error)) from error
            except (exceptions.BaseError, OSError) as error:
                if not may_pass(error) or not patience.wait():
                    raise as_os_error(error) from error
                log.debug("%s is asked again: %s", self._root, in_words(error))

    def _guarded(self, request: Callable[[], _AnswerT]) -> _AnswerT:
        global _runtime_of
        if _runtime_of not in (None, os.getpid()):
            raise PredictionStorageError(
                f"{self._root} cannot be used in this process: it was forked from one that has used an object store, and "
                "the client's threads are not there. Start processes that read predictions with the method spawn or "
                "forkserver (DataLoader: multiprocessing_context='spawn')."
            )
        _runtime_of = os.getpid()
        answer = request()
        self._reached = True
        return answer


class ObjectFile:
    """An object, read from its beginning; what is not read is not fetched.

    Args:
        fetch: Gives the bytes of a range.
        first: The first bytes.
        size_bytes: Length of the object.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], first: bytes, size_bytes: int):
        self._fetch, self._size_bytes = fetch, size_bytes
        self._ready, self._fetched = memoryview(first), len(first)

    def read(self, size: int = -1, /) -> bytes:
        """See :class:`ReadableFile`."""
        wanted = self._size_bytes if size < 0 else size
        taken = []
        while wanted and self._fill():
            taken.append(bytes(self._ready[:wanted]))
            wanted -= self._take(len(taken[-1]))
        return b"".join(taken)

    def readinto(self, buffer: memoryview, /) -> int:
        """See :class:`ReadableFile`."""
        if not self._fill():
            return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        return self._take(count)

    def _take(self, count: int) -> int:
        self._ready = self._ready[count:]
        return count

    def _fill(self) -> bool:
        if not self._ready and self._fetched < self._size_bytes:
            stop = min(self._fetched + _PIECE_BYTES, self._size_bytes)
            self._ready = memoryview(self._fetch(self._fetched, stop))
            self._fetched += len(self._ready)
        return bool(self._ready)


class _Patience:
    """How long to go on trying, and how often."""

    def __init__(self, seconds: float, clock: Callable[[], float], pause: Callable[[float], None]):
        self._clock, self._pause = clock, pause
        self._deadline = clock() + seconds
        self._wait_seconds = _FIRST_WAIT_SECONDS

    def wait(self) -> bool:
        """Wait before another try; False if there is to be none."""
        if self._clock() + self._wait_seconds > self._deadline:
            return False
        self._pause(self._wait_seconds)
        self._wait_seconds = min(2 * self._wait_seconds, _LONGEST_WAIT_SECONDS)
        return True


def _pieces(buffers: Sequence[memoryview], most_bytes: int) -> Iterator[memoryview]:
    for view in buffers:
        for start in range(0, view.nbytes, most_bytes):
            yield view[start : start + most_bytes]


def _unique_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}"
