"""Streams by shard: how work is numbered while no length is known, what is read of the source, and what is put in order."""

from __future__ import annotations

import collections
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_gpuorch import ArrowShards, FileShards, ShardedDataset, ShardedSource
from lightning_gpuorch.control.messages.leases import Lease
from lightning_gpuorch.control.shard_leases import ShardLeaseQueue
from lightning_gpuorch.errors import (
    ConfigurationError,
    CorruptPartError,
    InputMismatchError,
    JobMismatchError,
    MissingPredictionsError,
)
from lightning_gpuorch.predictions import LoaderLayout, Manifest, PartStore, StoredBatch, read_predictions
from lightning_gpuorch.predictions.loading.describe import describe
from lightning_gpuorch.predictions.loading.loader import LeasedLoader
from lightning_gpuorch.predictions.loading.shards.recognition import by_shard
from lightning_gpuorch.predictions.loading.shards.source import ShardStreamSource
from lightning_gpuorch.predictions.loading.windowed_loader import WindowedLoader
from lightning_gpuorch.predictions.loading.work import NoWork
from lightning_gpuorch.predictions.storage.fragments import FragmentReader, FragmentWriter
from lightning_gpuorch.predictions.storage.journal import loader_directory
from lightning_gpuorch.predictions.storage.layout import CHUNKS_PER_SHARD
from lightning_gpuorch.predictions.storage.manifest import load, open_or_create, record_quarantine
from lightning_gpuorch.predictions.storage.resume import set_right
from lightning_gpuorch.pytorch import GPUOrchStrategy
from lightning_gpuorch.worker import session
from lightning_gpuorch.worker.batching.dynamic import DynamicBatcher
from tests.predictions.test_window import Sink
from tests.support.examples import examples

# The thread that feeds a worker which was killed may find its pipe closed, and says so when it is collected.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a machine with few cores
]

BATCH, CHUNK = 4, 2


class Rows(ShardedDataset):
    """Row n of shard s is 1000 s + n. What is opened and read is noted in a file, as workers do it; some places raise."""

    def __init__(self, lengths: list[int], notes: Path | None = None, at: dict[int, Any] | None = None):
        self.lengths, self.notes, self.at = lengths, notes, at or {}

    @property
    def num_shards(self) -> int:
        return len(self.lengths)

    def open_shard(self, index: int, start: int) -> Iterator[Any]:
        self.was_alone = get_worker_info() is None
        self._note(f"open {index} {start}{'' if self.was_alone else ' in a worker'}")
        for number in range(start, self.lengths[index]):
            row = 1000 * index + number
            happens = self.at.get(row)
            if isinstance(happens, BaseException):
                raise happens
            if happens is not None:
                happens()
            self._note(f"read {row}")
            yield torch.full((1,), float(row))

    def _note(self, line: str) -> None:
        if self.notes is not None:
            with open(self.notes, "a") as file:
                file.write(line + "\n")

    def noted(self, kind: str) -> list[str]:
        assert self.notes is not None
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [line.removeprefix(f"{kind} ") for line in lines if line.startswith(kind)]

    @property
    def rows(self) -> list[float]:
        return [float(1000 * s + n) for s, length in enumerate(self.lengths) for n in range(length)]


class Queue:
    """The view that one replica has of the leases, without the processes in between."""

    def __init__(self, leases: ShardLeaseQueue, replica: int = 0):
        self.leases, self.replica, self.generation, self.sequence = leases, replica, 0, 0
        self.saw_chunks: dict[int, str] = {}

    def next(self, block: bool, seconds_per_sample: float = 0.0, after: int | None = None) -> Lease | NoWork:
        owner = (self.replica, self.generation)
        answer = self.leases.next(owner, self.sequence, block, seconds_per_sample, after).result(0)
        self.sequence += 1
        return answer if isinstance(answer, Lease) else NoWork(type(answer).__name__.lower())

    def end_of_shard(self, shard: int, units: int, is_readable: bool) -> None:
        assert self.leases.end_shard(shard, units, is_readable) == units

    def saw(self, chunk: int, digest: str) -> None:
        assert chunk not in self.saw_chunks
        self.saw_chunks[chunk] = digest

    def die(self) -> None:
        self.leases.revoke((self.replica, self.generation))
        self.generation, self.sequence = self.generation + 1, 0


