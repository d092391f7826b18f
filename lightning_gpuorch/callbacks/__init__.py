"""Callbacks for Trainer and Fabric; one class serves both, and other Lightning strategies as well."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gpuorch.callbacks.durable_writer import DurablePredictionWriter
    from lightning_gpuorch.callbacks.progress_bar import JobProgressBar

_HOMES = {
    "DurablePredictionWriter": "lightning_gpuorch.callbacks.durable_writer",
    "JobProgressBar": "lightning_gpuorch.callbacks.progress_bar",
}

__all__ = ["DurablePredictionWriter", "JobProgressBar"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
