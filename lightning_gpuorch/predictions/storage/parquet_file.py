"""A part as a Parquet file, which other tools read while the job runs; every damaged bit is noticed, as in a part of our own.

::

    0         4      "PAR1", as Parquet wants it
    4         16+H   the frame of a part: see :mod:`.part_file`; ``columns_bytes`` counts what is behind the structure
    20+H      T      structure: JSON, ``[samples, node]`` per prediction
    20+H+T    C      row groups and footer of Parquet

Readers of Parquet follow the offsets in the footer, so they pass over what is between its magic and the first row group. A
process that only keeps the journal reads the frame, and needs no pyarrow.
"""

from __future__ import annotations

import importlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_gpuorch.errors import (
    ConfigurationError,
    CorruptPartError,
    PredictionStorageError,
    UnsupportedPredictionError,
)
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.samples import NOT_KEPT, CannotSplitError, batch_size_of
from lightning_gpuorch.predictions.storage.carried import WithColumns
from lightning_gpuorch.predictions.storage.decode import decode_tree
from lightning_gpuorch.predictions.storage.journal import PartJournal
from lightning_gpuorch.predictions.storage.layout import LoaderLayout, StoredBatch
from lightning_gpuorch.predictions.storage.parquet_columns import RowsEncoder, RowsReader
from lightning_gpuorch.predictions.storage.part_contents import read_nodes
from lightning_gpuorch.predictions.storage.part_entries import split_error
from lightning_gpuorch.predictions.storage.part_file import EncodedEnvelope, padded
from lightning_gpuorch.predictions.storage.part_frame import (
    COVERED,
    FORMAT_VERSION,
    MAGIC,
    PARQUET_MAGIC,
    PRELUDE_BYTES,
    check_header,
    check_prelude,
    damage,
    without_own_fields,
)
from lightning_gpuorch.predictions.storage.sealed import sealed
from lightning_gpuorch.predictions.storage.stores import storage_error

FILES_NAME = "_files.json"
_FRAME_BYTES = len(PARQUET_MAGIC) + PRELUDE_BYTES


def pyarrow() -> Any:
    """The package, with its Parquet module.

    Raises:
        ConfigurationError: It is not installed.
    """
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ConfigurationError(
            "output_format='parquet' needs pyarrow: pip install 'lightning_gpuorch[parquet]', or set output_format='gpq'."
        ) from error


def encode_parquet(fields: Mapping[str, Any], batches: Sequence[StoredBatch], unit: str) -> EncodedEnvelope:
    """Encode the predictions of a part.

    Args:
        fields: Plain JSON for the header.
        batches: The predictions.
        unit: What is counted; see :mod:`lightning_gpuorch.predictions.storage.layout`.

    Raises:
        ConfigurationError: pyarrow is not installed.
        UnsupportedPredictionError: A prediction has no form as rows of columns.
    """
    pa = pyarrow()
    encoder = RowsEncoder(pa)
    nodes: list[Any] = []
    index: list[Any] = []
    rows: list[int | None] = []
    numbers: list[int] = []
    errors: list[tuple[str | None, str | None]] = []
    for batch in batches:
        output, carried = WithColumns.apart(batch.output)
        size = 1 if batch.error is not None else _size_of(batch, output)
        if batch.error is not None:
            encoder.add_error()
            nodes.append([1, None])
        else:
            nodes.append([size, encoder.add_batch(output, size, carried)])
        errors += [(None, None) if batch.error is None else split_error(batch.error)] * size
        index += [None] * size if batch.indices is None else list(batch.indices)
        if unit == "batch":
            numbers += [batch.first_unit] * size
            rows += range(size) if batch.error is None else [None]
        else:
            rows += batch.units if batch.units is not None else range(batch.first_unit, batch.first_unit + size)
    columns = {"index": _index_column(pa, index), "row": pa.array(rows, pa.int64())}
    if unit == "batch":
        columns["batch"] = pa.array(numbers, pa.int64())
    columns |= encoder.table()
    columns["error_type"] = pa.array([kind for kind, _ in errors], pa.string())
    columns["error_message"] = pa.array([message for _, message in errors], pa.string())
    return _framed(pa, fields, nodes, pa.table(columns))


def publish_files(directory: Location, layout: LoaderLayout) -> None:
    """List the parts of a dataloader that is complete, in order and with their rows, in a file that appears at once.

    Whoever wants all or nothing waits for ``_files.json``; its name is passed over by readers of whole directories.

    Raises:
        PredictionStorageError: It cannot be written.
        CorruptPartError: A part is damaged.
    """
    journal = PartJournal(directory, "parquet")
    parts = [
        {"name": journal.path(chunk).name, "rows": journal.header(chunk).entries.num_samples}
        for chunk in sorted(journal.done())
        if chunk < layout.num_chunks or layout.num_units is None
    ]
    try:
        journal.store.create_once(directory / FILES_NAME, [sealed({"files": parts})])
    except OSError as error:
        raise storage_error(error, directory) from error


