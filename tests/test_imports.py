"""What a process or a module may import, where that is promised: seen in real processes, and by the import contracts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Runner, gpuorch_run

HEAVY = ("libtorch", "libc10", "torch/_C.", "numpy/", "libcuda")


def test_the_supervisor_of_a_running_job_has_not_loaded_torch(runner: Runner) -> None:
    job = runner.start("slow_predict.py", "--samples", 400, "--output", "out", launcher=gpuorch_run())
    notes = runner.directory / "notes.txt"
    deadline = time.monotonic() + 120
    while not notes.exists():  # workers compute, so the supervisor is past everything it does to begin with
        assert job.poll() is None, runner.log_of(job)
        assert time.monotonic() < deadline, runner.log_of(job)
        time.sleep(0.05)
    maps = Path(f"/proc/{job.pid}/maps").read_text()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{job.pid}/status").read_text().splitlines())
    os.kill(job.pid, signal.SIGTERM)
    runner.wait(job)
    assert not [line for line in maps.splitlines() if any(name in line for name in HEAVY)]
    assert int(status["VmRSS"].split()[0]) < 40 * 1024, f"the supervisor takes {status['VmRSS'].strip()}"


@pytest.mark.parametrize(
    "statement",
    [
        "import lightning_gpuorch.supervisor.supervisor",
        "import lightning_gpuorch.testing.chaos",
        "from lightning_gpuorch.cli import gpuorch; gpuorch(['run', '--help'], standalone_mode=False)",
    ],
)
def test_the_command_line_and_the_supervisor_import_nothing_heavy(statement: str) -> None:
    code = f"import sys; {statement}; print(sorted({{'torch', 'lightning', 'numpy'}} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] == "[]"
