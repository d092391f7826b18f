"""Jobs of several nodes: two supervisors on this machine, or in two network namespaces joined by a cable that is cut."""

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from lightning_gpuorch import read_predictions
from lightning_gpuorch.control import handshake
from tests.conftest import free_port
from tests.support.certificates import make_authority, make_certificate
from tests.support.listener import listener

SLOW = "slow_predict.py"
SHORT_TERMS = {"GPUORCH_LEASE_TERM_SEC": "3", "GPUORCH_NODE_TIMEOUT_SEC": "30", "GPUORCH_TOKEN": "ours"}


def _start(
    runner, node, port, *arguments, devices=1, around=(), address="127.0.0.1", environment=None, script=SLOW, nodes="2"
):
    launcher = (
        *around, sys.executable, "-m", "lightning_gpuorch", "run", "--accelerator", "cpu", "--num-nodes", nodes,
        "--node-rank", str(node), "--main-address", address, "--main-port", str(port), "--devices", str(devices),
    )  # fmt: skip
    return runner.start(
        script, "--devices", devices, "--output", "out", *arguments,
        launcher=launcher, environment={**SHORT_TERMS, **(environment or {})},
    )  # fmt: skip


def _notes(tmp_path):
    path = tmp_path / "notes.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split() for line in lines if line.count(" ") == 3]


def _wait_until(condition, processes, what, timeout=90):
    deadline = time.monotonic() + timeout
    while not condition():
        assert all(process.poll() is None for process in processes), f"a node ended before {what}"
        assert time.monotonic() < deadline, f"no {what} within {timeout} s"
        time.sleep(0.02)


def _right(directory, samples):
    values = [float(value) for batch in read_predictions(directory) for value in batch[:, 0]]
    return values == [2.0 * index for index in range(samples)]


def test_a_node_of_another_version_does_not_join(runner):
    welcome = handshake.frame(handshake.Introduction(peer=handshake.COORDINATOR, protocol=7, release="7.0"))
    with listener(welcome, timeout_seconds=60) as address:
        node = _start(runner, 1, address.rpartition(":")[2])
        assert runner.wait(node, 60) == 78
    (line,) = [line for line in runner.log_of(node).splitlines() if "protocol 7" in line]
    assert f"coordinator 0 at {address} speaks control protocol 7 (lightning_gpuorch 7.0)" in line
    assert f"this process speaks {handshake.PROTOCOL_VERSION} (lightning_gpuorch" in line


@pytest.mark.parametrize("node", [0, 1])
def test_several_nodes_without_a_token_do_not_start(runner, node):
    process = _start(runner, node, free_port(), environment={"GPUORCH_TOKEN": ""})
    assert runner.wait(process, 60) == 78
    assert "set GPUORCH_TOKEN to the same secret on all nodes" in runner.log_of(process)


def test_a_node_with_another_token_does_not_join(runner):
    port = free_port()
    coordinator = _start(runner, 0, port)
    _wait_until(lambda: "waiting for all nodes" in runner.log_of(coordinator), (coordinator,), "wait")
    other = _start(runner, 1, port, environment={"GPUORCH_TOKEN": "guess"})
    assert runner.wait(other, 60) == 78
    assert "this process does not, says coordinator 0" in runner.log_of(other)
    assert "node 1 at 127.0.0.1" in runner.log_of(coordinator)
    coordinator.terminate()
    assert runner.wait(coordinator, 30) == 75


@pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made with openssl")
def test_nodes_share_a_job_over_tls_and_one_that_lacks_it_is_refused(runner, tmp_path):
    make_authority(tmp_path, "ca")
    tls = []
    for node in (0, 1):
        make_certificate(tmp_path, "ca", f"node{node}")
        names = {"CERTIFICATE": f"node{node}.pem", "KEY": f"node{node}.key", "CA": "ca.pem"}
        tls.append({f"GPUORCH_TLS_{name}": str(tmp_path / file) for name, file in names.items()})
    port = free_port()
    coordinator = _start(runner, 0, port, environment=tls[0])
    _wait_until(lambda: "waiting for all nodes" in runner.log_of(coordinator), (coordinator,), "wait")
    without = _start(runner, 1, port)
    assert runner.wait(without, 60) == 78
    assert "uses TLS, and this process does not. Set tls_certificate" in runner.log_of(without)
    assert "it begins without TLS" in runner.log_of(coordinator)
    other = _start(runner, 1, port, environment=tls[1])
    assert [runner.wait(node) for node in (coordinator, other)] == [0, 0], runner.log_of(other)
    assert _right(tmp_path / "out", 120)


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_node_that_waits_for_the_others(runner, node, number):
    process = _start(runner, node, free_port())
    _wait_until(lambda: "waiting for all nodes" in runner.log_of(process), (process,), "wait")
    process.send_signal(number)
    asked = time.monotonic()
    assert runner.wait(process, 30) == 75
    assert time.monotonic() - asked < 5
    assert "nothing has begun" in runner.log_of(process)


