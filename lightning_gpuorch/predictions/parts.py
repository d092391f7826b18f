"""What holds the predictions of a chunk, and which chunks are there?

A part is one committed file per chunk. The set of committed parts *is* the journal of a job: leases and messages only
avoid work being done twice. Whoever commits a chunk first wins; a second copy, from a replica that was thought dead,
is dropped.

Nothing here imports torch until a part is written or read: the supervisor lists parts and must stay light.
"""

from __future__ import annotations

import contextlib
import errno
import io
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gpuorch.errors import CorruptPartError, MissingPredictionsError
from lightning_gpuorch.predictions.files import (
    content_path,
    create_once,
    make_directory,
    remove,
    set_aside,
    storage_error,
    sweep_temporaries,
)
from lightning_gpuorch.predictions.frame import NewerFormatError, check_file, read_fields
from lightning_gpuorch.predictions.layout import LoaderLayout, StoredBatch

if TYPE_CHECKING:
    from lightning_gpuorch.predictions.envelope import Envelope

_CHECKING_THREADS = 4
_PART_NAME = re.compile(r"part-(\d{9,})\.gpq")


def loader_directory(directory: str | os.PathLike[str], loader: int) -> Path:
    """Return where the parts of one dataloader of a job are."""
    return Path(directory) / f"dataloader_{loader}"


@dataclass(frozen=True)
class BatchEntry:
    """What a part's header tells of one stored batch; the fields are those of :class:`StoredBatch`."""

    first_unit: int
    indices: Sequence[int] | None
    size: int | None
    units: Sequence[int] | None
    num_lost: int = 0


@dataclass(frozen=True)
class PartHeader:
    """What is known of a part without its predictions.

    Attributes:
        metadata: The fields that were committed with it.
        entries: Its stored batches, in order.
    """

    metadata: Mapping[str, Any]
    entries: Sequence[BatchEntry]

    def covers(self, layout: LoaderLayout, chunk: int) -> bool:
        """Whether every unit of a chunk has a prediction, as far as the layout tells what that is."""
        if layout.unit == "scattered":
            return True
        if layout.unit == "batch":
            expected = len(layout.chunk_range(chunk)) if layout.num_units is not None else 0
            return len(self.entries) >= expected and not any(entry.num_lost for entry in self.entries)
        return sum(entry.size or 0 for entry in self.entries) >= len(layout.chunk_range(chunk))


class Part:
    """A verified part in memory; predictions are decoded when they are asked for.

    Attributes:
        header: Everything but the predictions.
    """

    def __init__(self, envelope: Envelope, header: PartHeader):
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
            StoredBatch(entry.first_unit, entry.indices, entry.size, self.output(position), entry.units, entry.num_lost)
            for position, entry in enumerate(self.header.entries)
        ]

    def output(self, position: int) -> Any:
        """Decode one prediction; it owns its memory."""
        return self._envelope.prediction(position)


