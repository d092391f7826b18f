"""Dataset indices as runs: each index where its first batch has it, whatever overlaps."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch.predictions.reading.index_runs import Integers, runs_of
from tests.support.examples import examples

INDICES = st.one_of(
    st.builds(lambda start, length: range(start, start + length), st.integers(0, 30), st.integers(0, 12)),
    st.lists(st.integers(0, 40), max_size=8).map(lambda listed: np.array(listed, np.int64)),
)


@given(st.lists(INDICES, max_size=8), st.integers(0, 45), st.integers(0, 45))
@examples(300)
def test_every_index_is_found_where_its_first_batch_has_it(
    batches: list[range | Integers], start: int, stop: int
) -> None:
    expected: dict[int, tuple[int, int]] = {}
    for place, indices in enumerate(batches):
        for row, index in enumerate(indices):
            expected.setdefault(int(index), (place, row))
    runs = runs_of(batches)
    present = sorted(expected)
    assert [i for a, b in zip(runs.starts, runs.stops, strict=True) for i in range(a, b)] == present

    def walked(pieces) -> list[tuple[int, int]]:
        return [(place, row) for place, first, end in pieces for row in range(first, end)]

    assert walked(runs.between(start, stop)) == [expected[index] for index in present if start <= index < stop]
    assert walked(runs.at_positions(start, stop)) == [expected[index] for index in present[start : max(start, stop)]]
    assert [i for hole in runs.holes(45) for i in hole] == [index for index in range(45) if index not in expected]
