"""The coordinator of a job: the one place that knows the ranks, the leases, the collectives and what was lost.

It lives in the supervisor; in the process itself when there is only one; in rank 0 when another launcher made the
processes. Each kind of request has a service that answers it; here is what concerns several of them. Every request is
idempotent, so a rank may repeat it after a broken connection.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from lightning_gpuorch.control.background import Background, in_thread
from lightning_gpuorch.control.collectives import CollectiveService
from lightning_gpuorch.control.job_service import JobService
from lightning_gpuorch.control.jobs import Job
from lightning_gpuorch.control.key_values import KeyValueStore
from lightning_gpuorch.control.messages.base import Done, LoaderKey, RaisedException, Request, UnitRange
from lightning_gpuorch.control.messages.nodes import EndGeneration, RetireReplica
from lightning_gpuorch.control.messages.ranks import BeginStage, DrainJob, RegisterRank, UnregisterRank
from lightning_gpuorch.control.node_registry import NodeRegistry
from lightning_gpuorch.control.pending import answered, failed
from lightning_gpuorch.control.replicas import Replicas
from lightning_gpuorch.control.votes import VoteService
from lightning_gpuorch.errors import ControlPlaneError, GPUOrchError
from lightning_gpuorch.paths import Location

log = logging.getLogger(__name__)


class Departures:
    """Ranks that have left in good order."""

    def __init__(self) -> None:
        self.ranks: set[int] = set()
        self._changed = threading.Condition()

    def add(self, rank: int) -> None:
        """Record that a rank has left."""
        with self._changed:
            self.ranks.add(rank)
            self._changed.notify_all()

    def wait_for(self, ranks: set[int], timeout_seconds: float) -> bool:
        """Wait until all of ``ranks`` have left; False if the time runs out first."""
        with self._changed:
            return self._changed.wait_for(lambda: ranks <= self.ranks, timeout_seconds)


class Coordinator:
    """Answers the requests of all ranks and supervisors.

    Args:
        world_size: Ranks of the job.
        max_chunk_failures: Deaths in one chunk before a sample of it is given up.
        on_event: Told of what happened, as ``on_event(kind, **fields)``; must not raise.
        background: Does what may take long; replaced by simulations.
        nodes: Options of :class:`~lightning_gpuorch.control.node_registry.NodeRegistry`, where several nodes take part.
    """

    def __init__(
        self,
        world_size: int,
        max_chunk_failures: int = 3,
        on_event: Callable[..., None] = lambda kind, **fields: None,
        background: Background = in_thread,
        **nodes: Any,
    ):
        self._replicas = Replicas(world_size)
        self.nodes = NodeRegistry(self, **nodes)
        self.collectives = CollectiveService(range(world_size))
        self._votes = VoteService()
        self._key_values = KeyValueStore()
        self._job_service = JobService(self._replicas, max_chunk_failures, on_event, background)
        self.gang = False
        self.departures = Departures()
        self._evaluating: set[int] = set()
        self._last_ended: dict[int, int] = {}
        self._lock = threading.RLock()
        self.routes: Mapping[type, Callable[[Any], Any]] = {
            RegisterRank: self._register,
            UnregisterRank: lambda request: self.departures.add(request.rank),
            BeginStage: self._begin_stage,
            DrainJob: lambda request: self.drain(),
            EndGeneration: self._end_generation,
            RetireReplica: lambda request: self.retire(request.replica),
            **self._job_service.routes,
            **self.collectives.routes,
            **self._votes.routes,
            **self._key_values.routes,
            **self.nodes.routes,
        }
        """What answers each type of request."""

    def handle(self, request: Request[Any]) -> Future[Any]:
        """Take one request.

        Returns:
            Resolved with the answer, now or later, or with one of the project's errors.
        """
        try:
            answer = self.routes[type(request)](request)
        except GPUOrchError as error:
            return failed(error)
        except Exception as error:
            log.exception("%r failed", request)
            return failed(ControlPlaneError(f"{type(request).__name__}: {type(error).__name__}: {error}"))
        return answer if isinstance(answer, Future) else answered(Done() if answer is None else answer)

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self._replicas.world_size

    @property
    def tensor_parallel_size(self) -> int | None:
        """Ranks per replica, once it is known."""
        return self._replicas.tensor_parallel_size

    @tensor_parallel_size.setter
    def tensor_parallel_size(self, size: int | None) -> None:
        self._replicas.tensor_parallel_size = size

    @property
    def jobs(self) -> dict[int, Job]:
        """The predict calls that were opened, by number."""
        return self._job_service.jobs

    @property
    def progress_by_replica(self) -> dict[int, int]:
        """Chunks made durable."""
        return self._job_service.progress_by_replica

    @property
    def needs_every_replica(self) -> bool:
        """Whether some rank evaluates: its share is its own, and no other rank can take it over."""
        return bool(self._evaluating)

    @property
    def retired(self) -> frozenset[int]:
        """Replicas that were given up."""
        return frozenset(self._replicas.retired)

    @property
    def draining(self) -> bool:
        """Whether no more work is handed out."""
        return self._job_service.draining

    @property
    def finished(self) -> bool:
        """Whether every opened job is complete, as far as the queues know."""
        return self._job_service.finished

    @property
    def kept_directory(self) -> Location | None:
        """Results somebody wants to keep, the first of them."""
        return self._job_service.kept_directory

    def next_generation(self, replica: int) -> int:
        """A generation of a replica that is newer than all that were started."""
        return max(self._replicas.generations.get(replica, -1), self._last_ended.get(replica, -1)) + 1

    @property
    def is_closed(self) -> bool:
        """Whether no rank can join any more: ranks train or evaluate together, or some have ended their script."""
        return self.gang or self.needs_every_replica or self.collectives.has_ended

    def set_world(self, world_size: int, ranks: Iterable[int]) -> None:
        """The job begins: its size, and the ranks that are there."""
        self._replicas.world_size = world_size
        self.collectives.set_members(ranks)

    def readmit(self, replica: int) -> None:
        """Serve a replica again that was given up."""
        with self._lock:
            self._replicas.retired.discard(replica)

    def expire_leases(self, replica: int) -> int:
        """Take back the leases of a replica without a heartbeat; see :meth:`JobService.expire_leases`."""
        return self._job_service.expire_leases(replica)

    def open_ranks(self, ranks: Iterable[int]) -> dict[int, bool]:
        """Ranks that may not leave yet; see :meth:`JobService.open_ranks`."""
        return self._job_service.open_ranks(ranks)

    def end_generation(
        self,
        replica: int,
        generation: int,
        blamed: Mapping[LoaderKey, int] | None = None,
        positions: Mapping[LoaderKey, UnitRange] | None = None,
        exception: RaisedException | None = None,
    ) -> int:
        """End a generation for its group and its leases; see :meth:`JobService.end_generation`."""
        self._last_ended[replica] = max(generation, self._last_ended.get(replica, -1))
        self._votes.end_generation(replica, generation)
        return self._job_service.end_generation((replica, generation), blamed or {}, positions or {}, exception)

    def retire(self, replica: int) -> None:
        """Give a replica up: its work goes back, it gets no more, and collectives no longer wait for it."""
        with self._lock:
            self._replicas.retired.add(replica)
        self.end_generation(replica, self._replicas.generations.get(replica, 0))
        self.collectives.retire(self._replicas.ranks_of(replica))

    def drain(self) -> None:
        """Hand out no more work."""
        self._job_service.drain()

    def verify(self) -> None:
        """Check that every opened job is complete, by the part files themselves.

        Raises:
            MissingPredictionsError: Units are missing; they are named.
        """
        self._job_service.verify()

    def _register(self, request: RegisterRank) -> None:
        with self._lock:
            check = self.nodes.check_replicas_within_nodes
            self._replicas.register(request.sender, request.tensor_parallel_size, check)
            if request.sender.replica not in self._replicas.retired:
                self.collectives.join(request.sender.rank)

    def _begin_stage(self, request: BeginStage) -> None:
        if request.gang or request.every_replica:
            self.nodes.require_all_nodes("training" if request.gang else "evaluation")
        self.gang = self.gang or request.gang
        with self._lock:
            change = self._evaluating.add if request.every_replica else self._evaluating.discard
            change(request.sender.rank)

    def _end_generation(self, request: EndGeneration) -> None:
        self.end_generation(request.replica, request.generation, request.blamed, request.positions, request.exception)
