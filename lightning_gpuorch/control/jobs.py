"""A predict call as the coordinator sees it: where its results are, who computes what, and whether anything is missing."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning_gpuorch.control.input_ledger import InputLedger
from lightning_gpuorch.control.leases import LeaseQueue, Owner
from lightning_gpuorch.control.stretch_planner import StretchPlanner
from lightning_gpuorch.errors import InputMismatchError, MissingPredictionsError
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.storage.journal import PartJournal, loader_directory
from lightning_gpuorch.predictions.storage.layout import LoaderLayout
from lightning_gpuorch.predictions.storage.manifest import Manifest
from lightning_gpuorch.predictions.storage.stores import store_of
from lightning_gpuorch.predictions.storage.unit_ranges import IntegerSet, UnitRanges

log = logging.getLogger(__name__)


@dataclass
class Job:
    """One predict call: its directory and one queue per dataloader."""

    directory: Location
    manifest: Manifest
    queues: list[LeaseQueue]
    ephemeral: bool
    inputs: list[InputLedger]
    planners: list[StretchPlanner]
    mismatch: InputMismatchError | None = None
    """Replicas have read different input: no prediction of this job can be trusted."""
    opened_by: set[int] = field(default_factory=set)
    closed_by: set[int] = field(default_factory=set)
    samples_done: int = 0
    num_recorded: int = 0
    """Samples with an error in place of a prediction, in parts that are durable."""
    counted: defaultdict[int, IntegerSet] = field(default_factory=lambda: defaultdict(IntegerSet))
    """Chunks whose samples are in it, by loader: a report may be repeated."""
    samples_kept: Counter[tuple[int, Owner]] = field(default_factory=Counter)
    """Computed in chunks that are not whole yet, by loader and owner."""
    started: float = field(default_factory=time.monotonic)

    @property
    def finished(self) -> bool:
        """Whether every chunk of every loader is durable or given up."""
        return all(queue.finished for queue in self.queues)

    @property
    def chunks_computed(self) -> int:
        """Chunks that are durable, and as many as what is computed of others would make."""
        per_chunk = [queue.layout.newest_chunk_size * queue.layout.samples_per_unit for queue in self.queues]
        begun = sum(count / per_chunk[loader] for (loader, _), count in self.samples_kept.items())
        return sum(queue.num_done for queue in self.queues) + int(begun)

    @property
    def resumed_chunks(self) -> int:
        """Chunks that were durable before this run."""
        return sum(queue.num_resumed for queue in self.queues)


def verify_complete(number: int, job: Job) -> None:
    """Check one job against its part files.

    Raises:
        InputMismatchError: Replicas have read different input.
        MissingPredictionsError: Units are missing or were given up; they are named.
    """
    if job.mismatch is not None:
        raise job.mismatch
    for loader, queue in enumerate(job.queues):
        layout = queue.layout
        where = f"job {number}, dataloader {loader}" if len(job.queues) > 1 or number else "the job"
        if queue.quarantined:
            units = sorted({u for entry in queue.quarantined for u in range(entry.start, entry.stop)})
            reasons = "; ".join(sorted({entry.reason for entry in queue.quarantined}))
            noun = "samples" if layout.unit == "sample" else "batches"
            raise MissingPredictionsError(
                f"{where} has no prediction for {len(units)} {noun}: {layout.named(range(u, u + 1) for u in units)} "
                f"({reasons}). All others are durable in {job.directory}.",
                units,
            )
        if layout.num_units is None:
            what = "stream" if layout.num_shards is None else f"{layout.num_shards} shards"
            raise MissingPredictionsError(f"{where} ended before the end of its {what} was seen.")
        missing = missing_units(layout, PartJournal(loader_directory(job.directory, loader)).done())
        if missing:
            raise MissingPredictionsError(
                f"{where} ended with {len(missing)} units missing: {layout.named(missing.ranges)}. What was computed is kept "
                f"in {job.directory}; the same command goes on from there.",
                missing,
            )


def missing_units(layout: LoaderLayout, done: Collection[int]) -> UnitRanges:
    """Units whose chunk is not durable, ascending."""
    if layout.num_shards is not None:
        wanted = [layout.shard_range(shard) for shard in range(layout.num_shards)]
    else:
        wanted = [range(layout.num_units or 0)]
    present = (layout.chunk_range(chunk) for chunk in sorted(done))
    return UnitRanges(_without(wanted, present))


def _without(wanted: Iterable[range], present: Iterator[range]) -> Iterator[range]:
    """What is in ranges and in none of others; each ascend and are disjoint."""
    found = next(present, None)
    for units in wanted:
        reached = units.start
        while found is not None and found.start < units.stop:
            yield range(reached, max(reached, found.start))
            reached = max(reached, found.stop)
            found = next(present, None)
        yield range(reached, max(reached, units.stop))


def done_units(queue: LeaseQueue) -> int:
    """Units of the chunks that are durable."""
    layout = queue.layout
    return sum(
        layout.chunk_range(chunks[-1]).stop - layout.chunk_range(chunks[0]).start for chunks in queue.done.ranges()
    )


def remove_ephemeral(jobs: Mapping[int, Job], succeeded: bool | None = None) -> None:
    """Remove result directories nobody asked to keep, if their job is complete and the script has succeeded.

    So is that of a job whose ranks read different input: no run can go on from there.

    Args:
        jobs: The predict calls.
        succeeded: Whether the script has; None looks whether an exception is about to end this process.
    """
    if succeeded is None:
        succeeded = getattr(sys, "last_value", None) is None  # set for an exception that nobody has caught
    for job in jobs.values():
        if not job.ephemeral or not is_there(job.directory):
            continue
        complete = job.finished and not any(queue.quarantined for queue in job.queues)
        if job.mismatch is not None or (complete and succeeded):
            store_of(job.directory).remove_directory(job.directory)
            if isinstance(job.directory, Path):
                for parent in list(job.directory.parents)[:2]:  # the run's folder, and "gpuorch" around it
                    _remove_if_empty(parent)
        else:
            log.warning(
                "%s predictions are kept in %s; pass output_dir=%r to go on from there",
                "complete" if complete else "incomplete",
                job.directory,
                str(job.directory),
            )


def is_there(directory: Location) -> bool:
    """Whether a directory of results is there, as far as its store can be asked."""
    try:
        return store_of(directory).holds_anything(directory)
    except OSError as error:
        log.warning("%s cannot be looked at: %s", directory, error.strerror)
        return False


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError as error:  # another run is using it, or it is gone: both are fine
        log.debug("%s stays: %s", directory, error)
