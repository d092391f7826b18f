"""``GPUOrchStrategy`` for the Trainer of ``lightning.pytorch``."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy

from lightning_gpuorch.strategies.packages import LIGHTNING
from lightning_gpuorch.strategies.trainer_strategy import TrainerStrategy

__all__ = ["GPUOrchStrategy"]


class GPUOrchStrategy(TrainerStrategy, DDPStrategy):  # noqa: D101 - below
    __doc__ = TrainerStrategy.__doc__
    package = LIGHTNING
    taken_by = (
        "for Trainer; for Fabric, import lightning_gpuorch.GPUOrchStrategy; "
        "for pytorch_lightning, lightning_gpuorch.pytorch_lightning.GPUOrchStrategy"
    )
