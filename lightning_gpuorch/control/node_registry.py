"""The coordinator's side of the supervisors: which nodes take part, whose heartbeats arrive, what is to be done everywhere.

Every node has a supervisor, which alone decides about its own workers. It asks the coordinator for what concerns the whole
job, and reports what ended. A node without a heartbeat for a lease term loses its leases, in case its work will never
come; it may come back. After ``node_timeout_seconds`` it is given up, and its ranks are no longer waited for.

A place belongs to the supervisor that has asked for it first, told by a random name. Another one with the same node rank is
refused while heartbeats of the first arrive, and takes the node rank after a lease term without one: a restarted node.

A supervisor on the coordinator's own node uses the same requests, without a socket.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from lightning_gpuorch.control.messages.nodes import (
    AbortJob,
    DeviceVerdict,
    GangRestarted,
    GetJobState,
    JobEnded,
    JobState,
    JoinNode,
    LeaveNode,
    NodeJoined,
    RestartGang,
)
from lightning_gpuorch.control.messages.ranks import ReportDevice
from lightning_gpuorch.control.pending import answered, failed, pending, resolve
from lightning_gpuorch.errors import ConfigurationError, ControlPlaneError, ControlPlaneTimeoutError, NodeRankTakenError
from lightning_gpuorch.paths import Location

log = logging.getLogger(__name__)


@dataclass
class _Successor:
    """Another supervisor that asks for a node's place."""

    request: JoinNode
    answer: Future[NodeJoined]


@dataclass
class _Node:
    """A node's place, and the supervisor that has it."""

    supervisor: str
    num_ranks: int
    heard: float
    ranks: list[int] = field(default_factory=list)
    joining: Future[NodeJoined] | None = None
    expired: bool = False
    lost: bool = False
    returned: bool = False
    codes: dict[int, int] | None = None
    successor: _Successor | None = None


class JobControl(Protocol):
    """What the registry needs of the :class:`~lightning_gpuorch.control.coordinator.Coordinator`."""

    gang: bool

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        ...

    @property
    def tensor_parallel_size(self) -> int | None:
        """Ranks per replica, once it is known."""
        ...

    @property
    def progress_by_replica(self) -> dict[int, int]:
        """Chunks made durable."""
        ...

    @property
    def jobs(self) -> Mapping[int, object]:
        """The predict calls that were opened."""
        ...

    @property
    def needs_every_replica(self) -> bool:
        """Whether the share of a rank cannot be taken over."""
        ...

    @property
    def draining(self) -> bool:
        """Whether no more work is handed out."""
        ...

    @property
    def finished(self) -> bool:
        """Whether every opened predict call is complete."""
        ...

    @property
    def kept_directory(self) -> Location | None:
        """Where results are that somebody wants to keep."""
        ...

    def set_world_size(self, world_size: int) -> None:
        """All nodes have joined."""
        ...

    def next_generation(self, replica: int) -> int:
        """A generation of a replica that is newer than all that were started."""
        ...

    def expire_leases(self, replica: int) -> int:
        """Take back the leases of a silent replica; returns how many chunks went back."""
        ...

    def open_ranks(self, ranks: Iterable[int]) -> dict[int, bool]:
        """Ranks that have opened a predict call and not closed it."""
        ...

    def end_generation(self, replica: int, generation: int) -> int:
        """Take back the leases of a generation that is over."""
        ...

    def retire(self, replica: int) -> None:
        """Give a replica up."""
        ...


