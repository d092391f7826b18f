"""Slices are read from a torch distributed checkpoint as chunks of our own choosing, without a process group."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.tensor_parallel.checkpoint import Checkpoint, pieces
from lightning_gpuorch.tensor_parallel.intervals import Intervals, length


class DistributedCheckpoint(Checkpoint):
    """A directory written by ``torch.distributed.checkpoint``, by any number of ranks.

    Args:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.location = str(path)
        self._reader = FileSystemReader(path)
        self._lock = threading.Lock()
        try:
            self._metadata: Metadata = self._reader.read_metadata()
        except Exception as error:
            raise TensorParallelError(f"The distributed checkpoint {path} is damaged: {error!r}.") from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=False)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def keys(self) -> list[str]:
        """List the keys of all tensors."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Give a tensor's shape without reading it."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Give the dtype a tensor is stored in."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, dim: int | None = None, intervals: Intervals = ()) -> tuple[torch.Tensor, int]:
        """Read a tensor or a slice of it; every stored chunk that overlaps it is read whole."""
        entry = self._tensors[key]
        shape = list(entry.size)
        chunks, targets = [], []
        if dim is None:
            value = torch.empty(shape, dtype=entry.properties.dtype)
            chunks.append(ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=torch.Size(shape)))
            targets.append(value)
        else:
            value = torch.empty([*shape[:dim], length(intervals), *shape[dim + 1 :]], dtype=entry.properties.dtype)
            for start, stop, position in pieces(intervals):
                offsets, sizes = [0] * len(shape), list(shape)
                offsets[dim], sizes[dim] = start, stop - start
                chunks.append(ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)))
                targets.append(value.narrow(dim, position, stop - start))
        items = create_read_items_for_chunk_list(key, entry, chunks)
        planner = _IntoTensors(self._metadata, items, targets, [chunk.offsets for chunk in chunks])
        try:
            with self._lock:  # the reader keeps state between calls
                self._reader.read_data(LoadPlan(items), planner).wait()
        except Exception as error:
            raise TensorParallelError(f"{key} cannot be read from {self.location}: {error!r}.") from error
        stored = {item.storage_index for item in items}
        sizes_of = {chunk.offsets: chunk.sizes.numel() for chunk in entry.chunks}
        touched = sum(sizes_of[index.offset] for index in stored if index.offset is not None)
        return value, touched * value.element_size()


class _IntoTensors(LoadPlanner):
    """Hands the reader the tensors to fill."""

    def __init__(
        self, metadata: Metadata, items: list[ReadItem], targets: list[torch.Tensor], offsets: list[torch.Size]
    ) -> None:
        self.metadata, self.items = metadata, items
        self.targets = {tuple(offset): target for offset, target in zip(offsets, targets, strict=True)}

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Nothing to do: the items are known."""

    def create_local_plan(self) -> LoadPlan:
        """Give the items."""
        return LoadPlan(self.items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Keep the plan: this rank reads alone."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Keep the plan."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Refuse: only tensors are asked for."""
        raise TensorParallelError(f"{read_item.storage_index.fqn} is not a tensor.")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Give the part of a target that an item fills."""
        offset = read_item.dest_index.offset
        assert offset is not None
        target = self.targets[tuple(offset)]
        for dim, (start, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, size)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: the part was filled in place."""
