"""The identity of a job: what begins it, what goes on with it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import pytest

from lightning_gpuorch.errors import CorruptPartError, JobMismatchError, PredictionStorageError
from lightning_gpuorch.predictions import LoaderLayout, Manifest, PartStore
from lightning_gpuorch.predictions.storage.journal import loader_directory
from lightning_gpuorch.predictions.storage.manifest import (
    Quarantined,
    load,
    open_or_create,
    read_quarantine,
    record_quarantine,
    set_num_units,
)

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

SAMPLES = LoaderLayout(
    unit="sample", num_units=100, batch_size=8, chunk_size=32, identity={"dataset": "mine.Texts", "length": 100}
)
STREAM = LoaderLayout(unit="batch", num_units=None, batch_size=None, chunk_size=4, identity={"dataset": "mine.Stream"})
MANIFEST = Manifest(loaders=[SAMPLES, STREAM], model_fingerprint="abc", versions={"torch": "2"}, extra={"note": [1]})


def change(loader: int = 0, **fields: Any) -> Manifest:
    layouts = list(MANIFEST.loaders)
    layouts[loader] = dataclasses.replace(layouts[loader], **fields)
    return dataclasses.replace(MANIFEST, loaders=layouts)


def test_begins_and_goes_on(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "job"
    assert load(directory) is None
    assert open_or_create(directory, MANIFEST) == MANIFEST
    assert load(directory) == MANIFEST
    later = dataclasses.replace(MANIFEST, created=MANIFEST.created + 10, versions={"torch": "3"})
    assert open_or_create(directory, later) == MANIFEST
    assert [path.name for path in directory.iterdir()] == ["manifest.json"]


def test_goes_on_with_another_batch_size_and_the_old_chunks(tmp_path: Path) -> None:
    open_or_create(tmp_path, MANIFEST)
    in_force = open_or_create(tmp_path, change(batch_size=5, chunk_size=10))
    assert (in_force.loaders[0].batch_size, in_force.loaders[0].chunk_size) == (5, 32)
    assert load(tmp_path) == in_force


REFUSED = [
    (change(identity={"dataset": "mine.Texts", "length": 120}), "dataloader 0: length: 100 there, 120 here"),
    (change(identity={"dataset": "mine.Texts"}), "dataloader 0: length: 100 there, absent here"),
    (change(num_units=90), "dataloader 0: number of samples: 100 there, 90 here"),
    (change(unit="scattered"), "dataloader 0: work is counted by sample there, by scattered here"),
    (dataclasses.replace(MANIFEST, loaders=[SAMPLES]), "number of dataloaders: 2 there, 1 here"),
    (dataclasses.replace(MANIFEST, model_fingerprint="xyz"), "model weights: fingerprint abc there, xyz here"),
]


@pytest.mark.parametrize(("wanted", "line"), REFUSED, ids=[line for _, line in REFUSED])
def test_refuses_another_job_and_names_the_difference(tmp_path: Path, wanted: Manifest, line: str) -> None:
    open_or_create(tmp_path, MANIFEST)
    with pytest.raises(JobMismatchError) as info:
        open_or_create(tmp_path, wanted)
    assert len(info.value.differences) == 1
    assert info.value.differences[0].startswith(line)
    assert line in str(info.value)
    assert "another output directory" in str(info.value)
    assert load(tmp_path) == MANIFEST


def test_names_every_difference(tmp_path: Path) -> None:
    open_or_create(tmp_path, MANIFEST)
    wanted = dataclasses.replace(change(num_units=90), model_fingerprint="xyz")
    with pytest.raises(JobMismatchError) as info:
        open_or_create(tmp_path, wanted)
    assert len(info.value.differences) == 2


def test_a_fingerprint_counts_only_where_both_have_one(tmp_path: Path) -> None:
    open_or_create(tmp_path, MANIFEST)
    open_or_create(tmp_path, dataclasses.replace(MANIFEST, model_fingerprint=None))


def test_refuses_parts_without_a_manifest(tmp_path: Path) -> None:
    open_or_create(tmp_path, MANIFEST)
    PartStore(loader_directory(tmp_path, 0)).commit(0, [], {})
    os.remove(tmp_path / "manifest.json")
    with pytest.raises(JobMismatchError, match=r"no manifest\.json"):
        open_or_create(tmp_path, MANIFEST)


def test_takes_a_directory_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    open_or_create(tmp_path, MANIFEST)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_no_flipped_bit_changes_the_meaning_unnoticed(tmp_path: Path) -> None:
    open_or_create(tmp_path, MANIFEST)
    path = tmp_path / "manifest.json"
    raw = path.read_bytes()
    noticed = 0
    for position in random.Random(5).sample(range(len(raw) * 8), 400):
        damaged = bytearray(raw)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            assert load(tmp_path) == MANIFEST  # white space may become other white space
        except (CorruptPartError, JobMismatchError):
            noticed += 1
    assert noticed > 360


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    open_or_create(tmp_path, MANIFEST)
    path = tmp_path / "manifest.json"
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(CorruptPartError, match=r"manifest\.json"):
            open_or_create(tmp_path, MANIFEST)


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lightning_gpuorch.predictions.storage.manifest.FORMAT_VERSION", 99)
        open_or_create(tmp_path, MANIFEST)
    with pytest.raises(JobMismatchError, match="format 99"):
        open_or_create(tmp_path, MANIFEST)


def test_the_manifest_is_readable_json(tmp_path: Path) -> None:
    open_or_create(tmp_path, MANIFEST)
    data = json.loads((tmp_path / "manifest.json").read_text())
    assert data["loaders"][0]["identity"] == {"dataset": "mine.Texts", "length": 100}


def open_at_once(directory: Path, chunk_size: int, start: Any, results: Any) -> None:
    start.wait(60)
    results.put(open_or_create(directory, change(chunk_size=chunk_size)).loaders[0].chunk_size)


def test_all_who_begin_at_once_get_the_same_manifest(tmp_path: Path) -> None:
    for attempt in range(5):
        directory = tmp_path / str(attempt)
        start, results = FORK.Barrier(4), FORK.Queue()
        openers = [
            FORK.Process(target=open_at_once, args=(directory, size, start, results)) for size in (8, 16, 32, 64)
        ]
        for opener in openers:
            opener.start()
        found = {results.get(timeout=60) for _ in openers}
        for opener in openers:
            opener.join(60)
        assert len(found) == 1


def test_the_end_of_a_stream(tmp_path: Path) -> None:
    open_or_create(tmp_path, MANIFEST)
    assert set_num_units(tmp_path, 1, 17).loaders[1].num_units == 17
    assert set_num_units(tmp_path, 1, 17).loaders[1].num_units == 17
    assert open_or_create(tmp_path, MANIFEST).loaders[1].num_units == 17
    with pytest.raises(JobMismatchError, match="17 elsewhere"):
        set_num_units(tmp_path, 1, 18)
    # A new batch size of the other loader does not lose it.
    assert open_or_create(tmp_path, change(batch_size=3)).loaders[1].num_units == 17


def test_quarantine_notes_outlive_a_killed_writer(tmp_path: Path) -> None:
    assert read_quarantine(tmp_path) == []
    record_quarantine(tmp_path, 0, 3, 4, "out of memory at batch size 1")
    with open(tmp_path / "quarantine.jsonl", "ab") as file:
        file.write(b'{"loader": 0, "sta')  # killed in the middle of a line
    record_quarantine(tmp_path, 1, 8, 16, 'a "reason"\nof two lines')
    assert read_quarantine(tmp_path) == [
        Quarantined(0, 3, 4, "out of memory at batch size 1"),
        Quarantined(1, 8, 16, 'a "reason"\nof two lines'),
    ]


def test_quarantine_in_a_directory_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(PredictionStorageError, match="vanished"):
        record_quarantine(tmp_path / "gone", 0, 3, 4, "why")
