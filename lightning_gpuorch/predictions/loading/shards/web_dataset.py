"""Shards of webdataset's pipelines: the archives whose names they begin with."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_gpuorch.predictions.loading.shards.files import file_version
from lightning_gpuorch.predictions.loading.shards.protocol import ShardedSource, after

_SPLITTERS = ("split_by_node", "split_by_worker", "single_node_only", "check_empty")
"""Stages that give each process its share, or make sure that it has one; a shard that is read alone needs neither."""
_BY_SAMPLE = (
    "tarfile_samples", "tar_file_expander", "group_by_keys", "url_opener",
    "_associate", "_decode", "_extract_keys", "_log_keys", "_map", "_map_dict", "_map_tuple", "_rename", "_rename_keys",
    "_select", "_to_tuple", "_xdecode",
)  # fmt: skip
"""Stages that look at one sample, or archive, at a time."""
_OPENERS = ("StreamingOpen", "FileCache")


def adapt(dataset: Any) -> ShardedSource | str | None:
    """The archives of a pipeline, or why they cannot be read each by itself."""
    webdataset = sys.modules.get("webdataset")
    if webdataset is None or not isinstance(dataset, webdataset.DataPipeline):
        return None
    first, *rest = dataset.pipeline or [None]
    if type(first) is not webdataset.SimpleShardList or first.seed is not None:
        return f"{type(first).__name__} may give its archives in an order of its own"
    if dataset.repetitions != 1 or dataset.nsamples > 0:
        return "its epoch is not its data once (with_epoch, repeat)"
    stages = []
    for stage in rest:
        module, name = _name_of(stage)
        known = module.startswith("webdataset.")
        if (known and name in _SPLITTERS) or (known and _is_no_shuffle(stage, name)):
            continue
        if not known or name not in (*_BY_SAMPLE, *_OPENERS):
            return f"its stage {name} may look at several samples, or give them in another order"
        stages.append(stage)
    return _Archives(dataset, first, stages)


class _Archives:
    def __init__(self, dataset: Any, first: Any, stages: Sequence[Any]):
        self._dataset, self._first, self._stages = dataset, first, list(stages)
        self._urls: list[str] = list(first.urls)

    @property
    def num_shards(self) -> int:
        return len(self._urls)

    def open_shard(self, index: int, start: int) -> Iterator[Any]:
        pipeline, urls = copy.copy(self._dataset), copy.copy(self._first)
        urls.urls = [self._urls[index]]
        pipeline.pipeline = [urls, *self._stages]
        return after(iter(pipeline), start)

    def shard_name(self, index: int) -> str:
        return self._urls[index]

    def shard_version(self, index: int) -> str:
        return file_version(self._urls[index])


def _name_of(stage: Any) -> tuple[str, str]:
    """Module and name of a stage's function, or of its class if it is an object."""
    function = getattr(stage, "f", stage)
    named = function if hasattr(function, "__name__") else type(function)
    return str(named.__module__), str(named.__name__)


def _is_no_shuffle(stage: Any, name: str) -> bool:
    """Whether a stage is what ``shardshuffle=False`` makes of it: a shuffle with no buffer."""
    if name == "_shuffle":
        size = stage.args[0] if stage.args else stage.kw.get("bufsize")
    else:
        size = getattr(stage, "bufsize", None) if name == "detshuffle" else None
    return size is not None and not size
