"""Writers of exports: each takes rows, one per sample, and makes one file of them."""

from __future__ import annotations

import base64
import csv
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_gpuorch.errors import ConfigurationError, UnsupportedPredictionError
from lightning_gpuorch.predictions.storage.values.base import type_name

_ROWS_PER_GROUP = 1024
_BYTES_PER_GROUP = 2**23


@dataclasses.dataclass(frozen=True)
class Row:
    """One sample.

    Attributes:
        loader: Its dataloader; None if there is one alone.
        index: Its dataset index; None in streams.
        prediction: Its prediction.
    """

    loader: int | None
    index: int | None
    prediction: Any


# --- JSON lines -------------------------------------------------------------------------------------------------------


def _write_jsonl(rows: Iterator[Row], path: Path) -> int:
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


def _write_parquet(rows: Iterator[Row], path: Path) -> int:
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


def _columns(group: Sequence[Row]) -> dict[str, list[Any]]:
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


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    group: list[Row] = []
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


# --- CSV, NPZ, Hugging Face -------------------------------------------------------------------------------------------


def _write_csv(rows: Iterator[Row], path: Path) -> int:
    names: list[str] | None = None
    num_rows = 0
    with open(path, "x", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        for group in _groups(rows):
            columns = _columns_of(group, num_rows, names)
            if names is None:
                names = list(columns)
                writer.writerow(names)
            cells = [[_cell(value, name) for value in values] for name, values in columns.items()]
            writer.writerows(zip(*cells, strict=True))
            num_rows += len(group)
        if names is None:
            writer.writerow(["index"])
        file.flush()
        os.fsync(file.fileno())
    return num_rows


def _columns_of(group: Sequence[Row], first: int, names: list[str] | None) -> dict[str, list[Any]]:
    """The columns of rows, which have to be those of the rows before."""
    try:
        columns = _columns(group)
        if names is not None and list(columns) != names:
            raise ValueError(f"they have the columns {list(columns)}, others {names}.")  # noqa: TRY301
    except ValueError as error:
        raise UnsupportedPredictionError(
            f"samples {first} to {first + len(group) - 1} do not fit the columns of the file: {error} Export to jsonl, which "
            "takes any structure."
        ) from error
    return columns


def _cell(value: Any, name: str) -> Any:
    plain = _to_json(value, name)
    if isinstance(plain, (list, dict, bool)):
        return json.dumps(plain, ensure_ascii=False, separators=(",", ":"))
    return plain


def _write_npz(rows: Iterator[Row], path: Path) -> int:
    pieces: dict[str, list[np.ndarray[Any, Any]]] = {}
    num_rows = 0
    for group in _groups(rows):
        columns = _columns_of(group, num_rows, list(pieces) or None)
        for name, values in columns.items():
            pieces.setdefault(name, []).append(_stacked(values, name))
        num_rows += len(group)
    try:
        arrays = {name: np.concatenate(column) for name, column in pieces.items()}
    except ValueError as error:
        raise UnsupportedPredictionError(f"samples differ in shape: {error}. Export to parquet or jsonl.") from error
    with open(path, "xb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return num_rows


def _stacked(values: list[Any], name: str) -> np.ndarray[Any, Any]:
    try:
        array = np.stack([_to_array(value, name) for value in values])
    except ValueError as error:
        raise UnsupportedPredictionError(
            f"{name} differs in shape from sample to sample: {error}. Export to parquet or jsonl."
        ) from error
    if array.dtype.hasobject:
        raise UnsupportedPredictionError(
            f"{name} is of type {type_name(type(values[0]))}, which is no array. Export to parquet or jsonl."
        )
    return array


def _write_hugging_face(rows: Iterator[Row], path: Path) -> int:
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError("exporting to a Hugging Face dataset needs it: pip install datasets.") from error
    with tempfile.TemporaryDirectory(prefix=".gpuorch-", dir=path.parent) as scratch:
        table = Path(scratch) / "rows.parquet"
        num_rows = _write_parquet(rows, table)
        found = datasets.Dataset.from_parquet(str(table), cache_dir=scratch)
        found.save_to_disk(str(path))
        del found
    return num_rows


WRITERS: dict[str, Callable[[Iterator[Row], Path], int]] = {
    "csv": _write_csv,
    "hf": _write_hugging_face,
    "jsonl": _write_jsonl,
    "npz": _write_npz,
    "parquet": _write_parquet,
}
"""By the ending of a target."""
