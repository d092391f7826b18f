"""What both strategies share: a process's connection to its job, and the predict calls it makes."""

from __future__ import annotations

import atexit
import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.errors import ConfigurationError, GPUOrchError, InputMismatchError
from lightning_gpuorch.prediction_job import PredictionJob, StepWrapper
from lightning_gpuorch.predictions.loader import SharedLoader
from lightning_gpuorch.predictions.source import describe
from lightning_gpuorch.telemetry.current import current_events, emit, use_events
from lightning_gpuorch.telemetry.events import EventLog
from lightning_gpuorch.telemetry.logs import configure_logging
from lightning_gpuorch.telemetry.steps import StepRecorder
from lightning_gpuorch.tensors import digest
from lightning_gpuorch.world import ExternalRanks, World, join

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)


class Runtime:
    """A strategy's connection to its job.

    Args:
        config: Settings.
        output_dir: Where results are kept; None keeps them until the caller is done with them.
    """

    def __init__(self, config: OrchestratorConfig, output_dir: str | os.PathLike[str] | None = None):
        if config.enable_profiling:
            raise ConfigurationError("enable_profiling=True is not available in this version; leave it False.")
        self.config, self.output_dir = config, output_dir
        self.step_wrappers: list[StepWrapper] = []
        self.length_fn: Callable[[Any], int] | None = None
        """Gives the length of a sample, for dynamic batching; None knows common types."""
        self.device = torch.device("cpu")
        self.mesh: DeviceMesh | None = None
        self.job: PredictionJob | None = None
        self.step_recorder: StepRecorder | None = None
        self._world: World | None = None

    @property
    def world(self) -> World:
        """The world this runtime has joined."""
        if self._world is None:
            raise GPUOrchError("the job is not set up yet; call launch() (Fabric) or use the Trainer's entry points.")
        return self._world

    @property
    def replica(self) -> int:
        """Data-parallel index of this process."""
        return self.world.topology.replica

    @property
    def generation(self) -> int:
        """How often this process's replica was started before."""
        return self.world.generation

    @property
    def is_leader(self) -> bool:
        """Whether this process speaks for its tensor-parallel group."""
        return self.world.topology.is_leader

    @property
    def run_directory(self) -> Path | None:
        """Where logs, events and metrics of the run go, if anywhere."""
        return self.world.run_directory

    def start(
        self,
        device: torch.device,
        external: ExternalRanks | None = None,
        *,
        training: bool = False,
        evaluating: bool = False,
    ) -> World:
        """Join the job and form the process group.

        Args:
            device: Device this rank computes on.
            external: Ranks given by another launcher, if one made the processes.
            training: Form one world over the whole job, whose ranks restart together.
            evaluating: Every replica has a fixed share that nobody else can take over.
        """
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        world = self._world = join(self.config, device, external)
        self._record_run(world)
        topology = world.topology
        if topology.world_size > 1:
            stage = {"op": "stage", "gang": training, "every_replica": evaluating, **world.owner}
            world.channel.call(stage, timeout_seconds=30)
        world.form_world(topology, whole_job=training)
        if topology.tensor_parallel_size > 1 and self.mesh is None:
            replicas = topology.num_replicas if world.spans_job else 1
            self.mesh = world.groups.device_mesh(replicas, topology.tensor_parallel_size)
        return world

    def _record_run(self, world: World) -> None:
        """Log and record events where the supervisor collects them."""
        if world.run_directory is None or current_events() is not None:
            return
        topology = world.topology
        configure_logging(
            self.config.log_level,
            rank=topology.rank,
            replica=topology.replica,
            directory=world.run_directory / "logs",
            generation=world.generation,
        )
        common = {"rank": topology.rank, "replica": topology.replica, "generation": world.generation}
        source = f"rank-{topology.rank:05d}.attempt-{world.generation}"
        events = EventLog(world.run_directory / "events", source, common=common)
        use_events(events)
        self.step_recorder = StepRecorder(events, counts_samples=topology.is_leader)
        emit("start", pid=os.getpid(), host=socket.gethostname(), device=str(self.device))
        atexit.register(events.close)

    def check_same_input(self, batch: Any) -> None:
        """Compare a batch with those of the other ranks of the tensor-parallel group; every one of them must call this.

        Raises:
            InputMismatchError: They differ; the odd ranks are named.
        """
        import torch.distributed as dist

        topology = self.world.topology
        if topology.tensor_parallel_size == 1 or not dist.is_initialized():
            return
        group = self.mesh.get_group("tensor_parallel") if self.mesh is not None else None
        mine = torch.tensor([digest(batch)], device=self.device)
        digests = [torch.empty_like(mine) for _ in range(topology.tensor_parallel_size)]
        dist.all_gather(digests, mine, group=group)
        values = [int(value) for value in digests]
        if len(set(values)) > 1:
            first = topology.replica * topology.tensor_parallel_size
            odd = [first + index for index, value in enumerate(values) if value != values[0]]
            raise InputMismatchError(
                f"ranks {odd} of replica {topology.replica} were given another batch than rank {first}; all ranks of a "
                "tensor-parallel group must run on the same input. Is the dataset random?"
            )

    def share(self, loader: Any, limit: int | None = None) -> SharedLoader:
        """This replica's fixed share of a loader's batches."""
        topology = self.world.topology
        return SharedLoader(describe(loader, limit), topology.replica, topology.num_replicas)

    def open_job(
        self, loaders: Sequence[Any], default_root: Path, limits: Sequence[int | None], model_fingerprint: str | None
    ) -> PredictionJob:
        """Begin a predict call.

        Args:
            loaders: The user's dataloaders.
            default_root: Where results go if there is no ``output_dir``.
            limits: Batches to take of each loader at most.
            model_fingerprint: Identity of the weights, if known.

        Raises:
            ConfigurationError: A loader cannot be predicted on reproducibly.
            JobMismatchError: The output directory holds another job.
            PredictionStorageError: The output directory cannot be written.
        """
        self.job = PredictionJob(self, loaders, default_root, limits, model_fingerprint)
        return self.job
