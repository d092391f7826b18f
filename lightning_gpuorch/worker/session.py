"""This process's place among the others: its rank, its line to the coordinator, and how it got both.

There is one per process, as there is one torch.distributed world. It comes about in one of three ways: the supervisor
started this process and says so in the environment; another launcher did (torchrun, SLURM), then rank 0 hosts the
coordinator; or the process is alone and hosts the coordinator for itself.
"""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.control.collectives import ControlCollectives
from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.disconnects import Disconnects
from lightning_gpuorch.control.environment import WorkerEnvironment
from lightning_gpuorch.control.handshake import Peer, require_token
from lightning_gpuorch.control.jobs import Job, is_there, remove_ephemeral, verify_complete
from lightning_gpuorch.control.messages.base import Sender
from lightning_gpuorch.control.messages.ranks import Lookup, Publish, RegisterRank, UnregisterRank
from lightning_gpuorch.control.server import ControlServer
from lightning_gpuorch.control.shared_secret import CoordinatorPlace, SharedSecret, read_secret
from lightning_gpuorch.control.tls import Certificates
from lightning_gpuorch.control.transport import Channel, LocalChannel, RemoteChannel
from lightning_gpuorch.errors import (
    ConfigurationError,
    ControlPlaneError,
    MissingPredictionsError,
    PredictionStorageError,
    format_indices,
)
from lightning_gpuorch.parallel.groups.process_group import ProcessGroupManager
from lightning_gpuorch.parallel.groups.topology import Topology
from lightning_gpuorch.paths import Location, ObjectPath, location
from lightning_gpuorch.predictions.storage.working_copy import working_copy
from lightning_gpuorch.telemetry.run_directory import RunRecords, new_run_id
from lightning_gpuorch.worker.group_recovery.recovery import GroupRecovery

if TYPE_CHECKING:
    import torch

    from lightning_gpuorch.telemetry.rank import RankTelemetry

log = logging.getLogger(__name__)


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
        timeout = self.collectives_timeout
        worker = WorkerEnvironment.read() or _NO_WORKER
        spans_hosts = whole_job and worker.local_world_size < topology.world_size
        store: Any
        if self.run_directory is not None and not spans_hosts:
            path = self.run_directory / key.replace("/", "-")
            if rank == 0:
                store = self.groups.create_local_store(path, size)
                self.channel.call(Publish(key=key, value=str(path)), timeout_seconds=timeout)
            else:
                self.channel.call(Lookup(key=key), timeout_seconds=timeout)
                store = self.groups.create_local_store(path, size)
        elif rank == 0:
            store = self.groups.create_store(worker.host, 0, True, size)
            self.channel.call(Publish(key=key, value=[worker.host, store.port]), timeout_seconds=timeout)
        else:
            host, port = self.channel.call(Lookup(key=key), timeout_seconds=timeout).value
            store = self.groups.create_store(host, port, False, size)
        self.groups.initialize(rank, size, store=store, is_replica=not whole_job)
        self.spans_job = whole_job

    collectives_timeout: float = 1800.0

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


_NO_WORKER = WorkerEnvironment(0, 1, 0, 0, "", "", 0, None, "", "127.0.0.1", None, None)
_world: World | None = None


def join(config: OrchestratorConfig, device: torch.device, external: ExternalRanks | None = None) -> World:
    """Join the job this process belongs to. A second call returns the same world.

    Args:
        config: Settings.
        device: Device this rank computes on.
        external: Ranks given by another launcher, if one made the processes.

    Raises:
        ConfigurationError: The ranks cannot be cut into replicas.
        ControlPlaneError: The coordinator cannot be reached.
    """
    global _world
    worker = WorkerEnvironment.read()
    if worker is not None:
        external = None
        ranks = (worker.rank, worker.world_size, worker.local_rank)
    elif external is not None and external.world_size > 1:
        ranks = (external.rank, external.world_size, external.local_rank)
    else:
        external, ranks = None, (0, 1, 0)
    size = _tensor_parallel_size(config, ranks[1])
    left, size = worker.shrunk if worker is not None and worker.shrunk is not None else (size or 1, size)
    topology = Topology(*ranks, tensor_parallel_size=left, ranks_per_replica=size or 1)
    if _world is not None:
        if size is None:
            topology = dataclasses.replace(
                topology,
                tensor_parallel_size=_world.topology.tensor_parallel_size,
                ranks_per_replica=_world.topology.ranks_per_replica,
            )
        elif not _world.settled:
            _world.settle(size)
        if _world.topology != topology:
            raise ConfigurationError(
                f"this process is already {_world.topology}; a script cannot change the number of ranks or the "
                f"tensor-parallel size between two uses of gpuorch (asked for {topology})."
            )
        return _world
    groups = ProcessGroupManager(config.backend, config.timeout_sec, device, config.enable_group_recovery)
    if worker is not None:
        _world = _join_supervised(config, topology, groups, worker)
    elif external is not None:
        _world = _join_external(config, topology, groups, external)
    else:
        _world = _alone(config, topology, groups)
    _world.candidate_sizes = _candidate_sizes(ranks[1], worker)
    _world.settled = False
    if size is not None:
        _world.settle(size)
    return _world


