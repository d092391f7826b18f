"""The head of a job: the one place that knows the ranks, the leases, the collectives and what was lost.

It lives in the supervisor; in the process itself when there is only one; in rank 0 when another launcher made the
processes. Every request is idempotent, so a rank may repeat it after a broken connection.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lightning_gpuorch.control.collectives import CollectiveLedger
from lightning_gpuorch.control.input_ledger import REMEDY, InputLedger
from lightning_gpuorch.control.jobs import Job, verify_complete
from lightning_gpuorch.control.leases import FENCED, LeaseQueue, Owner, RaisedException
from lightning_gpuorch.control.node_registry import NodeDesk
from lightning_gpuorch.control.transport import Message, answered, refused
from lightning_gpuorch.control.votes import RecoveryLedger
from lightning_gpuorch.errors import (
    ConfigurationError,
    ControlPlaneError,
    CorruptPartError,
    GPUOrchError,
    InputMismatchError,
    MissingPredictionsError,
)
from lightning_gpuorch.predictions.storage.journal import PartJournal, loader_directory, remove_fragments
from lightning_gpuorch.predictions.storage.manifest import (
    Life,
    Manifest,
    compare,
    open_or_create,
    record_mismatch,
    record_quarantine,
    set_num_units,
)

log = logging.getLogger(__name__)


class Goodbyes:
    """Ranks that have left in good order."""

    def __init__(self) -> None:
        self.ranks: set[int] = set()
        self._changed = threading.Condition()

    def add(self, rank: int) -> None:
        """Record that a rank has left."""
        with self._changed:
            self.ranks.add(rank)
            self._changed.notify_all()

    def wait_for(self, ranks: set[int], timeout_seconds: float) -> bool:
        """Wait until all of ``ranks`` have left; False if the time runs out first."""
        with self._changed:
            return self._changed.wait_for(lambda: ranks <= self.ranks, timeout_seconds)


class Head:
    """Answers the requests of all ranks.

    Args:
        world_size: Ranks of the job.
        max_chunk_failures: Deaths in one chunk before a sample of it is given up.
        on_event: Told of what happened, as ``on_event(kind, **fields)``; must not raise.
        nodes: Options of :class:`~lightning_gpuorch.control.node_registry.NodeDesk`, where several nodes take part.
    """

    def __init__(
        self,
        world_size: int,
        max_chunk_failures: int = 3,
        on_event: Callable[..., None] = lambda kind, **fields: None,
        **nodes: Any,
    ):
        self.world_size = world_size
        self.nodes = NodeDesk(self, **nodes)
        self.tensor_parallel_size: int | None = None
        self.gang = False
        self.ledger = CollectiveLedger(range(world_size))
        self.recoveries = RecoveryLedger()
        self.jobs: dict[int, Job] = {}
        self.reports: list[dict[str, Any]] = []
        self.generations: dict[int, int] = {}
        self.goodbyes = Goodbyes()
        self.chunks_by_replica: dict[int, int] = {}
        self._retired: set[int] = set()
        self._let_go: set[Owner] = set()
        self._evaluating: set[int] = set()
        self._max_chunk_failures = max_chunk_failures
        self._on_event = on_event
        self._published: dict[str, Any] = {}
        self._agreed: dict[str, tuple[str, int]] = {}
        self._lookups: dict[str, list[Future[Message]]] = {}
        self._draining = False
        self._opening = threading.Lock()
        self._lock = threading.RLock()

    def handle(self, request: Message) -> Future[Message]:
        """Take one request of a rank.

        Args:
            request: Header with ``op`` and its fields.

        Returns:
            Resolved with the answer, now or later. Errors travel inside the answer.
        """
        name = request.header.get("op")
        operation = getattr(self, f"_op_{name}", None) or getattr(self.nodes, f"op_{name}", None)
        if operation is None:
            return refused(ControlPlaneError(f"unknown request {request.header.get('op')!r}; versions differ?"))
        return self._carry_out(operation, request)

    @staticmethod
    def _carry_out(operation: Callable[[Message], Any], request: Message) -> Future[Message]:
        try:
            answer = operation(request)
        except GPUOrchError as error:
            return refused(error)
        except Exception as error:
            log.exception("request %r failed", request.header.get("op"))
            return refused(ControlPlaneError(f"{request.header.get('op')}: {type(error).__name__}: {error}"))
        return answer if isinstance(answer, Future) else answered(answer or {})

    @property
    def needs_every_replica(self) -> bool:
        """Whether some rank evaluates: its share is its own, and nobody can take it over."""
        return bool(self._evaluating)

    @property
    def retired(self) -> frozenset[int]:
        """Replicas that were given up."""
        return frozenset(self._retired)

    @property
    def draining(self) -> bool:
        """Whether no more work is handed out."""
        return self._draining

    @property
    def finished(self) -> bool:
        """Whether every opened job is complete, as far as the queues know."""
        with self._lock:
            return bool(self.jobs) and all(job.finished for job in self.jobs.values())

    @property
    def kept_directory(self) -> Path | None:
        """Results somebody wants to keep, the first of them; the run's records go beside them."""
        with self._lock:
            return next((job.directory for _, job in sorted(self.jobs.items()) if not job.ephemeral), None)

    # What the supervisors decide

    def set_world_size(self, world_size: int) -> None:
        """All nodes have joined: so many ranks take part."""
        with self._lock:
            self.world_size = world_size
            self.ledger = CollectiveLedger(range(world_size))

    def expire_leases(self, replica: int) -> int:
        """Take back the leases of a replica that is not heard of; it may come back and go on.

        Returns:
            Number of chunks that went back.
        """
        with self._lock:
            owner = (replica, self.generations.get(replica, 0))
            return sum(len(queue.release(owner)) for job in self.jobs.values() for queue in job.queues)

    def let_go(self, replica: int, generation: int) -> None:
        """Hand a replica no more work: it finishes what it holds and leaves."""
        with self._lock:
            self._let_go.add((replica, generation))
            for job in self.jobs.values():
                for queue in job.queues:
                    queue.let_go((replica, generation))

    def deaths_in(self, chunks: dict[tuple[int, int], int], positions: dict[tuple[int, int], tuple[int, int]]) -> int:
        """Deaths so far in units of chunks, by (job, loader); the most of any unit."""
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

    def end_generation(
        self,
        replica: int,
        generation: int,
        blamed: dict[tuple[int, int], int] | None = None,
        positions: dict[tuple[int, int], tuple[int, int]] | None = None,
        exception: RaisedException | None = None,
    ) -> int:
        """Take back the leases of a generation that is over; every path that ends one passes here. Idempotent.

        Args:
            replica: The replica.
            generation: Which of its starts.
            blamed: Chunk being computed at death, by (job, loader).
            positions: Units of the step it was in, by (job, loader).
            exception: What the script raised there, if that is what ended it.

        Returns:
            Number of chunks that went back.
        """
        owner: Owner = (replica, generation)
        self.recoveries.end_generation(replica, generation)
        back = 0
        with self._lock:
            for number, job in self.jobs.items():
                for loader, queue in enumerate(job.queues):
                    key = (number, loader)
                    before = len(queue.quarantined)
                    back += len(queue.revoke(owner, (blamed or {}).get(key), (positions or {}).get(key), exception))
                    self._record_quarantine(number, loader, before)
            for job in self.jobs.values():
                job.opened_by.difference_update(self._ranks_of(replica))
                for kept in [kept for kept in job.samples_kept if kept[1] == owner]:
                    del job.samples_kept[kept]
        return back

    def retire(self, replica: int) -> None:
        """Give a replica up: its work goes back, it gets no more, and collectives no longer wait for it."""
        with self._lock:
            self._retired.add(replica)
        self.end_generation(replica, self.generations.get(replica, 0))
        self.ledger.retire(self._ranks_of(replica))

    def drain(self) -> None:
        """Hand out no more work."""
        with self._lock:
            self._draining = True
            for job in self.jobs.values():
                for queue in job.queues:
                    queue.drain()

    def unfinished_jobs_of(self, rank: int) -> list[int]:
        """Jobs a rank has opened and not closed: it may not leave yet."""
        with self._lock:
            return [n for n, job in self.jobs.items() if rank in job.opened_by and rank not in job.closed_by]

    def verify(self) -> None:
        """Check that every opened job is complete, by the part files themselves.

        Raises:
            MissingPredictionsError: Units are missing; they are named.
        """
        for number, job in sorted(self.jobs.items()):
            verify_complete(number, job)

    # What ranks ask

    def _op_hello(self, request: Message) -> dict[str, Any]:
        size = int(request.header["tensor_parallel_size"])
        with self._lock:
            if self.tensor_parallel_size is None:
                if self.world_size % size:
                    raise ConfigurationError(
                        f"{self.world_size} devices cannot be cut into replicas of tensor_parallel_size={size}."
                    )
                self.nodes.check_replicas_within_nodes(size)
                self.tensor_parallel_size = size
            elif size != self.tensor_parallel_size:
                raise ConfigurationError(
                    f"rank {request.header['rank']} uses tensor_parallel_size={size}, the others use "
                    f"{self.tensor_parallel_size}; all ranks must run the same script with the same options."
                )
            replica, generation = request.header["rank"] // size, int(request.header["generation"])
            self.generations[replica] = max(generation, self.generations.get(replica, 0))
        return {"draining": self._draining}

    def _op_goodbye(self, request: Message) -> dict[str, Any]:
        self.goodbyes.add(int(request.header["rank"]))
        return {}

    def _op_drain(self, request: Message) -> dict[str, Any]:
        self.drain()
        return {}

    def _op_stage(self, request: Message) -> dict[str, Any]:
        """A stage whose state is in memory: training restarts as a whole, evaluation needs every share."""
        self.gang = self.gang or bool(request.header.get("gang"))
        with self._lock:
            change = self._evaluating.add if request.header.get("every_replica") else self._evaluating.discard
            change(int(request.header["rank"]))
        return {}

    def _op_publish(self, request: Message) -> dict[str, Any]:
        key, value = request.header["key"], request.header["value"]
        with self._lock:
            self._published[key] = value
            for waiter in self._lookups.pop(key, []):
                waiter.set_result(Message({"value": value}))
        return {}

    def _op_lookup(self, request: Message) -> Future[Message]:
        key = request.header["key"]
        with self._lock:
            if key in self._published:
                return answered({"value": self._published[key]})
            waiter: Future[Message] = Future()
            self._lookups.setdefault(key, []).append(waiter)
            return waiter

    def _op_gather(self, request: Message) -> Future[Message]:
        header = request.header
        return self.ledger.contribute(header["number"], header["kind"], header["rank"], request.payload)

    def _op_gather_missing(self, request: Message) -> dict[str, Any]:
        return {"missing": self.ledger.missing(request.header["number"])}

    def _op_recovery(self, request: Message) -> Future[Message]:
        return self.recoveries.handle(request.header)

    def _op_open(self, request: Message) -> Future[Message]:
        """Begin a job, or take part in it. Checking what is there already may take long: a thread does it."""
        answer: Future[Message] = Future()

        def open_job() -> None:
            answer.set_result(self._carry_out(self._open, request).result())

        threading.Thread(target=open_job, name="gpuorch-open", daemon=True).start()
        return answer

    def _open(self, request: Message) -> dict[str, Any]:
        header = request.header
        number, wanted = int(header["job"]), Manifest.from_dict(header["manifest"])
        with self._opening:  # not self._lock, which all other requests need meanwhile
            job = self.jobs.get(number)
            if job is None:
                job = self._create_job(number, Path(header["directory"]), wanted, bool(header["ephemeral"]))
            else:
                _refuse_other_input(job, wanted, header)
        with self._lock:
            job.opened_by.add(int(header["rank"]))
            return {
                "directory": str(job.directory),
                "manifest": job.manifest.to_dict(),
                "done": [queue.num_done for queue in job.queues],
                "resumed": [len(queue.resumed) for queue in job.queues],
                "finished": job.finished,
            }

    def _create_job(self, number: int, directory: Path, wanted: Manifest, ephemeral: bool) -> Job:
        manifest = open_or_create(directory, wanted)
        stores = [PartJournal(loader_directory(directory, index)) for index in range(len(manifest.loaders))]
        for layout, store in zip(manifest.loaders, stores, strict=True):
            store.sweep_temporaries()
            for damage in store.set_damaged_aside():
                log.warning("%s It is set aside as *.damaged, and its chunk is computed again.", damage)
            again = store.discard_incomplete(layout)
            if again:
                log.warning("chunks %s lack samples that an earlier run gave up; they are tried again", again)
        with self._lock:
            queues = [
                LeaseQueue(
                    layout.num_chunks if layout.num_units is not None else None,
                    layout.chunk_size,
                    store.done(),
                    self._max_chunk_failures,
                    store.is_durable,
                )
                for layout, store in zip(manifest.loaders, stores, strict=True)
            ]
            for queue in queues:
                if self._draining:
                    queue.drain()
                for owner in self._let_go:
                    queue.let_go(owner)
            inputs = [InputLedger(loader, _digest_of_part(store)) for loader, store in enumerate(stores)]
            job = self.jobs[number] = Job(directory, manifest, queues, ephemeral, inputs)
        self._on_event(
            "job",
            job=number,
            directory=str(directory),
            resumed_chunks=job.resumed_chunks,
            loaders=[layout.to_dict() for layout in manifest.loaders],
            tensor_parallel_size=self.tensor_parallel_size or 1,
        )
        return job

    def _queue(self, request: Message) -> LeaseQueue:
        return self.jobs[int(request.header["job"])].queues[int(request.header["loader"])]

    def _op_next(self, request: Message) -> Future[Message]:
        header = request.header
        if int(header["replica"]) in self._retired:  # its node was given up, and is back
            return answered(FENCED)
        asked = self._queue(request).next(
            _owner(request),
            int(header["sequence"]),
            bool(header["block"]),
            float(header.get("seconds_per_sample", 0.0)),
        )
        answer: Future[Message] = Future()
        asked.add_done_callback(lambda decided: answer.set_result(Message(decided.result())))
        return answer

    def _op_done(self, request: Message) -> dict[str, Any]:
        header = request.header
        job = self.jobs[int(header["job"])]
        self._queue(request).report_done(int(header["chunk"]), bool(header["won"]))
        kept = int(header["loader"]), _owner(request)
        with self._lock:
            job.samples_kept[kept] = max(0, job.samples_kept[kept] - int(header.get("samples", 0)))
        if header["won"]:
            replica = int(header["replica"])
            with self._lock:
                job.samples_done += int(header.get("samples", 0))
                self.chunks_by_replica[replica] = self.chunks_by_replica.get(replica, 0) + 1
        for start, stop, reason in header.get("quarantined", ()):
            with self._lock:
                queue = self._queue(request)
                before = len(queue.quarantined)
                queue.quarantine(start, stop, reason)
                self._record_quarantine(int(header["job"]), int(header["loader"]), before)
        return {"num_errored": sum(entry.stop - entry.start for queue in job.queues for entry in queue.quarantined)}

    def _op_kept(self, request: Message) -> dict[str, Any]:
        """Samples of chunks that are not whole yet are computed, and kept: a good moment to leave."""
        job, owner = self.jobs[int(request.header["job"])], _owner(request)
        with self._lock:
            job.samples_kept[int(request.header["loader"]), owner] += int(request.header["samples"])
        return {"leave": self._queue(request).must_leave(owner)}

    def _op_read(self, request: Message) -> dict[str, Any]:
        """What a rank has read of a stream."""
        header = request.header
        job = self.jobs[int(header["job"])]
        with self._lock:
            ledger = job.inputs[int(header["loader"])]
            try:
                for chunk, digest in header["read"]:
                    ledger.add(int(chunk), str(digest), int(header["rank"]))
            except InputMismatchError as error:
                if job.mismatch is None:
                    job.mismatch = error
                    record_mismatch(job.directory, str(error))
                raise
        return {}

    def _op_agree(self, request: Message) -> dict[str, Any]:
        """A value that must be the same on all ranks; the first one that is told counts."""
        header = request.header
        with self._lock:
            value, rank = self._agreed.setdefault(header["key"], (header["value"], header["rank"]))
        if value != header["value"]:
            raise InputMismatchError(
                f"{header['what']} of a dataloader differs between rank {rank} and rank {header['rank']}. {REMEDY}"
            )
        return {}

    def _op_end_of_stream(self, request: Message) -> dict[str, Any]:
        number, loader, units = (int(request.header[key]) for key in ("job", "loader", "units"))
        with self._lock:
            job = self.jobs[number]
            layout = job.manifest.loaders[loader]
            if layout.num_units is None:
                job.manifest = set_num_units(job.directory, loader, units)
                job.queues[loader].set_num_chunks(job.manifest.loaders[loader].num_chunks)
            elif layout.num_units != units:
                raise ControlPlaneError(
                    f"the stream of dataloader {loader} ended after {units} batches on rank {request.header['rank']} "
                    f"and after {layout.num_units} elsewhere; a stream must give the same batches on every rank."
                )
        return {}

    def _op_close(self, request: Message) -> dict[str, Any]:
        number = int(request.header["job"])
        with self._lock:
            job = self.jobs[number]
            job.closed_by.add(int(request.header["rank"]))
        verify_complete(number, job)
        remove_fragments(job.directory)
        return {"resumed_chunks": job.resumed_chunks, "seconds": time.monotonic() - job.started}

    def _op_progress(self, request: Message) -> dict[str, Any]:
        job = self.jobs.get(int(request.header["job"]))
        if job is None:
            return {"known": False}
        return {
            "known": True,
            "chunks_done": sum(queue.num_done for queue in job.queues),
            "chunks_computed": job.chunks_computed,
            "chunks": sum(queue.num_chunks or 0 for queue in job.queues),
            "samples_done": job.samples_done,
            "restarts": sum(self.generations.values()),
        }

    def _op_report(self, request: Message) -> dict[str, Any]:
        self.reports.append(dict(request.header))
        self._on_event(str(request.header["kind"]), **{k: v for k, v in request.header.items() if k not in _ENVELOPE})
        return {}

    def _record_quarantine(self, number: int, loader: int, already: int) -> None:
        job = self.jobs[number]
        for entry in job.queues[loader].quarantined[already:]:
            record_quarantine(job.directory, loader, entry.start, entry.stop, entry.reason)
            self._on_event(
                "quarantine", job=number, loader=loader, start=entry.start, stop=entry.stop, why=entry.reason
            )

    def _ranks_of(self, replica: int) -> Iterable[int]:
        size = self.tensor_parallel_size or 1
        return range(replica * size, (replica + 1) * size)


