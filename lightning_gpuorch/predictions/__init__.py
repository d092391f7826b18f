"""Durable predictions: part files, the manifest, leases and the reader."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gpuorch._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning_gpuorch.predictions.reading.export import export_predictions
    from lightning_gpuorch.predictions.reading.reader import Predictions, read_predictions
    from lightning_gpuorch.predictions.storage.encode import check_storable
    from lightning_gpuorch.predictions.storage.layout import LoaderLayout, StoredBatch
    from lightning_gpuorch.predictions.storage.manifest import Manifest
    from lightning_gpuorch.predictions.storage.parts import Part, PartStore
    from lightning_gpuorch.predictions.storage.stores import check_writable
    from lightning_gpuorch.predictions.storage.writer import PartWriter

# Imported when first used: the supervisor needs the manifest, the journal and the leases, and must not import torch.
_HOMES = {
    "LoaderLayout": "storage.layout",
    "Manifest": "storage.manifest",
    "Part": "storage.parts",
    "PartStore": "storage.parts",
    "PartWriter": "storage.writer",
    "Predictions": "reading.reader",
    "StoredBatch": "storage.layout",
    "check_storable": "storage.encode",
    "check_writable": "storage.stores",
    "export_predictions": "reading.export",
    "read_predictions": "reading.reader",
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


__getattr__ = lazy_exports(__name__, _HOMES)
