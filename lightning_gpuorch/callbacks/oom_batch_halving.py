"""Out-of-memory errors in a predict step are survived: the batch is computed in parts."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.utils._pytree import tree_leaves

from lightning_gpuorch.devices.memory import memory_summary
from lightning_gpuorch.telemetry.current import observe_oom
from lightning_gpuorch.worker.oom.halving import BatchHalver, OOMEvent, SingleSampleOOMError
from lightning_gpuorch.worker.surviving_steps import SurvivingSteps

log = logging.getLogger(__name__)


class OOMBatchHalving(Callback):
    """Computes a batch that does not fit into memory in parts, and gives the output of the whole.

    The parts are halves, quarters and so on; the size that fits is remembered per shape of samples and grows back with
    care. Outputs of every structure are merged in order; one that is a reduction over the batch is refused by name.

    With ``strategy="gpuorch"`` batches are halved without this callback, too; it counts, and calls ``on_oom``. There,
    under the Trainer and under Fabric, a sample that does not fit alone is given up and
    named, and the others go on; the ranks of a tensor-parallel group cut alike, whichever of them ran out of memory.
    With other strategies ``predict_step`` of the module is wrapped while ``predict`` runs, and such a sample ends the
    run with :class:`~lightning_gpuorch.worker.oom.halving.SingleSampleOOMError`. Other strategies that communicate
    inside of a step (FSDP, DeepSpeed, ModelParallel) are left alone, since a rank that halves by itself would leave its
    peers waiting.

    Args:
        on_oom: Called with each :class:`~lightning_gpuorch.worker.oom.halving.OOMEvent`, on the rank that ran out of memory.

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
            self._wrap_runtime(runtime)
        elif trainer.world_size > 1 and isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            log.warning("OOMBatchHalving: inactive, %s communicates inside of a step", type(strategy).__name__)
        elif step is None or not _is_trainer(trainer):
            log.warning(
                "OOMBatchHalving: inactive, this is a loop of its own; use lightning_gpuorch.worker.oom.halving.BatchHalver"
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
        self._halvers = {}
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
            describe = functools.partial(memory_summary, trainer.strategy.root_device)
            self._halvers[loader] = BatchHalver(self._take_oom, describe)
        return self._halvers[loader]

    def _take_oom(self, event: OOMEvent) -> None:
        observe_oom(event.size, event.next_size or None, **({} if event.next_size else {"lost_samples": event.size}))
        if self._on_oom is not None:
            self._on_oom(event)

    def _wrap_runtime(self, runtime: Any) -> None:
        if not SurvivingSteps.possible(runtime):
            log.warning("OOMBatchHalving: inactive, enable_group_recovery=False lets no ranks halve together")
            return
        steps = runtime.surviving_steps = SurvivingSteps(runtime, self._on_oom)
        self._halvers = steps.halvers

        def undo() -> None:
            runtime.surviving_steps = None

        self._undo = undo

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


def _transfer(trainer: Any, pl_module: Any, batch: Any, loader: int) -> Any:
    """Bring a batch to the device the way the loop does."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module.on_before_batch_transfer(batch, loader)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=loader)
