"""The lease queue as a state machine: whatever the order of events, every chunk is done once."""

import collections
import random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lightning_gpuorch.control.leases import LeaseQueue
from lightning_gpuorch.control.messages.leases import Drain, Fenced, Lease, Stop
from lightning_gpuorch.predictions.storage.layout import LoaderLayout
from tests.support.examples import examples

CHUNKS, SIZE = 12, 4


def queue_of(num_chunks, chunk_size, *arguments, **options):
    num_units = None if num_chunks is None else num_chunks * chunk_size
    layout = LoaderLayout(unit="batch", num_units=num_units, batch_size=None, chunk_size=chunk_size)
    return LeaseQueue(layout, *arguments, **options)


class Fleet(RuleBasedStateMachine):
    """Replicas take, finish, repeat, die and come back, in any order."""

    def __init__(self):
        super().__init__()
        self.queue = queue_of(CHUNKS, SIZE, done={3})
        self.generation = [0, 0, 0]
        self.sequence = [0, 0, 0]
        self.held = [[], [], []]
        self.answers = [[], [], []]

    def owner(self, replica):
        return replica, self.generation[replica]

    @rule(replica=st.integers(0, 2))
    def take(self, replica):
        answer = self.queue.next(self.owner(replica), self.sequence[replica], block=False).result(0)
        self.sequence[replica] += 1
        self.answers[replica].append(answer)
        if isinstance(answer, Lease):
            others = [c for r in range(3) for c in self.held[r]]
            assert answer.chunk not in others, "leased twice"
            assert answer.chunk not in self.queue.done, "leased although it is done"
            self.held[replica].append(answer.chunk)

    @precondition(lambda self: any(self.answers))
    @rule(replica=st.integers(0, 2), data=st.data())
    def a_sibling_rank_repeats_a_number(self, replica, data):
        if self.answers[replica]:
            number = data.draw(st.integers(0, len(self.answers[replica]) - 1))
            assert self.queue.next(self.owner(replica), number, block=False).result(0) == self.answers[replica][number]

    @rule(replica=st.integers(0, 2))
    def finish(self, replica):
        if self.held[replica]:
            self.queue.report_done(self.held[replica].pop(0))

    @rule(replica=st.integers(0, 2), blame=st.booleans())
    def die(self, replica, blame):
        owner = self.owner(replica)
        blamed = self.held[replica][0] if blame and self.held[replica] else None
        back = self.queue.revoke(owner, blamed, (blamed * SIZE, blamed * SIZE + 2) if blamed is not None else None)
        assert sorted(back) == sorted(self.held[replica])
        assert self.queue.revoke(owner) == [], "revoking again takes nothing"
        assert self.queue.next(owner, self.sequence[replica], block=True).result(0) == Fenced()
        self.held[replica], self.answers[replica] = [], []
        self.sequence[replica] = 0
        self.generation[replica] += 1

    @invariant()
    def leases_are_what_replicas_hold(self):
        for replica in range(3):
            assert self.queue.leases_of(self.owner(replica)) == self.held[replica]

    def teardown(self):
        for replica in range(3):
            while self.held[replica]:
                self.finish(replica)
        while True:
            answer = self.queue.next((9, 0), self._steps(), block=True).result(0)
            if isinstance(answer, Stop):
                break
            self.queue.report_done(answer.chunk)
        assert self.queue.done >= set(range(CHUNKS))

    def _steps(self):
        self._count = getattr(self, "_count", -1) + 1
        return self._count


class StreamFleet(Fleet):
    """The same on a stream: its end is found by whoever is handed a chunk behind it, and there is a part behind it."""

    def __init__(self):
        super().__init__()
        self.queue = queue_of(None, SIZE, done={3, CHUNKS + 1})

    @rule(replica=st.integers(0, 2))
    def finish(self, replica):
        if self.held[replica] and self.held[replica][0] >= CHUNKS:
            self.queue.end_stream(self.queue.layout.with_num_units(CHUNKS * SIZE))
            for held in self.held:
                held[:] = [chunk for chunk in held if chunk < CHUNKS]
            self.queue.report_done(CHUNKS)
        else:
            super().finish(replica)

    @invariant()
    def nothing_stands_for_a_chunk_that_is_not_done(self):
        assert not self.queue.finished or self.queue.done == set(range(CHUNKS))

    def teardown(self):
        self.queue.end_stream(self.queue.layout.with_num_units(CHUNKS * SIZE))
        for held in self.held:
            held[:] = [chunk for chunk in held if chunk < CHUNKS]
        super().teardown()
        assert self.queue.done == set(range(CHUNKS))


