"""Places of nodes in a job: which supervisor has which, when the job begins, and which nodes join or come back later.

A place belongs to the supervisor that has asked for it first, told by a random name. Another one with the same node rank is
refused while heartbeats of the first arrive, and takes the node rank after a lease term without one: a restarted node.

An elastic job (``min_nodes < max_nodes``) begins when ``min_nodes`` have joined, node 0 among them. Its world size is that of
``max_nodes``, and node ``n`` has the same ranks whenever it joins; ranks of nodes that are not there take part in nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from lightning_gpuorch.control.job_control import JobControl
from lightning_gpuorch.control.messages.nodes import JoinNode, NodeJoined
from lightning_gpuorch.control.pending import answered, failed, pending
from lightning_gpuorch.errors import ConfigurationError, ControlPlaneTimeoutError, NodeRankTakenError

log = logging.getLogger(__name__)


@dataclass
class _Successor:
    """Another supervisor that asks for a node's place."""

    request: JoinNode
    answer: Future[NodeJoined]


@dataclass
class Place:
    """A node's place, and the supervisor that has it.

    Attributes:
        supervisor: Its random name.
        num_ranks: Ranks of the node.
        heard: When its last heartbeat has arrived.
        ranks: Global ranks; none while the node is not admitted.
        expired: Its leases went back for want of heartbeats.
        lost: It was given up.
        drained: It has left, and its replicas with it; the job goes on.
        is_late: The supervisor only waits for the end of the job.
        generation: First generation of its replicas under this supervisor, which a repeated request is told again.
        codes: Exit codes by rank, when all have ended.
    """

    supervisor: str
    num_ranks: int
    heard: float
    ranks: list[int] = field(default_factory=list)
    expired: bool = False
    lost: bool = False
    drained: bool = False
    is_late: bool = False
    generation: int = 0
    codes: dict[int, int] | None = None
    joining: Future[NodeJoined] | None = None
    successor: _Successor | None = None

    @property
    def is_present(self) -> bool:
        """Whether its ranks may still work."""
        return bool(self.ranks) and self.codes is None and not (self.lost or self.drained)


