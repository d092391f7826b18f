"""What a simulated job has done, and what in it breaks a promise: found while it goes on, and when it has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.leases import Owner
from lightning_gpuorch.control.messages.base import Request
from lightning_gpuorch.control.messages.collectives import Gather
from lightning_gpuorch.control.messages.leases import ChunkDone, CloseJob, JobClosed, Lease, NextChunk, Stop
from lightning_gpuorch.errors import EXIT_STORAGE, GPUOrchError
from lightning_gpuorch.paths import ObjectPath
from lightning_gpuorch.predictions import read_predictions
from lightning_gpuorch.predictions.storage.journal import PartJournal

Writer = tuple[str, int, int]
"""Run, replica and generation, as parts name them."""


class History:
    """Judges every answer of the coordinators of a job, and its end.

    Args:
        directory: Where its results are.
        num_samples: Samples of the job, whose predictions are their own numbers.
        clock: The virtual time.
        unseen: Makes a context in which the store neither waits nor fails.

    Attributes:
        problems: What was wrong.
        lines: What has happened, for people.
        unknown: Chunks of which a writer does not know how its commit has ended.
    """

    def __init__(
        self, directory: ObjectPath, num_samples: int, clock: Callable[[], float], unseen: Callable[[], Any]
    ) -> None:
        self.problems: list[str] = []
        self.lines: list[str] = []
        self.unknown: set[int] = set()
        self.num_leases = self.num_computed_again = 0
        self._directory, self._num_samples, self._clock, self._unseen = directory, num_samples, clock, unseen
        self._winners: dict[int, Writer] = {}
        self._run_id = ""
        self._coordinator: Coordinator | None = None

    def tell(self, what: str) -> None:
        """Something has happened."""
        self.lines.append(f"{self._clock():10.3f}  {what}")

    def wrong(self, what: str) -> None:
        """A promise is broken."""
        self.problems.append(what)
        self.tell(f"WRONG: {what}")

    def attach(self, coordinator: Coordinator, run_id: str) -> None:
        """A coordinator begins: the leases of the one before are nobody's."""
        self._coordinator, self._run_id = coordinator, run_id
        self._holders: dict[int, Owner] = {}
        self._answers: dict[tuple[Owner, int], Any] = {}
        self._ended: dict[int, int] = {}
        self._gathered: dict[int, Any] = {}
        end_generation, expire_leases = coordinator.end_generation, coordinator.expire_leases

        def on_end(replica: int, generation: int, *rest: Any, **named: Any) -> int:
            self.tell(f"generation {generation} of replica {replica} is ended")
            self._ended[replica] = max(generation, self._ended.get(replica, -1))
            self._release(lambda owner: owner[0] == replica and owner[1] <= generation)
            return end_generation(replica, generation, *rest, **named)

        def on_expiry(replica: int) -> int:
            self.tell(f"the leases of replica {replica} expire")
            self._release(lambda owner: owner[0] == replica)
            return expire_leases(replica)

        coordinator.end_generation, coordinator.expire_leases = on_end, on_expiry  # type: ignore[method-assign]

    @property
    def _journal(self) -> PartJournal:
        return PartJournal(self._directory / "dataloader_0")

    def _release(self, of: Callable[[Owner], bool]) -> None:
        self._holders = {chunk: owner for chunk, owner in self._holders.items() if not of(owner)}

    def handled(self, request: Request[Any], answer: Any) -> None:
        """A request is answered, or refused with an error."""
        if isinstance(request, NextChunk):
            self._on_lease(request, answer)
        elif isinstance(request, ChunkDone):
            self._holders.pop(request.chunk, None)
        elif isinstance(request, Gather) and not isinstance(answer, Exception):
            if self._gathered.setdefault(request.number, answer) != answer:
                self.wrong(f"collective {request.number} has two results")
        elif isinstance(request, CloseJob) and isinstance(answer, JobClosed) and self.missing():
            self.wrong(f"the job was closed as complete without {self.missing()[:5]}")

    def _on_lease(self, request: NextChunk, answer: Any) -> None:
        owner, key = request.sender.owner, (request.sender.owner, request.sequence)
        if key in self._answers and isinstance(answer, Lease):
            if answer != self._answers[key]:
                self.wrong(f"{owner} got two answers to its request {request.sequence}")
            return
        if isinstance(answer, Stop) and self.missing():
            self.wrong(f"{owner} was told that all is durable, without chunks {self.missing()[:5]}")
        if not isinstance(answer, Lease):
            return
        self._answers[key] = answer
        self.num_leases += 1
        self.tell(f"chunk {answer.chunk} is leased to {owner} as number {request.sequence}")
        if owner[1] <= self._ended.get(owner[0], -1):
            self.wrong(f"chunk {answer.chunk} was leased to {owner}, a generation that is over")
        holder = self._holders.get(answer.chunk)
        if holder not in (None, owner):
            self.wrong(f"chunk {answer.chunk} was leased to {owner} while {holder} held it")
        self._holders[answer.chunk] = owner

    def committed(self, chunk: int, writer: Writer, won: bool) -> None:
        """A writer knows whether its part of a chunk is the one that counts."""
        self.tell(f"chunk {chunk} by {writer} {'is durable' if won else 'was durable already'}")
        self.num_computed_again += not won
        if won and self._winners.setdefault(chunk, writer) != writer:
            self.wrong(f"chunk {chunk} was won by {self._winners[chunk]} and by {writer}")

    def missing(self) -> list[int]:
        """Chunks that the store does not hold, as far as their sizes are decided."""
        assert self._coordinator is not None
        with self._unseen():
            queue = self._coordinator.jobs[0].queues[0]
            return sorted(set(range(queue.num_chunks or 0)) - self._journal.done())

    def concluded(self, code: int, codes: set[int], store_is_down: bool) -> None:
        """A launch has ended on node 0, its ranks with these codes."""
        assert self._coordinator is not None
        complete = bool(self._coordinator.jobs) and not self.missing()
        if code == 0 and not complete:
            self.wrong("exit code 0 without all predictions")
        # Ranks that were asked to stop have not run the rest of the script, and a store that is down proves nothing.
        explained = self._coordinator.draining or EXIT_STORAGE in codes or (code == EXIT_STORAGE and store_is_down)
        if code != 0 and complete and 0 in codes and not explained:
            self.wrong(f"exit code {code} though all is durable and ranks have ended with {sorted(codes)}")

    def check_results(self) -> None:
        """The job is complete: every prediction is there once, in order, of the writer that won."""
        with self._unseen():
            try:
                found = [value for batch in read_predictions(self._directory) for value in batch]
            except GPUOrchError as error:
                self.wrong(f"the predictions cannot be read: {error}")
                return
            if found != list(range(self._num_samples)):
                self.wrong(f"{len(found)} predictions instead of {self._num_samples}, or in another order")
            nobodys = self._journal.done() - self._winners.keys() - self.unknown
            if nobodys:
                self.wrong(f"chunks {sorted(nobodys)} are durable, and no writer knows that its part is the one")
            for chunk, writer in self._winners.items():
                metadata = self._journal.header(chunk).metadata
                if (metadata["run"], metadata["replica"], metadata["generation"]) != writer:
                    self.wrong(f"chunk {chunk} was won by {writer} and holds {dict(metadata)}")
