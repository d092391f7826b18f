"""Outputs of batches that took samples from anywhere in a window, put back into the loader's batches."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from lightning_gpuorch.control.messages.leases import Lease, Pace
from lightning_gpuorch.predictions.loading.collector import ChunkCollector
from lightning_gpuorch.predictions.loading.describe import describe
from lightning_gpuorch.predictions.loading.window_bounds import WindowBounds
from lightning_gpuorch.predictions.loading.windowed_loader import WindowedLoader
from lightning_gpuorch.predictions.loading.work import NoWork
from lightning_gpuorch.predictions.samples import CannotMergeError
from lightning_gpuorch.predictions.storage.fragments import FragmentReader, FragmentWriter
from lightning_gpuorch.predictions.storage.layout import LoaderLayout, StoredBatch
from lightning_gpuorch.worker.batching.dynamic import DynamicBatcher
from tests.support.examples import examples


class Queue:
    """All chunks that are not done, in order."""

    def __init__(self, chunks: int, done: Collection[int] = (), **extra: dict[int, Any]):
        self.chunks, self.asked, self.done, self.extra = chunks, 0, set(done), extra

    def next(self, block: bool, seconds_per_sample: float = 0.0, after: int | None = None) -> Lease | NoWork:
        while self.asked in self.done:
            self.asked += 1
        if self.asked >= self.chunks:
            return NoWork.STOP
        chunk, self.asked = self.asked, self.asked + 1
        more = {name: by_chunk[chunk] for name, by_chunk in self.extra.items() if chunk in by_chunk}
        return Lease(chunk=chunk, left=self.chunks - self.asked, **more)

    def end_of_stream(self, units: int) -> None:
        self.chunks = self.asked

    def saw(self, chunk: int, digest: str) -> None:
        pass


class Sink(ChunkCollector):
    """A collector, and what it is told of samples that cannot be read."""

    given_up: dict[int, str]

    def reading(self, chunk: int, units: range) -> None:
        pass

    def cannot_read(self, chunk: int, units: range, error: Exception) -> None:
        pass

    def give_up(self, span: Any, reasons: Mapping[int, str]) -> None:
        by_unit = {span.unit(position): reason for position, reason in reasons.items()}
        self.given_up = {**getattr(self, "given_up", {}), **by_unit}

    def skip_batch(self, ticket: Any) -> None:
        self.give_up_batch(ticket.chunk)

    def give_up_in_window(self, window: Any, positions: Any, reasons: Mapping[int, str] = {}) -> None:  # type: ignore[override]
        self.given_up = {**getattr(self, "given_up", {}), **reasons}
        super().give_up_in_window(window, len(positions))


class Stream(IterableDataset[Any]):
    def __init__(self, samples: list[Any]):
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(self.samples)


class Job:
    """One loader, run with dynamic batching."""

    def __init__(
        self,
        lengths: list[int],
        batch_size: int,
        chunk_batches: int,
        tokens: int,
        replicas: int = 1,
        directory: Path | None = None,
        steps: int | None = None,
        overlaps: bool = False,
        stream: bool = False,
        length_fn: Any = len,
        **extra: Any,
    ):
        self.samples = [[i] * max(1, length) for i, length in enumerate(lengths)]
        dataset: Any = Stream(self.samples) if stream else self.samples
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=lambda samples: samples)
        source = describe(loader)
        self.layout: LoaderLayout = source.layout(chunk_batches)
        self.stored: dict[int, list[StoredBatch]] = {}
        clock = itertools.count(0, 2).__next__  # a fragment is due now and then
        self.writer = FragmentWriter(directory, 0, "window samples", clock=clock) if directory else None
        self.collector = Sink(
            self.commit,
            (self.writer, FragmentReader(directory, 0, "window samples")) if self.writer is not None else None,
        )
        self.tickets: Any = collections.deque()
        self.loader = WindowedLoader(
            source,
            self.layout,
            Queue(-(-len(lengths) // self.layout.max_samples(0)), **extra),
            self.collector,
            self.tickets,
            batcher=DynamicBatcher(tokens, length_fn=length_fn),
            num_replicas=replicas,
            single_rank=True,
            overlaps=overlaps,
            should_leave=lambda: len(self.steps) == steps,
        )
        self.chunks_of_windows: list[int] = []
        self.last_window: Any = None
        self.steps: list[list[int]] = []

    def commit(self, chunk: int, batches: list[StoredBatch]) -> None:
        self.stored[chunk] = batches
        if self.writer is not None:
            self.writer.on_durable(chunk)

    def run(self, step: Any, lose: frozenset[int] = frozenset()) -> list[StoredBatch]:
        for batch in self.loader:
            ticket = self.tickets.popleft()
            indices = [sample[0] for sample in batch]
            assert ticket.indices == (None if self.layout.unit == "batch" else indices)
            units = [index // self.layout.samples_per_unit for index in indices]
            assert [ticket.span.unit(place) for place in range(ticket.size)] == units
            self.steps.append(indices)
            if ticket.window is not self.last_window:
                self.last_window = ticket.window
                self.chunks_of_windows.append(ticket.window.max_chunks)
            lost = frozenset(place for place, sample in enumerate(batch) if sample[0] in lose)
            kept = [sample for sample in batch if sample[0] not in lose]
            self.collector.add(ticket, step(kept) if kept else None, lost)
        self.collector.keep()
        return [batch for chunk in sorted(self.stored) for batch in self.stored[chunk]]


def outputs(batch: list[list[int]]) -> dict[str, Any]:
    ids = [sample[0] for sample in batch]
    return {
        "tensor": torch.tensor(ids, dtype=torch.float32).unsqueeze(1) * torch.ones(3),
        "array": np.array(ids),
        "text": [f"sample {i}" for i in ids],
        "pair": (torch.tensor(ids), [torch.full((100 + len(sample),), sample[0]) for sample in batch]),
        "constant": "model",
        # As wide as some batches are long.
        **{f"{width} wide": torch.tensor(ids).unsqueeze(1).expand(-1, width).clone() for width in (2, 4, 5, 8)},
    }


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=80),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 200),
    st.booleans(),
)
@examples(80)
def test_what_is_stored_is_what_the_loaders_batches_give(
    lengths: list[int], batch_size: int, chunk_batches: int, tokens: int, overlaps: bool
) -> None:
    job = Job(lengths, batch_size, chunk_batches, tokens, overlaps=overlaps)
    stored = job.run(outputs)
    assert sorted(i for step in job.steps for i in step) == list(range(len(lengths)))
    check_stored(job, batch_size, stored)


def check_stored(job: Job, batch_size: int, stored: list[StoredBatch]) -> None:
    """What is stored is what the loader's own batches give."""
    expected = [job.samples[i : i + batch_size] for i in range(0, len(job.samples), batch_size)]
    if job.layout.unit == "sample":
        assert [list(batch.indices) for batch in stored] == [[s[0] for s in batch] for batch in expected]
    assert [batch.size for batch in stored] == [len(batch) for batch in expected]
    for got, batch in zip(stored, expected, strict=True):
        want = outputs(batch)
        assert torch.equal(got.output["tensor"], want["tensor"])
        assert np.array_equal(got.output["array"], want["array"])
        assert got.output["text"] == want["text"]
        assert got.output["constant"] == "model"
        assert torch.equal(got.output["8 wide"], want["8 wide"])
        assert isinstance(got.output["pair"], tuple)
        assert torch.equal(got.output["pair"][0], want["pair"][0])
        assert [t.tolist() for t in got.output["pair"][1]] == [t.tolist() for t in want["pair"][1]]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=80),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 200),
    st.lists(st.integers(1, 12), max_size=3),
    st.booleans(),
    st.booleans(),
)
@examples(150)
def test_what_was_computed_before_a_stop_is_taken_over(
    lengths: list[int], batch_size: int, chunk_batches: int, tokens: int, stops: list[int], again: bool, stream: bool
) -> None:
    with TemporaryDirectory() as name:
        batches: list[list[int]] = []
        stored: dict[int, list[StoredBatch]] = {}
        for steps in [*stops, None]:
            options: dict[str, Any] = {"again": dict.fromkeys(range(80), True)} if again else {}
            options |= {"directory": Path(name), "steps": steps, "done": stored, "stream": stream}
            job = Job(lengths, batch_size, chunk_batches, tokens, **options)
            job.run(outputs)
            batches += job.steps
            stored.update(job.stored)
        check_stored(job, batch_size, [batch for chunk in sorted(stored) for batch in stored[chunk]])
        sizes = [len(batch) for batch in batches]
        again_at_most = len(stops) * max(sizes)
        assert sum(sizes) - len(lengths) <= again_at_most, (
            "one batch of each run, where all it takes over are of one size"
        )


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_that_was_kept_is_computed_again(tmp_path: Path, stream: bool) -> None:
    lengths = [1 + i % 30 for i in range(400)]
    computed: list[int] = []
    stored: dict[int, list[StoredBatch]] = {}
    for steps in (5, 7, 9, None):
        job = Job(lengths, 4, 10, 64, directory=tmp_path, steps=steps, done=stored, stream=stream)
        job.run(outputs)
        computed += [i for step in job.steps for i in step]
        stored.update(job.stored)
    assert sorted(computed) == list(range(400))
    check_stored(job, 4, [batch for chunk in sorted(stored) for batch in stored[chunk]])


