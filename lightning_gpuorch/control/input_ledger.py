"""What replicas read of a stream, compared: a stream that differs between them gives wrong or missing predictions."""

from __future__ import annotations

import collections
from collections.abc import Callable

from lightning_gpuorch.errors import InputMismatchError

REMEDY = (
    "A stream must give every replica the whole of its data, in the same order: remove what splits it by rank "
    "(gpuorch shares out the work itself), and seed what draws at random."
)
_KEPT_CHUNKS = 4096


class InputLedger:
    """The digests of one dataloader. Not thread-safe.

    Args:
        loader: Index of the dataloader.
        stored: The digest kept with a durable part, if there is one.
    """

    def __init__(self, loader: int, stored: Callable[[int], str | None]):
        self._loader, self._stored = loader, stored
        self._read: collections.OrderedDict[int, tuple[str, str]] = collections.OrderedDict()

    def add(self, chunk: int, digest: str, rank: int) -> None:
        """Take what a rank has read of a chunk; chunk -1 is the first item alone.

        Args:
            chunk: Which chunk.
            digest: Kind of items, a colon, and their digest; digests of different kinds are not compared.
            rank: Who read it.

        Raises:
            InputMismatchError: Another rank has read something else.
        """
        known = self._read.get(chunk)
        if known is None:
            stored = self._stored(chunk) if chunk >= 0 else None
            known = (
                (digest, f"rank {rank}")
                if stored is None
                else (stored, "an earlier run, or an earlier life of a rank,")
            )
            self._read[chunk] = known
            if len(self._read) > _KEPT_CHUNKS:  # what is forgotten here is still in the parts
                self._read.pop(next(key for key in self._read if key >= 0))
        before, reader = known
        if before.partition(":")[0] == digest.partition(":")[0] and before != digest:
            what = "the first batch" if chunk < 0 else f"chunk {chunk}"
            raise InputMismatchError(
                f"dataloader {self._loader}: rank {rank} has read something else as {what} of the stream than {reader} did. "
                + REMEDY
            )
