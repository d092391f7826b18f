"""What the plugin does by way of private parts of Lightning. Each function says why there is no public way.

A contract test,
``tests/strategies/test_lightning_internals.py``, has a table of every private name of Lightning and torch that any module
uses.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lightning_gpuorch.predictions.loading.world_of_one import hide_as_well
from lightning_gpuorch.strategies.packages import LightningPackage, package_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

from lightning_gpuorch.predictions.reading.lazy_list import LazyList

__all__ = [
    "LeasedIndices",
    "add_worker_seeding",
    "consumed_batch",
    "external_world_size",
    "fill_progress_bar",
    "has_epoch_writer",
    "is_interactive",
    "keep_user_dataloaders",
    "launches_nothing",
    "leased_indices",
    "own_predict_loop",
    "predict_dataloaders",
    "refuse_stopped_by_hook",
    "reset_seed",
    "set_rank_zero",
    "show_predictions",
    "takes_dataloader_iter",
    "transferred",
]


class LeasedIndices:
    """Stands where Lightning's prediction writers look for the indices of a batch; see :func:`leased_indices`.

    Lightning's own wrapper keeps the indices of every batch for ever; this one keeps the last few.
    """

    KEEP = 16

    def __init__(self) -> None:
        self.seen_batch_indices = self
        self._recent: dict[int, list[int]] = {}

    def append(self, batch_idx: int, indices: list[int] | None) -> None:
        """Remember the indices of the batch that is given out next."""
        self._recent.pop(batch_idx, None)  # what is remembered again counts as new
        self._recent[batch_idx] = indices or []
        if len(self._recent) > self.KEEP:
            del self._recent[next(iter(self._recent))]

    def __getitem__(self, batch_idx: int) -> list[int]:
        return self._recent[batch_idx]

    def __len__(self) -> int:
        return len(self._recent)

    def __iter__(self) -> Any:
        raise TypeError("the batches of a leased loader are known only as they are leased")

    def reset(self) -> None:
        """Start counting again."""
        self._recent.clear()


@functools.cache
def _leased_indices(package: LightningPackage) -> type[Any]:
    wrapper = package.of_pytorch("overrides.distributed")._IndexBatchSamplerWrapper
    return type("LeasedIndices", (LeasedIndices, wrapper), {})


def leased_indices(package: LightningPackage) -> Any:
    """Indices of leased batches, in a class that the package's prediction writers take for their own."""
    return _leased_indices(package)()


def keep_user_dataloaders(trainer: pl.Trainer) -> Callable[[], None]:
    """Hand the user's dataloaders to the strategy as they are.

    Lightning would rebuild them around a sampler of its own first: it fails on custom batch samplers, and lists the
    whole sampler in memory. There is no public switch for predict.

    Returns:
        Undoes the change.
    """
    connector = trainer._data_connector
    connector._prepare_dataloader = lambda dataloader, shuffle, mode: dataloader  # type: ignore[method-assign]
    return lambda: connector.__dict__.pop("_prepare_dataloader", None)


def keep_user_samplers(trainer: pl.Trainer) -> Callable[[], None]:
    """Let training on one device draw as the user's samplers do.

    Lightning would put a ``DistributedSampler`` in their place, as for every DDP strategy however few devices it has.

    Returns:
        Undoes the change.
    """
    connector = trainer._accelerator_connector
    before, connector.use_distributed_sampler = connector.use_distributed_sampler, False
    return lambda: setattr(connector, "use_distributed_sampler", before)


def predict_dataloaders(trainer: pl.Trainer) -> list[Any]:
    """The dataloaders of the predict call that is being set up, before the loop has fetched them.

    The loop asks its source again later; there is no public way to look at the data while the model is set up.
    """
    source = trainer.predict_loop._data_source
    if not source.is_defined():
        return []
    loaders = source.dataloader()
    combined_loader = package_of(trainer).of_pytorch("utilities.combined_loader").CombinedLoader
    return list(combined_loader(loaders, "sequential").flattened)


