"""Checkpoints of every common kind are read by tensor and by slice, never as a whole.

- ``*.safetensors``, ``*.safetensors.index.json``, a directory with either: slices through ``safe_open().get_slice``
- ``*.bin``, ``*.pt``, ``*.pth``, ``*.bin.index.json``: slices of a memory-mapped ``torch.load``
- Lightning's ``*.ckpt``: the same, of its ``state_dict``
- a torch distributed checkpoint (a directory with ``.metadata``): the stored chunks that overlap
- a state dict in memory: slices of its tensors
"""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.checkpoint_base import Checkpoint
from lightning_gpuorch.parallel.tensor_parallel.intervals import Intervals, take
from lightning_gpuorch.parallel.tensor_parallel.quantized import refuse_quantized_config

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
TORCH_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def open_checkpoint(source: str | os.PathLike[str] | Mapping[str, Any]) -> Checkpoint:
    """Open a checkpoint of any kind this module knows.

    Args:
        source: A file, a directory, or a state dict.

    Raises:
        TensorParallelError: If it does not exist, is of no known kind, lacks files, or is damaged.
    """
    if isinstance(source, Mapping):
        return TensorMapping(source, "the given state dict")
    path = Path(source)
    if not path.exists():
        raise TensorParallelError(f"There is no checkpoint at {path}.")
    refuse_quantized_config(path if path.is_dir() else path.parent)
    if path.is_dir():
        return _open_directory(path)
    if path.name.endswith(".index.json"):
        return _open_index(path)
    if path.suffix == ".safetensors":
        return SafetensorsFiles([path])
    if path.suffix in TORCH_SUFFIXES:
        return TensorMapping(_load_mapped(path), str(path))
    raise TensorParallelError(
        f"{path} is no checkpoint this release reads: .safetensors, .bin, .pt, .pth, .ckpt, an index.json, or a "
        "directory "
        "with one of them or a torch distributed checkpoint."
    )


def _open_directory(path: Path) -> Checkpoint:
    for name in INDEX_FILES:
        if (path / name).exists():
            return _open_index(path / name)
    for name in SINGLE_FILES:
        if (path / name).exists():
            return open_checkpoint(path / name)
    if (path / ".metadata").exists():
        from lightning_gpuorch.parallel.tensor_parallel.distributed_checkpoint import DistributedCheckpoint

        return DistributedCheckpoint(path)
    files = sorted(path.glob("*.safetensors"))
    if files:
        return SafetensorsFiles(files)
    raise TensorParallelError(
        f"The directory {path} holds no checkpoint: none of {', '.join((*INDEX_FILES, *SINGLE_FILES))}, no "
        ".metadata and no "
        "*.safetensors file."
    )


def _open_index(path: Path) -> Checkpoint:
    try:
        weight_map: dict[str, str] = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise TensorParallelError(f"The checkpoint index {path} is damaged: {error!r}.") from error
    files = [path.parent / name for name in sorted(set(weight_map.values()))]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise TensorParallelError(
            f"The checkpoint {path} names {len(files)} files, of which {len(absent)} are missing: "
            f"{', '.join(absent[:8])}."
        )
    if files[0].suffix == ".safetensors":
        checkpoint: Checkpoint = SafetensorsFiles(files)
    else:
        merged: dict[str, torch.Tensor] = {}
        for file in files:
            merged.update(_load_mapped(file))
        checkpoint = TensorMapping(merged, str(path))
    lost = set(weight_map) - set(checkpoint.keys())
    if lost:
        raise TensorParallelError(
            f"The index {path} promises {len(lost)} tensors that its files do not hold, such as {min(lost)}."
        )
    return checkpoint


class SafetensorsFiles(Checkpoint):
    """One or more safetensors files.

    Args:
        files: The files.
    """

    def __init__(self, files: list[Path]) -> None:
        self.location = str(files[0] if len(files) == 1 else files[0].parent)
        self._handles = threading.local()
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for file in files:
            handle = self._open(file)
            for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no dict
                part = handle.get_slice(key)
                if key in self._file_of:
                    raise TensorParallelError(f"Both {self._file_of[key].name} and {file.name} hold the tensor {key}.")
                self._file_of[key] = file
                self._shapes[key] = tuple(part.get_shape())
                dtype = _SAFETENSORS_DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise TensorParallelError(
                        f"{key} in {file} has the dtype {part.get_dtype()}, which cannot be read."
                    )
                self._dtypes[key] = dtype

    def _open(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        opened: dict[Path, Any] = self._handles.__dict__.setdefault("opened", {})
        if file not in opened:
            try:
                opener: Any = safe_open(str(file), framework="pt", device="cpu")
                opened[file] = opener.__enter__()
            except (SafetensorError, OSError, ValueError) as error:
                raise TensorParallelError(f"The checkpoint file {file} is damaged: {error}.") from error
        return opened[file]

    def keys(self) -> list[str]:
        """List the keys of all tensors."""
        return list(self._file_of)

    def shape(self, key: str) -> tuple[int, ...]:
        """Give a tensor's shape without reading it."""
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """Give the dtype a tensor is stored in."""
        return self._dtypes[key]

    def read(self, key: str, dim: int | None = None, intervals: Intervals = ()) -> tuple[torch.Tensor, int]:
        """Read a tensor or a slice of it."""
        handle = self._open(self._file_of[key])
        value = handle.get_tensor(key) if dim is None else take(handle.get_slice(key), dim, intervals)
        return value, value.numel() * self._dtypes[key].itemsize


class TensorMapping(Checkpoint):
    """A state dict, in memory or mapped from a file.

    Args:
        tensors: Tensors by key; other values are ignored.
        location: Where they come from.
    """

    def __init__(self, tensors: Mapping[str, Any], location: str) -> None:
        self.location = location
        self._tensors = {key: value for key, value in tensors.items() if isinstance(value, torch.Tensor)}
        if not self._tensors:
            raise TensorParallelError(f"{location} holds no tensors; its keys are {list(tensors)[:8]}.")

    def keys(self) -> list[str]:
        """List the keys of all tensors."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Give a tensor's shape."""
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        """Give the dtype of a tensor."""
        return self._tensors[key].dtype

    def read(self, key: str, dim: int | None = None, intervals: Intervals = ()) -> tuple[torch.Tensor, int]:
        """Read a tensor or a slice of it; the result may share the mapping's memory."""
        value = self._tensors[key].detach()
        if dim is not None:
            value = take(value, dim, intervals)
        return value, value.numel() * value.element_size()


def _load_mapped(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise TensorParallelError(
            f"{path} holds more than tensors and plain values, and is not unpickled because that could run code: "
            f"{error}. "
            "Save its state_dict alone, or allow the classes with torch.serialization.add_safe_globals."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise TensorParallelError(
            f"The checkpoint file {path} is damaged, or of torch's format before 1.6 (load and save it again): {error}."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # Lightning's checkpoints, and many others
    if not isinstance(content, dict):
        raise TensorParallelError(f"{path} holds a {type(content).__name__}, not a state dict.")
    return content
