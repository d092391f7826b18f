"""The memory a job may use on a device, and whether a model fits into it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_gpuorch.devices.host_memory import host_memory_bytes, resident_bytes
from lightning_gpuorch.errors import ConfigurationError, ModelDoesNotFitError

ACTIVATION_HEADROOM = 0.1
"""Share of the budget that must stay free for activations when a model is set up."""


def total_memory_bytes(device: torch.device) -> int:
    """Memory of a device; of the CPU, what the machine and this process's control groups allow."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return min(host_memory_bytes(), *_cgroup_limits(Path("/")))


def memory_budget_bytes(device: torch.device, memory_fraction: float) -> int:
    """Bytes a job may use on a device.

    Args:
        device: The device.
        memory_fraction: Share of its memory, above 0 and up to 1.

    Raises:
        ConfigurationError: The share is out of range.
    """
    if not 0 < memory_fraction <= 1:
        raise ConfigurationError(f"memory_fraction={memory_fraction!r} is out of range: it must be in (0, 1].")
    return int(total_memory_bytes(device) * memory_fraction)


def _cgroup_limits(root: Path) -> list[int]:
    """Memory limits of this process's control group and those above it, in both versions of the interface."""
    limits = [2**62]
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return limits
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            directory, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            directory, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = directory / path.lstrip("/")
        # Inside a container the path may be that of the host, and the container's own group is the root here.
        for place in (group, *group.parents):
            limits.extend(_limit_in(place / name))
            if place == directory:
                break
    return limits


def _limit_in(file: Path) -> Iterator[int]:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:  # no such group or controller here
        return
    if text != "max":
        yield int(text)


@dataclass(frozen=True)
class ModelBytes:
    """What a model's weights take on this rank.

    Attributes:
        parameters: Bytes of parameters; tied ones count once.
        buffers: Bytes of buffers.
    """

    parameters: int
    buffers: int

    @property
    def total(self) -> int:
        """Parameters and buffers."""
        return self.parameters + self.buffers


def model_bytes(module: torch.nn.Module) -> ModelBytes:
    """Measure a model's weights.

    Tied tensors count once. Tensors on meta count by shape, DTensors and quantised tensors by what they are made of on
    this rank.
    """
    seen: set[Any] = set()
    parameters = sum(_new_bytes(tensor, seen) for tensor in module.parameters())
    return ModelBytes(parameters, sum(_new_bytes(tensor, seen) for tensor in module.buffers()))


def _new_bytes(tensor: torch.Tensor, seen: set[Any]) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        parts = (getattr(tensor, name) for name in names)
        return sum(_new_bytes(part, seen) for part in parts if isinstance(part, torch.Tensor))
    size_bytes = tensor.numel() * tensor.element_size()
    key = id(tensor) if tensor.is_meta or not size_bytes else (tensor.device, tensor.data_ptr())
    if key in seen:
        return 0
    seen.add(key)
    return size_bytes


def check_model_fits(
    module: torch.nn.Module,
    budget_bytes: int,
    *,
    tensor_parallel_size: int = 1,
    activation_headroom: float = ACTIVATION_HEADROOM,
) -> None:
    """Refuse a model that cannot fit, before anything is moved.

    Args:
        module: The whole model, before it is sharded.
        budget_bytes: Bytes one device may use.
        tensor_parallel_size: Ranks that will share the model; each is taken to hold an equal part.
        activation_headroom: Share of the budget that must stay free.

    Raises:
        ModelDoesNotFitError: It does not fit; the message has the arithmetic and the degree that would do.
    """
    total = model_bytes(module).total
    usable = int(budget_bytes * (1 - activation_headroom))
    needed = math.ceil(total / tensor_parallel_size)
    if needed <= usable:
        return
    fitting = math.ceil(total / usable) if usable > 0 else None
    advice = f"tensor_parallel_size={fitting} would do" if fitting else "no tensor_parallel_size would do"
    shared = f", {format_bytes(needed)} on each of {tensor_parallel_size} ranks" if tensor_parallel_size > 1 else ""
    raise ModelDoesNotFitError(
        f"{type(module).__name__} needs {format_bytes(total)} for its weights{shared}. A device may give "
        f"{format_bytes(budget_bytes)}, less {activation_headroom:.0%} for activations = {format_bytes(usable)}: "
        f"{format_bytes(needed - usable)} too little; {advice}.",
        needed,
        budget_bytes,
        fitting,
    )


def memory_summary(device: torch.device) -> str:
    """One line that says where a device's memory is, for log lines."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return (
            f"{device}: {format_bytes(allocated)} in tensors, {format_bytes(reserved - allocated)} cached, "
            f"{format_bytes(max(0, total - free - reserved))} outside the allocator, {format_bytes(free)} free of "
            f"{format_bytes(total)}"
        )
    used = resident_bytes()
    return f"{device}: this process uses {format_bytes(used)} of {format_bytes(total_memory_bytes(device))}"


def format_bytes(count: int) -> str:
    """Write a number of bytes for people: ``512 B``, ``1.50 GiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"