TestFleet = Fleet.TestCase
TestFleet.settings = examples(150, stateful_step_count=40)
TestStreamFleet = StreamFleet.TestCase
TestStreamFleet.settings = TestFleet.settings


def test_blocked_request_is_answered_when_a_chunk_comes_back():
    queue = queue_of(1, SIZE)
    assert queue.next((0, 0), 0, block=False).result(0).chunk == 0
    leader, follower = queue.next((1, 0), 0, block=True), queue.next((1, 0), 0, block=True)
    assert not leader.done()
    queue.revoke((0, 0))
    assert leader.result(0) == follower.result(0) == Lease(chunk=0, left=0, again=True, begun=True)


def test_blocked_request_is_answered_stop_when_all_is_done():
    queue = queue_of(1, SIZE)
    queue.next((0, 0), 0, block=False)
    waiting = queue.next((1, 0), 0, block=True)
    queue.report_done(0)
    assert waiting.result(0) == Stop()


def test_the_end_of_a_generation_ends_those_before_it():
    queue = queue_of(3, 1)
    assert [queue.next((0, 0), number, block=False).result(0).chunk for number in range(3)] == [0, 1, 2]
    waiting = queue.next((0, 0), 3, block=True)
    assert queue.revoke((0, 2)) == [0, 1, 2]
    assert waiting.result(0) == Fenced()
    assert queue.next((0, 1), 0, block=False).result(0) == Fenced()
    assert queue.must_leave((0, 0))
    assert queue.next((0, 3), 0, block=False).result(0).chunk == 0


def test_drain_tells_everybody_to_leave():
    queue = queue_of(2, SIZE)
    queue.next((0, 0), 0, block=False)
    queue.next((0, 0), 1, block=False)
    waiting = queue.next((1, 0), 0, block=True)
    queue.drain()
    assert waiting.result(0) == Drain()
    assert queue.next((0, 0), 2, block=False).result(0) == Drain()


def _lease(queue, generation, chunk):
    """Take work as one generation until the chunk comes up; returns the answer that hands it out."""
    for number in range(100):
        answer = queue.next((0, generation), number, block=False).result(0)
        if isinstance(answer, Lease) and answer.chunk == chunk:
            return answer
    raise AssertionError(f"chunk {chunk} is not handed out")


def _die(queue, generation, chunk, position):
    _lease(queue, generation, chunk)
    queue.revoke((0, generation), blamed=chunk, position=position)


def test_poison_is_isolated_then_given_up_and_the_rest_of_the_chunk_is_still_wanted():
    queue = queue_of(2, SIZE, max_chunk_failures=3)
    # deaths in a batch twice, then in a single sample of it twice
    for generation, position in enumerate([(4, 8), (4, 8), (6, 7), (6, 7)]):
        assert queue.quarantined == []
        _die(queue, generation, 1, position)
    chunk = _lease(queue, 9, 1)
    assert chunk.isolate == (4, 8)
    assert chunk.skip == (6,)
    assert [(q.start, q.stop) for q in queue.quarantined] == [(6, 7)]


def test_two_poison_samples_in_one_chunk_are_both_found():
    queue = queue_of(1, 8, max_chunk_failures=3)
    deaths = [(0, 4), (0, 4), (1, 2), (1, 2), (4, 8), (4, 8), (6, 7), (6, 7)]
    for generation, position in enumerate(deaths):
        _die(queue, generation, 0, position)
    chunk = _lease(queue, 99, 0)
    assert chunk.skip == (1, 6)
    assert chunk.isolate == (0, 8)


@pytest.mark.parametrize("seed", range(20))
def test_random_deaths_give_no_sample_up(seed):
    rng = random.Random(seed)
    queue = queue_of(1, 8, max_chunk_failures=3)
    alone = collections.Counter()
    for generation in range(6):
        answer = _lease(queue, generation, 0)
        isolate = range(*(answer.isolate or (0, 0)))
        unit = rng.randrange(8)
        if unit in isolate and alone[unit]:
            continue  # a second death of the same sample alone is no longer chance
        position = (unit, unit + 1) if unit in isolate else (unit - unit % 4, unit - unit % 4 + 4)
        alone[unit] += unit in isolate
        queue.revoke((0, generation), blamed=0, position=position)
    assert queue.quarantined == []


