"""``GPUOrchStrategy`` for Trainer of the package ``pytorch_lightning``."""

from lightning_gpuorch.strategies.pytorch_lightning import GPUOrchStrategy

__all__ = ["GPUOrchStrategy"]
