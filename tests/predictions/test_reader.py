"""Reading back: the loader's batches in dataset order, whatever cut the work took; gaps and damage are never hidden."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import pickle
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch.errors import ConfigurationError, CorruptPartError, MissingPredictionsError
from lightning_gpuorch.predictions import (
    LoaderLayout,
    Manifest,
    PartStore,
    Predictions,
    StoredBatch,
    read_predictions,
)
from lightning_gpuorch.predictions.samples import CannotMergeError, CannotSplitError
from lightning_gpuorch.predictions.storage.journal import loader_directory
from lightning_gpuorch.predictions.storage.manifest import open_or_create, record_quarantine, set_num_units
from tests.support.examples import examples


def output_of(indices: Iterable[int]) -> dict[str, Any]:
    """What the model returns for samples of these dataset indices."""
    listed = list(indices)
    return {"x": torch.tensor(listed, dtype=torch.float64)[:, None] * torch.ones(3), "name": [f"n{i}" for i in listed]}


def same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a["x"], b["x"]) and a["x"].dtype == b["x"].dtype and a["name"] == b["name"]


def job(directory: Path, *layouts: LoaderLayout) -> list[PartStore]:
    open_or_create(directory, Manifest(loaders=layouts))
    return [PartStore(loader_directory(directory, loader), fsync=False) for loader in range(len(layouts))]


def by_sample(num_units: int, batch_size: int, chunk_size: int) -> LoaderLayout:
    return LoaderLayout(unit="sample", num_units=num_units, batch_size=batch_size, chunk_size=chunk_size)


def by_batch(num_units: int | None, chunk_size: int) -> LoaderLayout:
    return LoaderLayout(unit="batch", num_units=num_units, batch_size=None, chunk_size=chunk_size)


def stored(order: Sequence[int], units: range, lost: frozenset[int] = frozenset()) -> StoredBatch:
    kept = [unit for unit in units if unit not in lost]
    indices = [order[unit] for unit in kept]
    return StoredBatch(units.start, indices, None, output_of(indices), kept if lost else None)


def compute(store: PartStore, layout: LoaderLayout, chunks: Iterable[int] | None = None, halve: bool = False) -> None:
    """Commit chunks as a worker with this layout would."""
    order = range(layout.num_units or 0)
    for chunk in range(layout.num_chunks) if chunks is None else chunks:
        pieces: list[range] = list(layout.batches_of_chunk(chunk))
        if halve:
            pieces = [half for p in pieces for half in (p[: len(p) // 2], p[len(p) // 2 :]) if half]
        store.commit(chunk, [stored(order, piece) for piece in pieces], {})


def expected(layout: LoaderLayout) -> list[Any]:
    return [output_of(layout.batch_range(batch)) for batch in range(layout.num_batches)]


@pytest.fixture
def ten(tmp_path: Path) -> Predictions:
    """Ten batches of 4 samples, the last of 2, in chunks of 8."""
    layout = by_sample(38, 4, 8)
    compute(job(tmp_path, layout)[0], layout)
    found = read_predictions(tmp_path)
    assert isinstance(found, Predictions)
    return found


def test_items_are_the_loaders_batches(ten: Predictions) -> None:
    wanted = expected(by_sample(38, 4, 8))
    assert len(ten) == 10
    assert all(map(same, ten, wanted))
    assert same(ten[-1], wanted[-1])
    assert same(ten[3], wanted[3])
    for outside in (10, -11):
        with pytest.raises(IndexError):
            ten[outside]


def test_slices_are_lazy_and_can_be_sliced_again(ten: Predictions) -> None:
    part = ten[2:9:3]
    assert isinstance(part, Predictions)
    assert [int(item["x"][0, 0]) for item in part] == [8, 20, 32]
    assert [int(item["x"][0, 0]) for item in ten[::-1][1:3]] == [32, 28]
    assert list(part.indices) == [8, 9, 10, 11, 20, 21, 22, 23, 32, 33, 34, 35]
    assert [sample["name"] for sample in part.samples()] == [f"n{i}" for i in part.indices]
    assert len(ten[20:]) == 0


def test_samples_and_indices(ten: Predictions) -> None:
    samples = list(ten.samples())
    assert [sample["name"] for sample in samples] == [f"n{i}" for i in range(38)]
    assert samples[5]["x"].tolist() == [5.0, 5.0, 5.0]
    indices = ten.indices
    assert (len(indices), indices[0], indices[-1], indices[5:7]) == (38, 0, 37, [5, 6])
    assert list(indices) == list(range(38))
    with pytest.raises(IndexError):
        indices[38]
    assert len(ten[10:].indices) == 0


def test_items_belong_to_the_caller(ten: Predictions) -> None:
    ten[0]["x"].fill_(-1)
    assert ten[0]["x"][0, 0] == 0


def test_pickles_and_says_what_it_is(ten: Predictions, tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(ten[1:]))
    assert all(map(same, again, ten[1:]))
    assert ten.description == f"10 batches of dataloader 0 in {tmp_path}"


def test_threads_can_read_at_once(ten: Predictions) -> None:
    right: list[int] = []

    def read(seed: int) -> None:
        for batch in np.random.default_rng(seed).permutation(10):
            if not same(ten[int(batch)], output_of(range(batch * 4, min(batch * 4 + 4, 38)))):
                return
        right.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(right) == list(range(8))


def test_each_part_is_read_once_in_order(ten: Predictions, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = PartStore.read
    monkeypatch.setattr(PartStore, "read", lambda self, chunk: read.append(chunk) or original(self, chunk))
    for _ in ten:
        pass
    assert read == [0, 1, 2, 3, 4]


@given(st.data())
@examples(60)
def test_any_cut_gives_the_loaders_batches(data: st.DataObject) -> None:
    """Several runs with different batch sizes, halved batches, any chunk size: the last batch size is what is read."""
    num_units = data.draw(st.integers(0, 60), "samples")
    chunk_size = data.draw(st.integers(1, 25), "chunk size")
    batch_size = data.draw(st.integers(1, 20), "batch size")
    final = by_sample(num_units, batch_size, chunk_size)
    with tempfile.TemporaryDirectory() as directory:
        (store,) = job(Path(directory), final)
        for chunk in range(final.num_chunks):
            batch_then = data.draw(st.integers(1, 20), "batch size then")
            compute(store, by_sample(num_units, batch_then, chunk_size), [chunk], halve=data.draw(st.booleans()))
        found = read_predictions(directory)
        wanted = expected(final)
        assert len(found) == len(wanted)
        assert all(map(same, found, wanted))
        for batch in data.draw(st.permutations(range(len(wanted)))):
            assert same(found[batch], wanted[batch])
        assert list(found.indices) == list(range(num_units))
        assert [sample["name"] for sample in found.samples()] == [f"n{i}" for i in range(num_units)]


@given(st.data())
@examples(60)
def test_scattered_shares_come_together_in_dataset_order(data: st.DataObject) -> None:
    """Strided shares of several ranks, padded as DistributedSampler does, in any batch size and any order."""
    num_samples = data.draw(st.integers(0, 40), "samples")
    ranks = data.draw(st.integers(1, 4), "ranks")
    batch_size = data.draw(st.integers(1, 9), "batch size")
    layout = LoaderLayout(unit="scattered", num_units=num_samples, batch_size=batch_size, chunk_size=1)
    padded = list(range(num_samples)) + list(range(-num_samples % ranks if num_samples >= ranks else 0))
    lost = data.draw(st.sets(st.integers(0, max(num_samples - 1, 0)), max_size=3), "lost")
    with tempfile.TemporaryDirectory() as directory:
        (store,) = job(Path(directory), layout)
        for rank in range(ranks):
            share = [index for index in padded[rank::ranks] if index not in lost]
            batches = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
            for number, batch in enumerate(batches):
                store.commit(rank * 10**8 + number, [StoredBatch(batch[0], batch, None, output_of(batch))], {})
        lost &= set(range(num_samples))
        if lost:
            with pytest.raises(MissingPredictionsError) as info:
                read_predictions(directory)
            assert set(info.value.indices) == lost
        found = read_predictions(directory, allow_missing=True)
        assert set(found.missing) == lost
        present = [index for index in range(num_samples) if index not in lost]
        assert list(found.indices) == present
        assert len(found) == layout.num_batches
        for batch, item in enumerate(found):
            kept = [index for index in layout.batch_range(batch) if index not in lost]
            assert same(item, output_of(kept) if kept else None)


def test_scattered_without_a_known_number(tmp_path: Path) -> None:
    (store,) = job(tmp_path, LoaderLayout(unit="scattered", num_units=None, batch_size=2, chunk_size=1))
    store.commit(0, [StoredBatch(9, [9, 4], None, output_of([9, 4]))], {})
    store.commit(1, [StoredBatch(7, [7], None, output_of([7]))], {})
    found = read_predictions(tmp_path)
    assert [item["name"] for item in found] == [["n4", "n7"], ["n9"]]


def test_a_custom_order_is_told_by_the_indices(tmp_path: Path) -> None:
    order = [5, 3, 1, 0, 2, 4]
    layout = by_sample(6, 2, 4)
    (store,) = job(tmp_path, layout)
    for chunk in range(2):
        store.commit(chunk, [stored(order, piece) for piece in layout.batches_of_chunk(chunk)], {})
    found = read_predictions(tmp_path)
    assert list(found.indices) == order
    assert [item["name"] for item in found] == [["n5", "n3"], ["n1", "n0"], ["n2", "n4"]]


def test_several_dataloaders_streams_and_empty_ones(tmp_path: Path) -> None:
    layouts = [by_sample(5, 2, 4), by_batch(3, 2), by_sample(0, 2, 4)]
    stores = job(tmp_path, *layouts)
    compute(stores[0], layouts[0])
    stores[1].commit(0, [StoredBatch(0, None, None, ["a"]), StoredBatch(1, None, None, ["b", "c"])], {})
    stores[1].commit(1, [StoredBatch(2, None, None, "free form")], {})
    found = read_predictions(tmp_path)
    assert type(found) is list
    assert [len(predictions) for predictions in found] == [3, 3, 0]
    assert list(found[1]) == [["a"], ["b", "c"], "free form"]
    assert list(found[1][:2].samples()) == ["a", "b", "c"]
    assert list(found[2]) == list(found[2].samples()) == list(found[2].indices) == []
    with pytest.raises(ConfigurationError, match="stream have no dataset indices"):
        list(found[1].indices)


def test_a_stream_whose_end_was_not_reached(tmp_path: Path) -> None:
    (store,) = job(tmp_path, by_batch(None, 2))
    store.commit(0, [StoredBatch(0, None, None, 0), StoredBatch(1, None, None, 1)], {})
    store.commit(2, [StoredBatch(4, None, None, 4)], {})
    with pytest.raises(MissingPredictionsError, match="end of the stream was not reached"):
        read_predictions(tmp_path)
    assert list(read_predictions(tmp_path, allow_missing=True)) == [0, 1, None, None, 4]
    set_num_units(tmp_path, 0, 2)
    assert list(read_predictions(tmp_path)) == [0, 1]


def test_missing_chunks_are_named_and_explained(tmp_path: Path) -> None:
    layout = by_sample(38, 4, 8)
    (store,) = job(tmp_path, layout)
    compute(store, layout, [0, 2])
    record_quarantine(tmp_path, 0, 8, 16, "3 workers died computing it")
    record_quarantine(tmp_path, 0, 2, 3, "out of memory")  # in a chunk that a later run has computed after all
    with pytest.raises(MissingPredictionsError) as info:
        read_predictions(tmp_path)
    assert info.value.indices == (*range(8, 16), *range(24, 38))
    text = str(info.value)
    assert "22 of 38 samples: 8-15, 24-37" in text
    assert "given up: 8-15 (3 workers died computing it)" in text
    assert "out of memory" not in text
    assert "allow_missing=True" in text


def test_a_batch_that_lacks_samples_is_missing_where_work_is_counted_by_batch(tmp_path: Path) -> None:
    (store,) = job(tmp_path, by_batch(4, 2))
    store.commit(0, [StoredBatch(0, [0, 1], None, [0, 1]), StoredBatch(1, [3], None, [3], num_lost=1)], {})
    store.commit(1, [StoredBatch(2, [4], None, [4]), StoredBatch(3, [5], None, [5])], {})
    record_quarantine(tmp_path, 0, 1, 2, "out of memory at batch size 1")
    with pytest.raises(MissingPredictionsError, match=r"given up: 1 \(out of memory"):
        read_predictions(tmp_path)
    found = read_predictions(tmp_path, allow_missing=True)
    assert found.missing == [1]
    assert list(found) == [[0, 1], [3], [4], [5]]


def test_gaps_of_several_dataloaders_are_named_together(tmp_path: Path) -> None:
    job(tmp_path, by_sample(3, 1, 1), by_batch(2, 1))
    with pytest.raises(MissingPredictionsError) as info:
        read_predictions(tmp_path)
    assert info.value.indices == (0, 1, 2, 0, 1)
    assert "dataloader 0: 3 of 3 samples: 0-2" in str(info.value)
    assert "dataloader 1: 2 of 2 batches: 0-1" in str(info.value)


@given(st.data())
@examples(60)
def test_every_gap_is_found_from_the_parts_alone(data: st.DataObject) -> None:
    """Whole chunks, whole batches or single samples may be missing; nobody needs to have noted it."""
    layout = by_sample(
        data.draw(st.integers(1, 50), "samples"),
        data.draw(st.integers(1, 9), "batch"),
        data.draw(st.integers(1, 14), "chunk"),
    )
    total = layout.num_units or 0
    lost = frozenset(data.draw(st.sets(st.integers(0, total - 1), max_size=8), "lost"))
    left_out = data.draw(st.sets(st.integers(0, layout.num_chunks - 1), max_size=2), "chunks left out")
    with tempfile.TemporaryDirectory() as directory:
        (store,) = job(Path(directory), layout)
        for chunk in range(layout.num_chunks):
            if chunk in left_out:
                lost |= set(layout.chunk_range(chunk))
                continue
            batches = [stored(range(total), piece, lost) for piece in layout.batches_of_chunk(chunk)]
            store.commit(chunk, [batch for batch in batches if batch.size], {})
        found = read_predictions(directory, allow_missing=True)
        assert list(found.missing) == sorted(lost)
        assert len(found.missing) == len(lost)
        assert [found.missing[i] for i in range(len(lost))] == sorted(lost)
        assert all((unit in found.missing) == (unit in lost) for unit in range(total))
        for batch, item in enumerate(found):
            kept = [unit for unit in layout.batch_range(batch) if unit not in lost]
            assert same(item, output_of(kept) if kept else None)
        assert list(found.indices) == [unit for unit in range(total) if unit not in lost]
        if lost:
            with pytest.raises(MissingPredictionsError):
                read_predictions(directory)
        else:
            assert len(read_predictions(directory)) == layout.num_batches


def test_outputs_that_cannot_be_put_together_say_so_and_can_still_be_read(tmp_path: Path) -> None:
    layout = by_sample(4, 4, 2)
    (store,) = job(tmp_path, layout)
    for chunk in range(2):
        units = layout.chunk_range(chunk)
        store.commit(chunk, [StoredBatch(units.start, units, None, torch.tensor(float(chunk)))], {})
    found = read_predictions(tmp_path)
    with pytest.raises(CannotMergeError, match=r"batch 0 .* stored_batches\(\)"):
        found[0]
    with pytest.raises(CannotSplitError, match=r"batch 0 .* sample by sample"):
        list(found.samples())
    assert [(list(indices or ()), float(output)) for indices, output in found.stored_batches()] == [
        ([0, 1], 0.0),
        ([2, 3], 1.0),
    ]


def test_damage_is_never_hidden(tmp_path: Path) -> None:
    layout = by_sample(38, 4, 8)
    (store,) = job(tmp_path, layout)
    compute(store, layout)
    raw = bytearray(store.path(2).read_bytes())
    raw[-1] ^= 1
    store.path(2).write_bytes(raw)
    for allow_missing in (False, True):
        found = read_predictions(tmp_path, allow_missing=allow_missing)
        assert same(found[0], output_of(range(4)))  # nothing else is lost
        assert same(found[6], output_of(range(24, 28)))
        with pytest.raises(CorruptPartError, match="part-000000002"):
            found[5]
        with pytest.raises(CorruptPartError, match="part-000000002"):
            list(found)
    os.truncate(store.path(2), 200)
    for allow_missing in (False, True):
        with pytest.raises(CorruptPartError, match="part-000000002"):
            read_predictions(tmp_path, allow_missing=allow_missing)


@pytest.mark.parametrize(
    "batches",
    [
        [StoredBatch(0, range(4), 4, None), StoredBatch(3, range(3, 7), 4, None)],
        [StoredBatch(4, range(4, 8), 4, None), StoredBatch(0, range(4), 4, None)],
        [StoredBatch(6, range(6, 10), 4, None)],
        [StoredBatch(0, None, None, None)],
    ],
    ids=["overlap", "out of order", "beyond the chunk", "no size"],
)
def test_parts_that_contradict_the_layout(tmp_path: Path, batches: list[StoredBatch]) -> None:
    (store,) = job(tmp_path, by_sample(16, 4, 8))
    store.commit(0, batches, {})
    with pytest.raises(CorruptPartError):
        read_predictions(tmp_path, allow_missing=True)


def test_a_part_that_vanishes_after_opening(ten: Predictions) -> None:
    ten._store.discard(3)
    with pytest.raises(MissingPredictionsError, match="part-000000003"):
        ten[6]


def test_a_directory_without_predictions(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigurationError, match=r"no manifest\.json"):
            read_predictions(directory)


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


@pytest.mark.parametrize("walk", ["batches", "samples"])
def test_memory_stays_flat_over_300_mb(tmp_path: Path, walk: str) -> None:
    layout = by_sample(num_units=1200, batch_size=8, chunk_size=16)  # parts of 4 MiB
    (store,) = job(tmp_path, layout)
    for chunk in range(layout.num_chunks):
        batches = [
            StoredBatch(units.start, units, None, torch.full((len(units), 2**16), float(chunk)))  # 256 KiB per sample
            for units in layout.batches_of_chunk(chunk)
        ]
        store.commit(chunk, batches, {})
    found = read_predictions(tmp_path)
    rows: Iterator[Any] = itertools.chain.from_iterable(found) if walk == "batches" else found.samples()
    before = resident_bytes()
    total, growth = 0.0, 0
    for number, row in enumerate(rows):
        total += row.double().sum().item()
        if number % 64 == 0:
            growth = max(growth, resident_bytes() - before)
    assert total == sum(chunk * len(layout.chunk_range(chunk)) * 2**16 for chunk in range(layout.num_chunks))
    assert growth < 30 * 2**20, f"grew by {growth / 2**20:.1f} MiB"


def test_dataclass_outputs_are_put_together_too(tmp_path: Path) -> None:
    layout = by_sample(6, 3, 2)
    (store,) = job(tmp_path, layout)
    for chunk in range(3):
        units = layout.chunk_range(chunk)
        store.commit(chunk, [StoredBatch(units.start, units, None, Scored(torch.tensor(list(units))))], {})
    found = read_predictions(tmp_path)
    assert [type(item) for item in found] == [Scored, Scored]
    assert [item.score.tolist() for item in found] == [[0, 1, 2], [3, 4, 5]]


@dataclasses.dataclass
class Scored:
    score: torch.Tensor
