"""What all messages have in common."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

AnswerT = TypeVar("AnswerT")
LoaderKey = tuple[int, int]
"""Job and dataloader."""
UnitRange = tuple[int, int]
"""Units ``[start, stop)``."""
RaisedException = tuple[str, str]
"""What is the same whenever the same line raises the same type, and the exception in one line."""


class Message(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag=True,
):
    """What is sent, tagged with the name of its class."""


class Answer(Message, frozen=True):
    """What is sent back."""


class Request(Message, Generic[AnswerT], frozen=True):
    """What is asked for, and the type of its answer."""


class Sender(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rank that asks, and on whose behalf: its replica, and how often that was started before."""

    rank: int
    replica: int
    generation: int

    @property
    def owner(self) -> tuple[int, int]:
        """Who holds what this rank leases."""
        return self.replica, self.generation


class Done(Answer, frozen=True):
    """The request is carried out; there is nothing to tell."""


class Refused(Answer, frozen=True):
    """The request failed with one of the project's errors; the asking side raises it."""

    error: str
    message: str
    differences: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()