class Replica:
    """A loader of one replica, and what is stored of what it gives."""

    def __init__(
        self,
        loader: Any,
        leases: ShardLeaseQueue | None = None,
        windows: bool = False,
        replica: int = 0,
        **options: Any,
    ):
        source = by_shard(describe(loader), num_replicas=1)
        assert isinstance(source, ShardStreamSource)
        self.layout = source.layout(options.pop("chunk", CHUNK))
        self.leases = leases or ShardLeaseQueue(self.layout)
        self.stored: dict[int, list[Any]] = {}
        self.sink = Sink(self.commit, options.pop("fragments", None))
        self.tickets: Any = collections.deque()
        self.queue = Queue(self.leases, replica)
        isolates = options.pop("isolates", True)
        leased = (source, self.layout, self.queue, self.sink, self.tickets, 0, lambda answer: None, isolates)
        self.loader = (
            WindowedLoader(*leased, batcher=DynamicBatcher(8), single_rank=True) if windows else LeasedLoader(*leased)
        )

    def commit(self, chunk: int, batches: list[Any]) -> None:
        self.stored[chunk] = batches
        self.leases.report_done(chunk)

    def run(self, most: int = 10**9) -> list[float]:
        """Compute so many batches at most, as if it died then; returns what is stored, in the order of the shards."""
        batches = iter(self.loader)
        for number, batch in enumerate(batches, 1):
            self.sink.add(self.tickets.popleft(), batch.clone())
            if number >= most:
                break
        batches.close()  # type: ignore[attr-defined]
        return rows_in(self.stored)

    @property
    def given_up(self) -> dict[int, str]:
        return getattr(self.sink, "given_up", {})


def rows_in(stored: dict[int, list[Any]]) -> list[float]:
    return [row for chunk in sorted(stored) for batch in stored[chunk] for row in batch.output[:, 0].tolist()]


def unit(shard: int, batch: int) -> int:
    return shard * CHUNKS_PER_SHARD * CHUNK + batch


