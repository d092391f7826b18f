"""A job of some nodes or more: it begins with the fewest, others join, leave and come back, and collectives follow."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.messages.base import Request, Sender
from lightning_gpuorch.control.messages.collectives import Gather
from lightning_gpuorch.control.messages.nodes import EndRank, GetJobState, JoinNode, LeaveNode, RetireReplica
from lightning_gpuorch.control.messages.ranks import BeginStage, RegisterRank
from lightning_gpuorch.errors import ConfigurationError, NodeRankTakenError


class Job:
    """A coordinator of one to four nodes with two ranks each, whose clock goes on when it is told to."""

    def __init__(self, min_nodes: int = 1) -> None:
        self.now, self.min_nodes = 0.0, min_nodes
        self.coordinator = Coordinator(
            2, num_nodes=4, min_nodes=min_nodes, lease_term_seconds=30.0, node_timeout_seconds=300.0,
            clock=lambda: self.now,
        )  # fmt: skip

    def ask(self, request: Request[Any]) -> Future[Any]:
        return self.coordinator.handle(request)

    def join(self, node: int, supervisor: str = "", ranks: int = 2) -> Future[Any]:
        supervisor = supervisor or f"node {node}"
        return self.ask(
            JoinNode(
                node=node, supervisor=supervisor, ranks=ranks, min_nodes=self.min_nodes, max_nodes=4, run_id=supervisor
            )
        )

    def register(self, rank: int, generation: int = 0) -> Future[Any]:
        sender = Sender(rank=rank, replica=rank, generation=generation)
        return self.ask(RegisterRank(sender=sender, tensor_parallel_size=1))

    def gather(self, number: int, rank: int) -> Future[Any]:
        return self.ask(Gather(number=number, kind="barrier", rank=rank, payload=b"%d" % rank))

    def drain(self, node: int) -> None:
        for replica in (2 * node, 2 * node + 1):
            self.ask(RetireReplica(replica=replica)).result(0)
        ended = self.ask(LeaveNode(node=node, supervisor=f"node {node}", codes={}, drained=True))
        assert ended.result(0).exit_code == 75


def test_it_begins_with_the_fewest_nodes_and_ranks_do_not_depend_on_who_joins_when() -> None:
    job = Job(min_nodes=2)
    first, third = job.join(0), None
    assert not first.done()
    third = job.join(3)
    places = [answer.result(0) for answer in (first, third, job.join(1))]
    assert [place.first_rank for place in places] == [0, 6, 2]
    assert {place.world_size for place in places} == {8}
    assert not any(place.is_late for place in places)
    assert job.coordinator.nodes.others_present() == [3, 1]


def test_it_does_not_begin_without_node_0() -> None:
    job = Job(min_nodes=2)
    others = [job.join(1), job.join(2)]
    assert not any(answer.done() for answer in others)
    job.join(0)
    assert all(answer.done() for answer in others)


def test_nodes_of_another_size_are_refused_whoever_was_there_first() -> None:
    job = Job(min_nodes=2)
    early = job.join(1, ranks=3)
    job.join(0)
    with pytest.raises(ConfigurationError, match="node 1 has 3 ranks, node 0 has 2"):
        early.result(0)
    late = job.join(2, ranks=1)
    with pytest.raises(ConfigurationError, match="node 2 has 1 ranks, node 0 has 2"):
        late.result(0)
    assert job.join(1).result(0).first_rank == 2


def test_a_rank_that_joins_late_gets_what_was_decided_and_is_waited_for_from_then_on() -> None:
    job = Job()
    job.join(0)
    decided = [job.gather(0, rank) for rank in (0, 1)]
    assert decided[0].result(0).payloads == {0: b"0", 1: b"1"}
    job.join(2).result(0)
    assert [job.gather(1, rank).done() for rank in (0, 1)] == [False, True], "its ranks have not registered yet"
    job.register(4).result(0)
    assert job.gather(0, 4).result(0).payloads == {0: b"0", 1: b"1"}
    waiting = [job.gather(2, rank) for rank in (0, 1)]
    assert not any(answer.done() for answer in waiting)
    job.gather(1, 4).result(0)
    assert sorted(job.gather(2, 4).result(0).payloads) == [0, 1, 4]
    assert all(answer.done() for answer in waiting)


def test_a_drained_node_is_not_waited_for_and_may_come_back() -> None:
    job = Job()
    job.join(0)
    job.join(1).result(0)
    for rank in range(4):
        job.register(rank).result(0)
    waiting = [job.gather(0, rank) for rank in (0, 1)]
    job.drain(1)
    assert all(answer.done() for answer in waiting)
    assert (job.coordinator.nodes.others_present(), job.coordinator.nodes.drained()) == ([], [1])
    assert job.coordinator.nodes.check_terms() == []
    place = job.join(1, "again").result(0)
    assert (place.first_rank, place.generation, place.is_late) == (2, 1, False)
    assert job.join(1, "again").result(0) == place, "its answer may have been lost"
    assert job.coordinator.retired == frozenset()
    assert job.coordinator.nodes.others_present() == [1]
    with pytest.raises(NodeRankTakenError):  # the first supervisor has no place any more
        job.ask(GetJobState(node=1, supervisor="node 1")).result(0)


def test_a_node_that_was_given_up_may_come_back() -> None:
    job = Job()
    job.join(0)
    job.join(1).result(0)
    for rank in range(4):
        job.register(rank).result(0)
    job.now = 301
    assert job.coordinator.nodes.check_terms() == [1]
    assert job.join(1, "again").result(0).generation == 1
    assert job.join(1, "again").result(0).generation == 1, "its answer may have been lost"
    assert job.coordinator.nodes.lost_ranks() == []


@pytest.mark.parametrize("how", ["script", "conclusion"])
def test_nobody_joins_a_job_that_ends(how: str) -> None:
    job = Job()
    job.join(0)
    job.join(1).result(0)
    if how == "script":
        job.ask(EndRank(rank=0, why="has ended")).result(0)
    else:
        job.coordinator.nodes.conclude(0)
    place = job.join(2).result(0)
    assert place.is_late
    assert job.join(2).result(0).is_late, "also when it asks again"
    ended = job.ask(LeaveNode(node=2, supervisor="node 2", codes={}))
    job.coordinator.nodes.conclude(0)
    assert ended.result(0).exit_code == 0
    assert 2 not in job.coordinator.nodes.others_present()


@pytest.mark.parametrize("gang", [True, False])
def test_training_and_evaluation_need_all_nodes_and_then_nobody_joins(gang: bool) -> None:
    job = Job()
    job.join(0)
    stage = BeginStage(sender=Sender(rank=0, replica=0, generation=0), gang=gang, every_replica=True)
    with pytest.raises(ConfigurationError, match="1 of 4 nodes are there: start it with --num-nodes 4"):
        job.ask(stage).result(0)
    for node in (1, 2, 3):
        job.join(node).result(0)
    job.ask(stage).result(0)
    job.drain(3)
    assert job.join(3, "again").result(0).is_late
