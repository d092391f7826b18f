"""Batches cut from windows: within the limits, little padding, learning from what batches show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.worker.batching.dynamic import DynamicBatcher, padded_shape
from lightning_gpuorch.worker.batching.memory_model import BatchSizer
from tests.support.examples import examples


def cut(batcher: DynamicBatcher, lengths: Any) -> list[list[int]]:
    values = np.asarray(lengths, dtype=np.int64)
    order = batcher.order(values)
    batches, start = [], 0
    while start < len(order):
        stop = start + batcher.next_count(values[order[start:]])
        batches.append(order[start:stop].tolist())
        start = stop
    return batches


@given(st.lists(st.integers(0, 500), max_size=150), st.integers(1, 3000), st.integers(0, 500), st.integers(1, 40))
@examples(150)
def test_every_sample_once_and_within_the_limits(
    lengths: list[int], max_tokens: int, overhead: int, max_count: int
) -> None:
    batches = cut(DynamicBatcher(max_tokens, overhead_tokens=overhead, max_count=max_count), lengths)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = max(max(1, lengths[position]) for position in batch) * len(batch)
        assert len(batch) == 1 or (padded <= max_tokens and len(batch) <= max_count)


def test_a_batch_ends_where_padding_would_cost_more_than_another_step() -> None:
    lengths = [100] * 5 + [10] * 50
    assert [len(batch) for batch in cut(DynamicBatcher(4096, overhead_tokens=16), lengths)] == [5, 50]
    assert [len(batch) for batch in cut(DynamicBatcher(10**6, overhead_tokens=10**6), lengths)] == [55]
    assert [len(batch) for batch in cut(DynamicBatcher(200, overhead_tokens=16), [100] * 5)] == [2, 2, 1]


def test_padding_is_small_in_small_windows() -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(3.3, 1, 1000), 4, 256).astype(np.int64)
    batches = cut(DynamicBatcher(2048), lengths)
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    assert padded / lengths.sum() < 1.06
    assert len(batches) < 150


def test_lengths_in_other_units_are_converted_by_what_batches_were_padded_to() -> None:
    """Characters, four to a token, cut off at 256 tokens."""
    batcher = DynamicBatcher(1024)
    counts = []
    for length in (4000, 3000, 2000, 1000, 800, 400):
        counts.append(batcher.next_count(np.full(100, length)))
        tokens = min(256, length // 4)
        assert batcher.formed({"input_ids": torch.zeros(counts[-1], tokens, dtype=torch.long)}, length) == (
            counts[-1],
            tokens,
        )
    assert counts[0] == 1, "nothing was known yet: lengths are taken for tokens"
    assert counts[1] in (4, 5), "converted by the batch before"
    assert [batcher.next_count(np.full(100, length)) for length in (4000, 2000, 1000, 400)] == [4, 4, 4, 10]


def test_the_memory_model_bounds_a_batch_and_two_devices_get_different_ones() -> None:
    sizes = []
    for budget_bytes in (8e6, 2e6):
        batcher = DynamicBatcher(None, sizer=BatchSizer(budget_bytes, 512))
        for _ in range(20):
            count = batcher.next_count(np.full(600, 100))
            batcher.sizer.fitted(count, 100, 1000.0 * count * 100)
        sizes.append(batcher.next_count(np.full(600, 100)))
    assert 60 <= sizes[0] <= 80
    assert 14 <= sizes[1] <= 20


@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        (torch.zeros(3, 7), (3, 7)),
        (torch.zeros(3), (3, 1)),
        ({"labels": torch.zeros(3), "input_ids": torch.zeros(3, 9)}, (3, 9)),
        ((torch.zeros(4, 2, 5), torch.zeros(4)), (4, 10)),
        (["a", "b"], None),
        (torch.zeros(()), None),
        (object(), None),
    ],
)
def test_a_batch_shows_its_size(batch: Any, shape: Any) -> None:
    assert padded_shape(batch) == shape


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_tokens"):
        DynamicBatcher(None)
    with pytest.raises(ConfigurationError, match="max_tokens=0"):
        DynamicBatcher(0)
    for wrong in ("long", 2.5, None, -1):
        with pytest.raises(ConfigurationError, match="length_fn returned"):
            DynamicBatcher(8, length_fn=lambda sample, wrong=wrong: wrong).measure(["a"])
