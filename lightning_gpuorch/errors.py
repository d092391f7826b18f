"""Every exception the plugin raises on purpose, and the exit codes that go with them.

::

    GPUOrchError
    ├── ConfigurationError (ValueError)      bad option, environment variable or combination
    │   ├── ModelDoesNotFitError             the model is larger than the memory budget
    │   └── ProtocolVersionError             two processes of a job run different versions
    ├── JobMismatchError                     the output directory belongs to another job
    ├── PredictionStorageError               a prediction cannot be stored or written
    │   ├── UnsupportedPredictionError (TypeError)   its type has no durable form
    │   └── StorageFullError (OSError)       no space left on the device
    ├── CorruptPartError                     a part file fails its checksum
    ├── OutputsNotKeptError                  outputs were asked for of which only markers are kept
    ├── MissingPredictionsError              the job ended with samples missing
    ├── UnreadableStreamError                a stream raised an error, and cannot go on behind it
    ├── TooManyErroredSamplesError           more samples failed than ``max_errored_samples``
    ├── ControlPlaneError                    the coordinator cannot be reached, or ranks disagree
    │   ├── ControlPlaneTimeoutError (TimeoutError)
    │   ├── ProtocolError                    a message between two processes is malformed
    │   ├── NodeRankTakenError               another supervisor has the node rank of this one
    │   ├── OtherJobError                    the coordinator was started again since this process joined it
    │   └── CollectiveMismatchError          ranks called different collectives
    ├── InputMismatchError                   ranks that must read the same have read different input
    ├── UnreadableRecordsError               the records of a run are not those of a run
    ├── WorkerStartError (OSError)           no worker can be started on this node
    ├── DataPlaneError                       ranks of a TP group could not complete a step together
    │   ├── CollectiveError                  a collective failed
    │   │   └── CollectiveTimeoutError (TimeoutError)
    │   ├── StepAbortedError                 another rank of the group has left the step
    │   ├── PeerFailedError                  the step raised an error on another rank of the group
    │   └── GroupRecoveryError               the group could not be put together again
    ├── GroupOutOfMemoryError (MemoryError)  a rank of the TP group ran out of memory; raised on all of them
    ├── MemoryBudgetError (MemoryError)      an allocation would exceed the budget
    └── TensorParallelError                  no plan, or a plan that fails verification

An exception carries ``exit_code``. The supervisor restarts a worker that dies of anything else, but never one
that ends with a code of :data:`FINAL_EXIT_CODES`: repeating the run cannot change the outcome.
"""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EXIT_FAILURE = 1
EXIT_DATA_MISSING = os.EX_DATAERR
"""Everything that could be computed is durable, some samples are missing and named."""
EXIT_STORAGE = os.EX_IOERR
"""The output directory is full or not writable."""
EXIT_RESUMABLE = os.EX_TEMPFAIL
"""Stopped on request; the same command goes on where this one stopped."""
EXIT_CONFIGURATION = os.EX_CONFIG
"""Bad input, found before work started."""

FINAL_EXIT_CODES = frozenset({EXIT_DATA_MISSING, EXIT_STORAGE, EXIT_RESUMABLE, EXIT_CONFIGURATION})


class GPUOrchError(Exception):
    """Base class of the plugin's exceptions."""

    exit_code = EXIT_FAILURE


class ConfigurationError(GPUOrchError, ValueError):
    """An option, environment variable or combination that cannot work."""

    exit_code = EXIT_CONFIGURATION


class ModelDoesNotFitError(ConfigurationError):
    """The model does not fit the memory budget of a device.

    Attributes:
        needed_bytes: Bytes the model needs on each device.
        budget_bytes: Bytes one device may use.
        fitting_tensor_parallel_size: Smallest degree at which it fits, or None if none was found.
    """

    def __init__(self, message: str, needed_bytes: int, budget_bytes: int, fitting_tensor_parallel_size: int | None):
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes
        self.fitting_tensor_parallel_size = fitting_tensor_parallel_size

    def __reduce__(self) -> tuple[type[ModelDoesNotFitError], tuple[str, int, int, int | None]]:
        """One rank finds it, all raise it."""
        return type(self), (str(self), self.needed_bytes, self.budget_bytes, self.fitting_tensor_parallel_size)


class ProtocolVersionError(ConfigurationError):
    """Two processes of a job run versions that do not understand each other."""


class AuthenticationError(ConfigurationError):
    """A process does not know the token of the job that it connects to."""


class JobMismatchError(GPUOrchError):
    """The output directory holds the results of another job.

    Attributes:
        differences: One line per difference.
    """

    exit_code = EXIT_CONFIGURATION

    def __init__(self, message: str, differences: Sequence[str] = ()):
        super().__init__(message)
        self.differences = tuple(differences)


class PredictionStorageError(GPUOrchError):
    """A prediction could not be made durable."""

    exit_code = EXIT_STORAGE


class UnsupportedPredictionError(PredictionStorageError, TypeError):
    """A prediction contains a type without a durable form."""

    exit_code = EXIT_CONFIGURATION


class StorageFullError(PredictionStorageError, OSError):
    """No space is left where predictions are written."""


class CorruptPartError(GPUOrchError):
    """A part file is truncated or fails its checksum."""

    exit_code = EXIT_DATA_MISSING


class UnreadableRecordsError(GPUOrchError):
    """The records of a run cannot be shown: they are not those of a run."""

    exit_code = EXIT_DATA_MISSING


class OutputsNotKeptError(GPUOrchError):
    """Outputs were asked for that are not kept: the job keeps a marker in place of each (``keep_outputs``)."""


