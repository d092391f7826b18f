"""Local checkpoints are mapped into memory instead of read, so that only what is kept is read."""

from __future__ import annotations

import os
import zipfile
from typing import Any

import torch


class MappedLoading:
    """Mixed in before Lightning's ``TorchCheckpointIO``."""

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Load a checkpoint; the tensors of a local one stay in its file until they are used."""
        if not os.path.isfile(path) or not zipfile.is_zipfile(path):
            return super().load_checkpoint(path, *args, **options)  # type: ignore[misc,no-any-return]
        weights_only = options.get("weights_only")
        return torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)  # type: ignore[no-any-return]
