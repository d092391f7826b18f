"""``python -m lightning_gpuorch`` is ``gpuorch``."""

from lightning_gpuorch.cli import gpuorch

gpuorch(prog_name="gpuorch")