LENGTHS = [9, 0, 16, 1, 23, 8]


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_each_sample_is_read_once_and_put_in_order(tmp_path: Path, workers: int, windows: bool) -> None:
    rows = Rows(LENGTHS, tmp_path / "notes")
    replica = Replica(DataLoader(rows, batch_size=BATCH, num_workers=workers), windows=windows)
    assert replica.run() == rows.rows
    assert sorted(map(float, rows.noted("read"))) == rows.rows
    assert sorted(rows.noted("open")) == [f"{shard} 0" for shard in range(len(LENGTHS))]
    assert replica.leases.finished
    assert replica.leases.ends == {shard: -(-length // BATCH) for shard, length in enumerate(LENGTHS)}
    assert all(len(batch.output) <= BATCH for batches in replica.stored.values() for batch in batches)
    assert set(replica.queue.saw_chunks) == set(replica.stored)


@pytest.mark.parametrize("workers", [0, 3])
def test_the_same_batches_can_be_read_from_beginning_to_end(tmp_path: Path, workers: int) -> None:
    """As they are where callbacks are driven over all outputs afterwards."""
    rows = Rows(LENGTHS, tmp_path / "notes")
    loader = DataLoader(rows, batch_size=BATCH, num_workers=workers)
    replica = Replica(loader)
    replica.run()
    (tmp_path / "notes").unlink()
    source = by_shard(describe(loader), 1)
    assert isinstance(source, ShardStreamSource)
    batches = [batch.tolist() for batch in source.iterate()]
    assert batches == [b.output.tolist() for chunk in sorted(replica.stored) for b in replica.stored[chunk]]
    assert sorted(map(float, rows.noted("read"))) == rows.rows
    assert source.first_batch().tolist() == batches[0]


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("most", [1, 3, 6])
def test_after_a_death_another_goes_on_behind_what_is_durable(
    tmp_path: Path, workers: int, windows: bool, most: int
) -> None:
    rows = Rows(LENGTHS, tmp_path / "notes")
    loader = DataLoader(rows, batch_size=BATCH, num_workers=workers)
    first = Replica(loader, windows=windows)
    first.run(most)
    first.queue.die()
    second = Replica(loader, first.leases, windows=windows, replica=1)
    second.run()
    assert not set(first.stored) & set(second.stored)
    assert rows_in({**first.stored, **second.stored}) == rows.rows
    assert second.leases.finished


@given(data=st.data(), lengths=st.lists(st.integers(0, 30), max_size=5), batch=st.integers(1, 5))
@examples(60)
def test_replicas_that_die_and_read_by_turns_give_what_one_would(data: Any, lengths: list[int], batch: int) -> None:
    """In one process each; three replicas, each computes a few batches of its life, in any order."""
    rows = Rows(lengths)
    leases = ShardLeaseQueue(sharded(len(lengths)))
    stored: dict[int, list[Any]] = {}
    for number in range(data.draw(st.integers(0, 6))):
        replica = Replica(DataLoader(rows, batch_size=batch), leases, replica=number)
        replica.run(data.draw(st.integers(1, 7)))
        replica.queue.die()
        stored.update(replica.stored)
    last = Replica(DataLoader(rows, batch_size=batch), leases, replica=99)
    last.run()
    assert not set(last.stored) & set(stored)
    assert rows_in({**stored, **last.stored}) == rows.rows


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("row", [2009, 4000, 4020, 5007])
def test_a_shard_that_cannot_be_read_is_named_and_all_others_are_there(workers: int, windows: bool, row: int) -> None:
    rows = Rows(LENGTHS, at={row: OSError("bad archive")})
    replica = Replica(DataLoader(rows, batch_size=BATCH, num_workers=workers), windows=windows)
    shard, number = divmod(row, 1000)
    whole = BATCH * (number // BATCH)  # what is read of a batch that is not whole cannot be computed as that batch
    assert replica.run() == [r for r in rows.rows if r // 1000 != shard or r < 1000 * shard + whole]
    [(lost, reason)] = replica.given_up.items()
    assert lost == unit(shard, number // BATCH)
    assert f"shard {shard} cannot be read any further than its first {whole} samples: OSError: bad archive" in reason
    assert replica.leases.finished


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_are_raised_where_that_is_asked_for(workers: int) -> None:
    loader = DataLoader(Rows(LENGTHS, at={4003: OSError("bad archive")}), batch_size=BATCH, num_workers=workers)
    with pytest.raises(OSError, match="bad archive"):
        Replica(loader, isolates=False).run()


@pytest.mark.parametrize("workers", [0, 2])
def test_where_no_shard_can_be_read_the_error_is_raised(workers: int) -> None:
    at = {1000 * shard: OSError("no such bucket") for shard in range(len(LENGTHS))}
    with pytest.raises(OSError, match="no such bucket"):
        Replica(DataLoader(Rows(LENGTHS, at=at), batch_size=BATCH, num_workers=workers)).run()


def collate_but(row: float) -> Callable[[Any], Any]:
    def collate(samples: list[torch.Tensor]) -> torch.Tensor:
        if any(sample.item() == row for sample in samples):
            raise ValueError("odd shape")
        return torch.stack(samples)

    return collate


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_cannot_be_collated_is_given_up_alone(workers: int) -> None:
    rows = Rows(LENGTHS)
    replica = Replica(DataLoader(rows, batch_size=BATCH, num_workers=workers, collate_fn=collate_but(4005)))
    assert replica.run() == [row for row in rows.rows if not 4004 <= row < 4008]
    [(lost, reason)] = replica.given_up.items()
    assert lost == unit(4, 1)
    assert "samples 4-7 of shard 4 cannot be collated" in reason


def test_a_shard_that_kills_its_worker_is_given_up() -> None:
    rows = Rows(LENGTHS, at={4009: lambda: os.kill(os.getpid(), signal.SIGKILL)})
    replica = Replica(DataLoader(rows, batch_size=BATCH, num_workers=2))
    assert replica.run() == [row for row in rows.rows if row < 4008 or row >= 5000]
    assert list(replica.given_up) == [unit(4, 2)]


def test_samples_that_are_batches_already() -> None:
    class Batches(Rows):
        def open_shard(self, index: int, start: int) -> Iterator[Any]:
            yield from list(torch.arange(1000.0 * index, 1000 * index + self.lengths[index])[:, None].split(3))[start:]

    rows = Batches(LENGTHS)
    assert Replica(DataLoader(rows, batch_size=None, num_workers=2)).run() == rows.rows


def test_a_length_that_is_wrong_ends_the_job() -> None:
    class Longer(Rows):
        def shard_length(self, index: int) -> int:
            return self.lengths[index] + (index == 2)

        def shard_name(self, index: int) -> str:
            return f"part-{index}.tar"

    with pytest.raises(InputMismatchError, match=r"shard 2 \(part-2.tar\) gave 16 samples, and its shard_length is 17"):
        Replica(DataLoader(Longer(LENGTHS), batch_size=BATCH)).run()


def test_what_was_kept_of_a_chunk_is_taken_over_and_entered_behind(tmp_path: Path) -> None:
    rows, layout = Rows([11, 22], tmp_path / "notes"), sharded(2, chunk=8)
    leases = ShardLeaseQueue(layout)
    fragments = (FragmentWriter(tmp_path, 0, "batches"), FragmentReader(tmp_path, 0, "batches"))
    loader = DataLoader(rows, batch_size=BATCH)
    first = Replica(loader, leases, fragments=fragments, chunk=8)
    first.run(5)
    fragments[0].write()  # as it does every few seconds
    first.queue.die()
    (tmp_path / "notes").unlink()
    second = Replica(loader, leases, replica=1, fragments=fragments, chunk=8)
    second.run()
    assert rows_in({**first.stored, **second.stored}) == rows.rows
    assert rows.noted("open") == ["1 8"], "the first shard is whole, and two batches of the other are kept"


def test_units_that_are_given_up_are_entered_behind(tmp_path: Path) -> None:
    """A batch in which workers die is not read again: the shard is opened behind it."""
    rows = Rows([20], tmp_path / "notes", at={5: AssertionError("read")})
    leases = ShardLeaseQueue(sharded(1), max_chunk_failures=1)
    for number in range(3):
        leases.next((number, 0), 0, block=False)
        leases.revoke((number, 0), blamed=0, position=(1, 2))
    replica = Replica(DataLoader(rows, batch_size=BATCH), leases, replica=9)
    assert replica.run() == [row for row in rows.rows if not 4 <= row < 8]
    assert rows.noted("open") == ["0 0", "0 8"]


# What is stored


def sharded(num_shards: int, chunk: int = CHUNK, **identity: Any) -> LoaderLayout:
    return LoaderLayout(
        unit="batch", num_units=None, batch_size=None, chunk_size=chunk, num_shards=num_shards, identity=identity
    )


def write(store: PartStore, layout: LoaderLayout, shard: int, units: int, lost: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    first = layout.shard_range(shard).start
    for number in range(-(-units // layout.chunk_size)):
        chunk = shard * CHUNKS_PER_SHARD + number
        numbers = range(number * layout.chunk_size, min(units, (number + 1) * layout.chunk_size))
        batches = [StoredBatch(first + n, None, None, [1000 * shard + n]) for n in numbers if n not in lost]
        store.commit(chunk, batches, {})


@given(
    lengths=st.lists(st.integers(0, 9), max_size=6),
    chunk=st.integers(1, 4),
    order=st.randoms(use_true_random=False),
    unread=st.sets(st.integers(0, 5)),
)
@examples(60)
def test_what_is_stored_is_read_in_the_order_of_the_shards(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], chunk: int, order: random.Random, unread: set[int]
) -> None:
    root, layout = tmp_path_factory.mktemp("job"), sharded(len(lengths), chunk)
    open_or_create(root, Manifest(loaders=[layout]))
    store = PartStore(loader_directory(root, 0), fsync=False)
    shards = list(range(len(lengths)))
    order.shuffle(shards)
    for shard in shards:
        write(store, layout, shard, lengths[shard])
        if shard not in unread:
            store.record_shard_end(shard, lengths[shard])
    unread = {shard for shard in unread if shard < len(lengths)}
    expected: list[Any] = []
    for shard, length in enumerate(lengths):
        expected += [[1000 * shard + number] for number in range(length)] + [None] * (shard in unread)
    if unread:
        with pytest.raises(MissingPredictionsError, match="not read to their end: shards"):
            read_predictions(root)
    predictions = read_predictions(root, allow_missing=bool(unread))
    assert list(predictions) == expected
    assert list(predictions.missing) == [place for place, batch in enumerate(expected) if batch is None]


def test_gaps_are_named_by_shard(tmp_path: Path) -> None:
    layout = sharded(3)
    open_or_create(tmp_path, Manifest(loaders=[layout]))
    store = PartStore(loader_directory(tmp_path, 0), fsync=False)
    for shard, lost in enumerate([set(), {3}, {0, 1}]):
        write(store, layout, shard, 5, lost)
        store.record_shard_end(shard, 5)
    store.discard(2 * CHUNKS_PER_SHARD)
    record_quarantine(tmp_path, 0, unit(1, 3), unit(1, 4), "OSError: bad sector")
    with pytest.raises(MissingPredictionsError) as raised:
        read_predictions(tmp_path)
    assert "3 of 15 batches: 3 of shard 1; 0-1 of shard 2" in str(raised.value)
    assert "given up: 3 of shard 1 (OSError: bad sector)" in str(raised.value)
    assert raised.value.indices == (8, 10, 11)
    assert [b and b[0] for b in read_predictions(tmp_path, allow_missing=True)[7:12]] == [1002, None, 1004, None, None]


def test_a_part_that_lacks_batches_is_discarded_by_a_later_run(tmp_path: Path) -> None:
    layout = sharded(3)
    open_or_create(tmp_path, Manifest(loaders=[layout]))
    store = PartStore(loader_directory(tmp_path, 0), fsync=False)
    write(store, layout, 0, 5)
    store.record_shard_end(0, 5)
    write(store, layout, 1, 5, {3})
    store.record_shard_end(1, 5)
    write(store, layout, 2, 3)  # where it could not be read any further
    known = load(tmp_path)
    assert known is not None
    assert set_right(store, known.loaders[0], "headers") == ([], [CHUNKS_PER_SHARD + 1, 2 * CHUNKS_PER_SHARD + 1], 0)


def test_a_shard_has_one_end(tmp_path: Path) -> None:
    open_or_create(tmp_path, Manifest(loaders=[sharded(2)]))
    store = PartStore(loader_directory(tmp_path, 0))
    for _ in range(2):
        store.record_shard_end(1, 5)
    assert store.shard_ends() == {1: 5}
    store.record_shard_end(1, 6)
    with pytest.raises(CorruptPartError, match="shard 1 .* ends after"):
        load(tmp_path)


def test_shards_that_have_changed_are_refused_by_name(tmp_path: Path) -> None:
    def begin(files: dict[str, bytes]) -> None:
        directory = tmp_path / "in"
        directory.mkdir(exist_ok=True)
        for path in directory.iterdir():
            path.unlink()
        for name, content in files.items():
            (directory / name).write_bytes(content)
        source = by_shard(describe(DataLoader(FileShards(sorted(directory.iterdir()), Path.read_bytes))), 1)
        assert isinstance(source, ShardStreamSource)
        source.freeze(loader_directory(tmp_path / "out", 0))
        open_or_create(tmp_path / "out", Manifest(loaders=[source.layout(CHUNK)]))

    begin({"a": b"1", "b": b"22", "c": b"3"})
    begin({"a": b"1", "b": b"22", "c": b"3"})
    with pytest.raises(JobMismatchError, match=r"shard 1 was \S+/b \(2 bytes\) and is \S+/b \(3 bytes\) now"):
        begin({"a": b"1", "b": b"222", "c": b"3"})
    with pytest.raises(JobMismatchError, match=r"shard 2 was \S+/c \(1 bytes\) and is not there now"):
        begin({"a": b"1", "b": b"22"})
    with pytest.raises(JobMismatchError, match="number of shards|shard 3 was not there and is"):
        begin({"a": b"1", "b": b"22", "c": b"3", "d": b"4"})


def test_a_job_is_gone_on_with_as_it_began_or_is_refused(tmp_path: Path) -> None:
    loader = DataLoader(Rows([3, 2]), batch_size=2)
    whole, sharded = describe(loader), by_shard(describe(loader), 1)
    open_or_create(tmp_path, Manifest(loaders=[whole.layout(CHUNK)]))
    with pytest.raises(JobMismatchError, match="the stream is read as a whole there, by shard here .sharding='off'"):
        open_or_create(tmp_path, Manifest(loaders=[sharded.layout(CHUNK)]))
    assert by_shard(whole, 1, began_by_shard=False) is whole
    assert isinstance(by_shard(whole, 9, began_by_shard=True), ShardStreamSource)


def test_too_few_shards_are_shared_out_as_before(caplog: pytest.LogCaptureFixture) -> None:
    source = describe(DataLoader(Rows([3, 2])))
    assert by_shard(source, 3, tells=True) is source
    assert "it has 2 shards only, and other replicas would have nothing to do" in caplog.text
    assert isinstance(by_shard(source, 2), ShardStreamSource)
    assert isinstance(by_shard(describe(DataLoader(Rows([]))), 2), ShardStreamSource), "there is nothing to do anyway"


def trainer(directory: Path, **options: Any) -> pl.Trainer:
    session.leave()
    strategy: Any = GPUOrchStrategy(output_dir=directory, **options)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(strategy=strategy, devices=1, accelerator="cpu", **quiet)  # type: ignore[arg-type]


class Model(pl.LightningModule):
    def predict_step(self, batch: torch.Tensor, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        return batch * 2


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec.*")
def test_a_run_goes_on_as_the_one_before_whatever_is_known_of_the_stream_now(tmp_path: Path) -> None:
    """Also beside a loader that is none; a directory from before there were shards, and one that has them."""
    rows = Rows([9, 0, 6], tmp_path / "notes")
    loaders = [DataLoader(rows, batch_size=BATCH), DataLoader(torch.arange(5.0)[:, None], batch_size=2)]  # type: ignore[arg-type]
    counts = {}
    for first in ("off", "auto"):
        directory = tmp_path / first
        before = trainer(directory, sharding=first).predict(Model(), loaders)
        next(directory.glob("dataloader_0/part-*")).unlink()
        again = trainer(directory, sharding="auto").predict(Model(), loaders)
        for results in (before, again):
            assert torch.cat(list(results[0]))[:, 0].tolist() == [2 * row for row in rows.rows]  # type: ignore[index]
            assert torch.cat(list(results[1]))[:, 0].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]  # type: ignore[index]
        counts[first] = len(before[0])  # type: ignore[index]
    assert counts == {"off": 4, "auto": 5}
    with pytest.raises(JobMismatchError, match="by shard there, as a whole here"):
        trainer(tmp_path / "auto", sharding="off").predict(Model(), loaders)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"num_shards": -1}, "num_shards=-1"),
        ({"num_shards": 10**12}, "more numbers than there are"),
        ({"num_shards": 2, "unit": "sample", "batch_size": 4}, "does not go with unit 'sample'"),
        ({"num_shards": "2"}, "num_shards is no integer"),
        ({"first_chunks": 8}, "growing chunks"),
        ({"ends": {"0": 5}}, "ends are no part of a layout"),
    ],
)
def test_layouts_that_cannot_be(changed: dict[str, Any], why: str) -> None:
    data = {**sharded(3).to_dict(), **changed}
    with pytest.raises((ConfigurationError, TypeError), match=why):
        LoaderLayout.from_dict(data)


def test_a_layout_survives_the_manifest_without_its_ends() -> None:
    layout = sharded(3).with_ends({0: 5, 1: 0, 2: 2})
    assert (layout.num_units, layout.num_batches, layout.num_chunks) == (7, 7, 4)
    assert LoaderLayout.from_dict(layout.to_dict()) == sharded(3)


# What is recognised


def test_what_tells_of_its_shards_is_a_source() -> None:
    assert isinstance(Rows([1]), ShardedSource)
    assert list(Rows([2, 0, 1])) == [0.0, 1.0, 2000.0], "it can be iterated by any other code"
    assert sorted(torch.cat(list(DataLoader(Rows([2, 0, 3]), batch_size=None, num_workers=2))).tolist()) == [
        0.0, 1.0, 2000.0, 2001.0, 2002.0,
    ]  # fmt: skip


class LoaderOfItsOwn(DataLoader[Any]):
    pass


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


@pytest.mark.parametrize(
    ("loader", "limit", "why"),
    [
        (lambda: DataLoader(Stream()), None, "it does not tell of its shards"),
        (lambda: LoaderOfItsOwn(Rows([1])), None, "LoaderOfItsOwn may read it in a way of its own"),
        (lambda: DataLoader(Rows([1]), batch_size=2, drop_last=True), None, "drop_last=True"),
        (lambda: DataLoader(Rows([1])), 3, "a number of batches is to be taken"),
    ],
)
def test_what_cannot_be_read_by_shard_says_what_that_costs(
    loader: Callable[[], Any], limit: int | None, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = describe(loader(), limit)
    assert by_shard(source, 4, tells=True) is source
    [message] = caplog.messages
    assert why in message
    assert "read as a whole by each of 4 replicas, 4 times its bytes" in message
    by_shard(source, 1, tells=True)
    assert len(caplog.messages) == 1, "one replica reads it once"


def test_a_number_of_shards_that_is_none_is_refused() -> None:
    class Odd(Rows):
        num_shards = "three"  # type: ignore[assignment]

    with pytest.raises(ConfigurationError, match="Odd.num_shards is 'three'"):
        by_shard(describe(DataLoader(Odd([1]))), 1)


def taken(dataset: Any, **options: Any) -> list[list[Any]] | str:
    """What the shards of a dataset are, each read from its beginning and from its second sample; or why it has none."""
    source = by_shard(describe(DataLoader(dataset, batch_size=2, **options)), 1)
    if not isinstance(source, ShardStreamSource):
        return "as a whole"
    shards = [list(source.shards.open_shard(index, 0)) for index in range(source.num_shards)]
    for index, samples in enumerate(shards):
        assert list(source.shards.open_shard(index, 1)) == samples[1:]
        assert list(source.shards.open_shard(index, len(samples) + 1)) == []
    return shards


class TestHuggingFace:
    @pytest.fixture
    def stream(self) -> Any:
        datasets = pytest.importorskip("datasets")

        def rows(shards: list[int]) -> Iterator[dict[str, int]]:
            for shard in shards:
                yield from ({"x": 10 * shard + number} for number in range(shard + 2))

        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2]})

    def test_its_data_sources_in_order(self, stream: Any) -> None:
        shards = taken(stream)
        assert [[row["x"] for row in shard] for shard in shards] == [[0, 1], [10, 11, 12], [20, 21, 22, 23]]
        assert [row for shard in shards for row in shard] == list(stream)

    @pytest.mark.parametrize(
        "step",
        [
            lambda s: s.map(lambda row: {"y": row["x"] + 1}),
            lambda s: s.filter(lambda row: row["x"] % 2),
            lambda s: s.with_format("numpy").select_columns("x"),
            lambda s: s.map(lambda row: {"y": 1}).remove_columns("x").rename_column("y", "z"),
        ],
    )
    def test_steps_that_look_at_one_sample(self, stream: Any, step: Any) -> None:
        changed = step(stream)
        shards = taken(changed)
        assert shards != "as a whole"
        assert [row for shard in shards for row in shard] == list(changed)

    @pytest.mark.parametrize(
        "step",
        [
            lambda s: s.shuffle(seed=0, buffer_size=3),
            lambda s: s.map(lambda rows: rows, batched=True),
            lambda s: s.map(lambda row, i: row, with_indices=True),
            lambda s: s.take(3),
            lambda s: s.skip(3),
            lambda s: s.batch(2),
            lambda s: s.repeat(2),
        ],
    )
    def test_steps_that_may_look_at_several(self, stream: Any, step: Any) -> None:
        assert taken(step(stream)) == "as a whole"

    def test_a_split(self, stream: Any) -> None:
        from datasets.distributed import split_dataset_by_node

        assert taken(split_dataset_by_node(stream, 1, 3)) == "as a whole"
        assert [[row["x"] for row in shard] for shard in taken(split_dataset_by_node(stream, 0, 1))] == [
            [0, 1], [10, 11, 12], [20, 21, 22, 23],
        ]  # fmt: skip

    def test_several_streams(self, stream: Any) -> None:
        import datasets

        assert taken(datasets.interleave_datasets([stream, stream])) == "as a whole"
        assert taken(datasets.concatenate_datasets([stream, stream])) == "as a whole"

    def test_a_function_that_changes_it_in_each_worker(self, stream: Any) -> None:
        assert taken(stream, num_workers=1, worker_init_fn=lambda worker: None) == "as a whole"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves files to be closed by chance
class TestLitData:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        pytest.importorskip("litdata")
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(tmp_path / "in"), chunk_size=4)
        for index in range(10):
            writer[index] = {"x": index}
        writer.done()
        writer.merge(1)
        return tmp_path

    @pytest.mark.parametrize("scheme", ["", "local:"])
    def test_its_chunks_in_order(self, directory: Path, scheme: str) -> None:
        """The second way they are fetched first, as from another machine."""
        import litdata

        stream = litdata.StreamingDataset(f"{scheme}{directory}/in", cache_dir=str(directory / "cache"))
        shards = taken(stream)
        assert [[row["x"] for row in shard] for shard in shards] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        source = by_shard(describe(DataLoader(stream)), 1)
        assert isinstance(source, ShardStreamSource)
        assert [(e.name, e.length) for e in source.shard_list.entries] == [
            ("chunk-0-0.bin", 4), ("chunk-0-1.bin", 4), ("chunk-0-2.bin", 2),
        ]  # fmt: skip

    def test_what_depends_on_several_chunks(self, directory: Path) -> None:
        import litdata

        assert taken(litdata.StreamingDataset(str(directory / "in"), shuffle=True)) == "as a whole"
        assert taken(litdata.StreamingDataset(str(directory / "in"), drop_last=True)) == "as a whole"
        stream = litdata.StreamingDataset(str(directory / "in"))
        both = litdata.CombinedStreamingDataset([stream, stream], weights=(0.5, 0.5), iterate_over_all=False)
        assert taken(both) == "as a whole"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves files to be closed by chance
