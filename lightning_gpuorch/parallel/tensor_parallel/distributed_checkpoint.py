"""Slices are read from a torch distributed checkpoint as chunks of our own choosing, without a process group."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import torch
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.checkpoint_base import Checkpoint
from lightning_gpuorch.parallel.tensor_parallel.intervals import Intervals, length, pieces


class DistributedCheckpoint(Checkpoint):
    """A directory written by ``torch.distributed.checkpoint``, by any number of ranks.

    Args:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.location = str(path)
        self._path = path
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
        """Read a tensor or a slice of it; of every stored chunk that overlaps it, the rows in question."""
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
        by_offset = {tuple(chunk.offsets): target for chunk, target in zip(chunks, targets, strict=True)}
        num_bytes = 0
        for item in create_read_items_for_chunk_list(key, entry, chunks):
            assert item.dest_index.offset is not None
            target = _narrowed(by_offset[tuple(item.dest_index.offset)], item.dest_offsets, item.lengths)
            try:
                piece, asked = self._read_piece(item)
            except Exception as error:
                raise TensorParallelError(f"{key} cannot be read from {self.location}: {error!r}.") from error
            target.copy_(piece)
            num_bytes += asked
        return value, num_bytes

    def _read_piece(self, item: ReadItem) -> tuple[torch.Tensor, int]:
        """Read the part of a stored chunk that an item names, and say how many bytes were asked for."""
        stored = self._reader.storage_data[item.storage_index]
        path = self._path / stored.relative_path
        with path.open("rb") as file:
            chunk = self._reader._slice_file(file, stored)
            if stored.transform_descriptors:
                with self._lock:  # the reader keeps state between calls
                    chunk = self._reader.transforms.transform_load_stream(item, stored.transform_descriptors, chunk)
                    chunk = io.BytesIO(chunk.read(-1))
            else:
                with FakeTensorMode():  # reads where the values lie, not the values
                    layout = torch.load(chunk, map_location="cpu", weights_only=True)
                if layout.is_contiguous() and layout.dim():
                    start = stored.offset + layout.untyped_storage()._checkpoint_offset
                    return _mapped_piece(path, start, layout, item)
                chunk.seek(0)
            whole: torch.Tensor = torch.load(chunk, map_location="cpu", weights_only=True)
        return _narrowed(whole, item.storage_offsets, item.lengths), whole.numel() * whole.element_size()


def _mapped_piece(path: Path, start: int, layout: torch.Tensor, item: ReadItem) -> tuple[torch.Tensor, int]:
    """Copy a part of a contiguous tensor out of a file; nothing else of it is touched."""
    itemsize = layout.element_size()
    start += int(layout.storage_offset()) * itemsize
    in_bytes = (*layout.shape[:-1], layout.shape[-1] * itemsize)
    mapped = np.memmap(path, np.uint8, "r", start, in_bytes)
    parts = [slice(first, first + size) for first, size in zip(item.storage_offsets, item.lengths, strict=True)]
    parts[-1] = slice(parts[-1].start * itemsize, parts[-1].stop * itemsize)
    piece = torch.from_numpy(np.array(mapped[tuple(parts)]))
    return piece.view(layout.dtype), piece.numel()


def _narrowed(value: torch.Tensor, offsets: torch.Size, lengths: torch.Size) -> torch.Tensor:
    for dim, (start, size) in enumerate(zip(offsets, lengths, strict=True)):
        value = value.narrow(dim, start, size)
    return value
