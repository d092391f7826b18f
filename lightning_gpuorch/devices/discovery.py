"""Which devices a node has, told without touching CUDA: a process that has used CUDA cannot fork or supervise well."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lightning_gpuorch.devices.pool import DevicePool
from lightning_gpuorch.errors import ConfigurationError


def count_gpus() -> int:
    """GPUs this process may use, by NVML and ``CUDA_VISIBLE_DEVICES``; 0 without a driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def device_pool(indices: Sequence[int], num_spares: int) -> DevicePool | None:
    """The devices of a node's ranks, with other visible GPUs as spares.

    Args:
        indices: CUDA ordinal of each local rank; empty on the CPU.
        num_spares: How many GPUs to hold back.

    Returns:
        The pool; None on the CPU.

    Raises:
        ConfigurationError: There are not so many other GPUs.
    """
    if not indices:
        if num_spares:
            raise ConfigurationError(f"spare_devices={num_spares}: there are no spares where no GPU is used.")
        return None
    others = [index for index in range(count_gpus()) if index not in indices]
    if len(others) < num_spares:
        raise ConfigurationError(
            f"spare_devices={num_spares}: {len(others)} GPUs are left beside devices {list(indices)}; use fewer devices."
        )
    return DevicePool.of_indices(list(indices), others[:num_spares])


def choose_devices(accelerator: str | None, devices: str) -> tuple[str, int, list[int] | None]:
    """Read ``--accelerator`` and ``--devices`` as Fabric's command line does.

    Args:
        accelerator: ``cpu``, ``gpu``, ``cuda``, ``auto`` or None.
        devices: A count, a list such as ``0,2``, ``-1`` or ``auto`` for all.

    Returns:
        The accelerator in force, the number of processes, and the device of each, where a list was given.

    Raises:
        ConfigurationError: Not a device specification, or more devices than there are.
    """
    gpus = 0 if accelerator == "cpu" else count_gpus()
    kind = accelerator if accelerator not in (None, "auto", "gpu") else ("cuda" if gpus else "cpu")
    if accelerator in ("gpu", "cuda") and not gpus:
        raise ConfigurationError(f"--accelerator {accelerator}: no GPU is visible to this process.")
    if kind not in ("cpu", "cuda"):
        raise ConfigurationError(f"--accelerator {accelerator} is not supported by gpuorch; use cpu or cuda.")
    text = devices.strip()
    if text in ("auto", "-1"):
        return kind, gpus if kind == "cuda" else 1, None
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigurationError(f"--devices {devices!r}: give a count, a list such as 0,1 or 'auto'.") from None
    if "," in text:
        if kind == "cuda" and (not numbers or max(numbers) >= gpus or len(set(numbers)) != len(numbers)):
            raise ConfigurationError(f"--devices {devices}: the node has GPUs 0 to {gpus - 1}, each to be named once.")
        return kind, len(numbers), numbers
    if numbers[0] < 1:
        raise ConfigurationError(f"--devices {devices}: at least one device is needed.")
    if kind == "cuda" and numbers[0] > gpus:
        raise ConfigurationError(f"--devices {devices}: only {gpus} GPUs are visible.")
    return kind, numbers[0], None
