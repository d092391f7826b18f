"""Lengths of samples of common types, and the order by length: a permutation, longest first, stable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.worker.batching.lengths import length_of, length_sorted_order
from tests.support.examples import examples


@given(st.lists(st.integers(0, 700), max_size=200), st.one_of(st.none(), st.integers(1, 300)))
@examples(200)
def test_every_position_once_and_longest_first_within_windows(lengths: list[int], window: int | None) -> None:
    order = length_sorted_order(lengths, window).tolist()
    size = window or max(1, len(lengths))
    for start in range(0, len(lengths), size):
        stretch = order[start : start + size]
        assert sorted(stretch) == list(range(start, min(start + size, len(lengths))))
        assert stretch == sorted(stretch, key=lambda position: (-lengths[position], position))


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
