"""One predict call on one rank, step by step: from leased chunks to durable parts.

Loaders lease chunks, a step may be wrapped (OOM halving), collectors gather a chunk's outputs, and a writer makes them
durable in the background.
"""

from __future__ import annotations

import dataclasses
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
from lightning_gpuorch.control.messages.leases import CloseJob, GetProgress, OpenJob
from lightning_gpuorch.control.messages.ranks import DrainJob
from lightning_gpuorch.devices.memory.transfer import HostCopy
from lightning_gpuorch.errors import TooManyErroredSamplesError
from lightning_gpuorch.paths import Location, location, options_of
from lightning_gpuorch.predictions.loading.describe import (
    MAX_CHUNK_BATCHES,
    Source,
    default_chunk_batches,
    default_first_chunks,
    describe,
)
from lightning_gpuorch.predictions.loading.loader import LeasedLoader
from lightning_gpuorch.predictions.loading.shards.recognition import by_shard
from lightning_gpuorch.predictions.loading.shards.source import ShardStreamSource
from lightning_gpuorch.predictions.loading.stream import StreamSource
from lightning_gpuorch.predictions.loading.tickets import Ticket
from lightning_gpuorch.predictions.loading.windowed_loader import WindowedLoader
from lightning_gpuorch.predictions.loading.work import NoWork
from lightning_gpuorch.predictions.reading.reader import results
from lightning_gpuorch.predictions.samples import NOT_KEPT
from lightning_gpuorch.predictions.samples.tensors import to_host
from lightning_gpuorch.predictions.storage.journal import loader_directory
from lightning_gpuorch.predictions.storage.layout import LoaderLayout
from lightning_gpuorch.predictions.storage.manifest import Manifest, load
from lightning_gpuorch.predictions.storage.parquet_file import publish_files, pyarrow
from lightning_gpuorch.predictions.storage.parquet_keys import refuse_equal_keys
from lightning_gpuorch.predictions.storage.writer import size_bytes
from lightning_gpuorch.telemetry.steps import StepRecord
from lightning_gpuorch.worker.batches_in_flight import BatchesInFlight, BatchInFlight
from lightning_gpuorch.worker.batching.dynamic import DynamicBatcher
from lightning_gpuorch.worker.carried_columns import CarriedColumns
from lightning_gpuorch.worker.commit_pipeline import CommitPipeline
from lightning_gpuorch.worker.dynamic_steps import DynamicSteps
from lightning_gpuorch.worker.group_samples import SamplesRead
from lightning_gpuorch.worker.leased_work import FOREVER_SECONDS, DrainOnSignal, ReplicaQueue, ReplicaSink, await_group
from lightning_gpuorch.worker.oom.detection import freeze_objects
from lightning_gpuorch.worker.replica_step import ReplicaStep
from lightning_gpuorch.worker.step_context import StepContext

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
        self._carried = CarriedColumns(runtime.config, world.topology.is_leader, keep_outputs)
        if runtime.config.output_format == "parquet":
            pyarrow()  # before work starts
        described = [describe(loader, limit) for loader, limit in zip(loaders, limits, strict=True)]
        directory, ephemeral = world.job_directory(runtime.output_dir, default_root, runtime.config.storage_options)
        sources = self._by_shard(described, directory)
        self.raises_errors = runtime.config.on_error == "raise"
        """Whether an error of a sample ends the job."""
        dynamic = self._dynamic = DynamicSteps(runtime) if runtime.config.enable_dynamic_batching else None
        batchers = [None if dynamic is None else dynamic.batcher(source) for source in sources]
        wanted = Manifest(
            loaders=[self._wanted_layout(source) for source in sources],
            keep_outputs=keep_outputs,
            output_format=runtime.config.output_format,
            model_fingerprint=model_fingerprint,
            versions={"lightning_gpuorch": __version__, "torch": torch.__version__},
        )
        for index, source in enumerate(sources):
            source.freeze(loader_directory(directory, index))
        request = OpenJob(
            sender=self.sender,
            job=self.number,
            directory=str(directory),
            storage_options=options_of(directory),
            ephemeral=ephemeral,
            manifest=wanted.to_dict(),
            part_bytes=runtime.config.part_bytes,
            part_seconds=runtime.config.part_sec,
            resume_check=runtime.config.resume_check,
        )
        with phase(Phase.WAIT, then=Phase.STARTING):  # what is there already is checked first, however much it is
            opened = self.ask(request, timeout_seconds=FOREVER_SECONDS)
        self.directory = location(opened.directory, "directory", options_of(directory))
        self.ephemeral = ephemeral
        self.finished_before = opened.finished
        self.resumed_chunks = opened.resumed_chunks
        manifest = Manifest.from_dict(opened.manifest)
        self.layouts = list(manifest.loaders)
        """Of the dataloaders, with what is decided of later chunks."""
        for index, (source, layout) in enumerate(zip(sources, manifest.loaders, strict=True)):
            source.thaw(loader_directory(self.directory, index), layout)
        self._keeps_outputs, self._output_format = manifest.keep_outputs, manifest.output_format
        keeps = self._host_copy if world.topology.is_leader else None
        self._queues = [ReplicaQueue(self, index) for index in range(len(sources))]
        self._pipeline = CommitPipeline(
            self,
            runtime,
            self.directory,
            manifest.output_format,
            dynamic,
            self._digest_of,
            self._index_of,
            self._host_cost,
        )
        isolates = not self.raises_errors
        self._step = ReplicaStep(
            runtime, sources, manifest.loaders, self._pipeline, dynamic, self._begin_blame, isolates
        )
        self.batches_in_flight = BatchesInFlight(keeps, self._pipeline.keep)
        self._looked_at, self._units_done = 0.0, [0] * len(sources)
        self._asked_ns = time.perf_counter_ns()
        self._free_ns: int | None = None
        """The last step was over, and no wait for work followed."""
        self.steps = 0
        self._ended: NoWork | None = None
        self.loaders = [
            self._make_loader(index, source, layout, batcher)
            for index, (source, layout, batcher) in enumerate(zip(sources, manifest.loaders, batchers, strict=True))
        ]
        self._drain_signal = DrainOnSignal(None if world.supervised else self._request_drain)
        if world.topology.rank == 0:
            self._announce(manifest.loaders)
        if world.supervised:
            freeze_objects()  # letting go of memory after an error must not take seconds

    def _by_shard(self, sources: Sequence[Source], directory: Location) -> list[Source]:
        """The same work; streams are cut by shard where that is known of them, or as the job in the directory began."""
        if self._runtime.config.sharding == "off" or not any(isinstance(source, StreamSource) for source in sources):
            return list(sources)
        topology, begun = self._world.topology, load(directory)
        layouts = () if begun is None else begun.loaders
        began = [layout.num_shards is not None for layout in layouts] + [None] * len(sources)
        tells = topology.rank == 0 and not self._world.generation
        return [
            by_shard(source, topology.num_replicas, how, tells=tells)
            for source, how in zip(sources, began, strict=False)
        ]

    def _make_loader(
        self, index: int, source: Source, layout: LoaderLayout, batcher: DynamicBatcher | None
    ) -> LeasedLoader:
        topology = self._world.topology
        sink = ReplicaSink(
            self, self._world, index, self._pipeline.collectors[index], windows=self._dynamic is not None
        )
        leased = (
            source, layout, self._queues[index], sink, self.batches_in_flight, index, self._on_ended,
            not self.raises_errors,
        )  # fmt: skip
        if self._dynamic is None or batcher is None:
            return LeasedLoader(*leased, should_leave=self._should_leave)
        dynamic = self._dynamic
        return WindowedLoader(
            *leased,
            batcher=batcher,
            num_replicas=topology.num_replicas,
            should_leave=lambda: dynamic.leaves,
            overlaps=self._runtime.transfers is not None,
            single_rank=topology.tensor_parallel_size == 1,
        )

    def _wanted_layout(self, source: Source) -> LoaderLayout:
        chunk, replicas = self._runtime.config.chunk_size, self._world.topology.num_replicas
        if chunk != "auto":
            return source.layout(chunk)
        if isinstance(
            source, ShardStreamSource
        ):  # shards are shared out, not chunks: their size need not even out the end
            return source.layout(MAX_CHUNK_BATCHES)
        windows = self._dynamic is not None
        layout = source.layout(default_chunk_batches(source.num_batches, replicas, windows=windows))
        return dataclasses.replace(layout, first_chunks=default_first_chunks(source.num_batches, replicas))

    def _index_of(self, loader: int, unit: int) -> Any:
        order = getattr(self.loaders[loader].source, "order", None)
        return unit if order is None else order.take(range(unit, unit + 1))[0]

    def _host_cost(self, loader: int, num_samples: int) -> tuple[int, float]:
        return self.loaders[loader].host_cost(num_samples)

    def _should_leave(self) -> bool:
        """Whether to leave in the middle of a chunk, of which what is computed is kept; a group leaves between chunks."""
        return self._pipeline.asked_to_leave and self._world.topology.tensor_parallel_size == 1

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
        if not layout.num_units:
            return None
        if now - self._looked_at > _LOOK_SECONDS:
            self._looked_at, self._units_done = now, self.progress()["units_by_loader"]
        share = self._units_done[loader] / layout.num_units
        return max(1, int(layout.num_batches * share))

    @property
    def in_hand(self) -> SamplesRead | None:
        """What this rank has read of the batch that is being computed, where the ranks of a group have to agree on it."""
        return self._step.in_hand

    def lose(self, reasons: Mapping[int, str], ticket: Ticket) -> None:
        """Give up samples of the batch that is being computed; see :meth:`ReplicaStep.lose`."""
        self._step.lose(reasons, ticket)

    def give_up(self, loader: int, reasons: Mapping[int, str]) -> None:
        """Note units that will have no prediction; see :meth:`CommitPipeline.give_up`."""
        self._pipeline.give_up(loader, reasons)

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
        carried = self._carried.of(batch, ticket)
        self._pipeline.begin_step(ticket)
        telemetry = self._runtime.telemetry
        telemetry.begin_step(self.steps, ticket.chunk)
        began_ns = time.perf_counter_ns()
        try:
            output, lost = self._step.compute(call, batch, in_flight)
        except StopIteration as error:
            # Lightning's loop would take it for the end of the data and silently drop the rest.
            raise RuntimeError(f"the predict step raised StopIteration on batch {ticket.number}") from error
        except Exception as error:
            telemetry.fail_step(self._record_of(in_flight, began_ns), error)
            units = range(ticket.span.first_unit, ticket.span.first_unit + ticket.span.num_units)
            if not isinstance(error, TooManyErroredSamplesError):  # which has noted more than is known here
                note_failure(error, PREDICT_STEP, loader=ticket.loader, units=units, is_final=self.raises_errors)
            if self._world.recovery is not None:
                self._world.recovery.abandon(error)
            raise
        except BaseException as error:
            telemetry.fail_step(self._record_of(in_flight, began_ns), error)
            raise
        computed_ns = time.perf_counter_ns()
        # Before callbacks change the output: what they do may differ between the ranks of a group, which have to form the
        # same windows.
        output_bytes = 0 if self._dynamic is None else size_bytes(output)
        in_flight.carried = self._carried.left(carried, ticket, in_flight.ticket, lost)
        self.batches_in_flight.computed(in_flight, output, lost)
        if self._collects_late:
            # The step before: on CUDA this one still computes, and in a group all ranks have asked for it by now.
            self.batches_in_flight.collect()
        self._observe(in_flight, self._record_of(in_flight, began_ns, computed_ns, output_bytes))
        return output

    def skip_batch(self, ticket: Ticket) -> None:
        """Nothing of a batch could be read here. In a group the others learn it where they would compute it."""
        self.batches_in_flight.append(ticket)
        self._begin_blame(ticket)
        in_flight = self.batches_in_flight.next_delivered()
        self._step.skip(ticket)
        self.steps += 1
        self.batches_in_flight.computed(in_flight, None, frozenset(range(ticket.size or 0)))
        self.batches_in_flight.collect()
        self.end_batch()

    def _record_of(
        self, batch: BatchInFlight, began_ns: int, computed_ns: int = 0, output_bytes: int = 0
    ) -> StepRecord:
        return StepRecord(
            step=self.steps,
            chunk=batch.ticket.chunk,
            num_samples=batch.ticket.size or 0,
            asked_ns=self._asked_ns,
            delivered_ns=batch.delivered_ns,
            began_ns=began_ns,
            computed_ns=computed_ns,
            ended_ns=time.perf_counter_ns(),
            free_ns=began_ns if self._free_ns is None else self._free_ns,
            output_bytes=output_bytes,
        )

    def _observe(self, batch: BatchInFlight, record: StepRecord) -> None:
        self.steps += 1
        self._free_ns = record.ended_ns
        self._runtime.telemetry.observe_step(record)
        loader = self.loaders[batch.ticket.loader]
        if isinstance(loader, WindowedLoader):
            loader.bounds.observe(
                num_samples=record.num_samples, num_bytes=record.output_bytes, seconds=record.seconds_since_free
            )
        calibration = self._runtime.calibration
        if calibration is not None:
            calibration.observe_step(record)
            if calibration.is_enough:
                self._end_calibration()

    def end_batch(self) -> None:
        """The loop asks for the next batch, or has ended: the one in hand is done."""
        self._asked_ns = time.perf_counter_ns()
        if not self.batches_in_flight.end_computed():
            return
        self._end_blame()
        self._step.group_has_asked = False
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

    def _digest_of(self, loader: int, chunk: int) -> str | None:
        return self._queues[loader].digests.pop(chunk, None)

    def begin_waiting(self) -> None:
        """What passes until the next step is no work."""
        self._free_ns = None

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
        with phase(Phase.WAIT, then=Phase.OUTSIDE):  # the store is asked what there is, and may take long to answer
            closed = self.ask(CloseJob(sender=self.sender, job=self.number), timeout_seconds=FOREVER_SECONDS)
        if self._runtime.calibration is not None:  # the data ended before the time
            self._end_calibration()
        if self._world.topology.rank == 0:
            if self._output_format == "parquet":
                for index, layout in enumerate(self.layouts):
                    publish_files(loader_directory(self.directory, index), layout)
                    if self._runtime.config.key_column:
                        refuse_equal_keys(loader_directory(self.directory, index), self._runtime.config.key_column)
            self._summarise(closed.seconds)
        return results(self.directory)

    def flush(self) -> None:
        """Wait until the chunks of all batches that are done are durable, as far as they are whole.

        Raises:
            PredictionStorageError: Something could not be written.
        """
        self.collect()
        self._pipeline.flush()

    def close(self) -> None:
        """Stop the writer after it has written what it has; safe to call again."""
        if self._world.supervised:
            gc.unfreeze()  # the script may drop this model and go on with another
        self._drain_signal.restore()
        if self._pipeline.is_open:
            self._collect_at_last()
            self._pipeline.close()

    def _collect_at_last(self) -> None:
        """Hand on what was done before an error. The device may have failed; then it gives nothing any more."""
        if self._world.topology.tensor_parallel_size > 1 and not self._step.group_has_asked:
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
