"""Where the records of a run are while it runs, and which runs there are on this node.

Every run has a directory ``<temporary directory>/gpuorch-<uid>/<run id>/``: events, logs, metrics, profiles. The file
``run.json`` in it names the process that answers for the run, so that commands that look at a running job find it
without being told where it is. That process holds a lock on the file while it lives. Its number would not tell: a container
that shares the temporary directory has numbers of its own. When the run ends, its records go beside the predictions, if those
are kept, and the directory is removed; a run that was killed leaves it, and it is swept away a week later.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from lightning_gpuorch.checked_files import integer, is_number, open_file, parse_object, read_file
from lightning_gpuorch.paths import Location, ObjectPath
from lightning_gpuorch.telemetry.command_line import command_line
from lightning_gpuorch.telemetry.events.log import EventLog, read_events
from lightning_gpuorch.telemetry.failures import FailureTally, observer_failures
from lightning_gpuorch.telemetry.report.report import write_report

log = logging.getLogger(__name__)

OWNER_FILE = "run.json"
KEPT = ("events", "logs", "errors", "profiles", "traces")
"""What of a run's records is kept; metrics have been scraped, or never will be."""
_SWEEP_AFTER_SECONDS = 7 * 86400.0
_MAX_OWNER_BYTES = 2**22
_locks: dict[Path, int] = {}
"""Descriptors by which this process holds the locks of its runs."""


@dataclass(frozen=True)
class Run:
    """A run on this node.

    Attributes:
        run_id: Its identity.
        directory: Where its records are.
        pid: The process that answers for it: the supervisor, or the only rank.
        command: Its command line.
        began: Unix time at which it began, in seconds.
        alive: Whether that process is still there.
    """

    run_id: str
    directory: Path
    pid: int
    command: str
    began: float
    alive: bool

    def job_directories(self) -> list[str]:
        """Where its predict calls write their results, as paths or URLs, as far as they have begun.

        Raises:
            OSError: Its events cannot be read.
        """
        events, _ = read_events(self.directory / "events")
        named = [event["directory"] for event in events if event["kind"] == "job" and "directory" in event]
        return [name for name in named if "\0" not in name]


def new_run_id() -> str:
    """A name for a launch: when it began, and something that makes it unique."""
    return f"run-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def runs_directory() -> Path:
    """The directory of all runs of this user on this node."""
    return Path(tempfile.gettempdir()) / f"gpuorch-{os.getuid()}"


