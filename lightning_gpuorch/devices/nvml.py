"""Sources of device readings: NVML for a GPU, psutil for a CPU.

Every NVML call may block for ever on a sick driver. Nothing here protects from that: it runs on threads of the monitor
that nobody waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import psutil
import pynvml

from lightning_gpuorch.devices.host_memory import host_memory_bytes
from lightning_gpuorch.devices.reading import DeviceReading
from lightning_gpuorch.errors import GPUOrchError

_T = TypeVar("_T")


class DeviceNotFoundError(GPUOrchError):
    """The driver knows no GPU of this identity, or there is no driver."""


@dataclass(frozen=True)
class DeviceIdentity:
    """Which GPU is meant. NVML ignores ``CUDA_VISIBLE_DEVICES``, so an index does not tell.

    Attributes:
        uuid: With or without its prefix ``GPU-`` or ``MIG-``.
        pci_bus_id: ``domain:bus:device.function`` in hexadecimal; used where the UUID is unknown to the driver.
    """

    uuid: str | None = None
    pci_bus_id: str | None = None

    @classmethod
    def of_cuda_device(cls, index: int) -> DeviceIdentity:
        """Identity of a CUDA device of this process."""
        import torch

        properties: Any = torch.cuda.get_device_properties(index)
        uuid = getattr(properties, "uuid", None)
        bus = getattr(properties, "pci_bus_id", None)
        return cls(
            uuid=str(uuid) if uuid is not None else None,
            pci_bus_id=(
                f"{properties.pci_domain_id:08X}:{bus:02X}:{properties.pci_device_id:02X}.0"
                if bus is not None
                else None
            ),
        )


class DeviceReader(Protocol):
    """Reads one device, again and again, on one thread."""

    def read(self) -> DeviceReading:
        """Take a reading; may block."""
        ...


class HostReader:
    """Reads the CPU: this process's memory and the load of all cores."""

    def __init__(self) -> None:
        self._process = psutil.Process()

    def read(self) -> DeviceReading:
        """Take a reading."""
        return DeviceReading(
            device="cpu",
            memory_used_bytes=self._process.memory_info().rss,
            memory_total_bytes=host_memory_bytes(),
            utilization_ratio=psutil.cpu_percent() / 100,
        )


@contextmanager
def nvml_session() -> Iterator[None]:
    """NVML, initialised for the calling thread's use. Sessions may overlap: NVML counts them.

    Raises:
        DeviceNotFoundError: There is no driver.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise DeviceNotFoundError(f"NVML is not available: {error}.") from error
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def find_handle(identity: DeviceIdentity) -> Any:
    """The NVML handle of a GPU: by UUID, then by PCI bus id, never by index.

    Raises:
        DeviceNotFoundError: The driver does not know it.
        pynvml.NVMLError: The driver fails: the GPU may be lost.
    """
    uuid = identity.uuid
    if uuid:
        for candidate in [uuid] if uuid.startswith(("GPU-", "MIG-")) else [f"GPU-{uuid}", f"MIG-{uuid}"]:
            try:
                return pynvml.nvmlDeviceGetHandleByUUID(candidate)
            except pynvml.NVMLError as error:
                if error.value not in (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_INVALID_ARGUMENT):
                    raise
    if identity.pci_bus_id:
        try:
            return pynvml.nvmlDeviceGetHandleByPciBusId(identity.pci_bus_id)
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_NOT_FOUND:
                raise
    raise DeviceNotFoundError(f"the driver knows no GPU with UUID {uuid} or PCI bus id {identity.pci_bus_id}.")


_NOT_REPORTED = frozenset(
    {
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_NO_PERMISSION,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_INVALID_ARGUMENT,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        pynvml.NVML_ERROR_DEPRECATED,
    }
)


_RECOVERY_ACTION_FIELD = 230


class NVMLReader:
    """Reads one GPU within an :func:`nvml_session`.

    Args:
        identity: Which GPU.

    Raises:
        DeviceNotFoundError: The driver does not know it.
    """

    def __init__(self, identity: DeviceIdentity):
        self.handle = find_handle(identity)
        self.uuid = str(pynvml.nvmlDeviceGetUUID(self.handle))
        self._not_reported: set[str] = set()
        self._error: int | None = None

    def read(self) -> DeviceReading:
        """Take a reading of everything the GPU reports."""
        handle = self.handle
        self._error = None
        try:
            memory = self._ask("memory", lambda: pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2))
            power = self._ask("power", lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
            clock = self._ask("clock", lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
            busy = self._ask("utilization", lambda: pynvml.nvmlDeviceGetUtilizationRates(handle))
            rows = self._ask("rows", lambda: pynvml.nvmlDeviceGetRemappedRows(handle))
            pages = self._ask("pages", lambda: pynvml.nvmlDeviceGetRetiredPagesPendingStatus(handle))
            return DeviceReading(
                device=self.uuid,
                memory_used_bytes=memory.used if memory else None,
                memory_total_bytes=memory.total if memory else None,
                temperature_celsius=self._ask(
                    "temperature", lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
                ),
                temperature_slowdown_celsius=self._ask(
                    "threshold",
                    lambda: pynvml.nvmlDeviceGetTemperatureThreshold(
                        handle, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
                    ),
                ),
                power_watts=power / 1000 if power is not None else None,
                sm_clock_hertz=clock * 1e6 if clock is not None else None,
                utilization_ratio=busy.gpu / 100 if busy else None,
                clock_event_reasons=self._ask("events", lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)),
                ecc_uncorrected=self._ask(
                    "ecc",
                    lambda: pynvml.nvmlDeviceGetTotalEccErrors(
                        handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
                    ),
                ),
                row_remap_pending=bool(rows[2]) if rows else None,
                row_remap_failure=bool(rows[3]) if rows else None,
                page_retirement_pending=bool(pages) if pages is not None else None,
                pcie_replays=self._ask("replays", lambda: pynvml.nvmlDeviceGetPcieReplayCounter(handle)),
                nvlinks_up=self._ask("nvlink", self._links),
                recovery_action=self._ask("recovery", self._recovery_action),
                nvml_error=self._error,
            )
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_GPU_IS_LOST:
                raise
            return DeviceReading(device=self.uuid, lost=True)

    def _ask(self, name: str, call: Callable[[], _T]) -> _T | None:
        """One value; None if it is not reported, which is asked once only, or fails, which is noted."""
        if name in self._not_reported:
            return None
        try:
            return call()
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
                raise
            if error.value in _NOT_REPORTED:
                self._not_reported.add(name)
            else:
                # A reset that is due explains whatever else fails.
                self._error = error.value if self._error != pynvml.NVML_ERROR_RESET_REQUIRED else self._error
            return None

    def _links(self) -> int | None:
        up = 0
        for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
            try:
                up |= bool(pynvml.nvmlDeviceGetNvLinkState(self.handle, link)) << link
            except pynvml.NVMLError as error:
                if error.value not in _NOT_REPORTED:
                    raise
                return up if link else None
        return up

    def _recovery_action(self) -> int | None:
        (field,) = pynvml.nvmlDeviceGetFieldValues(self.handle, [_RECOVERY_ACTION_FIELD])
        # Each field has a code of its own; a value that is not supported must not read as 0, which is healthy.
        return int(field.value.uiVal) if field.nvmlReturn == pynvml.NVML_SUCCESS else None
