"""How a worker process is made: the user's script run again, or this process forked."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_gpuorch.control.bootstrap import (
    PARENT,
    announce,
    die_with_parent,
    inject,
    report_exit,
    report_failure,
    winding_up,
)
from lightning_gpuorch.errors import ConfigurationError, WorkerStartError
from lightning_gpuorch.supervisor.fork_server import ForkServerSpawner
from lightning_gpuorch.supervisor.workers import Process, Spawner


def script_spawner(command: Sequence[str], warm_start: bool) -> Spawner:
    """A spawner that runs a script or module: forked from a preloaded process, or started from nothing.

    Args:
        command: ``("script", PATH, *ARGS)`` or ``("module", NAME, *ARGS)``.
        warm_start: Whether to preload.
    """
    return ForkServerSpawner(command) if warm_start else ScriptSpawner(command)


def command_of_this_process() -> list[str]:
    """The command that runs again what this process runs.

    Raises:
        ConfigurationError: This process runs no file or module (``python -c``, standard input).
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return ["module", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    path = getattr(main, "__file__", None)
    if path is None or not os.path.exists(path):
        raise ConfigurationError(
            "several devices need a script that can be run again for each of them, and this process runs none; save "
            "the code to a file, or use strategy='gpuorch_notebook'."
        )
    return ["script", os.path.abspath(path), *sys.argv[1:]]


class ScriptSpawner:
    """Runs a script or module again in each worker.

    Args:
        command: ``("script", PATH, *ARGS)`` or ``("module", NAME, *ARGS)``.
    """

    def __init__(self, command: Sequence[str]):
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        self._command = [sys.executable, "-u", *flags, "-m", "lightning_gpuorch.control.bootstrap", *command]

    def prepare(self) -> None:
        """Nothing to prepare."""

    def can_spawn(self) -> bool:
        """Always."""
        return True

    def spawn(self, environment: Mapping[str, str]) -> Process:
        """See :meth:`Spawner.spawn`."""
        try:
            return subprocess.Popen(
                self._command,
                env={**os.environ, **environment, PARENT: str(os.getpid())},
                start_new_session=True,
                stdin=subprocess.DEVNULL,
            )
        except OSError as error:
            raise WorkerStartError(f"a worker process cannot be started: {error}.") from error

    def close(self) -> None:
        """Nothing to release."""


class ForkSpawner:
    """Forks this process; the worker calls a function.

    Args:
        target: What the worker runs.
    """

    def __init__(self, target: Callable[[], Any]):
        self._target = target
        self._context = multiprocessing.get_context("fork")

    def prepare(self) -> None:
        """Nothing to prepare."""

    def can_spawn(self) -> bool:
        """Always."""
        return True

    def spawn(self, environment: Mapping[str, str]) -> Process:
        """See :meth:`Spawner.spawn`."""
        variables = {**environment, PARENT: str(os.getpid())}
        process = self._context.Process(target=self._run, args=(variables,), daemon=False)
        process.start()
        return _ForkedProcess(process)

    def close(self) -> None:
        """Nothing to release."""

    def _run(self, variables: Mapping[str, str]) -> None:
        os.setsid()
        os.environ.update(variables)
        die_with_parent()
        announce()
        inject()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            self._target()
        except SystemExit as leaving:
            code = report_exit(leaving)
        except BaseException as error:  # noqa: BLE001 - whatever ends the function is reported and becomes the exit code
            code = report_failure(error)
        else:
            code = 0
        winding_up()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not the notebook's own exit handlers


class _ForkedProcess:
    def __init__(self, process: Any):
        self._process = process
        self.pid: int = process.pid

    def poll(self) -> int | None:
        code: int | None = self._process.exitcode
        return code
