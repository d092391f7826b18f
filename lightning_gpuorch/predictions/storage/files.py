"""Files that appear all at once, once only, and survive a power cut.

:func:`create_once` is the commit of everything here: parts, the manifest, the end of a stream. Many writers may race;
exactly one of them wins, no reader ever sees a part of a file, and a writer killed at any moment leaves at most a
temporary file that nothing reads.

1. Write a temporary file with a name of its own (``O_EXCL``), under a lock, and wait until the disk has it.
2. Link it to its final name. That is atomic, and fails if the name exists: somebody else won.
3. Wait until the disk has the directory, and remove the temporary name.

A file system without hard links (exFAT, many FUSE mounts) gets the same guarantees from a directory: step 1 writes
``content`` into a temporary directory, and step 2 renames that directory to the final name, which POSIX makes fail if
a directory that is not empty is there. :func:`content_path` finds the bytes in both cases. The design needs a file
system on which one of the two is atomic; object stores behind FUSE usually offer neither.

A writer holds the lock on its temporary file until the end of step 3, so that :func:`sweep_temporaries` takes away what dead
writers have left and nothing of a living one, whichever run, container or node it belongs to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_gpuorch.errors import PredictionStorageError, StorageFullError
from lightning_gpuorch.paths import local_path

log = logging.getLogger(__name__)

TEMPORARY_PREFIX = ".tmp-"

_CONTENT_NAME = "content"
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_PROBE_BYTES = 2**20


def create_once(path: Path, buffers: Sequence[bytes | memoryview], *, fsync: bool = True) -> bool:
    """Create a file with all its content, unless it exists.

    Args:
        path: The final name. Its directory must exist.
        buffers: The content, written one buffer after the other.
        fsync: Wait for the disk. Without it the file is still whole or absent, except after a power cut.

    Returns:
        True if this call made the file visible, False if somebody else's is there.

    Raises:
        OSError: The file system refused; nothing is visible and no temporary is left.
    """
    with _temporary_file(path.parent, buffers, fsync) as temporary:
        try:
            os.link(temporary, path)
            won = True
        except FileExistsError:
            # Over NFS the answer to a successful LINK can get lost, and its repetition then finds our own file.
            won = os.stat(temporary).st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            won = _rename_directory(temporary, path, fsync)
        # The loser waits too: it will report the file as durable, and the winner may not have got this far.
        if fsync:
            _fsync_directory(path.parent)
        return won


def replace(path: Path, content: bytes) -> None:
    """Replace a file that :func:`create_once` made; readers see the old content or the new one.

    Raises:
        OSError: The file system refused; the old content is in place.
    """
    with _temporary_file(path.parent, [content], fsync=True) as temporary:
        os.replace(temporary, content_path(path))
        _fsync_directory(path.parent)


def content_path(path: Path) -> Path:
    """Where the bytes of a committed file are: in the file, or in the directory that stands for it."""
    return path / _CONTENT_NAME if path.is_dir() and not path.is_symlink() else path


def remove(path: Path) -> None:
    """Remove a committed file durably.

    Raises:
        OSError: The file system refused.
    """
    if path.is_dir():
        # Under another name first: a directory without its content must not be seen under the final one.
        temporary = _temporary_path(path.parent)
        os.rename(path, temporary)
        shutil.rmtree(temporary, ignore_errors=True)  # a sweep may be quicker
    else:
        path.unlink()
    _fsync_directory(path.parent)


def set_aside(path: Path, target: Path) -> None:
    """Give a committed file another name durably, in the same directory; what has that name is replaced.

    Raises:
        OSError: The file system refused.
    """
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    elif path.is_dir():
        target.unlink(missing_ok=True)
    os.replace(path, target)
    _fsync_directory(path.parent)


def sweep_temporaries(directory: Path, older_than_seconds: float) -> int:
    """Remove what killed writers left: temporaries whose lock is free. Others are left alone, whatever their age.

    Args:
        directory: Where to look; not below it.
        older_than_seconds: Younger ones are left alone as well, for file systems whose locks one node alone sees.

    Returns:
        How many were removed.
    """
    removed = 0
    limit = time.time() - older_than_seconds
    for path in directory.glob(f"{TEMPORARY_PREFIX}*"):
        try:
            state = path.lstat()
            if state.st_mtime <= limit:
                removed += _remove_if_dead(path, state.st_mode)
        except OSError as error:
            log.debug("%s stays: %s", path, error)  # its writer, or another sweep, was quicker; or it is not ours
    return removed


def _remove_if_dead(path: Path, mode: int) -> bool:
    """Remove a temporary file or directory, unless its writer lives or it is something that no writer makes."""
    if stat.S_ISDIR(mode):
        content = path / _CONTENT_NAME
        if content.exists() and not _remove_if_dead(content, content.lstat().st_mode):
            return False
        path.rmdir()  # a writer that has just made it makes another one
        return True
    if not stat.S_ISREG(mode):
        return False
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()  # under the lock: a writer that has just made the file sees that it lost it
    finally:
        os.close(descriptor)
    return True


def make_directory(directory: Path) -> None:
    """Make a directory and those above it durably: a new name is on the disk only when its parent is synced.

    Raises:
        OSError: The file system refused.
    """
    if directory.is_dir():
        return
    make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    _fsync_directory(directory.parent)


def check_writable(directory: str | os.PathLike[str], needed_bytes: int = _PROBE_BYTES) -> None:
    """Find out before work starts whether results can be written.

    Args:
        directory: Made if it does not exist.
        needed_bytes: Written on trial; what is free by the file system's own account is not always to be had.

    Raises:
        StorageFullError: There is no space for ``needed_bytes``.
        PredictionStorageError: The directory cannot be made or written.
    """
    root = local_path(directory, "directory")
    try:
        make_directory(root.absolute())
        with _temporary_file(root, [bytes(needed_bytes)], fsync=True):
            pass
    except OSError as error:
        raise storage_error(error, root, needed_bytes) from error


def storage_error(error: OSError, directory: Path, wanted_bytes: int = 0) -> PredictionStorageError:
    """Return the error to raise when the file system refuses: where, why, and what to do.

    Args:
        error: What the file system said.
        directory: Where predictions are.
        wanted_bytes: How much was to be written, if it was writing.
    """
    if error.errno in _FULL:
        existing = next((path for path in (directory, *directory.parents) if path.exists()), Path("/"))
        what = "the quota is used up" if error.errno == errno.EDQUOT else "no space is left"
        full = StorageFullError(
            f"{what} in {directory}: {wanted_bytes:,} bytes wanted, {shutil.disk_usage(existing).free:,} free. What "
            "was written before is kept; make room and run the same command again."
        )
        full.errno = error.errno
        return full
    if error.errno in _NOT_WRITABLE:
        return PredictionStorageError(
            f"{directory} is not writable: {error.strerror}. Choose another output directory."
        )
    if isinstance(error, FileNotFoundError) and not directory.exists():
        return PredictionStorageError(
            f"{directory} has vanished: it was removed or unmounted while the job was running. Bring it back, or run "
            "the same command again to start afresh."
        )
    return PredictionStorageError(f"predictions in {directory} cannot be accessed: {error.strerror or error}.")


def _temporary_path(directory: Path) -> Path:
    return directory / f"{TEMPORARY_PREFIX}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}"


@contextlib.contextmanager
def _temporary_file(directory: Path, buffers: Sequence[bytes | memoryview], fsync: bool) -> Iterator[Path]:
    """Write a temporary file, and keep its lock within; it is removed then."""
    path, descriptor = _locked_file(directory)
    try:
        # Buffered: thousands of small columns become few writes, a large one goes straight through.
        with open(descriptor, "wb", buffering=2**16) as file:
            for buffer in buffers:
                file.write(buffer)
            file.flush()
            if fsync:
                os.fsync(descriptor)
            yield path
    finally:
        path.unlink(missing_ok=True)


def _locked_file(directory: Path) -> tuple[Path, int]:
    while True:
        path = _temporary_path(directory)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            log.debug("%s cannot be locked: %s", path, error)  # then no sweep can, either, and it is left alone
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)  # a sweep was here between the two calls


def _rename_directory(temporary: Path, path: Path, fsync: bool) -> bool:
    """Step 2 without hard links; takes the temporary file over."""
    holder = _temporary_path(path.parent)
    holder.mkdir()
    try:
        while True:
            try:
                os.rename(temporary, holder / _CONTENT_NAME)
                break
            except FileNotFoundError:
                if not temporary.exists():
                    raise
                holder.mkdir(exist_ok=True)  # a sweep takes empty ones away
        if fsync:
            _fsync_directory(holder)
        os.rename(holder, path)
    except OSError as error:
        shutil.rmtree(holder, ignore_errors=True)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
