"""From the output of a batch that is done to a durable part: gathered by chunk, written in the background, reported."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning_gpuorch.control.error_record import note_failure
from lightning_gpuorch.control.heartbeat import Phase, current_heartbeat, phase
from lightning_gpuorch.control.messages.leases import ChunkDone, SamplesKept
from lightning_gpuorch.errors import TooManyErroredSamplesError
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.loading.collector import ChunkCollector, NoCollector
from lightning_gpuorch.predictions.loading.tickets import Ticket
from lightning_gpuorch.predictions.storage.fragments import FragmentReader, FragmentWriter, Numbering
from lightning_gpuorch.predictions.storage.journal import OutputFormat, loader_directory
from lightning_gpuorch.predictions.storage.layout import LoaderLayout, StoredBatch
from lightning_gpuorch.predictions.storage.parts import PartStore
from lightning_gpuorch.predictions.storage.writer import PartWriter
from lightning_gpuorch.telemetry.current import emit
from lightning_gpuorch.worker.dynamic_steps import DynamicSteps
from lightning_gpuorch.worker.leased_work import JobContext
from lightning_gpuorch.worker.step_context import StepContext

log = logging.getLogger(__name__)


class CommitPipeline:
    """What one rank makes durable of a predict call. Ranks that are not the leader of their group write nothing.

    Args:
        job: The predict call.
        context: The rank.
        directory: Of the predict call's results.
        output_format: Of its parts.
        dynamic: With dynamic batching, what is told that the rank has to leave.
        digest_of: Digest of what was read of a dataloader's chunk, if it is known; asked for once.
        index_of: Dataset index of a unit that is a sample.
        host_cost: Bytes that samples of a dataloader take before they are stored, and seconds to compute them, where the
            time that a chunk was open does not tell.

    Attributes:
        asked_to_leave: Whether this rank was asked to leave before the work is done.
    """

    def __init__(
        self,
        job: JobContext,
        context: StepContext,
        directory: Location,
        output_format: OutputFormat,
        dynamic: DynamicSteps | None,
        digest_of: Callable[[int, int], str | None],
        index_of: Callable[[int, int], Any],
        host_cost: Callable[[int, int], tuple[int, float]],
    ):
        self._job, self._context = job, context
        self._directory, self._output_format = directory, output_format
        self._dynamic, self._digest_of, self._host_cost = dynamic, digest_of, host_cost
        self._index_of = index_of
        self._records_errors = context.config.on_error == "record"
        self.asked_to_leave = False
        self._chunks_began: dict[tuple[int, int], float] = {}
        self._given_up: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
        """Units without a prediction in chunks that are not durable, and why."""
        self._num_errored = 0
        """Samples given up in chunks that are durable, by all ranks."""
        writes = context.world.topology.is_leader
        self._fragments = [
            self._fragments_of(index, layout) if writes else None for index, layout in enumerate(job.layouts)
        ]
        self._writer = self._make_writer() if writes else None
        self.collectors: list[ChunkCollector | NoCollector] = [
            ChunkCollector(functools.partial(self._commit, index), fragments) if writes else NoCollector()
            for index, fragments in enumerate(self._fragments)
        ]
        """By dataloader."""

    @property
    def is_open(self) -> bool:
        """Whether this rank writes, and has not been closed."""
        return self._writer is not None

    def begin_step(self, ticket: Ticket) -> None:
        """Note when the first step of a chunk begins."""
        if self._writer is not None:
            self._chunks_began.setdefault((ticket.loader, ticket.chunk), time.monotonic())

    def keep(self, ticket: Ticket, output: Any, lost: frozenset[int]) -> None:
        """Take the output of a batch that is done, on the host."""
        self.collectors[ticket.loader].add(ticket, output, lost)

    def give_up(self, loader: int, reasons: Mapping[int, str]) -> None:
        """Note units that will have no prediction; the coordinator is told with their chunk.

        Args:
            loader: Their dataloader.
            reasons: Why, by unit.

        Raises:
            TooManyErroredSamplesError: There are more of them than the configuration allows.
        """
        layout = self._job.layouts[loader]
        for unit, reason in reasons.items():
            self._given_up.setdefault((loader, layout.chunk_of(unit)), []).append((unit, unit + 1, reason))
            log.warning("%s %s is given up: %s", layout.noun, layout.named([range(unit, unit + 1)]), reason)
        most = self._context.config.max_errored_samples
        num_errored = self._num_errored + sum(map(len, list(self._given_up.values())))
        if most is not None and num_errored > most:
            error = TooManyErroredSamplesError(
                f"{num_errored} samples failed, and max_errored_samples={most}; the last one: {list(reasons.values())[-1]}. "
                f"What is computed is kept in {self._directory}."
            )
            note_failure(error, "", is_final=True)
            raise error

    def reasons(self, loader: int) -> dict[int, str]:
        """Why units were given up, by unit, of chunks that are not durable."""
        given_up = [units for (of, _), units in list(self._given_up.items()) if of == loader]
        return {unit: reason for units in given_up for unit, _, reason in units}

    def flush(self) -> None:
        """Wait until all whole chunks are durable.

        Raises:
            PredictionStorageError: Something could not be written.
        """
        if self._writer is not None:
            with phase(Phase.COMMIT, then=Phase.RUN):
                self._writer.flush()

    def close(self) -> None:
        """Write what there is, and stop; safe to call again."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
            for collector in self.collectors:
                collector.keep()

    def _make_writer(self) -> PartWriter:
        stores = [
            PartStore(loader_directory(self._directory, index), output_format=self._output_format, unit=layout.unit)
            for index, layout in enumerate(self._job.layouts)
        ]
        heartbeat = current_heartbeat()
        return PartWriter(
            stores,
            max_pending_bytes=self._context.config.max_pending_bytes,
            on_committed=self._on_committed,
            around_commit=contextlib.nullcontext if heartbeat is None else heartbeat.committing,
            on_full=self._make_room,
        )

    def _fragments_of(self, loader: int, layout: LoaderLayout) -> tuple[FragmentWriter, FragmentReader]:
        """What keeps chunks that are not whole yet."""
        numbering: Numbering = "batches" if layout.unit == "batch" else "samples"
        if self._dynamic is not None:
            numbering = "window samples"
        on_kept = functools.partial(self._on_kept, loader)
        around_write = functools.partial(phase, Phase.COMMIT, then=Phase.RUN)
        writer = FragmentWriter(self._directory, loader, numbering, on_kept, around_write)
        return writer, FragmentReader(self._directory, loader, numbering)

    def _make_room(self) -> None:
        for fragments in self._fragments:
            if fragments is not None:
                fragments[0].give_up()

    def _on_kept(self, loader: int, samples: int) -> None:
        if self._writer is None:
            return  # it leaves already
        request = SamplesKept(sender=self._job.sender, job=self._job.number, loader=loader, samples=samples)
        self.asked_to_leave |= self._job.ask(request).leave
        if self._dynamic is not None:
            self._dynamic.asked_to_leave = self.asked_to_leave

    def _commit(self, loader: int, chunk: int, batches: list[StoredBatch]) -> None:
        assert self._writer is not None
        sender = self._job.sender
        run = self._context.world.run_id
        if self._records_errors:
            for batch in batches:
                batch.num_lost = 0  # nothing of it is lacking: what failed has a row of its own
            batches = sorted([*batches, *self._error_rows(loader, chunk)], key=lambda batch: batch.first_unit)
        metadata: dict[str, Any] = {"run": run, "replica": sender.replica, "generation": sender.generation}
        read = self._digest_of(loader, chunk)
        if read is not None:
            metadata["read"] = read
        with phase(Phase.COMMIT, then=Phase.RUN):  # it waits where the disk is slower than the model
            self._writer.put(loader, chunk, batches, metadata)

    def _error_rows(self, loader: int, chunk: int) -> Iterator[StoredBatch]:
        """What stands in the place of predictions that the samples of a chunk do not have."""
        is_sample = self._job.layouts[loader].unit == "sample"
        for unit, _, reason in sorted(self._given_up.get((loader, chunk), [])):
            indices = [self._index_of(loader, unit)] if is_sample else None
            yield StoredBatch(unit, indices, 1, None, error=reason)

    def _on_committed(self, loader: int, chunk: int, won: bool, samples: int, num_bytes: int) -> None:
        began = self._chunks_began.pop((loader, chunk), None)
        host_bytes, seconds = self._host_cost(loader, samples)
        if not seconds and began is not None:
            seconds = time.monotonic() - began
        took = {} if began is None else {"seconds": round(time.monotonic() - began, 6)}
        emit("chunk", job=self._job.number, loader=loader, chunk=chunk, samples=samples, won=won, **took)
        fragments = self._fragments[loader]
        if fragments is not None:
            fragments[0].on_durable(chunk)
        given_up = tuple(self._given_up.pop((loader, chunk), []))
        recorded, quarantined = (len(given_up), ()) if self._records_errors else (0, given_up)
        request = ChunkDone(
            sender=self._job.sender, job=self._job.number, loader=loader, chunk=chunk, won=won, samples=samples,
            quarantined=quarantined, recorded=recorded, num_bytes=max(num_bytes, host_bytes), seconds=seconds,
        )  # fmt: skip
        self._num_errored = max(self._num_errored, self._job.ask(request).num_errored)