class TestWebDataset:
    @pytest.fixture
    def urls(self, tmp_path: Path) -> list[str]:
        webdataset = pytest.importorskip("webdataset")
        for shard in range(3):
            with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
                for number in range(shard + 2):
                    writer.write({"__key__": f"{10 * shard + number:03d}", "x.cls": 10 * shard + number})
        return sorted(map(str, tmp_path.glob("*.tar")))

    @staticmethod
    def stream(urls: Any, **options: Any) -> Any:
        import webdataset

        return webdataset.WebDataset(urls, **{"shardshuffle": False, **options})

    @pytest.mark.parametrize("nodesplitter", [False, True])
    def test_its_archives_in_order(self, urls: list[str], nodesplitter: bool) -> None:
        import webdataset

        options = {"nodesplitter": webdataset.split_by_node} if nodesplitter else {}
        stream = self.stream(urls, **options).decode().to_tuple("x.cls").map(lambda row: row[0])
        assert taken(stream) == [[0, 1], [10, 11, 12], [20, 21, 22, 23]]

    def test_a_pipeline_that_is_put_together(self, urls: list[str]) -> None:
        import webdataset

        stream = webdataset.DataPipeline(
            webdataset.SimpleShardList(urls),
            webdataset.split_by_worker,
            webdataset.tarfile_to_samples(),
            webdataset.decode(),
            webdataset.select(lambda row: row["x.cls"] % 2 == 0),
        )
        assert [[row["x.cls"] for row in shard] for shard in taken(stream)] == [[0], [10, 12], [20, 22]]

    @pytest.mark.parametrize(
        "step",
        [
            lambda s: s.shuffle(10),
            lambda s: s.batched(2),
            lambda s: s.slice(3),
            lambda s: s.with_epoch(3),
            lambda s: s.repeat(2),
            lambda s: s.compose(lambda rows: rows),
        ],
    )
    def test_steps_that_may_look_at_several(self, urls: list[str], step: Any) -> None:
        assert taken(step(self.stream(urls))) == "as a whole"

    @pytest.mark.parametrize(
        "options", [{"shardshuffle": 2}, {"resampled": True}, {"shardshuffle": 2, "detshuffle": True}]
    )
    def test_archives_in_another_order(self, urls: list[str], options: dict[str, Any]) -> None:
        assert taken(self.stream(urls, **options)) == "as a whole"

    def test_sizes_tell_whether_an_archive_has_changed(self, urls: list[str]) -> None:
        source = by_shard(describe(DataLoader(self.stream(urls))), 1)
        assert isinstance(source, ShardStreamSource)
        assert [str(entry) for entry in source.shard_list.entries] == [
            f"{u} ({os.stat(u).st_size} bytes)" for u in urls
        ]


