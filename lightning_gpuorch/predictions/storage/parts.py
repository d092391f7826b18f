"""What holds the predictions of a chunk: parts are committed, read and decoded here.

The first to commit a chunk wins; a second copy, from a replica that was thought dead, is dropped. Which parts there
are, and whether they are intact, is told by :mod:`lightning_gpuorch.predictions.storage.journal`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_gpuorch.errors import CorruptPartError, PredictionStorageError
from lightning_gpuorch.paths import ObjectPath
from lightning_gpuorch.predictions.storage.journal import OutputFormat, PartHeader, PartJournal, opened
from lightning_gpuorch.predictions.storage.layout import StoredBatch, Unit
from lightning_gpuorch.predictions.storage.part_entries import pack_entries
from lightning_gpuorch.predictions.storage.part_file import EncodedEnvelope, Envelope, encode_envelope
from lightning_gpuorch.predictions.storage.part_frame import frame_start, read_whole
from lightning_gpuorch.predictions.storage.stores import storage_error

if TYPE_CHECKING:
    from lightning_gpuorch.predictions.storage.parquet_file import ParquetEnvelope


class Part:
    """A verified part in memory; predictions are decoded when they are asked for.

    Attributes:
        header: Everything but the predictions.
    """

    def __init__(self, envelope: Envelope | ParquetEnvelope, header: PartHeader):
        self._envelope = envelope
        self.header = header

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The fields that were committed with it."""
        return self.header.metadata

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return self._envelope.num_bytes

    @property
    def batches(self) -> list[StoredBatch]:
        """All stored batches, decoded."""
        return [
            StoredBatch(
                entry.first_unit,
                entry.indices,
                entry.size,
                self.output(position),
                entry.units,
                entry.num_lost,
                entry.error,
            )
            for position, entry in enumerate(self.header.entries)
        ]

    def output(self, position: int) -> Any:
        """Decode one prediction; it owns its memory."""
        return self._envelope.prediction(position)


class PartStore(PartJournal):
    """The parts of one dataloader, to be written and read.

    Args:
        directory: Where they are. It is made by the first commit; the directory above it must exist by then.
        fsync: Wait until the disk has each part. Without it a power cut may lose parts that were reported durable.
        output_format: Of the parts.
        unit: What the batches count; see :mod:`lightning_gpuorch.predictions.storage.layout`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | ObjectPath,
        fsync: bool = True,
        output_format: OutputFormat = "gpq",
        unit: Unit = "sample",
    ):
        super().__init__(directory, output_format)
        self._unit = unit
        self._fsync = fsync
        self._made = False

    def commit(self, chunk: int, batches: Sequence[StoredBatch], metadata: Mapping[str, Any]) -> bool:
        """Make a chunk's predictions durable.

        Args:
            chunk: Which chunk.
            batches: Its predictions, in ascending order of their units.
            metadata: Plain JSON to keep with them.

        Returns:
            True if this call made the part visible, False if somebody else's copy is there already. Either way the
            chunk is durable, and no part of a part is ever visible.

        Raises:
            UnsupportedPredictionError: A prediction contains a type without a durable form.
            StorageFullError: No space is left.
            PredictionStorageError: The directory cannot be written, or has vanished.
        """
        fields = {"chunk": chunk, "metadata": dict(metadata), "batches": pack_entries(batches)}
        encoded = self._encode(fields, batches)
        try:
            if not self._made:
                # Once only, and not its parents: a directory removed under way is an error, not to be made again.
                self.store.make_directory(self.directory, parents=False)
                self._made = True
            return self.store.create_once(self.path(chunk), encoded.buffers, fsync=self._fsync)
        except OSError as error:
            raise storage_error(error, self.directory, encoded.num_bytes) from error

    def _encode(self, fields: Mapping[str, Any], batches: Sequence[StoredBatch]) -> EncodedEnvelope:
        if self.output_format == "gpq":
            return encode_envelope(fields, [batch.output for batch in batches])
        from lightning_gpuorch.predictions.storage.parquet_file import encode_parquet

        return encode_parquet(fields, batches, self._unit)

    def read(self, chunk: int) -> Part:
        """Read and verify a part.

        Raises:
            CorruptPartError: It is damaged, or holds another chunk.
            MissingPredictionsError: There is no such part.
        """
        with opened(self.path(chunk)) as (file, file_bytes, source):
            envelope = _envelope(read_whole(file, file_bytes, source), source)
        return Part(envelope, self.unpack_header(envelope.fields, chunk, envelope.num_bytes, envelope.num_predictions))

    def verify(self, chunks: Iterable[int] | None = None) -> Iterator[tuple[int, CorruptPartError | None]]:
        """Read parts and check every byte and that every prediction can be decoded.

        Args:
            chunks: Which; by default all there are.

        Yields:
            Each chunk, ascending, with what is wrong with it, or None.
        """
        for chunk in sorted(self.done() if chunks is None else chunks):
            try:
                part = self.read(chunk)
                for position in range(len(part.header.entries)):
                    part.output(position)
            except CorruptPartError as error:
                yield chunk, error
            except PredictionStorageError as error:  # one file that cannot be opened does not hide the others
                yield chunk, CorruptPartError(f"{self.path(chunk)} cannot be read: {error}")
            else:
                yield chunk, None


def _envelope(raw: bytearray, source: str) -> Envelope | ParquetEnvelope:
    if not frame_start(raw):
        return Envelope(raw, source)
    from lightning_gpuorch.predictions.storage.parquet_file import ParquetEnvelope

    return ParquetEnvelope(raw, source)