def transferred(trainer: pl.Trainer, batch: Any, device: Any, loader: int) -> Any:
    """A batch after the precision plugin and the hooks that stand between a loader and ``predict_step``."""
    batch = trainer.precision_plugin.convert_input(batch)
    return trainer.lightning_module._apply_batch_transfer_handler(batch, device=device, dataloader_idx=loader)


class _Renumbered:
    """A combined loader's iterator that gives batches the numbers they have in the job, not their count on this rank.

    Args:
        inner: Lightning's iterator.
        number: Gives the number of the batch that was given out last.
    """

    def __init__(self, inner: Iterator[Any], number: Callable[[], int]):
        self._inner, self._number = inner, number
        self.count = 0
        """Which one of its dataloader's batches on this rank the last one was."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> tuple[Any, int, int]:
        batch, self.count, dataloader_idx = next(self._inner)
        return batch, self._number(), dataloader_idx


def own_predict_loop(
    trainer: pl.Trainer, batch_number: Callable[[], int], batches_done: Callable[[], int | None]
) -> Callable[[], None]:
    """Let a loader decide itself when it ends, fetch no batch before the last one is done, and number batches by the job.

    Lightning counts batches per rank and would stop a rank before it knows that the job is complete; and it prefetches
    one batch from loaders without length, which would wait for work that only the batch in hand can release. It takes
    ``batch_idx`` from what the combined loader yields with each batch, which nothing public decides.

    Progress bars of Lightning show ``batch_idx + 1`` as the number of batches that are done; they get the job's.

    Args:
        trainer: The Trainer.
        batch_number: Gives the number of the batch that was given out last.
        batches_done: Gives the batches of the current dataloader that the job has done; None where that is not known.

    Returns:
        Undoes the change.
    """
    loop, bar = trainer.predict_loop, trainer.progress_bar_callback
    prediction_loop = package_of(trainer).of_pytorch("loops.prediction_loop")
    prefetching = package_of(trainer).of_pytorch("loops.fetchers")._PrefetchDataFetcher
    batches: _Renumbered | None = None
    reset = type(loop).reset
    select = prediction_loop._select_data_fetcher

    def select_without_prefetch(*args: Any) -> Any:
        fetcher = select(*args)
        if isinstance(fetcher, prefetching):
            fetcher.prefetch_batches = 0
        return fetcher

    def own_reset() -> None:
        nonlocal batches
        limits = loop.max_batches
        loop.max_batches = [float("inf")] * len(limits)
        prediction_loop._select_data_fetcher = select_without_prefetch  # type: ignore[attr-defined]
        try:
            reset(loop)
        finally:
            loop.max_batches = limits
            prediction_loop._select_data_fetcher = select  # type: ignore[attr-defined]
        fetcher = loop._data_fetcher
        assert fetcher is not None
        assert fetcher.iterator is not None
        fetcher.iterator = batches = _Renumbered(fetcher.iterator, batch_number)
        if isinstance(fetcher, prefetching):
            fetcher.length, fetcher.done = None, False  # the loader is over when it says so, not after a count

    def show_count(trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, *rest: Any) -> None:
        assert bar is not None
        assert batches is not None
        shown = max(batches.count + 1, batches_done() or 0)  # the job's figure lags a little behind
        type(bar).on_predict_batch_end(bar, trainer, module, outputs, batch, shown - 1, *rest)

    def undo() -> None:
        loop.__dict__.pop("reset", None)
        if bar is not None:
            bar.__dict__.pop("on_predict_batch_end", None)

    loop.reset = own_reset  # type: ignore[method-assign]
    if bar is not None:
        bar.on_predict_batch_end = show_count  # type: ignore[method-assign, assignment]
    return undo


def fill_progress_bar(trainer: pl.Trainer, num_batches: int, dataloader_idx: int) -> None:
    """Let Lightning's progress bar show that all batches of a dataloader are done, whichever rank computed them."""
    bar = trainer.progress_bar_callback
    if bar is not None and num_batches:
        arguments: Any = (bar, trainer, trainer.lightning_module, None, None, num_batches - 1, dataloader_idx)
        type(bar).on_predict_batch_end(*arguments)


