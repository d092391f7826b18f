"""Tells what kind of work a dataloader is, for any iterable a user may pass.

Four kinds are told apart. A map-style ``DataLoader`` with torch's own ``BatchSampler`` is cut by sample. One with a
custom batch sampler, and one without automatic batching, is cut by batch. Everything else is a stream, cut by batch,
whose end may be unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.predictions.loading.source import BatchSource, MapSource
from lightning_gpuorch.predictions.loading.stream import StreamSource

CHUNKS_PER_REPLICA = 32
"""Chunks a replica should get at least, so that no one waits long at the end."""
MAX_CHUNK_BATCHES = 32
"""Batches per chunk at most: what a death can cost."""

Source = MapSource | BatchSource | StreamSource


def describe(loader: Any, limit: int | None = None) -> Source:
    """Tell what kind of work a loader is.

    Args:
        loader: Whatever the user passed as a dataloader.
        limit: Batches to take at most.

    Raises:
        ConfigurationError: The loader cannot be predicted on reproducibly.
    """
    if getattr(loader, "in_order", True) is False:
        raise ConfigurationError(
            "DataLoader(in_order=False) returns batches in the order its workers finish, so outputs cannot be matched to "
            "samples; remove in_order=False."
        )
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        if isinstance(loader, Iterator):
            raise ConfigurationError(
                f"the dataloader is a {type(loader).__name__}, which can be iterated only once; a rank that restarts has "
                "to start over. Pass a DataLoader, a list of batches, or an object with __iter__."
            )
        return StreamSource(loader, limit)
    if _iterates_its_own_way(loader):
        return StreamSource(loader, limit)
    sampler = loader.batch_sampler
    if sampler is None or type(sampler) is BatchSampler:
        return MapSource(loader, limit)
    return BatchSource(loader, limit)


def _iterates_its_own_way(loader: DataLoader[Any]) -> bool:
    """Whether a subclass may give other batches than its sampler asks for; torchdata's, which keeps a state, does not."""
    method = type(loader).__iter__
    return method is not DataLoader.__iter__ and not method.__module__.startswith("torchdata.stateful_dataloader")


def check_rebatchable(source: Source) -> None:
    """Refuse a loader whose samples cannot be put into other batches than its own.

    Args:
        source: The loader, described.

    Raises:
        ConfigurationError: Its batches are made by the user.
    """
    loader = source.loader
    if isinstance(source, BatchSource):
        made_by = f"its batch sampler, {type(source.loader.batch_sampler).__name__}, makes its batches"
    elif not isinstance(loader, DataLoader):
        made_by = f"a {type(loader).__name__} gives batches that are made already"
    elif loader.batch_sampler is None and loader.batch_size is None:
        made_by = "DataLoader(batch_size=None) gives batches that the dataset has made"
    else:
        return
    raise ConfigurationError(
        f"enable_dynamic_batching=True needs a DataLoader that collates single samples, and {made_by}. Pass a DataLoader "
        "with a batch_size, or set enable_dynamic_batching=False."
    )


def default_chunk_batches(num_batches: int | None, num_replicas: int, windows: bool = False) -> int:
    """Batches per chunk: small enough to share the work evenly, large enough to cost little.

    Args:
        num_batches: Batches of the loader, if known.
        num_replicas: Replicas that share them.
        windows: Several chunks are batched together, so that small ones cost no padding and even out the end.
    """
    if num_batches is None:
        return 4
    wanted = num_replicas * CHUNKS_PER_REPLICA * (2 if windows else 1)
    return max(1, min(MAX_CHUNK_BATCHES, num_batches // wanted))


def default_first_chunks(num_batches: int | None, num_replicas: int) -> int | None:
    """Chunks of the first size, before what they took decides how large the others are; None if all are alike.

    Args:
        num_batches: Batches of the loader, if known.
        num_replicas: Replicas that share them.
    """
    count = CHUNKS_PER_REPLICA * num_replicas
    return None if num_batches is not None and num_batches <= 2 * count * MAX_CHUNK_BATCHES else count
