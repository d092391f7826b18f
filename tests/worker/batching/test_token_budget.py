"""Token-budget batches: every position once, within the budget, little padding, the same everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.worker.batching.memory_model import BatchSizer
from lightning_gpuorch.worker.batching.token_budget import (
    TokenBudgetBatcher,
    batch_stream,
    length_of,
    length_sorted_order,
    measure_lengths,
)

some_lengths = st.lists(st.integers(0, 700), max_size=200)


def padded(lengths: Any, batch: list[int]) -> int:
    return max(max(1, lengths[p]) for p in batch) * len(batch)


@given(some_lengths, st.integers(1, 4000), st.integers(1, 64), st.one_of(st.none(), st.integers(1, 300)))
@settings(max_examples=200)
def test_every_position_once_and_within_the_limits(
    lengths: list[int], max_tokens: int, max_count: int, window: int | None
) -> None:
    batcher = TokenBudgetBatcher(lengths, max_tokens, max_count, window)
    batches = list(batcher)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= max_count
        assert padded(lengths, batch) <= max_tokens or len(batch) == 1
    assert batches == list(TokenBudgetBatcher(np.array(lengths, dtype=np.int64), max_tokens, max_count, window))


@given(some_lengths, st.integers(1, 50), st.integers(1, 4000))
@settings(max_examples=100)
def test_a_stream_gives_each_sample_with_its_position(lengths: list[int], window: int, max_tokens: int) -> None:
    samples = [b"x" * length for length in lengths]
    seen: list[int] = []
    for batch in batch_stream(iter(samples), max_tokens, window=window):
        assert len({position // window for position, _ in batch}) == 1
        assert not seen or seen[-1] // window <= batch[0][0] // window
        for position, sample in batch:
            assert sample == samples[position]
            seen.append(position)
    assert sorted(seen) == list(range(len(samples)))


def test_a_stream_is_not_read_further_than_a_window() -> None:
    read = []

    def samples() -> Any:
        for number in range(1000):
            read.append(number)
            yield b"x" * (number % 7)

    next(batch_stream(samples(), 100, window=16))
    assert len(read) == 16


@given(some_lengths.filter(len), st.data())
@settings(max_examples=60)
def test_chunks_of_positions_are_cut_alone(lengths: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(lengths) - 1))
    stop = data.draw(st.integers(start, len(lengths)))
    batcher = TokenBudgetBatcher(lengths, 1000)
    assert sorted(p for batch in batcher.batches(range(start, stop)) for p in batch) == list(range(start, stop))


def test_longest_first_and_stable() -> None:
    assert length_sorted_order([3, 9, 3, 9, 1]).tolist() == [1, 3, 0, 2, 4]
    assert length_sorted_order([3, 9, 3, 9, 1], window=2).tolist() == [1, 0, 3, 2, 4]
    assert length_sorted_order([]).tolist() == []
    assert next(iter(TokenBudgetBatcher([1, 5, 9, 9], 18))) == [2, 3]


def test_padding_is_small_on_skewed_lengths() -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(4, 1, 20_000), 4, 512).astype(np.int64)
    tokens = lengths.sum()

    def cost(batches: Any) -> float:
        return sum(padded(lengths, batch) for batch in batches) / tokens

    unsorted = cost(list(range(i, i + 32)) for i in range(0, 20_000, 32))
    assert unsorted > 2.5
    assert cost(TokenBudgetBatcher(lengths, 8192)) < 1.02
    assert cost(TokenBudgetBatcher(lengths, 8192, window=2048)) < 1.1


def test_results_return_to_the_datasets_order() -> None:
    lengths = [5, 1, 8, 3, 3, 9]
    results = np.empty(len(lengths), dtype=np.int64)
    for batch in TokenBudgetBatcher(lengths, 12):
        results[batch] = [lengths[position] * 10 for position in batch]
    assert results.tolist() == [length * 10 for length in lengths]


def test_each_replica_cuts_for_its_own_device() -> None:
    large, small = BatchSizer(8e6, 64), BatchSizer(2e6, 64)
    for sizer in (large, small):
        for count in (1, 2, 4, 8, 16, 32):
            if 1000.0 * count * 100 < sizer.budget_bytes:
                sizer.fitted(count, 100, 1000.0 * count * 100)
    lengths = [100] * 200
    counts = [
        max(len(batch) for batch in TokenBudgetBatcher(lengths, 10**6, count_for=sizer.choose))
        for sizer in (large, small)
    ]
    assert counts[0] > 3 * counts[1]


@pytest.mark.parametrize(
    ("sample", "length"),
    [
        ("hello", 1),
        ("unbelievably, f(x) == 12", 10),
        (b"ab", 2),
        ([1, 2, 3], 3),
        (["a", "b"], 2),
        (range(4), 4),
        (torch.zeros(7), 7),
        (torch.zeros(3, 4), 12),
        (np.zeros(9), 9),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, 2),
        ({"label": 3, "text": "a b c"}, 3),
        (("a bc", 1), 2),
        ((torch.zeros(6), torch.tensor(1)), 6),
    ],
)
def test_lengths_of_common_samples(sample: Any, length: int) -> None:
    assert length_of(sample) == length


@pytest.mark.parametrize("sample", [3, None, {"id": 4, "blob": object()}, object()])
def test_an_unknown_sample_asks_for_a_length_fn(sample: Any) -> None:
    with pytest.raises(ConfigurationError, match="length_fn"):
        length_of(sample)


def test_lengths_of_a_dataset() -> None:
    assert measure_lengths(["a", "b b b", "c c"]).tolist() == [1, 3, 2]
    assert measure_lengths([{"n": 4}, {"n": 2}], [1], length_fn=lambda sample: sample["n"]).tolist() == [2]


@pytest.mark.parametrize("option", ["max_tokens", "max_count", "window"])
def test_limits_below_one_are_refused(option: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{option}=0"):
        TokenBudgetBatcher([1], **{"max_tokens": 10, option: 0})
