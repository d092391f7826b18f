"""Out-of-memory errors in a predict step are survived: the batch is computed in parts."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.utils._pytree import tree_leaves

from lightning_gpuorch.batching import BatchHalver, OOMEvent, SingleSampleOOMError
from lightning_gpuorch.memory import memory_summary
from lightning_gpuorch.telemetry.current import observe_oom

log = logging.getLogger(__name__)


class OOMBatchHalving(Callback):
    """Computes a batch that does not fit into memory in parts, and gives the output of the whole.

    The parts are halves, quarters and so on; the size that fits is remembered per shape of samples and grows back with
    care. Outputs of every structure are merged in order; one that is a reduction over the batch is refused by name.

    With ``strategy="gpuorch"``, under the Trainer and under Fabric, a sample that does not fit alone is given up and
    named, and the others go on; the ranks of a tensor-parallel group cut alike, whichever of them ran out of memory.
    With other strategies ``predict_step`` of the module is wrapped while ``predict`` runs, and such a sample ends the
    run with :class:`~lightning_gpuorch.batching.SingleSampleOOMError`. Other strategies that communicate inside of a
    step (FSDP, DeepSpeed, ModelParallel) are left alone, since a rank that halves by itself would leave its peers
    waiting.

    Args:
        on_oom: Called with each :class:`~lightning_gpuorch.batching.OOMEvent`, on the rank that ran out of memory.

    Attributes:
        num_ooms: Errors caught, over all predict calls.
        num_splits: Batches computed in parts.
        num_lost: Samples given up.
    """

    def __init__(self, on_oom: Callable[[OOMEvent], Any] | None = None):
        self.num_ooms = self.num_splits = self.num_lost = 0
        self._on_oom = on_oom
        self._halvers: dict[int, BatchHalver] = {}
        self._place = (0, 0)
        self._undo: Callable[[], None] | None = None

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Stand around the step of the strategy's runtime or of the module."""
        self._stop()
        strategy = trainer.strategy
        runtime = getattr(strategy, "runtime", None)
        step = getattr(pl_module, "predict_step", None)
        if step is not None and "dataloader_iter" in inspect.signature(step).parameters:
            log.warning("OOMBatchHalving: predict_step(dataloader_iter) takes its batches itself; they are not halved")
        elif runtime is not None:
            self._wrap_runtime(trainer, pl_module, runtime)
        elif trainer.world_size > 1 and isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            log.warning("OOMBatchHalving: inactive, %s communicates inside of a step", type(strategy).__name__)
        elif step is None or not _is_trainer(trainer):
            log.warning(
                "OOMBatchHalving: inactive, this is a loop of its own; use lightning_gpuorch.batching.BatchHalver"
            )
        else:
            self._wrap_module(trainer, pl_module, step)

    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note which batch comes next."""
        self._place = (batch_idx, dataloader_idx)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Step aside."""
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Step aside."""
        self._stop()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Step aside."""
        self._stop()

    def _stop(self) -> None:
        undo, self._undo = self._undo, None
        if undo is None:
            return
        undo()
        for halver in self._halvers.values():
            self.num_ooms += halver.num_ooms
            self.num_splits += halver.num_splits
            self.num_lost += halver.num_lost
        self._halvers.clear()
        if self.num_ooms:
            log.info(
                "memory ran out %d times; %d batches were computed in parts, %d samples given up",
                self.num_ooms,
                self.num_splits,
                self.num_lost,
            )

    def _halver(self, trainer: Any, loader: int) -> BatchHalver:
        """One per dataloader: their steps may lay out outputs in different ways."""
        if loader not in self._halvers:
            strategy = trainer.strategy
            runtime = getattr(strategy, "runtime", None)
            self._halvers[loader] = BatchHalver(
                functools.partial(self._take_oom, runtime),
                functools.partial(memory_summary, strategy.root_device),
                outputs_to_host=runtime is not None and runtime.world.topology.tensor_parallel_size > 1,
            )
        return self._halvers[loader]

    def _take_oom(self, runtime: Any, event: OOMEvent) -> None:
        recovery = None if runtime is None else runtime.world.recovery
        if recovery is not None and recovery.last is not None and not recovery.last.own:
            return  # the rank of the group that ran out of memory tells it
        fields: dict[str, Any] = {} if event.next_size else {"lost_samples": event.size}
        if recovery is not None:
            fields["recovery_seconds"] = recovery.last.seconds
        observe_oom(event.size, event.next_size or None, **fields)
        if self._on_oom is not None:
            self._on_oom(event)

    def _wrap_runtime(self, trainer: Any, pl_module: Any, runtime: Any) -> None:
        if runtime.world.topology.tensor_parallel_size > 1 and runtime.world.recovery is None:
            log.warning("OOMBatchHalving: inactive, enable_group_recovery=False lets no ranks halve together")
            return

        def wrapper(call: Callable[[Any], Any], batch: Any, ticket: Any) -> Any:
            halver = self._halver(trainer, ticket.loader)
            recollate = _on_device(trainer, pl_module, ticket) if ticket.recollate is not None else None
            if ticket.size is None:  # a stream: nobody could compute a lost sample later
                return halver.run(call, batch, recollate=recollate)
            halved = halver.run_surviving(call, batch, size=ticket.size, recollate=recollate)
            if halved.lost:
                runtime.job.lose(halved.lost, ticket, "out of memory with this sample alone")
            return halved.output

        runtime.step_wrappers.append(wrapper)
        self._undo = functools.partial(runtime.step_wrappers.remove, wrapper)

    def _wrap_module(self, trainer: Any, pl_module: Any, step: Callable[..., Any]) -> None:
        own = pl_module.__dict__.get("predict_step")  # somebody else may have put one there

        # wraps: Lightning looks at the signature to decide which arguments to pass.
        @functools.wraps(step)
        def halving_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            batch_idx, loader = self._place
            indices = _indices(trainer, loader, batch_idx)
            halver = self._halver(trainer, loader)
            recollate = None if indices is None else _recollate(trainer, pl_module, loader, indices)
            try:
                return halver.run(
                    lambda part: step(part, *args, **kwargs),
                    batch,
                    size=None if indices is None else len(indices),
                    recollate=recollate,
                )
            except SingleSampleOOMError as error:
                if indices is None:
                    raise
                raise SingleSampleOOMError(
                    f"{error} It is sample {indices[error.position]} of the dataset of dataloader {loader}. With "
                    "strategy='gpuorch' the run would go on without it.",
                    error.position,
                ) from None

        pl_module.predict_step = halving_step

        def undo() -> None:
            del pl_module.predict_step
            if own is not None:
                pl_module.predict_step = own

        self._undo = undo


