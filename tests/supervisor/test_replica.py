"""The states of a replica: the table itself, and random histories that never leave it."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lightning_gpuorch.supervisor.replica import (
    TRANSITIONS,
    IllegalTransitionError,
    NodeReplicas,
    Replica,
    ReplicaState,
)
from tests.support.examples import examples

CHECKING, RUNNING, DRAINING = ReplicaState.CHECKING, ReplicaState.RUNNING, ReplicaState.DRAINING
RESTARTING, RETIRED, DONE = ReplicaState.RESTARTING, ReplicaState.RETIRED, ReplicaState.DONE

STEPS = {
    CHECKING: lambda replica: replica.check(),
    RUNNING: lambda replica: replica.run(),
    DRAINING: lambda replica: replica.drain("ECC errors", 1.0),
    RESTARTING: lambda replica: replica.restart(replica.generation + 1),
    RETIRED: lambda replica: replica.retire(1),
    DONE: lambda replica: [replica.end_rank(rank, 0) for rank in replica.live_ranks or replica.ranks],
}


def _replica(state: ReplicaState) -> Replica:
    ended = {0: 1, 1: 1} if not TRANSITIONS[state] else {}
    return Replica(0, [0, 1], state=state, exit_codes=ended)


@pytest.mark.parametrize("after", ReplicaState)
@pytest.mark.parametrize("before", ReplicaState)
def test_what_the_table_allows_is_done_and_everything_else_raises(before: ReplicaState, after: ReplicaState):
    replica = _replica(before)
    if after in TRANSITIONS[before]:
        STEPS[after](replica)
        assert replica.state is after
    else:
        with pytest.raises(IllegalTransitionError):
            STEPS[after](replica)
        assert replica.state is before


def test_the_table_as_it_is_meant():
    assert {(a.name, b.name) for a in TRANSITIONS for b in TRANSITIONS[a]} == {
        ("CHECKING", "RUNNING"), ("CHECKING", "RESTARTING"), ("CHECKING", "RETIRED"), ("CHECKING", "DONE"),
        ("RUNNING", "DRAINING"), ("RUNNING", "RESTARTING"), ("RUNNING", "RETIRED"), ("RUNNING", "DONE"),
        ("DRAINING", "RESTARTING"), ("DRAINING", "RETIRED"), ("DRAINING", "DONE"),
        ("RESTARTING", "CHECKING"), ("RESTARTING", "RETIRED"), ("RESTARTING", "DONE"),
    }  # fmt: skip
    assert set(TRANSITIONS) == set(ReplicaState)


def test_the_last_rank_that_ends_ends_the_replica():
    replica = _replica(RUNNING)
    replica.end_rank(1, 0)
    assert (replica.state, replica.live_ranks) == (RUNNING, [0])
    with pytest.raises(IllegalTransitionError, match="ends twice"):
        replica.end_rank(1, 1)
    replica.end_rank(0, 75)
    assert (replica.state, replica.exit_codes) == (DONE, {1: 0, 0: 75})


def test_a_replica_that_shrinks_keeps_its_first_ranks_in_the_next_generation():
    replica = Replica(1, [4, 5, 6, 7], generation=2, state=RUNNING)
    assert replica.shrink(2) == [6, 7]
    assert (replica.ranks, replica.generation, replica.shrunk, replica.state) == ([4, 5], 3, (2, 4), RESTARTING)


def test_a_replica_restarts_whole_also_with_ranks_that_have_ended():
    replica = _replica(RUNNING)
    replica.end_rank(0, 0)
    replica.restart(1)
    assert (replica.live_ranks, replica.exit_codes) == ([0, 1], {})


def test_ranks_share_their_fate_until_the_tensor_parallel_size_is_known():
    replicas = NodeReplicas(range(4, 8))
    assert replicas.group_of(5, gang=False) == [4, 5, 6, 7]
    for replica in replicas:
        replica.check()
    replicas.cut(None)
    assert len(list(replicas)) == 4
    replicas.cut(2)
    assert [(r.index, r.ranks, r.state) for r in replicas] == [(2, [4, 5], CHECKING), (3, [6, 7], CHECKING)]
    assert replicas.group_of(5, gang=False) == [4, 5]
    assert replicas.group_of(5, gang=True) == [4, 5, 6, 7]


def test_what_has_ended_before_the_size_was_known_stays_ended():
    replicas = NodeReplicas(range(4))
    for replica in replicas:
        replica.check()
        replica.run()
    replicas.end([1, 2, 3], 0)
    replicas.cut(2)
    first, second = replicas
    assert (first.state, first.live_ranks, second.state) == (RUNNING, [0], DONE)
    assert replicas.exit_codes == {1: 0, 2: 0, 3: 0}
    assert replicas.group_of(0, gang=False, with_ended=True) == [0, 1]


class Histories(RuleBasedStateMachine):
    """What can happen to the replicas of a node, in any order."""

    @initialize(size=st.sampled_from([None, 1, 2]))
    def begin(self, size: int | None):
        self.replicas = NodeReplicas(range(4), size)
        self.running: set[int] = set()
        self.over: set[int] = set()
        for replica in self.replicas:
            replica.check()

    def _pick(self, data: st.DataObject, *states: ReplicaState) -> list[Replica]:
        """A replica in one of these states, with all that share its fate."""
        found = [r for replica in self.replicas if replica.state in states for r in replica.live_ranks]
        if not found:
            return []
        group = self.replicas.group_of(data.draw(st.sampled_from(found)), gang=False)
        return self.replicas.replicas_of(group)

    def _kill(self, replicas: list[Replica]):
        self.running -= {rank for replica in replicas for rank in replica.ranks}

    @rule(size=st.sampled_from([1, 2]))
    def size_is_known(self, size: int):
        self.replicas.cut(size)

    @rule(data=st.data())
    def devices_are_good(self, data: st.DataObject):
        for replica in self._pick(data, CHECKING):
            if replica.state is CHECKING:
                replica.run()
                self.running |= set(replica.live_ranks)

    @rule(data=st.data())
    def worker_dies(self, data: st.DataObject):
        chosen = self._pick(data, RUNNING, DRAINING)
        self._kill(chosen)
        for replica in chosen:
            replica.restart(replica.generation + 1)
            replica.check()

    @rule(data=st.data(), code=st.sampled_from([0, 65, 75]))
    def worker_ends(self, data: st.DataObject, code: int):
        if self.running:
            rank = data.draw(st.sampled_from(sorted(self.running)))
            self.running.discard(rank)
            self.replicas.end([rank], code)

    @rule(data=st.data())
    def device_is_about_to_fail(self, data: st.DataObject):
        for replica in self._pick(data, RUNNING)[:1]:
            if replica.state is RUNNING:
                replica.drain("ECC errors", 1.0)

    @rule(data=st.data())
    def device_is_condemned_without_a_spare(self, data: st.DataObject):
        chosen = self._pick(data, CHECKING, RUNNING, DRAINING)
        self._kill(chosen)
        for replica in chosen:
            replica.retire(1)

    @rule()
    def last_replica_shrinks(self):
        live = [replica for replica in self.replicas if not replica.is_over]
        if len(live) == 1 and len(live[0].live_ranks) == len(live[0].ranks) == 2:
            self._kill(live)
            live[0].shrink(1)
            live[0].check()

    @rule()
    def gang_restarts(self):
        self.running.clear()
        for replica in self.replicas:
            if not replica.is_over:
                replica.restart(replica.generation + 1)
                replica.check()

    @rule()
    def stop(self):
        self.running.clear()
        for replica in self.replicas:
            self.replicas.end(replica.live_ranks, 75)

    @invariant()
    def nothing_starts_again(self):
        if not hasattr(self, "replicas"):
            return
        for replica in self.replicas:
            for rank in replica.exit_codes:
                assert rank not in self.running
            if replica.is_over:
                self.over |= set(replica.ranks)
            assert replica.is_over == (replica.state in (RETIRED, DONE)) == (not replica.live_ranks)
        assert self.over <= set(self.replicas.exit_codes)

    @invariant()
    def a_replica_that_is_over_refuses_everything(self):
        for replica in getattr(self, "replicas", []):
            for step in STEPS.values() if replica.is_over else ():
                with pytest.raises(IllegalTransitionError):
                    step(replica)

    def teardown(self):
        if hasattr(self, "replicas"):
            self.running.clear()
            for replica in self.replicas:
                self.replicas.end(replica.live_ranks, 75)
            assert {replica.state for replica in self.replicas} <= {RETIRED, DONE}


TestHistories = Histories.TestCase
TestHistories.settings = examples(60, stateful_step_count=25, deadline=None)
