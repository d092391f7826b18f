"""Tables of pandas, polars and pyarrow, by Arrow's IPC format.

A table is read back when it is written: one that Arrow would give back changed is refused, with the column named. Where
the reading process has not loaded the table's package, a table is a dict of lists by column.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np

from lightning_gpuorch.errors import CorruptPartError, UnsupportedPredictionError
from lightning_gpuorch.predictions.storage.values.arrow_stream import count_values, refuse_compression
from lightning_gpuorch.predictions.storage.values.base import (
    Decode,
    Decoder,
    Encode,
    Encoder,
    Finder,
    Node,
    add_bytes,
    decode_as,
    is_instance,
    refuse,
    type_name,
)

_VALUES = "values"
_MAX_VALUES_PER_BYTE = 64


def _arrow(value: Any, path: str) -> Any:
    if importlib.util.find_spec("pyarrow") is None:
        raise UnsupportedPredictionError(
            f"{path} is a {type_name(type(value))}, and pyarrow, which stores it, is not installed: pip install "
            "'lightning_gpuorch[parquet]', or return a dict of arrays."
        )
    import pyarrow as pa
    import pyarrow.ipc

    return pa


def _encode_table(encoder: Encoder, table: Any) -> int:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return add_bytes(encoder, sink.getvalue().to_pybytes())


def _read_table(decoder: Decoder, column: int) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.ipc
    except ImportError as error:
        raise CorruptPartError("a table needs pyarrow to be read: pip install 'lightning_gpuorch[parquet]'") from error
    content = bytes(decoder.buffer(column))
    refuse_compression(content)
    table = pa.ipc.open_stream(pa.py_buffer(content)).read_all()
    # Columns of nulls take no bytes, however many rows they claim.
    if table.num_rows > _MAX_VALUES_PER_BYTE * len(content):
        raise ValueError(f"{len(content)} bytes for {table.num_rows} rows")
    table.validate(full=True)
    num_values = sum(count_values(chunk) for column in table.columns for chunk in column.chunks)
    if num_values > _MAX_VALUES_PER_BYTE * len(content):
        raise ValueError(f"{len(content)} bytes for {num_values} values")
    return table


# --- pandas: each column on its own, so that labels, indices and columns of mixed objects come back as they were -------


def _encode_values(encoder: Encoder, series: Any, path: str, depth: int) -> Node:
    """The values of a Series, without index and name."""
    pa = _arrow(series, path)
    series = series.reset_index(drop=True).rename(_VALUES)
    if series.dtype.kind in "biufc" and hasattr(series.dtype, "str"):
        return ["pandas.plain", encoder.encode_part(series.to_numpy(), path, depth + 1)]
    if series.dtype == object:
        nodes = encoder.encode_part(series.tolist(), path, depth + 1)
        return ["pandas.objects", nodes]
    try:
        table = pa.Table.from_pandas(series.to_frame(), preserve_index=False)
        back = table.to_pandas()[_VALUES]
        unchanged = back.dtype == series.dtype and back.equals(series)
    except (pa.ArrowException, ValueError, TypeError, KeyError) as error:
        raise UnsupportedPredictionError(f"{path} is of {series.dtype}, which Arrow cannot store: {error}") from error
    if not unchanged:
        raise UnsupportedPredictionError(
            f"{path} is of {series.dtype}, which Arrow would give back as {back.dtype}. Convert it with .astype(...)."
        )
    return ["pandas.arrow", _encode_table(encoder, table)]


def _decode_plain(decoder: Decoder, node: Node) -> Any:
    values = decode_as(decoder, np.ndarray, node)
    return sys.modules["pandas"].Series(values) if _has_pandas() else values.tolist()


def _decode_objects(decoder: Decoder, node: Node) -> Any:
    values = decode_as(decoder, list, node)
    return sys.modules["pandas"].Series(values, dtype=object) if _has_pandas() else values


def _decode_arrow(decoder: Decoder, column: int) -> Any:
    table = _read_table(decoder, column)
    return table.to_pandas()[_VALUES] if _has_pandas() else table.column(_VALUES).to_numpy().tolist()


def _decode_values(decoder: Decoder, node: Node) -> Any:
    """What :func:`_encode_values` has made of a Series: nothing else, whose length may be but a claim."""
    return decode_as(decoder, sys.modules["pandas"].Series if _has_pandas() else list, node)


def _has_pandas() -> bool:
    return hasattr(sys.modules.get("pandas"), "DataFrame")


def _encode_index(encoder: Encoder, value: Any, path: str, depth: int) -> Node:
    import pandas as pd

    names = encoder.encode_part(list(value.names), path, depth)
    if type(value) is pd.RangeIndex:
        return ["pandas.range", value.start, value.stop, value.step, names]
    if isinstance(value, pd.MultiIndex):
        levels = [value.get_level_values(level) for level in range(value.nlevels)]
        parts = [
            _encode_values(encoder, pd.Series(level), f"{path} level {i}", depth) for i, level in enumerate(levels)
        ]
        return ["pandas.levels", parts, names]
    freq = getattr(value, "freq", None) if isinstance(value, (pd.DatetimeIndex, pd.TimedeltaIndex)) else None
    node = ["pandas.index", _encode_values(encoder, pd.Series(value), path, depth), names]
    return node if freq is None else [*node, freq.freqstr]


def _decode_range(decoder: Decoder, start: int, stop: int, step: int, names: Node) -> Any:
    if not _has_pandas():
        return range(start, stop, step)
    return sys.modules["pandas"].RangeIndex(start, stop, step, name=decoder.decode(names)[0])


def _decode_levels(decoder: Decoder, nodes: list[Node], names: Node) -> Any:
    levels = [_decode_values(decoder, node) for node in nodes]
    if not _has_pandas():
        return list(zip(*levels, strict=True))
    return sys.modules["pandas"].MultiIndex.from_arrays(levels).set_names(decoder.decode(names))


def _decode_index(decoder: Decoder, node: Node, names: Node, freq: str | None = None) -> Any:
    values = _decode_values(decoder, node)
    if not _has_pandas():
        return values
    index = sys.modules["pandas"].Index(values, dtype=values.dtype).set_names(decoder.decode(names))
    if freq is not None:
        index.freq = freq
    return index


def _encode_frame(encoder: Encoder, value: Any, path: str, depth: int) -> Node:
    _refuse_subclass(value, path, "pandas")
    columns = [
        _encode_values(encoder, value.iloc[:, i], f"{path}[{label!r}]", depth) for i, label in enumerate(value.columns)
    ]
    labels = _encode_index(encoder, value.columns, f"the columns of {path}", depth)
    index = _encode_index(encoder, value.index, f"{path}.index", depth)
    return ["pandas.frame", columns, labels, index, encoder.encode_part(dict(value.attrs), f"{path}.attrs", depth)]


def _decode_frame(decoder: Decoder, nodes: list[Node], labels: Node, index: Node, attrs: Node) -> Any:
    columns = [_decode_values(decoder, node) for node in nodes]
    names, index = decoder.decode(labels), decoder.decode(index)
    _check_rows(index, *columns)
    if not _has_pandas():
        return {"columns": dict(zip(names, columns, strict=True)), "index": list(index) if columns else index}
    frame = sys.modules["pandas"].DataFrame(dict(enumerate(columns)), index=range(len(index)))
    frame.columns, frame.index = names, index
    frame.attrs.update(decoder.decode(attrs))
    return frame


def _check_rows(index: Any, *columns: Any) -> None:
    """An index that is a range takes no bytes, and a frame without columns has no rows but those of its index."""
    rows = {len(values) for values in columns}
    if rows and rows != {len(index)}:
        raise ValueError(f"an index of {len(index)} rows for columns of {sorted(rows)}")


def _encode_series(encoder: Encoder, value: Any, path: str, depth: int) -> Node:
    _refuse_subclass(value, path, "pandas")
    name = encoder.encode_part(value.name, f"{path}.name", depth)
    index = _encode_index(encoder, value.index, f"{path}.index", depth)
    return ["pandas.series", _encode_values(encoder, value, path, depth), index, name]


def _decode_series(decoder: Decoder, node: Node, index: Node, name: Node) -> Any:
    values, index, name = _decode_values(decoder, node), decoder.decode(index), decoder.decode(name)
    _check_rows(index, values)
    if not _has_pandas():
        return {"values": values, "index": list(index), "name": name}
    values.index, values.name = index, name
    return values


def _encode_pandas_value(encoder: Encoder, value: Any, path: str, depth: int) -> Node:
    import pandas as pd

    if value is pd.NaT or value is pd.NA:
        return ["pandas.missing", "NaT" if value is pd.NaT else "NA"]
    if isinstance(value, pd.api.extensions.ExtensionArray):
        return ["pandas.array", _encode_values(encoder, pd.Series(value), path, depth)]
    return ["pandas.value", _encode_values(encoder, pd.Series([value]), path, depth)]


def _decode_pandas_value(decoder: Decoder, node: Node) -> Any:
    values = _decode_values(decoder, node)
    return values.iloc[0] if _has_pandas() else values[0]


def _decode_missing(_decoder: Decoder, name: str) -> Any:
    return {"NaT": getattr, "NA": getattr}[name](sys.modules["pandas"], name) if _has_pandas() else None


_PANDAS_VALUES = [f"pandas:{name}" for name in ("Timestamp", "Timedelta", "Period", "Interval")]


def _is_pandas_value(value: Any) -> bool:
    module = sys.modules.get("pandas")
    missing = _has_pandas() and (value is module.NaT or value is module.NA)  # type: ignore[union-attr]
    return missing or is_instance(value, *_PANDAS_VALUES, "pandas.api.extensions:ExtensionArray")


# --- polars and pyarrow -----------------------------------------------------------------------------------------------


def _encode_polars(encoder: Encoder, value: Any, path: str, _depth: int) -> Node:
    pa = _arrow(value, path)
    import polars as pl

    _refuse_subclass(value, path, "polars")
    frame = value.to_frame() if isinstance(value, pl.Series) else value
    try:
        table = frame.to_arrow()
        back: Any = pl.from_arrow(table)
    except (pa.ArrowException, pl.exceptions.PolarsError, ValueError, TypeError, pl.exceptions.PanicException) as error:
        raise UnsupportedPredictionError(f"{path} has a column that Arrow cannot store: {error}") from error
    if back.schema != frame.schema or not back.equals(frame):
        raise UnsupportedPredictionError(
            f"{path} has the schema {frame.schema}, which Arrow would give back as {back.schema}. Cast the columns."
        )
    return ["polars", type(value).__name__, _encode_table(encoder, table)]


def _decode_polars(decoder: Decoder, kind: str, column: int) -> Any:
    table = _read_table(decoder, column)
    polars = sys.modules.get("polars")
    if not hasattr(polars, "DataFrame"):
        return table.to_pydict() if kind == "DataFrame" else table.column(0).to_pylist()
    frame = polars.from_arrow(table)  # type: ignore[union-attr]
    return frame if kind == "DataFrame" else frame.to_series()


def _encode_pyarrow(encoder: Encoder, value: Any, path: str, _depth: int) -> Node:
    import pyarrow as pa

    kind = type(value).__name__
    if isinstance(value, (pa.Array, pa.ChunkedArray)):
        kind = "ChunkedArray" if isinstance(value, pa.ChunkedArray) else "Array"
        table = pa.table({_VALUES: value})
    else:
        table = value if isinstance(value, pa.Table) else pa.Table.from_batches([value])
    return ["pyarrow", kind, _encode_table(encoder, table)]


def _decode_pyarrow(decoder: Decoder, kind: str, column: int) -> Any:
    table = _read_table(decoder, column)
    if kind == "Table":
        return table
    if kind == "RecordBatch":
        return table.combine_chunks().to_batches()[0]
    values = table.column(0)
    return values if kind == "ChunkedArray" else values.combine_chunks()


def _refuse_subclass(value: Any, path: str, package: str) -> None:
    if type(value) is not getattr(sys.modules[package], type(value).__name__, None):
        raise refuse(value, path, f"Return the class of {package} itself.")


ENCODERS: dict[type, Encode] = {}

FINDERS: list[Finder] = [
    (lambda value: is_instance(value, "pandas:DataFrame"), _encode_frame),
    (lambda value: is_instance(value, "pandas:Series"), _encode_series),
    (lambda value: is_instance(value, "pandas:Index"), _encode_index),
    (_is_pandas_value, _encode_pandas_value),
    (lambda value: is_instance(value, "polars:DataFrame", "polars:Series"), _encode_polars),
    (
        lambda value: is_instance(value, *(f"pyarrow:{n}" for n in ("Table", "RecordBatch", "Array", "ChunkedArray"))),
        _encode_pyarrow,
    ),
]

DECODERS: dict[str, Decode] = {
    "pandas.frame": _decode_frame,
    "pandas.series": _decode_series,
    "pandas.index": _decode_index,
    "pandas.range": _decode_range,
    "pandas.levels": _decode_levels,
    "pandas.plain": _decode_plain,
    "pandas.objects": _decode_objects,
    "pandas.arrow": _decode_arrow,
    "pandas.value": _decode_pandas_value,
    "pandas.array": lambda decoder, node: (
        _decode_values(decoder, node).array if _has_pandas() else _decode_values(decoder, node)
    ),
    "pandas.missing": _decode_missing,
    "polars": _decode_polars,
    "pyarrow": _decode_pyarrow,
}
