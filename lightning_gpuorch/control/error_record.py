"""What a worker leaves behind about the exception that ends it: the evidence by which its supervisor decides.

An exit code alone is none: any program may leave with 65 or 75. What counts is the record that the worker writes.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from lightning_gpuorch.checked_files import parse_object, read_file
from lightning_gpuorch.errors import EXIT_FAILURE, ExceptionSummary, GPUOrchError, summarize_exception

_ENVIRONMENT_TYPES = frozenset(
    {
        "AcceleratorError", "DistBackendError", "DistNetworkError", "DistStoreError", "MemoryError", "ConnectionError",
        "TimeoutError", "ControlPlaneError", "DataPlaneError",
    }
)  # fmt: skip
"""Exceptions that tell of the device, the network or the machine, and not of the script or its data."""
_ENVIRONMENT_MESSAGES = (
    "CUDA error",
    "CUDA out of memory",
    "NCCL error",
    "CUBLAS_STATUS",
    "CUDNN_STATUS",
    "DataLoader worker",
)
_ENVIRONMENT_ERRNOS = frozenset(
    {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC,
     errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.EADDRINUSE, errno.EREMOTEIO}
)  # fmt: skip

PREDICT_STEP = "predict_step"
READING = "reading"


@dataclass(frozen=True, kw_only=True)
class ErrorRecord:
    """The exception that has ended a worker, or the report with which it has left.

    Attributes:
        type: Name of the exception's class.
        message: First line of what it says.
        location: ``file:line`` in the user's code.
        traceback: As Python prints it.
        doing: What the worker was doing, as in "predict_step"; empty if that is not known.
        loader: Dataloader of the units.
        units: Units that were read or computed, as ``[start, stop)``.
        exit_code: Code with which the plugin itself has ended the worker; None if it has not.
        exited_with: Code with which the script itself has ended the worker, by ``sys.exit``.
        is_final: The job is to end at once, whatever the others do.
        is_environment: It tells of the device, the network or the machine.
        caused_by: Global rank of the one whose error has ended this one.
        pid: Of the worker.
    """

    type: str
    message: str
    location: str = ""
    traceback: str = ""
    doing: str = ""
    loader: int = 0
    units: tuple[int, int] | None = None
    exit_code: int | None = None
    exited_with: int | None = None
    is_final: bool = False
    is_environment: bool = False
    caused_by: int | None = None
    pid: int = 0

    @classmethod
    def of(cls, error: BaseException, tb: TracebackType | None, pid: int) -> ErrorRecord:
        """Describe an exception.

        Args:
            error: The exception.
            tb: Its traceback, from the user's script on.
            pid: This process.
        """
        summary = summarize_exception(error)
        context: dict[str, Any] = next((noted for about, noted in reversed(_noted) if about in _chain(error)), {})
        return cls(
            type=summary.type,
            message=summary.message,
            location=summary.location,
            traceback="".join(_without_our_frames(traceback.TracebackException(type(error), error, tb)).format()),
            exit_code=_own_exit_code(error),
            is_environment=any(map(_is_environment, _chain(error))),
            caused_by=getattr(error, "caused_by", None),
            pid=pid,
            **context,
        )

    @classmethod
    def read(cls, path: Path) -> ErrorRecord | None:
        """The record in a file; None if there is none, as after a kill."""
        try:
            return msgspec.convert(parse_object(read_file(path)), type=cls)
        except (OSError, ValueError):
            return None

    def write(self, path: Path) -> None:
        """Leave the record.

        Raises:
            OSError: It cannot be written.
        """
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @property
    def headline(self) -> str:
        """The exception in one line."""
        said = f"{self.type}: {self.message}" if self.message else self.type
        details = ", ".join(filter(None, (self._place, self.location)))
        return f"{said} ({details})" if details else said

    @property
    def _place(self) -> str:
        if not self.doing or self.units is None:
            return self.doing
        start, stop = self.units
        return f"{self.doing} of {start}" + (f"-{stop - 1}" if stop - start > 1 else "")

    @property
    def summary(self) -> str:
        """The exception in one line, without what was being done."""
        return str(ExceptionSummary(self.type, self.message, self.location))

    @property
    def signature(self) -> str:
        """Equal for the same exception from the same line."""
        return f"{self.type} at {self.location}"


def note_failure(
    error: BaseException, doing: str, *, loader: int = 0, units: range | None = None, is_final: bool = False
) -> None:
    """Say what this process was doing when an exception was raised, for the record if the exception ends the process."""
    context = {"doing": doing, "loader": loader, "is_final": is_final}
    _noted[:] = [(error, {**context, "units": None if not units else (units.start, units.stop)})]


_noted: list[tuple[BaseException, dict[str, Any]]] = []
"""The last failure only: nothing may keep the frames of exceptions that were survived."""


def _without_our_frames(shown: traceback.TracebackException) -> traceback.TracebackException:
    """Drop the frames of this package, which say nothing to the user, unless it is where the exception was raised."""
    one: traceback.TracebackException | None = shown
    while one is not None:
        frames = list(one.stack)
        kept = [frame for frame in frames[:-1] if not frame.filename.startswith(_PACKAGE)] + frames[-1:]
        one.stack = traceback.StackSummary.from_list(kept)
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return shown


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def _own_exit_code(error: BaseException) -> int | None:
    if isinstance(error, GPUOrchError) and error.exit_code != EXIT_FAILURE:
        return error.exit_code
    return None


def _is_environment(error: BaseException) -> bool:
    if any(base.__name__ in _ENVIRONMENT_TYPES for base in type(error).__mro__):
        return True
    if isinstance(error, OSError) and error.errno in _ENVIRONMENT_ERRNOS:
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _ENVIRONMENT_MESSAGES)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__
