"""The coordinator's side of the supervisors: which nodes take part, whose heartbeats arrive, what is to be done everywhere.

Every node has a supervisor, which alone decides about its own workers. It asks the coordinator for what concerns the whole
job, and reports what ended. A node without a heartbeat for a lease term loses its leases, in case its work will never
come; it may come back. After ``node_timeout_seconds`` it is given up, and its ranks are no longer waited for.

A supervisor on the coordinator's own node uses the same requests, without a socket.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from lightning_gpuorch.control.job_control import JobControl
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
from lightning_gpuorch.control.node_places import NodePlaces, Place
from lightning_gpuorch.control.pending import answered, pending, resolve
from lightning_gpuorch.errors import EXIT_RESUMABLE, ConfigurationError, ControlPlaneError

log = logging.getLogger(__name__)


class NodeRegistry:
    """The coordinator's side.

    Args:
        coordinator: The coordinator.
        num_nodes: Supervisors that may take part.
        min_nodes: Supervisors with which the job begins; default all.
        lease_term_seconds: Silence after which a node's leases go back.
        node_timeout_seconds: Silence after which a node is given up.
        clock: The time; replaced by tests.
    """

    def __init__(
        self,
        coordinator: JobControl,
        num_nodes: int = 1,
        min_nodes: int | None = None,
        lease_term_seconds: float = 30.0,
        node_timeout_seconds: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._coordinator, self._clock = coordinator, clock
        self._lease_term_seconds, self._node_timeout_seconds = lease_term_seconds, node_timeout_seconds
        self._places = NodePlaces(
            coordinator, min_nodes or num_nodes, num_nodes, lease_term_seconds, self._begin_again, clock
        )
        self._leaving: list[Future[JobEnded]] = []
        self._verdicts: dict[int, DeviceVerdict] = {}
        self._conclusion: int | None = None
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
        return self._places.missing

    def absent(self) -> list[int]:
        """Nodes that were given up and have not come back."""
        with self._lock:
            return [n for n, place in self._places.by_rank.items() if place.lost and not place.is_late]

    def others_present(self) -> list[int]:
        """Nodes other than the coordinator's that have neither left nor been given up."""
        with self._lock:
            return [n for n, place in self._places.by_rank.items() if n and place.is_present]

    def codes(self) -> dict[int, int]:
        """Exit codes by rank of the nodes that have left."""
        with self._lock:
            return {rank: code for place in self._places.by_rank.values() for rank, code in (place.codes or {}).items()}

    def lost_ranks(self) -> list[int]:
        """Ranks of nodes that were given up."""
        with self._lock:
            return [rank for place in self._places.by_rank.values() if place.lost for rank in place.ranks]

    def drained(self) -> list[int]:
        """Nodes that have left and not come back, while the job goes on."""
        with self._lock:
            return [n for n, place in self._places.by_rank.items() if place.drained]

    def require_all_nodes(self, what: str) -> None:
        """Refuse what needs a world that does not change.

        Args:
            what: For the message.

        Raises:
            ConfigurationError: Some nodes are not there.
        """
        with self._lock:
            places = self._places
            present = sum(place.is_present for place in places.by_rank.values())
            if (places.is_elastic or self.drained()) and present < places.max_nodes:
                raise ConfigurationError(
                    f"{what} needs all ranks from its beginning to its end, and {present} of {places.max_nodes} nodes are "
                    f"there: start it with --num-nodes {places.max_nodes}, which waits for all of them."
                )

    def check_terms(self) -> list[int]:
        """Take back the leases of silent nodes, and give up those that are silent for too long.

        Returns:
            Nodes that were given up by this call.
        """
        given_up = []
        with self._lock:
            now = self._clock()
            for number in self.others_present():
                place = self._places.by_rank[number]
                silent = now - place.heard
                if silent > self._lease_term_seconds and not place.expired:
                    place.expired = True
                    back = sum(self._coordinator.expire_leases(replica) for replica in self._replicas_of(place))
                    log.warning("node %d is silent for %.0f s; its %d chunks in hand go back", number, silent, back)
                if silent > self._node_timeout_seconds or (place.expired and self._only_this_is_waited_for(number)):
                    place.lost = True
                    given_up.append(number)
                    for replica in self._replicas_of(place):
                        self._coordinator.retire(replica)
                    log.error("node %d is given up after %.0f s of silence; the others go on", number, silent)
        return given_up

    def conclude(self, code: int) -> None:
        """Tell all nodes that have left how the job has ended."""
        with self._lock:
            self._conclusion, self._places.concluded = code, True
            resolve(self._leaving, JobEnded(exit_code=code))
            self._leaving.clear()

    def _only_this_is_waited_for(self, number: int) -> bool:
        """Whether all work is done, and every other node has left."""
        return self.others_present() == [number] and self._coordinator.finished

    def _replicas_of(self, place: Place) -> list[int]:
        size = self._coordinator.tensor_parallel_size or 1
        return sorted({rank // size for rank in place.ranks})

    def check_replicas_within_nodes(self, tensor_parallel_size: int) -> None:
        """Refuse a replica that would span two nodes.

        Raises:
            ConfigurationError: Some node's ranks cannot be cut into whole replicas.
        """
        for number, place in self._places.by_rank.items():
            if place.ranks and (len(place.ranks) % tensor_parallel_size or place.ranks[0] % tensor_parallel_size):
                raise ConfigurationError(
                    f"node {number} has {len(place.ranks)} ranks, which cannot be cut into replicas of "
                    f"tensor_parallel_size={tensor_parallel_size}; the ranks of a tensor-parallel group share a node."
                )

    # What supervisors ask

    def join(self, request: JoinNode) -> Future[NodeJoined]:
        """Take part; see :meth:`NodePlaces.join`."""
        with self._lock:
            return self._places.join(request)

    def _begin_again(self, place: Place) -> int:
        """What a node's ranks had is over; returns the generation with which they begin."""
        coordinator = self._coordinator
        if coordinator.gang:
            return self.restart_gang(self.gang_generation).generation
        replicas = self._replicas_of(place)
        # Newer than what was given to the supervisor before, too: its ranks may not have registered yet.
        generation = max(place.generation + 1, *(coordinator.next_generation(replica) for replica in replicas))
        for replica in replicas:
            coordinator.end_generation(replica, generation - 1)
            coordinator.readmit(replica)
        return generation

    def state(self, request: GetJobState) -> JobState:
        """The state of the job, for one node; asking for it renews the node's leases.

        Raises:
            ControlPlaneError: The node has no place, or another supervisor has it.
        """
        number = request.node
        with self._lock:
            place = self._places.holder(number, request.supervisor)
            if place is None or not self._places.has_begun:
                raise ControlPlaneError(f"node {number} has not joined this job.")
            self._places.record_heartbeat(number, place)
            if place.expired and not place.lost:
                place.expired = False
                log.info("heartbeats from node %d arrive again", number)
            return self._state_for(place)

    def _state_for(self, place: Place) -> JobState:
        coordinator = self._coordinator
        kept = coordinator.kept_directory
        return JobState(
            tensor_parallel_size=coordinator.tensor_parallel_size,
            gang=coordinator.gang,
            gang_generation=self.gang_generation,
            needs_every_replica=coordinator.needs_every_replica,
            draining=coordinator.draining,
            abort_code=self.abort_code,
            lost=place.lost,
            has_jobs=bool(coordinator.jobs),
            records=None if kept is None else str(kept),
            progress_by_replica=dict(coordinator.progress_by_replica),
            open_ranks=coordinator.open_ranks(place.ranks),
            verdicts={rank: self._verdicts[rank] for rank in place.ranks if rank in self._verdicts},
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
        """All ranks of a node have ended; answered with the job's exit code when it is known, at once to a drained node."""
        with self._lock:
            place = self._places.holder(request.node, request.supervisor)
            if place is None:
                raise ControlPlaneError(f"node {request.node} has not joined this job.")
            self._places.record_heartbeat(request.node, place)
            if request.drained and self._conclusion is None:
                if not place.drained:
                    log.info("node %d has left; the others go on", request.node)
                place.drained = True
                return answered(JobEnded(exit_code=EXIT_RESUMABLE))
            if not place.is_late:
                place.codes = request.codes
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
