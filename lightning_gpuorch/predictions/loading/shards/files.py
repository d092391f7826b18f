"""Lists of files as shards, and files in Arrow's formats by row group or file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.predictions.loading.shards.protocol import ShardedDataset, after

_ROWS_AT_ONCE = 1024
"""Rows of a shard that are in memory as Arrow's columns."""


class FileShards(ShardedDataset):
    """A stream of the samples in files, each of which is a shard.

    Args:
        files: Paths, or whatever else ``read`` takes. Their order is that of the samples.
        read: Gives the samples of a file in order, the same each time; a generator function, mostly. It runs in the loader's
            worker processes.

    Raises:
        ConfigurationError: ``files`` is a single path, or ``read`` no function.
    """

    def __init__(self, files: Iterable[Any], read: Callable[[Any], Iterable[Any]]):
        if isinstance(files, (str, bytes, os.PathLike)):
            raise ConfigurationError(
                f"files={files!r} is a single path; pass a list of files, such as sorted(path.glob(...))."
            )
        if not callable(read):
            raise ConfigurationError(f"read={read!r} is not callable; pass a function from a file to its samples.")
        self._files, self._read = list(files), read

    @property
    def num_shards(self) -> int:
        """How many files there are."""
        return len(self._files)

    def open_shard(self, index: int, start: int) -> Iterator[Any]:
        """Read a file from its beginning, and leave out its first samples."""
        return after(iter(self._read(self._files[index])), start)

    def shard_name(self, index: int) -> str:
        """The file."""
        return str(self._files[index])

    def shard_version(self, index: int) -> str:
        """The size of the file, if it is on this machine."""
        return file_version(self._files[index])


class ArrowShards(ShardedDataset):
    """A stream of the rows of Parquet or Arrow files, as dictionaries by column. Needs pyarrow.

    A shard is a row group of a Parquet file, of which nothing but the wanted columns is read, or else a whole file.

    Args:
        source: A directory, a file, a list of files, or a ``pyarrow.dataset.Dataset``.
        columns: The columns to read; None reads all.

    Raises:
        ConfigurationError: There is no such file, or column, or it is in none of Arrow's formats.
    """

    def __init__(self, source: Any, columns: Sequence[str] | None = None):
        try:
            import pyarrow
            from pyarrow import dataset as arrow
        except ImportError as error:
            raise ConfigurationError('ArrowShards needs pyarrow: pip install "lightning_gpuorch[parquet]"') from error
        if isinstance(source, (list, tuple)):
            source = [os.fspath(path) if isinstance(path, os.PathLike) else path for path in source]
        try:
            self._dataset = source if isinstance(source, arrow.Dataset) else arrow.dataset(source)
            fragments = list(self._dataset.get_fragments())
            self._fragments: list[Any] = []
            for fragment in fragments:
                self._fragments += _row_groups(fragment) or [fragment]
        except (OSError, pyarrow.ArrowException, TypeError) as error:
            raise ConfigurationError(f"ArrowShards cannot read {source!r}: {error}") from error
        known = self._dataset.schema.names
        missing = [name for name in columns or () if name not in known]
        if missing:
            raise ConfigurationError(
                f"ArrowShards(columns={list(columns or ())}): there is no column {missing}; there are {known}."
            )
        self._columns = None if columns is None else list(columns)

    @property
    def num_shards(self) -> int:
        """How many row groups and files there are."""
        return len(self._fragments)

    def open_shard(self, index: int, start: int) -> Iterator[dict[str, Any]]:
        """Read a row group, or a file."""
        batches = self._fragments[index].to_batches(
            schema=self._dataset.schema,
            columns=self._columns,
            batch_size=_ROWS_AT_ONCE,
            batch_readahead=1,
            fragment_readahead=0,
            use_threads=False,  # threads do not live on in a process that is forked
        )
        for batch in batches:
            if start >= batch.num_rows:
                start -= batch.num_rows
                continue
            yield from batch.slice(start).to_pylist()
            start = 0

    def shard_length(self, index: int) -> int | None:
        """Rows of a row group; None of other files, which would have to be read."""
        groups = getattr(self._fragments[index], "row_groups", None)
        return sum(group.num_rows for group in groups) if groups else None

    def shard_name(self, index: int) -> str:
        """The file, and the row group."""
        fragment = self._fragments[index]
        groups = getattr(fragment, "row_groups", None)
        path = str(getattr(fragment, "path", index))
        return f"{path}, row group {groups[0].id}" if groups else path

    def shard_version(self, index: int) -> str:
        """The size of the file, if it is on this machine."""
        return file_version(getattr(self._fragments[index], "path", ""))


def file_version(path: Any) -> str:
    """The size of a local file, in text; nothing of what is elsewhere, or no file."""
    if not isinstance(path, (str, os.PathLike)):
        return ""
    try:
        return f"{os.stat(path).st_size} bytes"
    except (OSError, ValueError):
        return ""


def _row_groups(fragment: Any) -> list[Any]:
    """A Parquet file by row group; nothing of another file."""
    split = getattr(fragment, "split_by_row_group", None)
    return list(split()) if split is not None else []
