"""Predict calls on the coordinator: opens them, leases their chunks, and records what is durable, given up or missing."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from lightning_gpuorch.control.background import Background, in_thread
from lightning_gpuorch.control.job_opening import create_job, refuse_other_input
from lightning_gpuorch.control.jobs import Job, done_units, verify_complete
from lightning_gpuorch.control.leases import LeaseQueue, Owner
from lightning_gpuorch.control.messages.base import LoaderKey, RaisedException, UnitRange
from lightning_gpuorch.control.messages.leases import (
    ChunkDone,
    ChunkRecorded,
    CloseJob,
    EndOfStream,
    Fenced,
    GetProgress,
    InputRead,
    JobClosed,
    JobOpened,
    JobProgress,
    Kept,
    LeaseAnswer,
    LoaderRequest,
    NextChunk,
    OpenJob,
    SamplesKept,
)
from lightning_gpuorch.control.messages.nodes import Deaths, DrainReplica, GetDeaths
from lightning_gpuorch.control.pending import answered, pending, resolve
from lightning_gpuorch.control.replicas import Replicas
from lightning_gpuorch.control.shard_leases import ShardLeaseQueue
from lightning_gpuorch.errors import (
    ControlPlaneError,
    GPUOrchError,
    InputMismatchError,
)
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.storage.journal import (
    PartJournal,
    loader_directory,
    remove_fragments,
)
from lightning_gpuorch.predictions.storage.manifest import (
    Manifest,
    record_mismatch,
    record_quarantine,
    set_num_units,
)

log = logging.getLogger(__name__)


class JobService:
    """All predict calls of a run.

    Args:
        replicas: The replicas of the run.
        max_chunk_failures: Deaths in one chunk before a sample of it is given up.
        on_event: Told of what happened, as ``on_event(kind, **fields)``; must not raise.
        background: Does what may take long.
    """

    def __init__(
        self,
        replicas: Replicas,
        max_chunk_failures: int,
        on_event: Callable[..., None],
        background: Background = in_thread,
    ):
        self._background = background
        self._replicas, self._max_chunk_failures, self._on_event = replicas, max_chunk_failures, on_event
        self.jobs: dict[int, Job] = {}
        self.progress_by_replica: dict[int, int] = {}
        """How often each has made a chunk durable, or kept something of one."""
        self.draining = False
        self._let_go: set[Owner] = set()
        self._last_over: dict[int, int] = {}
        self._opening = threading.Lock()
        self._lock = threading.RLock()

    @property
    def routes(self) -> Mapping[type, Any]:
        """What is answered here."""
        return {
            OpenJob: self.open,
            NextChunk: self.next_chunk,
            ChunkDone: self.record_chunk,
            SamplesKept: self.record_kept,
            InputRead: self.record_input,
            EndOfStream: self.end_stream,
            CloseJob: self.close,
            GetProgress: lambda request: self.progress(request.job),
            GetDeaths: lambda request: Deaths(deaths=self.deaths_in(request.blamed, request.positions)),
            DrainReplica: lambda request: self.let_go((request.replica, request.generation)),
        }

    @property
    def finished(self) -> bool:
        """Whether every opened job is complete, as far as the queues know."""
        with self._lock:
            return bool(self.jobs) and all(job.finished for job in self.jobs.values())

    @property
    def kept_directory(self) -> Location | None:
        """Results somebody wants to keep, the first of them; the run's records go beside them."""
        with self._lock:
            return next((job.directory for _, job in sorted(self.jobs.items()) if not job.ephemeral), None)

    def verify(self) -> None:
        """Check that every opened job is complete, by the part files themselves.

        Raises:
            MissingPredictionsError: Units are missing; they are named.
        """
        for number, job in sorted(self.jobs.items()):
            verify_complete(number, job)

    # What the supervisors decide

    def expire_leases(self, replica: int) -> int:
        """Take back the leases of a replica without a heartbeat; it may come back and go on.

        Returns:
            Number of chunks that went back.
        """
        with self._lock:
            owner = (replica, self._replicas.generations.get(replica, 0))
            return sum(len(queue.release(owner)) for job in self.jobs.values() for queue in job.queues)

    def let_go(self, owner: Owner) -> None:
        """Hand a replica no more work: it finishes what it holds and leaves."""
        with self._lock:
            self._let_go.add(owner)
            for job in self.jobs.values():
                for queue in job.queues:
                    queue.let_go(owner)

    def deaths_in(self, chunks: dict[LoaderKey, int], positions: dict[LoaderKey, UnitRange]) -> int:
        """Deaths so far in units of chunks; the most of any unit."""
        with self._lock:
            faults = [
                (self.jobs[job].queues[loader].faults.get(chunk), range(*positions[job, loader]))
                for (job, loader), chunk in chunks.items()
            ]
            return max((fault.deaths_of[unit] for fault, units in faults if fault for unit in units), default=0)

    def open_ranks(self, ranks: Iterable[int]) -> dict[int, bool]:
        """Ranks that have opened a job and not closed it, each with whether all of its open jobs are complete."""
        found = {}
        for rank in ranks:
            unfinished = self.unfinished_jobs_of(rank)
            if unfinished:
                found[rank] = all(self.jobs[number].finished for number in unfinished)
        return found

    def unfinished_jobs_of(self, rank: int) -> list[int]:
        """Jobs a rank has opened and not closed: it may not leave yet."""
        with self._lock:
            return [n for n, job in self.jobs.items() if rank in job.opened_by and rank not in job.closed_by]

    def end_generation(
        self,
        owner: Owner,
        blamed: Mapping[LoaderKey, int],
        positions: Mapping[LoaderKey, UnitRange],
        exception: RaisedException | None = None,
    ) -> int:
        """Take back the leases of a generation that is over; every path that ends one passes here. Idempotent.

        Args:
            owner: The replica, and which of its starts.
            blamed: Chunk being computed at death.
            positions: Units of the step it was in.
            exception: What the script raised there, if that is what ended it.

        Returns:
            Number of chunks that went back.
        """
        back, (replica, generation) = 0, owner
        with self._lock:
            self._last_over[replica] = max(generation, self._last_over.get(replica, -1))
            for number, job in self.jobs.items():
                for loader, queue in enumerate(job.queues):
                    key = (number, loader)
                    before = len(queue.quarantined)
                    back += len(queue.revoke(owner, blamed.get(key), positions.get(key), exception))
                    self._record_quarantine(number, loader, before)
            for job in self.jobs.values():
                job.opened_by.difference_update(self._replicas.ranks_of(owner[0]))
                for kept in [kept for kept in job.samples_kept if kept[1] == owner]:
                    del job.samples_kept[kept]
        return back

    def drain(self) -> None:
        """Hand out no more work."""
        with self._lock:
            self.draining = True
            for job in self.jobs.values():
                for queue in job.queues:
                    queue.drain()

    # What ranks ask

    def open(self, request: OpenJob) -> Future[JobOpened]:
        """Begin a job, or take part in it. Checking what is there already may take long: it is done in the background."""
        answer = pending()

        def open_job() -> None:
            try:
                resolve([answer], self._open(request))
            except GPUOrchError as error:
                resolve([answer], error)
            except Exception as error:
                log.exception("%s cannot be opened", request.directory)
                resolve([answer], ControlPlaneError(f"{request.directory}: {type(error).__name__}: {error}"))

        self._background("gpuorch-open", open_job)
        return answer

    def _open(self, request: OpenJob) -> JobOpened:
        number, wanted = request.job, Manifest.from_dict(request.manifest)
        with self._opening:  # not self._lock, which all other requests need meanwhile
            job = self.jobs.get(number)
            if job is None:
                job = self._create_job(request, wanted)
            else:
                try:
                    refuse_other_input(job, wanted, request.sender)
                except InputMismatchError as error:
                    self._distrust(job, error)
                    raise
        with self._lock:
            job.opened_by.add(request.sender.rank)
            layouts = [queue.layout for queue in job.queues]
            return JobOpened(
                directory=str(job.directory),
                manifest=dataclasses.replace(job.manifest, loaders=layouts).to_dict(),
                resumed_chunks=job.resumed_chunks,
                finished=job.finished,
            )

    def _create_job(self, request: OpenJob, wanted: Manifest) -> Job:
        job = create_job(request, wanted, self._replicas, self._max_chunk_failures, self._background)
        with self._lock:
            for queue in job.queues:
                if self.draining:
                    queue.drain()
                for owner in self._let_go:
                    queue.let_go(owner)
                for owner in self._last_over.items():
                    queue.revoke(owner)
            self.jobs[request.job] = job
        self._on_event(
            "job",
            job=request.job,
            directory=str(job.directory),
            resumed_chunks=job.resumed_chunks,
            resumed_units=sum(map(done_units, job.queues)),
            loaders=[layout.to_dict() for layout in job.manifest.loaders],
            tensor_parallel_size=self._replicas.tensor_parallel_size or 1,
        )
        return job

    def _job(self, number: int) -> Job:
        job = self.jobs.get(number)
        if job is None:
            raise ControlPlaneError(f"predict call {number} is not open; open are {sorted(self.jobs)}.")
        return job

    def _job_and_queue(self, request: LoaderRequest[Any]) -> tuple[Job, LeaseQueue]:
        job = self._job(request.job)
        if not 0 <= request.loader < len(job.queues):
            raise ControlPlaneError(
                f"predict call {request.job} has {len(job.queues)} dataloaders; rank {request.sender.rank} asks for number "
                f"{request.loader}."
            )
        return job, job.queues[request.loader]

    def next_chunk(self, request: NextChunk) -> Future[LeaseAnswer]:
        """Hand out work; see :meth:`LeaseQueue.next`."""
        if request.sender.replica in self._replicas.retired:  # its node was given up, and is back
            return answered(Fenced())
        _, queue = self._job_and_queue(request)
        return queue.next(
            request.sender.owner, request.sequence, request.block, request.seconds_per_sample, request.after
        )

    def record_chunk(self, request: ChunkDone) -> ChunkRecorded:
        """A chunk is durable."""
        job, queue = self._job_and_queue(request)
        job.planners[request.loader].observe(request.chunk, request.num_bytes, request.seconds)
        queue.report_done(request.chunk)
        kept, replica = (request.loader, request.sender.owner), request.sender.replica
        with self._lock:
            job.samples_kept[kept] = max(0, job.samples_kept[kept] - request.samples)
            if request.won and request.chunk not in job.counted[request.loader]:
                job.counted[request.loader].add(request.chunk)
                job.samples_done += request.samples
                self.progress_by_replica[replica] = self.progress_by_replica.get(replica, 0) + 1
            for start, stop, reason in request.quarantined:
                if any((start, stop) == (known.start, known.stop) for known in queue.quarantined):
                    continue
                before = len(queue.quarantined)
                queue.quarantine(start, stop, reason)
                self._record_quarantine(request.job, request.loader, before)
            job.num_recorded += request.recorded if request.won else 0
            num_errored = job.num_recorded + sum(
                entry.stop - entry.start for queue in job.queues for entry in queue.quarantined
            )
        return ChunkRecorded(num_errored=num_errored)

    def record_kept(self, request: SamplesKept) -> Kept:
        """Samples of chunks that are not whole yet are computed, and kept: a good moment to leave."""
        job, queue = self._job_and_queue(request)
        owner = request.sender.owner
        with self._lock:
            job.samples_kept[request.loader, owner] += request.samples
            self.progress_by_replica[owner[0]] = self.progress_by_replica.get(owner[0], 0) + 1
        return Kept(leave=queue.must_leave(owner))

    def record_input(self, request: InputRead) -> None:
        """What a rank has read of a stream."""
        job, _ = self._job_and_queue(request)
        with self._lock:
            ledger = job.inputs[request.loader]
            try:
                for chunk, digest in request.digests:
                    ledger.add(chunk, digest, request.sender.rank)
            except InputMismatchError as error:
                self._distrust(job, error)
                raise

    def _distrust(self, job: Job, error: InputMismatchError) -> None:
        """Take nothing of a job for a result: it is not known which rank was given the right input."""
        with self._lock:
            if job.mismatch is None:
                job.mismatch = error
                record_mismatch(job.directory, str(error))

    def end_stream(self, request: EndOfStream) -> None:
        """A rank has seen where a stream ends, or a shard of it."""
        job, queue = self._job_and_queue(request)
        loader, units = request.loader, request.units
        if isinstance(queue, ShardLeaseQueue):
            _end_shard(job, queue, request)
            return
        with self._lock:
            layout = queue.layout
            if layout.num_units is None:
                job.manifest = set_num_units(job.directory, loader, units)
                queue.end_stream(layout.with_num_units(units))
            elif layout.num_units != units:
                raise ControlPlaneError(
                    f"the stream of dataloader {loader} ended after {units} batches on rank {request.sender.rank} and "
                    f"after {layout.num_units} elsewhere; a stream must give the same batches on every rank."
                )

    def close(self, request: CloseJob) -> Future[JobClosed]:
        """A rank is through with a job. Its parts are looked at once more, in the background: a store may be slow."""
        job = self._job(request.job)
        with self._lock:
            job.closed_by.add(request.sender.rank)
        answer = pending()

        def verify() -> None:
            try:
                verify_complete(request.job, job)
                remove_fragments(job.directory)
            except GPUOrchError as error:
                resolve([answer], error)
            except Exception as error:
                log.exception("%s cannot be checked", job.directory)
                resolve([answer], ControlPlaneError(f"{job.directory}: {type(error).__name__}: {error}"))
            else:
                resolve([answer], JobClosed(seconds=time.monotonic() - job.started))

        self._background("gpuorch-close", verify)
        return answer

    def progress(self, number: int) -> JobProgress:
        """How far a job is."""
        job = self._job(number)
        return JobProgress(
            chunks_done=sum(queue.num_done for queue in job.queues),
            units_by_loader=[done_units(queue) for queue in job.queues],
            chunks_computed=job.chunks_computed,
            chunks=sum(queue.num_chunks or 0 for queue in job.queues),
            samples_done=job.samples_done,
            restarts=sum(self._replicas.generations.values()),
        )

    def _record_quarantine(self, number: int, loader: int, already: int) -> None:
        job = self.jobs[number]
        for entry in job.queues[loader].quarantined[already:]:
            record_quarantine(job.directory, loader, entry.start, entry.stop, entry.reason)
            self._on_event(
                "quarantine", job=number, loader=loader, start=entry.start, stop=entry.stop, why=entry.reason
            )


def _end_shard(job: Job, queue: ShardLeaseQueue, request: EndOfStream) -> None:
    """Record where a shard ends; durably, unless it could not be read: a later run tries that again.

    Raises:
        ControlPlaneError: It has ended elsewhere before.
    """
    shard = request.shard
    if shard is None or not 0 <= shard < queue.num_shards:
        raise ControlPlaneError(
            f"dataloader {request.loader} has {queue.num_shards} shards; rank {request.sender.rank} names {shard}."
        )
    known = queue.ends.get(shard)
    if known is None and request.is_readable:
        PartJournal(loader_directory(job.directory, request.loader)).record_shard_end(shard, request.units)
    known = queue.end_shard(shard, request.units, request.is_readable)
    if known != request.units:
        raise ControlPlaneError(
            f"shard {shard} of dataloader {request.loader} ended after {request.units} batches on rank "
            f"{request.sender.rank} and after {known} elsewhere; a shard must give the same samples each time it is read."
        )
