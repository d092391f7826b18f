"""Every private part of Lightning the plugin touches, in one place, with a contract test (``tests/test_compat.py``).

Each function says what it relies on and why there is no public way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.fabric.utilities.rank_zero as fabric_rank_zero
import lightning.pytorch as pl
import lightning.pytorch.utilities.rank_zero as pytorch_rank_zero
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.loops import prediction_loop
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher, _PrefetchDataFetcher
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.trainer.connectors.data_connector import _auto_add_worker_init_fn
from lightning.pytorch.utilities.combined_loader import CombinedLoader

__all__ = [
    "LIGHTNING_VERSION",
    "LeasedIndices",
    "add_worker_seeding",
    "consumed_batch",
    "is_interactive",
    "keep_user_dataloaders",
    "own_predict_loop",
    "predict_dataloaders",
    "reset_seed",
    "set_rank_zero",
    "takes_dataloader_iter",
    "transferred",
]

LIGHTNING_VERSION: str = pl.__version__


class LeasedIndices(_IndexBatchSamplerWrapper):
    """Stands where Lightning's prediction writers look for the indices of a batch.

    Lightning's own wrapper keeps the indices of every batch for ever; this one keeps the last few.
    """

    KEEP = 16

    def __init__(self) -> None:
        self.seen_batch_indices = self  # type: ignore[assignment]
        self._recent: dict[int, list[int]] = {}
        self._count = 0

    def append(self, indices: list[int] | None) -> None:
        """Remember the indices of the batch that is given out next."""
        self._recent[self._count] = indices or []
        self._recent.pop(self._count - self.KEEP, None)
        self._count += 1

    def __getitem__(self, batch_idx: int) -> list[int]:
        return self._recent[batch_idx]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Any:
        raise TypeError("the batches of a leased loader are known only as they are leased")

    def reset(self) -> None:
        """Start counting again."""
        self._recent.clear()
        self._count = 0


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


def predict_dataloaders(trainer: pl.Trainer) -> list[Any]:
    """The dataloaders of the predict call that is being set up, before the loop has fetched them.

    The loop asks its source again later; there is no public way to look at the data while the model is set up.
    """
    source = trainer.predict_loop._data_source
    if not source.is_defined():
        return []
    loaders = source.dataloader()
    return list(CombinedLoader(loaders, "sequential").flattened)


def transferred(trainer: pl.Trainer, batch: Any, device: Any, loader: int) -> Any:
    """A batch after the precision plugin and the hooks that stand between a loader and ``predict_step``."""
    batch = trainer.precision_plugin.convert_input(batch)
    return trainer.lightning_module._apply_batch_transfer_handler(batch, device=device, dataloader_idx=loader)


def own_predict_loop(trainer: pl.Trainer) -> Callable[[], None]:
    """Let a loader decide itself when it ends, and fetch no batch before the last one is computed.

    Lightning counts batches per rank and would stop a rank before it knows that the job is complete; and it prefetches
    one batch from loaders without length, which would wait for work that only the batch in hand can release.

    Returns:
        Undoes the change.
    """
    loop = trainer.predict_loop
    reset = type(loop).reset
    select = prediction_loop._select_data_fetcher

    def select_without_prefetch(*args: Any) -> Any:
        fetcher = select(*args)
        if isinstance(fetcher, _PrefetchDataFetcher):
            fetcher.prefetch_batches = 0
        return fetcher

    def own_reset() -> None:
        limits = loop.max_batches
        loop.max_batches = [float("inf")] * len(limits)
        prediction_loop._select_data_fetcher = select_without_prefetch  # type: ignore[assignment]
        try:
            reset(loop)
        finally:
            loop.max_batches = limits
            prediction_loop._select_data_fetcher = select
        fetcher = loop._data_fetcher
        if isinstance(fetcher, _PrefetchDataFetcher):
            fetcher.length, fetcher.done = None, False  # the loader is over when it says so, not after a count

    loop.reset = own_reset  # type: ignore[method-assign]
    return lambda: loop.__dict__.pop("reset", None)


def set_rank_zero(rank: int) -> None:
    """Tell Lightning's rank-zero helpers which rank this is: they read the environment only when they are imported."""
    for module in (fabric_rank_zero, pytorch_rank_zero):
        module.rank_zero_only.rank = rank


def takes_dataloader_iter(batch: Any) -> bool:
    """Whether a step's first argument is the data iterator itself (``predict_step(dataloader_iter)``)."""
    return hasattr(batch, "data_fetcher") and isinstance(batch.data_fetcher, _DataLoaderIterDataFetcher)


def consumed_batch(trainer: pl.Trainer) -> Any:
    """The batch that ``predict_step(dataloader_iter)`` took."""
    return getattr(trainer.predict_loop._data_fetcher, "_batch", None)


def add_worker_seeding(dataloader: object, rank: int) -> None:
    """Seed dataloader workers as Lightning does after ``seed_everything(workers=True)``."""
    _auto_add_worker_init_fn(dataloader, rank)


def is_interactive() -> bool:
    """Whether Lightning takes this process for a notebook or a console."""
    from lightning.fabric.utilities.imports import _IS_INTERACTIVE

    return bool(_IS_INTERACTIVE)
