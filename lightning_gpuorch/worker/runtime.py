"""What both strategies share: a process's connection to its job, and the predict calls it makes."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_gpuorch._version import __version__
from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.control.messages.ranks import Agree, BeginStage, ReportDevice
from lightning_gpuorch.devices.memory import ResourceAllocator, keep_freed_memory
from lightning_gpuorch.devices.memory.transfer import Transfers
from lightning_gpuorch.errors import GPUOrchError, InputMismatchError
from lightning_gpuorch.parallel.groups.recoverable_group import RecoverableProcessGroup, collective_hooks
from lightning_gpuorch.parallel.groups.topology import Topology
from lightning_gpuorch.parallel.tensor_parallel import Communicator, random_state_digest, synchronize_random_state
from lightning_gpuorch.paths import Location, location
from lightning_gpuorch.predictions.loading.describe import describe
from lightning_gpuorch.predictions.loading.shared_loader import SharedLoader
from lightning_gpuorch.predictions.loading.world_of_one import undo_split
from lightning_gpuorch.predictions.samples.tensors import digest, to_device, whole
from lightning_gpuorch.predictions.storage.stores import store_of
from lightning_gpuorch.telemetry.current import observe_collective, observe_retry
from lightning_gpuorch.telemetry.metrics.efficiency import Calibration
from lightning_gpuorch.telemetry.rank import RankTelemetry
from lightning_gpuorch.worker.group_recovery.agreement import GroupAction
from lightning_gpuorch.worker.group_recovery.recovery import GroupRecovery, Recovery
from lightning_gpuorch.worker.group_samples import SamplesDifferError
from lightning_gpuorch.worker.joining import ExternalRanks
from lightning_gpuorch.worker.predict import PredictionJob
from lightning_gpuorch.worker.session import join
from lightning_gpuorch.worker.step_context import StepNote, StepWrapper
from lightning_gpuorch.worker.world import World, pause_recording, resume_recording

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
        self.config = config
        self.output_dir = None if output_dir is None else self._usable(output_dir, "output_dir")
        self.step_wrappers: list[StepWrapper] = []
        self.surviving_steps: StepWrapper | None = None
        """Halves batches that do not fit, in place of what a predict call does by itself."""
        self.transfer: Callable[[Any, int], Any] = self._to_device
        """Brings a batch of a dataloader to the device the way the loop does."""
        self.length_fn: Callable[[Any], int] | None = None
        """Gives the length of a sample, for dynamic batching; None knows common types."""
        self.device = torch.device("cpu")
        self.transfers: Transfers | None = None
        """Copies that overlap with steps, on CUDA."""
        self._allocator: ResourceAllocator | None = None
        self.mesh: DeviceMesh | None = None
        self.job: PredictionJob | None = None
        self.calibration = Calibration.from_environment()
        self._model_facts: dict[str, Any] = {}
        self._world: World | None = None
        self._placed = False
        self._training = False
        self._num_shares = 0

    def __getstate__(self) -> dict[str, Any]:
        """A pickled Trainer takes its settings along; the job is this process's."""
        alone = {"_world": None, "_placed": False, "job": None, "mesh": None, "transfers": None, "_allocator": None}
        return {**vars(self), **alone}

    def _to_device(self, batch: Any, loader: int) -> Any:
        return to_device(batch, self.device)

    @property
    def world(self) -> World:
        """The world this runtime has joined."""
        if self._world is None:
            raise GPUOrchError("the job is not set up yet; call launch() (Fabric) or use the Trainer's entry points.")
        return self._world

    @property
    def allocator(self) -> ResourceAllocator:
        """The memory budget of this rank's device. Making it caps torch's allocator, on CUDA."""
        if self._allocator is None:
            self._allocator = ResourceAllocator(self.device, self.config.memory_fraction)
        return self._allocator

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
    def telemetry(self) -> RankTelemetry:
        """What this rank records."""
        assert self.world.telemetry is not None
        return self.world.telemetry

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
        """Join the job, and form the process group unless the tensor-parallel size is still open.

        Where it is, :meth:`settle` goes on when the model is known; training leaves each rank its own model.

        Args:
            device: Device this rank computes on.
            external: Ranks given by another launcher, if one made the processes.
            training: Form one world over the whole job, whose ranks restart together.
            evaluating: Every replica has a fixed share that no other replica can take over.
        """
        if device != self.device:
            self.device, self._allocator = device, None
        if device.type == "cuda":
            torch.cuda.set_device(device)
            self.transfers = Transfers(device, self.allocator.pinned_pool)
        world = self._world = join(self.config, device, external)
        resume_recording(world)
        if device.type == "cpu" and world.supervised:
            keep_freed_memory()
        self._training, self._placed = training, False
        if world.topology.world_size > 1:
            stage = BeginStage(sender=world.sender, gang=training, every_replica=evaluating)
            world.channel.call(stage, timeout_seconds=30)
        if training or world.settled:
            self.settle(1 if not world.settled else world.topology.ranks_per_replica)
        return world

    def end_stage(self) -> None:
        """What :meth:`start` began for this use of the job is over; the process stays in the job."""
        if self._world is not None:
            pause_recording(self._world)

    def settle(self, tensor_parallel_size: int) -> Topology:
        """Decide how many ranks share a model and form their process group; every rank must call this.

        Args:
            tensor_parallel_size: The size; one that is decided already cannot change.

        Returns:
            The topology in force.

        Raises:
            ConfigurationError: It is decided otherwise already, or the ranks disagree.
        """
        world = self.world
        world.settle(tensor_parallel_size)
        if not self._placed:
            self._placed = True
            self._record(world)
            world.form_world(world.topology, whole_job=self._training)
            size = world.topology.tensor_parallel_size
            if size > 1 and self.mesh is None:
                replicas = world.topology.num_replicas if world.spans_job else 1
                self.mesh = world.groups.device_mesh(replicas, size)
            if not self._training:
                self._watch_over_group(world)
        return world.topology

    def _watch_over_group(self, world: World) -> None:
        """Let faults inside of the tensor-parallel group be repaired in place."""
        group = self.mesh.get_group("tensor_parallel") if self.mesh is not None else None
        if world.recovery is None and isinstance(group, RecoverableProcessGroup):
            rank, size = world.topology.tensor_parallel_rank, world.topology.tensor_parallel_size
            world.recovery = GroupRecovery(
                world.channel, world.sender, rank, size, group, self.config.timeout_sec, self._record_recovery
            )
            collective_hooks[:] = [_observe_collective]

    def _record_recovery(self, recovery: Recovery) -> None:
        """Record a step that is repeated because communication failed; the step itself tells of memory that ran out."""
        decision, topology = recovery.decision, self.world.topology
        first = min(decision.culprits, default=topology.replica * topology.ranks_per_replica)
        if decision.verdict is GroupAction.RETRY and topology.rank == first:
            observe_retry(decision.reason, decision.tries, list(decision.culprits), recovery.seconds)

    @property
    def topology(self) -> Topology:
        """The topology in force; where no model has decided it, from now on every rank has a model of its own."""
        return self.world.topology if self._placed else self.settle(1)

    def _record(self, world: World) -> None:
        """Begin to record what this rank does, where the others of the node do as well."""
        if world.telemetry is not None:
            return
        topology, config = world.topology, self.config
        world.telemetry = RankTelemetry(
            world.run_directory,
            rank=topology.rank,
            replica=topology.replica,
            generation=world.generation,
            run_id=world.run_id,
            is_leader=topology.is_leader,
            log_level=config.log_level,
            enable_profiling=config.enable_profiling,
            trace_every_steps=config.trace_every_steps,
            trace_endpoint=config.trace_endpoint,
            start=_describe(self.device),
        )
        if world.supervised:
            atexit.register(world.telemetry.close)

    def report_verdict(self, report: Any) -> None:
        """Tell the supervisor that this rank's device is to be drained, or has failed; it acts on nothing less.

        Args:
            report: A :class:`~lightning_gpuorch.devices.monitor.HealthReport`.
        """
        verdict = str(report.verdict)
        if verdict in ("drain", "failed") and self.world.supervised:
            request = ReportDevice(sender=self.world.sender, verdict=verdict, evidence=list(report.evidence))
            self.world.channel.call(request, timeout_seconds=self.config.timeout_sec)

    def note_model(self, module: torch.nn.Module) -> None:
        """Remember what kind of model is run, before it is cut: throughput is only compared with that of its like."""
        parameters = list(module.parameters())
        self._model_facts = {
            "model": type(module).__name__,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "dtype": ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})),
        }

    def measured_with(self) -> dict[str, Any]:
        """What throughput depends on; a baseline counts only for a run in which all of it is the same."""
        assert self.job is not None
        cuda = self.device.type == "cuda"
        return {
            **self._model_facts,
            "device": torch.cuda.get_device_name(self.device) if cuda else f"{platform.machine()} CPU",
            "threads": None if cuda else torch.get_num_threads(),
            "batch_sizes": [loader.layout.batch_size for loader in self.job.loaders],
            "torch": torch.__version__,
            "lightning_gpuorch": __version__,
        }

    def check_same_input(self, batch: Any, note: StepNote) -> list[StepNote]:
        """Compare a batch with those of the other ranks of the tensor-parallel group; every one of them must call this.

        Ranks whose random state differs take the first rank's, so that what is sampled in the step is the same on all.

        Args:
            batch: The batch.
            note: What this rank tells the others.

        Returns:
            What each rank told, in order.

        Raises:
            InputMismatchError: They differ; the odd ranks are named.
            SamplesDifferError: They differ since a rank could not read what others have read.
        """
        import torch.distributed as dist

        topology = self.world.topology
        if topology.tensor_parallel_size == 1 or not dist.is_initialized():
            return [note]
        group = self.mesh.get_group("tensor_parallel") if self.mesh is not None else None
        read = None if self.job is None else self.job.in_hand
        samples = 0 if read is None else read.digest
        mine = torch.tensor([digest(batch), random_state_digest(self.device), samples, *note], device=self.device)
        everybodys = [torch.empty_like(mine) for _ in range(topology.tensor_parallel_size)]
        dist.all_gather(everybodys, mine, group=group)
        values, random_states, samples_of, *notes = zip(*(told.tolist() for told in everybodys), strict=True)
        first = topology.replica * topology.ranks_per_replica
        if read is not None and len(set(samples_of)) > 1:
            raise read.differs(group, first)
        if len(set(values)) > 1:
            odd = [first + index for index, value in enumerate(values) if value != values[0]]
            raise InputMismatchError(
                f"ranks {odd} of replica {topology.replica} were given another batch than rank {first}; all ranks of a "
                "tensor-parallel group must run on the same input. Is the dataset random?"
            )
        if len(set(random_states)) > 1:
            synchronize_random_state(Communicator(group), self.device)
        return [StepNote(*told) for told in zip(*notes, strict=True)]

    def compute_together(self, call: Callable[[Any], Any], batch: Any) -> Any:
        """Compute a batch, or a part of one, on all ranks of the tensor-parallel group; see :meth:`compute_and_tell`."""
        return self.compute_and_tell(call, batch, StepNote())[0]

    def compute_and_tell(
        self, call: Callable[[Any], Any], batch: Any, note: StepNote
    ) -> tuple[Any, Sequence[StepNote]]:
        """Compute a batch, or a part of one, on all ranks of the tensor-parallel group; without a group, just compute.

        The ranks compare their input first, DTensors in the output are gathered, and the output is returned when all
        ranks have theirs. A fault is repaired in place; see :mod:`lightning_gpuorch.worker.group_recovery.recovery`.

        Args:
            call: Computes a batch.
            batch: The batch, the same on every rank of the group.
            note: What this rank tells the others.

        Returns:
            The output, and what each rank of the group told: all of them get to know it with the same batch.

        Raises:
            InputMismatchError: The ranks were given different batches.
            SamplesDifferError: A rank could not read what others have read. All ranks raise this.
            GroupOutOfMemoryError: Memory ran out on one of the ranks. All of them raise this, and may go on with a
                smaller batch.
            PeerFailedError: ``call`` raised on another rank.
            GroupRecoveryError: The group cannot go on in place; this process has to end.
        """
        if self.world.topology.tensor_parallel_size == 1:
            return call(batch), (note,)

        def compute() -> tuple[Any, list[StepNote]]:
            try:
                notes = self.check_same_input(batch, note)
            except SamplesDifferError as differ:
                return differ, [note]  # all ranks have found it: this attempt is complete
            return whole(call(batch)), notes

        recovery = self.world.recovery
        output, notes = compute() if recovery is None else recovery.attempt(compute, batch)
        if isinstance(output, SamplesDifferError):
            raise output
        return output, notes

    def share(self, loader: Any, limit: int | None = None) -> SharedLoader:
        """This replica's fixed share of a loader's batches."""
        number, self._num_shares = self._num_shares, self._num_shares + 1
        self._undo_split(loader)

        def agree(what: str, value: str) -> None:
            """Compare what this rank reads with what the others read; every rank comes here as often."""
            request = Agree(sender=self.world.sender, key=f"share-{number}-{next(times)}", what=what, value=value)
            self.world.channel.call(request, timeout_seconds=self.config.timeout_sec)

        times = itertools.count()
        return SharedLoader(describe(loader, limit), lambda: (self.topology.replica, self.topology.num_replicas), agree)

    def _undo_split(self, loader: Any) -> None:
        """What a dataset took for its share when it was built is the whole: loaders are shared out here."""
        undo_split(loader, self.world.topology.rank, self.world.topology.world_size)

    def _usable(self, directory: str | os.PathLike[str], name: str) -> Location:
        """The place that a user has given for results; what is wrong with it is said before anything starts."""
        place = location(directory, name, self.config.storage_options)
        store_of(place)
        return place

    def set_output_dir(self, output_dir: str | os.PathLike[str]) -> None:
        """Keep results in another directory."""
        self.output_dir = self._usable(output_dir, "output_dir")

    def check_default_root(self, default_root: str | os.PathLike[str]) -> None:
        """Refuse a directory for results that nobody has named, if it cannot be one.

        Raises:
            ConfigurationError: It cannot.
        """
        if self.output_dir is None:
            self._usable(default_root, "default_root_dir")

    def open_job(
        self,
        loaders: Sequence[Any],
        default_root: str | os.PathLike[str],
        limits: Sequence[int | None],
        model_fingerprint: str | None,
        *,
        returns_outputs: bool = True,
    ) -> PredictionJob:
        """Begin a predict call.

        Args:
            loaders: The user's dataloaders.
            default_root: Where results go if there is no ``output_dir``.
            limits: Batches to take of each loader at most.
            model_fingerprint: Identity of the weights, if known.
            returns_outputs: Whether the caller asks for the outputs.

        Raises:
            ConfigurationError: A loader cannot be predicted on reproducibly.
            JobMismatchError: The output directory holds another job.
            PredictionStorageError: The output directory cannot be written.
        """
        self.topology  # noqa: B018 - decided from here on
        for loader in loaders:
            self._undo_split(loader)
        if self.calibration is not None and self.run_directory is not None:
            # Nothing of what was computed before counts, and nothing is to be found by a later run.
            self.output_dir, default_root = None, self.run_directory
        keep = self.config.keep_outputs
        if keep == "auto":
            keep = returns_outputs or self.output_dir is not None
        self.job = PredictionJob(self, loaders, default_root, limits, model_fingerprint, bool(keep))
        return self.job


def _observe_collective(op: str, num_bytes: int, seconds: float) -> None:
    observe_collective(op, seconds)


def _describe(device: torch.device) -> dict[str, Any]:
    """Fields of the ``start`` event about a device."""
    if device.type != "cuda":
        return {"device": str(device)}
    properties = torch.cuda.get_device_properties(device)
    return {"device": str(device), "device_name": properties.name, "device_memory_bytes": properties.total_memory}
