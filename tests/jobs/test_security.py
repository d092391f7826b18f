"""What a job on one node opens to others."""

from __future__ import annotations

import time

import psutil

from tests.conftest import gpuorch_run

SLOW = "slow_predict.py"


def test_a_job_on_one_node_listens_on_loopback_only(runner, tmp_path):
    process = runner.start(SLOW, "--output", "out", "--tp", 2, "--samples", 800, launcher=gpuorch_run())
    deadline = time.monotonic() + 90
    while not (tmp_path / "notes.txt").exists():
        assert time.monotonic() < deadline, runner.log_of(process)
        time.sleep(0.05)
    supervisor = psutil.Process(process.pid)
    listening = [
        (member.name(), connection.laddr.ip)
        for member in (supervisor, *supervisor.children(recursive=True))
        for connection in member.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 2, "the group's store and its connections"
    assert not [name for name, _ in listening if name == supervisor.name()], "the control plane is no port of the host"
    assert {address for _, address in listening} <= {"127.0.0.1", "::1"}, listening
    assert runner.wait(process, 120) == 0, runner.log_of(process)
