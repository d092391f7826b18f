"""Commits: one winner, whole or absent, clear errors when the disk refuses; with real processes and file systems."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_gpuorch.errors import CorruptPartError, MissingPredictionsError, PredictionStorageError, StorageFullError
from lightning_gpuorch.predictions import LoaderLayout, PartStore, StoredBatch, check_writable
from lightning_gpuorch.predictions.storage.files import content_path, create_once, replace, sweep_temporaries
from lightning_gpuorch.predictions.storage.resume import set_right

ANY = LoaderLayout(unit="scattered", num_units=None, batch_size=1, chunk_size=1)
"""Of which no part is incomplete."""
FORK = multiprocessing.get_context("fork")
# Children of a fork begin at once; they run no threads of the parent, and numpy and small tensors start none.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def batch(first: int, size: int = 4, fill: float = 0.0) -> StoredBatch:
    return StoredBatch(first, range(first, first + size), size, torch.full((size, 8), fill))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(params=["links", "no links"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PartStore:
    """A store on a file system with hard links, and on one that refuses them."""
    if request.param == "no links":
        refuse_links(monkeypatch)
    return PartStore(tmp_path / "dataloader_0")


def refuse_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Any, target: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(source))

    monkeypatch.setattr(os, "link", link)


def test_commit_and_read(store: PartStore) -> None:
    batches = [batch(8, fill=1.0), StoredBatch(12, [30, 12, 14], 3, {"a": ["x", "y", "z"]}, units=[12, 13, 15])]
    assert store.done() == set()
    assert store.commit(2, batches, {"replica": 1})
    assert store.done() == {2}
    part = store.read(2)
    assert part.metadata == {"replica": 1}
    assert [(b.first_unit, list(b.indices or ()), b.size, b.units) for b in part.batches] == [
        (8, [8, 9, 10, 11], 4, None),
        (12, [30, 12, 14], 3, [12, 13, 15]),
    ]
    assert torch.equal(part.output(0), batches[0].output)
    assert part.output(1) == {"a": ["x", "y", "z"]}
    assert store.header(2) == part.header


def test_the_first_commit_wins(store: PartStore) -> None:
    assert store.commit(0, [batch(0, fill=1.0)], {}) is True
    assert store.commit(0, [batch(0, fill=2.0)], {}) is False
    assert store.read(0).output(0)[0, 0] == 1.0
    assert names(store.directory) == ["part-000000000.gpq"]


def test_large_part_numbers_and_foreign_files(store: PartStore) -> None:
    assert store.commit(12_345_678_901, [], {})
    for name in ("part-1.gpq", "part-000000001.gpq.bak", "xpart-000000002.gpq", "notes.txt"):
        (store.directory / name).write_text("not ours")
    assert store.done() == {12_345_678_901}


def test_discard_lets_a_chunk_be_computed_again(store: PartStore) -> None:
    store.commit(0, [batch(0)], {})
    store.discard(0)
    assert store.done() == set()
    assert store.commit(0, [batch(0)], {}) is True
    with pytest.raises(PredictionStorageError):
        store.discard(1)


def test_verify_names_each_damaged_part_and_only_those(store: PartStore) -> None:
    for chunk in range(4):
        store.commit(chunk, [batch(4 * chunk)], {})
    flip(store.path(1), -3)
    truncate(store.path(3), 100)
    found = dict(store.verify())
    assert {chunk for chunk, error in found.items() if error} == {1, 3}
    assert "part-000000001.gpq" in str(found[1])
    assert list(store.verify([0])) == [(0, None)]


def test_damaged_parts_are_set_aside_and_only_those(store: PartStore) -> None:
    for chunk in range(4):
        store.commit(chunk, [batch(4 * chunk, fill=float(chunk))], {})
    whole = content_path(store.path(0)).read_bytes()
    rng = random.Random(3)
    harms: list[Callable[[bytearray], bytes]] = [lambda raw: bytes(raw[: len(raw) // 2]), lambda raw: b""]
    for bit in sorted({0, 33, 8 * len(whole) - 1, *(rng.randrange(8 * len(whole)) for _ in range(60))}):
        harms.append(lambda raw, bit=bit: bytes(flipped(raw, bit)))  # type: ignore[misc]
    for harm in harms:
        path = content_path(store.path(2))
        before = path.read_bytes()
        path.write_bytes(harm(bytearray(before)))
        found = set_right(store, ANY, "all")[0]
        assert [str(path.parent if path.name == "content" else path) in str(error) for error in found] == [True]
        assert store.done() == {0, 1, 3}
        assert content_path(store.directory / "part-000000002.gpq.damaged").exists()
        assert store.commit(2, [batch(8, fill=2.0)], {}), "its place is free"
        assert set_right(store, ANY, "all")[0] == []


def flipped(raw: bytearray, bit: int) -> bytearray:
    raw[bit // 8] ^= 1 << bit % 8
    return raw


def test_a_part_in_the_place_of_another_is_set_aside(store: PartStore) -> None:
    store.commit(0, [batch(0)], {})
    store.path(0).rename(store.path(5))
    assert "holds chunk 0" in str(set_right(store, ANY, "all")[0][0])
    assert store.done() == set()


def test_a_part_of_a_newer_version_is_not_taken_for_damaged(store: PartStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gpuorch.predictions.storage.part_file.FORMAT_VERSION", 99)
    store.commit(0, [batch(0)], {})
    with pytest.raises(CorruptPartError, match="a newer version has written it"):
        set_right(store, ANY, "all")[0]
    assert store.done() == {0}


def test_a_header_is_verified_without_its_body(store: PartStore) -> None:
    store.commit(0, [batch(0)], {})
    flip(store.path(0), -3)
    assert store.header(0).entries[0].size == 4
    with pytest.raises(CorruptPartError, match="body"):
        store.read(0)
    flip(store.path(0), 40)
    with pytest.raises(CorruptPartError, match="header"):
        store.header(0)


def test_a_header_longer_than_the_first_read(store: PartStore) -> None:
    indices = [7 * i % 5000 for i in range(5000)]
    store.commit(0, [StoredBatch(0, indices, None, None)], {})
    assert store.header(0).entries[0].indices == indices


def test_a_renamed_part_is_noticed(store: PartStore) -> None:
    store.commit(0, [batch(0)], {})
    os.rename(store.path(0), store.path(1))
    for read in (store.read, store.header):
        with pytest.raises(CorruptPartError, match="holds chunk 0"):
            read(1)


def test_a_part_that_is_not_there(store: PartStore) -> None:
    with pytest.raises(MissingPredictionsError, match="part-000000005"):
        store.read(5)


def test_without_fsync_the_protocol_is_the_same(tmp_path: Path) -> None:
    store = PartStore(tmp_path / "d", fsync=False)
    assert store.commit(0, [batch(0)], {})
    assert not store.commit(0, [batch(0)], {})


def test_nfs_repeating_a_link_request_does_not_lose_the_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def link_whose_answer_is_lost(source: Any, target: Any) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "the repeated request finds the name", str(target))

    monkeypatch.setattr(os, "link", link_whose_answer_is_lost)
    assert create_once(tmp_path / "f", [b"mine"]) is True


# --- races and deaths -------------------------------------------------------------------------------------------------


def race(store: PartStore, writer: int, start: Any, won: Any) -> None:
    order = list(range(50))
    random.Random(writer // 2).shuffle(order)  # two by two the same order: every chunk is contended
    start.wait(60)
    for chunk in order:
        if store.commit(chunk, [batch(4 * chunk, fill=float(writer))], {"writer": writer}):
            won.put((chunk, writer))
    won.put(None)


def test_four_processes_racing_have_one_winner_per_chunk(store: PartStore) -> None:
    start, won = FORK.Barrier(4), FORK.Queue()
    writers = [FORK.Process(target=race, args=(store, number, start, won)) for number in range(4)]
    for writer in writers:
        writer.start()
    winners: dict[int, list[int]] = {}
    finished = 0
    while finished < 4:
        item = won.get(timeout=60)
        if item is None:
            finished += 1
        else:
            winners.setdefault(item[0], []).append(item[1])
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert sorted(winners) == list(range(50))
    assert all(len(who) == 1 for who in winners.values())
    for chunk, (winner,) in winners.items():
        part = store.read(chunk)
        assert part.metadata["writer"] == winner
        assert part.output(0).eq(winner).all()
    assert names(store.directory) == [store.path(chunk).name for chunk in range(50)]


def commit_for_ever(store: PartStore, ready: Any) -> None:
    payload = np.arange(100_000.0)
    for chunk in range(10**6):
        store.commit(chunk, [StoredBatch(chunk, [chunk], 1, payload + chunk)], {})
        ready.set()


def test_a_killed_committer_leaves_no_part_of_a_part(store: PartStore) -> None:
    rng = random.Random(3)
    for _ in range(12):
        ready = FORK.Event()
        writer = FORK.Process(target=commit_for_ever, args=(store, ready))
        writer.start()
        assert ready.wait(60)
        time.sleep(rng.random() * 0.03)  # the moment is the point
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join(60)
        assert all(error is None for _, error in store.verify())
        # What was being written may still lie there; it disturbs nobody, and the sweep takes it away.
        sweep_temporaries(store.directory, older_than_seconds=-1)
        assert all(name.startswith("part-") for name in names(store.directory))
        for chunk in store.done():
            store.discard(chunk)


def test_sweep_takes_what_dead_writers_left_and_nothing_else(store: PartStore) -> None:
    store.commit(0, [batch(0)], {})
    old, young, tree, empty, link, pipe = (store.directory / f".tmp-host-{number}" for number in range(6))
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    tree.mkdir()
    (tree / "content").write_bytes(b"x")
    empty.mkdir()
    link.symlink_to(store.directory.parent)
    os.mkfifo(pipe)
    for path in (old, tree, empty):
        os.utime(path, (time.time() - 7200,) * 2)
    assert store.sweep_temporaries(older_than_seconds=3600) == 3
    assert names(store.directory) == [young.name, link.name, pipe.name, "part-000000000.gpq"]
    assert store.sweep_temporaries(0.0) == 1
    assert names(store.directory) == [link.name, pipe.name, "part-000000000.gpq"]
    assert PartStore(store.directory.parent / "nothing").sweep_temporaries() == 0


def test_another_run_s_sweeps_never_take_a_living_writer_s_files(store: PartStore) -> None:
    """Also with another clock, in another container: its lock tells that a writer lives, not its age or number."""
    store.commit(0, [batch(0)], {})
    over = threading.Event()

    def sweep() -> None:
        while not over.is_set():
            sweep_temporaries(store.directory, older_than_seconds=-1e9)

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for chunk in range(1, 100):
            assert store.commit(chunk, [batch(0)], {})
    finally:
        over.set()
        sweeper.join(30)
    assert store.done() == set(range(100))
    assert all(error is None for _, error in store.verify())
    assert all(name.startswith("part-") for name in names(store.directory))


@pytest.mark.parametrize("kind", ["pipe", "link", "dangling link", "empty directory"])
def test_what_is_no_file_is_refused_at_once_and_set_aside(kind: str, tmp_path: Path) -> None:
    store = PartStore(tmp_path / "dataloader_0")
    for chunk in range(2):
        store.commit(chunk, [batch(0)], {})
    path = store.path(1)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty directory":
        path.mkdir()
    else:
        path.symlink_to(store.path(0) if kind == "link" else tmp_path / "nowhere")
    assert [error is None for _, error in store.verify()] == [True, False]
    (error,) = set_right(store, ANY, "all")[0]
    assert str(path) in str(error)
    assert store.done() == {0}


def test_replace_is_whole_and_works_on_what_create_once_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, prepare in (("a", lambda: None), ("b", lambda: refuse_links(monkeypatch))):
        prepare()
        path = tmp_path / name
        assert create_once(path, [b"old"])
        replace(path, b"new")
        assert content_path(path).read_bytes() == b"new"
        assert not create_once(path, [b"other"])
    assert names(tmp_path) == ["a", "b"]


# --- refusals of the disk ---------------------------------------------------------------------------------------------


def test_a_directory_that_vanishes_is_an_error_and_stays_gone(store: PartStore) -> None:
    store.commit(0, [batch(0)], {})
    shutil.rmtree(store.directory)
    with pytest.raises(PredictionStorageError, match="vanished"):
        store.commit(1, [batch(4)], {})
    assert not store.directory.exists()
    other = PartStore(store.directory.parent / "gone" / "dataloader_0")
    with pytest.raises(PredictionStorageError, match="vanished"):
        other.commit(1, [batch(4)], {})
    assert not other.directory.parent.exists()


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    for directory in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(PredictionStorageError, match="taken"):
            check_writable(directory)


def test_check_writable_makes_the_directory_and_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []


def try_as_nobody(directory: Path, said: Any) -> None:
    os.setgid(65534)
    os.setuid(65534)
    for act in (lambda: check_writable(directory), lambda: PartStore(directory).commit(0, [], {})):
        try:
            act()
        except PredictionStorageError as error:
            said.put((type(error).__name__, str(error)))
        else:
            said.put(("nothing", ""))


@pytest.mark.root
def test_a_directory_of_somebody_else(tmp_path: Path) -> None:
    require_root()
    said = FORK.Queue()
    nobody = FORK.Process(target=try_as_nobody, args=(tmp_path, said))
    nobody.start()
    for _ in range(2):
        kind, message = said.get(timeout=60)
        assert kind == "PredictionStorageError"
        assert f"{tmp_path} is not writable: Permission denied" in message
    nobody.join(60)


def require_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


def mount(arguments: list[str], directory: Path) -> Callable[[], None]:
    """Mount, or skip where even root may not; returns what undoes it."""
    require_root()
    directory.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", *arguments, str(directory)], capture_output=True, text=True, timeout=30, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    return lambda: subprocess.run(["umount", "-l", str(directory)], check=True, timeout=30) and None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    directory = tmp_path / "disk"
    unmount = mount(["-t", "tmpfs", "-o", "size=2m", "tmpfs"], directory)
    yield directory
    unmount()


def fill(store: PartStore, payload: StoredBatch) -> None:
    for chunk in range(20):
        store.commit(chunk, [payload], {})


@pytest.mark.root
def test_a_full_disk(small_disk: Path) -> None:
    store = PartStore(small_disk / "dataloader_0")
    payload = StoredBatch(0, [0], 1, torch.zeros(100_000))  # 400 kB
    with pytest.raises(StorageFullError, match=r"no space is left in .*_0: 40\d,\d+ bytes wanted, .* free") as info:
        fill(store, payload)
    assert info.value.errno == errno.ENOSPC
    assert isinstance(info.value, OSError)
    written = len(store.done())
    assert 1 < written < 6
    assert store.done() == set(range(written))
    assert all(error is None for _, error in store.verify())
    assert names(store.directory) == [store.path(chunk).name for chunk in range(written)]  # no temporaries
    with pytest.raises(StorageFullError):
        check_writable(small_disk)
    store.discard(0)
    assert store.commit(written, [payload], {})


@pytest.mark.root
def test_a_disk_that_becomes_read_only(small_disk: Path) -> None:
    store = PartStore(small_disk / "dataloader_0")
    store.commit(0, [batch(0)], {})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=30)
    with pytest.raises(PredictionStorageError, match=r"not writable: Read-only"):
        store.commit(1, [batch(4)], {})
    assert store.read(0).output(0).shape == (4, 8)


@pytest.mark.root
def test_a_real_file_system_without_hard_links(tmp_path: Path) -> None:
    make = shutil.which("mkfs.vfat") or shutil.which("mkfs.exfat")
    if make is None:
        pytest.skip("needs mkfs.vfat or mkfs.exfat")
    require_root()
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(16 * 2**20)
    subprocess.run([make, str(image)], check=True, capture_output=True, timeout=30)
    unmount = mount(["-o", "loop", str(image)], tmp_path / "disk")
    try:
        store = PartStore(tmp_path / "disk" / "dataloader_0")
        assert store.commit(0, [batch(0, fill=1.0)], {}) is True
        assert store.commit(0, [batch(0, fill=2.0)], {}) is False
        assert store.read(0).output(0)[0, 0] == 1.0
    finally:
        unmount()


def flip(path: Path, position: int) -> None:
    path = content_path(path)
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def truncate(path: Path, length: int) -> None:
    os.truncate(content_path(path), length)


def test_the_journal_is_kept_without_torch() -> None:
    code = (
        "import sys; from lightning_gpuorch.predictions.storage.journal import PartJournal; "
        "from lightning_gpuorch.predictions.storage import resume; "
        "from lightning_gpuorch.predictions.storage.layout import LoaderLayout; "
        "layout = LoaderLayout(unit='scattered', num_units=None, batch_size=1, chunk_size=1); "
        "resume.prepare(PartJournal('.'), layout, 'all'); "
        "assert 'torch' not in sys.modules, 'torch'; assert 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_content_is_synced_before_its_name_and_the_name_before_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, link = os.fsync, os.link

    def seen_fsync(descriptor: int) -> None:
        calls.append("fsync directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        fsync(descriptor)

    def seen_link(source: Any, target: Any) -> None:
        calls.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "link", seen_link)
    for _ in range(2):  # a loser must not report success before the name is durable either
        calls.clear()
        create_once(tmp_path / "f", [b"x"])
        assert calls == ["fsync file", "link", "fsync directory"]
