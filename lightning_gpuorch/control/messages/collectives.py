"""Collectives over all ranks of the job."""

from __future__ import annotations

from lightning_gpuorch.control.messages.base import Answer, Request


class Gathered(Answer, frozen=True):
    """What every rank contributed, in rank order."""

    payloads: dict[int, bytes]


class Gather(Request[Gathered], frozen=True):
    """A rank's contribution to a numbered collective; answered when all ranks have theirs in."""

    number: int
    kind: str
    rank: int
    payload: bytes = b""


class MissingRanks(Answer, frozen=True):
    """Ranks that have not contributed."""

    ranks: list[int]


class GetMissingRanks(Request[MissingRanks], frozen=True):
    """Who is waited for in a collective."""

    number: int
