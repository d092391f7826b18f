"""The first code of a worker: tie its life to the supervisor's, run the user's script, report how it ended.

Run as ``python -m lightning_gpuorch.control.bootstrap script PATH [ARGS]`` or ``... module NAME [ARGS]``. Nothing heavy is
imported before the script itself asks for it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import importlib
import os
import runpy
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from lightning_gpuorch.control.environment import WorkerEnvironment
from lightning_gpuorch.control.error_record import ErrorRecord
from lightning_gpuorch.control.heartbeat import Phase, current_heartbeat, start_heartbeat
from lightning_gpuorch.errors import EXIT_FAILURE, EXIT_RESUMABLE

EXIT_SUCCESS = 0
ERROR_FILE = "_GPUORCH_ERROR_FILE"
PARENT = "_GPUORCH_PARENT"
DUMP_FILE = "_GPUORCH_DUMP_FILE"
INJECT = "_GPUORCH_INJECT"
"""``module:function``, called in a worker before the script: how tests put faults into a process."""
DUMP_SIGNAL = signal.SIGRTMIN + 3
"""Asks a worker for the stacks of all its threads; answered also while something holds the GIL."""
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Let the kernel kill this process when the supervisor's thread that started it is gone."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    parent = os.environ.get(PARENT)
    if parent is not None and os.getppid() != int(parent):  # it died before the line above
        os._exit(1)


def continue_with_parents_end() -> None:
    """In place of :func:`die_with_parent`: be woken, in case this process is stopped, to end by itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0)


def announce() -> None:
    """Show the supervisor signs of life, and be ready to show it the stacks."""
    dump = os.environ.get(DUMP_FILE)
    if dump:
        faulthandler.register(DUMP_SIGNAL, file=open(dump, "w"), all_threads=True, chain=False)  # noqa: SIM115
    worker = WorkerEnvironment.read()
    if worker is not None and worker.heartbeat is not None:
        start_heartbeat(worker.heartbeat, worker.local_world_size, worker.local_rank, worker.generation)


def inject() -> None:
    """Call what a test has named to be called in every worker, if one has."""
    module, _, function = os.environ.get(INJECT, "").partition(":")
    if module:
        getattr(importlib.import_module(module), function)()


def winding_up() -> None:
    """The script is over: from now on only the time to leave is limited."""
    heartbeat = current_heartbeat()
    if heartbeat is not None:
        heartbeat.enter(Phase.DONE)


def report_failure(error: BaseException) -> int:
    """Leave a record of an exception for the supervisor, which shows it; without one, print it as Python would.

    Returns:
        The exit code.
    """
    record = ErrorRecord.of(error, _without_our_frames(error.__traceback__), os.getpid())
    if not _leave(record):
        sys.stderr.write(record.traceback)
        sys.stderr.flush()
    return EXIT_FAILURE if record.exit_code is None else record.exit_code


def report_exit(leaving: SystemExit) -> int:
    """Leave a record of a script that ends itself with an exit code, unless it has ended well or a record is there.

    Returns:
        The exit code.
    """
    if leaving.code is None or leaving.code == EXIT_SUCCESS:
        return EXIT_SUCCESS
    code = leaving.code if isinstance(leaving.code, int) else EXIT_FAILURE
    path = os.environ.get(ERROR_FILE)
    if path and not os.path.exists(path):
        record = ErrorRecord.of(leaving, _without_our_frames(leaving.__traceback__), os.getpid())
        _leave(dataclasses.replace(record, exited_with=code))
    if not isinstance(leaving.code, int):
        sys.stderr.write(f"{leaving.code}\n")
    return code


def leave_resumable() -> NoReturn:
    """End this process on request, and say so to the supervisor: the exit code alone would not be believed.

    Raises:
        SystemExit: Always.
    """
    _leave(ErrorRecord(type="SystemExit", message="stopped on request", exit_code=EXIT_RESUMABLE, pid=os.getpid()))
    raise SystemExit(EXIT_RESUMABLE)


def _leave(record: ErrorRecord) -> bool:
    """Write the record where the supervisor looks for it, if there is one."""
    path = os.environ.get(ERROR_FILE)
    if not path:
        return False
    try:
        record.write(Path(path))
    except OSError as failure:
        sys.stderr.write(f"gpuorch: no error record at {path}: {failure}\n")
        return False
    return True


def _without_our_frames(tb: TracebackType | None) -> TracebackType | None:
    """Drop the frames of this file and of runpy: the user's traceback starts in the user's script."""
    here = (__file__, runpy.__file__, "<frozen runpy>")
    while tb is not None and tb.tb_frame.f_code.co_filename in here:
        tb = tb.tb_next
    return tb


def main(argv: list[str]) -> int:
    """Run the script; returns the exit code."""
    die_with_parent()
    kind, target, *arguments = argv
    sys.argv = [target, *arguments]
    try:
        announce()
        inject()
        if kind == "module":
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(target))
            runpy.run_path(target, run_name="__main__")
    except SystemExit as leaving:
        return report_exit(leaving)
    except BaseException as error:  # noqa: BLE001 - whatever ends the script is reported and becomes the exit code
        return report_failure(error)
    finally:
        winding_up()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
