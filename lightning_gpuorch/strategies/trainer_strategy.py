"""``strategy="gpuorch"`` for the Trainer.

``predict`` runs on leased chunks and durable parts. ``validate`` and ``test`` give each replica a fixed share of the
batches and reduce over replicas. ``fit`` is Lightning's own DDP, in one world over the whole job.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.options import OrchestratorOptions
from lightning_gpuorch.parallel.tensor_parallel import applied_plan, empty_parameters
from lightning_gpuorch.predictions.loading.describe import describe
from lightning_gpuorch.strategies import lightning_internals
from lightning_gpuorch.strategies.base import StrategyShell
from lightning_gpuorch.strategies.launcher import Launcher
from lightning_gpuorch.strategies.replay import BatchCallbacks
from lightning_gpuorch.worker.model_setup import ParallelizeFn, first_batch, has_meta, refuse_meta
from lightning_gpuorch.worker.predict import PredictionJob

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy as _Base
else:
    _Base = object  # each package's own DDPStrategy comes after this class


class TrainerStrategy(StrategyShell, _Base):
    """Orchestrated inference under ``Trainer``; mixed in before the ``DDPStrategy`` of either package.

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
        replay_outputs: Drive the batch hooks of the user's callbacks over all batches and outputs of the job, on every rank,
            when it is complete. Without it a callback sees the batches that its rank computes. Prediction writers that have
            no batch hooks of their own, and progress bars, are left as they are.
        start_method: How several devices are started: ``popen`` runs the script again for each rank, ``fork`` forks
            this process, as notebooks need it.
        **options: Fields of :class:`~lightning_gpuorch.OrchestratorConfig`.

    Raises:
        ConfigurationError: An unknown option or a bad value.
    """

    strategy_name = "gpuorch"

    def __init__(
        self,
        config: OrchestratorConfig | None = None,
        *,
        parallelize_fn: ParallelizeFn | None = None,
        tensor_parallel_plan: Any = None,
        example_input: Any = None,
        output_dir: str | os.PathLike[str] | None = None,
        length_fn: Callable[[Any], int] | None = None,
        replay_outputs: bool = False,
        start_method: Literal["popen", "fork"] = "popen",
        **options: Unpack[OrchestratorOptions],
    ):
        self._init_shell(config, options, parallelize_fn, tensor_parallel_plan, example_input, output_dir, length_fn)
        super().__init__(
            cluster_environment=self.supervised_environment,  # type: ignore[arg-type]
            process_group_backend=self.config.backend if self.config.backend != "auto" else None,
        )
        self._start_method = start_method
        self._replay_outputs = replay_outputs
        self._batch_callbacks: BatchCallbacks | None = None
        self._pending: list[_PendingLoader] = []
        self._undo: list[Callable[[], None]] = []
        self._wants_predictions = False
        self._results: Any = None

    # Processes

    def _configure_launcher(self) -> None:
        self._launcher = Launcher(self, self._start_method)  # type: ignore[assignment]

    @property
    def num_processes(self) -> int:
        """Ranks on this node."""
        return StrategyShell.num_processes.fget(self)  # type: ignore[attr-defined,no-any-return]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """What training's sampler needs; other stages are shared out without one."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def set_world_ranks(self) -> None:
        """Leave the ranks as the supervisor or the launcher assigned them."""
        if self._worker is None:
            super().set_world_ranks()

    def setup_distributed(self) -> None:
        """Join the job; training forms one world over all ranks, everything else one per replica."""
        lightning_internals.reset_seed(self.package)
        self.set_world_ranks()
        trainer = self._trainer
        training = trainer.state.fn == "fit"
        self._start_runtime(training=training, evaluating=trainer.state.fn in ("validate", "test"))
        if training and self.tensor_parallel_size > 1:
            raise ConfigurationError(
                "strategy='gpuorch' does not train with tensor parallelism; use Lightning's ModelParallelStrategy for fit."
            )
        if self.runtime.mesh is not None and self.lightning_module is not None:
            self.lightning_module._device_mesh = self.runtime.mesh
        if not training:
            self._undo.append(lightning_internals.keep_user_dataloaders(trainer))
        elif self.world_size == 1:
            self._undo.append(lightning_internals.keep_user_samplers(trainer))
        if trainer.state.fn == "predict":
            self._undo.append(lightning_internals.own_predict_loop(trainer, self._batch_number, self._batches_done))
            self._pending, self._results, self.runtime.job = [], None, None
            self._wants_predictions = trainer.predict_loop.return_predictions
            if self._wants_predictions and self.config.keep_outputs is False:
                raise ConfigurationError(
                    "keep_outputs=False keeps no outputs, and trainer.predict is to return them: call it with "
                    "return_predictions=False."
                )

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @property
    def _training(self) -> bool:
        module = self.lightning_module
        return module is not None and module._trainer is not None and module._trainer.state.fn == "fit"

    # Model

    def configure_ddp(self) -> None:
        """Wrap the model, unless it is trained on one device: then there is no rank to share gradients with."""
        if self.world_size > 1:
            super().configure_ddp()

    def setup(self, trainer: pl.Trainer) -> None:
        """Put the model on its device, sharded if asked for; nothing is broadcast outside training."""
        if trainer.state.fn == "fit":
            assert self.lightning_module is not None
            self.model_setup.weights_change(self.lightning_module)
            if self.world_size == 1:
                self._layer_sync = None
            super().setup(trainer)
            return
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        predicting = trainer.state.fn == "predict"
        if self.world_size > 1 and not has_meta(self.model):
            self.model.eval()  # as the loop does; here layers that merge adapters do so while their weights are whole
        self.model = self.model_setup.prepare(self.model, self._first_batches if predicting else None, "predict_step")
        self.model_to_device()
        self.setup_precision_plugin()
        self._sync_metrics_over_job(self.model)

    def _first_batches(self) -> list[Any]:
        """The first batch of every loader of the predict call as the step will get it, on the CPU."""
        batches = [first_batch(loader) for loader in lightning_internals.predict_dataloaders(self._trainer)]
        return [
            None
            if batch is None
            else lightning_internals.transferred(self._trainer, batch, torch.device("cpu"), loader)
            for loader, batch in enumerate(batches)
        ]

    def model_to_device(self) -> None:
        """Move the model, unless its parameters are still to be read."""
        if self._training or self.model is None or not has_meta(self.model):
            super().model_to_device()

    @contextlib.contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Build a model where it can be cut; with ``empty_init`` its parameters take no memory.

        They are on meta then, and buffers are real.
        """
        empty = empty_parameters() if empty_init else contextlib.nullcontext()
        with empty, self._building_device, self.precision_plugin.tensor_init_context():
            yield

    # Weights

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Parameters on meta are cut first, then each rank reads its part."""
        return not self._training and self.lightning_module is not None and has_meta(self.lightning_module)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Load a Lightning checkpoint; of any other kind of checkpoint the weights are read in place later."""
        if not self._training and _is_plain_checkpoint(checkpoint_path):
            return {
                "state_dict": Path(checkpoint_path),
                "pytorch-lightning_version": self.package.version,
            }
        if self.restore_checkpoint_after_setup and type(self.checkpoint_io) is self.package.torch_checkpoint_io:
            checkpoint: dict[str, Any] = self.package.mapped_checkpoint_io().load_checkpoint(
                checkpoint_path, *args, **options
            )
            return checkpoint
        return super().load_checkpoint(checkpoint_path, *args, **options)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give the model its weights; a sharded one takes its part."""
        module, state = self.lightning_module, checkpoint["state_dict"]
        assert module is not None
        if self._training or not (isinstance(state, Path) or applied_plan(module) is not None or has_meta(module)):
            super().load_model_state_dict(checkpoint, strict)
            return
        self.model_setup.load(module, state, strict=strict)

    # Data

    def process_dataloader(self, dataloader: object) -> object:
        """Give this replica its part of a loader."""
        trainer = self._trainer
        if trainer.state.fn == "fit" or self.runtime._world is None:  # data may be set up without a stage
            return dataloader
        lightning_internals.add_worker_seeding(self.package, dataloader, self.global_rank)
        if trainer.state.fn == "predict":
            pending = _PendingLoader(self, dataloader, _limit(trainer.limit_predict_batches, dataloader))
            self._pending.append(pending)
            return pending
        if self.world_size == 1:
            return dataloader
        share = self.runtime.share(dataloader)
        replicas = self.runtime.world.topology.num_replicas
        batches = share.source.num_batches
        if batches is not None and batches < replicas:
            raise ConfigurationError(
                f"{trainer.state.fn} has {batches} batches for {replicas} replicas; a replica without a batch would leave "
                f"its metrics out of step. Use at most {max(batches, 1)} devices or a smaller batch size."
            )
        return share

    def _open_job(self) -> PredictionJob:
        if self.runtime.job is None:
            self.runtime.open_job(
                [pending.dataloader for pending in self._pending],
                self._trainer.default_root_dir,
                [pending.limit for pending in self._pending],
                self.model_setup.fingerprint(self.model) if self.model is not None else None,
                returns_outputs=self._wants_predictions or self._replay_outputs,
            )
        assert self.runtime.job is not None
        return self.runtime.job

    def _batch_number(self) -> int:
        return self._open_job().batches_in_flight.newest.number

    def _batches_done(self) -> int | None:
        if not self.is_global_zero or self._trainer.progress_bar_callback is None:
            return None
        return self._open_job().batches_done()

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a batch while the step before it computes, on CUDA; a ``transfer_batch_to_device`` of the user's decides."""
        transfers = self.runtime.transfers
        if transfers is not None and not self._training and device in (None, self.root_device):
            owners = (self.lightning_module, getattr(self._trainer, "datamodule", None))
            is_overridden = self.package.of_pytorch("utilities.model_helpers").is_overridden
            if not any(owner is not None and is_overridden("transfer_batch_to_device", owner) for owner in owners):
                batch = transfers.to_device(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    # Predict

    def on_predict_start(self) -> None:
        """Keep no predictions in memory: they are read back from the parts."""
        self._refuse_meta()
        self.runtime.transfer = self._transfer
        self._trainer.predict_loop.return_predictions = False
        self._batch_callbacks = BatchCallbacks(self._trainer, self._replay_outputs)
        self._undo.append(self._batch_callbacks.restore)

    def end_of_data(self) -> None:
        """The last batch is done: hooks that follow find all predictions of the job in the loop, as on one device."""
        job, callbacks, loop = self._open_job(), self._batch_callbacks, self._trainer.predict_loop
        loop.return_predictions = self._wants_predictions
        if self._wants_predictions and not lightning_internals.has_epoch_writer(self._trainer):
            lightning_internals.show_predictions(loop, self._finish, len(self._pending))
        if callbacks is None:
            return
        if self._replay_outputs:
            sources = [loader.source for loader in job.loaders]
            callbacks.replay(sources, self._finish(), self._transferred, self.root_device)
        elif self.is_global_zero:
            callbacks.warn_of_collections(job.steps, sum(map(job.num_batches, range(len(job.loaders)))))

    def _transferred(self, batch: Any, loader: int) -> Any:
        return lightning_internals.transferred(self._trainer, batch, self.root_device, loader)

    def on_validation_start(self) -> None:
        """Refuse a model whose weights were never read."""
        self._refuse_meta()

    def on_test_start(self) -> None:
        """Refuse a model whose weights were never read."""
        self._refuse_meta()

    def _refuse_meta(self) -> None:
        if self.lightning_module is not None:
            refuse_meta(self.lightning_module, "Pass ckpt_path=..., or give them values in configure_model.")

    def _transfer(self, batch: Any, loader: int) -> Any:
        """Bring a batch to the device the way the loop does."""
        assert self.lightning_module is not None
        batch = self.lightning_module.on_before_batch_transfer(self.precision_plugin.convert_input(batch), loader)
        return self.batch_to_device(batch, dataloader_idx=loader)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Compute one batch and keep its output."""
        job = self._open_job()
        if lightning_internals.takes_dataloader_iter(args[0]):
            return self._predict_step_on_iterator(job, *args)
        step = super().predict_step
        return job.run_step(lambda batch: step(batch, *args[1:], **kwargs), args[0])

    def _predict_step_on_iterator(self, job: PredictionJob, *args: Any) -> Any:
        output = super().predict_step(*args)
        taken = job.batches_in_flight.num_delivered
        if taken != 1:
            raise ConfigurationError(
                f"predict_step(dataloader_iter) took {taken} batches in one call; it must take exactly one, "
                "so that its output can be matched to samples."
            )
        return job.run_step(lambda batch: output, lightning_internals.consumed_batch(self._trainer))

    def on_predict_end(self) -> None:
        """Make everything durable and wait until the job is complete."""
        results, loop = self._finish(), self._trainer.predict_loop
        if self._wants_predictions:
            lightning_internals.show_predictions(loop, lambda: results, len(self._pending))

    def _finish(self) -> Any:
        """Wait until the job is complete, once; somebody may look at the predictions before the loop has ended."""
        if self._results is None:
            lightning_internals.refuse_stopped_by_hook(self._trainer)
            self._results = self._open_job().finish()
        return self._results

    def results(self) -> Any:
        """What ``trainer.predict`` returns: every prediction of the job; None without data, or if none were asked for."""
        if self._results is None and self._pending:  # an empty dataset: Lightning skips the loop and its hooks
            self._results = self._open_job().finish()
            return None
        return self._results if self._wants_predictions else None

    # Collectives

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks of the job."""
        if self._training:
            super().barrier(*args, **kwargs)
        else:
            self._job_barrier(args[0] if args else kwargs.get("name"))

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return rank ``src``'s object on all ranks of the job."""
        return super().broadcast(obj, src) if self._training else self._job_broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the replicas of the job."""
        return super().reduce(tensor, group, reduce_op) if self._training else self._job_reduce(tensor, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Stack every rank's tensor; shape ``(world_size, *tensor.shape)``."""
        return super().all_gather(tensor, group, sync_grads) if self._training else self._job_all_gather(tensor)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002 - Lightning's name
        """Whether all ranks (or any) decided so."""
        return super().reduce_boolean_decision(decision, all) if self._training else self._job_decide(decision, all)

    # End

    def on_exception(self, exception: BaseException) -> None:
        """Keep what is computed: whole chunks are written before the error goes on."""
        super().on_exception(exception)
        if self.runtime.job is not None:
            self.runtime.job.close()

    def teardown(self) -> None:
        """Undo what was changed on the Trainer. The model stays where it is: moving it back serves nobody."""
        while self._undo:
            self._undo.pop()()
        self.runtime.end_stage()
        if self._training:
            super().teardown()
            return
        assert self.accelerator is not None
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def _is_plain_checkpoint(path: Any) -> bool:
    """Whether a path is a checkpoint of weights alone: safetensors, an index, or a directory."""
    return os.path.isdir(path) or os.path.splitext(path)[1] in (".safetensors", ".json", ".bin")


class _PendingLoader:
    """Stands in for a loader until all of a predict call's loaders are known and the job can be opened."""

    def __init__(self, strategy: TrainerStrategy, dataloader: Any, limit: int | None):
        self.strategy, self.dataloader, self.limit = strategy, dataloader, limit
        self.batch_sampler = lightning_internals.leased_indices(strategy.package)
        self.batch_sampler.sampler = getattr(getattr(dataloader, "batch_sampler", None), "sampler", None)
        self.source = describe(dataloader)  # bad loaders are refused here, before anything starts

    def __getattr__(self, name: str) -> Any:
        """Whatever else is asked of it, as ``trainer.predict_dataloaders`` is: what the user's loader has."""
        if name == "dataloader":  # asked for before it is set, by copy and pickle
            raise AttributeError(name)
        return getattr(self.dataloader, name)

    def __reduce__(self) -> tuple[Any, ...]:
        """What a pickled Trainer takes along is the user's loader."""
        return _itself, (self.dataloader,)

    def __len__(self) -> int:
        """Batches of the uncut loader; Lightning applies its limit to it."""
        count = self.source.num_batches
        if count is None:
            raise TypeError("the length of this stream is not known")
        return count

    def __iter__(self) -> Iterator[Any]:
        job = self.strategy._open_job()
        index = self.strategy._pending.index(self)
        self.batch_sampler.reset()
        num_given = 0
        for batch in job.batches(index):
            num_given += 1
            ticket = job.batches_in_flight.newest
            self.batch_sampler.append(ticket.number, ticket.indices)
            yield batch
        num_batches = job.num_batches(index)
        if self.strategy.is_global_zero and num_given < num_batches:  # others have computed the rest
            lightning_internals.fill_progress_bar(self.strategy._trainer, num_batches, index)
        if index == len(self.strategy._pending) - 1:
            self.strategy.end_of_data()


def _itself(value: Any) -> Any:
    return value


def _limit(limit: int | float, dataloader: Any) -> int | None:
    """Batches to take, by Lightning's rules: a float is a share of the loader, an int a count."""
    if isinstance(limit, int):
        return limit
    if limit >= 1.0:
        return None
    count = describe(dataloader).num_batches
    return None if count is None else int(count * limit)
