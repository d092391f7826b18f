"""What happens to the ranks of a node that share a fate, with real processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.control.client import NodePlace
from lightning_gpuorch.control.environment import GENERATION
from lightning_gpuorch.supervisor.failure_handler import FailureHandler
from lightning_gpuorch.supervisor.job_drain import JobDrain
from lightning_gpuorch.supervisor.node import Node
from lightning_gpuorch.supervisor.node_drain import NodeDrain
from lightning_gpuorch.supervisor.rendezvous import Rendezvous
from lightning_gpuorch.supervisor.replica import ReplicaState

WAITS = "import sys; sys.stdin.read()"


class _Spawner:
    """Every worker waits for the end of its input; what each was started with is kept."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.started: list[tuple[int, int]] = []

    def prepare(self) -> None: ...

    def close(self) -> None: ...

    def can_spawn(self) -> bool:
        return True

    def spawn(self, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        self.started.append((int(environment["RANK"]), int(environment[GENERATION])))
        self.processes.append(
            subprocess.Popen([sys.executable, "-c", WAITS], stdin=subprocess.PIPE, start_new_session=True)
        )
        return self.processes[-1]


def _record(kind: str, **fields: object) -> None:
    """Nobody reads the events here."""


@pytest.fixture
def spawner() -> Iterator[_Spawner]:
    spawner = _Spawner()
    yield spawner
    for process in spawner.processes:
        process.kill()
        process.communicate(timeout=10)


@pytest.fixture
def tensor_parallel_size() -> int | None:
    """Unknown, unless a test says so."""
    return None


@pytest.fixture
def node(tmp_path: Path, spawner: _Spawner, tensor_parallel_size: int | None) -> Iterator[Node]:
    config, place = OrchestratorConfig(), NodePlace()
    rendezvous = Rendezvous(config, place, 3, "test-of-a-node", tmp_path, tensor_parallel_size, _record)
    rendezvous.join()
    node = Node(config, rendezvous, spawner, 3, None, tmp_path, {}, _record)
    yield node
    node.workers.kill(list(node.workers))
    node.pending_starts.cancel()
    node.hang_detector.close()
    rendezvous.stop_watching()
    rendezvous.close()


def _start(node: Node) -> None:
    for pending in node.pending_starts.ready():
        assert not node.start(pending)


def _handler(node):
    node_drain = NodeDrain(node)
    return FailureHandler(node, JobDrain(node, node_drain), node_drain)


def test_a_gang_that_restarts_while_its_devices_are_checked_starts_once(node: Node, spawner: _Spawner):
    node.begin_all()
    node.restart_gang(1)
    _start(node)
    assert spawner.started == [(0, 1), (1, 1), (2, 1)]
    assert len(node.workers) == 3


@pytest.mark.parametrize("tensor_parallel_size", [3])
@pytest.mark.parametrize("codes", [{0: 0}, {0: 0, 2: 0}, {0: 65}])
def test_a_rank_that_dies_after_others_of_its_replica_have_ended_restarts_all_of_it(
    node: Node, spawner: _Spawner, codes: dict[int, int]
):
    handler = _handler(node)
    node.begin_all()
    _start(node)
    for rank, code in codes.items():
        node.replicas.end([rank], code)
        node.workers.kill([rank])
    spawner.processes[1].kill()
    spawner.processes[1].wait(timeout=10)
    for worker, code in node.workers.ended():
        handler.on_exit(worker, code)
    _start(node)
    assert spawner.started[3:] == [(0, 1), (1, 1), (2, 1)]
    assert not node.replicas.exit_codes


def test_all_ranks_that_end_with_a_dead_one_have_an_exit_code(node: Node, spawner: _Spawner):
    handler = _handler(node)
    node.begin_all()
    _start(node)
    node.replicas.end([0], 0)
    node.workers.kill([0])
    spawner.processes[1].kill()
    spawner.processes[1].wait(timeout=10)
    for worker, code in node.workers.ended():
        handler.on_exit(worker, code)
    assert node.replicas.exit_codes == {0: 0, 1: 1, 2: 1}
    assert {replica.state for replica in node.replicas} == {ReplicaState.DONE}
    assert not node.workers
    assert len(spawner.started) == 3


def test_a_dead_rank_takes_all_that_share_its_fate_to_the_next_generation(node: Node, spawner: _Spawner):
    handler = _handler(node)
    node.begin_all()
    _start(node)
    spawner.processes[1].kill()
    spawner.processes[1].wait(timeout=10)
    for worker, code in node.workers.ended():
        handler.on_exit(worker, code)
    _start(node)
    assert spawner.started[3:] == [(0, 1), (1, 1), (2, 1)]
    assert node.restarts == 1


def test_nothing_is_started_of_what_was_ended_while_its_devices_are_checked(node: Node, spawner: _Spawner):
    node.begin_all()
    node.end_all(75)
    _start(node)
    assert not spawner.started
    assert node.replicas.exit_codes == dict.fromkeys(range(3), 75)
