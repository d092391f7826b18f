"""Keys of a whole job, compared when it is complete: two equal ones would join predictions to the wrong input."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.storage.journal import PartJournal, opened
from lightning_gpuorch.predictions.storage.parquet_file import pyarrow
from lightning_gpuorch.predictions.storage.part_frame import read_whole

log = logging.getLogger(__name__)

MAX_KEYS = 2**25
"""As many are compared; each takes 8 bytes of memory."""
_SHOWN = 10


def refuse_equal_keys(directory: Location, key_column: str) -> None:
    """Raise if two samples of a dataloader have the same key; every part is read once, and a second time if there are some.

    Args:
        directory: Of the dataloader; its parts are Parquet files.
        key_column: The column of the keys.

    Raises:
        ConfigurationError: There are equal keys; the first ones are named. All predictions are durable.
    """
    journal = PartJournal(directory, "parquet")
    num_keys = sum(journal.header(chunk).entries.num_samples for chunk in journal.done())
    if num_keys > MAX_KEYS:
        log.warning(
            "%s has %d keys, of which those of a batch were compared and no others: %d at most are",
            directory, num_keys, MAX_KEYS,
        )  # fmt: skip
        return
    hashes = np.fromiter((hash(key) for keys, _ in _columns(journal, key_column) for key in keys), np.int64)
    found, counts = np.unique(hashes, return_counts=True)
    suspected = set(found[counts > 1].tolist())
    if not suspected:
        return
    seen: dict[Any, Any] = {}
    equal: list[str] = []
    for keys, indices in _columns(journal, key_column):
        for key, index in zip(keys, indices, strict=True):
            if hash(key) not in suspected:
                continue
            if key in seen and len(equal) < _SHOWN:
                equal.append(f"{key!r} of samples {seen[key]} and {index}")
            seen.setdefault(key, index)
    if equal:
        raise ConfigurationError(
            f"key_column={key_column!r} is not unique: {'; '.join(equal)}. All predictions are in {directory.parent}; join "
            "them to the input by their column 'index'."
        )


def _columns(journal: PartJournal, key_column: str) -> Iterator[tuple[list[Any], list[Any]]]:
    """Keys and dataset indices of each part; samples with an error have no key."""
    pa = pyarrow()
    for chunk in sorted(journal.done()):
        with opened(journal.path(chunk)) as (file, file_bytes, source):
            raw = read_whole(file, file_bytes, source)
        table = pa.parquet.ParquetFile(pa.BufferReader(pa.py_buffer(raw))).read([key_column, "index", "error_message"])
        table = table.filter(table["error_message"].is_null())
        yield table[key_column].to_pylist(), table["index"].to_pylist()
