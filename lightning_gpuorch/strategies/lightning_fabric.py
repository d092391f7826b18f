"""``GPUOrchStrategy`` for the Fabric of ``lightning_fabric``."""

from __future__ import annotations

from lightning_fabric.strategies import DDPStrategy

from lightning_gpuorch.strategies.fabric_strategy import FabricStrategy, on_one_device
from lightning_gpuorch.strategies.packages import STANDALONE

__all__ = ["GPUOrchStrategy"]


class GPUOrchStrategy(FabricStrategy, DDPStrategy):  # type: ignore[misc]  # noqa: D101 - below
    __doc__ = FabricStrategy.__doc__
    package = STANDALONE
    taken_by = "for lightning_fabric; for lightning.fabric, import lightning_gpuorch.fabric.GPUOrchStrategy"
    backward = on_one_device(DDPStrategy.backward)
