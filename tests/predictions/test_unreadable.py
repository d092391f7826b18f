"""Samples that cannot be read are left out of their batch and named, wherever the error comes from."""

from __future__ import annotations

import collections
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_gpuorch.errors import UnreadableStreamError
from lightning_gpuorch.predictions.loading.describe import describe
from lightning_gpuorch.predictions.loading.loader import LeasedLoader
from lightning_gpuorch.predictions.loading.loader_workers import worker_is_lost
from lightning_gpuorch.predictions.loading.windowed_loader import WindowedLoader
from lightning_gpuorch.worker.batching.dynamic import DynamicBatcher
from tests.predictions.test_window import Queue, Sink

# The thread that feeds a worker which was killed may find its pipe closed, and says so when it is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

LENGTH, BATCH, CHUNK = 20, 4, 2


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),  # its tensors were still to be fetched
        (
            ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0.\nOriginal Traceback"),
            False,
        ),
        (ValueError("DataLoader worker (pid"), False),
    ],
)
def test_errors_that_tell_of_a_lost_worker(error: Exception, lost: bool) -> None:
    assert worker_is_lost(error) == lost


class Rows(Dataset[Any]):
    """Sample i is a tensor of i; what happens at some samples is up to ``at``."""

    def __init__(self, at: Any = None):
        self.at = at or {}

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Any:
        happens = self.at.get(index)
        if isinstance(happens, BaseException):
            raise happens
        return torch.full((1,), float(index)) if happens is None else happens()


class Job:
    """A loader that is read to its end, and what is stored of it."""

    def __init__(self, loader: Any, windows: bool = False, isolates: bool = True):
        source = describe(loader)
        self.stored: dict[int, list[Any]] = {}
        self.sink = Sink(lambda chunk, batches: self.stored.update({chunk: batches}))
        self.tickets: Any = collections.deque()
        layout = source.layout(CHUNK)
        self.queue = Queue(layout.num_chunks or 1000)
        leased = (source, layout, self.queue, self.sink, self.tickets, 0, lambda answer: None, isolates)
        self.loader = (
            WindowedLoader(*leased, batcher=DynamicBatcher(8), single_rank=True) if windows else LeasedLoader(*leased)
        )

    def run(self) -> list[float]:
        """The samples that were computed, as they are stored."""
        for batch in self.loader:
            self.sink.add(self.tickets.popleft(), batch.clone())
        stored = [batch for chunk in sorted(self.stored) for batch in self.stored[chunk]]
        for batch in stored:
            assert batch.indices is None or batch.output[:, 0].tolist() == batch.indices
        return [value for batch in stored for value in batch.output[:, 0].tolist()]

    @property
    def given_up(self) -> dict[int, str]:
        return getattr(self.sink, "given_up", {})


def without(*lost: int) -> list[float]:
    return [float(index) for index in range(LENGTH) if index not in lost]


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("lost", [(0,), (13,), (7, 8), (4, 5, 6, 7), (16, 17, 18, 19), tuple(range(8))])
def test_what_cannot_be_read_is_named_and_all_others_are_there(
    workers: int, windows: bool, lost: tuple[int, ...]
) -> None:
    rows = Rows({index: OSError(f"image {index} is damaged") for index in lost})
    job = Job(DataLoader(rows, batch_size=BATCH, num_workers=workers), windows)
    assert job.run() == without(*lost)
    assert sorted(job.given_up) == list(lost)
    for index, reason in job.given_up.items():
        assert reason.startswith(f"OSError: image {index} is damaged (test_unreadable.py:"), reason
    assert sorted(job.stored) == [0, 1, 2], "all chunks are whole"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error",
    [StopIteration("over"), KeyError("key"), AssertionError(), UnicodeDecodeError("utf-8", b"", 0, 1, "x")],
    ids=lambda error: type(error).__name__,
)
def test_exceptions_of_any_type(workers: int, error: Exception) -> None:
    job = Job(DataLoader(Rows({9: error}), batch_size=BATCH, num_workers=workers))
    assert job.run() == without(9)
    assert list(job.given_up) == [9]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_does_not_fit_the_others_cannot_be_collated(workers: int) -> None:
    job = Job(DataLoader(Rows({9: lambda: torch.zeros(3)}), batch_size=BATCH, num_workers=workers))
    assert job.run() == without(9)
    assert "cannot be collated with others" in job.given_up[9]


