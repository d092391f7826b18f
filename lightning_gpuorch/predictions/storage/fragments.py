"""What is kept on disk of chunks that are not whole yet, so that a death or a stop costs seconds and not a chunk.

A chunk may take half a minute, and with dynamic batching the chunks of a window become whole, and durable, all together at
its end. Until then a replica writes every few seconds what it has computed since the last time into a *fragment*: a file
like a part, with batches as they were computed; with dynamic batching they are of samples from many chunks. Another
replica, or a later run, that gets one of these chunks takes over what fragments hold of it.

Fragments are not the journal, parts are. So nothing waits for the disk, a damaged fragment is passed over, and each is
removed when the chunks it took samples from are durable. The directory of a rank's fragments lies beside those of the
parts: ``unfinished-<dataloader>-<rank and process>/part-<number>.gpq``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Literal

from lightning_gpuorch.errors import CorruptPartError, MissingPredictionsError, PredictionStorageError
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.storage.journal import FRAGMENTS_PREFIX, PartJournal
from lightning_gpuorch.predictions.storage.layout import StoredBatch
from lightning_gpuorch.predictions.storage.part_entries import BatchEntry
from lightning_gpuorch.predictions.storage.parts import Part, PartStore
from lightning_gpuorch.predictions.storage.stores import store_of

log = logging.getLogger(__name__)

Numbering = Literal["window samples", "samples", "batches"]
"""What batches of a fragment count: samples of windows, which are numbered as if all of the loader's batches were full; units
that are samples; or units that are the loader's batches, of which the samples are not counted."""

KEEP_SECONDS = 3.0
"""Time between two fragments: about what a death can cost."""
BYTES_IN_MEMORY = 256 * 2**20
"""Fragments that are kept in memory between two windows: chunks that were lost together are in the same ones."""
_MAX_SAMPLES = 2**20
"""Of a batch: each is looked at, though a range of them takes no bytes in the file."""
_UNREADABLE = (CorruptPartError, MissingPredictionsError, PredictionStorageError)
_TIMES_COST = 100
"""So many times what writing a fragment took passes until the next one: slow disks cost 1% at most."""


class FragmentWriter:
    """Writes the fragments of one rank, on the thread that computes.

    Args:
        directory: Of the job.
        loader: Which dataloader.
        numbering: What batches count; a reader takes over what is counted alike.
        on_kept: Called with the number of samples after each fragment.
        around_write: Makes a context in which each is written.
        clock: Gives seconds.
    """

    def __init__(
        self,
        directory: Location,
        loader: int,
        numbering: Numbering,
        on_kept: Callable[[int], None] = lambda num_samples: None,
        around_write: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        clock: Callable[[], float] = time.monotonic,
    ):
        # Never that of another life: a restart of this rank, or a later run, must not meet files it did not write.
        name = f"{_prefix(loader)}{os.getpid()}-{secrets.token_hex(6)}"
        self._store = PartStore(directory / name, fsync=False)  # after a power cut the checksums tell
        self._numbering = numbering
        self._on_kept, self._around_write, self._clock = on_kept, around_write, clock
        self._pending: list[tuple[StoredBatch, frozenset[int]]] = []
        self._chunks_of: dict[int, set[int]] = {}
        self._count = 0
        self._due = clock() + KEEP_SECONDS
        self._failed = False
        self._lock = threading.Lock()

    def add(self, batch: StoredBatch, chunks: Iterable[int]) -> None:
        """Take a batch of chunks that are not whole, and write a fragment if it is time.

        Args:
            batch: The batch as it was computed.
            chunks: The chunks its samples are in.
        """
        self._pending.append((batch, frozenset(chunks)))
        if self._clock() >= self._due:
            self.write()

    def write(self) -> None:
        """Write what has come since the last fragment."""
        pending, self._pending = self._pending, []
        if not pending or self._failed:
            return
        batches = [batch for batch, _ in pending]
        began, number = self._clock(), self._count
        self._count += 1
        with self._lock:
            self._chunks_of[number] = set().union(*(chunks for _, chunks in pending))
        try:
            with self._around_write():
                self._store.commit(number, batches, {"numbering": self._numbering})
        except PredictionStorageError as error:
            # The parts will show whether that is a reason to end.
            if not self._failed:
                log.warning("nothing is kept of chunks that are not whole any more: %s", error)
            self.give_up()
            return
        now = self._clock()
        self._due = now + max(KEEP_SECONDS, _TIMES_COST * (now - began))
        self._on_kept(sum(batch.size or 0 for batch in batches))

    def end_window(self) -> None:
        """The chunks of all batches so far are whole: what is not written yet need not be."""
        self._pending.clear()
        self._due = self._clock() + KEEP_SECONDS

    def end_chunk(self, chunk: int) -> None:
        """A chunk is whole: what is not written yet of it alone need not be."""
        self._pending = [(batch, chunks) for batch, chunks in self._pending if chunks != {chunk}]
        self._due = max(self._due, self._clock() + KEEP_SECONDS) if not self._pending else self._due

    def give_up(self) -> None:
        """Make room for the parts: remove all fragments, and write none any more. From any thread."""
        self._failed = True
        with self._lock:
            self._chunks_of.clear()
        self._store.store.remove_directory(self._store.directory)

    def on_durable(self, chunk: int) -> None:
        """Remove the fragments all of whose chunks are durable. From any thread."""
        with self._lock:
            for chunks in self._chunks_of.values():
                chunks.discard(chunk)
            over = [number for number, chunks in self._chunks_of.items() if not chunks]
            for number in over:
                del self._chunks_of[number]
        for number in over:
            try:
                self._store.discard(number)
            except PredictionStorageError as error:
                log.debug("a fragment stays until the job is complete: %s", error)