class PartStore:
    """The parts of one dataloader.

    Args:
        directory: Where they are. It is made by the first commit; the directory above it must exist by then.
        fsync: Wait until the disk has each part. Without it a power cut may lose parts that were reported durable.
    """

    def __init__(self, directory: str | os.PathLike[str], fsync: bool = True):
        self.directory = Path(directory)
        self._fsync = fsync
        self._made = False

    def path(self, chunk: int) -> Path:
        """Return the file of a chunk."""
        return self.directory / f"part-{chunk:09d}.gpq"

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
        from lightning_gpuorch.predictions.envelope import encode_envelope

        fields = {"chunk": chunk, "metadata": dict(metadata), "batches": [_pack_entry(batch) for batch in batches]}
        encoded = encode_envelope(fields, [batch.output for batch in batches])
        try:
            if not self._made:
                # Once only, and not its parents: a directory removed under way is an error, not to be made again.
                if not self.directory.parent.is_dir():
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.directory.parent))
                make_directory(self.directory)
                self._made = True
            return create_once(self.path(chunk), encoded.buffers, fsync=self._fsync)
        except OSError as error:
            raise storage_error(error, self.directory, encoded.num_bytes) from error

    def done(self) -> set[int]:
        """Return the chunks that are durable.

        Raises:
            PredictionStorageError: The directory exists and cannot be listed.
        """
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise storage_error(error, self.directory) from error
        return {int(match[1]) for match in map(_PART_NAME.fullmatch, names) if match}

    def is_durable(self, chunk: int) -> bool:
        """Whether a chunk has been committed, by whomever."""
        return self.path(chunk).exists()

    def read(self, chunk: int) -> Part:
        """Read and verify a part.

        Raises:
            CorruptPartError: It is damaged, or holds another chunk.
            MissingPredictionsError: There is no such part.
        """
        from lightning_gpuorch.predictions.envelope import Envelope

        with _opened(self.path(chunk)) as (file, file_bytes, source):
            raw = bytearray(file_bytes)
            view = memoryview(raw)
            position = 0
            while position < file_bytes and (count := file.readinto(view[position:])):
                position += count
        envelope = Envelope(raw if position == file_bytes else raw[:position], source)
        return Part(envelope, self._unpack_header(envelope.fields, chunk, envelope.num_predictions))

    def header(self, chunk: int) -> PartHeader:
        """Read and verify what is known of a part, without its predictions.

        Raises:
            CorruptPartError: The header is damaged, the file has not its length, or it holds another chunk.
            MissingPredictionsError: There is no such part.
        """
        with _opened(self.path(chunk)) as (file, file_bytes, source):
            return self._unpack_header(read_fields(file, file_bytes, source), chunk)

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
            else:
                yield chunk, None

    def set_damaged_aside(self) -> list[CorruptPartError]:
        """Check every byte of all parts, and rename those that are damaged, so that their chunks count as missing.

        Reads all parts, several at a time; needs no torch. Not while a job writes here.

        Returns:
            What is wrong, one error per damaged part; each names the file, which is kept as ``part-....gpq.damaged``.

        Raises:
            NewerFormatError: A newer version has written a part.
            PredictionStorageError: The directory cannot be read, or a part not renamed.
        """
        chunks = sorted(self.done())
        if not chunks:
            return []
        with ThreadPoolExecutor(min(_CHECKING_THREADS, len(chunks)), "gpuorch-check") as pool:
            found = [(c, error) for c, error in zip(chunks, pool.map(self._check, chunks), strict=True) if error]
        for chunk, _ in found:
            path = self.path(chunk)
            try:
                set_aside(path, path.with_name(f"{path.name}.damaged"))
            except OSError as error:
                raise storage_error(error, self.directory) from error
        return [error for _, error in found]

    def discard_incomplete(self, layout: LoaderLayout) -> list[int]:
        """Remove the parts in which units were given up, so that a rerun tries their chunks again.

        Args:
            layout: Of the dataloader.

        Returns:
            The chunks.

        Raises:
            PredictionStorageError: A part cannot be read, or not removed.
        """
        found = [chunk for chunk in sorted(self.done()) if not self.header(chunk).covers(layout, chunk)]
        for chunk in found:
            self.discard(chunk)
        return found

    def _check(self, chunk: int) -> CorruptPartError | None:
        try:
            with _opened(self.path(chunk)) as (file, file_bytes, source):
                self._unpack_header(check_file(file, file_bytes, source), chunk)
        except NewerFormatError:
            raise
        except CorruptPartError as error:
            return error
        return None

    def discard(self, chunk: int) -> None:
        """Remove a part durably, so that a rerun computes its chunk again. Not while a job runs.

        Raises:
            PredictionStorageError: It cannot be removed.
        """
        try:
            remove(self.path(chunk))
        except OSError as error:
            raise storage_error(error, self.directory) from error

    def sweep_temporaries(self, older_than_seconds: float = 3600.0) -> int:
        """Remove what killed writers left.

        Args:
            older_than_seconds: Younger files may belong to a living writer.

        Returns:
            How many files were removed.
        """
        return sweep_temporaries(self.directory, older_than_seconds)

    def _unpack_header(self, fields: Mapping[str, Any], chunk: int, num_predictions: int | None = None) -> PartHeader:
        path = self.path(chunk)
        try:
            stored, metadata = fields["chunk"], fields["metadata"]
            entries = [_unpack_entry(entry) for entry in fields["batches"]]
        except (KeyError, TypeError) as error:
            raise CorruptPartError(f"{path} is an envelope, but not of a part: {error!r}.") from error
        if stored != chunk:
            raise CorruptPartError(f"{path} holds chunk {stored}: somebody renamed or copied it. Delete it.")
        if num_predictions is not None and num_predictions != len(entries):
            raise CorruptPartError(
                f"{path} has {num_predictions} predictions, and its header describes {len(entries)}."
            )
        return PartHeader(metadata, entries)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[io.FileIO, int, str]]:
    """Open a part's file; yields it with its length and its name."""
    try:
        with open(content_path(path), "rb", buffering=0) as file:
            yield file, os.fstat(file.fileno()).st_size, str(path)
    except FileNotFoundError as error:
        raise MissingPredictionsError(f"there is no part {path}: it was removed, or never written.") from error
    except OSError as error:
        raise storage_error(error, path.parent) from error


def _pack_entry(batch: StoredBatch) -> dict[str, Any]:
    entry = {
        "first_unit": batch.first_unit,
        "size": batch.size,
        "indices": _pack_integers(batch.indices),
        "units": _pack_integers(batch.units),
        "num_lost": batch.num_lost or None,
    }
    return {name: value for name, value in entry.items() if value is not None}


def _unpack_entry(entry: Mapping[str, Any]) -> BatchEntry:
    return BatchEntry(
        first_unit=entry["first_unit"],
        indices=_unpack_integers(entry.get("indices")),
        size=entry.get("size"),
        units=_unpack_integers(entry.get("units")),
        num_lost=entry.get("num_lost", 0),
    )


def _pack_integers(integers: Sequence[Any] | None) -> list[Any] | dict[str, int] | None:
    """Write consecutive integers as their borders. Indices may be keys as well: text, or tuples of both."""
    if integers is None:
        return None
    listed = [_plain(integer) for integer in integers]
    if (
        listed
        and all(isinstance(integer, int) for integer in listed)
        and listed == list(range(listed[0], listed[0] + len(listed)))
    ):
        return {"start": listed[0], "stop": listed[0] + len(listed)}
    return listed


def _plain(index: Any) -> Any:
    try:
        return operator.index(index)
    except TypeError:
        return [_plain(part) for part in index] if isinstance(index, (list, tuple)) else str(index)


def _unpack_integers(packed: Any) -> Sequence[int] | None:
    return range(packed["start"], packed["stop"]) if isinstance(packed, dict) else packed
