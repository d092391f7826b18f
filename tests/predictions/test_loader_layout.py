"""The arithmetic of units, chunks and batches."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.predictions import LoaderLayout, StoredBatch


def samples(num_units: int | None, batch_size: int, chunk_size: int) -> LoaderLayout:
    return LoaderLayout(unit="sample", num_units=num_units, batch_size=batch_size, chunk_size=chunk_size)


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 60))
def test_chunks_and_batches_cover_every_unit_once(num_units: int, batch_size: int, chunk_size: int) -> None:
    layout = samples(num_units, batch_size, chunk_size)
    chunks = [layout.chunk_range(chunk) for chunk in range(layout.num_chunks)]
    assert list(itertools.chain(*chunks)) == list(range(num_units))
    assert all(chunks)
    batches = [layout.batch_range(batch) for batch in range(layout.num_batches)]
    assert list(itertools.chain(*batches)) == list(range(num_units))
    for chunk, units in enumerate(chunks):
        pieces = list(layout.batches_of_chunk(chunk))
        assert list(itertools.chain(*pieces)) == list(units)
        assert all(piece.start // batch_size == piece[-1] // batch_size for piece in pieces)


def test_chunks_that_are_no_multiples_of_batches_cut_them() -> None:
    assert list(samples(20, 4, 10).batches_of_chunk(1)) == [range(10, 12), range(12, 16), range(16, 20)]


def test_batches_as_units() -> None:
    layout = LoaderLayout(unit="batch", num_units=5, batch_size=None, chunk_size=2)
    assert (layout.num_batches, layout.num_chunks, layout.batch_range(3)) == (5, 3, range(3, 4))
    assert list(layout.batches_of_chunk(2)) == [range(4, 5)]


def test_a_stream_gets_its_end_later() -> None:
    stream = LoaderLayout(unit="batch", num_units=None, batch_size=None, chunk_size=4)
    assert (stream.num_chunks, stream.num_batches, stream.chunk_range(2)) == (0, 0, range(8, 12))
    ended = stream.with_num_units(9)
    assert (ended.num_chunks, ended.num_batches, ended.chunk_range(2)) == (3, 9, range(8, 9))


def test_beyond_the_end_there_is_nothing() -> None:
    layout = samples(10, 4, 8)
    assert len(layout.chunk_range(2)) == len(layout.batch_range(3)) == 0


def test_survives_json() -> None:
    layout = LoaderLayout(
        unit="sample", num_units=9, batch_size=2, chunk_size=4, identity={"length": 9, "digest": None}
    )
    assert LoaderLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize(
    "change",
    [{"unit": "row"}, {"chunk_size": 0}, {"num_units": -1}, {"batch_size": 0}, {"batch_size": None}, {"unit": "batch"}],
    ids=str,
)
def test_impossible_layouts_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        LoaderLayout(**{"unit": "sample", "num_units": 1, "batch_size": 1, "chunk_size": 1, **change})


def test_stored_batches_know_their_size_and_refuse_contradictions() -> None:
    assert StoredBatch(0, [4, 5], None, None).size == 2
    with pytest.raises(ValueError, match="3 samples has 2 indices"):
        StoredBatch(0, [4, 5], 3, None)
    with pytest.raises(ValueError, match="2 samples has 1 units"):
        StoredBatch(0, [4, 5], 2, None, [0])
    with pytest.raises(ValueError, match="ascend"):
        StoredBatch(0, [4, 5], 2, None, [1, 1])