def test_samples_that_collate_refuses_one_by_one_in_dynamic_batches() -> None:
    def collate(samples: list[torch.Tensor]) -> torch.Tensor:
        if any(sample.item() == 9 for sample in samples):
            raise ValueError("no text")
        return torch.stack(samples)

    job = Job(DataLoader(Rows(), batch_size=BATCH, collate_fn=collate), windows=True)
    assert job.run() == without(9)
    assert list(job.given_up) == [9]


def test_a_sample_that_kills_its_worker_is_found() -> None:
    job = Job(DataLoader(Rows({9: lambda: os.kill(os.getpid(), signal.SIGKILL)}), batch_size=BATCH, num_workers=2))
    assert job.run() == without(9)
    assert "DataLoader worker" in job.given_up[9]


def test_a_worker_that_was_killed_by_chance_costs_nothing(tmp_path: Path) -> None:
    def once() -> torch.Tensor:
        try:
            (tmp_path / "killed").touch(exist_ok=False)
        except FileExistsError:
            return torch.full((1,), 9.0)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    job = Job(DataLoader(Rows({9: once}), batch_size=BATCH, num_workers=2))
    assert job.run() == without()
    assert job.given_up == {}


@pytest.mark.parametrize("workers", [0, 1])
def test_where_nothing_can_be_read_the_error_is_raised(workers: int) -> None:
    job = Job(
        DataLoader(Rows(dict.fromkeys(range(LENGTH), OSError("not mounted"))), batch_size=BATCH, num_workers=workers)
    )
    with pytest.raises(OSError, match="not mounted"):
        job.run()
    assert job.given_up == {}


def test_where_nothing_can_be_read_any_more_the_samples_are_not_to_blame() -> None:
    rows = Rows()
    job = Job(DataLoader(rows, batch_size=BATCH))
    batches = iter(job.loader)
    next(batches)
    rows.at.update(dict.fromkeys(range(LENGTH), OSError("connection lost")))
    with pytest.raises(OSError, match="connection lost"):
        next(batches)
    assert job.given_up == {}


@pytest.mark.parametrize("windows", [False, True])
def test_raise_raises(windows: bool) -> None:
    job = Job(DataLoader(Rows({5: OSError("damaged")}), batch_size=BATCH), windows, isolates=False)
    with pytest.raises(OSError, match="damaged"):
        job.run()
    assert job.given_up == {}


def test_a_batch_of_a_batch_sampler_is_lost_as_a_whole_and_the_sample_named() -> None:
    batches = [list(range(start, start + BATCH)) for start in range(0, LENGTH, BATCH)]
    job = Job(DataLoader(Rows({9: OSError("damaged")}), batch_sampler=batches))
    assert job.run() == without(8, 9, 10, 11)
    assert job.given_up == {2: job.given_up[2]}
    assert job.given_up[2].startswith("sample 9: OSError: damaged")


def test_a_loader_without_batches() -> None:
    job = Job(DataLoader(Rows({9: OSError("damaged")}), batch_size=None, collate_fn=lambda sample: sample[None]))
    assert job.run() == without(9)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        for index in range(LENGTH):
            if index == 13:
                raise OSError("shard is damaged")
            yield torch.full((1,), float(index))


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_ends_at_its_error_and_whole_chunks_before_are_kept(workers: int, windows: bool) -> None:
    job = Job(DataLoader(Stream(), batch_size=BATCH, num_workers=workers), windows)
    assert job.run() == [float(index) for index in range(8)]
    assert isinstance(job.loader.failure, UnreadableStreamError)
    assert "batch 3 of the stream cannot be read" in str(job.loader.failure)
    assert "OSError: shard is damaged" in str(job.loader.failure)
