"""Exports predictions for other tools, sample by sample into one file, in memory that does not grow.

A row is one sample: ``dataloader`` (only if there are several), ``index`` (dataset index; None for streams), and
``prediction``. JSON lines keep its structure. The other formats get a column per leaf, named by its path:
``{"boxes": (a, b)}`` becomes ``prediction.boxes.0`` and ``prediction.boxes.1``. In Parquet and Hugging Face datasets tensors
become (nested) lists of their element type, in CSV JSON, in NPZ arrays. NPZ alone takes as much memory as the predictions do.

The target appears when it is whole, and replaces what was there.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence

from lightning_gpuorch.errors import ConfigurationError, GPUOrchError
from lightning_gpuorch.paths import ObjectPath, local_path
from lightning_gpuorch.predictions.reading.export_writers import WRITERS, Row
from lightning_gpuorch.predictions.reading.reader import Predictions, read_predictions
from lightning_gpuorch.predictions.storage.files import storage_error


def export_predictions(
    directory: str | os.PathLike[str] | ObjectPath,
    target: str | os.PathLike[str],
    format: str | None = None,  # noqa: A002 - the word every exporter uses
    *,
    allow_missing: bool = False,
    storage_options: Mapping[str, str] | None = None,
) -> int:
    """Write all predictions of a job into one file, a row per sample.

    Args:
        directory: The job's output directory.
        target: The file to write.
        format: "jsonl", "parquet", "csv", "npz", or "hf" (a directory for ``datasets.load_from_disk``); by default what the
            name of ``target`` ends with.
        allow_missing: Export an incomplete job as well; its missing samples have no row.
        storage_options: Of the object store that ``directory`` is in; see :class:`~lightning_gpuorch.OrchestratorConfig`.

    Returns:
        Number of rows.

    Raises:
        ConfigurationError: The format is unknown, its package is not installed, or there are no predictions.
        MissingPredictionsError: Predictions are missing, and ``allow_missing`` is False.
        UnsupportedPredictionError: A prediction has no form in this format.
        CannotSplitError: A prediction cannot be cut by sample.
        PredictionStorageError: The target cannot be written.
    """
    path = local_path(target, "target")
    name = format or path.suffix[1:].lower()
    if name not in WRITERS:
        raise ConfigurationError(f"cannot export to {name!r}: name one of {sorted(WRITERS)}, or a target that ends so.")
    if name == "hf" and path.exists():
        raise ConfigurationError(f"{path} exists: a Hugging Face dataset is a directory of its own. Name another one.")
    found = read_predictions(directory, allow_missing=allow_missing, storage_options=storage_options)
    loaders: list[Predictions] = [found] if isinstance(found, Predictions) else found
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        num_rows = WRITERS[name](_rows(loaders), temporary)
        os.replace(temporary, path)
    except GPUOrchError:
        raise
    except OSError as error:
        raise storage_error(error, path.absolute().parent) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    return num_rows


def _rows(loaders: Sequence[Predictions]) -> Iterator[Row]:
    for number, predictions in enumerate(loaders):
        loader = number if len(loaders) > 1 else None
        for index, sample in predictions.indexed_samples():
            yield Row(loader, index, sample)
