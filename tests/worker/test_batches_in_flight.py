"""A batch is delivered, computed, done: when its output is copied, and when it is handed on."""

import collections

import pytest

from lightning_gpuorch.predictions.loading.source import Span
from lightning_gpuorch.predictions.loading.tickets import Ticket
from lightning_gpuorch.worker.batches_in_flight import BatchesInFlight


class Copies:
    """Copies that are made when they are begun and waited for when they are picked up, as on a device."""

    def __init__(self):
        self.log = []

    def begin(self, output):
        self.log.append(f"copy {output[0]}")
        copied, log = list(output), self.log

        class Copy:
            def result(self):
                log.append(f"wait {copied[0]}")
                return copied

        return Copy()


def _ticket(number):
    return Ticket(0, number // 2, Span(number, 1, number, [number]), number, None)


@pytest.fixture
def copies():
    return Copies()


@pytest.fixture
def kept():
    return collections.OrderedDict()


@pytest.fixture
def batches(copies, kept):
    return BatchesInFlight(copies.begin, lambda ticket, output, lost: kept.__setitem__(ticket.number, (output, lost)))


def _compute(batches, number, lost=frozenset()):
    batches.append(_ticket(number))
    batch = batches.next_delivered()
    output = [number]
    batches.computed(batch, output, lost)
    return output


def test_an_output_counts_as_it_is_when_the_batch_is_done(batches, kept):
    output = _compute(batches, 0, lost=frozenset({1}))
    output.append("by a callback")
    batches.collect()
    assert not kept, "it is not done"
    assert batches.end_computed()
    output.append("too late")
    batches.collect()
    assert kept == {0: ([0, "by a callback"], frozenset({1}))}
    assert not batches.end_computed(), "once"


def test_a_copy_begins_before_the_next_step_and_is_waited_for_after_it_has_begun(batches, copies, kept):
    for number in range(3):
        _compute(batches, number)
        batches.collect()
        copies.log.append(f"callbacks {number}")
        batches.end_computed()
    batches.collect()
    assert copies.log == [
        "callbacks 0", "copy 0", "wait 0", "callbacks 1", "copy 1", "wait 1", "callbacks 2", "copy 2", "wait 2",
    ]  # fmt: skip
    assert list(kept) == [0, 1, 2]


def test_a_batch_that_is_delivered_or_in_hand_holds_back_nothing_that_is_done(batches, kept):
    _compute(batches, 0)
    batches.end_computed()
    _compute(batches, 1)
    batches.append(_ticket(2))
    assert batches.num_delivered == 1
    assert batches.newest.number == 2
    batches.collect()
    assert list(kept) == [0]
    batches.drop_computed()
    batches.end_computed()
    batches.collect()
    assert list(kept) == [0], "the batch in hand was given up"


def test_a_rank_that_keeps_nothing_copies_nothing(kept):
    batches = BatchesInFlight(None, lambda *arguments: kept.__setitem__("any", arguments))
    _compute(batches, 0)
    assert batches.end_computed()
    batches.collect()
    assert not kept