def test_outputs_as_wide_as_a_part_of_what_was_kept_are_no_similarity_matrix(tmp_path: Path) -> None:
    first = Job([4] * 40, 2, 2, 16, directory=tmp_path, steps=2)
    first.run(outputs)
    assert first.steps[1] == [4, 5, 6, 7], "all of a chunk, and not whole, since its window is not"
    second = Job([4] * 40, 2, 2, 16, directory=tmp_path, done=first.stored, again={1: True})
    second.run(outputs)
    stored = {**first.stored, **second.stored}
    check_stored(second, 2, [batch for chunk in sorted(stored) for batch in stored[chunk]])


def test_a_window_of_which_everything_was_kept_is_stored_without_a_step(tmp_path: Path) -> None:
    """Its chunks became whole, and the process died before a part was durable."""
    first = Job([1 + i % 30 for i in range(64)], 4, 4, 64, directory=tmp_path)
    first.commit = lambda chunk, batches: None  # type: ignore[method-assign]
    first.collector._commit = lambda chunk, batches: None
    first.writer.end_window = lambda: first.writer.write()  # type: ignore[method-assign,union-attr]
    first.run(outputs)
    second = Job([1 + i % 30 for i in range(64)], 4, 4, 64, directory=tmp_path)
    stored = second.run(outputs)
    check_stored(second, 4, stored)


