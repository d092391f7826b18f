"""What ranks report of themselves, and the values they share."""

from __future__ import annotations

from typing import Any

from lightning_gpuorch.control.messages.base import Answer, Done, Request, Sender


class RegisterRank(Request[Done], frozen=True):
    """A rank knows how many ranks share its model; all ranks must say the same."""

    sender: Sender
    tensor_parallel_size: int


class UnregisterRank(Request[Done], frozen=True):
    """A rank has ended in good order, where no supervisor reports it."""

    rank: int


class BeginStage(Request[Done], frozen=True):
    """A stage whose state is in memory: training restarts as a whole, evaluation needs every replica's share."""

    sender: Sender
    gang: bool
    every_replica: bool


class ReportDevice(Request[Done], frozen=True):
    """A rank's device is to be drained, or has failed."""

    sender: Sender
    verdict: str
    evidence: list[str]


class DrainJob(Request[Done], frozen=True):
    """Hand out no more work: what is leased is finished, and everybody leaves."""


class Publish(Request[Done], frozen=True):
    """Plain data that other ranks look up."""

    key: str
    value: Any


class Published(Answer, frozen=True):
    """The value of a key."""

    value: Any


class Lookup(Request[Published], frozen=True):
    """Answered as soon as the key is published."""

    key: str


class Agree(Request[Done], frozen=True):
    """A value that must be the same on all ranks; the first one counts, and another one is refused."""

    sender: Sender
    key: str
    what: str
    value: str
