"""How a process becomes a rank of its job, and gets a channel to the coordinator.

The supervisor started it and says so in the environment; or another launcher did (torchrun, SLURM), then rank 0 hosts the
coordinator; or the process is alone and hosts the coordinator for itself.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.control.collectives import ControlCollectives
from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.disconnects import Disconnects
from lightning_gpuorch.control.environment import WorkerEnvironment
from lightning_gpuorch.control.handshake import Peer, require_token
from lightning_gpuorch.control.jobs import remove_ephemeral
from lightning_gpuorch.control.messages.ranks import UnregisterRank
from lightning_gpuorch.control.server import ControlServer
from lightning_gpuorch.control.shared_secret import CoordinatorPlace, SharedSecret, read_secret
from lightning_gpuorch.control.tls import Certificates
from lightning_gpuorch.control.transport import Channel, LocalChannel, RemoteChannel
from lightning_gpuorch.errors import (
    ConfigurationError,
    ControlPlaneError,
)
from lightning_gpuorch.parallel.groups.process_group import ProcessGroupManager
from lightning_gpuorch.parallel.groups.topology import Topology
from lightning_gpuorch.telemetry.run_directory import RunRecords, new_run_id
from lightning_gpuorch.worker.world import World, stop_recording

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)


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


def candidate_sizes(world_size: int, worker: WorkerEnvironment | None) -> tuple[int, ...]:
    """Sizes that cut the job into equal replicas, each within one node."""
    local = worker.local_world_size if worker is not None else int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return tuple(size for size in range(1, local + 1) if world_size % size == 0 and local % size == 0)


def wanted_tensor_parallel_size(config: OrchestratorConfig, world_size: int) -> int | None:
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


def join_supervised(
    config: OrchestratorConfig, topology: Topology, groups: ProcessGroupManager, worker: WorkerEnvironment
) -> World:
    """Join the job whose supervisor has started this process."""
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
        collective_timeout_seconds=config.collective_timeout_sec,
    )


def join_alone(config: OrchestratorConfig, topology: Topology, groups: ProcessGroupManager) -> World:
    """Make a job of this process alone."""
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


def join_external(
    config: OrchestratorConfig, topology: Topology, groups: ProcessGroupManager, external: ExternalRanks
) -> World:
    """Join a job whose ranks another launcher has started."""
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
        collective_timeout_seconds=config.collective_timeout_sec,
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
