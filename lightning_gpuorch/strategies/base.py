"""What the Fabric strategy and the Trainer strategy have in common: ranks, environment and job-wide collectives.

Both are thin shells over :class:`~lightning_gpuorch.worker.runtime.Runtime`. This mixin stands before Lightning's own
``DDPStrategy`` in either world.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.control.addresses import port_of
from lightning_gpuorch.control.collectives import one_per_replica
from lightning_gpuorch.control.environment import WorkerEnvironment
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.options import OrchestratorOptions, refuse_unknown
from lightning_gpuorch.predictions.loading.world_of_one import job_is_hidden
from lightning_gpuorch.strategies.exit_codes import exit_with_codes
from lightning_gpuorch.strategies.lightning_internals import set_rank_zero
from lightning_gpuorch.strategies.packages import LightningPackage
from lightning_gpuorch.worker.joining import ExternalRanks
from lightning_gpuorch.worker.model_setup import ModelSetup, ParallelizeFn
from lightning_gpuorch.worker.runtime import Runtime
from lightning_gpuorch.worker.session import forget

log = logging.getLogger(__name__)

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda stack: stack.float().mean(0) if not stack.is_floating_point() else stack.mean(0),
    "avg": lambda stack: stack.float().mean(0) if not stack.is_floating_point() else stack.mean(0),
    "sum": lambda stack: stack.sum(0),
    "max": lambda stack: stack.amax(0),
    "min": lambda stack: stack.amin(0),
    "product": lambda stack: stack.prod(0),
}


class SupervisedEnvironment:
    """Ranks as the supervisor assigned them; a ``ClusterEnvironment`` of either package."""

    def __init__(self, worker: WorkerEnvironment):
        self._worker = worker

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """The supervisor has decided; nothing to check."""

    def teardown(self) -> None:
        """Nothing to take down."""

    @property
    def creates_processes_externally(self) -> bool:
        """The supervisor makes the processes."""
        return True

    @property
    def main_address(self) -> str:
        """Host of the coordinator, as this rank reaches it."""
        return self._worker.host

    @property
    def main_port(self) -> int:
        """Port of the coordinator; 0 where it has none, as on one node."""
        return port_of(self._worker.control)

    @staticmethod
    def detect() -> bool:
        """Whether a supervisor started this process."""
        return WorkerEnvironment.read() is not None

    def world_size(self) -> int:
        """Ranks in the job."""
        return self._worker.world_size

    def set_world_size(self, size: int) -> None:
        """The supervisor has decided; nothing to set."""

    def global_rank(self) -> int:
        """Rank in the job."""
        return self._worker.rank

    def set_global_rank(self, rank: int) -> None:
        """The supervisor has decided; nothing to set."""

    def local_rank(self) -> int:
        """Rank within the node."""
        return self._worker.local_rank

    def node_rank(self) -> int:
        """Which node."""
        return self._worker.node_rank

    @property
    def num_nodes(self) -> int:
        """Nodes of the job."""
        return self._worker.world_size // self._worker.local_world_size


class StrategyShell:
    """Mixed into both strategies, before Lightning's ``DDPStrategy``."""

    taken_by: str
    """Who takes this strategy, and which class the other one takes."""
    runtime: Runtime
    model_setup: ModelSetup
    parallel_devices: list[torch.device] | None
    num_nodes: int
    cluster_environment: Any
    package: LightningPackage
    """The package whose Trainer or Fabric takes this strategy."""

    def _init_shell(
        self,
        config: OrchestratorConfig | None,
        options: OrchestratorOptions,
        parallelize_fn: ParallelizeFn | None,
        tensor_parallel_plan: Any,
        example_input: Any,
        output_dir: str | os.PathLike[str] | None,
        length_fn: Callable[[Any], int] | None = None,
    ) -> None:
        exit_with_codes()
        self.package.of_fabric("plugins.environments").ClusterEnvironment.register(SupervisedEnvironment)
        refuse_unknown(options, type(self).__init__)
        resolved = OrchestratorConfig.resolve(config, **options)
        if length_fn is not None and not callable(length_fn):
            raise ConfigurationError(f"length_fn={length_fn!r} is not callable.")
        self.runtime = Runtime(resolved, output_dir)
        self.runtime.length_fn = length_fn
        self.model_setup = ModelSetup(self.runtime, parallelize_fn, tensor_parallel_plan, example_input)
        self._worker = WorkerEnvironment.read()

    def __repr__(self) -> str:
        """Lightning shows it when it refuses a strategy of the wrong kind, which it takes for a wrong name."""
        return f"<{type(self).__module__}.{type(self).__qualname__} {self.taken_by}>"

    @property
    def config(self) -> OrchestratorConfig:
        """The configuration in force."""
        return self.runtime.config

    @property
    def supervised_environment(self) -> SupervisedEnvironment | None:
        """The cluster environment of a supervised worker, None elsewhere."""
        return SupervisedEnvironment(self._worker) if self._worker is not None else None

    @property
    def root_device(self) -> torch.device:
        """The device this rank computes on."""
        devices = self.parallel_devices or [torch.device("cpu")]
        if devices[0].type != "cuda":
            return torch.device(devices[0].type)
        if self._worker is not None and self._worker.device_index is not None:
            return torch.device("cuda", self._worker.device_index)
        local_rank = self.cluster_environment.local_rank() if self.cluster_environment is not None else 0
        return devices[local_rank] if local_rank < len(devices) else torch.device("cuda", local_rank)

    @property
    def global_rank(self) -> int:
        """Rank in the job; 0 to code that reads data, which must not shard itself."""
        return 0 if job_is_hidden() else int(super().global_rank)  # type: ignore[misc]

    @property
    def local_rank(self) -> int:
        """Rank within the node; 0 to code that reads data."""
        return 0 if job_is_hidden() else int(super().local_rank)  # type: ignore[misc]

    @property
    def node_rank(self) -> int:
        """Which node; 0 to code that reads data."""
        return 0 if job_is_hidden() else int(super().node_rank)  # type: ignore[misc]

    @property
    def world_size(self) -> int:
        """Ranks in the job; 1 to code that reads data."""
        return 1 if job_is_hidden() else int(super().world_size)  # type: ignore[misc]

    @property
    def num_processes(self) -> int:
        """Ranks on this node; one while a single device is measured, however many the script asks for."""
        return 1 if self.runtime.calibration is not None else len(self.parallel_devices or ())

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks per replica."""
        return self.runtime.world.topology.tensor_parallel_size

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """None: loaders are shared out by the strategy, not by a sampler."""
        return None

    def become_worker(self) -> None:
        """Take up the place a supervisor has given this process after the strategy was made: a forked worker."""
        forget()  # what the forked process has joined
        self._worker = WorkerEnvironment.read()
        self.cluster_environment = self.supervised_environment
        assert self._worker is not None
        set_rank_zero(self._worker.rank)

    def _external_ranks(self) -> ExternalRanks | None:
        environment = self.cluster_environment
        if self._worker is not None or environment is None or not environment.creates_processes_externally:
            return None
        return ExternalRanks(
            environment.global_rank(),
            environment.world_size(),
            environment.local_rank(),
            environment.main_address,
            environment.main_port,
        )

    def _start_runtime(self, *, training: bool = False, evaluating: bool = False) -> None:
        world = self.runtime.start(self.root_device, self._external_ranks(), training=training, evaluating=evaluating)
        set_rank_zero(world.topology.rank)

    @property
    def _building_device(self) -> torch.device:
        """Where a model is built: on the CPU as long as it may have to be cut before it fits a device."""
        decided = self.runtime._world is not None and self.runtime.world.settled
        return self.root_device if decided and self.tensor_parallel_size == 1 else torch.device("cpu")

    def _sync_metrics_over_job(self, module: torch.nn.Module) -> None:
        """Let torchmetrics inside the module gather over all replicas instead of torch.distributed's world."""
        if "torchmetrics" not in sys.modules or self.runtime.world.topology.world_size == 1:
            return
        from torchmetrics import Metric

        for metric in module.modules():
            if isinstance(metric, Metric) and metric.dist_sync_fn is None:
                metric.dist_sync_fn = self._gather_for_metric
                metric.distributed_available_fn = _always

    def _gather_for_metric(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        world = self.runtime.world
        gathered = world.collectives.gather_by_rank(tensor.detach().cpu())
        shares = one_per_replica(gathered, world.topology.ranks_per_replica)
        return [share.to(tensor.device) for share in shares]

    # Collectives over the whole job, through the control plane. Before the job is joined there is no rank to wait for.

    @property
    def _alone(self) -> bool:
        return self.runtime._world is None or self.runtime.world.topology.world_size == 1

    def _job_barrier(self, name: str | None = None) -> None:
        if not self._alone:
            self.runtime.world.collectives.barrier(name or "")

    def _job_broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj if self._alone else self.runtime.world.collectives.broadcast_object(obj, src)

    def _job_all_gather(self, tensor: Tensor) -> Tensor:
        """Stack every rank's tensor; shape ``(world_size, *tensor.shape)``."""
        if self._alone:
            return tensor
        gathered = self.runtime.world.collectives.gather_by_rank(tensor.detach().cpu())
        return torch.stack([gathered[rank] for rank in sorted(gathered)]).to(tensor.device)

    def _job_reduce(self, value: Any, reduce_op: Any = "mean") -> Any:
        """Reduce over replicas: the ranks of a tensor-parallel group hold the same value, which counts once."""
        if self._alone:
            return value
        name = str(getattr(reduce_op, "name", reduce_op) or "mean").lower().rsplit(".", 1)[-1]
        if name not in _REDUCTIONS:
            raise ConfigurationError(f"reduce_op={reduce_op!r} is not supported; use one of {sorted(_REDUCTIONS)}.")
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
        world = self.runtime.world
        gathered = world.collectives.gather_by_rank(tensor.detach().cpu())
        stack = torch.stack(list(one_per_replica(gathered, world.topology.ranks_per_replica)))
        return _REDUCTIONS[name](stack).to(tensor.device)

    def _job_decide(self, decision: bool, all_agree: bool) -> bool:
        if self._alone:
            return bool(decision)
        votes = self.runtime.world.collectives.all_gather_object(bool(decision))
        return all(votes) if all_agree else any(votes)


def _always() -> bool:
    return True
