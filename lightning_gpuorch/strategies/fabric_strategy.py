"""``strategy="gpuorch"`` for Fabric.

A plain loop over ``fabric.setup_dataloaders(...)`` gets a fixed share of the batches per replica. Predictions that
must survive anything go through :class:`~lightning_gpuorch.MultiGPUOrchestrator`, which leases chunks and writes parts.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.devices.memory import memory_budget_bytes, model_bytes
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.options import OrchestratorOptions
from lightning_gpuorch.parallel.tensor_parallel import applied_plan, empty_parameters
from lightning_gpuorch.strategies import lightning_internals
from lightning_gpuorch.strategies.base import StrategyShell
from lightning_gpuorch.strategies.launcher import Launcher
from lightning_gpuorch.worker.model_setup import ParallelizeFn, has_meta

if TYPE_CHECKING:
    from lightning.fabric.strategies import DDPStrategy as _Base
else:
    _Base = object  # each package's own DDPStrategy comes after this class

log = logging.getLogger(__name__)


@functools.cache
def _of_one_device(kind: type[FabricStrategy]) -> type[FabricStrategy]:
    """A strategy that Fabric takes for one of a single device: it asks for no launch, and synchronises no gradients."""
    members = {"__module__": kind.__module__, "__doc__": kind.__doc__, "has_one_device": True}
    single = type(kind.__name__, (kind,), members)
    kind.package.of_fabric("strategies").SingleDeviceStrategy.register(single)
    return single


def on_one_device(backward: Callable[..., None]) -> Callable[..., None]:
    """Lightning's ``backward``, refused on several devices.

    It stays recognisable as Lightning's: Fabric forbids ``loss.backward()`` under a strategy that has overridden it.
    """

    @functools.wraps(backward)
    def checked(self: FabricStrategy, *args: Any, **kwargs: Any) -> None:
        self.refuse_to_train()
        backward(self, *args, **kwargs)

    return checked


class FabricStrategy(StrategyShell, _Base):  # type: ignore[misc]
    """Orchestrated inference under ``Fabric``; mixed in before the ``DDPStrategy`` of either package.

    Args:
        config: Settings; single fields may be given as keywords instead.
        parallelize_fn: Called as ``parallelize_fn(module, device_mesh)`` with a mesh whose axes are named
            ``data_parallel`` and ``tensor_parallel``; returns the parallelized module.
        tensor_parallel_plan: A ready plan, instead of ``parallelize_fn``.
        example_input: An input for planning, where the model has none.
        output_dir: Where predictions are kept. A rerun with the same directory computes only what is missing. Without
            it they live until the process ends.
        length_fn: Gives the length of a sample, for dynamic batching; text, sequences, tensors and dicts with
            ``input_ids`` and the like need none.
        start_method: How several devices are started: ``popen`` runs the script again for each rank, ``fork`` forks
            this process, as notebooks need it.
        **options: Fields of :class:`~lightning_gpuorch.OrchestratorConfig`.

    Raises:
        ConfigurationError: An unknown option or a bad value.
    """

    has_one_device = False
    """Whether the job is known to be this process: then models are trained as well."""

    def __init__(
        self,
        config: OrchestratorConfig | None = None,
        *,
        parallelize_fn: ParallelizeFn | None = None,
        tensor_parallel_plan: Any = None,
        example_input: Any = None,
        output_dir: str | os.PathLike[str] | None = None,
        length_fn: Callable[[Any], int] | None = None,
        start_method: Literal["popen", "fork"] = "popen",
        **options: Unpack[OrchestratorOptions],
    ):
        self._init_shell(config, options, parallelize_fn, tensor_parallel_plan, example_input, output_dir, length_fn)
        super().__init__(
            cluster_environment=self.supervised_environment,  # type: ignore[arg-type]
            checkpoint_io=self.package.mapped_checkpoint_io(),
            process_group_backend=self.config.backend if self.config.backend != "auto" else None,
        )
        self._start_method = start_method
        if os.environ.get("LT_STRATEGY") == "gpuorch":
            # Launched by `gpuorch run`, a script may name the strategy or make it: Fabric would refuse an object as a
            # contradiction to the name, or replace it by one without its options.
            del os.environ["LT_STRATEGY"]

    # Processes

    def _configure_launcher(self) -> None:
        launcher = Launcher(self, self._start_method)
        self._launcher = launcher  # type: ignore[assignment]
        if launcher.runs_alone:
            self._become_one_device()

    def _set_world_ranks(self) -> None:
        if self._worker is None:
            super()._set_world_ranks()

    def _setup_distributed(self) -> None:
        # Fabric's command line forbids launch() after it has launched the script; a script that is also run with
        # `python` has that call, so it is allowed again once the processes stand.
        os.environ.pop("LT_CLI_USED", None)
        lightning_internals.reset_seed(self.package)
        self._set_world_ranks()
        self._start_runtime()
        if self.runtime.world.topology.world_size == 1:
            self._become_one_device()

    def _become_one_device(self) -> None:
        if not self.has_one_device:
            self.__class__ = _of_one_device(type(self))

    def begin_without_launch(self) -> None:
        """On one device, do what ``fabric.launch()`` does, unless it was called."""
        if self.has_one_device and self.runtime._world is None:
            assert self.launcher is not None
            self.launcher.launch(self._setup_distributed)

    # Model and data

    def setup_module(self, module: torch.nn.Module) -> torch.nn.Module:  # type: ignore[override]
        """Prepare a module: sharded if need be, on the device, never wrapped.

        On several devices it is put in eval mode. On one device it may be trained, and its mode is left as it is.

        Parameters on meta stay there, cut to this rank's part, until ``fabric.load_raw`` or
        :meth:`~lightning_gpuorch.MultiGPUOrchestrator.load_distributed_model` gives them values.
        """
        self.begin_without_launch()
        if self.has_one_device:
            module = self.model_setup.prepare(module)
        else:
            if not has_meta(module):
                module.eval()  # here layers that merge adapters do so while their weights are whole
            module = self.model_setup.prepare(module).eval()
        if not has_meta(module):
            super().module_to_device(module)
        self._sync_metrics_over_job(module)
        return module

    def module_to_device(self, module: torch.nn.Module) -> None:
        """Move a module; one on meta, or too large to be moved before it is cut, waits for :meth:`setup_module`."""
        budget = memory_budget_bytes(self.root_device, self.config.memory_fraction)
        if not has_meta(module) and model_bytes(module).total <= budget:
            super().module_to_device(module)

    @contextlib.contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Build a module where it can be cut; with ``empty_init`` its parameters take no memory.

        They are on meta then, and buffers are real.
        """
        empty = empty_parameters() if empty_init else contextlib.nullcontext()
        with empty, self._building_device, self.precision.module_init_context():
            yield

    def load_checkpoint(
        self, path: Any, state: Any = None, strict: bool = True, *args: Any, **options: Any
    ) -> dict[str, Any]:
        """Load a checkpoint. A sharded module, or one on meta, reads its part of any kind of checkpoint."""
        if isinstance(state, torch.nn.Module) and self._loads_by_part(state):
            self.model_setup.load(state, path, strict=strict)
            return {}
        return super().load_checkpoint(path, state, strict, *args, **options)

    def load_module_state_dict(self, module: torch.nn.Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Load a state dict of a whole model; a sharded module takes its part."""
        if self._loads_by_part(module):
            self.model_setup.load(module, state_dict, strict=strict)
        else:
            super().load_module_state_dict(module, state_dict, strict)

    @staticmethod
    def _loads_by_part(module: torch.nn.Module) -> bool:
        return applied_plan(module) is not None or has_meta(module)

    def process_dataloader(self, dataloader: Any) -> Any:
        """Give this replica its share of a loader."""
        if self.config.enable_dynamic_batching:
            log.warning(
                "enable_dynamic_batching has no effect on a loader from fabric.setup_dataloaders, whose batches are yours "
                "to loop over; give the loader itself to MultiGPUOrchestrator.predict."
            )
        return dataloader if self.world_size == 1 else self.runtime.share(dataloader)

    # Training

    def setup_module_and_optimizers(
        self, module: torch.nn.Module, optimizers: list[Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Prepare what is trained on one device; refused on several, before the module is touched."""
        self.refuse_to_train()
        return super().setup_module_and_optimizers(module, optimizers, *args, **kwargs)

    def setup_optimizer(self, optimizer: Any) -> Any:
        """Take an optimizer as it is, on one device; refused on several, and of parameters on meta.

        Raises:
            ConfigurationError: Its parameters have no values yet; loading would put others in their place.
        """
        self.refuse_to_train()
        if any(parameter.is_meta for group in optimizer.param_groups for parameter in group["params"]):
            raise ConfigurationError(
                f"{type(optimizer).__name__} has parameters without values, and loading puts others in their place. Load "
                "the weights first (fabric.setup_module, fabric.load_raw), then make the optimizer."
            )
        self.model_setup.weights_change()
        return optimizer

    def refuse_to_train(self) -> None:
        """Refuse on several devices.

        Raises:
            ConfigurationError: There are several.
        """
        if not self.has_one_device:
            raise ConfigurationError(
                f"strategy='gpuorch' trains under Fabric on one device only, and this job has {self.world_size}: their "
                "gradients would not be synchronised. Train with Fabric(strategy='ddp') or Trainer(strategy='gpuorch').fit. "
                "Gradients within one rank, as for saliency, are what loss.backward() or torch.autograd.grad gives."
            )

    # Collectives

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks of the job."""
        self._job_barrier(args[0] if args else kwargs.get("name"))

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return rank ``src``'s object on all ranks of the job."""
        return self._job_broadcast(obj, src)

    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the replicas of the job."""
        return self._job_reduce(tensor, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Stack every rank's tensor; shape ``(world_size, *tensor.shape)``."""
        return self._job_all_gather(tensor)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002 - Lightning's name
        """Whether all ranks (or any) decided so."""
        return self._job_decide(decision, all)
