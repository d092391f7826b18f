"""Loaders whose chunks grow while they are read: every sample once, in chunks that all mean the same."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_gpuorch.control.leases import LeaseQueue
from lightning_gpuorch.control.messages.leases import Lease
from lightning_gpuorch.predictions.loading.describe import describe
from lightning_gpuorch.predictions.loading.loader import LeasedLoader
from lightning_gpuorch.predictions.loading.windowed_loader import WindowedLoader
from lightning_gpuorch.predictions.loading.work import NoWork
from lightning_gpuorch.predictions.storage.layout import LoaderLayout, Stretch
from lightning_gpuorch.worker.batching.dynamic import DynamicBatcher
from tests.predictions.test_window import Sink

LENGTH, BATCH = 103, 4


class Numbers(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return (torch.full((1,), float(i)) for i in range(LENGTH))


class Replica:
    """One of several that share the work, each a loader of its own."""

    def __init__(self, number: int, job: Job, windows: bool):
        self.number, self.job, self.sequence = number, job, 0
        self.sink, self.tickets = Sink(self.commit), collections.deque[Any]()
        leased = (job.source, job.layout, self, self.sink, self.tickets)
        batcher: Any = DynamicBatcher(8)
        self.loader = WindowedLoader(*leased, batcher=batcher, single_rank=True) if windows else LeasedLoader(*leased)
        self.batches = self.compute()

    def next(self, block: bool, seconds_per_sample: float = 0.0, after: int | None = None) -> Lease | NoWork:
        answer = self.job.queue.next((self.number, 0), self.sequence, block=False).result(0)
        self.sequence += 1
        return answer if isinstance(answer, Lease) else NoWork.STOP

    def end_of_stream(self, units: int) -> None:
        if self.job.queue.layout.num_units is None:
            self.job.queue.end_stream(self.job.queue.layout.with_num_units(units))

    def saw(self, chunk: int, digest: str) -> None:
        assert self.job.digests.setdefault(chunk, digest) == digest, "all mean the same batches by a chunk"

    def commit(self, chunk: int, batches: list[Any]) -> None:
        assert chunk not in self.job.stored
        self.job.stored[chunk] = [value for batch in batches for value in batch.output[:, 0].tolist()]
        self.job.queue.report_done(chunk)

    def compute(self) -> Any:
        for batch in self.loader:
            self.sink.add(self.tickets.popleft(), batch.clone())
            yield


class Job:
    def __init__(self, loader: Any, windows: bool, replicas: int = 2):
        self.source = describe(loader)
        whole = self.source.layout(2)
        unit = BATCH if whole.unit == "sample" else 1
        self.layout = LoaderLayout(
            unit=whole.unit, num_units=whole.num_units, batch_size=whole.batch_size, chunk_size=unit, first_chunks=3,
            identity=whole.identity,
        )  # fmt: skip
        self.stretches = [Stretch(2, 2 * unit), Stretch(2, 4 * unit), Stretch(100, unit)]
        self.queue = LeaseQueue(self.layout, on_leased=self.extend)
        self.stored: dict[int, list[float]] = {}
        self.digests: dict[int, str] = {}
        self.replicas = [Replica(number, self, windows) for number in range(replicas)]

    def extend(self, num_leased: int) -> None:
        layout = self.queue.layout
        if self.stretches and num_leased >= (layout.num_decided_chunks or 0) - 1:
            self.queue.extend([*layout.stretches, self.stretches.pop(0)])

    def run(self) -> None:
        running = [replica.batches for replica in self.replicas]
        while running:
            running = [batches for batches in running if next(batches, END) is not END]


END = object()


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("kind", ["map", "map with workers", "stream"])
def test_every_sample_is_computed_once_in_the_chunk_it_belongs_to(kind: str, windows: bool) -> None:
    samples = torch.arange(float(LENGTH))[:, None]
    workers = 2 if kind == "map with workers" else 0
    loader: Any = DataLoader(Numbers() if kind == "stream" else samples, batch_size=BATCH, num_workers=workers)  # type: ignore[arg-type]
    job = Job(loader, windows)
    job.run()
    layout = job.queue.layout
    assert len(layout.stretches) == 3
    assert job.queue.finished
    assert sorted(job.stored) == list(range(layout.num_chunks))
    scale = BATCH if layout.unit == "batch" else 1
    for chunk, values in job.stored.items():
        units = layout.chunk_range(chunk)
        assert values == [float(i) for i in range(units.start * scale, min(units.stop * scale, LENGTH))]