def _size_of(batch: StoredBatch, output: Any) -> int:
    if batch.size is not None:
        return batch.size
    try:
        return batch_size_of(output)
    except CannotSplitError as error:
        if output is NOT_KEPT or output is None:
            return 0
        raise UnsupportedPredictionError(
            f"it cannot be told how many samples batch {batch.first_unit} of the stream has: {error} Return one entry per "
            "sample, or set output_format='gpq'."
        ) from error


def _index_column(pa: Any, index: list[Any]) -> Any:
    """Dataset indices: integers, or text where they are keys of another kind."""
    if all(value is None or isinstance(value, (int, np.integer)) for value in index):
        return pa.array(index, pa.int64())
    return pa.array([None if value is None else str(value) for value in index], pa.string())


def _framed(pa: Any, fields: Mapping[str, Any], nodes: list[Any], table: Any) -> EncodedEnvelope:
    structure = padded(nodes, len(PARQUET_MAGIC))
    own = {"structure_bytes": len(structure), "columns_bytes": 2**62, "body_crc32": 2**32 - 1}
    try:
        header_bytes = len(padded({**fields, **own}, _FRAME_BYTES))
    except (TypeError, ValueError) as error:
        raise PredictionStorageError(f"The metadata of a part must be plain JSON, got {fields!r}: {error}.") from error
    sink = pa.BufferOutputStream()
    writer = pa.parquet.ParquetWriter(sink, table.schema, compression="zstd")
    sink.write(bytes(PRELUDE_BYTES + header_bytes))  # written when all else is known
    sink.write(structure)
    try:
        writer.write_table(table, row_group_size=max(1, table.num_rows))
    finally:
        writer.close()
    whole = memoryview(sink.getvalue())
    body = whole[_FRAME_BYTES + header_bytes :]
    own |= {"columns_bytes": len(body) - len(structure), "body_crc32": zlib.crc32(body)}
    header = json.dumps({**fields, **own}, separators=(",", ":"), allow_nan=False).encode().ljust(header_bytes)
    covered = COVERED.pack(MAGIC, FORMAT_VERSION, 0, header_bytes)
    prelude = covered + struct.pack("<I", zlib.crc32(header, zlib.crc32(covered)))
    return EncodedEnvelope([memoryview(PARQUET_MAGIC + prelude + header), body], len(whole))


class ParquetEnvelope:
    """A Parquet part in memory, verified; see :class:`~lightning_gpuorch.predictions.storage.part_file.Envelope`.

    Args:
        raw: The whole file.
        source: Its name, for error messages.

    Raises:
        CorruptPartError: A checksum, a length or the magic does not fit.
    """

    def __init__(self, raw: bytearray | bytes, source: str):
        view = memoryview(raw)[len(PARQUET_MAGIC) :]
        header_bytes = check_prelude(view[:PRELUDE_BYTES], len(view), source)
        header = check_header(view, header_bytes, len(view), source)
        body = view[PRELUDE_BYTES + header_bytes :]
        if zlib.crc32(body) != header["body_crc32"]:
            raise damage(source, "the checksum of its body does not fit")
        self.fields, self.num_bytes = without_own_fields(header), len(raw)
        self._raw, self._source = raw, source
        self._nodes = read_nodes(body, header, source)
        self.num_predictions = len(self._nodes)
        self._rows: tuple[RowsReader, list[int]] | None = None

    def prediction(self, position: int) -> Any:
        """Decode one prediction; it owns its memory.

        Raises:
            CorruptPartError: It does not fit the columns.
        """
        try:
            reader, starts = self._rows or self._open()
            size, node = json.loads(bytes(self._nodes[position]))
            reader.go_to(starts[position], size)
            return decode_tree(node, reader)
        except (CorruptPartError, ValueError, TypeError) as error:
            raise damage(self._source, str(error)) from error

    def _open(self) -> tuple[RowsReader, list[int]]:
        pa = pyarrow()
        sizes = [json.loads(bytes(node))[0] for node in self._nodes]
        try:
            table = pa.parquet.ParquetFile(pa.BufferReader(pa.py_buffer(self._raw))).read()
        except (pa.ArrowException, OSError) as error:
            raise CorruptPartError(f"its rows cannot be read ({error})") from error
        if not all(type(size) is int and size >= 0 for size in sizes) or sum(sizes) != table.num_rows:
            raise CorruptPartError(f"it has {table.num_rows} rows and tells of {sizes!r:.80}")
        starts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64))).tolist()
        self._rows = RowsReader(table), starts
        return self._rows
