"""Leases of streams that are read by shard, as a state machine: whatever happens, every chunk is done once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lightning_gpuorch.control.leases import Owner
from lightning_gpuorch.control.messages.leases import Drain, Fenced, Lease, Pause, Stop
from lightning_gpuorch.control.shard_leases import ShardLeaseQueue
from lightning_gpuorch.predictions.storage.layout import CHUNKS_PER_SHARD, LoaderLayout
from tests.support.examples import examples

SIZE = 4
REPLICAS = 3


def layout(num_shards: int, ends: dict[int, int] | None = None) -> LoaderLayout:
    whole = LoaderLayout(unit="batch", num_units=None, batch_size=None, chunk_size=SIZE, num_shards=num_shards)
    return whole.with_ends(ends or {})


def chunks_of(shard: int, units: int) -> list[int]:
    return [shard * CHUNKS_PER_SHARD + number for number in range(-(-units // SIZE))]


class Fleet(RuleBasedStateMachine):
    """Replicas with one lane each enter shards, read on, find their ends, make chunks durable, die and come back.

    A replica knows nothing of a shard's length: it asks for the next chunk, and finds in reading whether there is one.
    """

    @initialize(
        lengths=st.lists(st.integers(0, 14), min_size=1, max_size=5),
        known=st.sets(st.integers(0, 4)),
        seed=st.randoms(use_true_random=False),
    )
    def begin(self, lengths: list[int], known: set[int], seed: Any) -> None:
        self.lengths = lengths
        every = [chunk for shard, units in enumerate(lengths) for chunk in chunks_of(shard, units)]
        done = {chunk for chunk in every if seed.random() < 0.3}
        ends = {s: lengths[s] for s in known if s < len(lengths)}
        self.queue = ShardLeaseQueue(layout(len(lengths), ends), done, is_durable=self.is_durable)
        self.files = set(done)
        self.num_resumed = len(done)
        self.every = set(every)
        self.generation = [0] * REPLICAS
        self.sequence = [0] * REPLICAS
        self.after: list[int | None] = [None] * REPLICAS
        self.was_silent = [False] * REPLICAS
        self.held: list[list[int]] = [[] for _ in range(REPLICAS)]
        self.answers: list[list[Any]] = [[] for _ in range(REPLICAS)]

    def is_durable(self, chunk: int) -> bool:
        return chunk in self.files

    def owner(self, replica: int) -> Owner:
        return replica, self.generation[replica]

    @rule(replica=st.integers(0, REPLICAS - 1))
    def take(self, replica: int) -> None:
        after = self.after[replica]
        answer = self.queue.next(self.owner(replica), self.sequence[replica], block=False, after=after).result(0)
        self.sequence[replica] += 1
        self.answers[replica].append(answer)
        if not isinstance(answer, Lease):
            self.after[replica] = None
            return
        chunk, (shard, number) = answer.chunk, divmod(answer.chunk, CHUNKS_PER_SHARD)
        assert chunk not in self.files, "leased although it is durable"
        assert all(chunk not in held for held in self.held), "leased twice"
        if after is not None and after // CHUNKS_PER_SHARD == shard and not self.was_silent[replica]:
            assert chunk > after, "a shard is read forward"
        self.after[replica], self.was_silent[replica] = chunk, False
        units = self.lengths[shard]
        if number * SIZE < units:
            self.held[replica].append(chunk)
        if (number + 1) * SIZE > units:  # fewer than there might be: that is how the end is seen
            assert self.queue.end_shard(shard, units) == units

    @precondition(lambda self: any(self.answers))
    @rule(replica=st.integers(0, REPLICAS - 1), data=st.data())
    def a_sibling_rank_repeats_a_number(self, replica: int, data: Any) -> None:
        if self.answers[replica]:
            number = data.draw(st.integers(0, len(self.answers[replica]) - 1))
            again = self.queue.next(self.owner(replica), number, block=False, after=self.after[replica])
            assert again.result(0) == self.answers[replica][number]

    @rule(replica=st.integers(0, REPLICAS - 1))
    def finish(self, replica: int) -> None:
        if self.held[replica]:
            chunk = self.held[replica].pop(0)
            self.files.add(chunk)
            self.queue.report_done(chunk)

    @rule(replica=st.integers(0, REPLICAS - 1), blame=st.booleans(), wrote=st.booleans())
    def die(self, replica: int, blame: bool, wrote: bool) -> None:
        """Possibly after a part was written, and before that was reported."""
        owner, held = self.owner(replica), self.held[replica]
        if wrote and held:
            self.files.add(held[0])
        blamed = held[-1] if blame and held else None
        self.queue.revoke(owner, blamed, None if blamed is None else (blamed * SIZE, blamed * SIZE + 2))
        assert self.queue.revoke(owner) == [], "revoking again takes nothing"
        assert self.queue.next(owner, self.sequence[replica], block=True).result(0) == Fenced()
        self.held[replica], self.answers[replica] = [], []
        self.sequence[replica], self.after[replica] = 0, None
        self.generation[replica] += 1

    @rule(replica=st.integers(0, REPLICAS - 1))
    def fall_silent(self, replica: int) -> None:
        """Its leases end, and it lives on: what it writes later is dropped, what it asks is answered."""
        self.queue.release(self.owner(replica))
        self.held[replica] = []
        self.was_silent[replica] = True

    @invariant()
    def leases_are_what_replicas_hold(self) -> None:
        if hasattr(self, "queue"):
            for replica in range(REPLICAS):
                leased = set(self.queue.leases_of(self.owner(replica)))
                assert set(self.held[replica]) <= leased
                assert all(chunk not in self.every for chunk in leased - set(self.held[replica])), "leased and lost"

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        for replica in range(REPLICAS):
            while self.held[replica]:
                self.finish(replica)
        steps, after = 0, None
        while not isinstance(answer := self.queue.next((9, 0), steps, block=False, after=after).result(0), Stop):
            steps += 1
            if isinstance(answer, Pause):
                for replica in range(REPLICAS):  # who holds nothing may still be in a shard, and ask, or die
                    self.die(replica, blame=False, wrote=False)
                after = None
                continue
            after, shard = answer.chunk, answer.chunk // CHUNKS_PER_SHARD
            units = self.lengths[shard]
            if answer.chunk in self.every:
                self.files.add(answer.chunk)
                self.queue.report_done(answer.chunk)
            if answer.chunk >= shard * CHUNKS_PER_SHARD + units // SIZE:
                self.queue.end_shard(shard, units)
            assert steps < 1000
        assert self.queue.finished
        assert self.queue.done == self.every == self.files
        assert self.queue.num_chunks == len(self.every)
        assert self.queue.num_resumed == self.num_resumed


TestFleet = Fleet.TestCase
TestFleet.settings = examples(100, stateful_step_count=40)


def take(queue: ShardLeaseQueue, owner: Owner, sequence: int, after: int | None = None) -> Any:
    return queue.next(owner, sequence, block=False, after=after).result(0)


def test_replicas_stay_in_their_shards() -> None:
    queue = ShardLeaseQueue(layout(3))
    assert [take(queue, (replica, 0), 0).chunk for replica in range(2)] == [0, CHUNKS_PER_SHARD]
    assert take(queue, (0, 0), 1, after=0).chunk == 1
    assert take(queue, (1, 0), 1, after=CHUNKS_PER_SHARD).chunk == CHUNKS_PER_SHARD + 1
    assert take(queue, (0, 0), 2).chunk == 2 * CHUNKS_PER_SHARD, "another lane of the same replica"


def test_a_shard_is_entered_again_behind_what_is_durable() -> None:
    queue = ShardLeaseQueue(layout(1))
    for sequence, after in enumerate([None, 0, 1]):
        assert take(queue, (0, 0), sequence, after).chunk == sequence
    queue.report_done(0)
    queue.revoke((0, 0))
    answer = take(queue, (1, 0), 0)
    assert (answer.chunk, answer.again) == (1, True)
    assert take(queue, (1, 0), 1, after=1).again
    assert not take(queue, (1, 0), 2, after=2).again, "nobody had that one"


def test_holes_of_an_earlier_run_are_filled_and_no_more() -> None:
    queue = ShardLeaseQueue(layout(2, {0: 17}), done={0, 2, 3, CHUNKS_PER_SHARD})
    assert take(queue, (0, 0), 0).chunk == 1
    assert take(queue, (0, 0), 1, after=1).chunk == 4
    assert take(queue, (0, 0), 2, after=4).chunk == CHUNKS_PER_SHARD + 1, "the end of the other is not known"


def test_a_drain_is_told_within_a_shard() -> None:
    queue = ShardLeaseQueue(layout(1))
    take(queue, (0, 0), 0)
    queue.drain()
    assert take(queue, (0, 0), 1, after=0) == Drain()


def test_where_a_shard_could_not_be_read_any_further_is_forgotten_with_who_gave_it_up() -> None:
    queue = ShardLeaseQueue(layout(1))
    take(queue, (0, 0), 0)
    queue.end_shard(0, 3, is_readable=False)
    assert not queue.finished
    queue.revoke((0, 0))
    assert queue.ends == {}
    assert take(queue, (1, 0), 0).chunk == 0
    queue.end_shard(0, 3, is_readable=False)
    queue.report_done(0)
    assert queue.finished
    queue.revoke((1, 0))
    assert queue.finished, "its report has told what it gave up"


def test_a_shard_that_ends_elsewhere_than_before_is_told() -> None:
    queue = ShardLeaseQueue(layout(1, {0: 5}))
    assert queue.end_shard(0, 6) == 5


@pytest.mark.parametrize("num_shards", [0, 1])
def test_a_stream_without_samples_is_finished_at_once(num_shards: int) -> None:
    queue = ShardLeaseQueue(layout(num_shards, dict.fromkeys(range(num_shards), 0)))
    assert queue.finished
    assert take(queue, (0, 0), 0) == Stop()


def test_a_replica_that_waits_gets_the_shard_that_comes_back() -> None:
    queue = ShardLeaseQueue(layout(1))
    take(queue, (0, 0), 0)
    assert take(queue, (1, 0), 0) == Pause()
    waiting = queue.next((1, 0), 1, block=True)
    assert not waiting.done()
    queue.revoke((0, 0))
    assert waiting.result(0).chunk == 0


def test_shards_in_which_workers_die_come_last() -> None:
    queue = ShardLeaseQueue(layout(3), max_chunk_failures=2)
    take(queue, (0, 0), 0)
    queue.revoke((0, 0), blamed=0, position=(0, 1))
    chunks = [take(queue, (1, 0), sequence).chunk for sequence in range(3)]
    assert chunks == [CHUNKS_PER_SHARD, 2 * CHUNKS_PER_SHARD, 0]
