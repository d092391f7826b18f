"""Jobs on a Ray cluster whose nodes are all on this machine; they come, are lost, and the first one is lost as well."""

from __future__ import annotations

import signal
import sys
import time

import psutil
import pytest

from lightning_gpuorch import read_predictions

pytestmark = pytest.mark.timeout(300)
pytest.importorskip("ray", reason="Ray is not installed")
SAMPLES = 6_000


@pytest.fixture(scope="module")
def cluster():
    """Three nodes, of which the head takes part in nothing; Ray looks often whether they are there."""
    from ray.cluster_utils import Cluster

    look = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    running = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": look}
    )
    for _ in range(2):
        running.add_node(num_cpus=1, wait=False)
    yield running
    running.shutdown()


def _start(runner, cluster, *arguments, nodes="1:3", options=()):
    launcher = (
        sys.executable, "-m", "lightning_gpuorch", "run", "--cluster", "ray", "--address", cluster.address, "--num-nodes",
        nodes, "--accelerator", "cpu", *options,
    )  # fmt: skip
    terms = {"GPUORCH_LEASE_TERM_SEC": "3", "GPUORCH_NODE_TIMEOUT_SEC": "30"}
    return runner.start(
        "slow_predict.py", "--output", "out", "--step", 0.2, *arguments, launcher=launcher, environment=terms
    )


def _wait_until(condition, process, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the driver ended before {what}"
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.05)


def _workers(tmp_path):
    """Process of every rank that has worked."""
    path = tmp_path / "notes.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return {(int(rank), int(pid)) for rank, pid, *_ in (line.split() for line in lines if line.count(" ") == 3)}


def _raylet_of(pid):
    """The process of Ray that plays the node which a worker is on."""
    return next(parent.pid for parent in psutil.Process(pid).parents() if parent.name() == "raylet")


def _node_of(cluster, pid):
    """The node which a worker is on."""
    raylet = _raylet_of(pid)
    return next(
        node for node in cluster.worker_nodes if any(p.process.pid == raylet for p in node.all_processes["raylet"])
    )


def _values(directory):
    return [float(value) for batch in read_predictions(directory) for value in batch[:, 0]]


def test_a_signal_to_the_driver_stops_the_job_in_good_order(runner, cluster, tmp_path):
    driver = _start(runner, cluster, "--samples", SAMPLES, nodes="2")
    _wait_until(lambda: {rank for rank, _ in _workers(tmp_path)} == {0, 1}, driver, "work on both nodes")
    driver.send_signal(signal.SIGTERM)
    assert runner.wait(driver, 60) == 75
    log = runner.log_of(driver)
    assert "SIGTERM: finishing the chunks in hand" in log
    assert "node 0 ends with exit code 75" in log
    assert "node 1 ends with exit code 75" in log
    assert not [pid for _, pid in _workers(tmp_path) if psutil.pid_exists(pid)]
    notes = (tmp_path / "notes.txt").read_text().splitlines()
    done = [line.split()[3] for line in notes]
    assert len(done) == len(set(done)), "no batch is computed twice"


def test_nodes_are_lost_and_added_and_the_first_one_is_lost_as_well(runner, cluster, tmp_path):
    driver = _start(runner, cluster, "--samples", SAMPLES, "--hurry", "hurry")

    def at_work(rank, since=frozenset()):
        return [pid for other, pid in _workers(tmp_path) - since if other == rank]

    _wait_until(lambda: at_work(0) and at_work(1), driver, "work on two nodes")
    before = frozenset(_workers(tmp_path))
    (second,) = at_work(1)
    cluster.remove_node(_node_of(cluster, second), allow_graceful=False)
    cluster.add_node(num_cpus=1, wait=False)
    _wait_until(lambda: at_work(1, before), driver, "work on the node that was added")
    assert not psutil.pid_exists(second), "a lost node computes nothing"
    before = frozenset(_workers(tmp_path))
    (first,) = at_work(0)
    cluster.remove_node(_node_of(cluster, first), allow_graceful=False)
    _wait_until(lambda: at_work(0, before), driver, "new start on the node that is left")
    (tmp_path / "hurry").touch()
    assert runner.wait(driver) == 0
    log = runner.log_of(driver)
    assert "node 0 is lost; the job starts again on the nodes that are left" in log
    assert "node 1 joins" in log
    assert _values(tmp_path / "out") == [2.0 * index for index in range(SAMPLES)]
