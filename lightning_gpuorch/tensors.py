"""What is done to batches, outputs and weights as a whole: digests, shards made whole, copies on the host."""

from __future__ import annotations

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


def digest(batch: Any) -> int:
    """A checksum of shapes and of some elements of every tensor in a batch."""
    running = 0

    def add(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal running
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 64)].to("cpu").contiguous()
        running = zlib.crc32(repr(tuple(tensor.shape)).encode(), running)
        running = zlib.crc32(picked.view(torch.uint8).numpy().tobytes(), running)
        return tensor

    apply_to_collection(batch, torch.Tensor, add)
    return running


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
    return apply_to_collection(output, (torch.Tensor, np.ndarray), _own_copy)


def _own_copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.to("cpu") if value.device.type != "cpu" else value.clone()
    return value.copy()


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
