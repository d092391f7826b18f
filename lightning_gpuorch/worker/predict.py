"""One predict call on one rank, step by step: from leased chunks to durable parts.

Loaders lease chunks, a step may be wrapped (OOM halving), collectors gather a chunk's outputs, and a writer makes them
durable in the background.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import torch

from lightning_gpuorch._version import __version__
from lightning_gpuorch.control.bootstrap import leave_resumable
from lightning_gpuorch.control.error_record import PREDICT_STEP, note_failure
from lightning_gpuorch.control.heartbeat import Phase, current_heartbeat, phase
from lightning_gpuorch.control.messages.base import AnswerT, Request, Sender
from lightning_gpuorch.control.messages.leases import ChunkDone, CloseJob, GetProgress, OpenJob, SamplesKept
from lightning_gpuorch.control.messages.ranks import DrainJob
from lightning_gpuorch.devices.memory.transfer import HostCopy
from lightning_gpuorch.errors import TooManyErroredSamplesError
from lightning_gpuorch.paths import location, options_of
from lightning_gpuorch.predictions.loading.collector import ChunkCollector, NoCollector
from lightning_gpuorch.predictions.loading.describe import Source, default_chunk_batches, describe
from lightning_gpuorch.predictions.loading.loader import LeasedLoader
from lightning_gpuorch.predictions.loading.tickets import Ticket
from lightning_gpuorch.predictions.loading.windowed_loader import WindowedLoader
from lightning_gpuorch.predictions.loading.work import NoWork
from lightning_gpuorch.predictions.reading.reader import results
from lightning_gpuorch.predictions.samples import NOT_KEPT
from lightning_gpuorch.predictions.samples.tensors import to_host
from lightning_gpuorch.predictions.storage.fragments import FragmentReader, FragmentWriter
from lightning_gpuorch.predictions.storage.journal import loader_directory
from lightning_gpuorch.predictions.storage.layout import LoaderLayout, StoredBatch
from lightning_gpuorch.predictions.storage.manifest import Manifest
from lightning_gpuorch.predictions.storage.parts import PartStore
from lightning_gpuorch.predictions.storage.writer import PartWriter, size_bytes
from lightning_gpuorch.telemetry.current import emit
from lightning_gpuorch.worker.batches_in_flight import BatchesInFlight
from lightning_gpuorch.worker.batching.dynamic import DynamicBatcher
from lightning_gpuorch.worker.dynamic_steps import DynamicSteps
from lightning_gpuorch.worker.leased_work import FOREVER_SECONDS, DrainOnSignal, ReplicaQueue, ReplicaSink, await_group
from lightning_gpuorch.worker.oom.detection import freeze_objects
from lightning_gpuorch.worker.step_context import StepContext, StepWrapper
from lightning_gpuorch.worker.surviving_steps import SurvivingSteps

log = logging.getLogger(__name__)


_LOOK_SECONDS = 0.5


class PredictionJob:
    """One predict call on one rank."""

    def __init__(
        self,
        runtime: StepContext,
        loaders: Sequence[Any],
        default_root: str | os.PathLike[str],
        limits: Sequence[int | None],
        model_fingerprint: str | None,
        keep_outputs: bool,
    ):
        world = runtime.world
        self._runtime, self._world = runtime, world
        self.number = world.next_job()
        sources = [describe(loader, limit) for loader, limit in zip(loaders, limits, strict=True)]
        halves = runtime.config.enable_oom_halving and SurvivingSteps.possible(runtime)
        self._surviving_steps = SurvivingSteps(runtime) if halves else None
        dynamic = self._dynamic = DynamicSteps(runtime) if runtime.config.enable_dynamic_batching else None
        batchers = [None if dynamic is None else dynamic.batcher(source) for source in sources]
        chunk, replicas = runtime.config.chunk_size, world.topology.num_replicas
        windows = dynamic is not None
        wanted = Manifest(
            loaders=[
                source.layout(
                    default_chunk_batches(source.num_batches, replicas, windows=windows) if chunk == "auto" else chunk
                )
                for source in sources
            ],
            keep_outputs=keep_outputs,
            model_fingerprint=model_fingerprint,
            versions={"lightning_gpuorch": __version__, "torch": torch.__version__},
        )
        directory, ephemeral = world.job_directory(runtime.output_dir, default_root, runtime.config.storage_options)
        for index, source in enumerate(sources):
            source.freeze(loader_directory(directory, index))
        request = OpenJob(
            sender=self.sender,
            job=self.number,
            directory=str(directory),
            storage_options=options_of(directory),
            ephemeral=ephemeral,
            manifest=wanted.to_dict(),
        )
        with phase(Phase.WAIT, then=Phase.STARTING):  # what is there already is checked first, however much it is
            opened = self.ask(request, timeout_seconds=FOREVER_SECONDS)
        self.directory = location(opened.directory, "directory", options_of(directory))
        self.ephemeral = ephemeral
        self.finished_before = opened.finished
        self.resumed_chunks = opened.resumed_chunks
        manifest = Manifest.from_dict(opened.manifest)
        self._layouts = manifest.loaders
        for index, (source, layout) in enumerate(zip(sources, manifest.loaders, strict=True)):
            source.thaw(loader_directory(self.directory, index), layout)
        self._keeps_outputs = manifest.keep_outputs
        keeps = self._host_copy if world.topology.is_leader else None
        self.batches_in_flight = BatchesInFlight(keeps, self._keep)
        self._chunks_began: dict[tuple[int, int], float] = {}
        self._observed_at: float | None = None
        self._looked_at, self._chunks_done = 0.0, [0] * len(sources)
        self._asked_ns = time.time_ns()
        self.samples = 0
        self.steps = 0
        self._group_asked = False
        """Whether all ranks of the group have asked for the batch after those that are done here."""
        self._ended: NoWork | None = None
        self._lost: set[int] = set()
        self._quarantined: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
        """What is given up of chunks that are not durable, and why."""
        self._num_errored = 0
        """Samples given up in chunks that are durable, by all ranks."""
        self.raises_errors = runtime.config.on_error == "raise"
        """Whether an error of a sample ends the job."""
        self._fragments = [self._fragments_of(index, layout) for index, layout in enumerate(manifest.loaders)]
        self._writer = self._make_writer(manifest.loaders) if world.topology.is_leader else None
        self._collectors = [
            ChunkCollector(functools.partial(self._commit, index), fragments) if self._writer else NoCollector()
            for index, fragments in enumerate(self._fragments)
        ]
        self._queues = [ReplicaQueue(self, index) for index in range(len(sources))]
        self.loaders = [
            self._make_loader(index, source, layout, batcher)
            for index, (source, layout, batcher) in enumerate(zip(sources, manifest.loaders, batchers, strict=True))
        ]
        self._drain_signal = DrainOnSignal(self._request_drain) if not world.supervised else None
        if world.topology.rank == 0:
            self._announce(manifest.loaders)
        if world.supervised:
            freeze_objects()  # letting go of memory after an error must not take seconds

    def _make_loader(
        self, index: int, source: Source, layout: LoaderLayout, batcher: DynamicBatcher | None
    ) -> LeasedLoader:
        topology = self._world.topology
        sink = ReplicaSink(self, self._world, index, self._collectors[index])
        leased = (
            source, layout, self._queues[index], sink, self.batches_in_flight, index, self._on_ended,
            not self.raises_errors,
        )  # fmt: skip
        if self._dynamic is None or batcher is None:
            return LeasedLoader(*leased)
        dynamic = self._dynamic
        return WindowedLoader(
            *leased,
            batcher=batcher,
            num_replicas=topology.num_replicas,
            should_leave=lambda: dynamic.leaves,
            overlaps=self._runtime.transfers is not None,
            single_rank=topology.tensor_parallel_size == 1,
        )

    def _announce(self, layouts: Sequence[LoaderLayout]) -> None:
        topology = self._world.topology
        batches = [loader.source.num_batches for loader in self.loaders]
        total = "a stream of" if None in batches else str(sum(b for b in batches if b is not None))
        log.info(
            "%s batches for %d x TP %d; results in %s%s",
            total,
            topology.num_replicas,
            topology.tensor_parallel_size,
            self.directory,
            f"; {self.resumed_chunks} chunks are already there" if self.resumed_chunks else "",
        )

    def batches(self, loader: int) -> Iterator[Any]:
        """The batches of a dataloader that this rank computes; one is done when the next is asked for.

        Each has to be given to :meth:`run_step` before that.
        """
        for batch in self.loaders[loader]:
            self._begin_blame(self.batches_in_flight.newest)
            yield batch
            self.end_batch()

    def progress(self) -> dict[str, Any]:
        """How far the whole job is: chunks, samples, restarts."""
        return msgspec.structs.asdict(self.ask(GetProgress(job=self.number)))

    def num_batches(self, loader: int) -> int:
        """Batches of a dataloader, as a single device would count; 0 of a stream whose end is not known."""
        return self.loaders[loader].layout.num_batches

    def batches_done(self) -> int | None:
        """Batches of the current dataloader that the job has done, looked up twice a second; None if that is not known."""
        loader, now = self.batches_in_flight.newest.loader, time.monotonic()
        layout = self.loaders[loader].layout
        if not layout.num_chunks:
            return None
        if now - self._looked_at > _LOOK_SECONDS:
            self._looked_at, self._chunks_done = now, self.progress()["done_by_loader"]
        share = self._chunks_done[loader] / layout.num_chunks
        return max(1, int(layout.num_batches * share))

    def lose(self, positions: Sequence[int], ticket: Ticket, reason: str) -> None:
        """Give up samples of the batch that is being computed; its output covers the others.

        Args:
            positions: Positions in the batch.
            ticket: The batch.
            reason: Why, for the report and the error at the end.
        """
        self._lost.update(positions)
        self.give_up(ticket.loader, dict.fromkeys(map(ticket.span.unit, positions), reason))

    def give_up(self, loader: int, reasons: Mapping[int, str]) -> None:
        """Note units that will have no prediction; the head is told with their chunk.

        Args:
            loader: Their dataloader.
            reasons: Why, by unit.

        Raises:
            TooManyErroredSamplesError: There are more of them than the configuration allows.
        """
        chunk_size = self._layouts[loader].chunk_size
        for unit, reason in reasons.items():
            self._quarantined.setdefault((loader, unit // chunk_size), []).append((unit, unit + 1, reason))
            log.warning("%s %d is given up: %s", self._layouts[loader].noun, unit, reason)
        most = self._runtime.config.max_errored_samples
        num_errored = self._num_errored + sum(map(len, list(self._quarantined.values())))
        if most is not None and num_errored > most:
            error = TooManyErroredSamplesError(
                f"{num_errored} samples failed, and max_errored_samples={most}; the last one: {list(reasons.values())[-1]}. "
                f"What is computed is kept in {self.directory}."
            )
            note_failure(error, "", is_final=True)
            raise error

    def run_step(self, call: Callable[[Any], Any], batch: Any) -> Any:
        """Compute the batch that was given out; its output is kept when callbacks are through with it.

        Args:
            call: Computes a batch.
            batch: The batch, on the device.

        Returns:
            The output, as ``call`` returned it.
        """
        in_flight = self.batches_in_flight.next_delivered()
        ticket = in_flight.ticket
        call = functools.partial(self._compute, call)
        step: Callable[[Any], Any] = functools.partial(self._runtime.compute_together, call)
        if self._dynamic is not None:
            step = self._dynamic.step(call, ticket)
        surviving = self._runtime.surviving_steps or self._surviving_steps
        for wrapper in (*reversed(self._runtime.step_wrappers), *([] if surviving is None else [surviving])):
            step = functools.partial(_wrapped, wrapper, step, ticket)
        self._lost.clear()
        began = time.perf_counter()
        if self._writer is not None:
            self._chunks_began.setdefault((ticket.loader, ticket.chunk), time.monotonic())
        telemetry = self._runtime.telemetry
        fetched_ns = (self._asked_ns, max(self._asked_ns, in_flight.delivered_ns))
        telemetry.begin_step(self.steps, ticket.chunk, fetched_ns)
        try:
            output = step(batch)
        except StopIteration as error:
            # Lightning's loop would take it for the end of the data and silently drop the rest.
            raise RuntimeError(f"the predict step raised StopIteration on batch {ticket.number}") from error
        except Exception as error:
            telemetry.fail_step(error)
            units = range(ticket.span.first_unit, ticket.span.first_unit + ticket.span.num_units)
            note_failure(error, PREDICT_STEP, loader=ticket.loader, units=units, is_final=self.raises_errors)
            if self._world.recovery is not None:
                self._world.recovery.abandon(error)
            raise
        except BaseException as error:
            telemetry.fail_step(error)
            raise
        telemetry.computed()
        self.steps += 1
        self.samples += ticket.size or 0
        self._observe(ticket, output, began)
        self.batches_in_flight.computed(in_flight, output, frozenset(self._lost))
        if self._collects_late:
            # The step before: on CUDA this one still computes, and in a group all ranks have asked for it by now.
            self.batches_in_flight.collect()
        telemetry.end_step(ticket.size or 0)
        calibration = self._runtime.calibration
        if calibration is not None and calibration.count(ticket.size or 0, time.perf_counter()):
            self._end_calibration()
        return output

    def _compute(self, call: Callable[[Any], Any], batch: Any) -> Any:
        self._group_asked = True  # its ranks have compared their input, or there is only this one
        return call(batch)

    def end_batch(self) -> None:
        """The loop asks for the next batch, or has ended: the one in hand is done."""
        self._asked_ns = time.time_ns()
        if not self.batches_in_flight.end_computed():
            return
        self._end_blame()
        self._group_asked = False
        if not self._collects_late:
            self.batches_in_flight.collect()

    @property
    def _collects_late(self) -> bool:
        """Whether a batch that is done is handed on when the next step is on its way."""
        return self._runtime.transfers is not None or self._world.topology.tensor_parallel_size > 1

    def collect(self) -> None:
        """Hand on what is done, as no step follows for now; in a group, once all ranks are through with their callbacks."""
        if self._world.topology.tensor_parallel_size > 1 and self.batches_in_flight.has_done:
            await_group(self, self._world)
        self.batches_in_flight.collect()

    def leave_batch(self) -> None:
        """The loop was left with a batch in hand, and in good order: the batch is not done, and nothing is its fault."""
        self.batches_in_flight.drop_computed()
        self._end_blame()

    def _begin_blame(self, ticket: Ticket) -> None:
        """A death is blamed on a batch from here until it is done, be it in the step or in a callback.

        Both are given the same batch again: where one always dies of it, that must end in isolation, not in restarts.
        """
        heartbeat, span = current_heartbeat(), ticket.span
        if heartbeat is not None:
            stop = span.first_unit + span.num_units
            heartbeat.begin_step(self.number, ticket.loader, ticket.chunk, span.first_unit, stop)

    @staticmethod
    def _end_blame() -> None:
        heartbeat = current_heartbeat()
        if heartbeat is not None:
            heartbeat.end_step()

    def _host_copy(self, output: Any) -> HostCopy:
        if not self._keeps_outputs:
            return HostCopy(NOT_KEPT)
        transfers = self._runtime.transfers
        return HostCopy(to_host(output)) if transfers is None else transfers.to_host(output)

    def _keep(self, ticket: Ticket, output: Any, lost: frozenset[int]) -> None:
        self._collectors[ticket.loader].add(ticket, output, lost)

    def _observe(self, ticket: Ticket, output: Any, began: float) -> None:
        """Tell what bounds windows.

        From step to step: on CUDA a step returns before it is computed. Before callbacks have changed the output: what they
        do may differ between the ranks of a group, which have to form the same windows.
        """
        loader = self.loaders[ticket.loader]
        if not isinstance(loader, WindowedLoader):
            return
        now = time.perf_counter()
        since = began if self._observed_at is None else self._observed_at
        self._observed_at = now
        num_samples, num_bytes = ticket.size or 0, size_bytes(output)
        loader.bounds.observe(num_samples=num_samples, num_bytes=num_bytes, seconds=now - since)

    def begin_waiting(self) -> None:
        """What passes until the next step is no work."""
        self._observed_at = None

    def _end_calibration(self) -> None:
        """Write the baseline, and end the script in good order: the rest of its data is of no interest.

        Raises:
            SystemExit: Always, with exit code 0.
        """
        calibration = self._runtime.calibration
        assert calibration is not None
        calibration.finish(self._runtime.measured_with())
        raise SystemExit(0)

    def finish(self) -> Any:
        """Make everything durable, wait for the others, and return all predictions.

        Returns:
            Every prediction of the job, in dataset order, read lazily; a list of such for several dataloaders.

        Raises:
            MissingPredictionsError: Samples are missing; they are named.
            UnreadableStreamError: A stream has raised an error.
            SystemExit: The job was asked to stop; the exit code says that it can be resumed.
        """
        with phase(Phase.COMMIT, then=Phase.OUTSIDE):
            self.end_batch()
            self.collect()
            self.close()
        for loader in self.loaders:
            if loader.failure is not None:
                raise loader.failure
        if self._ended in (NoWork.DRAIN, NoWork.FENCED):
            log.info("stopped on request; the same command goes on from here")
            leave_resumable()
        closed = self.ask(CloseJob(sender=self.sender, job=self.number))
        if self._runtime.calibration is not None:  # the data ended before the time
            self._end_calibration()
        if self._world.topology.rank == 0:
            self._summarise(closed.seconds)
        return results(self.directory)

    def flush(self) -> None:
        """Wait until the chunks of all batches that are done are durable, as far as they are whole.

        Raises:
            PredictionStorageError: Something could not be written.
        """
        self.collect()
        if self._writer is not None:
            with phase(Phase.COMMIT, then=Phase.RUN):
                self._writer.flush()

    def close(self) -> None:
        """Stop the writer after it has written what it has; safe to call again."""
        if self._world.supervised:
            gc.unfreeze()  # the script may drop this model and go on with another
        if self._drain_signal is not None:
            self._drain_signal.restore()
        if self._writer is not None:
            self._collect_at_last()
            writer, self._writer = self._writer, None
            writer.close()
            for collector in self._collectors:
                collector.keep()

    def _collect_at_last(self) -> None:
        """Hand on what was done before an error. The device may have failed; then it gives nothing any more."""
        if self._world.topology.tensor_parallel_size > 1 and not self._group_asked:
            return
        try:
            self.batches_in_flight.collect()
        except RuntimeError as error:
            log.warning("the output of the last batch cannot be read from the device; it is computed again: %s", error)

    def _summarise(self, seconds: float) -> None:
        if self.finished_before:
            log.info("nothing to do: all predictions are already in %s", self.directory)
        else:
            log.info("all predictions are in %s after %.1f s", self.directory, seconds)

    def _make_writer(self, layouts: Sequence[LoaderLayout]) -> PartWriter:
        stores = [PartStore(loader_directory(self.directory, index)) for index in range(len(layouts))]
        heartbeat = current_heartbeat()
        return PartWriter(
            stores,
            max_pending_bytes=self._runtime.config.max_pending_bytes,
            on_committed=self._on_committed,
            around_commit=contextlib.nullcontext if heartbeat is None else heartbeat.committing,
            on_full=self._make_room,
        )

    def _fragments_of(self, loader: int, layout: LoaderLayout) -> tuple[FragmentWriter, FragmentReader] | None:
        """What keeps windows that are not whole yet, on the rank that writes."""
        if self._dynamic is None or not self._world.topology.is_leader:
            return None
        on_kept = functools.partial(self._on_kept, loader)
        around_write = functools.partial(phase, Phase.COMMIT, then=Phase.RUN)
        writer = FragmentWriter(self.directory, loader, layout.samples_per_chunk, on_kept, around_write)
        return writer, FragmentReader(self.directory, loader)

    def _make_room(self) -> None:
        for fragments in self._fragments:
            if fragments is not None:
                fragments[0].give_up()

    def _on_kept(self, loader: int, samples: int) -> None:
        if self._writer is None:
            return  # it leaves already
        assert self._dynamic is not None
        request = SamplesKept(sender=self.sender, job=self.number, loader=loader, samples=samples)
        self._dynamic.asked_to_leave |= self.ask(request).leave

    def _commit(self, loader: int, chunk: int, batches: list[StoredBatch]) -> None:
        assert self._writer is not None
        metadata: dict[str, Any] = {
            "run": self._world.run_id, "replica": self.sender.replica, "generation": self.sender.generation,
        }  # fmt: skip
        read = self._queues[loader].digests.pop(chunk, None)
        if read is not None:
            metadata["read"] = read
        with phase(Phase.COMMIT, then=Phase.RUN):  # it waits where the disk is slower than the model
            self._writer.put(loader, chunk, batches, metadata)

    def _on_committed(self, loader: int, chunk: int, won: bool, samples: int) -> None:
        began = self._chunks_began.pop((loader, chunk), None)
        took = {} if began is None else {"seconds": round(time.monotonic() - began, 6)}
        emit("chunk", job=self.number, loader=loader, chunk=chunk, samples=samples, won=won, **took)
        fragments = self._fragments[loader]
        if fragments is not None:
            fragments[0].on_durable(chunk)
        quarantined = self._quarantined.pop((loader, chunk), [])
        request = ChunkDone(
            sender=self.sender, job=self.number, loader=loader, chunk=chunk, won=won, samples=samples,
            quarantined=tuple(quarantined),
        )  # fmt: skip
        self._num_errored = max(self._num_errored, self.ask(request).num_errored)

    def _on_ended(self, answer: NoWork) -> None:
        self._ended = answer
        self.flush()
        if answer in (NoWork.DRAIN, NoWork.FENCED):
            self.finish()

    def _request_drain(self) -> None:
        self.ask(DrainJob())

    @property
    def sender(self) -> Sender:
        """This rank, in requests."""
        return self._world.sender

    def ask(self, request: Request[AnswerT], *, timeout_seconds: float | None = None) -> AnswerT:
        """Ask the coordinator."""
        timeout = self._runtime.config.timeout_sec if timeout_seconds is None else timeout_seconds
        return self._world.channel.call(request, timeout_seconds=timeout)


def _wrapped(wrapper: StepWrapper, call: Callable[[Any], Any], ticket: Ticket, batch: Any) -> Any:
    return wrapper(call, batch, ticket)
