"""Processes that a worker leaves behind: those in sessions of their own are killed, orphans of it are reaped.

Killing a worker's session ends what it has started, except what has begun a session of its own (a daemon, a shell, a server
of the user's script). Those are told by the environment that they inherit, when their worker ends; a mere fork of a worker
that was itself forked, or one with another environment, is not. These become children of the fork server when the worker is
gone, and end with it: with the job, also where the supervisor is killed. Where the supervisor is the first process of a
container, orphans become its children, and nothing else reaps them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

_PROC = Path("/proc")
_PR_SET_CHILD_SUBREAPER = 36
_MAX_ROUNDS = 10
"""A process that forks faster than it is found is given up."""


def kill_marked(name: str, value: str) -> int:
    """Kill all processes that have inherited an environment variable with a value, this one excepted.

    Returns:
        How many were found. None where there is no ``/proc``.
    """
    entry, found = f"{name}={value}".encode(), 0
    for _ in range(_MAX_ROUNDS):
        marked = [pid for pid in _processes() if pid != os.getpid() and entry in _environment(pid) and _is_running(pid)]
        for pid in marked:
            _kill(pid)
        found += len(marked)
        if not marked:
            break
    return found


def become_subreaper() -> None:
    """Have orphans below this process become its children; nothing where the system knows no such thing."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_descendants(timeout_seconds: float) -> None:
    """Kill and reap all children of this process, and theirs, which become its own; see :func:`become_subreaper`."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        for pid in _children():
            _kill(pid)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # there are none
            return
        time.sleep(0.005)


def reap_orphans(sessions: Collection[int]) -> int:
    """Reap ended processes of these sessions whose parent has ended, if they have become children of this process.

    Args:
        sessions: Sessions of workers. Their leaders, the workers themselves, are left to those who started them.

    Returns:
        How many were reaped.
    """
    reaped = 0
    for pid in _children():
        state, session = _state_and_session(pid)
        if state == "Z" and session in sessions and pid != session:
            try:
                reaped += os.waitpid(pid, os.WNOHANG)[0] == pid
            except ChildProcessError:  # it was reaped meanwhile
                continue
    return reaped


def _processes() -> Iterator[int]:
    try:
        names = os.listdir(_PROC)
    except OSError:
        return
    yield from (int(name) for name in names if name.isdigit())


def _environment(pid: int) -> list[bytes]:
    try:
        return (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return []


def _children() -> Iterator[int]:
    """Children of this process; an orphan is given to any of its threads."""
    for path in _PROC.glob("self/task/*/children"):
        try:
            yield from map(int, path.read_text().split())
        except OSError:  # the thread has ended
            continue


def _state_and_session(pid: int) -> tuple[str, int]:
    try:
        # The name of the program, in brackets, may hold anything.
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", -1
    return fields[0], int(fields[3])


def _is_running(pid: int) -> bool:
    return _state_and_session(pid)[0] not in ("", "Z", "X")


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
