"""Chunks that grow: whatever is decided, they cut the work once, and everybody means the same units by a chunk."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch import read_predictions
from lightning_gpuorch.errors import ConfigurationError, CorruptPartError
from lightning_gpuorch.predictions import LoaderLayout, Manifest, PartStore, StoredBatch
from lightning_gpuorch.predictions.storage.journal import loader_directory
from lightning_gpuorch.predictions.storage.layout import Stretch
from lightning_gpuorch.predictions.storage.manifest import load, open_or_create
from lightning_gpuorch.predictions.storage.part_entries import pack_entries, unpack_entries
from lightning_gpuorch.predictions.storage.resume import SAMPLED_PARTS, prepare, set_right
from lightning_gpuorch.predictions.storage.stretches import decide_stretch, with_stored_stretches
from tests.support.examples import examples

STRETCHES = st.lists(st.builds(Stretch, st.integers(1, 5), st.integers(1, 30)), max_size=4)


def growing(num_units: int | None, chunk_size: int = 4, first_chunks: int = 2, batch_size: int = 2) -> LoaderLayout:
    return LoaderLayout(
        unit="sample", num_units=num_units, batch_size=batch_size, chunk_size=chunk_size, first_chunks=first_chunks
    )


@given(st.integers(0, 300), st.integers(1, 9), st.integers(1, 6), STRETCHES)
def test_chunks_of_any_sizes_cover_every_unit_once(units: int, size: int, first: int, stretches: list[Stretch]) -> None:
    layout = growing(units, size, first).with_stretches(stretches)
    chunks = [layout.chunk_range(chunk) for chunk in range(layout.num_chunks)]
    assert list(itertools.chain(*chunks)) == list(range(units))
    assert all(chunks)
    assert all(layout.chunk_of(unit) == chunk for chunk, of_it in enumerate(chunks) for unit in of_it)
    decided = layout.num_decided_chunks
    if decided is None:
        assert layout.num_decided_units == units
    else:
        assert layout.num_decided_units == sum(len(of_it) for of_it in chunks[:decided])
        later = layout.with_stretches([*stretches, Stretch(3, 7)])
        assert [later.chunk_range(chunk) for chunk in range(decided)] == chunks[:decided], "what is decided stays"
    assert LoaderLayout.from_dict(layout.to_dict()) == layout


@pytest.mark.parametrize("stretches", [[(0, 4)], [(3, 0)], [(3, -1)], [(3, 2.5)], [("3", 4)]])
def test_impossible_stretches_are_refused(stretches: list[tuple[int, int]]) -> None:
    with pytest.raises(ConfigurationError, match="stretches"):
        growing(100).with_stretches(stretches)
    with pytest.raises(ConfigurationError, match="stretches"):
        LoaderLayout(unit="sample", num_units=9, batch_size=1, chunk_size=1).with_stretches([(3, 4)])


def test_of_many_that_decide_one_wins_and_all_mean_the_same(tmp_path: Path) -> None:
    begin, layouts = threading.Barrier(8), []

    def decide(size: int) -> None:
        layout = growing(1000)
        for _ in range(5):
            begin.wait(30)
            layout = decide_stretch(tmp_path / "dataloader_0", layout, Stretch(3, size))
        layouts.append(layout)

    threads = [threading.Thread(target=decide, args=(size,)) for size in range(8, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(layouts) == 8
    assert set(layouts[0].stretches) <= {Stretch(3, size) for size in range(8, 16)}
    assert all(layout == layouts[0] for layout in layouts)
    assert with_stored_stretches(tmp_path / "dataloader_0", growing(1000)) == layouts[0]


def fill(directory: Path, layout: LoaderLayout, chunks: range) -> PartStore:
    """Compute chunks: sample i is i."""
    store = PartStore(loader_directory(directory, 0), fsync=False)
    for chunk in chunks:
        units = [list(piece) for piece in layout.batches_of_chunk(chunk)]
        store.commit(chunk, [StoredBatch(of[0], of, len(of), torch.tensor(of)) for of in units], {})
    return store


def test_a_job_whose_chunks_grow_is_resumed_with_another_batch_size_and_read_in_order(tmp_path: Path) -> None:
    open_or_create(tmp_path, Manifest(loaders=[growing(101)]))
    layout = growing(101)
    for stretch in (Stretch(2, 10), Stretch(2, 26), Stretch(9, 4)):
        layout = decide_stretch(loader_directory(tmp_path, 0), layout, stretch)
    store = fill(tmp_path, layout, range(5))
    resumed = open_or_create(tmp_path, Manifest(loaders=[growing(101, chunk_size=9, first_chunks=50, batch_size=7)]))
    (layout,) = resumed.loaders
    assert (layout.batch_size, layout.chunk_size, layout.first_chunks) == (7, 4, 2)
    assert layout.stretches == (Stretch(2, 10), Stretch(2, 26), Stretch(9, 4))
    assert load(tmp_path) == resumed
    assert '"stretches": []' in (tmp_path / "manifest.json").read_text(), "they have files of their own"
    assert set_right(store, layout, "all") == ([], [], 0)
    assert read_predictions(tmp_path, allow_missing=True).missing == list(range(54, 101))
    fill(tmp_path, layout, range(5, layout.num_chunks))
    found = read_predictions(tmp_path)
    assert [batch.tolist() for batch in found] == [list(range(i, min(i + 7, 101))) for i in range(0, 101, 7)]
    assert found.verify() == 101


def test_a_damaged_stretch_is_named_and_one_that_is_gone_missed(tmp_path: Path) -> None:
    open_or_create(tmp_path, Manifest(loaders=[growing(60)]))
    layout = decide_stretch(loader_directory(tmp_path, 0), growing(60), Stretch(4, 8))
    store = fill(tmp_path, layout, range(4))
    path = loader_directory(tmp_path, 0) / "stretch-0001.json"
    content = path.read_text()
    path.write_text(content.replace('"chunk_size": 8', '"chunk_size": 9'))
    with pytest.raises(CorruptPartError, match=r"stretch-0001\.json is damaged"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(CorruptPartError, match=r"part-000000003\.gpq belongs to a chunk whose size is not known"):
        prepare(store, growing(60), "headers")
    assert store.done() == {0, 1, 2, 3}


@pytest.mark.parametrize(("check", "found"), [("headers", 1), ("sampled", 1), ("all", 2)])
def test_a_resume_reads_as_much_as_is_wanted(tmp_path: Path, check: str, found: int) -> None:
    layout = growing(4000, first_chunks=1000)
    store = fill(tmp_path, layout, range(1 if check == "all" else 400))
    fill(tmp_path, layout, range(1, 400))
    cut, flipped = store.path(3), store.path(7)
    cut.write_bytes(cut.read_bytes()[:-1])
    raw = bytearray(flipped.read_bytes())
    raw[-1] ^= 1
    flipped.write_bytes(raw)
    read = set()
    whole = PartStore.check
    try:
        PartStore.check = lambda self, chunk, whole_one=True: (  # type: ignore[method-assign, assignment]
            read.add(chunk) if whole_one else None,
            whole(self, chunk, whole_one),
        )[1]
        damaged, incomplete, _ = set_right(store, layout, check)  # type: ignore[arg-type]
    finally:
        PartStore.check = whole  # type: ignore[method-assign]
    assert incomplete == []
    assert str(cut) in str(damaged[0])
    assert len(damaged) == (1 + (7 in read)), "a flipped bit is found where it is read"
    assert len(read) == {"headers": 0, "sampled": SAMPLED_PARTS, "all": 400}[check]


BATCHES = st.lists(
    st.tuples(st.sampled_from([1, 2, 3]), st.integers(0, 2), st.booleans(), st.sampled_from(["no", "yes", "keys"])),
    max_size=30,
)


@examples(200)
@given(BATCHES, st.booleans())
def test_entries_are_what_they_were_however_they_are_packed(
    batches: list[tuple[int, int, bool, str]], unknown: bool
) -> None:
    unit, stored = 0, []
    for size, gap, lost, named in batches:
        unit += gap
        indices = {"no": None, "yes": list(range(unit, unit + size)), "keys": ["k"] * size}[named]
        stored.append(
            StoredBatch(unit, indices, None if unknown and indices is None else size, None, num_lost=int(lost))
        )
        unit += size
    entries = unpack_entries(pack_entries(stored), len(stored))
    assert len(entries) == len(stored)
    for entry, batch in zip(entries, stored, strict=True):
        assert (entry.first_unit, entry.size, entry.num_lost) == (batch.first_unit, batch.size, batch.num_lost)
        assert (entry.indices and list(entry.indices)) == batch.indices
    assert [entries[place] for place in range(len(entries))] == list(entries)


def test_like_batches_take_as_little_as_one() -> None:
    packed = pack_entries(StoredBatch(i, range(i, i + 32), 32, None) for i in range(0, 32 * 2000, 32))
    assert len(packed) == 1
    entries = unpack_entries(packed, 2000)
    assert (len(entries), entries.num_samples, len(entries.runs)) == (2000, 64000, 1)
    assert entries[1999].indices == range(63968, 64000)
    with pytest.raises(ValueError, match="more than can be in it"):
        unpack_entries(packed, 1999)


@pytest.mark.parametrize("unit", ["sample", "batch"])
@pytest.mark.parametrize("failed", [{0}, {5, 6}, {4, 5, 6, 7}, {11}, {1, 3, 5, 7, 9}, set(range(12))])
def test_errors_stand_in_the_place_of_samples_and_nothing_is_missing(
    tmp_path: Path, unit: Literal["sample", "batch"], failed: set[int]
) -> None:
    size = 4 if unit == "sample" else None
    layout = LoaderLayout(unit=unit, num_units=12 if size else 3, batch_size=size, chunk_size=8 if size else 2)
    open_or_create(tmp_path, Manifest(loaders=[layout]))
    store = PartStore(loader_directory(tmp_path, 0), fsync=False)
    for chunk in range(2):
        stored = []
        for number in range(2 * chunk, min(2 * chunk + 2, 3)):
            of = range(4 * number, 4 * number + 4)
            good = [i for i in of if i not in failed]
            if good:
                units = good if size and len(good) < 4 else None
                stored.append(StoredBatch(good[0] if size else number, good, None, torch.tensor(good), units))
            bad = [i for i in of if i in failed]
            for i in bad if size else bad[:1]:
                stored.append(StoredBatch(i if size else number, [i], 1, None, error=f"ValueError: {i}: bad"))
        store.commit(chunk, sorted(stored, key=lambda batch: batch.first_unit), {})
    damaged, incomplete, num_errors = set_right(store, layout, "all")
    assert (damaged, incomplete) == ([], []), "it is not tried again"
    assert num_errors == len(failed) if unit == "sample" else num_errors <= 3
    found = read_predictions(tmp_path)
    expected = [[i for i in range(4 * n, 4 * n + 4) if i not in failed] for n in range(3)]
    assert [[] if batch is None else batch.tolist() for batch in found] == expected
    assert [sample.item() for sample in found.samples()] == list(itertools.chain(*expected))
    named = [(error.index, error.type, error.message) for error in found.errors]
    all_named = [(i, "ValueError", f"{i}: bad") for i in sorted(failed)]
    assert named == all_named if size else set(named) <= set(all_named)
