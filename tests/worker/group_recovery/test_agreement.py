"""What the ranks of a group decide after a fault, and that it keeps them together, without processes."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch.worker.group_recovery.agreement import Cause, GroupAction, Vote, decide

MAX_TRIES = 2


def verdict(*votes: Vote) -> tuple[GroupAction, int]:
    decision = decide(votes, MAX_TRIES)
    return decision.verdict, decision.position


def vote(rank: int, position: int, cause: Cause = Cause.PEER, **more: object) -> Vote:
    return Vote(rank, position, cause, **more)  # type: ignore[arg-type]


def test_memory_that_ran_out_on_one_rank_makes_all_cut() -> None:
    decision = decide([vote(0, 7), vote(1, 7, Cause.OUT_OF_MEMORY, message="no room"), vote(2, 7)], MAX_TRIES)
    assert (decision.verdict, decision.position, decision.culprits) == (GroupAction.SMALLER, 7, (1,))
    assert "rank 1" in decision.reason
    assert "no room" in decision.reason


def test_a_rank_that_waits_for_the_end_of_an_attempt_takes_it_as_complete_when_another_is_further() -> None:
    votes = vote(0, 4, Cause.COLLECTIVE, computed=True), vote(1, 5)
    assert verdict(*votes) == (GroupAction.RETRY, 5)
    votes = vote(0, 4, computed=True), vote(1, 5, Cause.OUT_OF_MEMORY)
    assert verdict(*votes) == (GroupAction.SMALLER, 5)


def test_what_all_have_computed_is_kept() -> None:
    assert verdict(vote(0, 3, Cause.COLLECTIVE, computed=True), vote(1, 3, computed=True)) == (GroupAction.COMPLETE, 3)
    assert verdict(vote(0, 3, Cause.COLLECTIVE, computed=True), vote(1, 3)) == (GroupAction.RETRY, 3)


def test_an_error_of_the_step_is_never_retried() -> None:
    for other in (Cause.PEER, Cause.OUT_OF_MEMORY, Cause.TIMEOUT, Cause.COLLECTIVE):
        decision = decide([vote(0, 1, other), vote(1, 1, Cause.ERROR, message="a bug", exit_code=78)], MAX_TRIES)
        assert (decision.verdict, decision.culprits, decision.exit_code) == (GroupAction.FAIL, (1,), 78)


@pytest.mark.parametrize("cause", [Cause.TIMEOUT, Cause.COLLECTIVE])
def test_communication_is_retried_a_bounded_number_of_times(cause: Cause) -> None:
    tries = 0
    for _ in range(MAX_TRIES):
        decision = decide([vote(0, 1, cause, tries=tries), vote(1, 1, tries=tries)], MAX_TRIES)
        assert decision.verdict is GroupAction.RETRY
        tries = decision.tries
    assert verdict(vote(0, 1, cause, tries=tries), vote(1, 1, tries=tries)) == (GroupAction.RESTART, 1)


def test_memory_does_not_use_up_the_tries_of_communication() -> None:
    assert verdict(vote(0, 1, Cause.OUT_OF_MEMORY, tries=MAX_TRIES), vote(1, 1)) == (GroupAction.SMALLER, 1)


def test_ranks_that_run_different_programs_are_restarted() -> None:
    assert verdict(vote(0, 1, computed=True), vote(1, 3)) == (GroupAction.RESTART, 3)
    assert verdict(vote(0, 2), vote(1, 3)) == (GroupAction.RESTART, 3)


votes_of_a_group = st.lists(
    st.tuples(
        st.integers(1, 4), st.sampled_from(list(Cause)), st.booleans(), st.integers(0, 3), st.sampled_from(["", "x"])
    ),
    min_size=1,
    max_size=4,
).map(lambda rows: [Vote(rank, *row) for rank, row in enumerate(rows)])


@given(votes_of_a_group)
def test_the_order_of_votes_does_not_matter_and_they_survive_the_way(votes: list[Vote]) -> None:
    expected = decide(votes, MAX_TRIES)
    for order in itertools.permutations(votes):
        assert decide(order, MAX_TRIES) == expected
    assert [Vote.from_dict(one.to_dict()) for one in votes] == votes
    assert expected.position == max(one.position for one in votes)


class SimulatedRank:
    """A rank as the recovery runs it, reduced to what the protocol sees."""

    def __init__(self, rank: int):
        self.rank, self.position, self.tries = rank, 1, 0
        self.computed = self.done = False
        self.foreseen: tuple[GroupAction, int] | None = None
        self.log: list[tuple[int, str]] = []

    def finish(self, outcome: str) -> None:
        self.log.append((self.position, outcome))
        self.position, self.tries, self.computed = self.position + 1, 0, False
        if self.foreseen is not None:
            (what, tries), self.foreseen = self.foreseen, None
            self.apply(what, tries)

    def apply(self, what: GroupAction, tries: int) -> None:
        if what is GroupAction.RETRY:
            self.tries, self.computed = tries, False
        else:
            self.finish({GroupAction.COMPLETE: "output", GroupAction.SMALLER: "out of memory"}.get(what, "end"))
            self.done = self.done or what in (GroupAction.FAIL, GroupAction.RESTART)


@given(st.integers(2, 4), st.integers(0, 10**6))
def test_whatever_fails_when_all_ranks_see_the_same_outcome_of_every_attempt(size: int, seed: int) -> None:
    """Random faults at random moments, also between one rank's and another's end of the same attempt."""
    draw = random.Random(seed)
    ranks = [SimulatedRank(rank) for rank in range(size)]
    for _ in range(60):
        if any(one.done for one in ranks):
            break
        # A moment: some have computed; if all had, some of them may have noticed.
        for one in ranks:
            if one.position == min(other.position for other in ranks):
                one.computed = one.computed or draw.random() < 0.6
        behind = min(one.position for one in ranks)
        here = [one for one in ranks if one.position == behind]
        if all(one.computed for one in here) or len(here) < size:
            for one in draw.sample(here, draw.randint(0, len(here))):
                one.finish("output")
        if draw.random() < 0.5:
            continue
        # A fault on some ranks; a rank that has computed can only be hit by communication.
        votes = []
        for one in ranks:
            causes = [Cause.PEER, Cause.COLLECTIVE, Cause.TIMEOUT]
            if not one.computed:
                causes += [Cause.OUT_OF_MEMORY] * 3 + ([Cause.ERROR] if draw.random() < 0.1 else [])
            votes.append(Vote(one.rank, one.position, draw.choice(causes), one.computed, one.tries))
        decision = decide(votes, MAX_TRIES)
        for one in ranks:
            if decision.position > one.position:
                one.foreseen = (decision.verdict, decision.tries)
                one.finish("output")
            else:
                one.apply(decision.verdict, decision.tries)
    shortest = min(len(one.log) for one in ranks)
    logs = {tuple(one.log[:shortest]) for one in ranks}
    assert len(logs) == 1, [one.log for one in ranks]
    assert max(len(one.log) for one in ranks) - shortest <= 1
