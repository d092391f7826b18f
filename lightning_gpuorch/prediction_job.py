"""One predict call on one rank, step by step: from leased chunks to durable parts.

Loaders lease chunks, a step may be wrapped (OOM halving), collectors gather a chunk's outputs, and a writer makes them
durable in the background.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_gpuorch._version import __version__
from lightning_gpuorch.batching import DynamicBatcher, freeze_objects
from lightning_gpuorch.dynamic_steps import DynamicSteps
from lightning_gpuorch.errors import EXIT_RESUMABLE
from lightning_gpuorch.liveness import Phase, current_heartbeat
from lightning_gpuorch.memory.transfer import HostCopy
from lightning_gpuorch.predictions.collector import ChunkCollector, NoCollector
from lightning_gpuorch.predictions.fragments import FragmentReader, FragmentWriter
from lightning_gpuorch.predictions.journal import loader_directory
from lightning_gpuorch.predictions.layout import LoaderLayout, StoredBatch
from lightning_gpuorch.predictions.loader import LeasedLoader, Ticket
from lightning_gpuorch.predictions.manifest import Manifest
from lightning_gpuorch.predictions.parts import PartStore
from lightning_gpuorch.predictions.reader import read_predictions
from lightning_gpuorch.predictions.source import Source, default_chunk_batches, describe
from lightning_gpuorch.predictions.window import Window
from lightning_gpuorch.predictions.windowed_loader import WindowedLoader
from lightning_gpuorch.predictions.writer import PartWriter, size_bytes
from lightning_gpuorch.step_context import StepContext, StepWrapper
from lightning_gpuorch.surviving_steps import SurvivingSteps
from lightning_gpuorch.telemetry.current import emit
from lightning_gpuorch.tensors import to_host

log = logging.getLogger(__name__)

_FOREVER_SECONDS = 10 * 365 * 86400.0


class PredictionJob:
    """One predict call on one rank."""

    def __init__(
        self,
        runtime: StepContext,
        loaders: Sequence[Any],
        default_root: Path,
        limits: Sequence[int | None],
        model_fingerprint: str | None,
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
            model_fingerprint=model_fingerprint,
            versions={"lightning_gpuorch": __version__, "torch": torch.__version__},
        )
        directory, ephemeral = world.job_directory(runtime.output_dir, default_root)
        asked = {"directory": str(directory), "ephemeral": ephemeral, "manifest": wanted.to_dict()}
        with _phase(Phase.WAIT, then=Phase.STARTING):  # what is there already is checked first, however much it is
            answer = self._call("open", **asked, timeout_seconds=_FOREVER_SECONDS).header
        self.directory = Path(answer["directory"])
        self.ephemeral = ephemeral
        self.finished_before = bool(answer["finished"])
        self.resumed_chunks = sum(answer["resumed"])
        manifest = Manifest.from_dict(answer["manifest"])
        self.delivered = _Delivered()
        self._chunks_began: dict[tuple[int, int], float] = {}
        self._observed_at: float | None = None
        self._asked_ns = time.time_ns()
        self._fetched_ns: tuple[int, int] | None = None
        self._copies: collections.deque[tuple[Ticket, HostCopy, frozenset[int]]] = collections.deque()
        self.samples = 0
        self.steps = 0
        self._ended: str | None = None
        self._lost: set[int] = set()
        self._quarantined: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
        self._fragments = [self._fragments_of(index, layout) for index, layout in enumerate(manifest.loaders)]
        self._writer = self._make_writer(manifest.loaders) if world.topology.is_leader else None
        self._collectors = [
            ChunkCollector(functools.partial(self._commit, index), fragments) if self._writer else NoCollector()
            for index, fragments in enumerate(self._fragments)
        ]
        self.loaders = [
            self._make_loader(index, source, layout, batcher)
            for index, (source, layout, batcher) in enumerate(zip(sources, manifest.loaders, batchers, strict=True))
        ]
        self._drain_signal = _DrainOnSignal(self._request_drain) if not world.supervised else None
        if world.topology.rank == 0:
            self._announce(manifest.loaders)
        if world.supervised:
            freeze_objects()  # letting go of memory after an error must not take seconds

    def _make_loader(
        self, index: int, source: Source, layout: LoaderLayout, batcher: DynamicBatcher | None
    ) -> LeasedLoader:
        topology = self._world.topology
        sink = _Sink(self, index, self._collectors[index], agrees=topology.tensor_parallel_size > 1)
        leased = (source, layout, _Queue(self, index), sink, self.delivered, index, self._on_ended)
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

    def take(self) -> Ticket:
        """The ticket of the batch that was delivered first and is not computed yet."""
        ticket = self.delivered.popleft()
        there = self.delivered.at_ns.popleft()
        self._fetched_ns = (self._asked_ns, max(self._asked_ns, there))
        return ticket

    def progress(self) -> dict[str, Any]:
        """How far the whole job is: chunks, samples, restarts."""
        return dict(self._call("progress").header)

    def lose(self, positions: Sequence[int], ticket: Ticket, reason: str) -> None:
        """Give up samples of the batch that is being computed; its output covers the others.

        Args:
            positions: Positions in the batch.
            ticket: The batch.
            reason: Why, for the report and the error at the end.
        """
        self._lost.update(positions)
        span = ticket.span
        chunk_size = self.loaders[ticket.loader].layout.chunk_size
        for position in positions:
            unit = span.unit(position)
            entries = self._quarantined.setdefault((ticket.loader, unit // chunk_size), [])
            entries.append((unit, unit + 1, reason))

    def run_step(self, call: Callable[[Any], Any], batch: Any, ticket: Ticket) -> Any:
        """Compute one batch and keep its output.

        Args:
            call: Computes a batch.
            batch: The batch, on the device.
            ticket: Its ticket.

        Returns:
            The output, as ``call`` returned it.
        """
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
        telemetry.begin_step(self.steps, ticket.chunk, self._fetched_ns)
        heartbeat, span = current_heartbeat(), ticket.span
        if heartbeat is not None:
            stop = span.first_unit + span.num_units
            heartbeat.begin_step(self.number, ticket.loader, ticket.chunk, span.first_unit, stop)
        try:
            output = step(batch)
        except StopIteration as error:
            # Lightning's loop would take it for the end of the data and silently drop the rest.
            raise RuntimeError(f"the predict step raised StopIteration on batch {ticket.span.batch_index}") from error
        except Exception as error:
            telemetry.fail_step(error)
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
        if self._writer is not None:
            self._copies.append((ticket, self._host_copy(output), frozenset(self._lost)))
        if heartbeat is not None:
            heartbeat.end_step()  # what fails from here on is not to be blamed on the batch
        # On CUDA this step still computes; what it gives is picked up when the next one is on its way.
        self._collect(leave=0 if self._runtime.transfers is None else 1)
        telemetry.end_step(ticket.size or 0)
        calibration = self._runtime.calibration
        if calibration is not None and calibration.count(ticket.size or 0, time.perf_counter()):
            self._end_calibration()
        self._asked_ns = time.time_ns()
        return output

    def _host_copy(self, output: Any) -> HostCopy:
        transfers = self._runtime.transfers
        return HostCopy(to_host(output)) if transfers is None else transfers.to_host(output)

    def _observe(self, ticket: Ticket, output: Any, began: float) -> None:
        """Tell what bounds windows. From step to step: on CUDA a step returns before it is computed."""
        loader = self.loaders[ticket.loader]
        if not isinstance(loader, WindowedLoader):
            return
        now = time.perf_counter()
        since = began if self._observed_at is None else self._observed_at
        self._observed_at = now
        num_samples, num_bytes = ticket.size or 0, size_bytes(output)
        loader.bounds.observe(num_samples=num_samples, num_bytes=num_bytes, seconds=now - since)

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
            SystemExit: The job was asked to stop; the exit code says that it can be resumed.
        """
        with _phase(Phase.COMMIT, then=Phase.OUTSIDE):
            self._collect()
            self.close()
        if self._ended in ("drain", "fenced"):
            log.info("stopped on request; the same command goes on from here")
            raise SystemExit(EXIT_RESUMABLE)
        answer = self._call("close").header
        if self._runtime.calibration is not None:  # the data ended before the time
            self._end_calibration()
        if self._world.topology.rank == 0:
            self._summarise(answer)
        return read_predictions(self.directory)

    def flush(self) -> None:
        """Wait until everything computed so far is durable.

        Raises:
            PredictionStorageError: Something could not be written.
        """
        self._collect()
        if self._writer is not None:
            with _phase(Phase.COMMIT, then=Phase.RUN):
                self._writer.flush()

    def _collect(self, leave: int = 0) -> None:
        """Hand on outputs that have reached the host, all but the last ``leave`` steps'."""
        while len(self._copies) > leave:
            ticket, copy, lost = self._copies.popleft()
            self._collectors[ticket.loader].add(ticket, copy.result(), lost)

    def close(self) -> None:
        """Stop the writer after it has written what it has; safe to call again."""
        if self._world.supervised:
            gc.unfreeze()  # the script may drop this model and go on with another
        if self._drain_signal is not None:
            self._drain_signal.restore()
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
            for collector in self._collectors:
                collector.keep()

    def _summarise(self, answer: dict[str, Any]) -> None:
        if self.finished_before:
            log.info("nothing to do: all predictions are already in %s", self.directory)
        else:
            log.info("all predictions are in %s after %.1f s", self.directory, answer["seconds"])

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
        around_write = functools.partial(_phase, Phase.COMMIT, then=Phase.RUN)
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
        self._dynamic.asked_to_leave |= bool(self._call("kept", loader=loader, samples=samples).header["leave"])

    def _commit(self, loader: int, chunk: int, batches: list[StoredBatch]) -> None:
        assert self._writer is not None
        owner = self._world.owner
        metadata = {"replica": owner["replica"], "generation": owner["generation"]}
        with _phase(Phase.COMMIT, then=Phase.RUN):  # it waits where the disk is slower than the model
            self._writer.put(loader, chunk, batches, metadata)

    def _on_committed(self, loader: int, chunk: int, won: bool, samples: int) -> None:
        began = self._chunks_began.pop((loader, chunk), None)
        took = {} if began is None else {"seconds": round(time.monotonic() - began, 6)}
        emit("chunk", job=self.number, loader=loader, chunk=chunk, samples=samples, won=won, **took)
        fragments = self._fragments[loader]
        if fragments is not None:
            fragments[0].on_durable(chunk)
        quarantined = self._quarantined.pop((loader, chunk), [])
        self._call("done", loader=loader, chunk=chunk, won=won, samples=samples, quarantined=quarantined)

    def _on_ended(self, answer: str) -> None:
        self._ended = answer
        self.flush()
        if answer in ("drain", "fenced"):
            self.finish()

    def _request_drain(self) -> None:
        self._call("drain")

    def _call(self, op: str, *, timeout_seconds: float | None = None, **fields: Any) -> Any:
        header = {"op": op, "job": self.number, **self._world.owner, **fields}
        timeout = self._runtime.config.timeout_sec if timeout_seconds is None else timeout_seconds
        return self._world.channel.call(header, timeout_seconds=timeout)


