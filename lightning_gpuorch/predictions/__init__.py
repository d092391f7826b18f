"""Durable predictions: part files, the manifest, leases and the reader."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gpuorch.predictions.codec import check_storable
    from lightning_gpuorch.predictions.export import export_predictions
    from lightning_gpuorch.predictions.files import check_writable
    from lightning_gpuorch.predictions.layout import LoaderLayout, StoredBatch
    from lightning_gpuorch.predictions.manifest import Manifest
    from lightning_gpuorch.predictions.parts import Part, PartStore
    from lightning_gpuorch.predictions.reader import Predictions, read_predictions
    from lightning_gpuorch.predictions.writer import PartWriter

# Imported when first used: the supervisor needs the manifest, the journal and the leases, and must not import torch.
_HOMES = {
    "LoaderLayout": "layout",
    "Manifest": "manifest",
    "Part": "parts",
    "PartStore": "parts",
    "PartWriter": "writer",
    "Predictions": "reader",
    "StoredBatch": "layout",
    "check_storable": "codec",
    "check_writable": "files",
    "export_predictions": "export",
    "read_predictions": "reader",
}

__all__ = [
    "LoaderLayout",
    "Manifest",
    "Part",
    "PartStore",
    "PartWriter",
    "Predictions",
    "StoredBatch",
    "check_storable",
    "check_writable",
    "export_predictions",
    "read_predictions",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
