"""Writing in the background: cheap for the loop, bounded in memory, and no error is lost."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_gpuorch.errors import PredictionStorageError, StorageFullError, UnsupportedPredictionError
from lightning_gpuorch.predictions import PartStore, PartWriter, StoredBatch
from lightning_gpuorch.predictions.storage.fragments import FragmentWriter
from lightning_gpuorch.predictions.storage.writer import size_bytes


def one(chunk: int, output: Any = None) -> list[StoredBatch]:
    return [StoredBatch(chunk, [chunk], 1, torch.zeros(4) if output is None else output)]


class SlowStore(PartStore):
    """A store whose commits wait until they are let through."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.gate = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)

    def commit(self, chunk: int, batches: Any, metadata: Any) -> bool:
        self.begun.release()
        assert self.gate.acquire(timeout=60)
        return super().commit(chunk, batches, metadata)


@pytest.fixture
def slow(tmp_path: Path) -> SlowStore:
    return SlowStore(tmp_path / "dataloader_0")


def test_commits_everything_in_order_and_tells(tmp_path: Path) -> None:
    stores = [PartStore(tmp_path / f"dataloader_{loader}") for loader in range(2)]
    stores[1].commit(2, one(2), {})
    told: list[tuple[int, int, bool, int, int]] = []
    with PartWriter(stores, max_pending_bytes=1000, on_committed=lambda *what: told.append(what)) as writer:
        for chunk in range(5):
            writer.put(chunk % 2, chunk // 2 * 2, one(chunk), {"n": chunk})
        writer.flush(timeout_seconds=60)
        placed = [(0, 0, True), (1, 0, True), (0, 2, True), (1, 2, False), (0, 4, True)]
        assert told == [(*place, 1, 16) for place in placed], "with samples and bytes"
        assert writer.pending_bytes == 0
    assert (stores[0].done(), stores[1].done()) == ({0, 2, 4}, {0, 2})
    assert stores[0].read(4).metadata == {"n": 4}
    assert not any(thread.name == "gpuorch-writer" for thread in threading.enumerate())


def test_close_writes_what_is_left(tmp_path: Path) -> None:
    store = PartStore(tmp_path / "d")
    writer = PartWriter([store], max_pending_bytes=10**9)
    for chunk in range(20):
        writer.put(0, chunk, one(chunk), {})
    writer.close()
    writer.close()
    assert store.done() == set(range(20))
    with pytest.raises(PredictionStorageError, match="closed"):
        writer.put(0, 20, one(20), {})


def put_and_fail(store: PartStore) -> None:
    with PartWriter([store], max_pending_bytes=10**9) as writer:
        writer.put(0, 0, one(0), {})
        raise ZeroDivisionError


def test_an_exception_in_the_loop_does_not_lose_what_was_computed(tmp_path: Path) -> None:
    store = PartStore(tmp_path / "d")
    with pytest.raises(ZeroDivisionError):
        put_and_fail(store)
    assert store.done() == {0}


def test_waits_only_when_too_much_is_pending(slow: SlowStore) -> None:
    writer = PartWriter([slow], max_pending_bytes=2500)
    kilobyte = torch.zeros(1000, dtype=torch.uint8)
    for chunk in range(2):
        writer.put(0, chunk, one(chunk, kilobyte), {})
    passed = threading.Event()

    def put_one_more() -> None:
        writer.put(0, 2, one(2, kilobyte), {})
        passed.set()

    third = threading.Thread(target=put_one_more)
    third.start()
    assert slow.begun.acquire(timeout=60)
    assert not passed.wait(0.2)
    assert writer.pending_bytes == 2000
    slow.gate.release()
    assert passed.wait(60)
    slow.gate.release(10)
    third.join(60)
    writer.close()
    assert slow.done() == {0, 1, 2}


def test_what_is_larger_than_the_limit_goes_alone(tmp_path: Path) -> None:
    store = PartStore(tmp_path / "d")
    with PartWriter([store], max_pending_bytes=10) as writer:
        for chunk in range(3):
            writer.put(0, chunk, one(chunk, torch.zeros(1000)), {})
    assert store.done() == {0, 1, 2}


def test_flush_keeps_to_its_time(slow: SlowStore) -> None:
    writer = PartWriter([slow], max_pending_bytes=10**6)
    writer.put(0, 0, one(0), {})
    with pytest.raises(TimeoutError, match="1 parts"):
        writer.flush(timeout_seconds=0.05)
    slow.gate.release()
    writer.flush(timeout_seconds=60)
    writer.close()
    assert slow.done() == {0}


@pytest.mark.parametrize("surface", ["put", "flush", "close"])
def test_an_error_surfaces_once_and_names_what_is_not_durable(slow: SlowStore, surface: str) -> None:
    writer = PartWriter([slow], max_pending_bytes=10**6)
    writer.put(0, 0, one(0), {})
    writer.put(0, 1, one(1, {"bad": object()}), {})
    writer.put(0, 2, one(2), {})
    slow.gate.release(10)
    writer._thread.join(60)
    calls = {"put": lambda: writer.put(0, 3, one(3), {}), "flush": writer.flush, "close": writer.close}
    with pytest.raises(UnsupportedPredictionError, match=r"output\['bad'\]") as info:
        calls[surface]()
    if sys.version_info >= (3, 11):
        assert "chunk 1 of dataloader 0, chunk 2 of dataloader 0" in info.value.__notes__[0]
    assert slow.done() == {0}
    with pytest.raises(PredictionStorageError, match="has failed"):
        writer.put(0, 4, one(4), {})
    writer.close()


def test_a_waiting_put_is_released_by_an_error(slow: SlowStore) -> None:
    writer = PartWriter([slow], max_pending_bytes=10)
    writer.put(0, 0, one(0, [object()] * 3), {})
    raised: list[BaseException] = []

    def put_one_more() -> None:
        with pytest.raises(UnsupportedPredictionError) as info:
            writer.put(0, 1, one(1), {})
        raised.append(info.value)

    second = threading.Thread(target=put_one_more)
    second.start()
    slow.gate.release(2)
    second.join(60)
    assert len(raised) == 1
    writer.close()


def test_what_on_committed_raises_is_not_swallowed(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise ConnectionError("the coordinator is gone")

    writer = PartWriter([PartStore(tmp_path / "d")], max_pending_bytes=10**6, on_committed=fail)
    writer.put(0, 0, one(0), {})
    with pytest.raises(ConnectionError, match="the coordinator is gone"):
        writer.flush(timeout_seconds=60)
    writer.close()


def test_a_directory_that_vanishes(tmp_path: Path) -> None:
    writer = PartWriter([PartStore(tmp_path / "d")], max_pending_bytes=10**6)
    writer.put(0, 0, one(0), {})
    writer.flush(timeout_seconds=60)
    shutil.rmtree(tmp_path / "d")
    writer.put(0, 1, one(1), {})
    with pytest.raises(PredictionStorageError, match="vanished"):
        writer.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True, timeout=30)


@pytest.mark.root
def test_a_full_disk_is_waited_for(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    (small_disk / "ballast").write_bytes(bytes(900_000))
    store = PartStore(small_disk / "dataloader_0")
    with PartWriter([store], max_pending_bytes=10**9, full_retry_seconds=60) as writer:
        writer.put(0, 0, one(0, torch.zeros(100_000)), {})
        deadline = time.monotonic() + 30
        while "Trying again" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        (small_disk / "ballast").unlink()
        writer.flush(timeout_seconds=60)
    assert "no space is left" in caplog.text
    assert store.done() == {0}


@pytest.mark.root
def test_fragments_make_room_for_parts(small_disk: Path) -> None:
    fragments = FragmentWriter(small_disk, 0, "samples")
    fragments.add(StoredBatch(0, [0], 1, torch.zeros(150_000)), {0})
    fragments.write()
    store = PartStore(small_disk / "dataloader_0")
    with PartWriter([store], max_pending_bytes=10**9, full_retry_seconds=60, on_full=fragments.give_up) as writer:
        writer.put(0, 0, one(0, torch.zeros(150_000)), {})
    assert store.done() == {0}
    assert [path.name for path in small_disk.iterdir()] == ["dataloader_0"]


@pytest.mark.root
def test_a_disk_that_stays_full_is_an_error(small_disk: Path) -> None:
    store = PartStore(small_disk / "dataloader_0")
    writer = PartWriter([store], max_pending_bytes=10**9, full_retry_seconds=0.3)
    for chunk in range(6):
        writer.put(0, chunk, one(chunk, torch.zeros(60_000)), {})
    with pytest.raises(StorageFullError, match="free"):
        writer.close()
    assert len(store.done()) == 4
    assert all(error is None for _, error in store.verify())
    assert sorted(path.name for path in store.directory.iterdir()) == [store.path(chunk).name for chunk in range(4)]


def test_a_writer_nobody_closes_is_closed_at_exit(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys, torch
        from lightning_gpuorch.predictions import PartStore, PartWriter, StoredBatch
        writer = PartWriter([PartStore(sys.argv[1])], max_pending_bytes=10**9)
        for chunk in range(30):
            writer.put(0, chunk, [StoredBatch(chunk, [chunk], 1, torch.zeros(50_000))], {})
    """)
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "d")], check=True, timeout=120)
    assert PartStore(tmp_path / "d").done() == set(range(30))


def test_handing_over_a_megabyte_costs_the_loop_at_most_100_microseconds(tmp_path: Path) -> None:
    store = PartStore(tmp_path / "d")
    chunks = [one(chunk, {"x": torch.zeros(2**18), "text": ["abc"] * 64}) for chunk in range(60)]
    seconds = []
    with PartWriter([store], max_pending_bytes=10**9) as writer:
        for chunk, batches in enumerate(chunks):
            start = time.perf_counter()
            writer.put(0, chunk, batches, {})
            seconds.append(time.perf_counter() - start)
            time.sleep(0.002)  # a step
    assert store.done() == set(range(60))
    assert statistics.median(seconds) < 100e-6, sorted(seconds)


def test_sizes() -> None:
    assert size_bytes(torch.zeros(10)) == 40
    assert size_bytes({"a": np.zeros(5), "b": (torch.zeros(2, dtype=torch.uint8),)}) == 42
    words = ["word"] * 10**6
    start = time.perf_counter()
    assert size_bytes(words) > 4 * 10**6
    assert time.perf_counter() - start < 0.01