class _Delivered(collections.deque[Ticket]):
    """Tickets of batches that are not computed yet, and the Unix time in nanoseconds at which each batch was there."""

    def __init__(self) -> None:
        super().__init__()
        self.at_ns: collections.deque[int] = collections.deque()

    def append(self, ticket: Ticket) -> None:
        """Take the ticket of a batch that has just been fetched."""
        super().append(ticket)
        self.at_ns.append(time.time_ns())


class _Sink:
    """A collector that gets a chunk's last output before it is told that the chunk is over.

    Args:
        job: Its job.
        loader: Index of the dataloader.
        collector: The collector.
        agrees: What is taken over is decided by the leader of a group, and told to the other ranks.
    """

    def __init__(self, job: PredictionJob, loader: int, collector: ChunkCollector | NoCollector, agrees: bool):
        self._job, self._loader, self._collector = job, loader, collector
        self._agrees, self._num_windows = agrees, 0

    def begin(self, chunk: int, num_batches: int | None) -> None:
        self._collector.begin(chunk, num_batches)

    def end(self, chunk: int) -> None:
        self._job._collect()
        self._collector.end(chunk)

    def take_over(self, window: Window) -> set[int]:
        sizes = self._collector.take_over(window)
        if not self._agrees:
            return sizes
        job, owner = self._job, self._job._world.owner
        place = (job.number, self._loader, owner["replica"], owner["generation"], self._num_windows)
        key, self._num_windows = "taken-over/" + "/".join(map(str, place)), self._num_windows + 1
        if job._world.topology.is_leader:
            job._call("publish", key=key, value=[sorted(sizes), sorted(window.taken_over)])
            return sizes
        with _phase(Phase.WAIT, then=Phase.RUN):  # the supervisor judges whether the leader is stuck
            told = job._call("lookup", key=key, timeout_seconds=_FOREVER_SECONDS).header["value"]
        sizes, positions = told
        if positions:
            window.take_over(positions, None)
        return set(sizes)


