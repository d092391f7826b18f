"""``GPUOrchStrategy`` for the Fabric of ``lightning.fabric``."""

from __future__ import annotations

from lightning.fabric.strategies import DDPStrategy

from lightning_gpuorch.strategies.fabric_strategy import FabricStrategy, on_one_device
from lightning_gpuorch.strategies.packages import LIGHTNING

__all__ = ["GPUOrchStrategy"]


class GPUOrchStrategy(FabricStrategy, DDPStrategy):  # type: ignore[misc]  # noqa: D101 - below
    __doc__ = FabricStrategy.__doc__
    package = LIGHTNING
    taken_by = "for Fabric; for Trainer, import lightning_gpuorch.pytorch.GPUOrchStrategy"
    backward = on_one_device(DDPStrategy.backward)
