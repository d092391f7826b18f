"""The first code of a worker: tie its life to the supervisor's, run the user's script, report how it ended.

Run as ``python -m lightning_gpuorch.control.bootstrap script PATH [ARGS]`` or ``... module NAME [ARGS]``. Nothing heavy is
imported before the script itself asks for it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from types import TracebackType

from lightning_gpuorch.control.environment import WorkerEnvironment
from lightning_gpuorch.control.heartbeat import Phase, current_heartbeat, start_heartbeat

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
    """Print an exception as Python would, leave a record for the supervisor, and return the exit code."""
    shown = _without_our_frames(error.__traceback__)
    text = "".join(traceback.format_exception(type(error), error, shown))
    sys.stderr.write(text)
    sys.stderr.flush()
    path = os.environ.get(ERROR_FILE)
    if path:
        record = {"type": type(error).__name__, "message": str(error), "traceback": text, "pid": os.getpid()}
        if getattr(error, "caused_by", None) is not None:
            record["caused_by"] = error.caused_by  # type: ignore[attr-defined]
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump(record, file)
        except OSError as failure:  # the record only helps the supervisor's message; the exit code still tells
            sys.stderr.write(f"gpuorch: no error record at {path}: {failure}\n")
    return int(getattr(error, "exit_code", 1))


def _without_our_frames(tb: TracebackType | None) -> TracebackType | None:
    """Drop the frames of this file and of runpy: the user's traceback starts in the user's script."""
    here = (__file__, runpy.__file__, "<frozen runpy>")
    while tb is not None and tb.tb_frame.f_code.co_filename in here:
        tb = tb.tb_next
    return tb


def main(argv: list[str]) -> int:
    """Run the script; returns the exit code."""
    die_with_parent()
    announce()
    inject()
    kind, target, *arguments = argv
    sys.argv = [target, *arguments]
    try:
        if kind == "module":
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(target))
            runpy.run_path(target, run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever ends the script is reported and becomes the exit code
        return report_failure(error)
    finally:
        winding_up()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
