"""Shards of Hugging Face's ``datasets.IterableDataset``: its data sources, mostly files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from lightning_gpuorch.predictions.loading.shards.protocol import ShardedSource, after

_SOURCES = ("ExamplesIterable", "ArrowExamplesIterable")
"""Give their shards one after another."""
_BY_SAMPLE = (
    "FormattedExamplesIterable", "RebatchedArrowExamplesIterable", "SelectColumnsIterable", "TypedExamplesIterable",
)  # fmt: skip
"""Do something with each sample, in order."""
_FUNCTIONS = ("MappedExamplesIterable", "FilteredExamplesIterable")


def adapt(dataset: Any) -> ShardedSource | str | None:
    """The data sources of a stream, or why they cannot be read each by itself."""
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(dataset, datasets.IterableDataset):
        return None
    if getattr(getattr(dataset, "_distributed", None), "world_size", 1) > 1:
        return "it was split (split_dataset_by_node)"
    if getattr(dataset, "_starting_state_dict", None) is not None or dataset.epoch:
        return "it was set to another place or epoch than its beginning"
    reason = _refusal(getattr(dataset, "_ex_iterable", None))
    return _Sources(dataset) if reason is None else reason


class _Sources:
    def __init__(self, dataset: Any):
        self._dataset = dataset

    @property
    def num_shards(self) -> int:
        return int(self._dataset.num_shards)

    def open_shard(self, index: int, start: int) -> Iterator[Any]:
        return after(iter(self._dataset.shard(num_shards=self.num_shards, index=index)), start)


def _refusal(iterable: Any) -> str | None:
    """Why the samples of a shard depend on others, as far as the steps of a stream tell."""
    while True:
        name = type(iterable).__name__
        if not type(iterable).__module__.startswith("datasets."):
            return f"{name} is not known"
        if name in _SOURCES:
            return None
        if name in _FUNCTIONS and (iterable.batched or iterable.with_indices):
            step = "map" if name == "MappedExamplesIterable" else "filter"
            return f"{step}(batched=True) and {step}(with_indices=True) may look at samples of several shards"
        if name not in (*_BY_SAMPLE, *_FUNCTIONS):
            return f"its step {name} may mix samples of several shards"
        iterable = iterable.ex_iterable
