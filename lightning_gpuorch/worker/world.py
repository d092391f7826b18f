"""One process's connection to its job: its rank, its channel to the coordinator, torch.distributed, and its records."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gpuorch.control.collectives import ControlCollectives
from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.environment import WorkerEnvironment
from lightning_gpuorch.control.jobs import Job, is_there, verify_complete
from lightning_gpuorch.control.messages.base import Sender
from lightning_gpuorch.control.messages.ranks import Lookup, Publish, RegisterRank
from lightning_gpuorch.control.transport import Channel
from lightning_gpuorch.errors import (
    ConfigurationError,
    MissingPredictionsError,
    PredictionStorageError,
    format_indices,
)
from lightning_gpuorch.parallel.groups.process_group import ProcessGroupManager
from lightning_gpuorch.parallel.groups.topology import Topology
from lightning_gpuorch.paths import Location, ObjectPath, location
from lightning_gpuorch.predictions.storage.working_copy import working_copy
from lightning_gpuorch.telemetry.run_directory import RunRecords
from lightning_gpuorch.worker.group_recovery.recovery import GroupRecovery

if TYPE_CHECKING:
    from lightning_gpuorch.telemetry.rank import RankTelemetry

log = logging.getLogger(__name__)


_NO_WORKER = WorkerEnvironment(0, 1, 0, 0, "", "", 0, None, "", "127.0.0.1", None, None)


@dataclass
class World:
    """A process's connection to its job.

    Attributes:
        topology: Ranks and replicas.
        channel: Line to the coordinator.
        collectives: Collectives over all ranks, through the coordinator.
        groups: torch.distributed of this replica.
        generation: How often this replica was started before.
        run_id: Identifies the launch.
        coordinator: The coordinator, if this process hosts it.
        supervised: Whether a supervisor restarts ranks.
        run_directory: Where logs, events and metrics of the run go.
        spans_job: Whether torch.distributed's world is the whole job rather than one replica.
        telemetry: What this rank records.
        records: What this process records of the run as a whole, if it hosts the coordinator.
        settled: Whether the tensor-parallel size is decided. Until then every rank counts as a replica of its own, and
            the coordinator has not been told.
        candidate_sizes: Tensor-parallel sizes that are possible with these ranks, ascending.
        collective_timeout_seconds: Longest wait for the other ranks.
        recovery: Repairs faults inside of this rank's tensor-parallel group, if it is in one that can be repaired.
    """

    topology: Topology
    channel: Channel
    collectives: ControlCollectives
    groups: ProcessGroupManager
    generation: int
    run_id: str
    coordinator: Coordinator | None
    supervised: bool
    run_directory: Path | None = None
    spans_job: bool = False
    recovery: GroupRecovery | None = None
    telemetry: RankTelemetry | None = None
    records: RunRecords | None = None
    settled: bool = True
    candidate_sizes: tuple[int, ...] = (1,)
    collective_timeout_seconds: float = 1800.0
    _jobs: Iterator[int] = field(default_factory=itertools.count)
    _directory_uses: dict[str, int] = field(default_factory=dict)

    @property
    def sender(self) -> Sender:
        """Tells the coordinator on whose behalf a request is made."""
        return Sender(rank=self.topology.rank, replica=self.topology.replica, generation=self.generation)

    def next_job(self) -> int:
        """Number of the next predict call; the same on every rank, since all run the same script."""
        return next(self._jobs)

    def job_directory(
        self, wanted: Location | None, default_root: str | os.PathLike[str], storage_options: Mapping[str, str] | None
    ) -> tuple[Location, bool]:
        """Where a predict call keeps its results.

        Args:
            wanted: The user's ``output_dir``; a second predict call with the same one gets a folder inside.
            default_root: Where results go that the user did not ask for.
            storage_options: Of the object store that ``default_root`` may be in.

        Returns:
            The directory, and whether it is to be removed at the end.

        Raises:
            ConfigurationError: No such directory can be, or not all processes of the job would see the same one.
        """
        base = wanted
        if base is None:
            base = location(default_root, "default_root_dir", storage_options) / "gpuorch" / self.run_id
        if isinstance(base, ObjectPath) and base.is_of_this_process and not self.is_one_process:
            raise ConfigurationError(
                f"{base} is the memory of one process, and this job has several. Use a directory or the bucket of an object "
                "store; memory:// is for a job in one process (devices=1, started with python)."
            )
        use = self._directory_uses.get(str(base), 0)
        self._directory_uses[str(base)] = use + 1
        directory = base / f"predict-{use}" if use or wanted is None else base
        return directory, wanted is None

    @property
    def is_one_process(self) -> bool:
        """Whether the job is this process alone, coordinator and all."""
        return self.topology.world_size == 1 and self.coordinator is not None

    def form_world(self, topology: Topology, *, whole_job: bool) -> None:
        """Form torch.distributed's world: this replica's ranks, or all ranks of the job.

        Args:
            topology: The topology in force.
            whole_job: Form one world over all ranks, as training needs it.
        """
        rank, size = (
            (topology.rank, topology.world_size)
            if whole_job
            else (topology.tensor_parallel_rank, topology.tensor_parallel_size)
        )
        if size == 1 or self.groups.initialized:
            return
        scope = "world" if whole_job else f"replica-{topology.replica}"
        key = f"store/{scope}/{self.generation}"
        timeout = self.collective_timeout_seconds
        worker = WorkerEnvironment.read() or _NO_WORKER
        spans_hosts = whole_job and worker.local_world_size < topology.world_size
        store: Any
        if not whole_job and self.groups.backend == "gloo":
            from lightning_gpuorch.worker.group_store import CoordinatorStore

            # NCCL's own threads use their store as well, at moments when Python may be gone.
            store = CoordinatorStore(self.channel, f"{key}/", self.groups.timeout_seconds)
        elif rank == 0 and self.run_directory is not None and not spans_hosts:
            path = self.run_directory / key.replace("/", "-")
            store = self.groups.create_local_store(path, size)
            self.channel.call(Publish(key=key, value=str(path)), timeout_seconds=timeout)
        elif rank == 0:
            store = self.groups.create_store(worker.host, 0, True, size)
            self.channel.call(Publish(key=key, value=[worker.host, store.port]), timeout_seconds=timeout)
        else:
            place = self.channel.call(Lookup(key=key), timeout_seconds=timeout).value
            if isinstance(place, str):
                store = self.groups.create_local_store(Path(place), size)
            else:
                store = self.groups.create_store(place[0], place[1], False, size)
        self.groups.initialize(rank, size, store=store, is_replica=not whole_job)
        self.spans_job = whole_job

    def settle(self, tensor_parallel_size: int) -> None:
        """Decide how many ranks share a model, once, and tell the coordinator; all ranks must agree.

        Raises:
            ConfigurationError: It is decided otherwise already, or other ranks decided otherwise.
        """
        if self.settled and (self.topology.shrunk or tensor_parallel_size == self.topology.tensor_parallel_size):
            return  # what is asked for is what this replica began with, whatever is left of it
        if self.settled:
            raise ConfigurationError(
                f"tensor_parallel_size={tensor_parallel_size} is asked for, but this job runs with "
                f"{self.topology.tensor_parallel_size}: a script cannot change it between two uses of gpuorch."
            )
        if not self.topology.shrunk:
            self.topology = dataclasses.replace(
                self.topology, tensor_parallel_size=tensor_parallel_size, ranks_per_replica=tensor_parallel_size
            )
        self.settled = True
        size = self.topology.ranks_per_replica
        self.channel.call(RegisterRank(sender=self.sender, tensor_parallel_size=size), timeout_seconds=30)


def pause_recording(world: World) -> None:
    """Write what this process has recorded and leave no thread behind: a stage of the script is over."""
    for records in (world.telemetry, world.records):
        if records is not None:
            records.pause()


def resume_recording(world: World) -> None:
    """Record again, for another stage."""
    for records in (world.telemetry, world.records):
        if records is not None:
            records.resume()


def stop_recording(world: World) -> None:
    """Write the end of what this process records, and keep it if predictions are kept; safe to call again."""
    if world.telemetry is not None:
        world.telemetry.close()
    if world.records is not None and world.coordinator is not None:
        jobs = {number: job for number, job in world.coordinator.jobs.items() if is_there(job.directory)}
        directories = [(job.directory, job.ephemeral) for job in jobs.values()]
        world.records.close(directories, working_copy, **_how_complete(jobs))


def _how_complete(jobs: dict[int, Job]) -> dict[str, Any]:
    """Fields of the ``end`` event about predict calls whose results are still there."""
    missing = []
    for number, job in sorted(jobs.items()):
        try:
            verify_complete(number, job)
        except MissingPredictionsError as error:
            missing.append(format_indices(error.indices) or str(error))
        except (OSError, PredictionStorageError) as error:
            log.debug("predict call %d cannot be checked: %s", number, error)
            return {}
    if not jobs:
        return {}
    done = {"complete": not missing, "samples": sum(job.samples_done for job in jobs.values())}
    return {**done, "missing_samples": "; ".join(missing)} if missing else done
