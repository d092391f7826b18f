"""What is done to batches, outputs and weights as a whole: digests, shards made whole, copies on the host."""

from __future__ import annotations

import zlib
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
    """A digest of names, shapes, dtypes and some elements of every parameter and buffer.

    It tells apart models with different weights, in time that does not grow with their size. Sharded parameters count
    by name and global shape only, so that the same weights give the same digest at every tensor-parallel size.

    Args:
        module: The model.
        samples_per_tensor: Elements to take of each tensor, evenly spread.
    """
    import hashlib

    running = hashlib.sha256()
    for name, tensor in sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()):
        running.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        if tensor.is_meta or type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.numel():
            continue
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // samples_per_tensor)
        picked = flat[::step][:samples_per_tensor].to("cpu").contiguous()
        running.update(picked.view(torch.uint8).numpy().tobytes())
    return running.hexdigest()[:16]