def create_run_directory(run_id: str) -> Path:
    """Make the directory of a run, for which this process answers; sweep away what killed runs have left long ago.

    Args:
        run_id: Identity of the run.

    Returns:
        The directory; somewhere else if another user has taken the place.

    Raises:
        OSError: It cannot be made.
    """
    base = runs_directory()
    base.mkdir(mode=0o700, exist_ok=True)
    state = base.lstat()
    if state.st_uid == os.getuid() and not base.is_symlink() and not state.st_mode & 0o022:
        directory = base / run_id
        directory.mkdir(mode=0o700)
        sweep()
    else:
        directory = Path(tempfile.mkdtemp(prefix=f"gpuorch-{run_id}-"))
    owner = {"run_id": run_id, "pid": os.getpid(), "began": time.time(), "command": command_line(sys.argv)}
    for path in [path for path in _locks if not path.exists()]:  # runs of this process that are over
        os.close(_locks.pop(path))
    path = directory / OWNER_FILE
    descriptor = _locks[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # before it tells anything: until then it is not taken for a run
    except OSError as error:
        log.debug("%s cannot be locked: %s", path, error)
    os.write(descriptor, json.dumps(owner).encode())
    return directory


def find_runs() -> list[Run]:
    """All runs of this user on this node whose records are still there, newest first."""
    found = []
    for path in runs_directory().glob(f"*/{OWNER_FILE}"):
        try:
            owner = parse_object(read_file(path, _MAX_OWNER_BYTES))
            if not is_number(owner["began"]) or not all(isinstance(owner[name], str) for name in ("run_id", "command")):
                raise ValueError("it does not tell of a run")  # noqa: TRY301
            run = Run(
                run_id=owner["run_id"], directory=path.parent, pid=integer(owner["pid"], "pid"), command=owner["command"],
                began=float(owner["began"]), alive=_is_locked(path),
            )  # fmt: skip
        except (OSError, ValueError, KeyError) as error:  # ended and tidied up a moment ago, or just begun
            log.debug("%s tells of no run: %r", path, error)
            continue
        found.append(run)
    return sorted(found, key=lambda run: -run.began)


def sweep(older_than_seconds: float = _SWEEP_AFTER_SECONDS) -> None:
    """Remove what runs have left that were killed long ago."""
    for run in find_runs():
        if not run.alive and run.began < time.time() - older_than_seconds:
            shutil.rmtree(run.directory, ignore_errors=True)


def keep_records(run_directory: Path, target: Path, failures: FailureTally = observer_failures) -> None:
    """Copy a node's records of a run to where they stay. Never ends the run.

    Args:
        run_directory: Where this node has kept them; everybody who writes there is gone.
        target: Where they go; made if it does not exist. Other nodes write there, too.
        failures: Where a failure is counted.
    """
    try:
        for name in KEPT:
            if (run_directory / name).is_dir():
                shutil.copytree(run_directory / name, target / name, ignore=_empty_files, dirs_exist_ok=True)
    except Exception as error:  # noqa: BLE001 - records that cannot be kept cost nobody a prediction
        failures.add("records", error)


def _empty_files(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (path := Path(folder) / name).is_file() and not path.stat().st_size]


def report_run(records: Path, shown: Location, failures: FailureTally = observer_failures) -> None:
    """Write the report of a run whose records are kept. Never ends the run.

    Args:
        records: Where they are on this machine; the report goes beside them.
        shown: Where they are kept, to be told.
        failures: Where a failure is counted.
    """
    try:
        report = write_report(records, records / "report.html")
        log.info("the report of this run is %s", shown / report.name)
    except Exception as error:  # noqa: BLE001 - a report that cannot be written costs nobody a prediction
        failures.add("report", error)


def records_target(run_id: str, directories: Sequence[tuple[Location, bool]], run_directory: Path) -> Location | None:
    """Where the records of a run are to be kept.

    Args:
        run_id: Identity of the run.
        directories: Of its predict calls, and for each whether it is removed at the end.
        run_directory: Of the run.

    Returns:
        Beside the predictions that are kept; else, if somebody asked for profiles or traces, where predictions would have
        been; else None.
    """
    for directory, ephemeral in directories:
        if not ephemeral and (isinstance(directory, ObjectPath) or directory.is_dir()):
            return directory / "runs" / run_id
    if directories and any((run_directory / name).is_dir() for name in ("profiles", "traces")):
        return directories[0][0].parent
    return None


class RunRecords:
    """What the process records that answers for a run without a supervisor: the run, its predict calls, its end.

    Args:
        run_id: Identity of the run.
        failures: Where failures are counted.
        **run: Fields of the ``run`` event.
    """

    def __init__(self, run_id: str, *, failures: FailureTally = observer_failures, **run: object):
        self.directory: Path | None = None
        self._run_id, self._failures = run_id, failures
        self._events: EventLog | None = None
        try:
            self.directory = create_run_directory(run_id)
        except OSError as error:
            failures.add("events", error)
            return
        self._events = EventLog(self.directory / "events", "supervisor", failures=failures)
        self.record("run", command=command_line(sys.argv), run_id=run_id, **run)

    def record(self, kind: str, /, **fields: object) -> None:
        """Record an event of the run as a whole."""
        if self._events is not None:
            self._events.record(kind, **fields)

    def pause(self) -> None:
        """Write what is recorded so far, and have no thread until :meth:`resume`."""
        if self._events is not None:
            self._events.pause()

    def resume(self) -> None:
        """Record again, for another stage."""
        if self._events is not None:
            self._events.resume()

    def close(
        self,
        directories: Sequence[tuple[Location, bool]],
        copy_of: Callable[[Location], AbstractContextManager[Path]],
        **end: object,
    ) -> None:
        """Record the end, keep the records if predictions are kept, and remove the directory; safe to call again.

        Args:
            directories: See :func:`records_target`.
            copy_of: Gives the directory in which records are kept as one of this machine.
            **end: Fields of the ``end`` event.
        """
        events, self._events = self._events, None
        if events is None or self.directory is None:
            return
        events.record("end", **end)
        events.close()
        target = records_target(self._run_id, directories, self.directory)
        if target is not None:
            with copy_of(target) as copy:
                keep_records(self.directory, copy, self._failures)
                report_run(copy, target, self._failures)
        shutil.rmtree(self.directory, ignore_errors=True)


def _is_locked(path: Path) -> bool:
    """Whether the lock of a run is held; also where the file system cannot tell, since what lives must stay."""
    descriptor = open_file(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _close_locks() -> None:
    """In a forked child: it must not hold the run's lock when the process that answers for it is dead."""
    for descriptor in _locks.values():
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_close_locks)