class MissingPredictionsError(GPUOrchError):
    """The job is over and some samples have no prediction.

    Attributes:
        indices: Dataset indices without a prediction, ascending; compact where they are many.
    """

    exit_code = EXIT_DATA_MISSING

    def __init__(self, message: str, indices: Iterable[int] = ()):
        super().__init__(message)
        self.indices: Sequence[int] = indices if isinstance(indices, Sequence) else tuple(indices)


class UnreadableStreamError(GPUOrchError):
    """A stream raised an error where an item was to be read. What comes behind the item cannot be known."""

    exit_code = EXIT_DATA_MISSING


class TooManyErroredSamplesError(GPUOrchError):
    """More samples were given up than ``max_errored_samples`` allows."""

    exit_code = EXIT_DATA_MISSING


class ControlPlaneError(GPUOrchError):
    """The job's control plane failed: its coordinator is gone, or ranks disagree."""


class ControlPlaneTimeoutError(ControlPlaneError, TimeoutError):
    """The coordinator, or ranks that had to take part, did not answer in time."""


class ProtocolError(ControlPlaneError):
    """A message between two processes is malformed, or of a type that is not known."""


class NodeRankTakenError(ControlPlaneError):
    """Another supervisor has the node rank that this one asks for, or has had."""

    exit_code = EXIT_CONFIGURATION


class OtherJobError(ControlPlaneError):
    """The other side of a connection belongs to another job: the coordinator was started again since."""

    exit_code = EXIT_RESUMABLE


class CollectiveMismatchError(ControlPlaneError):
    """Ranks called different collectives at the same point."""


class WorkerStartError(GPUOrchError, OSError):
    """No worker can be started on this node: there is no room for it, or the process that forks workers dies."""


class InputMismatchError(GPUOrchError):
    """Ranks that must read the same have read different input."""

    exit_code = EXIT_CONFIGURATION


class DataPlaneError(GPUOrchError):
    """The ranks of a tensor-parallel group could not complete a step together."""


class CollectiveError(DataPlaneError):
    """A collective failed: a connection broke, or the ranks called different ones."""


class CollectiveTimeoutError(CollectiveError, TimeoutError):
    """The other ranks of the group did not take part in a collective in time."""


class StepAbortedError(DataPlaneError):
    """Another rank of the group has left the step. Let it pass: all ranks then decide together what to do."""


class PeerFailedError(DataPlaneError):
    """The step raised an error on another rank of the group, which no retry can repair.

    Args:
        message: What was wrong.
        caused_by: Global rank of the one that raised it.
    """

    def __init__(self, message: str, caused_by: int | None = None):
        super().__init__(message)
        self.caused_by = caused_by


class GroupRecoveryError(DataPlaneError):
    """The ranks of the group could not agree or connect again; the replica has to be restarted."""


class GroupOutOfMemoryError(GPUOrchError, MemoryError):
    """A rank of the tensor-parallel group ran out of memory; all of its ranks raise this at the same point."""


class MemoryBudgetError(GPUOrchError, MemoryError):
    """An allocation would exceed the memory budget."""


class TensorParallelError(GPUOrchError):
    """No tensor-parallel plan was found, or one failed verification."""

    exit_code = EXIT_CONFIGURATION


def format_indices(indices: Iterable[int], limit: int = 20) -> str:
    """Write ascending indices as ranges: ``3, 7-9, 40``.

    Args:
        indices: Ascending integers.
        limit: Ranges to write before the rest is counted only.

    Returns:
        The text, complete up to ``limit`` ranges.
    """
    if hasattr(indices, "ranges"):  # UnitRanges, which are not walked
        return str(indices)
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    text = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges[:limit])
    hidden = sum(high - low + 1 for low, high in ranges[limit:])
    return f"{text} and {hidden} more" if hidden else text


@dataclass(frozen=True)
class ExceptionSummary:
    """An exception in one line.

    Attributes:
        type: Name of its class.
        message: First line of what it says.
        location: ``file:line`` of the innermost frame of the user's code, or of the innermost one at all.
    """

    type: str
    message: str
    location: str

    def __str__(self) -> str:
        said = f"{self.type}: {self.message}" if self.message else self.type
        return f"{said} ({self.location})" if self.location else said


def summarize_exception(error: BaseException) -> ExceptionSummary:
    """Tell what an exception says and where it was raised, also where a loader's worker process raised it."""
    text = str(error)
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if _RAISED_IN_WORKER.match(text):  # torch raises it again here, with the worker's traceback as its message
        frames = [(file, int(line)) for file, line in _FRAME.findall(text)] or frames
        text = text.rstrip().rsplit("\n", 1)[-1].removeprefix(f"{type(error).__name__}: ")
    lines = text.strip().splitlines()
    message = lines[0] if lines else ""
    users = [frame for frame in frames if not frame[0].startswith(_NOT_THE_USERS)]
    file, line = (users or frames or [("", 0)])[-1]
    location = f"{os.path.basename(file)}:{line}" if file else ""
    return ExceptionSummary(type(error).__name__, message[:_MESSAGE_CHARACTERS], location)


_MESSAGE_CHARACTERS = 300
_RAISED_IN_WORKER = re.compile(r"Caught \w+ in DataLoader worker process")
_FRAME = re.compile(r'^  File "(.+)", line (\d+)', re.MULTILINE)
_NOT_THE_USERS = tuple(
    {sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {os.path.dirname(os.path.abspath(__file__)) + os.sep, "<frozen "}
)
