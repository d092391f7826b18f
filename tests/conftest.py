"""Helpers of all tests: run a script as a user would, with a time limit, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported anywhere: a forked child must not wait for its parent's OpenMP threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    pass  # a machine on which only tests/gpu is run
else:
    # The same examples in every run, so that a verdict on a revision can be had again; HYPOTHESIS_PROFILE=random looks
    # for others. The machine may be shared: how long an example takes says nothing about the code.
    _any_speed: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("same", derandomize=True, **_any_speed)
    settings.register_profile("random", **_any_speed)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

SCRIPTS = Path(__file__).parent / "jobs" / "scripts"


def gpuorch_run(devices: int = 2) -> tuple[str, ...]:
    """A launcher that starts sooner than ``python``: its supervisor does not import what the script imports."""
    if devices == 1:
        return (sys.executable,)
    return (str(Path(sys.executable).with_name("gpuorch")), "run", "--devices", str(devices), "--accelerator", "cpu")


@dataclass
class Finished:
    """A script that has ended."""

    code: int
    output: str
    result: Any


class Runner:
    """Runs scripts of ``tests/jobs/scripts``; each gets ``--result FILE`` to write JSON to."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        self._count = 0

    def start(
        self, script: str, *arguments: Any, launcher: tuple[str, ...] = (), environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a script without waiting for it."""
        self._count += 1
        log = open(self.directory / f"log-{self._count}.txt", "wb")  # noqa: SIM115 - the process keeps it
        path = SCRIPTS / script if not Path(script).is_absolute() else Path(script)
        command = [*(launcher or (sys.executable,)), str(path), *map(str, arguments)]
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONWARNINGS": "default",
            **(environment or {}),
        }
        process = subprocess.Popen(
            command, cwd=self.directory, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        process.log = Path(log.name)  # type: ignore[attr-defined]
        log.close()
        self._processes.append(process)
        return process

    def wait(self, process: subprocess.Popen[bytes], timeout: float = 120) -> int:
        """Wait for a started script; it fails the test if it takes too long."""
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            text = self.log_of(process)
            self._kill(process)
            pytest.fail(f"{process.args} did not end within {timeout} s:\n{text[-6000:]}")

    @staticmethod
    def log_of(process: subprocess.Popen[bytes]) -> str:
        """What the script has printed."""
        return process.log.read_text(errors="replace")  # type: ignore[attr-defined,no-any-return]

    def run(self, script: str, *arguments: Any, timeout: float = 120, code: int | None = 0, **options: Any) -> Finished:
        """Run a script to its end and read its result."""
        result = self.directory / f"result-{self._count}.json"
        process = self.start(script, *arguments, "--result", result, **options)
        ended = self.wait(process, timeout)
        text = self.log_of(process)
        if code is not None:
            assert ended == code, f"{process.args} ended with {ended}, expected {code}:\n{text[-8000:]}"
        return Finished(ended, text, json.loads(result.read_text()) if result.exists() else None)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        for number in (signal.SIGCONT, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                return
        process.wait(10)

    def close(self) -> None:
        """Kill what still runs."""
        for process in self._processes:
            if process.poll() is None:
                self._kill(process)


def free_port() -> int:
    """A port that is free now, for launchers that have to be given one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole jobs are marked, so that ``-m "not job"`` leaves what takes a minute."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent / "jobs") or "runner" in getattr(item, "fixturenames", ()):
            item.add_marker("job")


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    runner = Runner(tmp_path)
    yield runner
    runner.close()


@pytest.fixture(autouse=True)
def _leave_nothing_behind() -> Iterator[None]:
    """A test must not leak environment variables or threads of ours."""
    environment, threads = dict(os.environ), set(threading.enumerate())
    yield
    from lightning_gpuorch.worker import session

    session.leave()
    leaked = {k for k in os.environ if k not in environment and not k.startswith("PYTEST")} - {
        "KMP_INIT_AT_FORK",
        "KMP_DUPLICATE_LIB_OK",
        "TORCHINDUCTOR_CACHE_DIR",
    }
    for key in leaked:
        del os.environ[key]
    assert not {k for k in leaked if "GPUORCH" in k}, f"leaked environment variables: {leaked}"
    # Threads that wait for a driver, or carry out a signal, may outlive whoever started them.
    spared = ("gpuorch-drain", "gpuorch-health", "gpuorch-xid", "gpuorch-verdict")
    ours = [t for t in set(threading.enumerate()) - threads if t.name.startswith("gpuorch-") and t.name not in spared]
    for thread in ours:
        thread.join(5)
    assert not [t for t in ours if t.is_alive()], f"leaked threads: {ours}"