def test_batches_take_samples_from_several_chunks_but_not_at_the_end() -> None:
    job = Job([1 + i % 30 for i in range(1600)], batch_size=4, chunk_batches=2, tokens=64, replicas=2)
    job.run(outputs)
    chunks_of = [{i // 8 for i in step} for step in job.steps]
    assert max(map(len, chunks_of)) > 5
    assert all(len(chunks) == 1 for step, chunks in zip(job.steps, chunks_of, strict=True) if max(step) >= 1592)


def test_outputs_as_wide_as_every_batch_is_long_are_no_similarity_matrix() -> None:
    job = Job([4] * 64, batch_size=8, chunk_batches=4, tokens=32)
    stored = job.run(lambda batch: torch.tensor([[float(s[0])] * 8 for s in batch]))
    assert max(map(len, job.steps)) == 8
    assert [b.output[:, 0].tolist() for b in stored] == [[float(i) for i in range(k, k + 8)] for k in range(0, 64, 8)]


def test_samples_given_up_are_left_out_and_named_by_their_units() -> None:
    job = Job([5 + i % 3 for i in range(40)], batch_size=4, chunk_batches=2, tokens=40)
    stored = job.run(outputs, lose=frozenset({3, 17, 18}))
    assert [i for batch in stored for i in batch.indices] == [i for i in range(40) if i not in (3, 17, 18)]
    assert sum(batch.num_lost for batch in stored) == 3
    assert stored[0].units == [0, 1, 2]


def test_a_chunk_that_was_lost_goes_alone_and_isolated_samples_are_single() -> None:
    job = Job(
        [5] * 320,
        batch_size=4,
        chunk_batches=2,
        tokens=10**6,
        again={5: True, 20: True},
        isolate={20: (160, 168)},
        skip={20: [163]},
    )
    stored = job.run(outputs)
    assert [i for batch in stored for i in batch.indices] == [i for i in range(320) if i != 163]
    assert [step for step in job.steps if 40 in step] == [list(range(40, 48))]
    assert [step for step in job.steps if set(step) & set(range(160, 168))] == [
        [i] for i in range(160, 168) if i != 163
    ]


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (lambda batch: torch.tensor(float(len(batch))), "reduction over the batch"),
        (lambda batch: {"n": len(batch)}, "of the whole batch"),
        (lambda batch: torch.zeros(len(batch), max(map(len, batch)), 2), "list with one tensor per sample"),
    ],
)
def test_outputs_that_are_not_per_sample_are_refused_with_advice(step: Any, match: str) -> None:
    job = Job([1 + i % 30 for i in range(64)], batch_size=4, chunk_batches=4, tokens=64)
    with pytest.raises(CannotMergeError, match=match) as caught:
        job.run(step)
    assert "enable_dynamic_batching=False" in str(caught.value)


