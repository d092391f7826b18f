"""How a predict call on one rank talks of its work: it asks for chunks, tells where they end, and asks to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lightning_gpuorch.control.error_record import READING, note_failure
from lightning_gpuorch.control.heartbeat import Phase, current_heartbeat, phase
from lightning_gpuorch.control.messages.base import AnswerT, Request, Sender
from lightning_gpuorch.control.messages.leases import (
    Drain,
    EndOfStream,
    Fenced,
    InputRead,
    Lease,
    NextChunk,
    Pause,
    Stop,
)
from lightning_gpuorch.control.messages.ranks import Lookup, Publish
from lightning_gpuorch.predictions.loading.collector import ChunkCollector, NoCollector
from lightning_gpuorch.predictions.loading.source import Span
from lightning_gpuorch.predictions.loading.tickets import Ticket
from lightning_gpuorch.predictions.loading.window import Window
from lightning_gpuorch.predictions.loading.work import NoWork
from lightning_gpuorch.predictions.storage.layout import LoaderLayout
from lightning_gpuorch.worker.group_samples import Sample, samples_of

if TYPE_CHECKING:
    from lightning_gpuorch.worker.world import World

FOREVER_SECONDS = 10 * 365 * 86400.0
_MAX_UNREPORTED = 1000
"""Digests of what was read that wait to be reported."""
_NO_WORK = {Pause: NoWork.PAUSE, Stop: NoWork.STOP, Drain: NoWork.DRAIN, Fenced: NoWork.FENCED}


class JobContext(Protocol):
    """What is needed of a predict call."""

    number: int
    steps: int
    raises_errors: bool
    layouts: list[LoaderLayout]

    @property
    def sender(self) -> Sender:
        """This rank, in requests."""
        ...

    def ask(self, request: Request[AnswerT], *, timeout_seconds: float | None = None) -> AnswerT:
        """Ask the coordinator."""
        ...

    def flush(self) -> None:
        """Wait until everything computed so far is durable."""
        ...

    def collect(self) -> None:
        """Hand on what is done."""
        ...

    def begin_waiting(self) -> None:
        """A wait for work has ended, which was no work."""
        ...

    def give_up(self, loader: int, reasons: Mapping[int, str]) -> None:
        """Units have no prediction."""
        ...

    def skip_batch(self, ticket: Ticket) -> None:
        """Nothing of a batch can be read."""
        ...


class ReplicaQueue:
    """A rank's view of its replica's leases."""

    def __init__(self, job: JobContext, loader: int):
        self._job, self._loader, self._sequence = job, loader, 0
        self._unreported: list[tuple[int, str]] = []
        self._leased: set[int] = set()
        self.digests: dict[int, str] = {}
        """Of what was read of a stream, by chunks that this rank computes."""

    def next(self, block: bool, seconds_per_sample: float = 0.0, after: int | None = None) -> Lease | NoWork:
        """Ask for work; with ``block``, wait until there is some or none will come.

        Args:
            block: Whether to wait.
            seconds_per_sample: How fast this replica is, if it knows.
            after: A chunk whose shard is to go on, if there is more of it.
        """
        if block:
            # Own chunks first: others may wait for them as well, and a writer that has failed must say so now.
            self._job.flush()
        self._report()
        # Waiting for others to finish has no limit of its own: the supervisor judges who is stuck.
        timeout = FOREVER_SECONDS if block else None
        with phase(Phase.WAIT, then=Phase.RUN) if block else contextlib.nullcontext():
            request = NextChunk(
                **self._place,
                sequence=self._sequence,
                block=block,
                seconds_per_sample=seconds_per_sample,
                after=after,
            )
            answer = self._job.ask(request, timeout_seconds=timeout)
        self._sequence += 1
        if block:
            self._job.begin_waiting()
        if not isinstance(answer, Lease):
            return _NO_WORK[type(answer)]
        self._leased.add(answer.chunk)
        layout = self._job.layouts[self._loader]
        if len(answer.stretches) > len(layout.stretches):
            self._job.layouts[self._loader] = layout.with_stretches(answer.stretches)
        return answer

    def end_of_stream(self, units: int) -> None:
        """Report where a stream ended."""
        self._report()
        self._job.ask(EndOfStream(**self._place, units=units))

    def end_of_shard(self, shard: int, units: int, is_readable: bool) -> None:
        """Report where a shard ended, or could not be read any further."""
        self._report()
        self._job.ask(EndOfStream(**self._place, units=units, shard=shard, is_readable=is_readable))

    def saw(self, chunk: int, digest: str) -> None:
        """Report what was read of a stream: the first batch at once, chunks with the next request."""
        self._unreported.append((chunk, digest))
        if chunk in self._leased:
            self._leased.discard(chunk)
            self.digests[chunk] = digest
        if chunk < 0 or len(self._unreported) >= _MAX_UNREPORTED:
            self._report()

    def _report(self) -> None:
        if self._unreported:
            read, self._unreported = self._unreported, []
            self._job.ask(InputRead(**self._place, digests=read))

    @property
    def _place(self) -> dict[str, Any]:
        return {"sender": self._job.sender, "job": self._job.number, "loader": self._loader}


class ReplicaSink:
    """A collector that gets a chunk's last output before it is told that the chunk is over.

    Args:
        job: Its job.
        world: The job's world. In a tensor-parallel group the leader decides what is taken over, and tells the others.
        loader: Index of the dataloader.
        collector: The collector.
        windows: Whether batches are formed out of windows, on which the ranks of a group agree before.
    """

    def __init__(
        self, job: JobContext, world: World, loader: int, collector: ChunkCollector | NoCollector, windows: bool = False
    ):
        self._job, self._world, self._loader, self._collector = job, world, loader, collector
        self._num_windows = self._num_chunks = 0
        self._windows = windows and world.topology.tensor_parallel_size > 1
        self._unread: list[tuple[int, str, str]] = []
        """Samples that this rank could not read and the others of its group do not know of, and why."""
        self._lost: dict[Sample, str] = {}
        """Samples that a rank of the group could not read, and why."""

    def begin(self, chunk: int, num_batches: int | None) -> None:
        """A chunk starts."""
        self._collector.begin(chunk, num_batches)

    def end(self, chunk: int) -> None:
        """A chunk of unknown length is over: what is done of it is handed on first."""
        self._job.collect()
        self._collector.end(chunk)

    def reading(self, chunk: int, units: range) -> None:
        """Units are being read; a death is blamed on them."""
        heartbeat = current_heartbeat()
        if heartbeat is not None:
            at = chunk if units else -1
            heartbeat.reading(self._job.number, self._loader, at, units.start, units.stop)

    def cannot_read(self, chunk: int, units: range, error: Exception) -> None:
        """An error of reading is about to end this rank: what was being read goes into its record."""
        note_failure(error, READING, loader=self._loader, units=units, is_final=self._job.raises_errors)

    def give_up(self, span: Span, reasons: Mapping[int, str]) -> None:
        """Samples of a span cannot be read, and have no prediction."""
        self._job.give_up(self._loader, {span.unit(position): reason for position, reason in reasons.items()})
        if self._windows and span.indices is not None:  # of a stream, all ranks read the same or the job ends
            samples = samples_of(span)
            self._unread += [(*samples[position], reason) for position, reason in reasons.items()]

    def give_up_batch(self, chunk: int) -> None:
        """No output will follow for a batch of a chunk."""
        self._collector.give_up_batch(chunk)

    def skip_batch(self, ticket: Ticket) -> None:
        """Nothing of a batch that would be given out now can be read."""
        if self._world.topology.tensor_parallel_size == 1:
            self._collector.give_up_batch(ticket.chunk)
        else:
            self._job.skip_batch(ticket)

    def give_up_in_window(self, window: Window, positions: Sequence[int], reasons: Mapping[int, str]) -> None:
        """Samples of a window cannot be collated, and have no prediction."""
        self._job.give_up(self._loader, reasons)
        self._collector.give_up_in_window(window, len(positions))

    def take_over_chunk(self, chunk: int, units: range, look_again: bool) -> frozenset[int]:
        """Take what is known already of a chunk that is about to begin."""
        topology, job, sender = self._world.topology, self._job, self._world.sender
        if topology.tensor_parallel_size == 1:
            return self._collector.take_over_chunk(chunk, units, look_again)
        key = "/".join(map(str, ("taken-over-chunk", job.number, self._loader, *sender.owner, self._num_chunks)))
        self._num_chunks += 1
        if topology.is_leader:
            taken = self._collector.take_over_chunk(chunk, units, look_again)
            job.ask(Publish(key=key, value=sorted(taken)))
            return taken
        with phase(Phase.WAIT, then=Phase.RUN):  # the supervisor judges whether another rank is stuck
            return frozenset(job.ask(Lookup(key=key), timeout_seconds=FOREVER_SECONDS).value)

    def take_over(self, window: Window) -> set[int]:
        """Take what is known of a window's samples already."""
        if self._world.topology.tensor_parallel_size == 1:
            return self._collector.take_over(window)
        topology, job, sender = self._world.topology, self._job, self._world.sender
        place = "/".join(map(str, (job.number, self._loader, *sender.owner, self._num_windows)))
        self._num_windows += 1
        told = [(unit, index, f"rank {topology.rank} could not read it: {why}") for unit, index, why in self._unread]
        self._unread.clear()
        with phase(Phase.WAIT, then=Phase.RUN):  # the supervisor judges whether another rank is stuck
            if not topology.is_leader:
                job.ask(Publish(key=f"unread/{place}/{topology.tensor_parallel_rank}", value=told))
                answer = job.ask(Lookup(key=f"taken-over/{place}"), timeout_seconds=FOREVER_SECONDS)
            for rank in range(1, topology.tensor_parallel_size if topology.is_leader else 1):
                told += job.ask(Lookup(key=f"unread/{place}/{rank}"), timeout_seconds=FOREVER_SECONDS).value
        if topology.is_leader:
            common = self._common(window, told)
            sizes = self._collector.take_over(window)
            taken = [index for index, position in enumerate(common) if position in window.taken_over]
            job.ask(Publish(key=f"taken-over/{place}", value=[sorted(sizes), taken, told]))
        else:
            sizes, taken, told = answer.value
            common = self._common(window, told)
            if taken:
                window.take_over([common[index] for index in taken], None)
        self._leave_out(window, frozenset(common))
        return set(sizes)

    def _common(self, window: Window, told: Sequence[tuple[int, str, str]]) -> list[int]:
        """Positions of the samples of a window that all ranks of the group have read."""
        self._lost.update({(unit, index): why for unit, index, why in told})  # some may be in a later window
        samples = [sample for piece in window.pieces for sample in samples_of(piece.span)]
        return [
            position for position in range(len(window.samples)) if not samples or samples[position] not in self._lost
        ]

    def _leave_out(self, window: Window, common: frozenset[int]) -> None:
        """Put the samples of a window that not all ranks have read into no batch, unless they are computed already."""
        lost = [p for p in range(len(window.samples)) if p not in common and p not in window.taken_over]
        if lost:
            samples = [sample for piece in window.pieces for sample in samples_of(piece.span)]
            window.leave_out(lost)
            self.give_up_in_window(window, lost, {samples[p][0]: self._lost[samples[p]] for p in lost})


