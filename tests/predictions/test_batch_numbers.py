"""``batch_idx``: the loader's own where there is one, and never two batches with one number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lightning_gpuorch.predictions.loading.batch_numbers import DIGEST_RANGE, number_of_dynamic_batch, number_of_span
from lightning_gpuorch.predictions.loading.source import MapSource, Span
from lightning_gpuorch.predictions.storage.layout import LoaderLayout


class Samples:
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index


@given(
    length=st.integers(1, 60), batch_size=st.integers(1, 9), chunk_size=st.integers(1, 20), isolated=st.integers(0, 60),
    width=st.integers(0, 12), skip=st.sets(st.integers(0, 60), max_size=4),
)  # fmt: skip
def test_every_span_of_a_loader_has_a_number_of_its_own(length, batch_size, chunk_size, isolated, width, skip):
    source = MapSource(DataLoader(Samples(length), batch_size=batch_size))
    layout = LoaderLayout(unit="sample", num_units=length, batch_size=batch_size, chunk_size=chunk_size)
    isolate = range(isolated, isolated + width)
    spans = [span for c in range(layout.num_chunks) for span in source.spans(layout, c, isolate, frozenset(skip))]
    numbers = {span.first_unit: number_of_span(span, layout) for span in spans}
    assert len(set(numbers.values())) == len(spans)
    for first, number in numbers.items():
        expected = first // batch_size if first % batch_size == 0 else source.num_batches + first
        assert number == expected, "it does not depend on what else is computed"


@pytest.mark.parametrize("num_units", [None, 9])
def test_where_batches_are_counted_their_count_is_the_number(num_units):
    layout = LoaderLayout(unit="batch", num_units=num_units, batch_size=None, chunk_size=2)
    assert [number_of_span(Span(n, 1, n, None), layout) for n in range(9)] == list(range(9))


def test_dynamic_batches_are_told_apart_by_what_is_in_them_and_sort_as_the_dataset():
    batches = [[3], [3, 5], [3, 6], [3, 5, 6], [4], [4, 5], *([7, n] for n in range(8, 500))]
    numbers = [number_of_dynamic_batch(batch) for batch in batches]
    assert len(set(numbers)) == len(batches)
    assert [number // DIGEST_RANGE for number in numbers] == [batch[0] for batch in batches]
    assert number_of_dynamic_batch([5, 3]) == number_of_dynamic_batch([3, 5]) == numbers[1], "the same samples"
    assert number_of_dynamic_batch([10**9]) < 2**63
