"""Which end of a worker is seen first, and what is left of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from lightning_gpuorch.control.bootstrap import ERROR_FILE
from lightning_gpuorch.supervisor import workers as module
from lightning_gpuorch.supervisor.workers import Workers

SCRIPT = """
import os, sys, pathlib
caused_by, go = sys.argv[1:]
pathlib.Path(os.environ["_GPUORCH_ERROR_FILE"]).write_text(caused_by)
if go:
    open(go).read()  # a pipe: blocks until the test lets this one end
sys.exit(1)
"""


class _Spawner:
    """Rank 0 says that rank 1 was the cause; rank 1 ends when it is let go."""

    def __init__(self, go: Path):
        self._go, self.processes = go, []

    def prepare(self) -> None: ...

    def close(self) -> None: ...

    def can_spawn(self) -> bool:
        return True

    def spawn(self, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        first = not self.processes
        record = {"type": "PeerFailedError" if first else "RuntimeError", "message": "", "units": None}
        record |= {"caused_by": 1} if first else {}
        self.processes.append(
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, json.dumps(record), "" if first else str(self._go)],
                env={ERROR_FILE: environment[ERROR_FILE]}, start_new_session=True,
            )
        )  # fmt: skip
        return self.processes[-1]


@pytest.fixture
def two(tmp_path):
    go = tmp_path / "go"
    os.mkfifo(go)
    spawner = _Spawner(go)
    workers = Workers(spawner, tmp_path / "lives")
    for rank in range(2):
        workers.start(rank, 0, {})
    yield workers, spawner, go
    for process in spawner.processes:
        process.kill()
        process.wait(10)


def _next_end(workers: Workers) -> int:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for worker, code in workers.ended():
            assert code == 1
            return worker.rank
        time.sleep(0.01)
    raise TimeoutError("no worker ended")


def test_the_culprit_comes_before_the_one_it_has_taken_along(two):
    workers, spawner, go = two
    spawner.processes[0].wait(10)
    assert not list(workers.ended()), "the witness waits for the culprit"
    go.write_text("")
    assert [_next_end(workers), _next_end(workers)] == [1, 0]


def test_a_culprit_that_does_not_end_is_not_waited_for_for_ever(two, monkeypatch):
    workers, spawner, _ = two
    monkeypatch.setattr(module, "_CULPRIT_SECONDS", 0.2)
    spawner.processes[0].wait(10)
    assert _next_end(workers) == 0
    assert spawner.processes[1].poll() is None


LEAVES = """
import os, subprocess, sys, time
kept = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"],
                        start_new_session=True, stdout=subprocess.PIPE)
kept.stdout.readline()
print(kept.pid, flush=True)
if sys.argv[1] == "stays":
    time.sleep(600)
"""


class _LeavingSpawner:
    """Starts workers that start a process in a session of its own."""

    def __init__(self, ends: str):
        self._ends = ends

    def prepare(self) -> None: ...

    def close(self) -> None: ...

    def can_spawn(self) -> bool:
        return True

    def spawn(self, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LEAVES, self._ends], env={**os.environ, **environment}, start_new_session=True,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self.process


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="needs /proc")
@pytest.mark.parametrize("ends", ["stays", "leaves"])
def test_what_a_worker_has_started_in_a_session_of_its_own_ends_with_it(tmp_path, ends):
    spawner = _LeavingSpawner(ends)
    workers = Workers(spawner, tmp_path / "lives")
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        workers.start(0, 0, {})
        left = psutil.Process(int(spawner.process.stdout.readline()))
        if ends == "stays":
            workers.kill([0])
        else:
            spawner.process.wait(10)
            assert [code for _, code in workers.ended()] == [0]
        gone, _ = psutil.wait_procs([left], 10)
        assert gone or left.status() == psutil.STATUS_ZOMBIE
        assert other.poll() is None, "what is not the worker's is left alone"
    finally:
        other.kill()
        other.wait(10)
        spawner.process.kill()
        spawner.process.wait(10)
        spawner.process.stdout.close()


AS_PID_1 = """
import ctypes, os, psutil, subprocess, sys, time
from pathlib import Path
from lightning_gpuorch.supervisor.workers import Workers

ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come here, as to the first process of a container

class Spawner:
    def prepare(self): ...
    def close(self): ...

    def can_spawn(self) -> bool:
        return True
    def spawn(self, environment):
        starts = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
        self.process = subprocess.Popen([sys.executable, "-c", starts], start_new_session=True, stdout=subprocess.PIPE)
        return self.process

spawner = Spawner()
workers = Workers(spawner, Path(sys.argv[1]))
own = subprocess.Popen(["true"])  # is this process's to wait for
workers.start(0, 0, {})
orphan = int(spawner.process.stdout.readline())
workers.kill([0])
deadline = time.monotonic() + 20
while psutil.pid_exists(orphan):
    assert time.monotonic() < deadline, psutil.Process(orphan)
    list(workers.ended())
    time.sleep(0.05)
assert own.wait(10) == 0
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs prctl")
def test_orphans_of_a_killed_worker_are_reaped_where_they_become_the_supervisors_children(tmp_path):
    subprocess.run([sys.executable, "-c", AS_PID_1, str(tmp_path)], check=True, timeout=60)
