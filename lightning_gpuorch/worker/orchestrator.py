"""The face of the plugin for Fabric and for plain loops: set up, load, step, predict, clean up."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from typing_extensions import Unpack

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.errors import ConfigurationError, GPUOrchError
from lightning_gpuorch.options import OrchestratorOptions, refuse_unknown
from lightning_gpuorch.parallel.tensor_parallel import build_model
from lightning_gpuorch.predictions.loading.shared_loader import SharedLoader
from lightning_gpuorch.predictions.samples.tensors import to_device
from lightning_gpuorch.worker.joining import ExternalRanks
from lightning_gpuorch.worker.model_setup import ModelSetup, ParallelizeFn, first_batch, refuse_meta
from lightning_gpuorch.worker.runtime import Runtime
from lightning_gpuorch.worker.session import leave

log = logging.getLogger(__name__)


class MultiGPUOrchestrator:
    """Runs a model over a dataset on all devices of a job, outside the Trainer.

    Args:
        config: Settings; single fields may be given as keywords instead.
        fabric: A launched Fabric with ``strategy="gpuorch"``; without one, :meth:`initialize` joins the job itself.
        callbacks: Called around the loop by keyword, in addition to Fabric's own.
        output_dir: Where predictions are kept. Without it they live until the process ends.
        parallelize_fn: Called as ``parallelize_fn(module, device_mesh)``, where no Fabric strategy has one.
        tensor_parallel_plan: A ready plan, instead of ``parallelize_fn``; it is verified.
        example_input: What models are called with, where they do not say so themselves.
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
        parallelize_fn: ParallelizeFn | None = None,
        tensor_parallel_plan: Any = None,
        example_input: Any = None,
        length_fn: Callable[[Any], int] | None = None,
        **options: Unpack[OrchestratorOptions],
    ):
        refuse_unknown(options, MultiGPUOrchestrator)
        strategy = getattr(fabric, "strategy", None)
        if fabric is not None and not isinstance(getattr(strategy, "runtime", None), Runtime):
            raise ConfigurationError(
                f"fabric uses {type(strategy).__name__}; MultiGPUOrchestrator needs Fabric(strategy='gpuorch')."
            )
        if fabric is not None:
            given = (parallelize_fn, tensor_parallel_plan, example_input)
            if config is not None or options or any(value is not None for value in given):
                raise ConfigurationError("with a Fabric, give the settings to its strategy instead.")
            self.runtime: Runtime = fabric.strategy.runtime
            self.model_setup: ModelSetup = fabric.strategy.model_setup
            if output_dir is not None:
                self.runtime.set_output_dir(output_dir)
        else:
            self.runtime = Runtime(OrchestratorConfig.resolve(config, **options), output_dir)
            self.model_setup = ModelSetup(self.runtime, parallelize_fn, tensor_parallel_plan, example_input)
        if length_fn is not None:
            self.runtime.length_fn = length_fn
        self.fabric = fabric
        self.predictions: Any = None
        """Every prediction of the last :meth:`predict`, in dataset order, once it has run to its end."""
        self._callbacks = list(callbacks)
        self._model: torch.nn.Module | None = None
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
            self.fabric.strategy.begin_without_launch()
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
        """Get a model ready for inference on this rank: its share of the weights, device, eval mode.

        Each rank reads only what it keeps. A model built in ``fabric.init_module(empty_init=True)`` or with
        :func:`~lightning_gpuorch.parallel.tensor_parallel.empty_parameters` never takes more memory than that.

        Args:
            source: A module; or a checkpoint for ``model``: safetensors (a file, an index, a directory), ``.bin``,
                ``.pt``, a Lightning ``.ckpt``, a torch distributed checkpoint, a transformers directory.
            model: The module that takes the weights; may be left out for a transformers directory.

        Returns:
            The module this rank runs.

        Raises:
            ConfigurationError: There is no module, or one without values.
            TensorParallelError: The checkpoint is damaged, incomplete, or of another model; or the model has to be cut and
                there is no verified plan.
            ModelDoesNotFitError: The module is larger than the memory budget.
        """
        checkpoint = None if isinstance(source, torch.nn.Module) else Path(source)
        if isinstance(source, torch.nn.Module):
            model = source
            refuse_meta(model, "Pass the checkpoint: load_distributed_model(path, model).")
        elif model is None:
            if not (Path(source) / "config.json").is_file():
                raise ConfigurationError(
                    f"load_distributed_model({str(source)!r}) needs model=, the module to load into; only a directory with "
                    "a transformers config.json says itself what to build."
                )
            model, _ = build_model(os.fspath(source))
        if checkpoint is not None and not checkpoint.exists():
            raise ConfigurationError(f"no checkpoint at {checkpoint}.")
        if checkpoint is not None and self.model_setup.parallelize_fn is not None:
            self.model_setup.load(model, checkpoint)  # whole: only parallelize_fn knows how it will be cut
            checkpoint = None
        if self.fabric is not None:
            self._model = self.fabric.setup_module(model).eval()
        else:
            model.eval()
            self._model = self.model_setup.prepare(model).eval()
        if checkpoint is not None:
            model.train()  # layers that merged adapters part them again: the checkpoint's weights are not merged
            self.model_setup.load(model, checkpoint)
            model.eval()
        elif self.fabric is None:
            self._model = self._model.to(self.runtime.device)
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
            GroupOutOfMemoryError: Memory ran out on one rank of a tensor-parallel group; all of its ranks raise this,
                and may go on with a smaller batch.
        """
        return self.runtime.compute_together(
            functools.partial(self._compute, step=step), to_device(batch, self.runtime.device)
        )

    def _compute(self, batch: Any, step: Callable[[Any], Any] | None) -> Any:
        if self._health is not None:
            self._health.check_health()
        output = self._forward(batch, step)
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

        Chunks of the data are leased to replicas and made durable; callbacks are driven as the Trainer drives them. A
        batch is done, and its output as it is then is kept, when the next one is asked for. A loop that is left before its
        end keeps all but the batch it had in hand.

        Args:
            model: What :meth:`load_distributed_model` returned, or a bare module.
            dataloader: A ``DataLoader`` or any iterable that can be iterated again; set up by Fabric or not. A map-style
                ``Dataset`` is put into batches of :attr:`~lightning_gpuorch.OrchestratorConfig.batch_size`.
            step: Computes a batch; default calls the model with it.
            limit_batches: Batches of the job to compute at most.

        Yields:
            The output of each batch this replica computes. All outputs of the job are in :attr:`predictions` at the end.

        Raises:
            MissingPredictionsError: Samples are missing at the end; they are named.
        """
        loader = _unwrap(dataloader, self.config.batch_size)
        inner = getattr(model, "_original_module", model)  # under Fabric's wrapper
        if not self.model_setup.is_ready(inner):
            prepared = self.model_setup.prepare(inner.eval(), lambda: [first_batch(loader)], step or "")
            model = inner = prepared.eval().to(self.runtime.device)
        if inner.training:  # as after training; modules that are left in train mode on purpose stay so
            model.eval()
        self._model = model
        fingerprint = self.model_setup.fingerprint(inner)
        job = self.runtime.open_job([loader], Path.cwd(), [limit_batches], fingerprint)
        self._call("on_predict_start")
        try:
            for batch in job.batches(0):
                number = job.batches_in_flight.newest.number
                if self.runtime.transfers is not None:
                    batch = self.runtime.transfers.to_device(batch)
                batch = to_device(batch, self.runtime.device)
                with self._inference_mode():
                    self._call("on_predict_batch_start", batch=batch, batch_idx=number)
                output = job.run_step(functools.partial(self._compute, step=step), batch)
                with self._inference_mode():  # a callback may change the output in place
                    self._call("on_predict_batch_end", outputs=output, batch=batch, batch_idx=number)
                yield output
            self.predictions = job.finish()
        except GeneratorExit:
            job.leave_batch()
            raise
        except BaseException as error:
            self._call("on_exception", exception=error)
            raise
        finally:
            job.close()
            self._call("on_predict_end")

    def progress(self) -> dict[str, Any]:
        """How far the last :meth:`predict` is, over all ranks.

        Returns:
            ``chunks``, ``chunks_done`` (durable), ``chunks_computed`` (with what is computed of others), ``samples_done``
            (made durable in this run, by whichever rank) and ``restarts``.

        Raises:
            GPUOrchError: Nothing was predicted yet.
        """
        if self.runtime.job is None:
            raise GPUOrchError("nothing was predicted yet.")
        return self.runtime.job.progress()

    def cleanup(self) -> None:
        """Leave the job and take down the process group; safe to call again."""
        self._model = None
        if self.fabric is None:
            leave()

    def _forward(self, batch: Any, step: Callable[[Any], Any] | None) -> Any:
        with self._inference_mode():
            if step is not None:
                return step(batch)
            if self._model is None:
                raise GPUOrchError("no model: call load_distributed_model first.")
            if isinstance(batch, Mapping):
                return self._model(**batch)
            if isinstance(batch, (list, tuple)):
                return self._model(*batch)
            return self._model(batch)

    def _inference_mode(self) -> AbstractContextManager[Any]:
        # DTensor's operators are not all decomposed under inference_mode (pytorch#142190), so they run under no_grad.
        dtensors = self.model_setup.parallelize_fn is not None and self.runtime.world.topology.tensor_parallel_size > 1
        return torch.no_grad() if dtensors else torch.inference_mode()

    def _call(self, hook: str, **arguments: Any) -> None:
        runner = self.fabric if self.fabric is not None else self
        if self.fabric is not None:
            self.fabric.call(hook, trainer=runner, pl_module=self._model, **arguments)
        for callback in self._callbacks:
            method = getattr(callback, hook, None)
            if method is not None:
                method(trainer=runner, pl_module=self._model, **arguments)


def _unwrap(dataloader: Any, batch_size: int) -> Any:
    """The user's own loader, under Fabric's wrapper and under the share it would get in a plain loop; one of a dataset."""
    inner = getattr(dataloader, "_dataloader", dataloader)
    if isinstance(inner, Dataset) and not isinstance(inner, IterableDataset):
        return DataLoader(inner, batch_size=batch_size)
    return inner.source.loader if isinstance(inner, SharedLoader) else inner
