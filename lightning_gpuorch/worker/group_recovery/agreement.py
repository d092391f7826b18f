"""What the ranks of a group do after one of them has left a step: a pure function of their votes.

A group works through **attempts**, numbered alike on all of its ranks: each computes one batch, or part of one. A rank
that has computed an attempt waits until all ranks have, and only then uses its output. So two ranks are never more than
one attempt apart, and if they are apart at all, the attempt of the rank behind is complete everywhere: the other rank
could not have gone on otherwise. From that follows everything below.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class Cause(Enum):
    """Why a rank left an attempt."""

    OUT_OF_MEMORY = "out of memory"
    TIMEOUT = "communication timeout"
    COLLECTIVE = "collective error"
    ERROR = "error"
    """The step itself raised something: never retried."""
    PEER = "another rank left"


class GroupAction(Enum):
    """What all ranks do."""

    COMPLETE = "complete"
    """The attempt is computed on every rank; only the wait for it was cut short. Use the output."""
    RETRY = "retry"
    """Compute the attempt again."""
    SMALLER = "smaller"
    """Memory ran out: raise that on every rank at this attempt; what cuts batches cuts this one."""
    FAIL = "fail"
    """The step raised an error: raise it, or that a peer did, on every rank."""
    RESTART = "restart"
    """Going on in place is not possible: end the processes of this group, so that they are restarted."""


@dataclass(frozen=True)
class Vote:
    """What a rank knows when it leaves an attempt.

    Attributes:
        rank: Global rank.
        position: Number of the attempt.
        cause: Why it left.
        computed: It had computed the attempt and was waiting for the others.
        tries: Times this attempt was repeated before, for the reason that communication failed.
        message: Text of its error.
        error: Name of its error's class.
        exit_code: What its process would end with.
    """

    rank: int
    position: int
    cause: Cause
    computed: bool = False
    tries: int = 0
    message: str = ""
    error: str = ""
    exit_code: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the way to the other ranks."""
        return {**asdict(self), "cause": self.cause.name}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Vote:
        """The vote that :meth:`to_dict` described."""
        return cls(**{**data, "cause": Cause[data["cause"]]})


@dataclass(frozen=True)
class Agreement:
    """What all ranks do, and with which attempt. Attempts before it are complete on every rank.

    Attributes:
        verdict: What to do.
        position: The attempt it is about.
        tries: Times that attempt will have been repeated.
        culprits: Global ranks that left by themselves, for the cause that decided.
        cause: That cause.
        reason: For logs and errors.
        error: Name of the class of the culprit's error.
        exit_code: What the culprit's process would end with.
    """

    verdict: GroupAction
    position: int
    tries: int
    culprits: tuple[int, ...]
    cause: Cause
    reason: str
    error: str = ""
    exit_code: int = 1


def decide(votes: Iterable[Vote], max_tries: int) -> Agreement:
    """Turn the votes of all ranks into what they do; the order of the votes does not matter.

    Args:
        votes: One per rank of the group.
        max_tries: Repetitions of one attempt because of failed communication.

    Returns:
        The same on every rank.
    """
    votes = sorted(votes, key=lambda vote: vote.rank)
    position = max(vote.position for vote in votes)
    here = [vote for vote in votes if vote.position == position]
    behind = [vote for vote in votes if vote.position < position]
    tries = max(vote.tries for vote in here)

    def decision(verdict: GroupAction, cause: Cause, by: list[Vote]) -> Agreement:
        first = by[0] if by else votes[0]
        who = f"rank{'s' if len(by) > 1 else ''} {', '.join(str(vote.rank) for vote in by)}" if by else "no rank"
        reason = f"{who}: {first.message or cause.value}"
        return Agreement(
            verdict, position, tries, tuple(vote.rank for vote in by), cause, reason, first.error, first.exit_code
        )

    # 1. What cannot be: the ranks do not run the same program any more.
    lost = [vote for vote in behind if vote.position != position - 1 or not vote.computed]
    if lost:
        return decision(GroupAction.RESTART, Cause.COLLECTIVE, lost)
    # 2. An error of the step ends it for all.
    errors = [vote for vote in votes if vote.cause is Cause.ERROR]
    if errors:
        return decision(GroupAction.FAIL, Cause.ERROR, errors)
    # 3. Every rank has its output: nothing is lost, whatever broke afterwards.
    if not behind and all(vote.computed for vote in here):
        blamed = [vote for vote in here if vote.cause is not Cause.PEER]
        return decision(GroupAction.COMPLETE, blamed[0].cause if blamed else Cause.PEER, blamed)
    # 4. Memory.
    ooms = [vote for vote in here if vote.cause is Cause.OUT_OF_MEMORY]
    if ooms:
        return decision(GroupAction.SMALLER, Cause.OUT_OF_MEMORY, ooms)
    # 5. Communication: again, but not for ever.
    for cause in (Cause.COLLECTIVE, Cause.TIMEOUT, Cause.PEER):
        blamed = [vote for vote in votes if vote.cause is cause]
        if blamed:
            break
    if tries >= max_tries:
        return decision(GroupAction.RESTART, cause, blamed)
    tries += 1
    return decision(GroupAction.RETRY, cause, blamed)
