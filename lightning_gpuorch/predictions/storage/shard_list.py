"""What the shards of a stream were when a job began, kept beside its predictions to name what has changed since."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

from lightning_gpuorch.checked_files import parse_object
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.storage.stores import storage_error, store_of

_MAX_BYTES = 64 * 2**20
_DIFFERENCES_SHOWN = 5


class ShardEntry(NamedTuple):
    """A shard.

    Attributes:
        name: What it is called.
        length: Its samples, if it tells.
        version: What changes with its content, if it tells.
    """

    name: str
    length: int | None
    version: str

    def __str__(self) -> str:
        told = [f"{self.length} samples" if self.length is not None else "", self.version]
        return self.name + (f" ({', '.join(filter(None, told))})" if any(told) else "")


class ShardList:
    """The shards of a stream, in order.

    Args:
        entries: One per shard.
    """

    def __init__(self, entries: Sequence[ShardEntry]):
        self.entries = entries

    @property
    def digest(self) -> str:
        """Of all of them, in their order."""
        return hashlib.sha256(self._encoded()).hexdigest()[:16]

    def store(self, directory: Location) -> None:
        """Keep the list in a dataloader's directory, under its digest.

        Raises:
            PredictionStorageError: The directory cannot be written.
        """
        try:
            store_of(directory).make_directory(directory)
            store_of(directory).create_once(_path(directory, self.digest), [self._encoded()])
        except OSError as error:
            raise storage_error(error, directory) from error

    @classmethod
    def load(cls, directory: Location, digest: str) -> ShardList | None:
        """The list with a digest that a job has kept; None if it is not there, or damaged: it only explains."""
        try:
            content = store_of(directory).read(_path(directory, digest), _MAX_BYTES)
            found = cls([ShardEntry(str(n), length, str(v)) for n, length, v in parse_object(content)["shards"]])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return found if found.digest == digest else None

    def differences(self, other: ShardList) -> str:
        """What another list has in place of this one's shards, the first few of it."""
        pairs = enumerate(itertools.zip_longest(self.entries, other.entries))
        odd = [(index, old, new) for index, (old, new) in pairs if old != new]
        shown = [
            f"shard {i} was {o or 'not there'} and is {n or 'not there'} now" for i, o, n in odd[:_DIFFERENCES_SHOWN]
        ]
        hidden = len(odd) - len(shown)
        return "; ".join([*shown, f"and {hidden} more"] if hidden else shown)

    def _encoded(self) -> bytes:
        return json.dumps({"shards": self.entries}).encode()


def _path(directory: Location, digest: str) -> Location:
    return directory / f"shards-{digest}.json"
