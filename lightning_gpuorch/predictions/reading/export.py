"""Exports predictions for other tools, sample by sample into one file, in memory that does not grow.

A row is one sample: ``dataloader`` (only if there are several), ``index`` (dataset index; None for streams), and
``prediction``. JSON lines keep its structure. Parquet gets a column per leaf, named by its path: ``{"boxes": (a, b)}``
becomes ``prediction.boxes.0`` and ``prediction.boxes.1``; tensors become (nested) lists of their element type.

The target appears when it is whole, and replaces what was there.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_gpuorch.errors import ConfigurationError, GPUOrchError, UnsupportedPredictionError
from lightning_gpuorch.paths import ObjectPath, local_path
from lightning_gpuorch.predictions.reading.reader import Predictions, read_predictions
from lightning_gpuorch.predictions.storage.files import storage_error
from lightning_gpuorch.predictions.storage.values.base import type_name

_ROWS_PER_GROUP = 1024
_BYTES_PER_GROUP = 2**23


@dataclasses.dataclass(frozen=True)
class _Row:
    loader: int | None
    index: int | None
    prediction: Any


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
        format: "jsonl" or "parquet"; by default what the name of ``target`` ends with.
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
    if name not in _WRITERS:
        raise ConfigurationError(
            f"cannot export to {name!r}: name one of {sorted(_WRITERS)}, or a target that ends so."
        )
    found = read_predictions(directory, allow_missing=allow_missing, storage_options=storage_options)
    loaders: list[Predictions] = [found] if isinstance(found, Predictions) else found
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        num_rows = _WRITERS[name](_rows(loaders), temporary)
        os.replace(temporary, path)
    except GPUOrchError:
        raise
    except OSError as error:
        raise storage_error(error, path.absolute().parent) from error
    finally:
        temporary.unlink(missing_ok=True)
    return num_rows


def _rows(loaders: Sequence[Predictions]) -> Iterator[_Row]:
    for number, predictions in enumerate(loaders):
        loader = number if len(loaders) > 1 else None
        for index, sample in predictions.indexed_samples():
            yield _Row(loader, index, sample)


# --- JSON lines -------------------------------------------------------------------------------------------------------


def _write_jsonl(rows: Iterator[_Row], path: Path) -> int:
    num_rows = 0
    with open(path, "x", encoding="utf-8") as file:
        for row in rows:
            record: dict[str, Any] = {} if row.loader is None else {"dataloader": row.loader}
            record |= {"index": row.index, "prediction": _to_json(row.prediction, "prediction")}
            file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")
            num_rows += 1
        file.flush()
        os.fsync(file.fileno())
    return num_rows


def _to_json(value: Any, path: str) -> Any:
    """Turn a prediction into plain JSON; what is not finite is "NaN", "Infinity" or "-Infinity", as in protobuf."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {1: "Infinity", -1: "-Infinity"}.get(_sign(value), "NaN")
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, complex):
        return [_to_json(value.real, path), _to_json(value.imag, path)]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        array = _to_array(value, path)
        return _to_json(array.astype(str).tolist() if array.dtype.kind in "Mm" else array.tolist(), path)
    if isinstance(value, Mapping):
        return {str(key): _to_json(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item, f"{path}[{position}]") for position, item in enumerate(value)]
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: _to_json(getattr(value, field.name), f"{path}.{field.name}") for field in fields}
    raise UnsupportedPredictionError(f"{path} is of type {type_name(type(value))}, which has no form in JSON.")


def _sign(value: float) -> int:
    return 0 if math.isnan(value) else int(math.copysign(1, value))


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _write_parquet(rows: Iterator[_Row], path: Path) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigurationError(
            "exporting to Parquet needs pyarrow: pip install 'lightning_gpuorch[parquet]', or export to jsonl."
        ) from error
    writer: Any = None
    num_rows = 0
    try:
        for group in _groups(rows):
            try:
                table = pa.table({name: _parquet_column(pa, values, name) for name, values in _columns(group).items()})
                if writer is None:
                    writer = pq.ParquetWriter(path, table.schema)
                table = table.cast(writer.schema)
            except (pa.ArrowException, ValueError) as error:
                raise UnsupportedPredictionError(
                    f"samples {num_rows} to {num_rows + len(group) - 1} do not fit the columns of a Parquet file: "
                    f"{error} Export to jsonl, which takes any structure."
                ) from error
            writer.write_table(table)
            num_rows += len(group)
        if writer is None:
            writer = pq.ParquetWriter(path, pa.schema([("index", pa.int64())]))
    finally:
        if writer is not None:
            writer.close()
    return num_rows


