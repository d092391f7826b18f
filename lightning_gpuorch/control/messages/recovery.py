"""Recovery inside a tensor-parallel group."""

from __future__ import annotations

from typing import Any, Generic

from lightning_gpuorch.control.messages.base import Answer, AnswerT, Done, Request, Sender


class EpochAborted(Answer, frozen=True):
    """An epoch is given up, and who was the first to do so."""

    rank: int
    reason: str


class EpochComplete(Answer, frozen=True):
    """The votes about the epoch are in already, so it cannot be aborted any more."""


class StepDrained(Answer, frozen=True):
    """A step does not count, because a rank drained it."""

    position: int
    notice: int


class GroupEnded(Answer, frozen=True):
    """The group's generation is over, or the rank has left: nothing more to watch."""


class Exchanged(Answer, frozen=True):
    """The values of all ranks of a group in order, and whether the epoch had been given up until then."""

    values: list[Any]
    aborted: bool


class GroupRequest(Request[AnswerT], Generic[AnswerT], frozen=True):
    """Asked by one rank of a group about one epoch of its connections."""

    sender: Sender
    group_rank: int
    epoch: int


class AbortEpoch(GroupRequest[EpochAborted | EpochComplete], frozen=True):
    """Give the epoch up, unless the exchange ``before`` is complete."""

    reason: str
    before: str = ""


class WatchEpoch(GroupRequest[EpochAborted | StepDrained | GroupEnded], frozen=True):
    """Answered when something happens after notice ``heard``."""

    heard: int = 0


class DrainStep(GroupRequest[EpochAborted | Done], frozen=True):
    """The rank takes part in a step that does not count; answered when all others have been told."""

    group_size: int
    position: int


class Exchange(GroupRequest[Exchanged | Done], frozen=True):
    """Hand in plain data under a name; with ``wait``, answered when all ranks have."""

    group_size: int
    name: str
    value: Any
    wait: bool = True


class LeaveGroup(GroupRequest[Done], frozen=True):
    """The rank has no more steps."""
