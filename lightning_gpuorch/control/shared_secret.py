"""A secret that processes of one user on one host share, where the only thing they have in common is open to others.

Under torchrun and srun, ranks find each other through torch's store, which anyone who reaches its port can read and write.
The store tells only where the secret lies: in a directory that no other user can enter. Readers check that it is this user's,
so a stranger who changes the place gains nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
import time
from pathlib import Path

import msgspec

from lightning_gpuorch.errors import ControlPlaneError

_NAME = "token"
_PREFIX = "gpuorch-secret-"
_NEW_SECONDS = 60
_MAX_BYTES = 4096


class CoordinatorPlace(msgspec.Struct, frozen=True):
    """What rank 0 leaves in the launcher's store, which others can read and write: hints, and no secret.

    Attributes:
        port: Of the coordinator, on the host that the launcher names.
        secret_directory: Where the token lies that ranks on one host share; empty if it has to be set.
        run_id: Name of the run.
        host_name: Of rank 0.
        run_directory: Where the run leaves its records, for ranks on the same host.
    """

    port: int
    secret_directory: str
    run_id: str
    host_name: str
    run_directory: str

    def text(self) -> str:
        """What is left in the store."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def read(cls, data: bytes) -> CoordinatorPlace:
        """Read what lies in the store.

        Raises:
            ControlPlaneError: It is malformed.
        """
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ControlPlaneError(
                f"what the launcher's store says of the coordinator is malformed: {error}"
            ) from error


class SharedSecret:
    """A new secret, in a directory of its own; those of processes that were killed are removed before."""

    def __init__(self) -> None:
        _sweep()
        self.token = secrets.token_hex(16)
        self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX))  # 0700, and new
        descriptor = os.open(self.directory / _NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # as long as this process lives
        self._file = os.fdopen(descriptor, "w")
        self._file.write(self.token)
        self._file.flush()

    def remove(self) -> None:
        """Take it away; processes that have read it keep it."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self._file.close()


def _sweep() -> None:
    """Remove secrets of this user that no process holds."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, ControlPlaneError), contextlib.ExitStack() as stack:
            place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, place)
            _check_owner(os.fstat(place), str(directory))
            if time.time() - os.fstat(place).st_mtime < _NEW_SECONDS:
                continue  # its process may not have locked it yet
            descriptor = os.open(_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory)


def read_secret(directory: str) -> str:
    """Read a secret that another process of this user has left.

    Args:
        directory: Where, as told by a source that is not trusted.

    Raises:
        ControlPlaneError: It is not there, or others than this user could have put it there.
    """
    try:
        place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _check_owner(os.fstat(place), directory)
            return read_private_file(_NAME, place, directory)
        finally:
            os.close(place)
    except (OSError, ValueError) as error:
        raise ControlPlaneError(
            f"the secret of this job cannot be read from {directory}: {error}. Ranks on one host share it there; set "
            "GPUORCH_TOKEN to the same secret for all of them if they share no temporary directory."
        ) from error


def read_private_file(name: str, directory: int | None = None, where: str = "") -> str:
    """Read a secret of this user's.

    Args:
        name: Path of the file.
        directory: Descriptor of the directory that holds it.
        where: Path of that directory, for messages.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no text.
        ControlPlaneError: Others than this user could have put it there.
    """
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    with contextlib.closing(os.fdopen(descriptor, "rb")) as file:
        _check_owner(os.fstat(descriptor), os.path.join(where, name))
        return file.read(_MAX_BYTES).decode("ascii")


def _check_owner(found: os.stat_result, path: str) -> None:
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ControlPlaneError(
            f"{path} is said to hold the secret of this job, but it is open to other users, or another user's (uid "
            f"{found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}): another user has written to the job's store."
        )