def test_different_samples_that_die_alone_once_are_not_given_up():
    queue = queue_of(1, SIZE, max_chunk_failures=3)  # batches of one sample: every death is a death alone
    for generation in range(SIZE):
        _die(queue, generation, 0, (generation, generation + 1))
    for generation in range(SIZE):
        _die(queue, SIZE + generation, 0, (generation, generation + 1))
    assert queue.quarantined == [], "two deaths each are fewer than max_chunk_failures"
    _die(queue, 50, 0, (2, 3))
    assert [q.start for q in queue.quarantined] == [2]


def test_a_death_outside_a_step_blames_nothing():
    queue = queue_of(1, SIZE)
    for generation in range(10):
        _die(queue, generation, 0, None)
    assert queue.faults == {}


def test_what_seems_to_kill_workers_is_handed_out_last():
    queue = queue_of(4, SIZE, max_chunk_failures=3)
    _die(queue, 0, 0, (0, 2))
    assert queue.next((0, 1), 0, block=False).result(0).chunk == 0, "one death may be chance"
    queue.revoke((0, 1), blamed=0, position=(0, 2))
    assert [queue.next((0, 2), n, block=False).result(0).chunk for n in range(4)] == [1, 2, 3, 0]


def test_a_stream_ends_where_it_is_said_to():
    queue = queue_of(None, SIZE)
    assert [queue.next((0, 0), n, block=False).result(0).chunk for n in range(3)] == [0, 1, 2]
    queue.end_stream(queue.layout.with_num_units(2 * SIZE))
    assert queue.leases_of((0, 0)) == [0, 1]
    queue.report_done(0)
    queue.report_done(1)
    assert queue.finished


@pytest.mark.parametrize("done", [set(), {0, 1}, {0, 1, 2}])
def test_resume_hands_out_only_what_is_missing(done):
    queue = queue_of(3, SIZE, done=done)
    taken = []
    while isinstance(answer := queue.next((0, 0), len(taken), block=False).result(0), Lease):
        taken.append(answer.chunk)
    assert sorted(taken) == sorted({0, 1, 2} - done)


def test_an_answer_tells_how_fast_a_replica_is_beside_those_that_are_known():
    queue = queue_of(8, 1)
    assert queue.next((0, 0), 0, False, 0.1).result(0).pace.speed == 1
    slow = queue.next((1, 0), 0, False, 0.3).result(0)
    assert slow.pace.speed == pytest.approx(0.5)
    assert slow.pace.seconds_per_sample == 0.3
    assert queue.next((0, 0), 1, False).result(0).pace.speed == pytest.approx(1.5), "it told before"
    assert queue.next((1, 0), 0, False, 9.0).result(0) == slow, "all ranks of a replica get the same answer"
    assert queue.next((2, 0), 0, False).result(0).pace is None


def test_an_exception_isolates_at_once_and_the_same_one_alone_gives_the_sample_up():
    queue = queue_of(2, SIZE, max_chunk_failures=10)
    _lease(queue, 0, 1)
    queue.revoke((0, 0), blamed=1, position=(4, 8), exception=("ValueError at a.py:3", "ValueError: too long (a.py:3)"))
    assert _lease(queue, 1, 1).isolate == (4, 8)
    queue.revoke((0, 1), blamed=1, position=(6, 7), exception=("ValueError at a.py:3", "ValueError: 9 (a.py:3)"))
    assert [(q.start, q.reason) for q in queue.quarantined] == [(6, "ValueError: 9 (a.py:3)")]
    assert _lease(queue, 2, 1).skip == (6,)


def test_different_exceptions_of_a_sample_are_no_proof():
    queue = queue_of(1, SIZE, max_chunk_failures=10)
    for generation, exception in enumerate(["ValueError at a.py:3", "OSError at b.py:9", "KeyError at c.py:1"]):
        _lease(queue, generation, 0)
        queue.revoke((0, generation), blamed=0, position=(2, 3), exception=(exception, exception))
    assert queue.quarantined == []
