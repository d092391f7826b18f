"""``GPUOrchStrategy`` for Trainer; see :mod:`lightning_gpuorch.strategies.pytorch`."""

from lightning_gpuorch.strategies.pytorch import GPUOrchStrategy

__all__ = ["GPUOrchStrategy"]