def test_nodes_of_different_size_share_a_job_and_each_restarts_its_own(runner, tmp_path):
    port = free_port()
    harm = ("--samples", 400, "--harm", "kill", "--victim", 2, "--at", 3)
    coordinator, other = _start(runner, 0, port, *harm), _start(runner, 1, port, *harm, devices=2)
    assert runner.wait(coordinator) == 0, runner.log_of(coordinator)
    assert runner.wait(other) == 0, runner.log_of(other)
    assert _right(tmp_path / "out", 400)
    assert {note[0] for note in _notes(tmp_path)} == {"0", "1", "2"}
    assert "restarting replica 2" in runner.log_of(other)
    assert "restarting" not in runner.log_of(coordinator), "the other node's supervisor deals with it"
    assert len(list(tmp_path.glob("out/runs/*/events/supervisor*.jsonl"))) == 2, "the records of both nodes are kept"


def test_a_lost_node_is_given_up_and_the_others_finish(runner, tmp_path):
    port = free_port()
    coordinator, other = _start(runner, 0, port, "--samples", 600), _start(runner, 1, port, "--samples", 600)
    _wait_until(lambda: any(note[0] == "1" for note in _notes(tmp_path)), (coordinator, other), "work on node 1")
    os.killpg(other.pid, signal.SIGKILL)
    assert runner.wait(coordinator) == 0, runner.log_of(coordinator)
    assert _right(tmp_path / "out", 600)
    assert "node 1 is given up" in runner.log_of(coordinator)


def test_a_second_supervisor_with_the_same_node_rank_is_refused_and_the_job_goes_on(runner, tmp_path):
    port = free_port()
    coordinator, other = _start(runner, 0, port, "--samples", 600), _start(runner, 1, port, "--samples", 600)
    _wait_until(lambda: any(note[0] == "1" for note in _notes(tmp_path)), (coordinator, other), "work on node 1")
    twin = _start(runner, 1, port, "--samples", 600)
    assert runner.wait(twin, 60) == 78
    assert "another supervisor has the place of node 1" in runner.log_of(twin)
    assert runner.log_of(coordinator).count("a second supervisor with --node-rank 1 is refused") == 1
    assert [runner.wait(node) for node in (coordinator, other)] == [0, 0]
    assert _right(tmp_path / "out", 600)
    assert len({note[1] for note in _notes(tmp_path)}) == 2, "the twin has started no worker"


def test_a_node_that_is_started_again_has_its_place_back(runner, tmp_path):
    port = free_port()
    work = ("--samples", 1600, "--step", 0.1)
    coordinator, other = _start(runner, 0, port, *work), _start(runner, 1, port, *work)

    def workers():
        return {note[1] for note in _notes(tmp_path) if note[0] == "1"}

    _wait_until(workers, (coordinator, other), "work on node 1")
    os.killpg(other.pid, signal.SIGKILL)
    before = workers()
    again = _start(runner, 1, port, *work)
    assert [runner.wait(node) for node in (coordinator, again)] == [0, 0], runner.log_of(again)
    assert "node 1 was started again, and has its place back" in runner.log_of(coordinator)
    assert len(workers() - before) == 1, "it has worked"
    assert _right(tmp_path / "out", 1600)


