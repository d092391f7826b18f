"""``GPUOrchStrategy`` for Fabric of the package ``lightning_fabric``."""

from lightning_gpuorch.strategies.lightning_fabric import GPUOrchStrategy

__all__ = ["GPUOrchStrategy"]