class FragmentReader:
    """Finds predictions in the fragments of a dataloader, on whatever rank they were written.

    Args:
        directory: Of the job.
        loader: Which dataloader.
        numbering: What the batches that are wanted count.
    """

    def __init__(self, directory: Location, loader: int, numbering: Numbering):
        self._directory, self._prefix, self._numbering = directory, _prefix(loader), numbering
        self._numbers_in: dict[tuple[Location, int], Sequence[Sequence[int]]] = {}
        self._parts: dict[tuple[Location, int], Part] = {}
        self._looked = False

    def has_any(self, look_again: bool) -> bool:
        """Whether there are fragments.

        Args:
            look_again: Whether some may have appeared since the last time: a replica has died.
        """
        if look_again or not self._looked:
            self._look()
        return bool(self._numbers_in)

    def find(self, wanted: Collection[int]) -> Iterator[StoredBatch]:
        """Read batches that hold some of the samples, from the fragments that :meth:`has_any` has seen.

        Args:
            wanted: Numbers of samples; of batches where these are counted.

        Yields:
            Batches as they were computed; they may hold other samples as well, and samples that another one held.
        """
        used: dict[tuple[Location, int], Part] = {}
        for place, held in list(self._numbers_in.items()):
            if not any(_any_in(numbers, wanted) for numbers in held):
                continue
            try:
                part = self._parts.get(place) or PartStore(place[0]).read(place[1])
                for position, entry in enumerate(part.header.entries):
                    if _any_in(self.numbers_of(entry), wanted):
                        output = part.output(position)
                        yield StoredBatch(
                            entry.first_unit, entry.indices, entry.size, output, entry.units, entry.num_lost
                        )
            except _UNREADABLE as error:
                self._pass_over(*place, error)
            else:
                if sum(other.num_bytes for other in used.values()) + part.num_bytes <= BYTES_IN_MEMORY:
                    used[place] = part
        self._parts = used

    def _look(self) -> None:
        self._looked = True
        found = {(journal.directory, number) for journal in self._journals() for number in journal.done()}
        self._numbers_in = {place: numbers for place, numbers in self._numbers_in.items() if place in found}
        for directory, number in sorted(found - self._numbers_in.keys(), key=str):
            try:
                header = PartJournal(directory).header(number)
                entries = header.entries if header.metadata.get("numbering") == self._numbering else ()
                if any((entry.size or 0) > _MAX_SAMPLES for entry in entries):
                    raise CorruptPartError(f"{directory} holds a batch of more than {_MAX_SAMPLES} samples.")
                self._numbers_in[directory, number] = [self.numbers_of(entry) for entry in entries]
            except _UNREADABLE as error:
                self._pass_over(directory, number, error)

    def numbers_of(self, entry: StoredBatch | BatchEntry) -> Sequence[int]:
        """What a batch covers, counted as is wanted here."""
        return range(entry.first_unit, entry.first_unit + 1) if self._numbering == "batches" else numbers_of(entry)

    def _journals(self) -> Iterator[PartJournal]:
        return (
            PartJournal(self._directory / name)
            for name in store_of(self._directory).folders(self._directory, self._prefix)
        )

    def _pass_over(self, directory: Location, number: int, error: Exception) -> None:
        # It is gone where its writer lives and has finished, which is no news.
        level = logging.DEBUG if isinstance(error, MissingPredictionsError) else logging.WARNING
        log.log(level, "a fragment is passed over, and what it held computed again: %s", error)
        self._numbers_in[directory, number] = ()


def _any_in(numbers: Sequence[int], wanted: Collection[int]) -> bool:
    if isinstance(numbers, range) and not isinstance(wanted, range):  # it may claim any length
        return any(number in numbers for number in wanted)
    if isinstance(numbers, range) and isinstance(wanted, range):
        return max(numbers.start, wanted.start) < min(numbers.stop, wanted.stop)
    return any(number in wanted for number in numbers)


def numbers_of(batch: StoredBatch | BatchEntry) -> Sequence[int]:
    """The number of each sample of a batch; see :meth:`~lightning_gpuorch.predictions.loading.window.Window.numbers`."""
    return batch.units if batch.units is not None else range(batch.first_unit, batch.first_unit + (batch.size or 0))


def _prefix(loader: int) -> str:
    return f"{FRAGMENTS_PREFIX}{loader}-"