def await_group(job: JobContext, world: World) -> None:
    """Wait on the leader of a tensor-parallel group until the other ranks are done with the batches it is done with.

    Otherwise it might make the output of a batch durable while a callback of another rank still works on it, and dies.
    """
    topology, heartbeat = world.topology, current_heartbeat()
    place = "/".join(map(str, (job.number, *world.sender.owner, job.steps)))
    if not topology.is_leader:
        job.ask(Publish(key=f"done/{place}/{topology.tensor_parallel_rank}", value=True))
        return
    with contextlib.nullcontext() if heartbeat is None else heartbeat.waiting():
        for rank in range(1, topology.tensor_parallel_size):
            job.ask(Lookup(key=f"done/{place}/{rank}"), timeout_seconds=FOREVER_SECONDS)


class DrainOnSignal:
    """What SIGTERM does to a rank while it predicts: the job drains, or nothing happens where a supervisor decides that.

    Lightning's own handler would begin a collective on this rank alone, among those of the step that it interrupts.

    Args:
        drain: Asks the job to drain; None where a supervisor does it.
    """

    def __init__(self, drain: Callable[[], None] | None):
        self._drain = drain
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._drain is None:
            return
        # Not in the handler: it may have interrupted a request on the same connection.
        threading.Thread(target=self._drain, name="gpuorch-drain", daemon=True).start()

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
