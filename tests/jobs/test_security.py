"""What a job opens to others, and what those others get."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gpuorch import read_predictions
from tests.support import open_sockets

ATTEMPTS = 200


def _attack(running, count=ATTEMPTS, around=(), address=None):
    """Attack a job as another user, from this host or from another network namespace; gives what the stranger tells."""
    found = running.listening()
    kinds = {text: open_sockets.kind_of(text) for _, text in found if not text.startswith("unix:")}
    launcher = f"127.0.0.1:{running.port}" if "torchrun" in str(running.processes[0].args) else None
    ports = [text for text, kind in kinds.items() if kind == "control plane" and text != launcher]
    if address is not None:
        ports = [f"{address}:{text.rsplit(':', 1)[1]}" for text in ports]
    temporary = Path(os.environ.get("TMPDIR", "/tmp"))
    ours = [member.pid for member in running.members()]
    targets = {
        "count": count,
        "ports": [text.replace("0.0.0.0", "127.0.0.1") for text in ports],
        "sockets": [text.removeprefix("unix:") for _, text in found if text.startswith("unix:")],
        "stores": [launcher] if launcher and address is None else [],
        "others": [t for t, k in kinds.items() if k.startswith("connections") and address is None and t != launcher],
        "pids": ours,
        "paths": [str(path) for path in _private(temporary, ours)],
        "bomb": str(temporary / f"gpuorch-bomb-{os.getpid()}"),
    }
    done = subprocess.run(
        [*around, sys.executable, "-m", "tests.support.stranger"],
        input=json.dumps(targets), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _private(temporary, pids):
    """The runtime directories of the user and what is in them, the secret of torchrun's ranks, and tables of heartbeats."""
    for directory in (*temporary.glob(f"gpuorch-{os.getuid()}"), *temporary.glob("gpuorch-secret-*")):
        yield directory
        yield from directory.rglob("*")
    yield from Path("/dev/shm").glob("gpuorch-*")


def _tokens(running):
    """The secrets of a job, as its own processes know them."""
    names = ("GPUORCH_TOKEN", "_GPUORCH_TOKEN")
    return {member.environ()[name] for member in running.members() for name in names if name in member.environ()}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("job", open_sockets.JOBS)
def test_what_listens_is_in_the_table_and_a_stranger_gets_nothing(runner, tmp_path, job):
    running = open_sockets.start(job, runner)
    found = open_sockets.rows(job, running.sockets())
    assert found == [row for row in open_sockets.documented() if row.startswith(f"| {job} |")], "\n".join(found)
    if os.geteuid() == 0 and "tensor" not in job:
        told = _attack(running)
        assert told["through"] == []
        assert len(told["attempts"]) >= 12, told["attempts"]
        assert all(process.poll() is None for process in running.processes), "it was there all the time"
        assert not [secret for secret in _tokens(running) for value in told["seen"] if secret in value]
        print(job, json.dumps(told["attempts"]))
    (tmp_path / "hurry").touch()
    assert [runner.wait(process, 240) for process in running.processes] == [0] * len(running.processes)
    values = [float(value) for batch in read_predictions(tmp_path / "out") for value in batch[:, 0]]
    assert values == [2.0 * index for index in range(open_sockets.SAMPLES)]


@pytest.mark.root
@pytest.mark.timeout(400)
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2")
def test_a_stranger_on_another_host_gets_nothing(runner, tmp_path):
    name, ends = f"gpuorch-stranger-{os.getpid()}", [f"gps{os.getpid() % 100000}{side}" for side in "ab"]

    def ip(*arguments):
        return subprocess.run(("ip", *arguments), capture_output=True, text=True, timeout=20, check=False)

    made = ip("netns", "add", name)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    try:
        made = ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", name)
        assert made.returncode == 0, made.stderr
        assert ip("addr", "add", "10.79.0.1/24", "dev", ends[0]).returncode == 0
        assert ip("link", "set", ends[0], "up").returncode == 0
        assert ip("-n", name, "addr", "add", "10.79.0.2/24", "dev", ends[1]).returncode == 0
        assert ip("-n", name, "link", "set", ends[1], "up").returncode == 0
        running = open_sockets.start("two nodes", runner)
        told = _attack(running, around=("ip", "netns", "exec", name), address="10.79.0.1")
        assert told["through"] == []
        assert told["attempts"]["huge frame"] > 0
        print("another network namespace", json.dumps(told["attempts"]))
        (tmp_path / "hurry").touch()
        assert [runner.wait(process, 240) for process in running.processes] == [0, 0]
        values = [float(value) for batch in read_predictions(tmp_path / "out") for value in batch[:, 0]]
        assert values == [2.0 * index for index in range(open_sockets.SAMPLES)]
    finally:
        ip("link", "del", ends[0])
        ip("netns", "del", name)
