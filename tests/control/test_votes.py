"""The coordinator's part in the recovery of a group: who is told what, and when."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.messages.base import Done, Request, Sender
from lightning_gpuorch.control.messages.recovery import (
    AbortEpoch,
    DrainStep,
    EpochAborted,
    EpochComplete,
    Exchange,
    Exchanged,
    GroupEnded,
    LeaveGroup,
    StepDrained,
    WatchEpoch,
)
from lightning_gpuorch.control.transport import LocalChannel
from lightning_gpuorch.control.votes import _EXCHANGES_KEPT
from lightning_gpuorch.errors import ControlPlaneTimeoutError, GroupRecoveryError


class Rank:
    """Asks as a rank of the group would, over a real channel."""

    def __init__(self, coordinator: Coordinator, rank: int, generation: int = 0, size: int = 2):
        self.coordinator, self.rank, self.size = coordinator, rank, size
        self.sender = Sender(rank=rank, replica=0, generation=generation)
        self.channel = LocalChannel(coordinator)

    def request(self, kind: type[Request[Any]], epoch: int, fields: dict[str, Any]) -> Request[Any]:
        return kind(sender=self.sender, group_rank=self.rank, epoch=epoch, **fields)

    def ask(self, kind: type[Request[Any]], epoch: int = 0, **fields: Any) -> Any:
        return self.channel.call(self.request(kind, epoch, fields), timeout_seconds=0.05)

    def later(self, kind: type[Request[Any]], epoch: int = 0, **fields: Any) -> Any:
        return self.coordinator.handle(self.request(kind, epoch, fields))

    def vote(self, value: Any, epoch: int = 0) -> Any:
        return self.later(Exchange, epoch, name="votes", group_size=self.size, value=value)


def test_the_first_to_leave_an_epoch_is_the_one_all_hear_of() -> None:
    coordinator = Coordinator(3)
    first, second = Rank(coordinator, 0), Rank(coordinator, 1)
    watched = second.later(WatchEpoch)
    assert not watched.done()
    assert first.ask(AbortEpoch, reason="memory").rank == 0
    assert watched.result(0) == EpochAborted(rank=0, reason="memory")
    assert second.ask(AbortEpoch, reason="memory, too").rank == 0
    assert second.ask(WatchEpoch).rank == 0
    with pytest.raises(ControlPlaneTimeoutError):
        second.ask(WatchEpoch, epoch=1)


def test_votes_are_handed_out_when_all_are_in_and_may_be_repeated() -> None:
    coordinator = Coordinator(3)
    first, second = Rank(coordinator, 0), Rank(coordinator, 1)
    waiting = second.vote("b")
    again = second.vote("b")
    assert not waiting.done()
    assert first.vote("a").result(0).values == ["a", "b"]
    assert waiting.result(0).values == again.result(0).values == ["a", "b"]
    assert first.vote("a").result(0).values == ["a", "b"]


def test_nobody_waits_for_a_rank_that_is_known_to_be_gone() -> None:
    coordinator = Coordinator(3)
    first = Rank(coordinator, 0)
    waiting, watched = first.vote("a"), first.later(WatchEpoch)
    coordinator.end_generation(0, 0)
    assert isinstance(waiting.exception(0), GroupRecoveryError)
    assert watched.result(0) == GroupEnded()
    with pytest.raises(GroupRecoveryError, match="generation 0 of replica 0 is over"):
        first.ask(Exchange, name="votes", group_size=2, value="a")
    # The next generation has nothing to do with it.
    assert not Rank(coordinator, 0, generation=1).vote("a").done()


def test_a_rank_that_is_done_no_longer_watches_and_the_others_do() -> None:
    coordinator = Coordinator(3)
    first, second = Rank(coordinator, 0), Rank(coordinator, 1)
    watched, other = first.later(WatchEpoch), second.later(WatchEpoch)
    first.ask(LeaveGroup)
    assert watched.result(0) == GroupEnded()
    assert not other.done()


def test_a_step_is_drained_when_all_others_have_heard_that_it_does_not_count() -> None:
    coordinator = Coordinator(3)
    first, second, third = (Rank(coordinator, rank, size=3) for rank in range(3))
    watching = [rank.later(WatchEpoch, heard=0) for rank in (first, second, third)]
    drain = first.later(DrainStep, group_size=3, position=7)
    assert [one.result(0) for one in watching] == [StepDrained(position=7, notice=1)] * 3
    second.later(WatchEpoch, heard=1)
    assert not drain.done()
    again = third.later(DrainStep, group_size=3, position=7)  # fails in the same step
    assert not again.done()
    third.later(WatchEpoch, heard=1)
    assert drain.result(0) == Done()
    assert not again.done(), "the first rank has not said that it has heard"
    first.later(WatchEpoch, heard=1)
    assert again.result(0) == Done()
    # A later step is another matter, and one who did not listen hears of it when it asks.
    drain = second.later(DrainStep, group_size=3, position=9)
    assert not drain.done()
    assert first.ask(WatchEpoch, heard=1) == StepDrained(position=9, notice=2)


def test_an_abort_and_an_end_free_who_waits_to_drain() -> None:
    coordinator = Coordinator(3)
    first, second = Rank(coordinator, 0), Rank(coordinator, 1)
    drain = first.later(DrainStep, group_size=2, position=1)
    second.ask(AbortEpoch, reason="memory, too")
    assert drain.result(0).rank == 1
    assert first.ask(DrainStep, group_size=2, position=1).rank == 1
    drain = first.later(DrainStep, epoch=1, group_size=2, position=2)
    coordinator.end_generation(0, 0)
    assert isinstance(drain.exception(0), GroupRecoveryError)
    with pytest.raises(GroupRecoveryError):
        first.ask(DrainStep, epoch=1, group_size=2, position=2)


def test_whether_an_epoch_is_given_up_is_settled_with_the_votes() -> None:
    coordinator = Coordinator(3)
    first, second = Rank(coordinator, 0), Rank(coordinator, 1)
    first.vote("a"), second.vote("b")
    # Too late: both have been told that the connections are whole.
    assert first.ask(AbortEpoch, reason="impatience", before="votes") == EpochComplete()
    assert first.vote("c").result(0) == Exchanged(values=["a", "b"], aborted=False)
    # The abort of what comes next counts.
    assert first.ask(AbortEpoch, reason="memory", before="votes 1").rank == 0
    for rank in (first, second):
        answer = rank.later(Exchange, name="votes 1", group_size=2, value=rank.rank)
    assert answer.result(0) == Exchanged(values=[0, 1], aborted=True)


def test_old_exchanges_are_forgotten() -> None:
    coordinator = Coordinator(3)
    rank = Rank(coordinator, 0, size=1)
    for number in range(3 * _EXCHANGES_KEPT):
        rank.ask(Exchange, name=f"votes {number}", group_size=1, value=number)
    (state,) = coordinator._votes._groups.values()
    assert len(state.exchanges) == _EXCHANGES_KEPT
