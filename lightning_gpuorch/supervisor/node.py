"""What the parts of a node's supervisor share, and how generations of workers start and end on the node."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.control.client import CoordinatorClient
from lightning_gpuorch.control.environment import WorkerEnvironment
from lightning_gpuorch.control.messages.nodes import JobState
from lightning_gpuorch.devices.pool import DevicePool
from lightning_gpuorch.supervisor.hang_detector import HangDetector
from lightning_gpuorch.supervisor.pending_starts import PendingStart, PendingStarts
from lightning_gpuorch.supervisor.rendezvous import Rendezvous
from lightning_gpuorch.supervisor.replica import NodeReplicas
from lightning_gpuorch.supervisor.run_records import FailureLog
from lightning_gpuorch.supervisor.workers import Spawner, Workers


class Node:
    """A node's replicas, workers and devices.

    Args:
        config: Settings.
        rendezvous: This node's part in the job.
        spawner: Starts workers.
        num_workers: Workers on this node.
        devices: Devices of the node's ranks, and spares; None where there are none to choose from.
        run_directory: Where the run leaves its records.
        environment: More variables for the workers.
        record: Writes an event, as ``record(kind, **fields)``.

    Attributes:
        replicas: The node's replicas; none before :meth:`begin_all`.
        workers: Its running workers.
        pending_starts: Its ranks whose devices are checked.
        hang_detector: Reads the table that the ranks write.
        failures: The failures that were shown.
        gang_generation: Generation of the ranks that train or evaluate together.
        restarts: How often replicas were started again.
    """

    def __init__(
        self,
        config: OrchestratorConfig,
        rendezvous: Rendezvous,
        spawner: Spawner,
        num_workers: int,
        devices: DevicePool | None,
        run_directory: Path,
        environment: dict[str, str],
        record: Callable[..., None],
    ):
        self.config, self.rendezvous, self.num_workers, self.record = config, rendezvous, num_workers, record
        self.devices = devices or DevicePool.of_indices([None] * num_workers)
        self.environment = environment
        self.replicas = NodeReplicas([])
        self.workers = Workers(spawner, run_directory / "errors")
        name = f"gpuorch-{rendezvous.run_id}-{rendezvous.place.node_rank}"
        self.hang_detector = HangDetector(config, name, run_directory, num_workers, self.local)
        self.pending_starts = PendingStarts(
            self.devices, self.local, config.preflight_timeout_sec if config.enable_preflight else None
        )
        self.failures = FailureLog()
        self.gang_generation = 0
        self.restarts = 0
        self._spawner, self._run_directory = spawner, run_directory

    @property
    def client(self) -> CoordinatorClient:
        """Asks the coordinator."""
        return self.rendezvous.client

    def state(self, fresh: bool = False) -> JobState:
        """The state of the job; what it says of the tensor-parallel size holds for the replicas from then on."""
        state = self.rendezvous.state(fresh)
        self.replicas.cut(state.tensor_parallel_size)
        return state

    def local(self, rank: int) -> int:
        """Local rank of a global rank."""
        return rank - self.rendezvous.first_rank

    def group_of(self, rank: int, with_ended: bool = False) -> list[int]:
        """Ranks of this node that share a rank's fate."""
        return self.replicas.group_of(rank, self.state().gang, with_ended)

    def begin_all(self) -> None:
        """Start all ranks of the node, in the first generation that is theirs."""
        ranks = range(self.rendezvous.first_rank, self.rendezvous.first_rank + self.num_workers)
        state = self.state()
        self.replicas = NodeReplicas(ranks, state.tensor_parallel_size, self.rendezvous.first_generation)
        self.gang_generation = state.gang_generation
        self.begin(list(ranks))

    def next_generation(self, group: Sequence[int], generation: int) -> None:
        """Start the replicas of ranks again, whose workers are gone."""
        self.replicas.restart(group, generation)
        self.begin([rank for replica in self.replicas.replicas_of(group) for rank in replica.ranks])

    def restart_gang(self, generation: int) -> None:
        """All ranks of the job start again, wherever one has failed: they share one torch.distributed world."""
        self.workers.kill(list(self.workers))
        self.pending_starts.cancel()
        self.gang_generation = generation
        self.next_generation(self.live_ranks, generation)

    @property
    def live_ranks(self) -> list[int]:
        """Ranks that have not ended for good."""
        return [rank for replica in self.replicas for rank in replica.live_ranks]

    def end_all(self, code: int) -> None:
        """End what has not ended yet."""
        self.pending_starts.cancel()
        self.workers.kill(list(self.workers))
        self.replicas.end(self.live_ranks, code)

    @property
    def can_start(self) -> bool:
        """Whether some ranks wait for their start, and workers can be started now."""
        return bool(self.pending_starts) and self._spawner.can_spawn()

    def start(self, pending: PendingStart) -> dict[int, str]:
        """Start ranks whose devices have been checked; returns why the others cannot, by replica."""
        self.state()
        doomed = {self.replicas.of(rank).index: why for rank, why in pending.faults.items()}
        for replica in self.replicas.replicas_of(pending.ranks):
            if replica.index not in doomed:
                replica.run()
                for rank in replica.live_ranks:
                    self._start_worker(rank)
        return doomed

    def begin(self, ranks: Sequence[int]) -> None:
        """Start ranks, as soon as their devices have been checked."""
        for replica in self.replicas.replicas_of(ranks):
            replica.check()
        self._spawner.prepare()
        self.pending_starts.begin(ranks)

    def _start_worker(self, rank: int) -> None:
        local, place, replica = self.local(rank), self.rendezvous.place, self.replicas.of(rank)
        device = self.devices.holders.get(local)
        worker = WorkerEnvironment(
            rank=rank,
            world_size=self.rendezvous.world_size,
            local_rank=local,
            node_rank=place.node_rank,
            control=self.rendezvous.control,
            token=self.rendezvous.token,
            generation=replica.generation,
            device_index=device.index if device is not None else None,
            run_id=self.rendezvous.run_id,
            host=place.main_address if place.num_nodes > 1 and not place.node_rank else "127.0.0.1",
            heartbeat=self.hang_detector.path,
            run_directory=str(self._run_directory),
            local_world_size=self.num_workers,
            shrunk=replica.shrunk,
        )
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.num_workers)))
        self.hang_detector.forget(rank)
        self.workers.start(
            rank, worker.generation, {**self.environment, **worker.variables(), "OMP_NUM_THREADS": threads}
        )