def test_a_step_without_predictions_gives_none_for_each_batch() -> None:
    job = Job([1 + i % 30 for i in range(64)], batch_size=4, chunk_batches=4, tokens=64)
    assert [batch.output for batch in job.run(lambda batch: None)] == [None] * 16


def test_windows_follow_the_speed_of_a_replica_and_what_is_left() -> None:
    def windows(replicas: int, speed: float, seconds_per_sample: float = 0.001, age_seconds: float = 0.0) -> list[int]:
        pace = Pace(speed=speed, seconds_per_sample=seconds_per_sample, age_seconds=age_seconds)
        job = Job([3] * 240, 2, 1, 64, replicas, pace=dict.fromkeys(range(120), pace))
        job.run(outputs)
        return job.chunks_of_windows

    assert windows(1, 1.0)[:2] == [1, 4096], "nobody else takes part: only time, memory and the count bound a window"
    assert windows(2, 1.0)[:3] == [1, 47, 28], "0.4 of the 118 chunks behind the first of it, and so on"
    assert windows(2, 0.5)[1] == 23
    assert windows(2, 1.5)[1] == 70
    assert windows(1, 1.0, 2.0, 1.0)[1] == 3, "15 seconds at first"
    assert windows(1, 1.0, 2.0, 10.0)[1] == 10, "four times as long as the job has run"
    assert windows(1, 1.0, 2.0, 1000.0)[1] == 30, "120 seconds at last"


def test_windows_of_a_stream_without_a_known_end_are_small_where_replicas_share_it() -> None:
    def max_chunks(replicas: int, left: int | None = None, **pace: float) -> int:
        bounds = WindowBounds(replicas)
        bounds.samples_per_chunk = 10
        bounds.observe(num_samples=1, num_bytes=1)
        lease = Lease(chunk=0, left=left, pace=Pace(speed=1.0, **pace) if pace else None)
        return bounds.max_chunks(lease, 0)

    assert max_chunks(2) == 2, "nothing is known"
    assert max_chunks(2, left=100) == 40, "its end is known"
    assert max_chunks(2, seconds_per_sample=0.1, age_seconds=100) == 10, "10 seconds at first"
    assert max_chunks(2, seconds_per_sample=0.1, age_seconds=2000) == 50, "a fortieth of the time so far"
    assert max_chunks(1, seconds_per_sample=0.1, age_seconds=100) == 120, "nobody waits"


@pytest.mark.parametrize("rejected", [{7}, {0, 1, 2, 3}, {22}])
def test_samples_without_a_length_are_given_up_and_all_others_stored(rejected: set[int]) -> None:
    def length(sample: list[int]) -> int:
        if sample[0] in rejected:
            raise ValueError(f"sample {sample[0]} has no length")
        return len(sample)

    job = Job(list(range(1, 24)), 4, 2, 40, length_fn=length)
    stored = job.run(outputs)
    kept = [index for batch in stored for index in batch.indices or ()]
    assert kept == [index for index in range(23) if index not in rejected]
    assert set(job.collector.given_up) == rejected
    assert "has no length" in job.collector.given_up[min(rejected)]


def test_a_length_function_that_knows_no_sample_ends_the_job() -> None:
    def length(sample: list[int]) -> int:
        raise ValueError("no length")

    with pytest.raises(ValueError, match="no length"):
        Job([3] * 9, 2, 2, 40, length_fn=length).run(outputs)
