"""What is done to batches, outputs and weights as a whole: digests, shards made whole, copies on the host."""

from __future__ import annotations

import array
import collections
import copy
import hashlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection


def whole(output: Any) -> Any:
    """Gather sharded tensors and wait for those still on their way; every rank of the group must take part."""

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        if hasattr(tensor, "trigger_wait"):
            tensor = tensor.trigger_wait()
        return tensor

    return apply_to_collection(output, torch.Tensor, convert)


_MAX_ITEMS = 64
_MAX_VALUES = 100_000
_MAX_DEPTH = 16


def digest(batch: Any, max_elements: int | None = 64) -> int:
    """A checksum of a batch: of types, shapes, text and numbers, and of some elements of every tensor and array.

    Objects count by their attributes, or by their type alone where they have none. Of long sequences some items count.

    Args:
        batch: Anything a loader gives.
        max_elements: Elements to take of each tensor, evenly spread; None takes all, and all items of sequences.
    """
    return _Digest(max_elements).of(batch)


class _Digest:
    def __init__(self, max_elements: int | None):
        self._max_elements = max_elements
        self._running = 0
        self._values_left = _MAX_VALUES  # objects may refer to each other in circles

    def of(self, value: Any) -> int:
        self._add(value, 0)
        return self._running

    def _feed(self, content: bytes) -> None:
        self._running = zlib.crc32(content, self._running)

    def _add(self, value: Any, depth: int) -> None:
        self._values_left -= 1
        if isinstance(value, (torch.Tensor, np.ndarray)):
            self._add_elements(value)
        elif isinstance(value, (str, bytes, bytearray)):
            content = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else bytes(value)
            self._feed(f"{type(value).__name__}:{len(content)}:".encode())
            self._feed(content)
        elif value is None or isinstance(value, (bool, int, float, complex, np.generic)):
            self._feed(f"{value!r};".encode())
        elif depth == _MAX_DEPTH or self._values_left < 0:
            return
        elif isinstance(value, Mapping):
            self._feed(f"mapping:{len(value)}:".encode())
            for key, item in value.items():
                self._add(key, depth + 1)
                self._add(item, depth + 1)
        elif isinstance(value, (list, tuple)):
            self._feed(f"{len(value)}:".encode())
            step = 1 if self._max_elements is None else max(1, len(value) // _MAX_ITEMS)
            for item in value[::step]:
                self._add(item, depth + 1)
        else:
            self._feed(type(value).__qualname__.encode())
            if hasattr(value, "__array_interface__"):  # images, among others
                self._add_elements(np.asarray(value))
            elif isinstance(getattr(value, "__dict__", None), dict):
                self._add(vars(value), depth + 1)

    def _add_elements(self, array: torch.Tensor | np.ndarray[Any, Any]) -> None:
        self._feed(f"{array.dtype}{tuple(array.shape)}".encode())
        if isinstance(array, np.ndarray):
            some = array.reshape(-1)[:: self._step(array.size)]
            self._add(some.tolist(), 0) if array.dtype.hasobject else self._feed(some.tobytes())
            return
        if array.is_sparse or array.is_quantized or array.layout is not torch.strided or array.is_nested:
            return
        flat = array.detach().reshape(-1)
        picked = flat[:: self._step(flat.numel())].to("cpu").contiguous()
        self._feed(picked.resolve_conj().resolve_neg().view(torch.uint8).numpy().tobytes())

    def _step(self, count: int) -> int:
        return 1 if self._max_elements is None else max(1, count // self._max_elements)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch, and every object that knows how to move itself."""
    if hasattr(batch, "to") and not isinstance(batch, torch.Tensor):
        return batch.to(device)
    return apply_to_collection(batch, torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True))


def to_host(output: Any) -> Any:
    """Copy a prediction to memory of its own, on the host.

    A copy also for tensors that are there already: the model may reuse its output buffer for the next batch, while this
    one still waits for the disk.
    """
    return apply_to_collection(output, (torch.Tensor, *LEAVES), own_copy)


class _Foreign(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return type(instance).__module__.split(".")[0] in ("pandas", "polars", "pyarrow", "PIL", "scipy")


class _ForeignValue(metaclass=_Foreign):
    """Any table, image or matrix of another package, in ``isinstance``."""


LEAVES = (np.ndarray, set, collections.deque, bytes, bytearray, memoryview, array.array, range, _ForeignValue)
"""What is copied as a whole: some can be changed by their holders, others are sequences that no list makes."""


def own_copy(value: Any) -> Any:
    """A copy of a tensor, or of one of :data:`LEAVES`, in memory of its own, on the host."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.to("cpu") if value.device.type != "cpu" else value.clone()
    if isinstance(value, collections.deque):
        return collections.deque(map(to_host, value), value.maxlen)
    if isinstance(value, memoryview):
        return value if value.readonly or not value.c_contiguous else _copied_view(value)
    return value if isinstance(value, (bytes, range)) else copy.deepcopy(value)


def _copied_view(view: memoryview) -> memoryview:
    flat = memoryview(bytearray(view.tobytes()))
    return flat.cast(view.format, list(view.shape or ())) if view.nbytes else flat  # type: ignore[call-overload]


def fingerprint_weights(module: torch.nn.Module, samples_per_tensor: int = 32) -> str:
    """A digest of names, shapes, dtypes and some elements of everything in a module's state dict.

    It tells apart models with different weights, in time that does not grow with their size. Sharded parameters count
    by name and global shape only, so that the same weights give the same digest at every tensor-parallel size.

    Args:
        module: The model.
        samples_per_tensor: Elements to take of each tensor, evenly spread.
    """
    return fingerprint_tensors(module.state_dict(keep_vars=True), samples_per_tensor)


def fingerprint_tensors(tensors: Mapping[str, Any], samples_per_tensor: int = 32) -> str:
    """The digest of :func:`fingerprint_weights`, of a state dict; values that are no tensors do not count."""
    running = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        running.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        if tensor.is_meta or type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.numel():
            continue
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // samples_per_tensor)
        picked = flat[::step][:samples_per_tensor].to("cpu").contiguous()
        running.update(picked.view(torch.uint8).numpy().tobytes())
    return running.hexdigest()[:16]


WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp"})


def fingerprint_files(path: Path, samples_per_file: int = 64, sample_bytes: int = 4096) -> str:
    """A digest of the names, sizes and some pieces of a checkpoint's files; where they lie does not matter.

    Args:
        path: A file, or a directory whose files of weights count.
        samples_per_file: Pieces to read of each file, evenly spread.
        sample_bytes: Size of a piece.
    """
    folder = path if path.is_dir() else path.parent
    single = path.is_file() and path.suffix in WEIGHT_SUFFIXES
    files = [path] if single else sorted(file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    running = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        running.update(f"{file.name if len(files) > 1 else file.suffix}:{size}".encode())
        with open(file, "rb") as stream:
            for index in range(samples_per_file):
                stream.seek(max(0, size - sample_bytes) * index // max(1, samples_per_file - 1))
                running.update(stream.read(sample_bytes))
    return running.hexdigest()[:16]
