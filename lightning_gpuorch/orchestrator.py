"""The face of the plugin for Fabric and for plain loops: set up, load, step, predict, clean up."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.errors import ConfigurationError, GPUOrchError
from lightning_gpuorch.memory import check_model_fits, memory_budget_bytes
from lightning_gpuorch.predictions.loader import SharedLoader
from lightning_gpuorch.runtime import Runtime
from lightning_gpuorch.tensors import fingerprint_weights, whole
from lightning_gpuorch.world import ExternalRanks, leave

log = logging.getLogger(__name__)


class MultiGPUOrchestrator:
    """Runs a model over a dataset on all devices of a job, outside the Trainer.

    Args:
        config: Settings; single fields may be given as keywords instead.
        fabric: A launched Fabric with ``strategy="gpuorch"``; without one, :meth:`initialize` joins the job itself.
        callbacks: Called around the loop by keyword, in addition to Fabric's own.
        output_dir: Where predictions are kept. Without it they live until the process ends.
        parallelize_fn: Called as ``parallelize_fn(module, device_mesh)``, where no Fabric strategy has one.
        length_fn: Gives the length of a sample, for dynamic batching; common types need none.
        **options: Fields of :class:`~lightning_gpuorch.OrchestratorConfig`.

    Example::

        fabric = Fabric(strategy="gpuorch", devices=2)
        fabric.launch()
        orchestrator = MultiGPUOrchestrator(fabric=fabric, output_dir="predictions")
        orchestrator.initialize()
        for output in orchestrator.predict(model, dataloader):
            ...  # this replica's batches, as they are computed
        everything = orchestrator.predictions
    """

    def __init__(
        self,
        config: OrchestratorConfig | None = None,
        *,
        fabric: Any = None,
        callbacks: Sequence[Any] = (),
        output_dir: str | os.PathLike[str] | None = None,
        parallelize_fn: Callable[..., torch.nn.Module] | None = None,
        length_fn: Callable[[Any], int] | None = None,
        **options: Any,
    ):
        strategy = getattr(fabric, "strategy", None)
        if fabric is not None and not isinstance(getattr(strategy, "runtime", None), Runtime):
            raise ConfigurationError(
                f"fabric uses {type(strategy).__name__}; MultiGPUOrchestrator needs Fabric(strategy='gpuorch')."
            )
        if fabric is not None:
            if config is not None or options:
                raise ConfigurationError("with a Fabric, give the settings to its strategy instead.")
            self.runtime: Runtime = fabric.strategy.runtime
            if output_dir is not None:
                self.runtime.output_dir = output_dir
        else:
            self.runtime = Runtime(OrchestratorConfig.resolve(config, **options), output_dir)
        if length_fn is not None:
            self.runtime.length_fn = length_fn
        self.fabric = fabric
        self.predictions: Any = None
        """Every prediction of the last :meth:`predict`, in dataset order, once it has run to its end."""
        self._callbacks = list(callbacks)
        self._parallelize_fn = parallelize_fn
        self._model: torch.nn.Module | None = None
        self._fingerprint: str | None = None
        self._health: Any = None
        self._steps = 0

    @property
    def config(self) -> OrchestratorConfig:
        """The configuration in force."""
        return self.runtime.config

    @property
    def global_rank(self) -> int:
        """Rank in the job."""
        return self.runtime.world.topology.rank

    @property
    def world_size(self) -> int:
        """Ranks in the job."""
        return self.runtime.world.topology.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self.global_rank == 0

    @property
    def strategy(self) -> Any:
        """What callbacks look at: Fabric's strategy, or this object, which has ``runtime`` as well."""
        return self.fabric.strategy if self.fabric is not None else self

    def initialize(
        self,
        rank: int | None = None,
        world_size: int | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        """Join the job. With a launched Fabric, or under ``gpuorch run``, no argument is needed.

        Args:
            rank: Global rank; default from the environment variable ``RANK``, else 0.
            world_size: Ranks in the job; default from ``WORLD_SIZE``, else 1.
            master_addr: Host of rank 0; default from ``MASTER_ADDR``, else 127.0.0.1.
            master_port: Port of rank 0; default from ``MASTER_PORT``, else 29500.
            device: Device to compute on; default the local rank's GPU, or the CPU.

        Raises:
            ConfigurationError: The ranks do not fit the configuration.
            ControlPlaneError: The other ranks cannot be reached.
        """
        if self.fabric is not None:
            self.runtime.world  # noqa: B018 - raises a clear error if Fabric was not launched
            return
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if device is None:
            device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        external = ExternalRanks(
            rank=int(os.environ.get("RANK", 0)) if rank is None else rank,
            world_size=int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size,
            local_rank=local_rank,
            main_address=master_addr or os.environ.get("MASTER_ADDR", "127.0.0.1"),
            main_port=master_port or int(os.environ.get("MASTER_PORT", 29500)),
        )
        self.runtime.start(torch.device(device), external)

    def load_distributed_model(
        self, source: str | os.PathLike[str] | torch.nn.Module, model: torch.nn.Module | None = None
    ) -> torch.nn.Module:
        """Get a model ready for inference on this rank: weights, shards, device, eval mode.

        Args:
            source: A module, or a file of weights for ``model``: ``.safetensors``, ``.pt``, ``.bin`` or a Lightning
                ``.ckpt``.
            model: The module that takes the weights.

        Returns:
            The module this rank runs.

        Raises:
            ConfigurationError: The file cannot be read, or its keys do not match the module.
            ModelDoesNotFitError: The module is larger than the memory budget.
        """
        if isinstance(source, torch.nn.Module):
            model = source
        elif model is None:
            raise ConfigurationError(f"load_distributed_model({str(source)!r}) needs model=, the module to load into.")
        else:
            _load_weights(Path(source), model)
        topology = self.runtime.world.topology
        self._fingerprint = fingerprint_weights(model)  # of the whole model: shards differ from rank to rank
        if self.fabric is not None:
            self._model = self.fabric.setup_module(model)
            return self._model
        check_model_fits(
            model,
            memory_budget_bytes(self.runtime.device, self.config.memory_fraction),
            tensor_parallel_size=topology.tensor_parallel_size,
        )
        if self._parallelize_fn is not None and topology.tensor_parallel_size > 1:
            model = self._parallelize_fn(model, self.runtime.mesh)
        self._model = model.to(self.runtime.device).eval()
        return self._model

    def run_inference_step(self, batch: Any, step: Callable[[Any], Any] | None = None) -> Any:
        """Compute one batch, the same on all ranks of the tensor-parallel group.

        In order: the ranks of the group compare their input, the device's health is looked at, the model runs, sharded
        outputs are made whole, and the group waits for its slowest rank.

        Args:
            batch: Input, on any device.
            step: Computes a batch; default calls the loaded model with it.

        Returns:
            The model's output; DTensors are gathered.

        Raises:
            InputMismatchError: The ranks of the group were given different batches.
        """
        batch = to_device(batch, self.runtime.device)
        self.runtime.check_same_input(batch)
        return self._compute(batch, step)

    def _compute(self, batch: Any, step: Callable[[Any], Any] | None) -> Any:
        if self._health is not None:
            self._health.check_health()
        output = self._forward(batch, step)
        if self.runtime.world.topology.tensor_parallel_size > 1:
            output = whole(output)
            self._group_barrier()
        self._steps += 1
        return output

    def predict(
        self,
        model: torch.nn.Module,
        dataloader: Iterable[Any],
        *,
        step: Callable[[Any], Any] | None = None,
        limit_batches: int | None = None,
    ) -> Iterator[Any]:
        """Run a model over a dataloader; every rank of the job must call it.

        Chunks of the data are leased to replicas and made durable; callbacks are driven as the Trainer drives them.

        Args:
            model: What :meth:`load_distributed_model` returned, or a bare module.
            dataloader: A ``DataLoader`` or any iterable that can be iterated again; set up by Fabric or not.
            step: Computes a batch; default calls the model with it.
            limit_batches: Batches of the job to compute at most.

        Yields:
            The output of each batch this replica computes. All outputs of the job are in :attr:`predictions` at the end.

        Raises:
            MissingPredictionsError: Samples are missing at the end; they are named.
        """
        known = self._fingerprint if model is self._model else None
        self._model = model
        setting = self.config.model_fingerprint
        fingerprint = {"auto": known, "off": None}.get(setting, setting)
        if fingerprint is None and setting == "auto" and self.runtime.world.topology.tensor_parallel_size == 1:
            fingerprint = fingerprint_weights(model)
        job = self.runtime.open_job([_unwrap(dataloader)], Path.cwd(), [limit_batches], fingerprint)
        self._call("on_predict_start")
        try:
            for number, batch in enumerate(job.loaders[0]):
                ticket = job.take()
                batch = to_device(batch, self.runtime.device)
                self._call("on_predict_batch_start", batch=batch, batch_idx=number)
                output = job.run_step(functools.partial(self._compute, step=step), batch, ticket)
                self._call("on_predict_batch_end", outputs=output, batch=batch, batch_idx=number)
                yield output
            self.predictions = job.finish()
        except GeneratorExit:
            raise
        except BaseException as error:
            self._call("on_exception", exception=error)
            raise
        finally:
            job.close()
            self._call("on_predict_end")

    def cleanup(self) -> None:
        """Leave the job and take down the process group; safe to call again."""
        self._model = None
        if self.fabric is None:
            leave()

    def _forward(self, batch: Any, step: Callable[[Any], Any] | None) -> Any:
        # DTensor's operators are not all decomposed under inference_mode (pytorch#142190), so shards run under no_grad.
        sharded = self.runtime.world.topology.tensor_parallel_size > 1
        with torch.no_grad() if sharded else torch.inference_mode():
            if step is not None:
                return step(batch)
            if self._model is None:
                raise GPUOrchError("no model: call load_distributed_model first.")
            if isinstance(batch, Mapping):
                return self._model(**batch)
            if isinstance(batch, (list, tuple)):
                return self._model(*batch)
            return self._model(batch)

    def _group_barrier(self) -> None:
        """Wait for the slowest rank of the tensor-parallel group."""
        import torch.distributed as dist

        mesh = self.runtime.mesh
        group = mesh.get_group("tensor_parallel") if mesh is not None else None
        on_gpu = self.runtime.device.type == "cuda"
        dist.barrier(group, device_ids=[self.runtime.device.index] if on_gpu else None)

    def _call(self, hook: str, **arguments: Any) -> None:
        runner = self.fabric if self.fabric is not None else self
        if self.fabric is not None:
            self.fabric.call(hook, trainer=runner, pl_module=self._model, **arguments)
        for callback in self._callbacks:
            method = getattr(callback, hook, None)
            if method is not None:
                method(trainer=runner, pl_module=self._model, **arguments)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch, and every object that knows how to move itself."""
    if hasattr(batch, "to") and not isinstance(batch, torch.Tensor):
        return batch.to(device)
    return apply_to_collection(batch, torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True))


def _unwrap(dataloader: Any) -> Any:
    """The user's own loader, under Fabric's wrapper and under the share it would get in a plain loop."""
    inner = getattr(dataloader, "_dataloader", dataloader)
    return inner.source.loader if isinstance(inner, SharedLoader) else inner


def _load_weights(path: Path, model: torch.nn.Module) -> None:
    if not path.exists():
        raise ConfigurationError(f"no weights at {path}.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    elif path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        state = state.get("state_dict", state)
    else:
        raise ConfigurationError(f"{path}: weights are read from .safetensors, .pt, .pth, .bin and .ckpt files.")
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ConfigurationError(
            f"{path} does not match {type(model).__name__}: missing {sorted(missing)[:8]}, unexpected "
            f"{sorted(unexpected)[:8]} ({len(missing)} and {len(unexpected)} in all)."
        )
