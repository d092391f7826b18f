"""The process that forks workers, when it is stopped, dies, or never comes up."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lightning_gpuorch.errors import WorkerStartError
from lightning_gpuorch.supervisor import fork_server
from lightning_gpuorch.supervisor.fork_server import ForkServerSpawner

pytestmark = pytest.mark.slow  # each server imports torch

WAITS = ("module", "timeit", "-n", "1", "-s", "import time", "time.sleep(600)")
"""A worker that does nothing for long."""


@pytest.fixture
def spawner() -> Iterator[ForkServerSpawner]:
    spawner = ForkServerSpawner(WAITS)
    yield spawner
    spawner.close()


def _until(holds: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _server(spawner: ForkServerSpawner) -> psutil.Process:
    assert spawner._server is not None
    return psutil.Process(spawner._server.pid)


def test_one_that_stays_stopped_is_replaced_and_its_workers_count_as_killed(
    spawner: ForkServerSpawner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fork_server, "PING_SECONDS", 0.1)
    monkeypatch.setattr(fork_server, "SILENT_SECONDS", 1.0)  # before it would be continued
    _until(spawner.can_spawn)
    worker = spawner.spawn({"RANK": "0"})
    assert worker.poll() is None
    first = _server(spawner)
    first.send_signal(signal.SIGSTOP)
    asked = time.monotonic()
    _until(lambda: not spawner.can_spawn())
    assert time.monotonic() - asked < 1, "the supervisor is not held up"
    _until(lambda: worker.poll() is not None)
    assert worker.poll() == -signal.SIGKILL
    assert "its 1 workers with it" in caplog.text
    _until(lambda: not psutil.pid_exists(worker.pid))
    _until(spawner.can_spawn)
    assert _server(spawner) != first
    assert spawner.spawn({"RANK": "0"}).poll() is None


def test_when_one_dies_all_its_workers_count_as_killed_though_it_is_replaced_at_once(
    spawner: ForkServerSpawner,
) -> None:
    _until(spawner.can_spawn)
    first, second = spawner.spawn({"RANK": "0"}), spawner.spawn({"RANK": "1"})
    server = _server(spawner)
    server.kill()
    _until(lambda: first.poll() is not None, seconds=10)
    spawner.prepare()  # what the end of the first leads to, before the second is looked at
    assert (first.poll(), second.poll()) == (-signal.SIGKILL, -signal.SIGKILL)
    _until(lambda: not (psutil.pid_exists(first.pid) or psutil.pid_exists(second.pid)), seconds=10)
    _until(spawner.can_spawn)
    assert spawner.spawn({"RANK": "0"}).poll() is None


def test_a_worker_that_is_asked_for_as_it_dies_counts_as_killed(spawner: ForkServerSpawner) -> None:
    _until(spawner.can_spawn)
    server = _server(spawner)
    server.send_signal(signal.SIGSTOP)  # so that it is there when it is asked
    threading.Timer(0.3, server.kill).start()
    worker = spawner.spawn({"RANK": "0"})
    assert worker.poll() == -signal.SIGKILL
    _until(spawner.can_spawn)
    assert spawner.spawn({"RANK": "0"}).poll() is None


def test_one_that_is_killed_while_it_imports_is_started_again_though_not_for_ever(
    spawner: ForkServerSpawner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spawner.prepare()
    _server(spawner).kill()
    _until(spawner.can_spawn)
    assert "killed by SIGKILL); it is started again" in caplog.text
    assert spawner.spawn({"RANK": "0"}).poll() is None
    monkeypatch.setattr(fork_server, "MAX_EARLY_DEATHS", 1)
    again = ForkServerSpawner(WAITS)
    try:
        again.prepare()
        with pytest.raises(WorkerStartError, match="death 2 of 2"):  # noqa: PT012 - each is killed as it appears
            for _ in range(3):
                assert again._server is not None
                again._server.kill()
                again._server.wait(10)
                again.prepare()
    finally:
        again.close()


def test_one_that_cannot_import_is_not_started_again(
    spawner: ForkServerSpawner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('no torch here')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    spawner.prepare()
    with pytest.raises(WorkerStartError, match=r"exit code 1, death 1 .* GPUORCH_ENABLE_WARM_START=0"):
        _until(spawner.can_spawn, seconds=60)
    assert "no torch here" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTERM, signal.SIGINT])
def test_one_that_gets_a_signal_while_it_imports_comes_up(
    spawner: ForkServerSpawner, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(fork_server, "PING_SECONDS", 0.1)
    monkeypatch.setattr(fork_server, "CONTINUE_SECONDS", 1.0)
    spawner.prepare()
    _until(lambda: "torch" in "".join(mapped.path for mapped in _server(spawner).memory_maps()))
    _server(spawner).send_signal(number)
    first = _server(spawner)
    _until(spawner.can_spawn)
    assert _server(spawner) == first


LEAVES = """
import os, subprocess, sys, time
kept = [subprocess.Popen(["env", "-i", "sleep", "600"], start_new_session=True).pid]  # without what it could be told by
reading, writing = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(writing, str(os.getpid()).encode())
        time.sleep(600)
    os._exit(0)
kept.append(int(os.read(reading, 99)))
temporary = sys.argv[1] + ".part"
with open(temporary, "w") as file:
    file.write(" ".join(map(str, kept)))
os.rename(temporary, sys.argv[1])
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs prctl")
@pytest.mark.parametrize("ends", ["worker first", "supervisor killed"])
def test_what_workers_start_in_sessions_of_their_own_ends_with_the_job(tmp_path: Path, ends: str) -> None:
    script, told = tmp_path / "leaves.py", tmp_path / "told"
    script.write_text(LEAVES)
    spawner = ForkServerSpawner(("script", str(script), str(told), "0" if ends == "worker first" else "600"))
    try:
        _until(spawner.can_spawn)
        worker = spawner.spawn({"RANK": "0"})
        _until(told.exists)
        left = [psutil.Process(int(pid)) for pid in told.read_text().split()]
        if ends == "worker first":
            _until(lambda: worker.poll() is not None)
            assert all(process.is_running() for process in left), "they are not in its session"
            spawner.close()
        else:
            assert spawner._socket is not None
            spawner._socket.close()  # as the system does it for a process that is killed
        _, alive = psutil.wait_procs(left, 20)
        assert not alive
    finally:
        spawner.close()
