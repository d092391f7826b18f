"""A replica on its node as a state machine, and the replicas of a node.

The states and what may follow them are data: :data:`TRANSITIONS`. A step that is not in the table raises, so nothing can
start a worker of a replica that is retired or done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum


class ReplicaState(Enum):
    """Where a replica stands."""

    CHECKING = "its devices are checked"
    RUNNING = "its workers run"
    DRAINING = "it finishes what it holds, then leaves its device"
    RESTARTING = "its workers are gone, the next generation is to come"
    RETIRED = "given up"
    DONE = "all its ranks have ended"


_S = ReplicaState
TRANSITIONS: dict[ReplicaState, frozenset[ReplicaState]] = {
    # Another replica of its gang may fail while its devices are checked: then it starts over.
    _S.CHECKING: frozenset({_S.RUNNING, _S.RESTARTING, _S.RETIRED, _S.DONE}),
    _S.RUNNING: frozenset({_S.DRAINING, _S.RESTARTING, _S.RETIRED, _S.DONE}),
    _S.DRAINING: frozenset({_S.RESTARTING, _S.RETIRED, _S.DONE}),
    _S.RESTARTING: frozenset({_S.CHECKING, _S.RETIRED, _S.DONE}),
    _S.RETIRED: frozenset(),
    _S.DONE: frozenset(),
}
"""What may follow each state."""


class IllegalTransitionError(RuntimeError):
    """A replica was asked for a step that its state does not allow: a bug of the supervisor."""


@dataclass
class Replica:
    """The ranks that compute one copy of the model.

    Attributes:
        index: Its number in the job.
        ranks: Its global ranks.
        generation: How often it was started again.
        state: Where it stands.
        exit_codes: Of the ranks that have ended in this generation.
        shrunk: Ranks it goes on with and ranks it had, if it lost devices for which there was no spare.
        drain_reason: Why it drains.
        drain_deadline: Until when it may, by the monotonic clock.
    """

    index: int
    ranks: list[int]
    generation: int = 0
    state: ReplicaState = ReplicaState.RESTARTING
    exit_codes: dict[int, int] = field(default_factory=dict)
    shrunk: tuple[int, int] | None = None
    drain_reason: str = ""
    drain_deadline: float = float("inf")

    @property
    def live_ranks(self) -> list[int]:
        """Ranks that have not ended in this generation."""
        return [rank for rank in self.ranks if rank not in self.exit_codes]

    @property
    def is_over(self) -> bool:
        """Whether no worker of it may start again."""
        return not TRANSITIONS[self.state]

    def check(self) -> None:
        """Its devices are checked now."""
        self._enter(ReplicaState.CHECKING)

    def run(self) -> None:
        """Its devices are good: its workers start."""
        self._enter(ReplicaState.RUNNING)

    def drain(self, reason: str, deadline: float) -> None:
        """It finishes what it holds, until a deadline, since its device is about to fail."""
        self._enter(ReplicaState.DRAINING)
        self.drain_reason, self.drain_deadline = reason, deadline

    def restart(self, generation: int) -> None:
        """Its workers are gone and shall come back as this generation, all of them: ranks form a group only together."""
        self._enter(ReplicaState.RESTARTING)
        self.generation = generation
        self.exit_codes.clear()
        self.drain_reason, self.drain_deadline = "", float("inf")

    def shrink(self, num_ranks: int) -> list[int]:
        """Go on with its first ranks; returns those that are dropped."""
        size = len(self.ranks)
        self.restart(self.generation + 1)
        self.ranks, dropped = self.ranks[:num_ranks], self.ranks[num_ranks:]
        self.shrunk = (num_ranks, size)
        return dropped

    def retire(self, code: int) -> None:
        """Give it up; ranks that are left end with this code."""
        self._enter(ReplicaState.RETIRED)
        self.exit_codes.update(dict.fromkeys(self.live_ranks, code))

    def end_rank(self, rank: int, code: int) -> None:
        """A rank has ended; the last one ends the replica."""
        if self.is_over or rank not in self.live_ranks:
            raise IllegalTransitionError(f"rank {rank} of replica {self.index} ends twice: {self.exit_codes}.")
        self.exit_codes[rank] = code
        if not self.live_ranks:
            self._enter(ReplicaState.DONE)

    def _enter(self, state: ReplicaState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransitionError(f"replica {self.index} cannot go from {self.state.name} to {state.name}.")
        self.state = state


class NodeReplicas:
    """The replicas of a node.

    While the tensor-parallel size is not known, every rank is a replica; they become the real ones by :meth:`cut`.

    Args:
        ranks: Global ranks of the node.
        size: Ranks per replica, if it is known.
        generation: Their first one.
    """

    def __init__(self, ranks: Iterable[int], size: int | None = None, generation: int = 0):
        self.size: int | None = None
        self._replicas = {rank: Replica(rank, [rank], generation) for rank in ranks}
        self.cut(size)

    def __iter__(self) -> Iterator[Replica]:
        return iter(list(self._replicas.values()))

    @property
    def exit_codes(self) -> dict[int, int]:
        """Of the ranks that have ended for good."""
        return {rank: code for replica in self for rank, code in replica.exit_codes.items()}

    def of(self, rank: int) -> Replica:
        """The replica of a rank of this node."""
        return self._replicas[rank // (self.size or 1)]

    def cut(self, size: int | None) -> None:
        """Take in how many ranks make a replica, as soon as it is known."""
        if size is None or self.size is not None:
            return
        merged: dict[int, list[Replica]] = {}
        for single in self:
            merged.setdefault(single.index // size, []).append(single)
        self.size = size
        self._replicas = {index: _merge(index, singles) for index, singles in merged.items()}

    def group_of(self, rank: int, gang: bool, with_ended: bool = False) -> list[int]:
        """Ranks that share a fate: a replica; all of the node while the size is not known, or when training.

        Args:
            rank: Which one's.
            gang: Whether all ranks of the job share one.
            with_ended: Also those that have ended for good.
        """
        fated = self if self.size is None or gang else [self.of(rank)]
        return [r for replica in fated for r in (replica.ranks if with_ended else replica.live_ranks)]

    def replicas_of(self, ranks: Iterable[int]) -> list[Replica]:
        """The replicas that some ranks belong to, each once."""
        return [self._replicas[index] for index in dict.fromkeys(self.of(rank).index for rank in ranks)]

    def restart(self, ranks: Iterable[int], generation: int) -> None:
        """The workers of these ranks are gone; their replicas shall come back."""
        for replica in self.replicas_of(ranks):
            replica.restart(generation)

    def end(self, ranks: Iterable[int], code: int) -> None:
        """Ranks end for good."""
        for rank in ranks:
            self.of(rank).end_rank(rank, code)


def _merge(index: int, singles: list[Replica]) -> Replica:
    """One replica of several ranks, which have been started and restarted together until now."""
    live = [single for single in singles if not single.is_over] or singles
    marked = (ReplicaState.DRAINING, ReplicaState.RETIRED)  # what holds for one of them holds for all
    first = next((single for single in live if single.state in marked), live[0])
    return Replica(
        index,
        [rank for single in singles for rank in single.ranks],
        max(single.generation for single in singles),
        first.state,
        {rank: code for single in singles for rank, code in single.exit_codes.items()},
        drain_reason=first.drain_reason,
        drain_deadline=min(single.drain_deadline for single in live),
    )