def forget() -> None:
    """Forget the world that a fork has inherited, without leaving it: it is the parent's."""
    global _world
    _world = None


def leave() -> None:
    """Leave the job and forget the world; the next :func:`join` starts afresh."""
    global _world
    if _world is None:
        return
    world, _world = _world, None
    if world.recovery is not None:
        world.recovery.close()
    world.groups.finalize()
    world.channel.close()
    stop_recording(world)


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


@dataclass(frozen=True)
class ExternalRanks:
    """Ranks as another launcher assigned them.

    Attributes:
        rank: Global rank.
        world_size: Ranks in the job.
        local_rank: Rank within the node.
        main_address: Host of rank 0.
        main_port: Port at which rank 0, or the launcher, offers a store.
    """

    rank: int
    world_size: int
    local_rank: int
    main_address: str
    main_port: int

    @property
    def on_one_host(self) -> bool:
        """Whether all ranks of the job are on this host, as far as the launcher tells."""
        local_world_size = os.environ.get("LOCAL_WORLD_SIZE")
        if local_world_size is not None:
            return int(local_world_size) == self.world_size
        num_nodes = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES")
        return num_nodes == "1" if num_nodes else self.main_address in ("127.0.0.1", "localhost", "::1")


def _candidate_sizes(world_size: int, worker: WorkerEnvironment | None) -> tuple[int, ...]:
    """Sizes that cut the job into equal replicas, each within one node."""
    local = worker.local_world_size if worker is not None else int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return tuple(size for size in range(1, local + 1) if world_size % size == 0 and local % size == 0)


def _tensor_parallel_size(config: OrchestratorConfig, world_size: int) -> int | None:
    """The size asked for; None if the model is to decide."""
    tensor, data = config.tensor_parallel_size, config.data_parallel_size
    if tensor == "auto" and data == "auto":
        return 1 if world_size == 1 else None
    if tensor == "auto":
        size = world_size // int(data)
    else:
        size = tensor
    if data != "auto" and size * data != world_size:
        raise ConfigurationError(
            f"tensor_parallel_size={tensor!r} x data_parallel_size={data} does not make up {world_size} devices."
        )
    return size


def _join_supervised(
    config: OrchestratorConfig, topology: Topology, groups: ProcessGroupManager, worker: WorkerEnvironment
) -> World:
    # On the coordinator's own node an unreachable coordinator is gone; on another one it may be the network.
    patience = config.timeout_sec if worker.node_rank == 0 else config.node_timeout_sec
    peer = Peer("rank", topology.rank)
    channel = RemoteChannel(worker.control, peer, worker.token, patience, worker.run_id, Certificates.of(config))
    return World(
        topology=topology,
        channel=channel,
        collectives=ControlCollectives(channel, topology.rank, config.collective_timeout_sec),
        groups=groups,
        generation=worker.generation,
        run_id=worker.run_id,
        coordinator=None,
        supervised=True,
        run_directory=Path(worker.run_directory) if worker.run_directory else None,
        collectives_timeout=config.collective_timeout_sec,
    )


def _alone(config: OrchestratorConfig, topology: Topology, groups: ProcessGroupManager) -> World:
    run_id = new_run_id()
    records = _records(run_id, topology)
    coordinator = Coordinator(1, config.max_chunk_failures, records.record)
    channel = LocalChannel(coordinator)
    world = World(
        topology=topology,
        channel=channel,
        collectives=ControlCollectives(channel, 0, config.collective_timeout_sec),
        groups=groups,
        generation=0,
        run_id=run_id,
        coordinator=coordinator,
        supervised=False,
        run_directory=records.directory,
        records=records,
    )
    atexit.register(remove_ephemeral, coordinator.jobs)
    atexit.register(stop_recording, world)  # runs first
    return world