class NodePlaces:
    """The places of all nodes. Not thread-safe: the registry has a lock.

    Args:
        coordinator: The coordinator.
        min_nodes: Supervisors with which the job begins.
        max_nodes: Places.
        lease_term_seconds: Silence after which another supervisor may take a place.
        begin_again: Ends what a node's ranks had, and returns the generation in which they begin.
        clock: The time.

    Attributes:
        by_rank: Place by node rank.
        has_begun: Whether the job has begun.
    """

    def __init__(
        self,
        coordinator: JobControl,
        min_nodes: int,
        max_nodes: int,
        lease_term_seconds: float,
        begin_again: Callable[[Place], int],
        clock: Callable[[], float],
    ):
        self.min_nodes, self.max_nodes = min_nodes, max_nodes
        self.by_rank: dict[int, Place] = {}
        self.has_begun = False
        self.concluded = False
        """The exit code of the job is known."""
        self._coordinator, self._begin_again, self._clock = coordinator, begin_again, clock
        self._lease_term_seconds = lease_term_seconds
        self._run_id = ""

    @property
    def is_elastic(self) -> bool:
        """Whether the job begins without all of its nodes."""
        return self.min_nodes < self.max_nodes

    @property
    def missing(self) -> list[int]:
        """Nodes that have not joined."""
        return [number for number in range(self.max_nodes) if number not in self.by_rank]

    def holder(self, number: int, supervisor: str) -> Place | None:
        """The place of a node that has joined.

        Raises:
            NodeRankTakenError: Another supervisor has it.
        """
        place = self.by_rank.get(number)
        if place is not None and place.supervisor != supervisor:
            raise _taken(number)
        return place

    def join(self, request: JoinNode) -> Future[NodeJoined]:
        """Take part; answered when the job begins, or at once if it has. A repeated request is the same request.

        Raises:
            ConfigurationError: The node is not as the coordinator expects it.
        """
        number = request.node
        if not 0 <= number < self.max_nodes:
            raise ConfigurationError(f"node {number} is outside a job of {self.max_nodes} nodes.")
        place = self.by_rank.get(number) or Place(request.supervisor, request.ranks, self._clock())
        self._check(request, place)
        self.by_rank[number] = place
        if place.supervisor != request.supervisor:
            return self._succeed(number, place, request)
        self.record_heartbeat(number, place)
        if number == 0:
            self._run_id = request.run_id
        answer = self._await_admission(place)
        if self.is_elastic and 0 in self.by_rank:
            self._refuse_other_sizes(self.by_rank[0].num_ranks)
        if self.has_begun and number in self.by_rank:
            self._admit_later(number, place)
        elif len(self.by_rank) >= self.min_nodes and 0 in self.by_rank:
            self._begin()
        return answer

    def record_heartbeat(self, number: int, place: Place) -> None:
        """A heartbeat of the supervisor that holds a node rank: other requests for this node rank are refused."""
        place.heard = self._clock()
        if place.successor is not None:
            log.error("a second supervisor with --node-rank %d is refused: the first one is alive", number)
            place.successor.answer.set_exception(_taken(number))
            place.successor = None

    def _check(self, request: JoinNode, place: Place) -> None:
        expected = (place.num_ranks, self.min_nodes, self.max_nodes)
        if (request.ranks, request.min_nodes, request.max_nodes) != expected:
            raise ConfigurationError(
                f"node {request.node} joins with {request.ranks} ranks and --num-nodes "
                f"{describe_nodes(request.min_nodes, request.max_nodes)}; the coordinator knows {place.num_ranks} and "
                f"{describe_nodes(self.min_nodes, self.max_nodes)}. Two nodes with the same --node-rank?"
            )

    def _await_admission(self, place: Place) -> Future[NodeJoined]:
        if place.joining is not None and not place.joining.done():  # its request has been superseded
            place.joining.set_exception(ControlPlaneTimeoutError("the request was made again"))
        place.joining = pending()
        return place.joining

    def _refuse_other_sizes(self, num_ranks: int) -> None:
        nodes = describe_nodes(self.min_nodes, self.max_nodes)
        for number, place in [(n, p) for n, p in self.by_rank.items() if p.num_ranks != num_ranks]:
            del self.by_rank[number]
            assert place.joining is not None
            place.joining.set_exception(
                ConfigurationError(
                    f"node {number} has {place.num_ranks} ranks, node 0 has {num_ranks}: where nodes come and go "
                    f"(--num-nodes {nodes}), all have the same number, so that each knows its ranks before all are there."
                )
            )

    def _begin(self) -> None:
        """The nodes that are there have their ranks, and begin."""
        self.has_begun, first = True, 0
        for number in sorted(self.by_rank):
            place = self.by_rank[number]
            self._assign(place, number * place.num_ranks if self.is_elastic else first)
            first += place.num_ranks
        world_size = self.max_nodes * self.by_rank[0].num_ranks if self.is_elastic else first
        self._coordinator.set_world(world_size, (rank for place in self.by_rank.values() for rank in place.ranks))
        for place in self.by_rank.values():
            _admit(place, self._answer(place))

    def _assign(self, place: Place, first_rank: int) -> None:
        place.ranks, place.heard = list(range(first_rank, first_rank + place.num_ranks)), self._clock()

    def _admit_later(self, number: int, place: Place) -> None:
        """The job has begun: a node that asks again, or one that is new."""
        if place.ranks or place.is_late:
            _admit(place, self._answer(place))
        elif self._is_closed:
            place.is_late = True
            log.info("node %d comes too late to take part; it is told how the job ends", number)
            _admit(place, self._answer(place))
        else:
            self._assign(place, number * place.num_ranks)
            log.info("node %d joins: %d of %d nodes work", number, self._num_present, self.max_nodes)
            _admit(place, self._answer(place))

    @property
    def _is_closed(self) -> bool:
        """Whether nobody can join any more."""
        return self.concluded or self._coordinator.is_closed

    @property
    def _num_present(self) -> int:
        return sum(place.is_present for place in self.by_rank.values())

    def _answer(self, place: Place) -> NodeJoined:
        return NodeJoined(
            first_rank=place.ranks[0] if place.ranks else 0, world_size=self._coordinator.world_size, run_id=self._run_id,
            generation=place.generation, is_late=place.is_late,
        )  # fmt: skip

    def _succeed(self, number: int, place: Place, request: JoinNode) -> Future[NodeJoined]:
        """Another supervisor asks for a place: give it away if nothing can come of the one that has it."""
        now = self._clock()
        asked_before = place.successor
        if number == 0 or (asked_before is not None and asked_before.request.supervisor != request.supervisor):
            return failed(_taken(number))
        silent = now - place.heard > self._lease_term_seconds
        has_left = place.drained or (place.lost and self.is_elastic)
        if has_left and not self._is_closed:
            place.supervisor, place.heard = request.supervisor, now
            place.expired = place.lost = place.drained = False
            log.info("node %d joins again: %d of %d nodes work", number, self._num_present, self.max_nodes)
            place.generation = self._begin_again(place)
            return answered(self._answer(place))
        if has_left or place.lost or place.is_late or (silent and place.codes is not None):
            place.supervisor, place.is_late = request.supervisor, True
            log.info("node %d comes back; the job goes on without it, and tells it how it ends", number)
            return answered(self._answer(place))
        if silent:
            place.supervisor, place.heard, place.expired, place.successor = request.supervisor, now, False, None
            log.warning("node %d was started again, and has its place back", number)
            if not self.has_begun:
                return self._await_admission(place)
            place.generation = self._begin_again(place)
            return answered(self._answer(place))
        answer: Future[NodeJoined] = pending()
        if asked_before is None:
            log.info(
                "another supervisor asks for the place of node %d; it has it once the first one is silent for %g s",
                number, self._lease_term_seconds,
            )  # fmt: skip
        else:
            asked_before.answer.set_exception(ControlPlaneTimeoutError("the request was made again"))
        place.successor = _Successor(request, answer)
        return answer


def describe_nodes(min_nodes: int, max_nodes: int) -> str:
    """How ``--num-nodes`` says it."""
    return str(max_nodes) if min_nodes == max_nodes else f"{min_nodes}:{max_nodes}"


def _admit(place: Place, answer: NodeJoined) -> None:
    if place.joining is not None and not place.joining.done():
        place.joining.set_result(answer)


def _taken(number: int) -> NodeRankTakenError:
    return NodeRankTakenError(
        f"another supervisor has the place of node {number} in this job: give each node a --node-rank of its own, and start "
        "none twice."
    )
