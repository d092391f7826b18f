"""Durable predictions for a Trainer with another Lightning strategy."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from lightning_gpuorch._version import __version__
from lightning_gpuorch.config import storage_options_in_force
from lightning_gpuorch.errors import ConfigurationError, MissingPredictionsError, format_indices
from lightning_gpuorch.paths import location
from lightning_gpuorch.predictions.loading.describe import describe
from lightning_gpuorch.predictions.loading.source import MapSource
from lightning_gpuorch.predictions.reading.reader import read_predictions
from lightning_gpuorch.predictions.samples.tensors import to_host
from lightning_gpuorch.predictions.storage.journal import loader_directory
from lightning_gpuorch.predictions.storage.layout import LoaderLayout, StoredBatch
from lightning_gpuorch.predictions.storage.manifest import Manifest, open_or_create
from lightning_gpuorch.predictions.storage.parts import PartStore
from lightning_gpuorch.predictions.storage.stores import store_of
from lightning_gpuorch.predictions.storage.writer import PartWriter

log = logging.getLogger(__name__)

_PARTS_PER_RANK = 10**8


class DurablePredictionWriter(BasePredictionWriter):
    """Writes every batch's predictions to checksummed part files, and checks at the end that none is missing.

    For ``strategy="ddp"``, ``"auto"`` and others. With ``strategy="gpuorch"`` predictions are durable anyway: pass
    ``output_dir`` to the strategy, and this callback steps aside. Read the results with
    :func:`lightning_gpuorch.read_predictions`; they are in dataset order, whichever rank computed them.

    Another strategy decides itself what each rank computes, so a rerun computes everything again; only
    ``strategy="gpuorch"`` resumes.

    Args:
        output_dir: Where results are kept; the URL of a prefix in an object store, too.
        batches_per_part: Batches written together.
        completion_timeout_seconds: How long rank 0 waits at the end for the parts of the others.
        storage_options: Of the object store; see :class:`~lightning_gpuorch.OrchestratorConfig`.

    Raises:
        MissingPredictionsError: At the end, on rank 0: samples are missing; they are named.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        batches_per_part: int = 16,
        completion_timeout_seconds: float = 600.0,
        storage_options: Mapping[str, str] | None = None,
    ):
        super().__init__(write_interval="batch")
        self.output_dir = location(output_dir, "output_dir", storage_options_in_force(storage_options))
        store_of(self.output_dir)  # what is wrong with it is said before anything starts
        self._batches_per_part = batches_per_part
        self._completion_timeout_seconds = completion_timeout_seconds
        self._writer: PartWriter | None = None
        self._pending: dict[int, list[StoredBatch]] = {}
        self._parts_written: dict[int, int] = {}
        self._layouts: list[LoaderLayout] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make sure that a Trainer of pytorch_lightning tells the indices of batches: it does to its own writers."""
        homes = {kind.__module__.split(".")[0] for kind in type(trainer).__mro__}
        if stage == "predict" and "pytorch_lightning" in homes:
            from pytorch_lightning.callbacks import BasePredictionWriter as OtherWriter

            trainer.callbacks.append(
                type("IndexKeeper", (OtherWriter,), {"write_on_batch_end": _write_nothing})("batch")
            )

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the directory."""
        if getattr(trainer.strategy, "runtime", None) is not None:
            log.info("DurablePredictionWriter: strategy='gpuorch' writes durable predictions itself; stepping aside")
            return
        loop = trainer.predict_loop
        self._layouts = [_scattered_layout(loader) for loader in loop._combined_loader.flattened]
        manifest = Manifest(
            loaders=self._layouts,
            model_fingerprint=None,
            versions={"lightning_gpuorch": __version__, "torch": torch.__version__},
        )
        if trainer.is_global_zero:
            open_or_create(self.output_dir, manifest)
        trainer.strategy.barrier("gpuorch-output-directory")
        stores = [PartStore(loader_directory(self.output_dir, i)) for i in range(len(self._layouts))]
        self._writer = PartWriter(stores, max_pending_bytes=256 * 2**20, on_committed=lambda *committed: None)
        self._pending = {i: [] for i in range(len(stores))}
        self._parts_written = dict.fromkeys(self._pending, 0)

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take one batch's predictions."""
        if self._writer is None:
            return
        if not batch_indices:
            raise ConfigurationError(
                f"dataloader {dataloader_idx} does not tell which samples a batch holds (an IterableDataset or no "
                "DataLoader); DurablePredictionWriter needs that. strategy='gpuorch' handles such loaders."
            )
        indices = list(batch_indices)
        self._pending[dataloader_idx].append(
            StoredBatch(first_unit=indices[0], indices=indices, size=len(indices), output=to_host(prediction))
        )
        if len(self._pending[dataloader_idx]) >= self._batches_per_part:
            self._write(trainer.global_rank, dataloader_idx)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what is left; rank 0 then waits until every sample of the dataset is there."""
        if self._writer is None:
            return
        self._close(trainer.global_rank)
        if trainer.is_global_zero and trainer.limit_predict_batches == 1.0:
            self._wait_until_complete()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keep what is computed."""
        if self._writer is not None:
            self._close(trainer.global_rank)

    def _close(self, rank: int) -> None:
        writer = self._writer
        assert writer is not None
        for loader in self._pending:
            self._write(rank, loader)
        self._writer = None
        writer.close()

    def _write(self, rank: int, loader: int) -> None:
        batches, self._pending[loader] = self._pending[loader], []
        if batches:
            assert self._writer is not None
            part = rank * _PARTS_PER_RANK + self._parts_written[loader]
            self._parts_written[loader] += 1
            self._writer.put(loader, part, batches, {"rank": rank})

    def _wait_until_complete(self) -> None:
        deadline = time.monotonic() + self._completion_timeout_seconds
        while True:
            found = read_predictions(self.output_dir, allow_missing=True)
            missing = [list(p.missing) for p in (found if len(self._layouts) > 1 else [found])]
            if not any(missing):
                return
            if time.monotonic() > deadline:
                text = "; ".join(f"dataloader {i}: {format_indices(m)}" for i, m in enumerate(missing) if m)
                raise MissingPredictionsError(
                    f"{sum(map(len, missing))} samples have no prediction {self._completion_timeout_seconds:g} s after "
                    f"rank 0 was done: {text}. A rank has died or is stuck.",
                    [index for indices in missing for index in indices],
                )
            time.sleep(0.2)


def _write_nothing(*args: Any) -> None:
    """It is there so that indices are kept."""


def _scattered_layout(loader: Any) -> LoaderLayout:
    """How the parts of one loader are described when another strategy has shared it out."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None or not hasattr(dataset, "__len__"):
        raise ConfigurationError(
            f"DurablePredictionWriter needs a DataLoader over a dataset with a length, not {type(loader).__name__}."
        )
    source = describe(loader)
    batch_size = source.batch_size if isinstance(source, MapSource) else getattr(loader.batch_sampler, "batch_size", 1)
    return LoaderLayout(
        unit="scattered",
        num_units=len(dataset),
        batch_size=int(batch_size or 1),
        chunk_size=1,
        identity={"dataset": f"{type(dataset).__module__}.{type(dataset).__qualname__}", "length": len(dataset)},
    )
