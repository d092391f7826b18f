"""Helpers of all tests: a script runs as a user would run it, with a time limit, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

# Before torch is imported anywhere: a forked child must not wait for its parent's OpenMP threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The tests may themselves run under a launcher, whose job is not theirs.
for _name in list(os.environ):
    if _name.startswith(("SLURM_", "TORCHELASTIC_", "PMI_", "KUBERNETES_")) or _name in (
        "RANK",
        "LOCAL_RANK",
        "GLOBAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "NODE_RANK",
        "GROUP_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        del os.environ[_name]

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
    settings.register_profile("few", derandomize=True, max_examples=20, **_any_speed)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

    def pytest_configure(config: pytest.Config) -> None:
        """The fast tests look at fewer examples."""
        if "not slow" in config.option.markexpr and "HYPOTHESIS_PROFILE" not in os.environ:
            settings.load_profile("few")


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
        log = open(self.directory / f"log-{self._count}.txt", "ab")  # noqa: SIM115 - the process keeps it
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
            pytest.fail(f"{process.args} did not end within {timeout} s; its log and its stacks are below")

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
            assert ended == code, f"{process.args} ended with {ended}, expected {code}; its log is below"
        return Finished(ended, text, json.loads(result.read_text()) if result.exists() else None)

    def report(self) -> str:
        """The log of every script, for a test that has failed; those that still run show the stacks of all ranks and end."""
        parts = []
        for process in self._processes:
            running = process.poll() is None
            if running:
                end_with_stacks(process.pid, process.log)  # type: ignore[attr-defined]
                process.wait(10)
            state = "was still running" if running else f"has ended with {process.returncode}"
            parts.append(f"=== {shlex.join(map(str, process.args))} {state}:\n{self.log_of(process)[-20_000:]}")  # type: ignore[arg-type]
        return "\n".join(parts)

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


def end_with_stacks(pid: int, log: Path) -> None:
    """End a process and all it has started; each writes the stacks of its threads to the log, under a line that names it.

    ``PYTHONFAULTHANDLER`` makes a Python process do so on SIGABRT, whatever it does, GIL held or not.
    """
    root = psutil.Process(pid)
    root.suspend()  # it shall restart nothing meanwhile
    processes = [*reversed(root.children(recursive=True)), root]
    for process in processes:
        try:
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"\n--- {_name_of(process)}, process {process.pid}\n")
            resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
            process.send_signal(signal.SIGABRT)
            process.resume()
            process.wait(5)
        except (psutil.Error, ProcessLookupError):
            continue  # gone by itself, or it needs more than that
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _name_of(process: psutil.Process) -> str:
    """``rank 3, generation 0`` of a supervisor's worker; the rank that another launcher has given; else the command."""
    for file in process.open_files():
        found = re.fullmatch(r"stacks-rank(\d+)-generation(\d+)\.txt", Path(file.path).name)
        if found:
            return f"rank {found[1]}, generation {found[2]}"
    rank = process.environ().get("RANK")
    return f"rank {rank}" if rank is not None else shlex.join(process.cmdline()[:4])


def free_port() -> int:
    """A port that is free now, for launchers that have to be given one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


SLOW = {
    "callbacks/test_oom_batch_halving.py",
    "devices/memory/test_host.py",
    "devices/test_monitor.py::test_a_wedged_driver_blocks_nobody_and_becomes_unknown",
    "devices/test_verdicts.py::test_a_row_about_xids",
    "jobs/test_security.py::test_a_stranger_on_another_host_gets_nothing",
    "parallel/tensor_parallel/test_example.py",
    "parallel/tensor_parallel/test_layer_kinds.py",
    "parallel/tensor_parallel/test_loading.py",
    "parallel/tensor_parallel/test_models.py",
    "parallel/tensor_parallel/test_plan.py::test_plans_survive_json",
    "parallel/tensor_parallel/test_processes.py",
    "parallel/tensor_parallel/test_right_or_refused.py",
    "parallel/tensor_parallel/test_runtime.py",
    "parallel/tensor_parallel/test_sweep_sample.py",
    "parallel/tensor_parallel/test_transformers.py",
    "parallel/tensor_parallel/test_verify.py",
    "predictions/test_export.py::test_memory_stays_flat",
    "predictions/test_reader.py::test_memory_stays_flat_over_300_mb",
    "predictions/test_window.py",
    "strategies/test_hooks.py",
    "telemetry/test_failing_observers.py",
}
"""Modules, or tests of a module, that take most of the time of those that start no job: models and sweeps."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole jobs and slow tests are marked, so that ``-m "not job and not slow"`` leaves what takes less than a minute."""
    here = Path(__file__).parent
    for item in items:
        if not item.path.is_relative_to(here):
            continue
        if item.path.is_relative_to(here / "jobs") or "runner" in getattr(item, "fixturenames", ()):
            item.add_marker("job")
        module = item.path.relative_to(here).as_posix()
        if {module, f"{module}::{getattr(item, 'originalname', item.name)}"} & SLOW:
            item.add_marker("slow")


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


@pytest.fixture
def runner(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Runner]:
    """Runs scripts; when the test fails, their logs and the stacks of all ranks are in its report."""
    runner = Runner(tmp_path)
    yield runner
    try:
        if request.node.stash.get(_FAILED, False):
            print(runner.report())
    finally:
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