def _columns(group: Sequence[_Row]) -> dict[str, list[Any]]:
    """Turn rows into columns.

    Raises:
        ValueError: Rows have different leaves, or two leaves of one row have the same name.
    """
    columns: dict[str, list[Any]] = {} if group[0].loader is None else {"dataloader": [row.loader for row in group]}
    columns["index"] = [row.index for row in group]
    names = [name for name, _ in _leaves(group[0].prediction, "prediction")]
    if len(set(names)) != len(names):
        raise ValueError(f"two leaves have the same name among {names}.")
    columns |= {name: [] for name in names}
    for row in group:
        leaves = list(_leaves(row.prediction, "prediction"))
        if [name for name, _ in leaves] != names:
            raise ValueError(f"one has the leaves {names}, another {[name for name, _ in leaves]}.")
        for name, leaf in leaves:
            columns[name].append(leaf)
    return columns


def _groups(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    group: list[_Row] = []
    num_bytes = 0
    for row in rows:
        group.append(row)
        num_bytes += sum(int(getattr(leaf, "nbytes", 64)) for _, leaf in _leaves(row.prediction, "prediction"))
        if len(group) >= _ROWS_PER_GROUP or num_bytes >= _BYTES_PER_GROUP:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Walk a sample's leaves with their column names."""
    children: Iterator[tuple[Any, Any]] | None = None
    if isinstance(value, Mapping):
        children = iter(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        children = zip(value._fields, value, strict=True)
    elif isinstance(value, tuple):
        children = iter(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        children = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    if children is None:
        yield path, value
        return
    for key, item in children:
        yield from _leaves(item, f"{path}.{key}")


def _parquet_column(pa: Any, values: list[Any], name: str) -> Any:
    """Build one column; tensors keep their element type."""
    if not isinstance(values[0], (torch.Tensor, np.ndarray, np.generic)):
        return pa.array(values)
    arrays = [_to_array(value, name) for value in values]
    if arrays[0].dtype.kind == "c":
        arrays = [np.stack((array.real, array.imag), axis=-1) for array in arrays]
    element = pa.from_numpy_dtype(arrays[0].dtype) if arrays[0].dtype.kind not in "US" else None
    if len({(array.ndim, array.dtype) for array in arrays}) != 1:
        raise ValueError(f"{name} has {sorted({f'{a.ndim}-d {a.dtype}' for a in arrays})}.")
    column = pa.array(np.concatenate([array.reshape(-1) for array in arrays]), type=element)
    shapes = np.array([array.shape for array in arrays], np.int64).reshape(len(arrays), arrays[0].ndim)
    # Innermost dimension first: each level of lists has one length per element of the level outside it.
    for axis in range(shapes.shape[1] - 1, -1, -1):
        outer = np.prod(shapes[:, :axis], axis=1, dtype=np.int64)
        lengths = np.repeat(shapes[:, axis], outer)
        column = pa.LargeListArray.from_arrays(np.concatenate(([0], np.cumsum(lengths))), column)
    return column


def _to_array(value: Any, path: str) -> np.ndarray[Any, Any]:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    try:
        return value.numpy()
    except TypeError:
        # numpy has no bfloat16 and no float8; float32 holds each of their values exactly.
        if value.dtype.is_floating_point:
            return value.float().numpy()
        raise UnsupportedPredictionError(f"{path} is a tensor of {value.dtype}, which numpy does not have.") from None


_WRITERS: dict[str, Callable[[Iterator[_Row], Path], int]] = {"jsonl": _write_jsonl, "parquet": _write_parquet}