def _records(run_id: str, topology: Topology) -> RunRecords:
    return RunRecords(
        run_id, world_size=topology.world_size, tensor_parallel_size=topology.tensor_parallel_size,
        host=socket.gethostname(),
    )  # fmt: skip


def _join_external(
    config: OrchestratorConfig, topology: Topology, groups: ProcessGroupManager, external: ExternalRanks
) -> World:
    import torch.distributed as dist

    # 1. One store for this attempt: torch's launcher reuses its store over restarts, with the dead ranks' keys in it
    #    (pytorch#135712), so every attempt gets a prefix of its own.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT") or os.environ.get("SLURM_RESTART_COUNT") or "0"
    hosted_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    raw = groups.create_store(
        external.main_address, external.main_port, topology.rank == 0 and not hosted_by_launcher, topology.world_size
    )
    store = dist.PrefixStore(f"gpuorch/attempt-{attempt}", raw)
    # 2. Rank 0 hosts the coordinator and says where.
    coordinator: Coordinator | None = None
    records: RunRecords | None = None
    if topology.rank == 0:
        run_id = new_run_id()
        records = _records(run_id, topology)
        run_directory = records.directory
        coordinator = Coordinator(topology.world_size, config.max_chunk_failures, records.record)
        token, secret_at = config.token, ""
        if external.on_one_host and not token:
            secret = SharedSecret()
            atexit.register(secret.remove)
            token, secret_at = secret.token, str(secret.directory)
        elif not token:
            require_token(config.allow_insecure, "several hosts")
        interface = "127.0.0.1" if external.on_one_host else "0.0.0.0"
        server = ControlServer(coordinator, interface, 0, token, run_id, Certificates.of(config))
        place = CoordinatorPlace(server.port, secret_at, run_id, socket.gethostname(), str(run_directory or ""))
        store.set("coordinator", place.text())
        channel: Channel = LocalChannel(coordinator)
    else:
        place = CoordinatorPlace.read(store.get("coordinator"))
        run_id = place.run_id
        token = config.token or (read_secret(place.secret_directory) if place.secret_directory else "")
        if not token:
            require_token(config.allow_insecure, "several hosts")
        shared = Path(place.run_directory) if place.run_directory and place.host_name == socket.gethostname() else None
        run_directory = shared if shared is not None and shared.is_dir() else None
        host = "127.0.0.1" if external.on_one_host else external.main_address
        peer = Peer("rank", topology.rank)
        channel = RemoteChannel(
            f"{host}:{place.port}", peer, token, config.timeout_sec, run_id, Certificates.of(config)
        )
        atexit.register(_unregister, channel, topology.rank)
    # 3. One torch.distributed world over all ranks, as that launcher's users expect.
    groups.initialize(topology.rank, topology.world_size, store=dist.PrefixStore("world", store))
    world = World(
        topology=topology,
        channel=channel,
        collectives=ControlCollectives(channel, topology.rank, config.collective_timeout_sec),
        groups=groups,
        generation=0,
        run_id=run_id,
        coordinator=coordinator,
        supervised=False,
        run_directory=run_directory,
        records=records,
        spans_job=True,
        collectives_timeout=config.collective_timeout_sec,
    )
    if coordinator is not None:
        disconnects = Disconnects(coordinator, server.connected_ranks, config.lease_term_sec)
        atexit.register(_outlive_the_others, world, disconnects, config.collective_timeout_sec)
    else:
        atexit.register(stop_recording, world)  # runs before this rank unregisters
    return world


def _outlive_the_others(world: World, disconnects: Disconnects, timeout_seconds: float) -> None:
    """Rank 0 serves the coordinator until all ranks are done with it."""
    coordinator = world.coordinator
    assert coordinator is not None
    left = disconnects.outlive_the_others(timeout_seconds)
    if left:
        log.warning("rank 0 leaves although ranks %s have not", left)
    stop_recording(world)
    remove_ephemeral(coordinator.jobs)


def _unregister(channel: Channel, rank: int) -> None:
    try:
        channel.call(UnregisterRank(rank=rank), timeout_seconds=5)
    except ControlPlaneError as error:  # the coordinator is gone already, and nothing waits
        log.debug("rank %d could not unregister: %s", rank, error)
