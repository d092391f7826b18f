"""What a predict call, and whatever stands around its steps, needs of the process it runs in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.devices.memory import ResourceAllocator
from lightning_gpuorch.devices.memory.transfer import Transfers
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.loading.tickets import Ticket
from lightning_gpuorch.telemetry.metrics.efficiency import Calibration
from lightning_gpuorch.telemetry.rank import RankTelemetry
from lightning_gpuorch.worker.world import World

StepWrapper = Callable[[Callable[[Any], Any], Any, Ticket], Any]
"""``wrapper(call, batch, ticket) -> output``: stands around a step and calls ``call`` once, or often on parts."""


class StepNote(NamedTuple):
    """What a rank of a tensor-parallel group tells the others with a batch, in integers.

    Attributes:
        peak: Memory that the batch before took, of :data:`~lightning_gpuorch.worker.dynamic_steps.GROUP_BUDGET`.
        leaves: Whether it has been asked to leave.
    """

    peak: int = 0
    leaves: int = 0


class LosesSamples(Protocol):
    """The predict call that is under way, as far as steps need it."""

    def lose(self, reasons: Mapping[int, str], ticket: Ticket) -> None:
        """Give samples of a batch up, by position."""
        ...


class StepContext(Protocol):
    """One rank of a replica; :class:`~lightning_gpuorch.worker.runtime.Runtime` is one."""

    config: OrchestratorConfig
    output_dir: Location | None
    device: torch.device
    length_fn: Callable[[Any], int] | None
    transfer: Callable[[Any, int], Any]
    transfers: Transfers | None
    step_wrappers: list[StepWrapper]
    surviving_steps: StepWrapper | None
    calibration: Calibration | None

    @property
    def world(self) -> World:
        """The world this process has joined."""
        ...

    @property
    def allocator(self) -> ResourceAllocator:
        """The memory budget of the device."""
        ...

    @property
    def telemetry(self) -> RankTelemetry:
        """What this rank records."""
        ...

    @property
    def job(self) -> LosesSamples | None:
        """The predict call that is under way."""
        ...

    def measured_with(self) -> dict[str, Any]:
        """What throughput depends on."""
        ...

    def compute_together(self, call: Callable[[Any], Any], batch: Any) -> Any:
        """Compute a batch on all ranks of the tensor-parallel group."""
        ...

    def compute_and_tell(
        self, call: Callable[[Any], Any], batch: Any, note: StepNote
    ) -> tuple[Any, Sequence[StepNote]]:
        """The same, and tell the others of the group something with it."""
        ...
