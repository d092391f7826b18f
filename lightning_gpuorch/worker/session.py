"""The session of this process: the one job it has joined, as there is one torch.distributed world."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.control.environment import WorkerEnvironment
from lightning_gpuorch.errors import (
    ConfigurationError,
)
from lightning_gpuorch.parallel.groups.process_group import ProcessGroupManager
from lightning_gpuorch.parallel.groups.topology import Topology
from lightning_gpuorch.worker.joining import (
    ExternalRanks,
    candidate_sizes,
    join_alone,
    join_external,
    join_supervised,
    wanted_tensor_parallel_size,
)
from lightning_gpuorch.worker.world import World, stop_recording

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)


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
    size = wanted_tensor_parallel_size(config, ranks[1])
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
        _world = join_supervised(config, topology, groups, worker)
    elif external is not None:
        _world = join_external(config, topology, groups, external)
    else:
        _world = join_alone(config, topology, groups)
    _world.candidate_sizes = candidate_sizes(ranks[1], worker)
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
