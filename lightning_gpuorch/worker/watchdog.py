"""A process beside a rank without a supervisor: ends the rank when it is stuck, after showing where.

A hang that holds the GIL cannot be seen from inside the process, so this one looks from outside, at the same table the
supervisor would read. Run as ``python -m lightning_gpuorch.worker.watchdog``, by
:class:`~lightning_gpuorch.callbacks.HeartbeatMonitor`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lightning_gpuorch.control.bootstrap import DUMP_SIGNAL, PARENT, die_with_parent
from lightning_gpuorch.control.heartbeat import HeartbeatTable, Judge, Limits, main_thread_of_dump

POLL_SECONDS = 0.2


def start_watchdog(table: str, dump: str, rank: int, limits: Limits) -> subprocess.Popen[bytes]:
    """Watch this process; its heartbeat is row 0 of ``table``.

    Args:
        table: Path of the heartbeat table.
        dump: Where this process writes its stacks when asked.
        rank: Global rank, for the message.
        limits: When it counts as stuck.
    """
    order = {"table": table, "dump": dump, "rank": rank, "pid": os.getpid(), "limits": dataclasses.asdict(limits)}
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_gpuorch.worker.watchdog", json.dumps(order)],
        env={**os.environ, PARENT: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def watch(table: str, dump: str, rank: int, pid: int, limits: Limits) -> None:
    """Look until the process is gone or stuck."""
    judge = Judge(HeartbeatTable(table, 1), limits)
    started = {0: time.monotonic_ns()}
    while os.getppid() == pid:
        verdict = judge.check({0: pid}, started)
        if verdict is not None:
            for number in (DUMP_SIGNAL, signal.SIGCONT):
                os.kill(pid, number)
            where = _await_dump(Path(dump))
            sys.stderr.write(
                f"gpuorch: rank {rank} is stuck: {verdict.reason}; ending it, so that the job ends with an error instead of "
                f"hanging{'. It stands at' if where else ''}\n{where}\n"
            )
            sys.stderr.flush()
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(POLL_SECONDS)


def _await_dump(dump: Path, seconds: float = 1.0) -> str:
    """The innermost frames, as soon as they are written; empty if the process cannot answer."""
    deadline = time.monotonic() + seconds
    where = ""
    while not where and time.monotonic() < deadline:
        time.sleep(0.02)
        where = main_thread_of_dump(dump)
    return where


if __name__ == "__main__":
    die_with_parent()
    order = json.loads(sys.argv[1])
    watch(order["table"], order["dump"], order["rank"], order["pid"], Limits(**order["limits"]))