def _refuse_other_input(job: Job, wanted: Manifest, header: Mapping[str, Any]) -> None:
    """All ranks must have the same model and the same data as the one that opened the job.

    Raises:
        InputMismatchError: A rank has not; what differs is named, with both ranks.
    """
    first, rank = min(job.opened_by, default=0), int(header["rank"])
    life: Life = "later" if int(header["generation"]) else "first"
    differences = compare(job.manifest, wanted, f"on rank {first}", f"on rank {rank}", life)
    if differences:
        raise InputMismatchError(
            f"rank {rank} does not have the same work as rank {first}:\n  "
            + "\n  ".join(differences)
            + "\nEvery rank must be given the whole of the data in the same order: remove a sampler or a dataset that "
            "splits it by rank (gpuorch shares out the work itself), and seed what draws at random, with a generator of its "
            "own or seed_everything."
        )


def _digest_of_part(store: PartJournal) -> Callable[[int], str | None]:
    def read(chunk: int) -> str | None:
        if not store.is_durable(chunk):
            return None
        try:
            digest = store.header(chunk).metadata.get("read")
        except (CorruptPartError, MissingPredictionsError) as error:
            log.debug("chunk %d tells nothing of what was read: %s", chunk, error)
            return None
        return digest if isinstance(digest, str) else None

    return read


def _owner(request: Message) -> Owner:
    return int(request.header["replica"]), int(request.header["generation"])


_ENVELOPE = frozenset({"op", "kind", "id"})
