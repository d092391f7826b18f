"""The coordinator's part in the recovery of a group: who is told what, and when."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_gpuorch.control.transport import LocalChannel, Message
from lightning_gpuorch.control.votes import _EXCHANGES_KEPT, RecoveryLedger
from lightning_gpuorch.errors import ControlPlaneTimeoutError, GroupRecoveryError


class Rank:
    """Asks as a rank of the group would, over a real channel."""

    def __init__(self, ledger: RecoveryLedger, rank: int, generation: int = 0, size: int = 2):
        self.ledger, self.size = ledger, size
        self.owner = {"replica": 0, "generation": generation, "rank": rank}
        self.channel = LocalChannel(self)  # type: ignore[arg-type]

    def handle(self, request: Message) -> Any:
        return self.ledger.handle(request.header)

    def ask(self, step: str, epoch: int = 0, **fields: Any) -> dict[str, Any]:
        header = {"step": step, **self.owner, "epoch": epoch, **fields}
        return self.channel.call(header, timeout_seconds=0.05).header

    def later(self, step: str, epoch: int = 0, **fields: Any) -> Any:
        return self.ledger.handle({"step": step, **self.owner, "epoch": epoch, **fields})

    def vote(self, value: Any, epoch: int = 0) -> Any:
        return self.later("exchange", epoch, name="votes", size=self.size, value=value)


def test_the_first_to_leave_an_epoch_is_the_one_all_hear_of() -> None:
    ledger = RecoveryLedger()
    first, second = Rank(ledger, 0), Rank(ledger, 1)
    watched = second.later("watch")
    assert not watched.done()
    assert first.ask("abort", reason="memory")["aborted"]["rank"] == 0
    assert watched.result(0).header["aborted"] == {"rank": 0, "reason": "memory"}
    assert second.ask("abort", reason="memory, too")["aborted"]["rank"] == 0
    assert second.ask("watch")["aborted"]["rank"] == 0
    with pytest.raises(ControlPlaneTimeoutError):
        second.ask("watch", epoch=1)


def test_votes_are_handed_out_when_all_are_in_and_may_be_repeated() -> None:
    ledger = RecoveryLedger()
    first, second = Rank(ledger, 0), Rank(ledger, 1)
    waiting = second.vote("b")
    again = second.vote("b")
    assert not waiting.done()
    assert first.vote("a").result(0).header["values"] == ["a", "b"]
    assert waiting.result(0).header["values"] == again.result(0).header["values"] == ["a", "b"]
    assert first.vote("a").result(0).header["values"] == ["a", "b"]


def test_nobody_waits_for_a_rank_that_is_known_to_be_gone() -> None:
    ledger = RecoveryLedger()
    first = Rank(ledger, 0)
    waiting, watched = first.vote("a"), first.later("watch")
    ledger.end_generation(0, 0)
    assert waiting.result(0).header["error"]["type"] == "GroupRecoveryError"
    assert watched.result(0).header == {"over": True}
    with pytest.raises(GroupRecoveryError, match="generation 0 of replica 0 is over"):
        first.ask("exchange", name="votes", size=2, value="a")
    # The next generation has nothing to do with it.
    assert not Rank(ledger, 0, generation=1).vote("a").done()


def test_a_rank_that_is_done_no_longer_watches_and_the_others_do() -> None:
    ledger = RecoveryLedger()
    first, second = Rank(ledger, 0), Rank(ledger, 1)
    watched, other = first.later("watch"), second.later("watch")
    first.ask("leave")
    assert watched.result(0).header == {"over": True}
    assert not other.done()


def test_a_step_is_drained_when_all_others_have_heard_that_it_does_not_count() -> None:
    ledger = RecoveryLedger()
    first, second, third = (Rank(ledger, rank, size=3) for rank in range(3))
    watching = [rank.later("watch", heard=0) for rank in (first, second, third)]
    drain = first.later("drain", size=3, position=7)
    assert [one.result(0).header for one in watching] == [{"drained": 7, "heard": 1}] * 3
    second.later("watch", heard=1)
    assert not drain.done()
    again = third.later("drain", size=3, position=7)  # fails in the same step
    assert not again.done()
    third.later("watch", heard=1)
    assert drain.result(0).header == {}
    assert not again.done(), "the first rank has not said that it has heard"
    first.later("watch", heard=1)
    assert again.result(0).header == {}
    # A later step is another matter, and one who did not listen hears of it when it asks.
    drain = second.later("drain", size=3, position=9)
    assert not drain.done()
    assert first.ask("watch", heard=1) == {"drained": 9, "heard": 2}


def test_an_abort_and_an_end_free_who_waits_to_drain() -> None:
    ledger = RecoveryLedger()
    first, second = Rank(ledger, 0), Rank(ledger, 1)
    drain = first.later("drain", size=2, position=1)
    second.ask("abort", reason="memory, too")
    assert drain.result(0).header["aborted"]["rank"] == 1
    assert first.ask("drain", size=2, position=1)["aborted"]["rank"] == 1
    drain = first.later("drain", epoch=1, size=2, position=2)
    ledger.end_generation(0, 0)
    assert drain.result(0).header["error"]["type"] == "GroupRecoveryError"
    with pytest.raises(GroupRecoveryError):
        first.ask("drain", epoch=1, size=2, position=2)


def test_whether_an_epoch_is_given_up_is_settled_with_the_votes() -> None:
    ledger = RecoveryLedger()
    first, second = Rank(ledger, 0), Rank(ledger, 1)
    first.vote("a"), second.vote("b")
    # Too late: both have been told that the connections are whole.
    assert first.ask("abort", reason="impatience", before="votes")["aborted"] is None
    assert first.vote("c").result(0).header == {"values": ["a", "b"], "aborted": False}
    # The abort of what comes next counts.
    assert first.ask("abort", reason="memory", before="votes 1")["aborted"]["rank"] == 0
    for rank in (first, second):
        answer = rank.later("exchange", name="votes 1", size=2, value=rank.owner["rank"])
    assert answer.result(0).header == {"values": [0, 1], "aborted": True}


def test_old_exchanges_are_forgotten() -> None:
    ledger = RecoveryLedger()
    rank = Rank(ledger, 0, size=1)
    for number in range(3 * _EXCHANGES_KEPT):
        rank.ask("exchange", name=f"votes {number}", size=1, value=number)
    (state,) = ledger._groups.values()
    assert len(state.exchanges) == _EXCHANGES_KEPT
