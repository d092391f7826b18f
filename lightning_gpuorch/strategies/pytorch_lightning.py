"""``GPUOrchStrategy`` for the Trainer of ``pytorch_lightning``."""

from __future__ import annotations

from pytorch_lightning.strategies import DDPStrategy

from lightning_gpuorch.strategies.packages import STANDALONE
from lightning_gpuorch.strategies.trainer_strategy import TrainerStrategy

__all__ = ["GPUOrchStrategy"]


class GPUOrchStrategy(TrainerStrategy, DDPStrategy):  # type: ignore[misc]  # noqa: D101 - below
    __doc__ = TrainerStrategy.__doc__
    package = STANDALONE
    taken_by = "for pytorch_lightning; for lightning.pytorch, import lightning_gpuorch.pytorch.GPUOrchStrategy"
