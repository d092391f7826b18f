"""Chunks grow to the wanted bytes and seconds and shrink to the end; nobody waits for that, and no two jobs disagree."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch.control.chunk_growth import ChunkGrowth, PartLimits
from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.leases import LeaseQueue
from lightning_gpuorch.control.messages.base import Sender
from lightning_gpuorch.control.messages.leases import ChunkDone, Lease, NextChunk, OpenJob, Stop
from lightning_gpuorch.control.stretch_planner import StretchPlanner
from lightning_gpuorch.predictions import PartStore, StoredBatch
from lightning_gpuorch.predictions.reading.reader import read_predictions
from lightning_gpuorch.predictions.storage.journal import loader_directory
from lightning_gpuorch.predictions.storage.layout import LoaderLayout
from lightning_gpuorch.predictions.storage.manifest import Manifest, load
from tests.support.examples import examples

MIB = 2**20


def layout_of(num_units: int | None, replicas: int = 1, batch: int = 32) -> LoaderLayout:
    return LoaderLayout(
        unit="sample", num_units=num_units, batch_size=batch, chunk_size=32 * batch, first_chunks=32 * replicas
    )


def grown(layout: LoaderLayout, replicas: int, unit_bytes: float, unit_seconds: float) -> LoaderLayout:
    """All stretches of a job whose chunks take what they are expected to take."""
    growth = ChunkGrowth(PartLimits(64 * MIB, 30.0), replicas)
    while layout.num_decided_chunks is not None:
        size = layout.newest_chunk_size
        growth.observe(size, int(size * unit_bytes), size * unit_seconds)
        layout = layout.with_stretches([*layout.stretches, growth.next_stretch(layout)])
    return layout


@pytest.mark.parametrize(
    ("unit_bytes", "unit_seconds", "most"),
    [(1000, 2e-4, 67_108), (8, 2e-4, 150_000), (8, 1e-6, 8_388_608), (10**6, 1e-6, 67), (8, 10.0, 32)],
)
def test_a_part_has_the_wanted_bytes_or_seconds_whichever_comes_first(
    unit_bytes: int, unit_seconds: float, most: int
) -> None:
    sizes = [stretch.chunk_size for stretch in grown(layout_of(10**9), 1, unit_bytes, unit_seconds).stretches]
    assert max(32, 0.95 * most) - 32 <= max(sizes) <= max(most, 32)
    assert all(size % 32 == 0 for size in sizes), "chunks begin where batches do"


def test_a_billion_rows_are_thousands_of_files() -> None:
    layout = grown(layout_of(10**9, 8), 8, 1000, 2e-4)
    assert layout.num_chunks < 20_000
    assert len(layout.stretches) < 100


@examples(100)
@given(
    st.integers(1, 10**9), st.integers(1, 64), st.floats(0.1, 1e7), st.floats(1e-7, 100.0), st.sampled_from([1, 3, 32])
)
def test_all_units_are_decided_in_few_steps_and_the_end_is_even(
    units: int, replicas: int, unit_bytes: float, unit_seconds: float, batch: int
) -> None:
    layout = grown(layout_of(units, replicas, batch), replicas, unit_bytes, unit_seconds)
    assert sum(s.num_chunks for s in layout.stretches) + 32 * replicas >= layout.num_chunks
    assert layout.chunk_range(layout.num_chunks - 1).stop == units
    assert len(layout.stretches) < 400
    number, base = layout.num_chunks, layout.chunk_size
    for stretch in layout.stretches[-3:]:
        left = units - layout.chunk_range(number - 1).start
        assert stretch.chunk_size <= max(base, units // (8 * replicas)), left


def test_a_stream_without_a_known_end_has_large_chunks_and_no_small_ones() -> None:
    growth, layout = ChunkGrowth(PartLimits(64 * MIB, 30.0), 2), layout_of(None, 2)
    growth.observe(1024, 1024 * 100, 1.0)
    for _ in range(5):
        layout = layout.with_stretches([*layout.stretches, growth.next_stretch(layout)])
    assert [stretch.chunk_size for stretch in layout.stretches] == [8192, 30720, 30720, 30720, 30720]


def wait_until(reached: object, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_store_that_refuses_is_asked_again_and_replicas_wait(tmp_path: Path) -> None:
    directory = tmp_path / "dataloader_0"
    directory.touch()  # no directory can be made here
    planner = StretchPlanner(directory, ChunkGrowth(PartLimits(64 * MIB, 30.0), 1), lambda: 1)
    layout = LoaderLayout(unit="sample", num_units=1000, batch_size=1, chunk_size=1, first_chunks=2)
    queue = planner.queue = LeaseQueue(layout, on_leased=planner.on_leased)
    leases = [queue.next((0, 0), number, block=False).result(0) for number in range(2)]
    assert [lease.chunk for lease in leases if isinstance(lease, Lease)] == [0, 1]
    waiting = queue.next((0, 0), 2, block=True)
    assert not waiting.done()
    assert not queue.finished
    directory.unlink()
    lease = waiting.result(30)
    assert isinstance(lease, Lease)
    assert (lease.chunk, lease.stretches) == (2, queue.layout.stretches)
    assert queue.layout == planner.queue.layout


def test_an_end_of_a_queue_ends_the_wait_for_a_store(tmp_path: Path) -> None:
    directory = tmp_path / "dataloader_0"
    directory.touch()
    planner = StretchPlanner(directory, ChunkGrowth(PartLimits(64 * MIB, 30.0), 1), lambda: 1)
    layout = LoaderLayout(unit="sample", num_units=1000, batch_size=1, chunk_size=1, first_chunks=1)
    queue = planner.queue = LeaseQueue(layout, on_leased=planner.on_leased)
    queue.next((0, 0), 0, block=False).result(0)
    queue.next((0, 0), 1, block=False).result(0)
    assert any(thread.name == "gpuorch-stretch" for thread in threading.enumerate())
    queue.drain()
    wait_until(lambda: not any(thread.name == "gpuorch-stretch" for thread in threading.enumerate()))


class Run:
    """A run of a job of 20,000 samples: a coordinator and a replica that computes one chunk after another."""

    def __init__(self, directory: Path, samples: int):
        self.coordinator = Coordinator(1)
        self.sender, self.sequence = Sender(rank=0, replica=0, generation=0), itertools.count()
        self.store = PartStore(loader_directory(directory, 0), fsync=False)
        self.layout = LoaderLayout(unit="sample", num_units=samples, batch_size=4, chunk_size=8, first_chunks=8)
        self.won = 0
        request = OpenJob(
            sender=self.sender, job=0, directory=str(directory), storage_options={}, ephemeral=False,
            manifest=Manifest(loaders=[self.layout]).to_dict(), part_bytes=4096, part_seconds=1e9,
            resume_check="all",
        )  # fmt: skip
        self.coordinator.handle(request).result(60)

    def step(self) -> bool:
        """Compute a chunk; returns whether there was one."""
        place = {"sender": self.sender, "job": 0, "loader": 0}
        lease = self.coordinator.handle(NextChunk(**place, sequence=next(self.sequence), block=True)).result(60)
        if isinstance(lease, Stop):
            return False
        assert isinstance(lease, Lease)
        units = self.layout.with_stretches(lease.stretches).chunk_range(lease.chunk)
        won = self.store.commit(lease.chunk, [StoredBatch(units.start, units, len(units), list(units))], {})
        self.won += won * len(units)
        done = ChunkDone(**place, chunk=lease.chunk, won=won, samples=len(units), num_bytes=8 * len(units), seconds=1.0)
        self.coordinator.handle(done).result(60)
        return True


def test_two_jobs_that_race_in_a_directory_make_one_result_and_a_third_goes_on(tmp_path: Path) -> None:
    first, second = Run(tmp_path, 20_000), Run(tmp_path, 20_000)
    for _ in range(20):
        assert first.step()
        assert second.step()
        assert second.step()
    third = Run(tmp_path, 20_000)
    runs = [first, second, third]
    while runs:
        runs = [run for run in runs if run.step()]
    assert first.won + second.won + third.won == 20_000, "each sample has one winner"
    layout = load(tmp_path).loaders[0]  # type: ignore[union-attr]
    assert max(stretch.chunk_size for stretch in layout.stretches) == 512, "4,096 bytes of 8 each"
    assert layout.num_chunks < 150
    found = read_predictions(tmp_path)
    assert [value for batch in found for value in batch] == list(range(20_000))
    for run in (first, second, third):
        run.coordinator.verify()
