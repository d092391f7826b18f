"""The command line: ``gpuorch`` and ``lightning``."""

from lightning_gpuorch.cli.main import gpuorch, lightning

__all__ = ["gpuorch", "lightning"]