class _Queue:
    """A rank's view of its replica's leases."""

    def __init__(self, job: PredictionJob, loader: int):
        self._job, self._loader, self._sequence = job, loader, 0

    def next(self, block: bool, seconds_per_sample: float = 0.0) -> dict[str, Any]:
        if block:
            # Own chunks first: others may wait for them as well, and a writer that has failed must say so now.
            self._job.flush()
        # Waiting for others to finish has no limit of its own: the supervisor judges who is stuck.
        timeout = _FOREVER_SECONDS if block else None
        with _phase(Phase.WAIT, then=Phase.RUN) if block else contextlib.nullcontext():
            answer = self._job._call(
                "next", loader=self._loader, sequence=self._sequence, block=block,
                seconds_per_sample=seconds_per_sample, timeout_seconds=timeout,
            ).header  # fmt: skip
        self._sequence += 1
        if block:
            self._job._observed_at = None  # that wait was no work
        return dict(answer)

    def end_of_stream(self, units: int) -> None:
        self._job._call("end_of_stream", loader=self._loader, units=units)


@contextlib.contextmanager
def _phase(phase: Phase, then: Phase) -> Iterator[None]:
    """Tell whoever judges this rank what it is doing."""
    heartbeat = current_heartbeat()
    if heartbeat is not None:
        heartbeat.enter(phase)
    try:
        yield
    finally:
        if heartbeat is not None:
            heartbeat.enter(then)


class _DrainOnSignal:
    """SIGTERM and SIGINT ask the job to drain, where no supervisor does it."""

    def __init__(self, drain: Callable[[], None]):
        self._drain = drain
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        # Not in the handler: it may have interrupted a request on the same connection.
        threading.Thread(target=self._drain, name="gpuorch-drain", daemon=True).start()

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


def _wrapped(wrapper: StepWrapper, call: Callable[[Any], Any], ticket: Ticket, batch: Any) -> Any:
    return wrapper(call, batch, ticket)
