"""How a predict call begins, or goes on where an earlier run has left it: what is there is checked, leases are set up."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from lightning_gpuorch.control.background import Background
from lightning_gpuorch.control.chunk_growth import ChunkGrowth, PartLimits
from lightning_gpuorch.control.input_ledger import InputLedger
from lightning_gpuorch.control.jobs import Job
from lightning_gpuorch.control.leases import LeaseQueue
from lightning_gpuorch.control.messages.base import Sender
from lightning_gpuorch.control.messages.leases import OpenJob
from lightning_gpuorch.control.replicas import Replicas
from lightning_gpuorch.control.shard_leases import ShardLeaseQueue
from lightning_gpuorch.control.stretch_planner import StretchPlanner
from lightning_gpuorch.errors import (
    CorruptPartError,
    InputMismatchError,
    MissingPredictionsError,
    PredictionStorageError,
)
from lightning_gpuorch.paths import location
from lightning_gpuorch.predictions.storage.journal import PartJournal, holds_fragments, loader_directory
from lightning_gpuorch.predictions.storage.manifest import Life, Manifest, compare, open_or_create
from lightning_gpuorch.predictions.storage.resume import prepare

log = logging.getLogger(__name__)


def create_job(
    request: OpenJob, wanted: Manifest, replicas: Replicas, max_chunk_failures: int, background: Background
) -> Job:
    """Begin a job in its directory, or go on with it; takes as long as existing parts take to be checked.

    Args:
        request: Of its first rank.
        wanted: What the job is now.
        replicas: The replicas of the run.
        max_chunk_failures: Deaths in one chunk before a sample of it is given up.
        background: Does what may take long.

    Raises:
        JobMismatchError: The directory holds another job.
        CorruptPartError: Its manifest is damaged.
        PredictionStorageError: The directory cannot be read or written.
    """
    directory = location(request.directory, "directory", request.storage_options)
    manifest = open_or_create(directory, wanted)
    stores = [
        PartJournal(loader_directory(directory, index), manifest.output_format)
        for index in range(len(manifest.loaders))
    ]
    num_recorded = sum(
        prepare(store, layout, request.resume_check) for layout, store in zip(manifest.loaders, stores, strict=True)
    )
    begun = holds_fragments(directory)
    limits = PartLimits(request.part_bytes, request.part_seconds)
    queues, planners = [], []
    for layout, store in zip(manifest.loaders, stores, strict=True):
        growth = ChunkGrowth(limits, replicas.num_replicas)
        planner = StretchPlanner(store.directory, growth, lambda: replicas.num_replicas, background)
        make = LeaseQueue if layout.num_shards is None else ShardLeaseQueue
        is_durable = functools.partial(_is_durable, store)
        planner.queue = make(layout, store.done(), max_chunk_failures, is_durable, begun, planner.on_leased)
        queues.append(planner.queue)
        planners.append(planner)
    inputs = [InputLedger(loader, _digest_of_part(store)) for loader, store in enumerate(stores)]
    return Job(directory, manifest, queues, request.ephemeral, inputs, planners, num_recorded=num_recorded)


def refuse_other_input(job: Job, wanted: Manifest, sender: Sender) -> None:
    """All ranks must have the same model and the same data as the one that opened the job.

    Raises:
        InputMismatchError: A rank has not; what differs is named, with both ranks.
    """
    first, rank = min(job.opened_by, default=0), sender.rank
    life: Life = "later" if sender.generation else "first"
    differences = compare(job.manifest, wanted, f"on rank {first}", f"on rank {rank}", life)
    if differences:
        raise InputMismatchError(
            f"rank {rank} does not have the same work as rank {first}:\n  "
            + "\n  ".join(differences)
            + "\nEvery rank must be given the whole of the data in the same order: remove a sampler or a dataset that "
            "splits it by rank (gpuorch shares out the work itself), and seed what draws at random, with a generator of its "
            "own or seed_everything."
        )


def _is_durable(store: PartJournal, chunk: int) -> bool:
    """Whether a chunk need not be computed again, as far as its store can be asked now; if it was, its commit finds out."""
    try:
        return store.is_durable(chunk)
    except PredictionStorageError as error:
        log.warning("%s Chunk %d is leased again.", error, chunk)
        return False


def _digest_of_part(store: PartJournal) -> Callable[[int], str | None]:
    def read(chunk: int) -> str | None:
        if not _is_durable(store, chunk):
            return None
        try:
            digest = store.header(chunk).metadata.get("read")
        except (CorruptPartError, MissingPredictionsError, PredictionStorageError) as error:
            log.debug("chunk %d tells nothing of what was read: %s", chunk, error)
            return None
        return digest if isinstance(digest, str) else None

    return read
