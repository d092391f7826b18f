"""Finds the shards of a stream: those it tells of itself, or those of a library that is known.

Only what certainly gives the same samples in the same order is taken: where an order depends on several shards, as with
buffers that shuffle, interleaving, or batches across shards, the stream is read as a whole by every replica.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.predictions.loading.describe import Source
from lightning_gpuorch.predictions.loading.shards import hugging_face, lit_data, web_dataset
from lightning_gpuorch.predictions.loading.shards.protocol import ShardedSource
from lightning_gpuorch.predictions.loading.shards.source import ShardStreamSource
from lightning_gpuorch.predictions.loading.stream import StreamSource

log = logging.getLogger(__name__)

Adapter = Callable[[Any], ShardedSource | str | None]
"""Gives the shards of a dataset, or why they cannot be read each by itself; None if it is of another library."""

_ADAPTERS: Sequence[Adapter] = (web_dataset.adapt, lit_data.adapt, hugging_face.adapt)
_HOMES = ("torch.", "torchdata.", "litdata.")
"""Where the classes of loaders are defined that read a dataset and do nothing else with it."""


def by_shard(source: Source, num_replicas: int, began_by_shard: bool | None = None, tells: bool = False) -> Source:
    """Let a stream be read by shard, if its shards are known, and there is one for each replica.

    Args:
        source: A loader, described.
        num_replicas: Replicas that share it.
        began_by_shard: How a job that is gone on with reads it; None for one that begins.
        tells: Whether to say what a stream costs that is read as a whole.

    Raises:
        ConfigurationError: It tells of shards, and what it tells cannot be.
    """
    if not isinstance(source, StreamSource) or source.num_units is not None:
        return source
    loader = source.loader
    dataset = loader.dataset if isinstance(loader, DataLoader) else loader
    shards: ShardedSource | str = _refusal(loader, source.limit) or _shards_of(loader, dataset)
    if not isinstance(shards, str) and began_by_shard is None and 0 < shards.num_shards < num_replicas:
        shards = f"it has {shards.num_shards} shards only, and other replicas would have nothing to do"
    elif not isinstance(shards, str) and began_by_shard is False:
        shards = "the job in this directory has begun so"
    if not isinstance(shards, str):
        assert isinstance(loader, DataLoader)
        return ShardStreamSource(loader, shards, num_replicas)
    if tells and num_replicas > 1:
        log.warning(
            "%s is read as a whole by each of %d replicas, %d times its bytes in all: %s. Give its dataset num_shards and "
            "open_shard (lightning_gpuorch.ShardedDataset), or set sharding='off'.",
            type(dataset).__name__, num_replicas, num_replicas, shards,
        )  # fmt: skip
    return source


def _refusal(loader: Any, limit: int | None) -> str | None:
    """Why a loader's stream cannot be read by shard, whatever its dataset is."""
    if not isinstance(loader, DataLoader):
        return "it is no DataLoader"
    if not type(loader).__module__.startswith(_HOMES):
        return f"{type(loader).__name__} may read it in a way of its own"
    if limit is not None:
        return "a number of batches is to be taken from its beginning, and how many its shards have is not known"
    if loader.drop_last:
        return "drop_last=True leaves out a batch at the end of the whole stream"
    return None


def _shards_of(loader: Any, dataset: Any) -> ShardedSource | str:
    if isinstance(dataset, IterableDataset) and isinstance(dataset, ShardedSource):
        _check(dataset)
        return dataset
    for adapt in _ADAPTERS:
        found = adapt(dataset)
        if found is not None:
            return found if isinstance(found, str) else _unless_split_by_worker(loader, found)
    return "it does not tell of its shards"


def _unless_split_by_worker(loader: Any, shards: ShardedSource) -> ShardedSource | str:
    """Shards of a library's dataset, unless a function of the user's may give each worker a share of it."""
    function = loader.worker_init_fn
    function = getattr(function, "func", function)
    if function is None or str(function.__module__).startswith(("lightning.", "pytorch_lightning.")):
        return shards
    return f"worker_init_fn={getattr(function, '__qualname__', function)} may change it in each worker"


def _check(dataset: Any) -> None:
    count = dataset.num_shards
    if type(count) is not int or count < 0:
        raise ConfigurationError(f"{type(dataset).__name__}.num_shards is {count!r}; it must be a number of shards.")
