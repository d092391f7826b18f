"""Who has a node's place in a job: the first supervisor that asks, until it is silent for a lease term."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.messages.base import Request, Sender
from lightning_gpuorch.control.messages.nodes import EndGeneration, GetJobState, JoinNode, LeaveNode
from lightning_gpuorch.control.messages.ranks import BeginStage, RegisterRank
from lightning_gpuorch.errors import ConfigurationError, ControlPlaneError, ControlPlaneTimeoutError, NodeRankTakenError


class Job:
    """A coordinator of two nodes, whose clock goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.coordinator = Coordinator(
            1, num_nodes=2, lease_term_seconds=30.0, node_timeout_seconds=300.0, clock=lambda: self.now
        )

    def ask(self, request: Request[Any]) -> Future[Any]:
        return self.coordinator.handle(request)

    def join(self, node: int, supervisor: str, ranks: int = 2) -> Future[Any]:
        return self.ask(
            JoinNode(
                node=node, supervisor=supervisor, ranks=ranks, min_nodes=2, max_nodes=2, run_id=f"run-{supervisor}"
            )
        )

    def state(self, node: int, supervisor: str) -> Future[Any]:
        return self.ask(GetJobState(node=node, supervisor=supervisor))


@pytest.fixture
def job() -> Job:
    """A job of which node 0 has joined."""
    job = Job()
    job.join(0, "zero")
    return job


def test_who_asks_again_has_its_place_once(job: Job) -> None:
    first = job.join(1, "one")
    again = job.join(1, "one")
    assert isinstance(first.exception(0), type(None))
    assert again.result(0) == first.result(0)
    assert (again.result(0).first_rank, again.result(0).generation, again.result(0).run_id) == (2, 0, "run-zero")


def test_a_second_supervisor_is_refused_as_soon_as_the_first_is_heard_of(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    job.join(1, "one")
    twin = job.join(1, "twin")
    assert not twin.done()
    job.now = 5
    job.state(1, "one").result(0)
    with pytest.raises(NodeRankTakenError, match="the place of node 1") as error:
        twin.result(0)
    assert error.value.exit_code == 78
    assert "a second supervisor with --node-rank 1 is refused" in caplog.text
    with pytest.raises(NodeRankTakenError):
        job.state(1, "twin").result(0)


def test_a_second_supervisor_is_refused_while_the_first_one_waits_for_others() -> None:
    job = Job()
    waiting = job.join(1, "one")
    twin, third = job.join(1, "twin"), job.join(1, "third")
    with pytest.raises(NodeRankTakenError):
        third.result(0)
    job.now = 5
    again = job.join(1, "one")
    with pytest.raises(NodeRankTakenError):
        twin.result(0)
    with pytest.raises(ControlPlaneTimeoutError):  # whom nobody waits for
        waiting.result(0)
    job.join(0, "zero")
    assert again.result(0).first_rank == 2


def test_a_node_that_was_started_again_has_its_place_when_the_first_supervisor_is_silent(job: Job) -> None:
    job.join(1, "one").result(0)
    sender = Sender(rank=2, replica=2, generation=3)
    job.ask(RegisterRank(sender=sender, tensor_parallel_size=1)).result(0)
    job.ask(EndGeneration(replica=3, generation=4, blamed={}, positions={})).result(0)
    job.now = 10
    assert not job.join(1, "again").done()
    job.now = 31
    place = job.join(1, "again").result(0)
    assert (place.first_rank, place.generation, place.is_late) == (2, 5, False)
    assert not job.state(1, "again").result(0).lost
    with pytest.raises(NodeRankTakenError):  # of whom it was, should it be there after all
        job.state(1, "one").result(0)


def test_a_node_that_comes_back_in_training_restarts_all_ranks(job: Job) -> None:
    job.join(1, "one").result(0)
    job.ask(BeginStage(sender=Sender(rank=0, replica=0, generation=0), gang=True, every_replica=True)).result(0)
    job.now = 31
    assert job.join(1, "again").result(0).generation == 1
    assert job.state(0, "zero").result(0).gang_generation == 1


def test_a_node_that_was_given_up_waits_for_the_end_and_has_the_exit_code_of_the_job(job: Job) -> None:
    job.join(1, "one").result(0)
    job.now = 301
    assert job.coordinator.nodes.check_terms() == [1]
    assert job.coordinator.nodes.absent() == [1]
    place = job.join(1, "again").result(0)
    assert place.is_late
    assert job.coordinator.nodes.absent() == []
    ended = job.ask(LeaveNode(node=1, supervisor="again", codes={}))
    assert not ended.done()
    job.coordinator.nodes.conclude(0)
    assert ended.result(0).exit_code == 0
    assert job.ask(LeaveNode(node=1, supervisor="again", codes={})).result(0).exit_code == 0


def test_a_node_that_comes_back_after_its_work_does_not_change_how_its_ranks_ended(job: Job) -> None:
    job.join(1, "one").result(0)
    job.ask(LeaveNode(node=1, supervisor="one", codes={2: 0, 3: 0}))
    job.now = 31
    assert job.join(1, "again").result(0).is_late
    ended = job.ask(LeaveNode(node=1, supervisor="again", codes={}))
    assert job.coordinator.nodes.codes() == {2: 0, 3: 0}
    job.coordinator.nodes.conclude(0)
    assert ended.result(0).exit_code == 0


def test_a_second_supervisor_is_refused_while_the_first_one_waits_for_the_end(job: Job) -> None:
    job.join(1, "one").result(0)
    job.ask(LeaveNode(node=1, supervisor="one", codes={2: 0, 3: 0}))
    twin = job.join(1, "twin")
    waiting = job.ask(LeaveNode(node=1, supervisor="one", codes={2: 0, 3: 0}))
    with pytest.raises(NodeRankTakenError):
        twin.result(0)
    job.coordinator.nodes.conclude(0)
    assert waiting.result(0).exit_code == 0


def test_nobody_takes_the_place_of_the_coordinators_own_node(job: Job) -> None:
    with pytest.raises(NodeRankTakenError):
        job.join(0, "other").result(0)


def test_a_node_of_another_size_is_no_node_of_this_job(job: Job) -> None:
    job.join(1, "one").result(0)
    with pytest.raises(ConfigurationError, match="Two nodes with the same --node-rank"):
        job.join(1, "twin", ranks=3).result(0)
    with pytest.raises(ConfigurationError, match="outside a job of 2 nodes"):
        job.join(2, "two").result(0)


def test_who_has_not_joined_learns_nothing() -> None:
    with pytest.raises(ControlPlaneError, match="node 1 has not joined"):
        Job().state(1, "one").result(0)
