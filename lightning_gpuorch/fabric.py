"""``GPUOrchStrategy`` for Fabric; see :mod:`lightning_gpuorch.strategies.fabric`."""

from lightning_gpuorch.strategies.fabric import GPUOrchStrategy

__all__ = ["GPUOrchStrategy"]