class TestArrow:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        for name, rows in (("a", range(5)), ("b", range(0)), ("c", range(10, 13))):
            table = pyarrow.table({"x": pyarrow.array(rows, pyarrow.int64()), "y": ["text"] * len(rows)})
            parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
        return tmp_path

    @pytest.mark.parametrize("as_list", [False, True])
    def test_row_groups_in_order(self, directory: Path, as_list: bool) -> None:
        source = ArrowShards(sorted(directory.iterdir()) if as_list else directory, columns=["x"])
        shards = [[row["x"] for row in shard] for shard in taken(source)]
        assert [shard for shard in shards if shard] == [[0, 1], [2, 3], [4], [10, 11], [12]]
        lengths = [source.shard_length(index) for index in range(source.num_shards)]
        assert [length for length in lengths if length] == [2, 2, 1, 2, 1]
        assert source.shard_name(1) == f"{directory}/a.parquet, row group 1"

    def test_files_of_other_formats(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import dataset, feather

        feather.write_feather(pyarrow.table({"x": range(3000)}), str(tmp_path / "a.arrow"))
        source = ArrowShards(dataset.dataset(tmp_path, format="ipc"))
        assert [row["x"] for row in source.open_shard(0, 2047)] == list(range(2047, 3000))

    def test_what_cannot_be_read(self, directory: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"there is no column \['z'\]"):
            ArrowShards(directory, columns=["x", "z"])
        with pytest.raises(ConfigurationError, match="ArrowShards cannot read"):
            ArrowShards(directory / "d.parquet")
        (directory / "e.parquet").write_bytes(b"no parquet")
        with pytest.raises(ConfigurationError, match="ArrowShards cannot read"):
            ArrowShards(directory)


def test_files_that_are_none() -> None:
    with pytest.raises(ConfigurationError, match="is a single path"):
        FileShards("a.jsonl", open)
    with pytest.raises(ConfigurationError, match="is not callable"):
        FileShards(["a.jsonl"], None)  # type: ignore[arg-type]