def _is_trainer(trainer: Any) -> bool:
    return hasattr(trainer, "predict_loop")


def _loader(trainer: Any, number: int) -> Any:
    return tree_leaves(trainer.predict_dataloaders)[number]


def _indices(trainer: Any, loader: int, batch_idx: int) -> Sequence[int] | None:
    """Dataset indices of a batch, where Lightning has noted them; None for streams and custom iterables."""
    seen = getattr(getattr(_loader(trainer, loader), "batch_sampler", None), "seen_batch_indices", None)
    if seen is None or not 0 <= batch_idx < len(seen):
        return None
    return list(seen[batch_idx])


def _recollate(trainer: Any, pl_module: Any, number: int, indices: Sequence[int]) -> Callable[[int, int], Any] | None:
    loader = _loader(trainer, number)
    dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if dataset is None or collate is None:
        return None

    def rebuild(start: int, stop: int) -> Any:
        wanted = list(indices[start:stop])
        fetch_many = getattr(dataset, "__getitems__", None)
        samples = fetch_many(wanted) if fetch_many is not None else [dataset[index] for index in wanted]
        return _transfer(trainer, pl_module, collate(samples), number)

    return rebuild


def _on_device(trainer: Any, pl_module: Any, ticket: Any) -> Callable[[int, int], Any]:
    return lambda start, stop: _transfer(trainer, pl_module, ticket.recollate(start, stop), ticket.loader)


def _transfer(trainer: Any, pl_module: Any, batch: Any, loader: int) -> Any:
    """Bring a batch to the device the way the loop does."""
    if not _is_trainer(trainer):  # Fabric, or a plain loop
        return move_data_to_device(batch, trainer.strategy.root_device)
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module.on_before_batch_transfer(batch, loader)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=loader)