def test_a_node_that_comes_back_after_the_work_is_done_ends_as_the_job_does(runner, tmp_path):
    port = free_port()
    term = {"GPUORCH_LEASE_TERM_SEC": "10"}
    coordinator, other = (_start(runner, node, port, "--samples", 400, environment=term) for node in (0, 1))
    _wait_until(lambda: any(note[0] == "1" for note in _notes(tmp_path)), (coordinator, other), "work on node 1")
    os.killpg(other.pid, signal.SIGKILL)
    _wait_until(lambda: "node 1 is given up" in runner.log_of(coordinator), (coordinator,), "end without node 1")
    again = _start(runner, 1, port, "--samples", 400, environment=term)
    assert [runner.wait(node, 60) for node in (coordinator, again)] == [0, 0], runner.log_of(again)
    assert "the job goes on, or has ended, without this node" in runner.log_of(again)
    assert "node 1 comes back" in runner.log_of(coordinator)


def test_a_node_that_comes_when_all_others_are_gone_looks_whether_the_job_is_complete(runner, tmp_path):
    assert runner.run(SLOW, "--devices", 1, "--output", "out", "--samples", 40).code == 0
    late = {"GPUORCH_LATE_NODE_OUTPUT_DIR": str(tmp_path / "out"), "GPUORCH_START_TIMEOUT_SEC": "2"}
    late["GPUORCH_NODE_TIMEOUT_SEC"] = "2"
    node = _start(runner, 1, free_port(), environment=late)
    assert runner.wait(node, 60) == 0, runner.log_of(node)
    assert "the job has ended well" in runner.log_of(node)
    next((tmp_path / "out" / "dataloader_0").glob("part-*")).unlink()
    node = _start(runner, 1, free_port(), environment=late)
    assert runner.wait(node, 60) == 1
    assert "start all nodes again, the job goes on from there" in runner.log_of(node)


def test_after_a_restart_of_the_coordinator_the_other_nodes_end_at_once_and_may_join_again(runner, tmp_path):
    port = free_port()
    coordinator, other = _start(runner, 0, port, "--samples", 800), _start(runner, 1, port, "--samples", 800)
    _wait_until(lambda: len({note[0] for note in _notes(tmp_path)}) == 2, (coordinator, other), "work on both nodes")
    os.killpg(coordinator.pid, signal.SIGKILL)
    again = _start(runner, 0, port, "--samples", 800)
    assert runner.wait(other, 60) == 75, runner.log_of(other)
    assert "the coordinator was started again in between" in runner.log_of(other)
    assert "the coordinator was started again in between" in runner.log_of(again)
    other = _start(runner, 1, port, "--samples", 800)
    assert [runner.wait(node) for node in (again, other)] == [0, 0], runner.log_of(again)
    assert _right(tmp_path / "out", 800)