def refuse_stopped_by_hook(trainer: pl.Trainer) -> None:
    """Refuse a predict loop that a hook has ended: Lightning takes any ``StopIteration`` for the end of the data.

    The loop's own counts tell; nothing public does.

    Raises:
        RuntimeError: A hook of a batch has raised ``StopIteration``.
    """
    progress: Any = trainer.predict_loop.batch_progress.current
    if progress.ready != progress.started or progress.processed != progress.completed:
        hook = "on_predict_batch_start" if progress.ready != progress.started else "on_predict_batch_end"
        raise RuntimeError(
            f"{hook} raised StopIteration, which Lightning takes for the end of the data; {progress.completed} batches of "
            "this rank were done by then. Find the callback that calls next() on an iterator that is over."
        )


class _FinishedPredictions(LazyList):
    """What Lightning's loop keeps, one entry per dataloader; looking at it waits until the job is complete."""

    _finish: Callable[[], Any]

    def _read(self, position: int) -> Any:
        found = self._finish()
        return found if len(self) == 1 else found[position]


def show_predictions(loop: Any, finish: Callable[[], Any], num_loaders: int) -> None:
    """Let ``predict_loop.predictions`` be those of the whole job. The property is public, what it reads is not.

    Args:
        loop: The predict loop.
        finish: Gives all predictions.
        num_loaders: Dataloaders of the call.
    """
    predictions = _FinishedPredictions._of_length(num_loaders)
    predictions._finish = finish
    loop._predictions = predictions


def has_epoch_writer(trainer: pl.Trainer) -> bool:
    """Whether a prediction writer takes what this rank has computed, with its indices, when the epoch ends."""
    kind = package_of(trainer).of_pytorch("callbacks").BasePredictionWriter
    writers = [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
    return any(writer.interval.on_epoch for writer in writers)


def set_rank_zero(rank: int) -> None:
    """Tell Lightning's rank-zero helpers which rank this is: they read the environment only when they are imported."""
    for root in ("lightning.fabric", "lightning.pytorch", "lightning_fabric", "pytorch_lightning"):
        module = sys.modules.get(f"{root}.utilities.rank_zero")
        if module is not None:
            module.rank_zero_only.rank = rank
            hide_as_well(module.rank_zero_only, "rank", 0)


def reset_seed(package: LightningPackage) -> None:
    """Seed as ``seed_everything`` did in the process that was forked or run again."""
    package.of_fabric("utilities.seed").reset_seed()


def takes_dataloader_iter(batch: Any) -> bool:
    """Whether a step's first argument is the data iterator itself (``predict_step(dataloader_iter)``)."""
    return hasattr(batch, "data_fetcher") and (type(batch.data_fetcher).__name__ == "_DataLoaderIterDataFetcher")


def consumed_batch(trainer: pl.Trainer) -> Any:
    """The batch that ``predict_step(dataloader_iter)`` took."""
    return getattr(trainer.predict_loop._data_fetcher, "_batch", None)


def add_worker_seeding(package: LightningPackage, dataloader: object, rank: int) -> None:
    """Seed dataloader workers as Lightning does after ``seed_everything(workers=True)``."""
    package.of_pytorch("trainer.connectors.data_connector")._auto_add_worker_init_fn(dataloader, rank)


def external_world_size(environment: Any) -> int | None:
    """How many processes another launcher has made; None where Lightning itself only learns it from the strategy."""
    return None if type(environment).__name__ == "LightningEnvironment" else int(environment.world_size())


def launches_nothing(function: Callable[..., Any]) -> bool:
    """Whether ``fabric.launch()`` was called without a function; Lightning wraps one of its own then."""
    return any(getattr(argument, "__name__", "") == "_do_nothing" for argument in getattr(function, "args", ()))


def is_interactive() -> bool:
    """Whether Lightning takes this process for a notebook or a console."""
    from lightning.fabric.utilities.imports import _IS_INTERACTIVE

    return bool(_IS_INTERACTIVE)
