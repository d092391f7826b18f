"""The durable chunks of a dataloader, and whether what was written of them is whole.

A part is one committed file per chunk. The set of committed parts *is* the journal of a job: leases and messages only
avoid work being done twice. The journal is listed, checked and swept without decoding a prediction, so a process that only
keeps it, the supervisor, imports neither torch nor numpy.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_gpuorch.checked_files import NotRegularFileError
from lightning_gpuorch.errors import CorruptPartError, MissingPredictionsError
from lightning_gpuorch.paths import Location, ObjectPath, location
from lightning_gpuorch.predictions.storage.layout import LoaderLayout
from lightning_gpuorch.predictions.storage.part_entries import Entries, unpack_entries
from lightning_gpuorch.predictions.storage.part_frame import NewerFormatError, check_file, damage, read_fields
from lightning_gpuorch.predictions.storage.store import ReadableFile
from lightning_gpuorch.predictions.storage.stores import storage_error, store_of

FRAGMENTS_PREFIX = "unfinished-"
"""How the directories of fragments begin."""
OutputFormat = Literal["gpq", "parquet"]
"""Files of our own, for any prediction; or Parquet, for what makes rows. The names of parts end so."""
_PART_NAME = re.compile(r"part-([0-9]{9}|[1-9][0-9]{9,17})\.(?:gpq|parquet)")
_SHARD_END_NAME = re.compile(r"shard-([0-9]{9,18})-ends-at-([0-9]{1,18})\.json")


def loader_directory(directory: Location, loader: int) -> Location:
    """Return where the parts of one dataloader of a job are."""
    return directory / f"dataloader_{loader}"


def holds_fragments(directory: Location) -> bool:
    """Whether an earlier run has left fragments, as far as its store can be asked: what they hold can be computed again."""
    try:
        return bool(store_of(directory).folders(directory, FRAGMENTS_PREFIX))
    except OSError:
        return False


def remove_fragments(directory: Location) -> None:
    """Remove the fragments of a job that is complete; see :mod:`lightning_gpuorch.predictions.storage.fragments`."""
    store = store_of(directory)
    with contextlib.suppress(OSError):  # a later run removes them
        for name in store.folders(directory, FRAGMENTS_PREFIX):
            store.remove_directory(directory / name)


@dataclass(frozen=True)
class PartHeader:
    """What is known of a part without its predictions.

    Attributes:
        metadata: The fields that were committed with it.
        entries: Its stored batches, in order.
    """

    metadata: Mapping[str, Any]
    entries: Entries

    def covers(self, layout: LoaderLayout, chunk: int) -> bool:
        """Whether every unit of a chunk has a prediction, as far as the layout tells what that is."""
        if layout.unit == "scattered":
            return True
        if layout.unit == "batch":
            is_known = layout.num_units is not None or layout.num_shards is not None
            expected = len(layout.chunk_range(chunk)) if is_known else 0
            errors = self.entries.errors
            predicted = {entry.first_unit for entry in self.entries} if errors else ()
            num_units = len(predicted) if errors else len(self.entries)
            return num_units >= expected and not any(run.first.num_lost for run in self.entries.runs)
        return self.entries.num_samples >= len(layout.chunk_range(chunk))


class PartJournal:
    """The parts of one dataloader: which there are, what their headers tell, and whether their bytes are intact.

    Args:
        directory: Where they are.
        output_format: Of the parts.
    """

    def __init__(self, directory: str | os.PathLike[str] | ObjectPath, output_format: OutputFormat = "gpq"):
        self.output_format = output_format
        self.directory = location(directory, "directory")
        self.store = store_of(self.directory)

    def path(self, chunk: int) -> Any:
        """Return the file of a chunk: a path of the kind that ``directory`` is."""
        return self.directory / f"part-{chunk:09d}.{self.output_format}"

    def done(self) -> set[int]:
        """Return the chunks that are durable.

        Raises:
            PredictionStorageError: The directory exists and cannot be listed.
        """
        return {int(match[1]) for match in map(_PART_NAME.fullmatch, self._names()) if match}

    def _names(self) -> list[str]:
        try:
            return list(self.store.names(self.directory))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error(error, self.directory) from error

    def shard_ends(self) -> dict[int, int]:
        """Return the units of each shard that has been read to its end.

        Raises:
            CorruptPartError: A shard has two ends.
            PredictionStorageError: The directory exists and cannot be listed.
        """
        ends: dict[int, int] = {}
        for match in filter(None, map(_SHARD_END_NAME.fullmatch, self._names())):
            shard, units = int(match[1]), int(match[2])
            if ends.setdefault(shard, units) != units:
                raise CorruptPartError(
                    f"shard {shard} in {self.directory} ends after {ends[shard]} batches and after {units}: it has changed, "
                    "or two jobs with different input write here. Use another output directory."
                )
        return ends

    def record_shard_end(self, shard: int, units: int) -> None:
        """Note durably how many units a shard has. Its name tells it, so that a listing of the directory is enough.

        Raises:
            PredictionStorageError: It cannot be written.
        """
        try:
            self.store.make_directory(self.directory)
            note = json.dumps({"shard": shard, "num_units": units}).encode()
            self.store.create_once(self.directory / f"shard-{shard:09d}-ends-at-{units}.json", [note])
        except OSError as error:
            raise storage_error(error, self.directory) from error

    def sizes_bytes(self) -> Iterator[int]:
        """Lengths of the parts, of each that can be told; from a listing.

        Raises:
            PredictionStorageError: The directory exists and cannot be listed.
        """
        try:
            for name, size_bytes in self.store.sizes_bytes(self.directory):
                if _PART_NAME.fullmatch(name):
                    yield size_bytes
        except FileNotFoundError:
            return
        except OSError as error:
            raise storage_error(error, self.directory) from error

    def is_durable(self, chunk: int) -> bool:
        """Whether a chunk has been committed, by whomever.

        Raises:
            PredictionStorageError: That cannot be found out.
        """
        try:
            return self.store.exists(self.path(chunk))
        except OSError as error:
            raise storage_error(error, self.directory) from error

    def header(self, chunk: int) -> PartHeader:
        """Read and verify what is known of a part, without its predictions.

        Raises:
            CorruptPartError: The header is damaged, the file has not its length, or it holds another chunk.
            MissingPredictionsError: There is no such part.
        """
        with opened(self.path(chunk)) as (file, file_bytes, source):
            return self.unpack_header(read_fields(file, file_bytes, source), chunk, file_bytes)

    def check(self, chunk: int, whole: bool = True) -> PartHeader | CorruptPartError:
        """Read a part's header and see that the file has its length; needs no torch.

        Args:
            chunk: Which.
            whole: Check every byte as well.

        Returns:
            The header, or what is wrong with the part.

        Raises:
            NewerFormatError: A newer version has written it.
            MissingPredictionsError: There is no such part.
            PredictionStorageError: It cannot be read.
        """
        try:
            with opened(self.path(chunk)) as (file, file_bytes, source):
                if not whole:
                    return self.unpack_header(read_fields(file, file_bytes, source), chunk, file_bytes)
                fields, num_predictions = check_file(file, file_bytes, source)
                return self.unpack_header(fields, chunk, num_predictions)
        except NewerFormatError:
            raise
        except CorruptPartError as error:
            return error

    def set_aside(self, chunk: int) -> None:
        """Rename a part that is damaged to ``part-....gpq.damaged``, so that its chunk counts as missing.

        Raises:
            PredictionStorageError: It cannot be renamed.
        """
        path = self.path(chunk)
        try:
            self.store.set_aside(path, path.with_name(f"{path.name}.damaged"))
        except OSError as error:
            raise storage_error(error, self.directory) from error

    def discard(self, chunk: int) -> None:
        """Remove a part durably, so that a rerun computes its chunk again. Not while a job runs.

        Raises:
            PredictionStorageError: It cannot be removed.
        """
        try:
            self.store.remove(self.path(chunk))
        except OSError as error:
            raise storage_error(error, self.directory) from error

    def sweep_temporaries(self, older_than_seconds: float = 3600.0) -> int:
        """Remove what killed writers left.

        Args:
            older_than_seconds: Younger files may belong to a living writer.

        Returns:
            How many files were removed.
        """
        return self.store.sweep_temporaries(self.directory, older_than_seconds)

    def unpack_header(
        self, fields: Mapping[str, Any], chunk: int, max_count: int, num_predictions: int | None = None
    ) -> PartHeader:
        """Read the fields of a part's header, and check that they are those of this chunk.

        Args:
            fields: The fields.
            chunk: Which chunk it has to be.
            max_count: As many stored batches as there can be.
            num_predictions: As many as there are, if that is known.

        Raises:
            CorruptPartError: They are not.
        """
        path = self.path(chunk)
        try:
            stored, metadata = fields["chunk"], fields["metadata"]
            entries = unpack_entries(fields["batches"], max_count)
            if not isinstance(metadata, dict):
                raise TypeError("its metadata is no object")  # noqa: TRY301
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptPartError(f"{path} is an envelope, but not of a part: {error!r}.") from error
        if stored != chunk:
            raise CorruptPartError(f"{path} holds chunk {stored}: the file was renamed or copied. Delete it.")
        if num_predictions is not None and num_predictions != len(entries):
            raise CorruptPartError(
                f"{path} has {num_predictions} predictions, and its header describes {len(entries)}."
            )
        return PartHeader(metadata, entries)


@contextlib.contextmanager
def opened(path: Location) -> Iterator[tuple[ReadableFile, int, str]]:
    """Open a part's file; yields it with its length and its name."""
    try:
        with store_of(path).open(path) as (file, file_bytes):
            yield file, file_bytes, str(path)
    except NotRegularFileError as error:
        raise damage(str(path), "it is no regular file") from error
    except FileNotFoundError as error:
        raise MissingPredictionsError(f"there is no part {path}: it was removed, or never written.") from error
    except OSError as error:
        raise storage_error(error, path.parent) from error
