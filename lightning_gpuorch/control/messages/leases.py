"""Predict calls and their chunks."""

from __future__ import annotations

from typing import Any, Generic

import msgspec

from lightning_gpuorch.control.messages.base import Answer, AnswerT, Done, Request, Sender, UnitRange
from lightning_gpuorch.predictions.storage.resume import ResumeCheck


class JobRequest(Request[AnswerT], Generic[AnswerT], frozen=True):
    """About one predict call."""

    sender: Sender
    job: int


class LoaderRequest(JobRequest[AnswerT], Generic[AnswerT], frozen=True):
    """About one dataloader of a predict call."""

    loader: int


class JobOpened(Answer, frozen=True):
    """The predict call as its first rank opened it."""

    directory: str
    manifest: dict[str, Any]
    resumed_chunks: int
    finished: bool


class OpenJob(JobRequest[JobOpened], frozen=True):
    """Begin a predict call, or take part in it."""

    directory: str
    storage_options: dict[str, str]
    ephemeral: bool
    manifest: dict[str, Any]
    part_bytes: int
    part_seconds: float
    resume_check: ResumeCheck


class Pace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How fast a replica is, also as a multiple of the mean of all, and for how long its queue has been there."""

    seconds_per_sample: float
    speed: float
    age_seconds: float


class Lease(Answer, frozen=True):
    """A chunk to compute.

    Attributes:
        chunk: Which chunk.
        left: Chunks that no replica has yet; None where the end of a stream is not known.
        stretches: Numbers and sizes of the later chunks, as far as they are decided: this one, at least.
        again: Another replica had it and lost it.
        begun: Something of it may be in fragments.
        isolate: Units to be computed one by one, because workers died in them.
        skip: Units that are given up.
        pace: Of the replica, if it ever told.
    """

    chunk: int
    left: int | None = None
    stretches: tuple[tuple[int, int], ...] = ()
    again: bool = False
    begun: bool = False
    isolate: UnitRange | None = None
    skip: tuple[int, ...] = ()
    pace: Pace | None = None


class Pause(Answer, frozen=True):
    """No chunk now; make your own chunks durable, then ask again with ``block``."""


class Stop(Answer, frozen=True):
    """Every chunk is durable."""


class Drain(Answer, frozen=True):
    """Leave; the job can be resumed."""


class Fenced(Answer, frozen=True):
    """This generation was replaced, or its replica retired; leave."""


LeaseAnswer = Lease | Pause | Stop | Drain | Fenced


class NextChunk(LoaderRequest[LeaseAnswer], frozen=True):
    """Ask for work; all ranks of a replica repeat a sequence number and get the same answer."""

    sequence: int
    block: bool
    seconds_per_sample: float = 0.0
    after: int | None = None
    """A chunk whose shard the replica would go on with."""


class ChunkRecorded(Answer, frozen=True):
    """Samples of the job that are given up, in chunks that are durable."""

    num_errored: int


class ChunkDone(LoaderRequest[ChunkRecorded], frozen=True):
    """A chunk's part file is durable, and whether this rank's was the one that counts."""

    chunk: int
    won: bool
    samples: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    """What it took on the host, and to compute; 0 where that is not known."""
    quarantined: tuple[tuple[int, int, str], ...] = ()
    """Units ``[start, stop)`` without a prediction, and why."""
    recorded: int = 0
    """Samples that have an error in place of a prediction in the part."""


class Kept(Answer, frozen=True):
    """Whether the replica is to leave."""

    leave: bool


class SamplesKept(LoaderRequest[Kept], frozen=True):
    """Samples of chunks that are not whole yet are computed, and kept."""

    samples: int


class InputRead(LoaderRequest[Done], frozen=True):
    """Digests of what was read of a stream, by chunk; chunk -1 is the first item alone."""

    digests: list[tuple[int, str]]


class EndOfStream(LoaderRequest[Done], frozen=True):
    """Where a stream ended, or a shard of it.

    Attributes:
        units: Units in all.
        shard: Which shard; None where the whole of a stream is read.
        is_readable: Whether that is its end, and not where it could not be read any further.
    """

    units: int
    shard: int | None = None
    is_readable: bool = True


class JobClosed(Answer, frozen=True):
    """The predict call is complete."""

    seconds: float


class CloseJob(JobRequest[JobClosed], frozen=True):
    """A rank is through with a predict call; refused while samples are missing."""


class JobProgress(Answer, frozen=True):
    """How far the whole job is; ``chunks_computed`` counts parts of chunks as well, and ``units_by_loader`` whole ones."""

    chunks_done: int
    units_by_loader: list[int]
    chunks_computed: int
    chunks: int
    samples_done: int
    restarts: int


class GetProgress(Request[JobProgress], frozen=True):
    """Ask how far a predict call is."""

    job: int