class NodeRegistry:
    """The coordinator's side.

    Args:
        coordinator: The coordinator.
        num_nodes: Supervisors that will join.
        lease_term_seconds: Silence after which a node's leases go back.
        node_timeout_seconds: Silence after which a node is given up.
        clock: The time; replaced by tests.
    """

    def __init__(
        self,
        coordinator: JobControl,
        num_nodes: int = 1,
        lease_term_seconds: float = 30.0,
        node_timeout_seconds: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._coordinator, self.num_nodes, self._clock = coordinator, num_nodes, clock
        self._lease_term_seconds, self._node_timeout_seconds = lease_term_seconds, node_timeout_seconds
        self._nodes: dict[int, _Node] = {}
        self._all_admitted = False
        self._leaving: list[Future[JobEnded]] = []
        self._verdicts: dict[int, DeviceVerdict] = {}
        self._conclusion: int | None = None
        self._run_id = ""
        self.gang_generation = 0
        self.abort_code: int | None = None
        self._lock = threading.RLock()

    @property
    def routes(self) -> Mapping[type, Any]:
        """What is answered here."""
        return {
            JoinNode: self.join,
            GetJobState: self.state,
            AbortJob: lambda request: self.abort(request.code),
            RestartGang: lambda request: self.restart_gang(request.generation),
            LeaveNode: self.leave,
            ReportDevice: self.report_device,
        }

    # What the coordinator's own supervisor does

    @property
    def missing(self) -> list[int]:
        """Nodes that have not joined."""
        return [node for node in range(self.num_nodes) if node not in self._nodes]

    def absent(self) -> list[int]:
        """Nodes that were given up and have not come back."""
        with self._lock:
            return [n for n, node in self._nodes.items() if node.lost and not node.returned]

    def others_present(self) -> list[int]:
        """Nodes other than the coordinator's that have neither left nor been given up."""
        with self._lock:
            return [n for n, node in self._nodes.items() if n and node.codes is None and not node.lost]

    def codes(self) -> dict[int, int]:
        """Exit codes by rank of the nodes that have left."""
        with self._lock:
            return {rank: code for node in self._nodes.values() for rank, code in (node.codes or {}).items()}

    def lost_ranks(self) -> list[int]:
        """Ranks of nodes that were given up."""
        with self._lock:
            return [rank for node in self._nodes.values() if node.lost for rank in node.ranks]

    def check_terms(self) -> list[int]:
        """Take back the leases of silent nodes, and give up those that are silent for too long.

        Returns:
            Nodes that were given up by this call.
        """
        given_up = []
        with self._lock:
            now = self._clock()
            for number, node in self._nodes.items() if self._all_admitted else ():
                if number == 0 or node.codes is not None or node.lost:
                    continue
                silent = now - node.heard
                if silent > self._lease_term_seconds and not node.expired:
                    node.expired = True
                    back = sum(self._coordinator.expire_leases(replica) for replica in self._replicas_of(node))
                    log.warning("node %d is silent for %.0f s; its %d chunks in hand go back", number, silent, back)
                if silent > self._node_timeout_seconds or (node.expired and self._only_this_is_waited_for(number)):
                    node.lost = True
                    given_up.append(number)
                    for replica in self._replicas_of(node):
                        self._coordinator.retire(replica)
                    log.error("node %d is given up after %.0f s of silence; the others go on", number, silent)
        return given_up

    def conclude(self, code: int) -> None:
        """Tell all nodes that have left how the job has ended."""
        with self._lock:
            self._conclusion = code
            resolve(self._leaving, JobEnded(exit_code=code))
            self._leaving.clear()

    def _only_this_is_waited_for(self, number: int) -> bool:
        """Whether all work is done, and every other node has left."""
        others = [n for n, node in self._nodes.items() if n != number and n and node.codes is None and not node.lost]
        return not others and self._coordinator.finished

    def _replicas_of(self, node: _Node) -> list[int]:
        size = self._coordinator.tensor_parallel_size or 1
        return sorted({rank // size for rank in node.ranks})

    def check_replicas_within_nodes(self, tensor_parallel_size: int) -> None:
        """Refuse a replica that would span two nodes.

        Raises:
            ConfigurationError: Some node's ranks cannot be cut into whole replicas.
        """
        for number, node in self._nodes.items() if self._all_admitted else ():
            if len(node.ranks) % tensor_parallel_size or node.ranks[0] % tensor_parallel_size:
                raise ConfigurationError(
                    f"node {number} has {len(node.ranks)} ranks, which cannot be cut into replicas of "
                    f"tensor_parallel_size={tensor_parallel_size}; the ranks of a tensor-parallel group share a node."
                )

    # What supervisors ask

    def join(self, request: JoinNode) -> Future[NodeJoined]:
        """Take part; answered when all nodes have joined. A repeated request of one supervisor is the same request.

        Raises:
            ConfigurationError: The node is not as the coordinator expects it.
        """
        number, ranks = request.node, request.ranks
        with self._lock:
            if not 0 <= number < self.num_nodes:
                raise ConfigurationError(f"node {number} is outside a job of {self.num_nodes} nodes.")
            node = self._nodes.get(number) or _Node(request.supervisor, ranks, self._clock())
            if node.num_ranks != ranks or request.num_nodes != self.num_nodes:
                raise ConfigurationError(
                    f"node {number} joins with {ranks} ranks and --num-nodes {request.num_nodes}; the coordinator "
                    f"knows {node.num_ranks} and {self.num_nodes}. Two nodes with the same --node-rank?"
                )
            self._nodes[number] = node
            if node.supervisor != request.supervisor:
                return self._succeed(number, node, request)
            self._hear(number, node)
            if number == 0:
                self._run_id = request.run_id
            answer = self._await_admission(node)
            if len(self._nodes) == self.num_nodes:
                self._admit_all()
            return answer

    def _await_admission(self, node: _Node) -> Future[NodeJoined]:
        if node.joining is not None and not node.joining.done():  # its request has been superseded
            node.joining.set_exception(ControlPlaneTimeoutError("the request was made again"))
        node.joining = pending()
        return node.joining

    def _admit_all(self) -> None:
        if not self._all_admitted:
            first = 0
            for number in range(self.num_nodes):
                node = self._nodes[number]
                node.ranks, node.heard = list(range(first, first + node.num_ranks)), self._clock()
                first += node.num_ranks
            self._all_admitted = True
            self._coordinator.set_world_size(first)
        for node in self._nodes.values():
            if node.joining is not None and not node.joining.done():
                node.joining.set_result(self._place_of(node))

    def _place_of(self, node: _Node, generation: int = 0, is_late: bool = False) -> NodeJoined:
        world_size = self._coordinator.world_size
        first = node.ranks[0]
        return NodeJoined(
            first_rank=first, world_size=world_size, run_id=self._run_id, generation=generation, is_late=is_late
        )

    def _hear(self, number: int, node: _Node) -> None:
        """A heartbeat of the supervisor that holds a node rank: other requests for this node rank are refused."""
        node.heard = self._clock()
        if node.successor is not None:
            log.error("a second supervisor with --node-rank %d is refused: the first one is alive", number)
            node.successor.answer.set_exception(_taken(number))
            node.successor = None

    def _succeed(self, number: int, node: _Node, request: JoinNode) -> Future[NodeJoined]:
        """Another supervisor asks for a place: give it away if nothing can come of the one that has it."""
        now = self._clock()
        asked_before = node.successor
        if number == 0 or (asked_before is not None and asked_before.request.supervisor != request.supervisor):
            return failed(_taken(number))
        silent = now - node.heard > self._lease_term_seconds
        if node.lost or (silent and node.codes is not None):
            node.supervisor, node.returned = request.supervisor, True
            log.info("node %d comes back; the job goes on without it, and tells it how it ends", number)
            return answered(self._place_of(node, is_late=True))
        if silent:
            node.supervisor, node.heard, node.expired, node.successor = request.supervisor, now, False, None
            log.warning("node %d was started again, and has its place back", number)
            if not self._all_admitted:
                return self._await_admission(node)
            return answered(self._place_of(node, self._begin_again(node)))
        answer: Future[NodeJoined] = pending()
        if asked_before is None:
            log.info(
                "another supervisor asks for the place of node %d; it has it once the first one is silent for %g s",
                number, self._lease_term_seconds,
            )  # fmt: skip
        else:
            asked_before.answer.set_exception(ControlPlaneTimeoutError("the request was made again"))
        node.successor = _Successor(request, answer)
        return answer

    def _begin_again(self, node: _Node) -> int:
        """What a node's ranks had is over; returns the generation with which they begin."""
        coordinator = self._coordinator
        if coordinator.gang:
            return self.restart_gang(self.gang_generation).generation
        replicas = self._replicas_of(node)
        generation = max(coordinator.next_generation(replica) for replica in replicas)
        for replica in replicas:
            coordinator.end_generation(replica, generation - 1)
        return generation

    def state(self, request: GetJobState) -> JobState:
        """The state of the job, for one node; asking for it renews the node's leases.

        Raises:
            ControlPlaneError: The node has no place, or another supervisor has it.
        """
        number = request.node
        with self._lock:
            node = self._nodes.get(number)
            if node is None or not self._all_admitted:
                raise ControlPlaneError(f"node {number} has not joined this job.")
            if node.supervisor != request.supervisor:
                raise _taken(number)
            self._hear(number, node)
            if node.expired and not node.lost:
                node.expired = False
                log.info("heartbeats from node %d arrive again", number)
            return self._state_for(node)

    def _state_for(self, node: _Node) -> JobState:
        coordinator = self._coordinator
        kept = coordinator.kept_directory
        return JobState(
            tensor_parallel_size=coordinator.tensor_parallel_size,
            gang=coordinator.gang,
            gang_generation=self.gang_generation,
            needs_every_replica=coordinator.needs_every_replica,
            draining=coordinator.draining,
            abort_code=self.abort_code,
            lost=node.lost,
            has_jobs=bool(coordinator.jobs),
            records=None if kept is None else str(kept),
            progress_by_replica=dict(coordinator.progress_by_replica),
            open_ranks=coordinator.open_ranks(node.ranks),
            verdicts={rank: self._verdicts[rank] for rank in node.ranks if rank in self._verdicts},
        )

    def abort(self, code: int) -> None:
        """End everything, everywhere."""
        with self._lock:
            self.abort_code = self.abort_code or code

    def restart_gang(self, generation: int) -> GangRestarted:
        """Restart all ranks of the job together; repeated calls for one generation count once."""
        with self._lock:
            if generation == self.gang_generation:
                self.gang_generation += 1
                for rank in range(self._coordinator.world_size):
                    self._coordinator.end_generation(rank, self.gang_generation - 1)
            return GangRestarted(generation=self.gang_generation)

    def leave(self, request: LeaveNode) -> Future[JobEnded]:
        """All ranks of a node have ended; answered with the job's exit code when it is known."""
        with self._lock:
            node = self._nodes[request.node]
            if node.supervisor != request.supervisor:
                raise _taken(request.node)
            self._hear(request.node, node)
            if not node.returned:
                node.codes = request.codes
            if self._conclusion is not None:
                return answered(JobEnded(exit_code=self._conclusion))
            answer = pending()
            self._leaving.append(answer)
            return answer

    def report_device(self, request: ReportDevice) -> None:
        """A rank's device is to be drained, or has failed. Asked by ranks."""
        sender = request.sender
        verdict = DeviceVerdict(verdict=request.verdict, evidence=request.evidence, generation=sender.generation)
        with self._lock:
            self._verdicts[sender.rank] = verdict


def _taken(number: int) -> NodeRankTakenError:
    return NodeRankTakenError(
        f"another supervisor has the place of node {number} in this job: give each node a --node-rank of its own, and start "
        "none twice."
    )