@pytest.mark.parametrize(("node", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_sigterm_on_node_0_and_sigint_on_any_drain_the_job(runner, tmp_path, node, number):
    port = free_port()
    nodes = [_start(runner, rank, port, "--samples", 600) for rank in (0, 1)]
    _wait_until(lambda: len({note[0] for note in _notes(tmp_path)}) == 2, nodes, "work on both nodes")
    nodes[node].send_signal(number)
    assert [runner.wait(process, 60) for process in nodes] == [75, 75]
    assert runner.run(SLOW, "--devices", 2, "--output", "out", "--samples", 600).result["right"]
    assert not _repeated(tmp_path)


def _repeated(tmp_path):
    return [batch for batch, count in collections.Counter(note[3] for note in _notes(tmp_path)).items() if count > 1]


def test_nodes_join_and_leave_and_come_back_while_the_job_goes_on(runner, tmp_path):
    port, work = free_port(), ("--samples", 12_000, "--hurry", "hurry")

    def start(node):
        return _start(runner, node, port, *work, nodes="1:3")

    def at_work(rank, since=0):
        return any(note[0] == str(rank) for note in _notes(tmp_path)[since:])

    first = start(0)
    _wait_until(lambda: at_work(0), (first,), "work on node 0, which does not wait for others")
    last = start(2)
    _wait_until(lambda: at_work(2), (first, last), "work on node 2")
    last.send_signal(signal.SIGTERM)
    assert runner.wait(last, 60) == 75, runner.log_of(last)
    assert "this node leaves the job" in runner.log_of(last)
    assert not _repeated(tmp_path), "what it held was finished or handed on"
    since = len(_notes(tmp_path))
    again, other = start(2), start(1)
    _wait_until(lambda: at_work(2, since) and at_work(1, since), (first, again, other), "work on nodes 1 and 2")
    os.killpg(other.pid, signal.SIGKILL)
    _wait_until(lambda: "node 1 is silent" in runner.log_of(first), (first, again), "lease term of node 1")
    (tmp_path / "hurry").touch()
    assert [runner.wait(node) for node in (first, again)] == [0, 0], runner.log_of(again)
    assert _right(tmp_path / "out", 12_000)
    for line in ("node 2 joins: 2 of 3", "node 2 has left; the others go on", "node 2 joins again"):
        assert line in runner.log_of(first)


def test_training_in_an_elastic_job_is_refused_while_nodes_are_missing(runner, tmp_path):
    node = _start(runner, 0, free_port(), "--result", tmp_path / "result.json", script="fit.py", nodes="1:2")
    assert runner.wait(node) == 78, runner.log_of(node)
    assert "1 of 2 nodes are there: start it with --num-nodes 2" in runner.log_of(node)


def test_training_restarts_on_all_nodes_together(runner, tmp_path):
    port, result = free_port(), tmp_path / "result.json"
    options = ("--dies-once", tmp_path / "died", "--result", result)
    nodes = [_start(runner, node, port, *options, script="fit.py") for node in (0, 1)]
    assert [runner.wait(node) for node in nodes] == [0, 0], "".join(map(runner.log_of, nodes))
    assert (tmp_path / "died").exists()
    assert "restarting replica" in "".join(map(runner.log_of, nodes))
    assert json.loads(result.read_text()) == {"weights_agree": True, "gradients_synced": True, "complete": True}


def test_a_replica_over_two_nodes_is_refused(runner):
    port = free_port()
    nodes = [_start(runner, node, port, "--tp", 2) for node in (0, 1)]
    assert [runner.wait(node, 60) for node in nodes] == [78, 78]
    assert "the ranks of a tensor-parallel group share a node" in "".join(map(runner.log_of, nodes))


@pytest.fixture
def cable():
    """Two network namespaces joined by a veth pair; yields their names and a function that cuts or mends it."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"gpuorch-{os.getpid()}-{side}" for side in "ab"]
    ends = [f"gpo{os.getpid() % 100000}{side}" for side in "ab"]

    def ip(*arguments):
        return subprocess.run(("ip", *arguments), capture_output=True, text=True, timeout=20)

    made = ip("netns", "add", names[0])
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    try:
        assert ip("netns", "add", names[1]).returncode == 0
        pair = ("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        assert ip(*pair).returncode == 0
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            assert ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end).returncode == 0
            for link in ("lo", end):
                assert ip("-n", name, "link", "set", link, "up").returncode == 0

        def set_cable(state):
            assert ip("-n", names[1], "link", "set", ends[1], state).returncode == 0

        yield names, set_cable
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.root
def test_a_short_cut_of_the_network_changes_nothing_and_a_long_one_loses_nothing(runner, tmp_path, cable):
    names, set_cable = cable
    port, samples = free_port(), 2400
    nodes = [
        _start(
            runner, node, port, "--samples", samples, address="10.77.0.1", around=("ip", "netns", "exec", names[node])
        )
        for node in (0, 1)
    ]  # fmt: skip

    def of_rank_1():
        return [note for note in _notes(tmp_path) if note[0] == "1"]

    def cut(seconds):
        set_cable("down")
        done = len(of_rank_1())
        time.sleep(seconds)  # the length of the cut is what is tested
        set_cable("up")
        # The chunk in hand and the one that was asked for: without the coordinator there are no more.
        assert len(of_rank_1()) - done <= 6
        mended = len(of_rank_1())
        _wait_until(lambda: len(of_rank_1()) > mended, nodes, "work on node 1 after the cut")

    _wait_until(lambda: len(of_rank_1()) > 5, nodes, "work on node 1")
    cut(1.5)
    assert "silent" not in runner.log_of(nodes[0]), "a cut shorter than the lease term is not noticed"
    cut(7)
    assert [runner.wait(node, 120) for node in nodes] == [0, 0], runner.log_of(nodes[1])
    assert _right(tmp_path / "out", samples)
    assert "node 1 is silent" in runner.log_of(nodes[0])
    assert "heartbeats from node 1 arrive again" in runner.log_of(nodes[0])
    assert len({note[1] for note in of_rank_1()}) == 1, "the worker behind the cut was not restarted"
    counts = collections.Counter(note[3] for note in _notes(tmp_path))
    assert sum(count - 1 for count in counts.values()) <= 4, "at most the chunk in hand was computed twice"
