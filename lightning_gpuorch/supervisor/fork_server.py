"""Workers that start at once: forked from a process that has done the heavy imports already.

Importing torch and Lightning takes seconds of CPU per process, and a restarted worker would pay them again while its
replica stands still. One process per node, the fork server, imports them once; each worker is a fork of it, in which the
user's script runs from its first line. The fork server touches no CUDA, opens no thread, and runs none of the user's code.

The supervisor talks to it over a socket, one JSON object per line: it sends what to start, the fork server answers with the
process id, and later with how that process ended. It also answers pings: one that does not is continued, in case it was
stopped, and then replaced; its workers die with it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_gpuorch.control import bootstrap
from lightning_gpuorch.errors import WorkerStartError
from lightning_gpuorch.supervisor.leftovers import become_subreaper, kill_descendants

log = logging.getLogger(__name__)

PRELOADED = ("torch", "torchmetrics", "lightning.pytorch", "lightning_gpuorch.pytorch", "lightning_gpuorch.fabric")
START_SECONDS = 300.0
"""Longest time for the imports."""
PING_SECONDS = 2.0
"""After so long without a word from the fork server it is asked for one."""
CONTINUE_SECONDS = 5.0
"""After so long it gets SIGCONT, in case it was stopped."""
SILENT_SECONDS = 15.0
"""After so long it is replaced."""
_FRESH_SECONDS = 0.2
_ROOM = "Are there limits on processes, files or memory (ulimit -u, -n, -v; pids.max of a container)?"
_TIDY_SECONDS = 3.0
"""How long the fork server may take to end what workers have left behind."""


class ForkServerSpawner:
    """Starts workers by asking a fork server to fork; see :class:`~lightning_gpuorch.supervisor.workers.Spawner`.

    Args:
        command: ``("script", PATH, *ARGS)`` or ``("module", NAME, *ARGS)``.
    """

    def __init__(self, command: Sequence[str]):
        self._command = list(command)
        self._server: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._buffer = b""
        self._answers: list[dict[str, Any]] = []
        self._exit_codes: dict[int, int] = {}
        self._running: set[int] = set()
        self._has_answered = False
        self._heard_at = 0.0
        self._pinged_at = 0.0

    def prepare(self) -> None:
        """See :meth:`~lightning_gpuorch.supervisor.workers.Spawner.prepare`: the imports begin now.

        Raises:
            WorkerStartError: The fork server has died before its first word.
        """
        if self._server is not None and self._server.poll() is not None and not self._has_answered:
            raise WorkerStartError(
                "the process that forks workers has died before any was started; see its message above"
            )
        if self._server is None or self._server.poll() is not None:
            self._start()

    def can_spawn(self) -> bool:
        """See :meth:`~lightning_gpuorch.supervisor.workers.Spawner.can_spawn`.

        Raises:
            WorkerStartError: The fork server has died while it started, or not started in time.
        """
        self.prepare()
        self._watch()
        if self._has_answered and time.monotonic() - self._heard_at > _FRESH_SECONDS:
            self._ping()
            self._receive(_FRESH_SECONDS)
        return self._has_answered and time.monotonic() - self._heard_at <= _FRESH_SECONDS

    def spawn(self, environment: Mapping[str, str]) -> _ForkedWorker | _LostWorker:
        """See :meth:`~lightning_gpuorch.supervisor.workers.Spawner.spawn`.

        Raises:
            WorkerStartError: The fork server cannot be started.
        """
        self.prepare()
        assert self._server is not None
        server_pid, had_answered = self._server.pid, self._has_answered
        self._send({"command": self._command, "environment": dict(environment)})
        deadline = time.monotonic() + (SILENT_SECONDS if self._has_answered else START_SECONDS)
        while not self._answers:
            self._receive(max(0.0, deadline - time.monotonic()))
            if self._socket is not None and time.monotonic() < deadline:
                continue
            if had_answered:  # it was there a moment ago: the worker shares its fate, and is restarted as any other
                return _LostWorker(server_pid)
            raise WorkerStartError("the process that forks workers has died or does not answer; see its message above")
        answer = self._answers.pop(0)
        if "failed" in answer:
            raise WorkerStartError(f"a worker process cannot be started: {answer['failed']}. {_ROOM}")
        pid = int(answer["pid"])
        self._running.add(pid)
        return _ForkedWorker(self, pid)

    def exit_code(self, pid: int) -> int | None:
        """How a worker ended; None while it runs. If the fork server is gone, its workers are as well."""
        self._watch()
        if pid in self._exit_codes:
            return self._exit_codes[pid]
        return -signal.SIGKILL if self._socket is None else None

    def close(self) -> None:
        """End the fork server, and with it whatever workers have left behind."""
        self._end(_TIDY_SECONDS if self._has_answered else 0.0)

    def _end(self, patience_seconds: float) -> None:
        if self._socket is not None:
            self._socket.close()  # it ends by that
            self._socket = None
        if self._server is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(patience_seconds)
            self._server.kill()
            self._server.wait(10)
            self._server = None

    def _watch(self) -> None:
        """Take in what the fork server says, and see that it is not stuck: it would be missed only when a worker dies."""
        self._receive(0.0)
        if self._socket is None:
            return
        silent_seconds = time.monotonic() - self._heard_at
        if not self._has_answered:
            if silent_seconds > START_SECONDS:
                raise WorkerStartError(f"the process that forks workers has not started in {START_SECONDS:.0f} s")
            return
        if silent_seconds > PING_SECONDS and time.monotonic() - self._pinged_at > PING_SECONDS:
            self._ping()
            if silent_seconds > CONTINUE_SECONDS and self._server is not None:
                self._server.send_signal(signal.SIGCONT)
        if silent_seconds > SILENT_SECONDS:
            log.error(
                "the process that forks workers has not answered for %.0f s; it is replaced, and its %d workers with it",
                silent_seconds,
                len(self._running),
            )
            self._replace()

    def _ping(self) -> None:
        self._pinged_at = time.monotonic()
        self._send({"ping": True})

    def _replace(self) -> None:
        self._end(0.0)
        self._start()

    def _start(self) -> None:
        for pid in self._running:  # of the one before: they die with it, and it tells no more of them
            self._exit_codes[pid] = -signal.SIGKILL
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended by itself
                os.killpg(pid, signal.SIGKILL)
        self._running.clear()
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                self._server = _popen(theirs)
        except OSError as error:
            raise WorkerStartError(f"the process that forks workers cannot be started: {error}. {_ROOM}") from error
        self._socket, self._buffer, self._answers = ours, b"", []
        self._has_answered, self._heard_at = False, time.monotonic()

    def _send(self, message: dict[str, Any]) -> None:
        if self._socket is None:
            return  # it is dying, and not yet dead
        self._socket.settimeout(SILENT_SECONDS)
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:  # seen, and told, when its next word does not come
            log.debug("the process that forks workers takes no message")

    def _receive(self, timeout_seconds: float) -> None:
        if self._socket is None:
            return
        try:
            self._socket.settimeout(timeout_seconds)
            data = self._socket.recv(2**16)
        except (BlockingIOError, TimeoutError):
            return
        except OSError:
            data = b""
        if not data:
            self._socket.close()
            self._socket = None
            return
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        if lines:
            self._has_answered, self._heard_at = True, time.monotonic()
        for line in lines:
            message = json.loads(line)
            if "exit_code" in message:
                self._exit_codes[message["pid"]] = message["exit_code"]
                self._running.discard(message["pid"])
            elif "pid" in message or "failed" in message:
                self._answers.append(message)


def _popen(connection: socket.socket) -> subprocess.Popen[bytes]:
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return subprocess.Popen(
        [sys.executable, "-u", *flags, "-m", "lightning_gpuorch.supervisor.fork_server", str(connection.fileno())],
        env={**os.environ, bootstrap.PARENT: str(os.getpid())},
        pass_fds=(connection.fileno(),),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


class _ForkedWorker:
    def __init__(self, spawner: ForkServerSpawner, pid: int):
        self._spawner, self.pid = spawner, pid

    def poll(self) -> int | None:
        return self._spawner.exit_code(self.pid)


class _LostWorker:
    """A worker that was asked for, of a fork server that has died since."""

    def __init__(self, server_pid: int):
        self.pid = server_pid

    def poll(self) -> int | None:
        return -signal.SIGKILL


def _become_worker(command: Sequence[str], environment: Mapping[str, str], parent: int) -> None:
    """In the fork: run the script as if the process had just started."""
    os.setsid()
    os.environ.update(environment)
    os.environ[bootstrap.PARENT] = str(parent)
    _fresh_state(environment)
    code: Any = 1
    try:
        code = bootstrap.main(list(command))
    except SystemExit as leaving:
        code = leaving.code
    finally:
        _leave(code)


def _fresh_state(environment: Mapping[str, str]) -> None:
    """Undo what differs between a fork and a process that has imported everything itself."""
    random.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
    torch = sys.modules.get("torch")
    if torch is not None and environment.get("OMP_NUM_THREADS", "").isdigit():
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    for name in ("lightning_utilities.core.rank_zero", "lightning.fabric.utilities.rank_zero"):
        module = sys.modules.get(name)
        if module is not None:  # both read RANK when they are imported
            module.rank_zero_only.rank = int(environment["RANK"])


def _leave(code: Any) -> None:
    """End as an interpreter ends: exit handlers, flushed streams, then the exit code."""
    import atexit
    import threading

    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def serve(connection: socket.socket, preload: Sequence[str] = PRELOADED) -> None:
    """The fork server's life: import, then fork on request and report who ended, until the supervisor is gone.

    What workers have started becomes its child when they are gone, sessions of their own or not, and ends with it.
    """
    for name in preload:
        importlib.import_module(name)
    become_subreaper()
    bootstrap.continue_with_parents_end()
    import gc

    gc.collect()
    gc.freeze()  # forks share these pages as long as nobody's collector touches them
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the supervisor decides
    selector = selectors.DefaultSelector()
    selector.register(connection, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    buffer = b""
    server_pid, workers = os.getpid(), set[int]()
    _tell(connection, {"ready": True})
    while True:
        ready = {key.fileobj for key, _ in selector.select()}
        if woken in ready:
            os.read(woken, 4096)
        _report_ended(connection, workers)
        if connection not in ready:
            continue
        data = connection.recv(2**16)
        if not data:
            kill_descendants(_TIDY_SECONDS)
            return
        buffer += data
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            request = json.loads(line)
            if "ping" in request:
                _tell(connection, {"pong": True})
                continue
            try:
                pid = os.fork()
            except OSError as error:
                _tell(connection, {"failed": error.strerror})
                continue
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
                selector.close()
                connection.close()
                os.close(woken)
                os.close(wake)
                _become_worker(request["command"], request["environment"], server_pid)
            workers.add(pid)
            _tell(connection, {"pid": pid})


def _tell(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(
        BrokenPipeError, ConnectionResetError
    ):  # the supervisor is gone, which is seen when it is read
        connection.sendall(json.dumps(message).encode() + b"\n")


def _report_ended(connection: socket.socket, workers: set[int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in workers:  # and no orphan that a worker has left
            workers.discard(pid)
            _tell(connection, {"pid": pid, "exit_code": os.waitstatus_to_exitcode(status)})


if __name__ == "__main__":
    bootstrap.die_with_parent()
    serve(socket.socket(fileno=int(sys.argv[1])))
