"""The devices of a node: which rank computes on which, and what is left when one fails.

Arithmetic over names of devices; nothing here touches one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lightning_gpuorch.errors import ConfigurationError


@dataclass
class Device:
    """A device of this node.

    Attributes:
        index: CUDA ordinal; None for a place on the CPU, of which there is no other.
        uuid: NVML's name for it, once somebody has told.
        fault: Why it is not used any more, if so.
    """

    index: int | None = None
    uuid: str | None = None
    fault: str | None = None

    def __str__(self) -> str:
        if self.index is None:
            return "cpu"
        return f"cuda:{self.index}" + (f" ({self.uuid})" if self.uuid else "")


@dataclass
class DevicePool:
    """The devices of this node: in use, free or bad.

    Attributes:
        devices: All of them.
        holders: Device by local rank.
    """

    devices: list[Device] = field(default_factory=list)
    holders: dict[int, Device] = field(default_factory=dict)

    @classmethod
    def of_indices(cls, indices: Sequence[int | None], spares: Iterable[int] = ()) -> DevicePool:
        """A pool in which local rank ``i`` has device ``indices[i]``, and ``spares`` are free.

        Raises:
            ConfigurationError: A spare is already in use.
        """
        held = [Device(index) for index in indices]
        free = [Device(index) for index in spares]
        taken = {device.index for device in held}
        twice = sorted(device.index for device in free if device.index in taken and device.index is not None)
        if twice:
            raise ConfigurationError(f"devices {twice} are in use; a spare device must be another one.")
        return cls([*held, *free], dict(enumerate(held)))

    @property
    def free(self) -> list[Device]:
        """Healthy devices nobody holds."""
        held = {id(device) for device in self.holders.values()}
        return [d for d in self.devices if d.index is not None and d.fault is None and id(d) not in held]

    def condemn(self, local_rank: int, why: str) -> Device | None:
        """Never use a rank's device again.

        Args:
            local_rank: Who holds it.
            why: What is wrong with it.

        Returns:
            The device; None if the rank holds none.
        """
        device = self.holders.pop(local_rank, None)
        if device is not None:
            device.fault = why
        return device

    def replace(self, local_rank: int) -> Device | None:
        """Give a rank a free device, if there is one."""
        for device in self.free:
            self.holders[local_rank] = device
            return device
        return None

    def release(self, local_ranks: Iterable[int]) -> list[Device]:
        """Let ranks that will not come back give up their devices.

        Returns:
            The healthy ones: they can serve others now.
        """
        given = [self.holders.pop(rank) for rank in local_ranks if rank in self.holders]
        return [device for device in given if device.fault is None and device.index is not None]
